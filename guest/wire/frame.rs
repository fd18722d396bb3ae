//! x
/// x
pub struct FrameError;
/// x
pub struct FrameReader;
/// x
pub const MAX_PAYLOAD_BYTES: usize = 0;
/// x
pub fn encode_frame() {}
