//! What inodes name by number: owners, and lists of extended attributes.

use std::collections::BTreeMap;

use super::SquashfsError;
use super::compressor::Compressor;
use super::metadata::{Stream, Table};
use crate::squashfs::tables::NO_XATTRS;
use crate::tree::TreePath;

/// User and group numbers, in the order in which they were first met.
#[derive(Default)]
pub(super) struct Owners {
    numbers: BTreeMap<u32, u16>,
    table: Vec<u8>,
}

impl Owners {
    /// The place of `id`. There is room for 65,535.
    pub fn place(&mut self, id: u32, path: &TreePath) -> Result<u16, SquashfsError> {
        if let Some(place) = self.numbers.get(&id) {
            return Ok(*place);
        }
        let place = u16::try_from(self.numbers.len()).unwrap_or(u16::MAX);
        if place == u16::MAX {
            return Err(SquashfsError::TooManyOwners(path.clone()));
        }
        self.numbers.insert(id, place);
        self.table.extend_from_slice(&id.to_le_bytes());
        Ok(place)
    }

    /// How many there are.
    pub fn count(&self) -> u16 {
        u16::try_from(self.numbers.len()).unwrap_or(u16::MAX)
    }

    /// The table's entries.
    pub fn entries(&self) -> &[u8] {
        &self.table
    }
}

/// Lists of attributes; equal ones are one.
pub(super) struct Xattrs<'a> {
    lists: BTreeMap<&'a BTreeMap<Vec<u8>, Vec<u8>>, u32>,
    values: Stream,
    table: Vec<u8>,
}

/// The namespaces that the format has a number for (`squashfs_fs.h`).
const NAMESPACES: [(&[u8], u16); 3] = [(b"user.", 0), (b"trusted.", 1), (b"security.", 2)];

impl<'a> Xattrs<'a> {
    pub fn new() -> Self {
        Self { lists: BTreeMap::new(), values: Stream::new(), table: Vec::new() }
    }

    /// The number of a list; [`NO_XATTRS`] for the empty one.
    pub fn place(
        &mut self,
        xattrs: &'a BTreeMap<Vec<u8>, Vec<u8>>,
        path: &TreePath,
        compressor: &mut Compressor,
    ) -> Result<u32, SquashfsError> {
        if xattrs.is_empty() {
            return Ok(NO_XATTRS);
        }
        if let Some(number) = self.lists.get(xattrs) {
            return Ok(*number);
        }
        let unrepresentable = || SquashfsError::Unrepresentable {
            path: path.clone(),
            what: "extended attributes outside `user.`, `trusted.` and `security.`",
        };
        let mut list = Vec::new();
        // What the kernel's own structures would hold: whole names with a NUL, and values.
        let mut size = 0_usize;
        for (name, value) in xattrs {
            let (short, kind) = NAMESPACES
                .iter()
                .find_map(|(prefix, kind)| Some((name.strip_prefix(*prefix)?, *kind)))
                .ok_or_else(unrepresentable)?;
            let length = u16::try_from(short.len()).map_err(|_| unrepresentable())?;
            let value_bytes = u32::try_from(value.len()).map_err(|_| unrepresentable())?;
            list.extend_from_slice(&kind.to_le_bytes());
            list.extend_from_slice(&length.to_le_bytes());
            list.extend_from_slice(short);
            list.extend_from_slice(&value_bytes.to_le_bytes());
            list.extend_from_slice(value);
            size = size.saturating_add(name.len() + 1 + value.len());
        }
        let number = u32::try_from(self.lists.len()).ok().filter(|number| *number != NO_XATTRS);
        let number = number.ok_or(SquashfsError::TooLarge)?;
        let count = u32::try_from(xattrs.len()).map_err(|_| SquashfsError::TooLarge)?;
        let size = u32::try_from(size).map_err(|_| SquashfsError::TooLarge)?;
        self.table.extend_from_slice(&self.values.position().reference().to_le_bytes());
        self.table.extend_from_slice(&count.to_le_bytes());
        self.table.extend_from_slice(&size.to_le_bytes());
        self.values.write(&list, compressor)?;
        self.lists.insert(xattrs, number);
        Ok(number)
    }

    /// The table as it is written at byte `at`, with the values in front; `None` without any list.
    pub fn finish(self, at: u64, compressor: &mut Compressor) -> Result<Option<Table>, SquashfsError> {
        if self.lists.is_empty() {
            return Ok(None);
        }
        let count = u32::try_from(self.lists.len()).map_err(|_| SquashfsError::TooLarge)?;
        let (mut bytes, _) = self.values.finish(compressor)?;
        let header = [&at.to_le_bytes()[..], &count.to_le_bytes(), &[0; 4]].concat();
        let table = Table::new(&self.table, &header, at + bytes.len() as u64, compressor)?;
        bytes.extend_from_slice(&table.bytes);
        Ok(Some(Table { bytes, list_at: table.list_at }))
    }
}
