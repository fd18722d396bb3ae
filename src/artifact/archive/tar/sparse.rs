//! Sparse files: where a member's stored bytes go in the file, and a reader that puts zeros between them.

use std::io::{self, Read};
use std::vec;

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader};

use super::block::{Blocks, Body, fields};
use super::pax::decimal;
use super::{Member, TarError};

/// More parts than this are refused; they are held in memory.
const MAX_EXTENTS: usize = 1 << 20;

/// A part of a file that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub offset: u64,
    pub length: u64,
}

/// A checked map: extents in order, apart, within the file, and as long together as what is stored.
#[derive(Debug)]
pub(super) struct Map {
    extents: Vec<Extent>,
    /// The file's whole length.
    pub size: u64,
    /// What of the body is left to read: the extents' bytes.
    pub stored_bytes: u64,
}

impl Map {
    /// The map of `member`, if it is sparse; `blocks` is left where the extents' bytes begin.
    pub(super) fn of(member: &Member, blocks: &mut Blocks<impl Read>) -> Result<Option<Self>, TarError> {
        let sparse = &member.pax.sparse;
        let size = || sparse.size.ok_or_else(|| member.bad("a sparse map and no size"));
        if member.header.entry_type() == EntryType::GNUSparse {
            return old_gnu(member, blocks).map(Some);
        }
        match (sparse.major, sparse.minor, &sparse.extents) {
            (None, None, None) => Ok(None),
            (None, None, Some(extents)) => {
                Self::checked(member, extents.clone(), size()?, member.body_bytes).map(Some)
            }
            (Some(1), Some(0), None) => {
                let (extents, map_bytes) = inline_map(member, blocks)?;
                let stored_bytes = member.body_bytes - map_bytes;
                Self::checked(member, extents, size()?, stored_bytes).map(Some)
            }
            _ => Err(member.bad("a sparse format that is not known")),
        }
    }

    fn checked(
        member: &Member,
        extents: Vec<Extent>,
        size: u64,
        stored_bytes: u64,
    ) -> Result<Self, TarError> {
        let bad = || member.bad("an impossible sparse map");
        let (mut end, mut sum) = (0_u64, 0_u64);
        for extent in &extents {
            if extent.offset < end {
                return Err(bad());
            }
            end = extent.offset.checked_add(extent.length).filter(|&end| end <= size).ok_or_else(bad)?;
            sum += extent.length;
        }
        if sum != stored_bytes {
            return Err(bad());
        }
        Ok(Self { extents, size, stored_bytes })
    }
}

/// The map of type `S`: four extents in the header, then blocks of twenty-one.
fn old_gnu(member: &Member, blocks: &mut Blocks<impl Read>) -> Result<Map, TarError> {
    let bad = || member.bad("an impossible sparse map");
    let gnu = member.header.as_gnu().ok_or_else(bad)?;
    let number =
        |field: &[u8]| fields::number(field).and_then(|number| u64::try_from(number).ok()).ok_or_else(bad);
    let mut extents = Vec::new();
    let mut add = |headers: &[GnuSparseHeader]| -> Result<(), TarError> {
        for header in headers.iter().filter(|header| header.offset[0] != 0) {
            extents.push(Extent { offset: number(&header.offset)?, length: number(&header.numbytes)? });
        }
        if extents.len() > MAX_EXTENTS { Err(bad()) } else { Ok(()) }
    };
    add(&gnu.sparse)?;
    let mut continues = gnu.isextended[0] != 0;
    while continues {
        let block = blocks.block()?;
        let mut more = GnuExtSparseHeader::new();
        more.as_mut_bytes().copy_from_slice(&block);
        add(&more.sparse)?;
        continues = more.isextended[0] != 0;
    }
    let size = number(&gnu.realsize)?;
    Map::checked(member, extents, size, member.body_bytes)
}

/// The map of version 1.0, which begins the body: decimal numbers a line, how many extents there are, then offset
/// and length of each; filled up to a whole block. Also how many bytes of the body that took.
fn inline_map(member: &Member, blocks: &mut Blocks<impl Read>) -> Result<(Vec<Extent>, u64), TarError> {
    let bad = || member.bad("an impossible sparse map");
    let mut taken_bytes = 0;
    let mut pending: vec::IntoIter<u8> = Vec::new().into_iter();
    let mut next_number = |taken_bytes: &mut u64| -> Result<u64, TarError> {
        let mut digits = Vec::new();
        loop {
            match pending.next() {
                Some(b'\n') => return decimal(&digits).ok_or_else(bad),
                Some(digit) if digits.len() < 20 => digits.push(digit),
                Some(_) => return Err(bad()),
                None if *taken_bytes + 512 > member.body_bytes => return Err(bad()),
                None => {
                    *taken_bytes += 512;
                    pending = blocks.block()?.to_vec().into_iter();
                }
            }
        }
    };
    let count = next_number(&mut taken_bytes)?;
    let count = usize::try_from(count).ok().filter(|&count| count <= MAX_EXTENTS).ok_or_else(bad)?;
    let mut extents = Vec::new();
    for _ in 0..count {
        let offset = next_number(&mut taken_bytes)?;
        extents.push(Extent { offset, length: next_number(&mut taken_bytes)? });
    }
    Ok((extents, taken_bytes))
}

/// The whole file: stored bytes, and zeros between them.
pub(super) struct SparseReader<'a, R> {
    size: u64,
    extents: vec::IntoIter<Extent>,
    current: Option<Extent>,
    position: u64,
    body: Body<'a, R>,
}

impl<'a, R> SparseReader<'a, R> {
    pub(super) fn new(map: Map, body: Body<'a, R>) -> Self {
        let mut extents = map.extents.into_iter();
        Self { size: map.size, current: extents.next(), extents, position: 0, body }
    }
}

impl<R: Read> Read for SparseReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_some_and(|extent| self.position >= extent.offset + extent.length) {
            self.current = self.extents.next();
        }
        let (in_hole, end) = match self.current {
            Some(extent) if self.position >= extent.offset => (false, extent.offset + extent.length),
            Some(extent) => (true, extent.offset),
            None => (true, self.size),
        };
        let wanted = usize::try_from(end - self.position).map_or(buffer.len(), |left| left.min(buffer.len()));
        let piece = &mut buffer[..wanted];
        let count = if in_hole {
            piece.fill(0);
            wanted
        } else {
            self.body.read(piece)?
        };
        self.position += count as u64;
        Ok(count)
    }
}
