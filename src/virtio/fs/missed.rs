//! Names that were looked for in vain, by directory, in bounded memory.
//!
//! A compiler looks for the same names in many directories, so each name is kept once. A hostile guest invents
//! names without end: there is room for so many, and who asks for more gets an error instead of an answer.

use std::collections::{BTreeMap, BTreeSet};

/// Most memory for missed names, as counted here, unless a device is told otherwise. A compiler that looks
/// through a hundred directories for each of 10,000 headers needs a quarter of it.
pub const MISSED_BYTES: usize = 64 << 20;
/// What a name costs besides its bytes, and what a directory's not having it costs.
const NAME_BYTES: usize = 64;
const MISS_BYTES: usize = 16;

/// Directories and the names they were found not to have.
#[derive(Debug)]
pub struct Missed {
    names: BTreeMap<Box<[u8]>, u32>,
    misses: BTreeSet<(u32, u32)>,
    bytes: usize,
    most_bytes: usize,
    full: bool,
}

impl Missed {
    /// Nothing missed yet, and room for `most_bytes`.
    pub fn new(most_bytes: usize) -> Self {
        Self { names: BTreeMap::new(), misses: BTreeSet::new(), bytes: 0, most_bytes, full: false }
    }

    /// Notes that `directory` has no `name`. False where there is no room for that.
    #[must_use]
    pub fn insert(&mut self, directory: u32, name: &[u8]) -> bool {
        let known = self.names.get(name).copied();
        if known.is_some_and(|number| self.misses.contains(&(directory, number))) {
            return true;
        }
        let bytes = MISS_BYTES + if known.is_some() { 0 } else { name.len() + NAME_BYTES };
        let next = u32::try_from(self.names.len()).ok();
        let (Some(number), true) = (known.or(next), self.bytes + bytes <= self.most_bytes) else {
            self.full = true;
            return false;
        };
        if known.is_none() {
            self.names.insert(name.into(), number);
        }
        self.misses.insert((directory, number));
        self.bytes += bytes;
        true
    }

    /// True once a name was not kept.
    pub fn full(&self) -> bool {
        self.full
    }

    /// All, for reading by directory.
    pub fn by_directory(&self) -> ByDirectory<'_> {
        let mut names = vec![&[][..]; self.names.len()];
        for (name, number) in &self.names {
            names[*number as usize] = &**name;
        }
        ByDirectory { missed: self, names }
    }
}

/// Names by their numbers, beside [`Missed`].
pub struct ByDirectory<'a> {
    missed: &'a Missed,
    names: Vec<&'a [u8]>,
}

impl<'a> ByDirectory<'a> {
    /// What `directory` was found not to have, sorted.
    pub fn of(&self, directory: u32) -> Vec<&'a [u8]> {
        let misses = self.missed.misses.range((directory, 0)..=(directory, u32::MAX));
        let mut names: Vec<&[u8]> =
            misses.filter_map(|(_, name)| self.names.get(*name as usize).copied()).collect();
        names.sort_unstable();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_counts_once_for_each_directory() {
        let mut missed = Missed::new(1000);
        for (directory, name) in [(7, "b"), (7, "a"), (3, "b"), (7, "b")] {
            assert!(missed.insert(directory, name.as_bytes()));
        }
        assert_eq!(missed.bytes, 3 * MISS_BYTES + 2 * (NAME_BYTES + 1));
        let by_directory = missed.by_directory();
        assert_eq!(by_directory.of(7), [b"a", b"b"]);
        assert_eq!(by_directory.of(3), [b"b"]);
        assert!(by_directory.of(4).is_empty());
    }

    #[test]
    fn names_without_end_are_refused_in_bounded_memory() {
        let mut missed = Missed::new(10_000);
        let most = 10_000 / (MISS_BYTES + NAME_BYTES + 8);
        let kept = (0..most as u64 + 5).filter(|number| missed.insert(1, &number.to_le_bytes())).count();
        assert_eq!((kept, missed.full()), (most, true));
        assert!(missed.insert(1, &0_u64.to_le_bytes()), "what is noted stays answered");
        assert!(!missed.insert(2, b"another"));
    }
}
