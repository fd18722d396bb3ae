//! Decompression by name of the format: gzip, xz, zstd. Bounded memory, no panic, whatever the bytes.

use std::io::{self, BufReader, Read};

use lzma_rust2::{Action, Status, XzStream};

/// What the largest xz preset needs (`xz -9`: a dictionary of 64 MiB), doubled.
const XZ_MEMORY_KIB: u32 = 128 << 10;
/// The base-2 logarithm of the largest zstd window: 128 MiB, that of `zstd --ultra -22`.
const ZSTD_WINDOW_LOG: u32 = 27;

/// How some bytes are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip (RFC 1952).
    Gzip,
    /// xz.
    Xz,
    /// Zstandard (RFC 8878).
    Zstd,
}

impl Compression {
    /// The compression that the extension of `name` stands for, and the name without it.
    pub fn of_name(name: &str) -> (Self, &str) {
        [(".gz", Self::Gzip), (".xz", Self::Xz), (".zst", Self::Zstd)]
            .into_iter()
            .find_map(|(extension, compression)| Some((compression, name.strip_suffix(extension)?)))
            .unwrap_or((Self::None, name))
    }

    /// The bytes that `reader` holds compressed.
    ///
    /// # Errors
    /// What setting up the decoder says.
    pub fn reader<'a>(self, reader: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::None => Box::new(reader),
            Self::Gzip => Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(reader))),
            Self::Xz => Box::new(XzReader::new(reader)),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(reader)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Box::new(decoder)
            }
        })
    }
}

/// Fails once more than `limit_bytes` came through: what a few compressed bytes claim to be may fill a disk.
pub struct Limited<R> {
    inner: R,
    left_bytes: u64,
}

impl<R: Read> Limited<R> {
    /// Lets `limit_bytes` of `inner` through.
    pub fn new(inner: R, limit_bytes: u64) -> Self {
        Self { inner, left_bytes: limit_bytes }
    }
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left_bytes = self.left_bytes.checked_sub(count as u64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::FileTooLarge, "it decompresses to more than it may")
        })?;
        Ok(count)
    }
}

/// xz over the decoder that has no input or output of its own: the crate's reader takes a short read for the
/// end and has no limit on memory.
struct XzReader<R> {
    inner: R,
    stream: XzStream,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    is_at_end: bool,
    is_done: bool,
}

impl<R: Read> XzReader<R> {
    fn new(inner: R) -> Self {
        let stream = XzStream::new_mem_limit(true, XZ_MEMORY_KIB);
        let buffer = vec![0; 1 << 16];
        Self { inner, stream, buffer, start: 0, end: 0, is_at_end: false, is_done: false }
    }
}

impl<R: Read> Read for XzReader<R> {
    fn read(&mut self, output: &mut [u8]) -> io::Result<usize> {
        if output.is_empty() {
            return Ok(0);
        }
        while !self.is_done {
            if self.start == self.end && !self.is_at_end {
                self.start = 0;
                self.end = self.inner.read(&mut self.buffer)?;
                self.is_at_end = self.end == 0;
            }
            let action = if self.is_at_end { Action::Finish } else { Action::Run };
            let step = self.stream.process(&self.buffer[self.start..self.end], output, action)?;
            self.start += step.bytes_consumed;
            self.is_done = step.status == Status::StreamEnd;
            if step.bytes_produced > 0 {
                return Ok(step.bytes_produced);
            }
            if self.is_at_end && step.bytes_consumed == 0 && !self.is_done {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        if self.start < self.end {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "there is something after the xz stream"));
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut writer =
            lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).expect("a writer");
        writer.write_all(bytes).expect("memory");
        writer.finish().expect("memory")
    }

    fn sample() -> Vec<u8> {
        (0..300_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect()
    }

    fn unpack(compression: Compression, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Limited::new(compression.reader(bytes)?, 1 << 24).read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_format_gives_back_what_went_in() {
        let sample = sample();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&sample).expect("memory");
        assert!(unpack(Compression::Gzip, &gzip.finish().expect("memory")).expect("gzip") == sample);
        let zstd = zstd::encode_all(&sample[..], 3).expect("memory");
        assert!(unpack(Compression::Zstd, &zstd).expect("zstd") == sample);
        assert!(unpack(Compression::Xz, &xz(&sample)).expect("xz") == sample);
        assert!(unpack(Compression::None, &sample).expect("none") == sample);
        assert!(
            unpack(Compression::Xz, &[xz(&sample), xz(b"more")].concat()).expect("two").len() > sample.len()
        );
    }

    #[test]
    fn changed_cut_and_extended_streams_are_errors_and_no_panic() {
        let sample: Vec<u8> = sample()[..1000].to_vec();
        let zstd = zstd::encode_all(&sample[..], 3).expect("memory");
        for (compression, good) in [(Compression::Xz, xz(&sample)), (Compression::Zstd, zstd)] {
            for position in 0..good.len() {
                assert!(unpack(compression, &good[..position]).is_err() || position == 0, "{position}");
                let mut changed = good.clone();
                changed[position] ^= 0x10;
                let _ = unpack(compression, &changed);
            }
            assert!(unpack(compression, &[good.clone(), b"tail".to_vec()].concat()).is_err());
        }
    }

    #[test]
    fn a_bomb_is_stopped() {
        let bomb = xz(&vec![0; 1 << 22]);
        let mut reader = Limited::new(Compression::Xz.reader(&bomb[..]).expect("a reader"), 1 << 20);
        assert!(io::copy(&mut reader, &mut io::sink()).is_err());
    }
}
