//! Reading little-endian fields of a PE image at an offset.

use std::ops::Range;

use super::PeError;

/// `length` bytes from `begin`; beyond any file where that cannot be counted.
pub(super) fn range(begin: usize, length: usize) -> Range<usize> {
    begin..begin.saturating_add(length)
}

fn array<const N: usize>(bytes: &[u8], at: usize, what: &'static str) -> Result<[u8; N], PeError> {
    bytes.get(range(at, N)).and_then(|bytes| bytes.try_into().ok()).ok_or(PeError::Truncated(what))
}

/// Two bytes of `what` at `at`.
pub(super) fn le16(bytes: &[u8], at: usize, what: &'static str) -> Result<u16, PeError> {
    array(bytes, at, what).map(u16::from_le_bytes)
}

/// Four bytes of `what` at `at`.
pub(super) fn le32(bytes: &[u8], at: usize, what: &'static str) -> Result<u32, PeError> {
    array(bytes, at, what).map(u32::from_le_bytes)
}

/// Eight bytes of `what` at `at`.
pub(super) fn le64(bytes: &[u8], at: usize, what: &'static str) -> Result<u64, PeError> {
    array(bytes, at, what).map(u64::from_le_bytes)
}
