//! The 512-byte blocks of an archive: headers with their check sums and numbers, and the bodies between them.

use std::io::{self, Read};

use tar::Header;

use super::TarError;

const BLOCK_BYTES: u64 = 512;

/// Reads an archive block by block and counts.
pub(super) struct Blocks<R> {
    reader: R,
    offset: u64,
    /// Why the reader stopped; errors that pass through a sink are told from the sink's own by it.
    failure: Option<Failure>,
}

enum Failure {
    End,
    Read(io::Error),
}

impl<R: Read> Blocks<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, offset: 0, failure: None }
    }

    /// How many bytes were read.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// One whole block.
    pub(super) fn block(&mut self) -> Result<[u8; 512], TarError> {
        let mut block = [0; 512];
        let mut body = Body::new(self, BLOCK_BYTES);
        let read = body.read_exact(&mut block);
        self.outcome(read)?;
        Ok(block)
    }

    /// The next header, or none where the block of zeros is that ends an archive. POSIX wants two; as GNU tar
    /// does, one is enough.
    pub(super) fn header(&mut self) -> Result<Option<Header>, TarError> {
        let at = self.offset;
        let block = self.block()?;
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block).clone();
        let written = fields::number(&header.as_old().cksum);
        // The sum is over unsigned bytes, its own field taken as spaces; some old writers summed signed ones.
        let bytes =
            || block.iter().enumerate().map(|(at, &byte)| if (148..156).contains(&at) { b' ' } else { byte });
        let unsigned: i128 = bytes().map(i128::from).sum();
        let signed: i128 = bytes().map(|byte| i128::from(byte.cast_signed())).sum();
        if written != Some(unsigned) && written != Some(signed) {
            return Err(TarError::Header { at, what: "its check sum is wrong" });
        }
        Ok(Some(header))
    }

    /// Passes over a whole body of `bytes` with its padding.
    pub(super) fn skip(&mut self, bytes: u64) -> Result<(), TarError> {
        let skipped = io::copy(&mut Body::new(self, bytes), &mut io::sink()).map(drop);
        self.outcome(skipped)?;
        self.skip_padding(bytes)
    }

    /// Passes over what fills the last block of a body of `bytes`.
    pub(super) fn skip_padding(&mut self, bytes: u64) -> Result<(), TarError> {
        let padding = bytes.wrapping_neg() % BLOCK_BYTES;
        let skipped = io::copy(&mut Body::new(self, padding), &mut io::sink()).map(drop);
        self.outcome(skipped)
    }

    /// The result of reading, with the error told apart.
    pub(super) fn outcome<T>(&mut self, result: io::Result<T>) -> Result<T, TarError> {
        self.outcome_of_store(result, TarError::Read)
    }

    /// As [`Self::outcome`], where an error may be another's, which `others` wraps.
    pub(super) fn outcome_of_store<T>(
        &mut self,
        result: io::Result<T>,
        others: impl FnOnce(io::Error) -> TarError,
    ) -> Result<T, TarError> {
        match (self.failure.take(), result) {
            (Some(Failure::End), _) => Err(TarError::Truncated { at: self.offset }),
            (Some(Failure::Read(error)), _) => Err(TarError::Read(error)),
            (None, Err(error)) => Err(others(error)),
            (None, Ok(value)) => Ok(value),
        }
    }
}

/// A member's bytes: as many as its header says, or an error.
pub(super) struct Body<'a, R> {
    blocks: &'a mut Blocks<R>,
    left: u64,
}

impl<'a, R> Body<'a, R> {
    pub(super) fn new(blocks: &'a mut Blocks<R>, bytes: u64) -> Self {
        Self { blocks, left: bytes }
    }
}

impl<R: Read> Read for Body<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if wanted == 0 {
            return Ok(0);
        }
        let count = match self.blocks.reader.read(&mut buffer[..wanted]) {
            Ok(0) => {
                self.blocks.failure = Some(Failure::End);
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                let passed_on = io::Error::new(error.kind(), error.to_string());
                self.blocks.failure = Some(Failure::Read(error));
                return Err(passed_on);
            }
        };
        self.left -= count as u64;
        self.blocks.offset += count as u64;
        Ok(count)
    }
}

/// The fields of headers.
pub(super) mod fields {
    use super::Header;

    /// A number: octal digits among spaces and NULs, or GNU's base-256, whose first bit is set and which is in two's
    /// complement after it. Nothing for anything else.
    pub(in super::super) fn number(field: &[u8]) -> Option<i128> {
        match field {
            [first @ 0x80..=0xff, rest @ ..] if field.len() < 16 => {
                // The second bit is the sign.
                let sign_extended = i128::from((first << 1).cast_signed() >> 1);
                Some(rest.iter().fold(sign_extended, |value, &byte| value << 8 | i128::from(byte)))
            }
            _ => {
                let text = std::str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
                if text.is_empty() {
                    return Some(0);
                }
                // `from_str_radix` would take a sign.
                text.bytes()
                    .all(|byte| matches!(byte, b'0'..=b'7'))
                    .then(|| i128::from_str_radix(text, 8).ok())?
            }
        }
    }

    /// The length of the body that follows.
    pub(in super::super) fn size(header: &Header) -> Option<u64> {
        u64::try_from(number(&header.as_old().size)?).ok()
    }

    /// Major and minor number, which only ustar and GNU headers have.
    pub(in super::super) fn device(header: &Header) -> Option<(u32, u32)> {
        let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
            (Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
            (None, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
            (None, None) => return None,
        };
        Some((u32::try_from(number(major)?).ok()?, u32::try_from(number(minor)?).ok()?))
    }

    #[cfg(test)]
    mod tests {
        use super::number;

        #[test]
        fn numbers_are_octal_or_base_256() {
            for (field, value) in [
                (&b"0000644\0"[..], Some(0o644)),
                (b"   644 \0", Some(0o644)),
                (b"\0\0\0\0\0\0\0\0", Some(0)),
                (b"-000001\0", None),
                (b"+000001\0", None),
                (b"0000008\0", None),
                (b"12 34\0\0\0", None),
                (b"\x80\0\0\0\0\0\x01\0", Some(256)),
                (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
                (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
                (b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", Some(u64::MAX as i128)),
                (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", Some(1 << 64)),
            ] {
                assert_eq!(number(field), value, "{}", field.escape_ascii());
            }
        }
    }
}
