//! x
/// x
pub struct DecodeError;
