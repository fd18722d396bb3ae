//! The certificate table at the end of an image: WIN_CERTIFICATE entries, eight bytes apart (UEFI 2.10 §32.2.4).

use std::ops::Range;

use super::fields::le32;
use super::{CERTIFICATE_ALIGNMENT, PeError};

/// dwLength, wRevision and wCertificateType.
pub(in crate::uefi) const HEADER_BYTES: usize = 8;
/// WIN_CERT_REVISION_2_0.
pub(in crate::uefi) const REVISION: u16 = 0x0200;
/// WIN_CERT_TYPE_PKCS_SIGNED_DATA.
pub(in crate::uefi) const PKCS_SIGNED_DATA: u16 = 0x0002;

/// One entry of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Certificate<'a> {
    /// The PKCS #7 message, with what pads it.
    pub content: &'a [u8],
}

/// Where the table of the directory `begin`, `length` is, behind an image that ends at `end`.
pub(super) fn locate(
    bytes: &[u8],
    end: usize,
    begin: u32,
    length: u32,
) -> Result<Option<Range<usize>>, PeError> {
    if begin == 0 && length == 0 {
        return Ok(None);
    }
    let outside = PeError::Certificates("lies outside the file");
    let (Ok(begin), Ok(length)) = (usize::try_from(begin), usize::try_from(length)) else {
        return Err(outside);
    };
    let table = begin..begin.checked_add(length).ok_or(outside)?;
    if begin < end {
        return Err(PeError::Certificates("overlaps the headers or a section"));
    }
    if begin % CERTIFICATE_ALIGNMENT != 0 {
        return Err(PeError::Certificates("does not begin at a multiple of eight"));
    }
    if table.end > bytes.len() {
        return Err(PeError::Certificates("lies outside the file"));
    }
    if table.end < bytes.len() {
        return Err(PeError::Certificates("is followed by bytes that no signature covers"));
    }
    check(&bytes[table.clone()])?;
    Ok(Some(table))
}

/// Every entry has a length that fits, a revision and type that firmware knows, and zeros for padding.
fn check(table: &[u8]) -> Result<(), PeError> {
    if table.is_empty() {
        return Err(PeError::Certificates("is empty"));
    }
    let mut rest = table;
    while !rest.is_empty() {
        let (entry, after) = split(rest)?;
        if entry[4..6] != REVISION.to_le_bytes() {
            return Err(PeError::Certificates("has an entry of an unknown revision"));
        }
        if entry[6..8] != PKCS_SIGNED_DATA.to_le_bytes() {
            return Err(PeError::Certificates("has an entry that is no PKCS #7 signature"));
        }
        if entry.len() == HEADER_BYTES {
            return Err(PeError::Certificates("has an empty entry"));
        }
        rest = after;
    }
    Ok(())
}

/// The first entry and what follows its padding.
fn split(table: &[u8]) -> Result<(&[u8], &[u8]), PeError> {
    let length = usize::try_from(le32(table, 0, "certificate table")?).unwrap_or(usize::MAX);
    if length < HEADER_BYTES {
        return Err(PeError::Certificates("has an entry shorter than its header"));
    }
    let padded =
        length.checked_next_multiple_of(CERTIFICATE_ALIGNMENT).filter(|padded| *padded <= table.len());
    let Some(padded) = padded else {
        return Err(PeError::Certificates("has an entry that ends outside of it"));
    };
    if table[length..padded].iter().any(|byte| *byte != 0) {
        return Err(PeError::Certificates("has bytes between its entries"));
    }
    Ok((&table[..length], &table[padded..]))
}

/// The entries of a table that [`locate`] has checked.
pub(super) fn entries(table: &[u8]) -> Vec<Certificate<'_>> {
    let mut entries = Vec::new();
    let mut rest = table;
    while let Ok((entry, after)) = split(rest) {
        entries.push(Certificate { content: &entry[HEADER_BYTES..] });
        rest = after;
    }
    entries
}
