//! Frames: a payload's length as a little-endian u32, then the payload, which is one encoded message.
//!
//! Cuts a byte stream into payloads and knows nothing of what is in them. Host and agent each feed one
//! [`FrameReader`] with whatever their carrier delivers.

/// Most bytes in one payload. The largest legal message is an `Exec` with all its argument bytes and counts.
pub const MAX_PAYLOAD_BYTES: usize = 8 << 20;

/// Most bytes in one payload from the agent. The largest is an `Entry` with every extended attribute at its limit.
pub const MAX_FROM_AGENT_BYTES: usize = 5 << 20;

const HEADER_BYTES: usize = 4;

/// Consumed bytes are given back once there are this many of them, so that a burst of small frames does not move
/// the rest of the buffer for each one.
const COMPACT_BYTES: usize = 64 << 10;

/// A frame header no honest peer sends. The stream cannot be used any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Every message has at least its tag.
    #[error("frame without a payload")]
    Empty,
    /// The header claims more than the reader's cap.
    #[error("frame claims {claimed} bytes, at most {cap} are allowed")]
    TooLong {
        /// What the header says.
        claimed: u32,
        /// What the reader accepts.
        cap: usize,
    },
}

/// An incremental decoder of frames. It holds the bytes that have arrived and not been taken, never what a header
/// merely claims; a caller that takes frames after each push bounds it by the cap and the size of a push.
#[derive(Debug)]
pub struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
    cap: usize,
}

impl FrameReader {
    /// A reader that accepts payloads of up to `cap` bytes ([`MAX_PAYLOAD_BYTES`] in the agent,
    /// [`MAX_FROM_AGENT_BYTES`] in the host).
    pub fn new(cap: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, cap }
    }

    /// Appends bytes as they arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        } else if self.start >= COMPACT_BYTES {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// How many bytes have arrived and were not taken: not 0 at the end of a stream means that it was cut.
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len().saturating_sub(self.start)
    }

    /// Takes the next whole payload, `None` if more bytes are needed.
    ///
    /// # Errors
    /// The header violates the format; every further call gives the same error.
    #[expect(clippy::should_implement_trait, reason = "not an iterator: None means not yet, and it can fail")]
    pub fn next(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let rest = self.buffer.get(self.start..).unwrap_or_default();
        let Some((header, body)) = rest.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let claimed = u32::from_le_bytes(*header);
        if claimed == 0 {
            return Err(FrameError::Empty);
        }
        let length = match usize::try_from(claimed) {
            Ok(length) if length <= self.cap => length,
            _ => return Err(FrameError::TooLong { claimed, cap: self.cap }),
        };
        let Some(payload) = body.get(..length) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.start += HEADER_BYTES + length;
        Ok(Some(payload))
    }
}

/// The frame that carries `payload`, at most [`MAX_PAYLOAD_BYTES`] of it.
pub fn encode_frame(payload: &[u8]) -> Vec<u8> {
    // A payload that no u32 can count is far over the cap; so is u32::MAX, and the peer refuses it.
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_however_the_stream_is_cut() {
        let payloads: [&[u8]; 4] = [b"a", b"bc", &[7; 300], b"d"];
        let stream: Vec<u8> = payloads.iter().flat_map(|payload| encode_frame(payload)).collect();
        for piece in 1..stream.len() {
            let mut reader = FrameReader::new(300);
            let mut seen = Vec::new();
            for bytes in stream.chunks(piece) {
                reader.push(bytes);
                while let Some(payload) = reader.next().expect("an honest stream") {
                    seen.push(payload);
                }
            }
            assert_eq!(seen, payloads);
            assert_eq!(reader.pending_bytes(), 0);
        }
    }

    #[test]
    fn a_cut_stream_leaves_pending_bytes() {
        let mut reader = FrameReader::new(10);
        reader.push(&encode_frame(b"abc")[..5]);
        assert_eq!(reader.next(), Ok(None));
        assert_eq!(reader.pending_bytes(), 5);
    }

    #[test]
    fn lengths_beyond_the_cap_are_refused_without_allocating() {
        for claimed in [11, 1 << 20, u32::MAX] {
            let mut reader = FrameReader::new(10);
            reader.push(&claimed.to_le_bytes());
            assert_eq!(reader.next(), Err(FrameError::TooLong { claimed, cap: 10 }));
            assert!(reader.buffer.capacity() < 64);
        }
        let mut reader = FrameReader::new(10);
        reader.push(&10u32.to_le_bytes());
        assert_eq!(reader.next(), Ok(None));
        assert!(reader.buffer.capacity() < 64);
    }

    #[test]
    fn an_empty_frame_is_refused() {
        let mut reader = FrameReader::new(10);
        reader.push(&[0; 4]);
        assert_eq!(reader.next(), Err(FrameError::Empty));
        assert_eq!(reader.next(), Err(FrameError::Empty));
    }

    #[test]
    fn consumed_bytes_are_given_back() {
        let mut reader = FrameReader::new(1 << 20);
        let frame = encode_frame(&[1; 1000]);
        for _ in 0..10_000 {
            // Half a frame stays behind each time, so the buffer is never empty.
            reader.push(&frame[..500]);
            reader.push(&frame[500..]);
            reader.push(&frame[..500]);
            assert!(reader.next().expect("honest").is_some());
            reader.push(&frame[500..]);
            assert!(reader.next().expect("honest").is_some());
        }
        assert!(reader.buffer.capacity() < 4 * COMPACT_BYTES);
    }
}
