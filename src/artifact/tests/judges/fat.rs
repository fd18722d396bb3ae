//! FAT32 images and GPT disks, judged by fsck.vfat, mtools, sgdisk and sfdisk.

use std::fs::{self, File};
use std::path::Path;

use kiln_artifact::fat::{self, FatError, Label, Options};
use kiln_artifact::gpt::{self, Disk, Guid, Partition, Window};
use kiln_artifact::tree::{Kind, Timestamp};
use kiln_digest::Digest;

use super::judge::{Made, path, run};

/// Writes the image, has it checked, and has every file read back by mtools.
fn image(made: &Made, options: &Options, folder: &Path) -> u64 {
    let file = File::create(folder.join("image")).expect("created");
    let bytes = fat::write(&made.tree, &made.contents, file, options).expect("a good tree");
    assert_eq!(fs::metadata(folder.join("image")).expect("written").len(), bytes);
    judged(made, folder);
    bytes
}

fn judged(made: &Made, folder: &Path) {
    let said = String::from_utf8(run("fsck.vfat", ["-n", "-v", "image"], folder, b"")).expect("text");
    assert!(!said.contains("Differences") && !said.contains("wrong"), "{said}");
    let _ = fs::remove_dir_all(folder.join("out"));
    fs::create_dir(folder.join("out")).expect("a folder");
    let tops: Vec<String> = made
        .tree
        .iter()
        .filter(|(path, _)| path.components().count() == 1)
        .map(|(path, _)| format!("::/{path}"))
        .collect();
    if !tops.is_empty() {
        let arguments = ["-s", "-n", "-m", "-Q", "-i", "image"].map(str::to_owned);
        run("mcopy", arguments.into_iter().chain(tops).chain(["out".to_owned()]), folder, b"");
    }
    let mut count = 0;
    for (path, node) in made.tree.iter() {
        let on_disk = folder.join("out").join(path.to_string());
        let holder = if let Kind::HardLink(holder) = &node.kind { holder } else { path };
        match &made.tree.get(holder).expect("held").kind {
            Kind::File { digest, .. } => {
                assert!(fs::read(&on_disk).expect("copied") == made.contents[digest], "{path}");
            }
            _ => assert!(on_disk.is_dir(), "{path}"),
        }
        count += 1;
    }
    let found = run("find", ["out"], folder, b"");
    assert_eq!(found.split(|byte| *byte == b'\n').count() - 1, count);
}

fn made() -> Made {
    let mut made = Made::new();
    made.folder("EFI");
    made.folder("EFI/BOOT");
    made.file("EFI/BOOT/BOOTX64.EFI", &[0x4d; 70_000]);
    made.folder("initos");
    made.file("initos/initos.hash", b"0123");
    made.file("initos/empty", b"");
    made.file("a name with spaces, and more than eight.config", b"long");
    made.file("a name with spaces, and more than nine.config", b"longer");
    made.file("Mixed.Txt", b"mixed");
    made.file("UPPER", b"upper");
    made.file("\u{fc}ml\u{e4}ut \u{20ac}.x", b"unicode");
    made.file(".hidden", b"hidden");
    made.file(&"n".repeat(255), b"longest");
    for units in 11..=15 {
        made.file(&format!("thirteen{}", "y".repeat(units - 8)), b"at the end of an entry");
    }
    for length in [511_usize, 512, 513, 4096, 100_001] {
        made.file(&format!("length{length}"), &vec![length.to_le_bytes()[0]; length]);
    }
    made.folder("many");
    for number in 0..700 {
        made.file(&format!("many/longish name {number}"), number.to_string().as_bytes());
    }
    made.link("zlink", "UPPER");
    made
}

#[test]
fn files_and_folders_come_back() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bytes = image(&made(), &Options::default(), folder.path());
    assert!((32 << 20..33 << 20).contains(&bytes), "FAT32 begins at 32.5 MiB: {bytes}");
}

#[test]
fn every_size_of_cluster_is_good() {
    for size_bytes in [64_u64 << 20, 259 << 20, 261 << 20, 1 << 30, 9 << 30, 20 << 30, 40 << 30] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let options = Options { size_bytes: Some(size_bytes), ..Options::default() };
        assert_eq!(image(&made(), &options, folder.path()), size_bytes);
        let on_disk = std::os::unix::fs::MetadataExt::blocks(
            &fs::metadata(folder.path().join("image")).expect("there"),
        );
        assert!(on_disk * 512 < 4 << 20, "what is zero is a hole");
    }
}

#[test]
fn the_empty_tree_is_an_image() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    image(&Made::new(), &Options::default(), folder.path());
}

#[test]
fn name_number_and_times_are_those_given() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut made = made();
    made.file("OLD", b"before FAT").mtime = Timestamp { seconds: 0, nanoseconds: 0 };
    let label = Label::new("boota").expect("a good label");
    let options = Options { volume_id: Some(0x1234_abcd), label: Some(label), ..Options::default() };
    image(&made, &options, folder.path());
    let listing = run("mdir", ["-i", "image", "::"], folder.path(), b"");
    let listing = String::from_utf8_lossy(&listing).into_owned();
    for expected in [
        " Volume in drive : is BOOTA",
        " Volume Serial Number is 1234-ABCD",
        "UPPER                5 2023-11-14  22:13",
        "OLD                 10 1980-01-01   0:00",
    ] {
        assert!(listing.contains(expected), "`{expected}` in\n{listing}");
    }
    for bad in ["", "twelve chars", "a.b", "\u{fc}", " x"] {
        assert_eq!(Label::new(bad), None, "{bad}");
    }
}

#[test]
fn equal_trees_give_equal_bytes_and_other_trees_another_number() {
    let written = |made: &Made| {
        let mut out = std::io::Cursor::new(Vec::new());
        fat::write(&made.tree, &made.contents, &mut out, &Options::default()).expect("a good tree");
        out.into_inner()
    };
    let mut made = made();
    let first = written(&made);
    assert!(first == written(&made));
    made.file("another", b"");
    assert_ne!(first[67..71], written(&made)[67..71]);
}

#[test]
fn what_fat_cannot_hold_is_named() {
    let failing = |change: fn(&mut Made)| {
        let mut made = made();
        change(&mut made);
        fat::write(&made.tree, &made.contents, std::io::Cursor::new(Vec::new()), &Options::default())
            .expect_err("FAT cannot")
            .to_string()
    };
    for (change, message) in [
        (
            (|made: &mut Made| {
                made.file("initos/a:b", b"");
            }) as fn(&mut Made),
            "FAT cannot hold the name of `initos/a:b`: it has a control character or one of \" * / : < > ? \\ |",
        ),
        (
            |made| {
                made.file("dot.", b"");
            },
            "FAT cannot hold the name of `dot.`: it ends with a full stop or a space",
        ),
        (
            |made| {
                made.put(b"\xff", Kind::Directory, 0o755);
            },
            "FAT cannot hold the name of `\\xff`: it is not UTF-8",
        ),
        (
            |made| {
                made.file("upper", b"");
            },
            "FAT takes `upper` and `UPPER` for one name",
        ),
        (
            |made| {
                made.put(b"s", Kind::Symlink(b"x"[..].into()), 0o777);
            },
            "FAT cannot hold `s`: it is a symbolic link",
        ),
        (
            |made| {
                made.put(b"f", Kind::File { digest: Digest::of(b""), size: 1 << 32 }, 0o644);
            },
            "FAT cannot hold `f`: it is a file over 4 GiB",
        ),
    ] {
        assert_eq!(failing(change), message);
    }
    let mut many = Made::new();
    many.folder("many");
    for number in 0..32_768 {
        many.file(&format!("many/long name {number}"), b"");
    }
    let result = fat::least_bytes(&many.tree);
    assert!(matches!(result, Err(FatError::Node { path: at, .. }) if at == path("many")));
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let made = made();
    let least = fat::least_bytes(&made.tree).expect("a good tree");
    for bytes in [0, 512, 1 << 20, least - 512, least + 1, 3 << 40] {
        let options = Options { size_bytes: Some(bytes), ..Options::default() };
        let result = fat::write(&made.tree, &made.contents, std::io::Cursor::new(Vec::new()), &options);
        assert!(matches!(result, Err(FatError::Size { asked, .. }) if asked == bytes), "{bytes}: {result:?}");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    image(&made, &Options { size_bytes: Some(least), ..Options::default() }, folder.path());
}

#[test]
fn a_disk_with_a_system_partition_is_good() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let made = made();
    let disk = File::create(folder.path().join("disk")).expect("created");
    let bytes = gpt::write_esp(&made.tree, &made.contents, disk, &Options::default()).expect("a good tree");
    assert_eq!(fs::metadata(folder.path().join("disk")).expect("written").len(), bytes);
    tables_are_good(folder.path());
    let listing = run("sfdisk", ["-d", "disk"], folder.path(), b"");
    let listing = String::from_utf8(listing).expect("text").to_lowercase();
    assert!(listing.contains("start=        2048"), "{listing}");
    assert!(listing.contains("type=c12a7328-f81f-11d2-ba4b-00a0c93ec93b"), "{listing}");
    let whole = fs::read(folder.path().join("disk")).expect("written");
    let length = usize::try_from(fat::least_bytes(&made.tree).expect("good")).expect("small");
    fs::write(folder.path().join("image"), &whole[1 << 20..][..length]).expect("room");
    judged(&made, folder.path());
    let mut again = std::io::Cursor::new(Vec::new());
    gpt::write_esp(&made.tree, &made.contents, &mut again, &Options::default()).expect("a good tree");
    assert!(again.into_inner() == whole, "nothing in it is random");
}

#[test]
fn a_disk_of_several_partitions_is_good() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let partition = |kind, name: &str, bytes| Partition { kind, name: name.to_owned(), bytes };
    let partitions = [
        partition(Guid::EFI_SYSTEM, "BOOTA", 40 << 20),
        partition(Guid::LINUX, "one sector", 512),
        partition(Guid::LINUX, &"\u{e9}".repeat(36), 3 << 20),
    ];
    let disk = Disk::new(&Digest::of(b"seed"), &partitions).expect("good partitions");
    let mut file = File::create(folder.path().join("disk")).expect("created");
    disk.write(&mut file).expect("room");
    tables_are_good(folder.path());
    let mut window = Window::new(&file, disk.starts[2]).expect("within");
    std::io::Write::write_all(&mut window, b"third").expect("room");
    let shown = String::from_utf8(run("sgdisk", ["-p", "disk"], folder.path(), b"")).expect("text");
    for expected in ["BOOTA", "one sector", "8300", "EF00"] {
        assert!(shown.contains(expected), "`{expected}` in\n{shown}");
    }
    tables_are_good(folder.path());
}

fn tables_are_good(folder: &Path) {
    let said = String::from_utf8(run("sgdisk", ["-v", "disk"], folder, b"")).expect("text");
    assert!(said.contains("No problems found"), "{said}");
    let said = String::from_utf8(run("sfdisk", ["--verify", "disk"], folder, b"")).expect("text");
    assert!(said.contains("No errors detected"), "{said}");
}
