//! Disks of a few sectors made by hand, those of other tools, and those that lie.

use std::cell::Cell;
use std::fs;
use std::process::Command;

use super::*;

const NO_NAME: &[u8; 11] = b"NO NAME    ";
const BOOTA: &[u8; 11] = b"BOOTA      ";
/// Where the boot sectors have the label.
const LABEL16: usize = 43;
const LABEL32: usize = 71;

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

/// FAT16 without a name: sectors 1 and 2 are its tables, from 3 on is its root, of 32 entries.
fn fat16() -> Vec<u8> {
    let mut disk = vec![0; 16 * 512];
    put(&mut disk, 11, &[0, 2, 1, 1, 0, 2, 32, 0]);
    put(&mut disk, 22, &[1, 0]);
    disk[38] = 0x29;
    put(&mut disk, LABEL16, NO_NAME);
    put(&mut disk, 54, b"FAT16   ");
    put(&mut disk, 510, &[0x55, 0xaa]);
    disk
}

const ROOT16: usize = 3 * 512;

/// FAT32 without a name: sectors 1 and 2 are its tables, cluster 2 is sector 3. The root is in clusters 5 and 3.
fn fat32() -> Vec<u8> {
    let mut disk = vec![0; 16 * 512];
    put(&mut disk, 11, &[0, 2, 1, 1, 0, 2, 0, 0]);
    put(&mut disk, 36, &[1, 0, 0, 0]);
    put(&mut disk, 44, &[5, 0, 0, 0]);
    disk[66] = 0x29;
    put(&mut disk, LABEL32, NO_NAME);
    put(&mut disk, 82, b"FAT32   ");
    put(&mut disk, 510, &[0x55, 0xaa]);
    put(&mut disk, 512 + 5 * 4, &[3, 0, 0, 0xf0]);
    put(&mut disk, 512 + 3 * 4, &[0xff, 0xff, 0xff, 0x0f]);
    disk
}

const ROOT32: [usize; 2] = [6 * 512, 4 * 512];

fn entry(name: &[u8; 11], attributes: u8) -> [u8; 32] {
    let mut entry = [0; 32];
    put(&mut entry, 0, name);
    entry[11] = attributes;
    entry
}

/// The label, and how often was read for it.
fn told(disk: &[u8]) -> (Option<String>, usize) {
    let count = Cell::new(0);
    let label = label(&|at, bytes| {
        count.set(count.get() + 1);
        let at = usize::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        let there = at.checked_add(bytes.len()).and_then(|end| disk.get(at..end));
        bytes.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    });
    (label, count.get())
}

fn label_of(disk: &[u8]) -> Option<String> {
    told(disk).0
}

#[test]
fn labels_are_read_from_fat_alone() {
    for (mut disk, at, kind) in [(fat16(), LABEL16, 54), (fat32(), LABEL32, 82)] {
        put(&mut disk, at, BOOTA);
        assert_eq!(label_of(&disk).as_deref(), Some("BOOTA"));
        assert_eq!(label_of(&disk[..100]), None);
        for (at, other) in [(510, 0), (kind, b'N'), (at - 5, 0x28)] {
            let mut disk = disk.clone();
            disk[at] = other;
            assert_eq!(label_of(&disk), None, "{at}");
        }
    }
}

#[test]
fn where_the_boot_sector_says_nothing_the_root_directory_does() {
    let entries = |disk: &mut [u8], at: usize, label: &[u8; 11]| {
        // None of these is the label: a file, a part of a long name, a folder that says it is one, and what was removed.
        let removed = b"\xe5THER      ";
        for (index, (name, attributes)) in
            [(b"INITOS     ", 0x20), (b"Alongname  ", 0x0f), (b"FOLDER     ", 0x18), (removed, 0x08)]
                .into_iter()
                .chain([(label, 0x08)])
                .enumerate()
        {
            put(disk, at + index * 32, &entry(name, attributes));
        }
    };
    for name in [NO_NAME, b"           ", &[0; 11]] {
        for (mut disk, at, root) in [(fat16(), LABEL16, ROOT16), (fat32(), LABEL32, ROOT32[0])] {
            put(&mut disk, at, name);
            assert_eq!(label_of(&disk).as_deref(), Some(""), "it has none");
            entries(&mut disk, root, BOOTA);
            assert_eq!(label_of(&disk).as_deref(), Some("BOOTA"));
            put(&mut disk, root, &[0]);
            assert_eq!(label_of(&disk).as_deref(), Some(""), "what follows the end is not of it");
            put(&mut disk, at, b"BOOTB      ");
            assert_eq!(label_of(&disk).as_deref(), Some("BOOTB"), "the boot sector's comes first");
        }
    }
    let mut disk = fat32();
    for index in 0..16 {
        put(&mut disk, ROOT32[0] + index * 32, &entry(b"FILE       ", 0x20));
    }
    entries(&mut disk, ROOT32[1], BOOTA);
    assert_eq!(label_of(&disk).as_deref(), Some("BOOTA"), "in the second cluster");
}

#[test]
fn a_label_has_nothing_that_a_terminal_obeys() {
    let mut disk = fat16();
    put(&mut disk, ROOT16, &entry(b"\x1b[2J\n\xff\0a b ", 0x08));
    assert_eq!(label_of(&disk).as_deref(), Some("?[2J???a b"));
}

/// What no disk makes read more of: the boot sector, the root's sectors, and an entry of the table for each.
const MOST_READS: usize = 1 + 2 * 128;

#[test]
fn a_boot_sector_that_lies_is_read_no_further_than_any() {
    for disk in [fat16(), fat32()] {
        for at in 0..512 {
            for value in [0, 1, 3, 0x10, 0x7f, 0x80, 0xff] {
                let mut disk = disk.clone();
                disk[at] = value;
                let (label, reads) = told(&disk);
                assert!(reads <= MOST_READS && label.is_none_or(|label| label.len() <= 11), "{at}: {value}");
            }
        }
    }
    let all = |disk: &mut Vec<u8>, from: usize, to: usize| disk[from..to].fill(0xff);
    for (from, to) in [(11, 13), (14, 16), (16, 17), (22, 24), (36, 40), (44, 48), (11, 38), (11, 66)] {
        for mut disk in [fat16(), fat32()] {
            all(&mut disk, from, to);
            assert!(told(&disk).1 <= MOST_READS, "{from}");
        }
    }
    // With sectors of no bytes, or clusters of no sectors, a directory would have no end.
    for at in [12, 13, 14, 16] {
        let mut disk = fat32();
        disk[at] = 0;
        put(&mut disk, ROOT32[0], &entry(BOOTA, 0x08));
        assert_eq!(told(&disk), (Some(String::new()), 1), "{at}");
    }
    // A root beyond the table, and the numbers that are no clusters.
    for first in [0_u32, 1, 128, 0x0fff_fff7, 0x0fff_ffff, u32::MAX] {
        let mut disk = fat32();
        put(&mut disk, 44, &first.to_le_bytes());
        assert_eq!(told(&disk), (Some(String::new()), 1), "{first}");
    }
}

#[test]
fn a_chain_that_leads_back_into_itself_ends() {
    let mut disk = fat32();
    for root in ROOT32 {
        for index in 0..16 {
            put(&mut disk, root + index * 32, &entry(b"FILE       ", 0x20));
        }
    }
    put(&mut disk, 512 + 3 * 4, &[5, 0, 0, 0]);
    assert_eq!(told(&disk), (Some(String::new()), MOST_READS));
    // A directory without an end has one here too.
    let mut disk = fat16();
    put(&mut disk, 17, &[0xff, 0xff]);
    disk.resize(8 << 20, 0xff);
    disk[ROOT16..].fill(b'x');
    for index in ROOT16 / 32..disk.len() / 32 {
        disk[index * 32 + 11] = 0x20;
    }
    assert_eq!(told(&disk), (Some(String::new()), 1 + 128));
}

/// As other tools label them, after files and with the name in the boot sector taken away again, as more of them leave it.
#[test]
fn file_systems_of_other_tools_are_called_as_these_called_them() {
    let script = r#"export PATH="$PATH:/usr/sbin:/sbin" MTOOLS_SKIP_CHECK=1
        for kind in "12 1440" "16 16384" "32 65536"; do
            set -- $kind
            mkfs.fat -F "$1" -s 1 -C "$1" "$2" >/dev/null
            cp "$1" "none$1"
            for number in $(seq 24); do
                mmd -i "$1" "::a-folder-with-a-long-name-$number"
            done
            mlabel -i "$1" ::BOOTA
        done"#;
    let folder = std::env::temp_dir().join(format!("kiln-init-fat-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let made = Command::new("sh").args(["-euc", script]).current_dir(&folder).output().expect("sh");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for (kind, at) in [("12", LABEL16), ("16", LABEL16), ("32", LABEL32)] {
        let read = |name: &str| fs::read(folder.join(name)).expect("it was made");
        assert_eq!(label_of(&read(&format!("none{kind}"))).as_deref(), Some(""), "FAT{kind}");
        let mut disk = read(kind);
        put(&mut disk, at, NO_NAME);
        let (label, reads) = told(&disk);
        assert_eq!(label.as_deref(), Some("BOOTA"), "FAT{kind}");
        assert!(reads > 4, "FAT{kind}: it is behind the folders");
    }
    fs::remove_dir_all(folder).expect("it was made");
}
