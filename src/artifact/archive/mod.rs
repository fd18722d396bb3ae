//! Archives that others wrote, read into trees. They are hostile until read: a bad member is an error that names
//! it, and nothing here ever touches a file system.

pub mod tar;

use std::io::{self, Read};

use kiln_digest::Digest;

/// Takes the contents of an archive's files.
pub trait ContentSink {
    /// Keeps everything that `reader` gives and returns its digest and length in bytes.
    ///
    /// # Errors
    /// What keeping fails with; the errors of `reader` must be passed on.
    fn store(&mut self, reader: &mut dyn Read) -> io::Result<(Digest, u64)>;
}

/// Contents held in memory.
impl ContentSink for std::collections::BTreeMap<Digest, Vec<u8>> {
    fn store(&mut self, reader: &mut dyn Read) -> io::Result<(Digest, u64)> {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes)?;
        let digest = Digest::of(&bytes);
        let length_bytes = bytes.len() as u64;
        self.insert(digest, bytes);
        Ok((digest, length_bytes))
    }
}
