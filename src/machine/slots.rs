//! Slots: the disks that every machine has, whether or not a step has something to put in them.
//!
//! A template is frozen before a step is known, so it has an empty disk for each purpose, and a copy names a file in its
//! place. The guest's driver keeps the size that it saw then, which is more than any file's: what reads a disk goes by
//! what is written there, and swapping by what the agent is told. A machine that boots has the same slots, so that a step sees no difference.
//!
//! Measured with QEMU 10.0.2 and Linux 6.12 under emulation, from the first order over QMP until the guest has read from the
//! disk, three machines each: a virtio-blk device that is plugged into a root port 33 to 56 ms (28 to 51 until it is there),
//! a medium put into a SCSI drive 26 to 32 ms, a block node reopened behind a device that is there (blockdev-reopen) 7 to
//! 18 ms, of which 1 ms is QEMU's. A slot spares that one too, as the copy's command line names the file.

use std::fs::File;

use super::{Disk, serial};

/// A disk with a purpose.
#[derive(Debug)]
pub(super) struct Slot {
    pub serial: &'static str,
    pub read_only: bool,
}

/// In the order of their device names.
pub(super) const SLOTS: [Slot; 4] = [
    Slot { serial: serial::ROOT, read_only: true },
    Slot { serial: serial::SCRATCH, read_only: false },
    Slot { serial: serial::MODULES, read_only: true },
    Slot { serial: serial::TOOLBOX, read_only: true },
];

/// How large an empty slot is: more than file systems of Linux let a file be.
pub(super) const SLOT_BYTES: u64 = 16 << 40;

/// What file systems read at a time: a file that ends within such a piece has to end its disk too.
const BLOCK_BYTES: u64 = 4096;

/// A machine's disks by their places.
#[derive(Debug, Default)]
pub(super) struct Places<'a> {
    /// What is in the slots.
    pub slots: [Option<&'a Disk>; SLOTS.len()],
    /// Disks that there is no slot for.
    pub others: Vec<&'a Disk>,
}

impl<'a> Places<'a> {
    /// The places of `disks`.
    pub fn of(disks: &'a [Disk]) -> Self {
        let mut places = Self::default();
        for disk in disks {
            let fits = |slot: &Slot| slot.serial == disk.serial && slot.read_only == disk.read_only;
            match SLOTS.iter().position(fits).and_then(|index| places.slots.get_mut(index)) {
                Some(place @ None) => *place = Some(disk),
                _ => places.others.push(disk),
            }
        }
        places
    }

    /// Whether a machine that was frozen with empty slots can have these disks.
    pub fn fit_a_copy(&self) -> bool {
        let fits = |disk: &&Disk| {
            let file = disk.file.try_clone().map(File::from);
            let size = file.and_then(|file| Ok(file.metadata()?.len())).unwrap_or(u64::MAX);
            size <= SLOT_BYTES && size.is_multiple_of(BLOCK_BYTES)
        };
        self.others.is_empty() && self.slots.iter().flatten().all(fits)
    }

    /// All of them with their numbers.
    pub fn numbered(&self) -> impl Iterator<Item = (usize, &'a Disk)> {
        let slots = self.slots.iter().enumerate().filter_map(|(index, disk)| Some((index, (*disk)?)));
        slots.chain(self.others.iter().enumerate().map(|(index, disk)| (SLOTS.len() + index, *disk)))
    }

    /// What the disk with this number is called.
    pub fn serials(&self) -> Vec<String> {
        let others = self.others.iter().map(|disk| disk.serial.clone());
        SLOTS.iter().map(|slot| slot.serial.to_owned()).chain(others).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(serial: &str, read_only: bool, size_bytes: u64) -> Disk {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(size_bytes).expect("room");
        Disk { serial: serial.to_owned(), file: file.into(), read_only }
    }

    #[test]
    fn a_disk_goes_where_its_serial_and_mode_say() {
        let disks = [disk("scratch", false, 0), disk("mine", false, 0), disk("root", true, 0)];
        let places = Places::of(&disks);
        let numbered: Vec<_> = places.numbered().map(|(index, disk)| (index, disk.serial.as_str())).collect();
        assert_eq!(numbered, [(0, "root"), (1, "scratch"), (4, "mine")]);
        assert_eq!(places.serials(), ["root", "scratch", "modules", "toolbox", "mine"]);
        assert!(!places.fit_a_copy());
    }

    #[test]
    fn what_a_slot_cannot_stand_for_is_beside_it() {
        for others in [vec![disk("root", false, 0)], vec![disk("root", true, 0), disk("root", true, 0)]] {
            assert_eq!(Places::of(&others).others.len(), 1);
        }
    }

    #[test]
    fn a_file_that_ends_within_a_block_needs_a_machine_of_its_own() {
        assert!(Places::of(&[disk("root", true, 8192)]).fit_a_copy());
        assert!(!Places::of(&[disk("root", true, 8191)]).fit_a_copy());
    }
}
