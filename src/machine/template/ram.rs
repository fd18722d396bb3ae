//! Guest memory as a file: filled, and written down as pages that are not zero.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use kiln_digest::{Digest, Hasher};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

const PAGE_BYTES: usize = 4096;
/// How much is read at a time: a whole number of pages.
const PIECE_BYTES: usize = 1 << 20;

/// Copies what `from` holds to the same places of `to`, which is zero so far.
///
/// # Errors
/// What reading and writing say.
pub fn fill(to: &File, from: &File) -> io::Result<()> {
    extents(from, |start, end| {
        let mut position = start;
        seek(to, SeekFrom::Start(start))?;
        while position < end {
            let length = usize::try_from(end - position).unwrap_or(usize::MAX);
            match rustix::fs::sendfile(to, from, Some(&mut position), length) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    })
}

/// Writes to `to`, an empty file, all pages of `ram` that are not zero, and gives the digest of these with their places.
///
/// # Errors
/// What reading and writing say.
pub fn write(ram: &File, to: &File) -> io::Result<Digest> {
    to.set_len(ram.metadata()?.len())?;
    // Pages one behind the other are written at once.
    let (mut start, mut run) = (0, Vec::with_capacity(PIECE_BYTES));
    let digest = digest_with(ram, |at, page| {
        if start + run.len() as u64 != at || run.len() == PIECE_BYTES {
            to.write_all_at(&run, start)?;
            run.clear();
            start = at;
        }
        run.extend_from_slice(page);
        Ok(())
    })?;
    to.write_all_at(&run, start)?;
    Ok(digest)
}

/// The digest of all pages of `ram` that are not zero, with their places: the same wherever there are holes.
///
/// # Errors
/// What reading says.
pub fn digest(ram: &File) -> io::Result<Digest> {
    digest_with(ram, |_, _| Ok(()))
}

fn digest_with(ram: &File, mut page: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<Digest> {
    let mut hasher = Hasher::default();
    hasher.update(&ram.metadata()?.len().to_le_bytes());
    let mut piece = vec![0; PIECE_BYTES];
    extents(ram, |start, end| {
        let mut position = start;
        while position < end {
            let length = usize::try_from(end - position).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            let piece = piece.get_mut(..length).unwrap_or_default();
            ram.read_exact_at(piece, position)?;
            for bytes in piece.chunks(PAGE_BYTES) {
                if bytes != &[0; PAGE_BYTES][..bytes.len()] {
                    hasher.update(&position.to_le_bytes());
                    hasher.update(bytes);
                    page(position, bytes)?;
                }
                position += bytes.len() as u64;
            }
        }
        Ok(())
    })?;
    Ok(hasher.finish().0)
}

/// Where `file` has data: start and end of each extent, both at the beginning of a page or the file's end.
fn extents(file: &File, mut extent: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
    let size = file.metadata()?.len();
    let page = PAGE_BYTES as u64;
    let mut position = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(position)) {
            Err(Errno::NXIO) => return Ok(()),
            start => start?,
        };
        let end = seek(file, SeekFrom::Hole(start))?;
        // File systems with smaller blocks than pages.
        let (start, end) = (start / page * page, end.next_multiple_of(page).min(size));
        extent(start.max(position), end)?;
        position = end;
    }
}

#[cfg(test)]
mod tests {
    use kiln_virtio::ram::new;

    use super::*;

    /// 64 MiB with marks at the given places.
    fn memory(marks: &[u64]) -> File {
        let ram = new(64 << 20).expect("memory");
        for at in marks {
            ram.write_all_at(b"mark", *at).expect("room");
        }
        ram
    }

    fn read(ram: &File, at: u64) -> [u8; 4] {
        let mut bytes = [0; 4];
        ram.read_exact_at(&mut bytes, at).expect("within memory");
        bytes
    }

    #[test]
    fn memory_comes_back_from_its_file_and_its_holes_stay_holes() {
        let marks = [0, 5000, (3 << 20) - 2, 40 << 20, (64 << 20) - 4];
        let ram = memory(&marks);
        // A page that was touched and is zero is as good as none.
        ram.write_all_at(&[0; 8192], 20 << 20).expect("room");
        let file = tempfile::tempfile().expect("a file");
        let digest_of = write(&ram, &file).expect("room");
        let copy = new(64 << 20).expect("memory");
        fill(&copy, &file).expect("memory");
        for at in marks {
            assert_eq!(&read(&copy, at), b"mark");
        }
        let mut found = Vec::new();
        extents(&copy, |start, end| {
            found.push(end - start);
            Ok(())
        })
        .expect("readable");
        assert!(found.iter().sum::<u64>() < 1 << 20, "{found:?}");
        for file in [&ram, &file, &copy] {
            assert_eq!(digest(file).expect("readable"), digest_of);
        }
    }

    #[test]
    fn a_digest_knows_each_page_and_its_place() {
        let digests =
            [&[][..], &[0], &[1], &[4096], &[0, 4096]].map(|marks| digest(&memory(marks)).expect("readable"));
        for (index, digest) in digests.iter().enumerate() {
            assert!(!digests[..index].contains(digest), "{index}");
        }
    }

    #[test]
    fn memory_cannot_be_taken_away() {
        let ram = memory(&[]);
        assert!(ram.set_len(4096).is_err() && ram.set_len(65 << 20).is_err());
    }

    #[test]
    fn a_file_that_is_cut_short_is_noticed() {
        let file = tempfile::tempfile().expect("a file");
        let whole = write(&memory(&[0, 60 << 20]), &file).expect("room");
        file.set_len(30 << 20).expect("shorter");
        assert_ne!(digest(&file).expect("readable"), whole);
    }
}
