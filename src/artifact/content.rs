//! Copying a file's content out of [`Contents`] while holding it to what the tree says of it.

use std::io::{self, Read};

use kiln_digest::{Digest, Hasher};

use crate::tree::{Contents, TreePath};

/// Why a file's content could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// It could not be opened or read.
    #[error("the content of `{path}` could not be read")]
    Read {
        /// The file.
        path: TreePath,
        /// Why.
        source: io::Error,
    },
    /// It is not as long as the tree says.
    #[error("the content of `{path}` is not {expected_bytes} bytes long")]
    Length {
        /// The file.
        path: TreePath,
        /// What the tree says.
        expected_bytes: u64,
    },
    /// Its digest is not what the tree says.
    #[error("the content of `{path}` does not have the digest {expected}")]
    Digest {
        /// The file.
        path: TreePath,
        /// What the tree says.
        expected: Digest,
    },
    /// The output could not be written.
    #[error("the output could not be written")]
    Write(#[source] io::Error),
}

/// What the tree says of a file.
pub(crate) struct Expected<'a> {
    pub path: &'a TreePath,
    pub digest: &'a Digest,
    pub size: u64,
}

/// Reads the content in pieces that fill `buffer` whole, the last one excepted, and gives each to `take`. At
/// most one byte beyond the expected size is read.
pub(crate) fn copy(
    contents: &dyn Contents,
    file: &Expected<'_>,
    buffer: &mut [u8],
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), ContentError> {
    let failed = |source| ContentError::Read { path: file.path.clone(), source };
    let wrong_length = || ContentError::Length { path: file.path.clone(), expected_bytes: file.size };
    let mut reader = contents.open(file.digest).map_err(failed)?;
    let mut hasher = Hasher::default();
    let mut left = file.size;
    while left > 0 {
        let wanted = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let piece = &mut buffer[..wanted];
        reader.read_exact(piece).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => wrong_length(),
            _ => failed(error),
        })?;
        hasher.update(piece);
        take(piece).map_err(ContentError::Write)?;
        left -= wanted as u64;
    }
    // `read_exact` rather than `read`, so that an interrupted call is repeated.
    match reader.read_exact(&mut [0]) {
        Ok(()) => return Err(wrong_length()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        Err(error) => return Err(failed(error)),
    }
    if hasher.finish().0 != *file.digest {
        return Err(ContentError::Digest { path: file.path.clone(), expected: *file.digest });
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Contents that give the same bytes whatever is asked.
    pub(crate) struct Liar(pub Vec<u8>);

    impl Contents for Liar {
        fn open(&self, _: &Digest) -> io::Result<Box<dyn Read + '_>> {
            Ok(Box::new(&self.0[..]))
        }
    }

    fn copied(given: &[u8], expected: &[u8], piece_bytes: usize) -> Result<Vec<u8>, ContentError> {
        let file =
            Expected { path: &TreePath::root(), digest: &Digest::of(expected), size: expected.len() as u64 };
        let mut out = Vec::new();
        copy(&Liar(given.into()), &file, &mut vec![0; piece_bytes], |piece| {
            out.extend_from_slice(piece);
            Ok(())
        })
        .map(|()| out)
    }

    #[test]
    fn content_passes_only_with_its_length_and_digest() {
        for piece_bytes in [1, 2, 3, 7, 100] {
            assert_eq!(copied(b"content", b"content", piece_bytes).expect("as expected"), b"content");
            assert!(matches!(copied(b"conten", b"content", piece_bytes), Err(ContentError::Length { .. })));
            assert!(matches!(copied(b"content!", b"content", piece_bytes), Err(ContentError::Length { .. })));
            assert!(matches!(copied(b"Content", b"content", piece_bytes), Err(ContentError::Digest { .. })));
            assert!(matches!(copied(b"x", b"", piece_bytes), Err(ContentError::Length { .. })));
        }
        assert_eq!(copied(b"", b"", 1).expect("as expected"), b"");
    }

    #[test]
    fn unknown_content_is_a_read_error() {
        let file = Expected { path: &TreePath::root(), digest: &Digest::of(b""), size: 0 };
        let none = std::collections::BTreeMap::<Digest, Vec<u8>>::new();
        let error = copy(&none, &file, &mut [0], |_| Ok(())).expect_err("unknown");
        assert!(
            matches!(error, ContentError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
        );
    }
}
