//! All of a frozen machine but its memory, as bytes: a head with the format's version and a digest, and a document.
//!
//! A snapshot is read by the version of kiln that wrote it, on the kind of processor that it was taken on, or not at all:
//! templates are made anew more cheaply than formats are kept alive.

use kiln_digest::Digest;
use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};

use crate::mmio::DeviceState;
use crate::processor::Processor;
use crate::serial::ConsoleState;

/// What a snapshot begins with: a word, and the format's version.
const MAGIC: &[u8; 8] = b"KILNSNAP";
const VERSION: u32 = 2;
/// Then the SHA-256 of all that follows it.
const DIGEST_BYTES: usize = 32;

/// Why bytes are no snapshot of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// They do not begin as one.
    #[error("this is no snapshot of a machine")]
    Foreign,
    /// Another version wrote it.
    #[error("the snapshot has the format's version {0}, and this kiln reads {VERSION}")]
    Version(u32),
    /// It is cut short, or changed.
    #[error("the snapshot is damaged")]
    Damaged,
}

/// All of a frozen machine but its memory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// How much memory it has, bytes.
    pub memory_bytes: u64,
    /// Its clock.
    pub clock: kvm_clock_data,
    /// Its interrupt controllers: two of the PC's, and the I/O APIC.
    pub chips: Vec<kvm_irqchip>,
    /// Its processors, in their order.
    pub processors: Vec<Processor>,
    /// Its serial port.
    pub console: ConsoleState,
    /// Its devices, in their order.
    pub devices: Vec<DeviceState>,
}

impl Snapshot {
    /// As bytes.
    ///
    /// # Errors
    /// Something in it has no text.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let document = serde_json::to_vec(self)?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(Digest::of(&document).as_bytes());
        bytes.extend(document);
        Ok(bytes)
    }

    /// From bytes, which may be anything.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(SnapshotError::Foreign)?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(SnapshotError::Damaged)?;
        match u32::from_le_bytes(*version) {
            VERSION => {}
            other => return Err(SnapshotError::Version(other)),
        }
        let (digest, document) = rest.split_at_checked(DIGEST_BYTES).ok_or(SnapshotError::Damaged)?;
        if Digest::of(document).as_bytes() != digest {
            return Err(SnapshotError::Damaged);
        }
        serde_json::from_slice(document).map_err(|_| SnapshotError::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        Snapshot {
            memory_bytes: 1 << 30,
            clock: kvm_clock_data { clock: 7, ..kvm_clock_data::default() },
            chips: vec![kvm_irqchip::default(); 3],
            processors: Vec::new(),
            console: ConsoleState::default(),
            devices: Vec::new(),
        }
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        let again = Snapshot::decode(&snapshot().encode().expect("text")).expect("a snapshot");
        assert_eq!((again.memory_bytes, again.clock.clock, again.chips.len()), (1 << 30, 7, 3));
    }

    #[test]
    fn a_snapshot_that_is_cut_short_or_changed_anywhere_is_refused() {
        let bytes = snapshot().encode().expect("text");
        for length in 0..bytes.len() {
            assert!(Snapshot::decode(&bytes[..length]).is_err(), "{length}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(Snapshot::decode(&changed).is_err(), "{at}");
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = snapshot().encode().expect("text");
        bytes[8] = 9;
        assert_eq!(Snapshot::decode(&bytes).err(), Some(SnapshotError::Version(9)));
        assert_eq!(Snapshot::decode(b"something else").err(), Some(SnapshotError::Foreign));
    }
}
