//! Signature lists: what `PK`, `KEK` and `db` hold (UEFI 2.10 §32.4.1, EFI_SIGNATURE_LIST), of X.509 certificates.

use std::fmt;

/// EFI_CERT_X509_GUID.
pub const X509: Guid =
    Guid::new(0xa5c0_59a1, 0x94e4, 0x4aa7, [0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72]);
/// Type, list size, header size and signature size.
const HEADER_BYTES: usize = 28;

/// A GUID, in the byte order that UEFI keeps: the first three fields little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guid([u8; 16]);

impl Guid {
    /// Of the fields that its text shows.
    pub const fn new(first: u32, second: u16, third: u16, rest: [u8; 8]) -> Self {
        let ([a, b, c, d], [e, f], [g, h]) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes());
        let [i, j, k, l, m, n, o, p] = rest;
        Self([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
    }

    /// Of its bytes as they are in memory.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes as they are in memory.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g, h, i, rest @ ..] = self.0;
        write!(
            f,
            "{d:02x}{c:02x}{b:02x}{a:02x}-{g:02x}{e:02x}-{i:02x}{h:02x}-{:02x}{:02x}-",
            rest[0], rest[1]
        )?;
        rest[2..].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Why a list cannot be written or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EslError {
    /// Sizes have 32 bits.
    #[error("the certificate is too long for a signature list")]
    TooLong,
    /// The file ends inside a list, or sizes do not fit together.
    #[error("the signature list's sizes do not fit together")]
    Sizes,
    /// Hashes or raw keys.
    #[error("the signature list has entries of type {0}, not X.509 certificates")]
    Kind(String),
}

/// A list of one certificate, `der`, that `owner` answers for.
///
/// # Errors
/// [`EslError::TooLong`].
pub fn write(owner: &Guid, der: &[u8]) -> Result<Vec<u8>, EslError> {
    let too_long = |_| EslError::TooLong;
    let signature = u32::try_from(der.len() + 16).map_err(too_long)?;
    let list = u32::try_from(der.len() + 16 + HEADER_BYTES).map_err(too_long)?;
    let mut bytes = Vec::with_capacity(der.len() + 16 + HEADER_BYTES);
    bytes.extend(X509.as_bytes());
    bytes.extend(list.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(signature.to_le_bytes());
    bytes.extend(owner.as_bytes());
    bytes.extend(der);
    Ok(bytes)
}

/// The certificates of the lists in `bytes`, each with its owner.
///
/// # Errors
/// [`EslError`].
pub fn read(mut bytes: &[u8]) -> Result<Vec<(Guid, &[u8])>, EslError> {
    let mut certificates = Vec::new();
    while !bytes.is_empty() {
        let (header, _) = bytes.split_at_checked(HEADER_BYTES).ok_or(EslError::Sizes)?;
        let size = |at: usize| -> Result<usize, EslError> {
            let field =
                header.get(at..at + 4).and_then(|field| field.try_into().ok()).ok_or(EslError::Sizes)?;
            usize::try_from(u32::from_le_bytes(field)).map_err(|_| EslError::Sizes)
        };
        if header[..16] != *X509.as_bytes() {
            let kind = <[u8; 16]>::try_from(&header[..16]).map_err(|_| EslError::Sizes)?;
            return Err(EslError::Kind(Guid(kind).to_string()));
        }
        let (list, more, signature) = (size(16)?, size(20)?, size(24)?);
        let list = bytes.get(..list).ok_or(EslError::Sizes)?;
        let entries = list.get(HEADER_BYTES + more..).ok_or(EslError::Sizes)?;
        if signature <= 16 || entries.is_empty() || entries.len() % signature != 0 {
            return Err(EslError::Sizes);
        }
        for entry in entries.chunks_exact(signature) {
            let (owner, der) = entry.split_at(16);
            certificates.push((Guid(owner.try_into().map_err(|_| EslError::Sizes)?), der));
        }
        bytes = &bytes[list.len()..];
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written_and_shorter_ones_are_refused() {
        let owner = Guid::from_bytes(*b"0123456789abcdef");
        let mut lists = write(&owner, b"certificate").expect("short");
        lists.extend(write(&owner, b"another").expect("short"));
        assert_eq!(read(&lists), Ok(vec![(owner, &b"certificate"[..]), (owner, &b"another"[..])]));
        let whole = write(&owner, b"certificate").expect("short").len();
        for length in (1..lists.len()).filter(|length| *length != whole) {
            assert_eq!(read(&lists[..length]), Err(EslError::Sizes), "{length} bytes");
        }
    }

    #[test]
    fn a_guid_shows_its_first_fields_as_numbers() {
        assert_eq!(X509.to_string(), "a5c059a1-94e4-4aa7-87b5-ab155c2bf072");
    }
}
