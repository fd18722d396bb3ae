//! UUIDs that are functions of digests.

use kiln_digest::Digest;

/// A UUID of version 8 (RFC 9562 §5.8), in the order in which it is shown.
pub(crate) fn of(digest: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.as_bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}
