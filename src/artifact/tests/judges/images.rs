//! Our readers of disk images, held against mksquashfs and mkfs.erofs: what these pack of a folder is what we read.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use kiln_artifact::image::{Image, ImageError, Limits};
use kiln_artifact::tree::{Kind, Timestamp};
use kiln_artifact::{erofs, squashfs};

use super::judge::{Made, is_root, path, run};

/// Who runs the test.
fn user() -> u32 {
    fs::metadata("/proc/self").expect("procfs").uid()
}

/// A tree of every kind, of contents around the sizes at which images cut them, and of many names.
pub fn made() -> Made {
    let mut made = Made::of_every_kind();
    for size in [1, 4095, 4096, 4097, 131_071, 131_072, 131_073, 300_000] {
        let content: Vec<u8> =
            (0..size).map(|at: u32| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        made.file(&format!("bin/size{size}"), &content);
    }
    made.file("bin/hole", &[&[0; 500_000][..], b"end"].concat());
    made.file("bin/zeros", &[0; 262_144]);
    made.folder("many");
    for number in 0..1500 {
        made.file(&format!("many/{}{number}", "n".repeat(number % 100)), number.to_string().as_bytes());
    }
    made.put(b"odd \xff name", Kind::Symlink(vec![b't'; 300].into()), 0o777);
    let xattrs = &mut made.file("ping", &[9; 9000]).xattrs;
    xattrs.insert(b"user.note".to_vec(), b"a\n=b".repeat(200));
    xattrs.insert(b"user.other".to_vec(), vec![]);
    let shared = &mut made.file("pong", b"pong").xattrs;
    shared.insert(b"user.note".to_vec(), b"a\n=b".repeat(200));
    if is_root() {
        let capability = [&[1, 0, 0, 2, 0, 4][..], &[0; 14]].concat();
        made.tree
            .get_mut(&path("ping"))
            .expect("made")
            .meta
            .xattrs
            .insert(b"security.capability".to_vec(), capability);
    } else {
        made.tree.retain(|path, _| !matches!(path.as_bytes(), b"null" | b"sda17"));
        let own = user();
        for (_, node) in made.tree.iter_mut().filter(|(_, node)| !matches!(node.kind, Kind::HardLink(_))) {
            (node.meta.uid, node.meta.gid) = (own, own);
        }
    }
    for (_, node) in made.tree.iter_mut().filter(|(_, node)| !matches!(node.kind, Kind::HardLink(_))) {
        node.meta.mtime = Timestamp { seconds: 1_600_000_000, nanoseconds: 0 };
    }
    made
}

/// Writes the tree to disk as it is.
pub fn unpack(made: &Made, top: &Path) {
    fs::create_dir(top).expect("a folder");
    for (path, node) in made.tree.iter() {
        let on_disk = top.join(OsStr::from_bytes(path.as_bytes()));
        let tool = |name: &str, arguments: &[&OsStr]| run(name, arguments, top, b"");
        match &node.kind {
            Kind::Directory if path.is_root() => {}
            Kind::Directory => fs::create_dir(&on_disk).expect("a folder"),
            Kind::File { digest, .. } => fs::write(&on_disk, &made.contents[digest]).expect("room"),
            Kind::HardLink(holder) => {
                fs::hard_link(top.join(OsStr::from_bytes(holder.as_bytes())), &on_disk).expect("a link");
                continue;
            }
            Kind::Symlink(text) => symlink(OsStr::from_bytes(text), &on_disk).expect("a link"),
            Kind::Fifo => drop(tool("mkfifo", &[on_disk.as_os_str()])),
            Kind::Socket => drop(std::os::unix::net::UnixListener::bind(&on_disk).expect("a socket")),
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                let letter = if matches!(node.kind, Kind::CharDevice { .. }) { "c" } else { "b" };
                let numbers = [letter.to_owned(), major.to_string(), minor.to_string()];
                let mut arguments = vec![on_disk.as_os_str()];
                arguments.extend(numbers.iter().map(OsStr::new));
                tool("mknod", &arguments);
            }
        }
        if is_root() {
            std::os::unix::fs::lchown(&on_disk, Some(node.meta.uid), Some(node.meta.gid)).expect("root may");
        }
        if !matches!(node.kind, Kind::Symlink(_)) {
            fs::set_permissions(&on_disk, fs::Permissions::from_mode(node.meta.mode.into())).expect("ours");
        }
        for (name, value) in &node.meta.xattrs {
            let value: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            let value = format!("0x{value}");
            let arguments = [OsStr::new("-n"), OsStr::from_bytes(name), OsStr::new("-v"), OsStr::new(&value)];
            tool("setfattr", &[&arguments[..], &[on_disk.as_os_str()]].concat());
        }
    }
    let all = ["-exec", "touch", "-h", "-d", "@1600000000", "{}", "+"];
    run("find", [&["."], &all[..]].concat(), top, b"");
}

/// An image of a folder, made by `tool` called with `arguments`.
struct Judge {
    folder: tempfile::TempDir,
    made: Made,
}

impl Judge {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let made = made();
        unpack(&made, &folder.path().join("tree"));
        Self { folder, made }
    }

    fn image(&self, tool: &str, arguments: &[&str]) -> PathBuf {
        let image = self.folder.path().join("image");
        let _ = fs::remove_file(&image);
        run(tool, arguments, self.folder.path(), b"");
        image
    }

    fn squashfs(&self, options: &[&str]) -> PathBuf {
        self.image(
            "mksquashfs",
            &[&["tree", "image", "-noappend", "-quiet", "-no-progress"], options].concat(),
        )
    }

    fn erofs(&self, options: &[&str]) -> PathBuf {
        self.image("mkfs.erofs", &[options, &["--quiet", "image", "tree"][..]].concat())
    }

    /// Asserts that the image's tree is the one that was packed, contents that were not read aside.
    fn agrees(&self, image: &Image, what: &dyn std::fmt::Debug) {
        let mut read = image.tree.clone();
        for (path, node) in read.iter_mut() {
            // Readers say of these that they did not look: their length is right.
            if image.unread.contains(path)
                && let (Kind::File { digest, size }, Some(Kind::File { digest: own, size: length })) =
                    (&mut node.kind, self.made.tree.get(path).map(|node| &node.kind))
            {
                assert_eq!(size, length, "{path}");
                *digest = *own;
            }
        }
        let differing: Vec<_> = self.made.tree.differences(&read).take(5).collect();
        assert_eq!(differing, [], "{what:?}");
        assert_eq!(read.digest(), self.made.tree.digest(), "{what:?}");
    }
}

#[test]
fn squashfs_images_are_read_as_they_were_packed() {
    let judge = Judge::new();
    for options in [
        &["-comp", "gzip"][..],
        &["-comp", "xz"],
        &["-comp", "xz", "-Xbcj", "x86", "-b", "1M"],
        &["-comp", "lz4"],
        &["-comp", "zstd", "-b", "4K"],
        &["-comp", "zstd", "-no-fragments", "-no-exports"],
        &["-comp", "gzip", "-always-use-fragments", "-nopad"],
        &["-comp", "gzip", "-noI", "-noD", "-noF", "-noX"],
        &["-comp", "lz4", "-no-sparse", "-no-duplicates"],
    ] {
        let image = File::open(judge.squashfs(options)).expect("it was made");
        let image = squashfs::read(&image, &Limits::default()).expect("a good image");
        assert!(image.unread.is_empty());
        judge.agrees(&image, &options);
    }
}

#[test]
fn squashfs_images_that_linux_or_kiln_cannot_read_are_told_apart() {
    let judge = Judge::new();
    for (compression, number) in [("lzo", squashfs::Compression::Lzo), ("lzma", squashfs::Compression::Lzma)]
    {
        let image = File::open(judge.squashfs(&["-comp", compression])).expect("it was made");
        let superblock = squashfs::Superblock::read(&image).expect("a superblock");
        assert_eq!(superblock.compression, number);
        let refused = squashfs::read(&image, &Limits::default()).expect_err("it cannot be read");
        assert!(refused.to_string().contains(compression), "{refused}");
    }
}

#[test]
fn erofs_images_are_read_as_they_were_packed() {
    let judge = Judge::new();
    for (options, is_read) in [
        (&["-T1600000000"][..], true),
        (&["-Eforce-inode-extended"], true),
        (&["-T1600000000", "-x1"], true),
        (&["-Eforce-inode-extended", "--chunksize=8192"], true),
        (&["-Eforce-inode-extended", "--chunksize=4096", "-Eforce-chunk-indexes"], true),
        (&["-Eforce-inode-extended", "-zlz4"], false),
        (&["-Eforce-inode-extended", "-zlz4hc,12", "-Eztailpacking", "-C65536"], false),
    ] {
        let image = File::open(judge.erofs(options)).expect("it was made");
        let image = erofs::read(&image, &Limits::default()).expect("a good image");
        assert_eq!(image.unread.is_empty(), is_read, "{options:?}");
        judge.agrees(&image, &options);
    }
}

#[test]
fn an_image_that_we_wrote_is_read_as_it_was() {
    let made = made();
    let mut out = std::io::Cursor::new(Vec::new());
    erofs::write(&made.tree, &made.contents, &mut out).expect("a good tree");
    let image = erofs::read(&&out.into_inner()[..], &Limits::default()).expect("a good image");
    assert_eq!((&image.tree, image.unread.len()), (&made.tree, 0));
}

#[test]
fn an_image_that_is_cut_off_says_so_or_what_lies_beyond_its_end() {
    let judge = Judge::new();
    for bytes in [
        fs::read(judge.squashfs(&["-comp", "gzip"])).expect("it was made"),
        fs::read(judge.erofs(&[])).expect("it was made"),
    ] {
        for length in [0, 10, 95, 96, 1023, 1100, 1152, 4096, bytes.len() / 2, bytes.len() - 4096] {
            let cut = &bytes[..length];
            let refused = match bytes.starts_with(b"hsqs") {
                true => squashfs::read(&cut, &Limits::default()),
                false => erofs::read(&cut, &Limits::default()),
            };
            let refused = refused.expect_err("it is cut off");
            let whole = matches!(refused, ImageError::CutOff { .. } | ImageError::Superblock { .. });
            assert!(whole, "{length}: {refused}");
        }
    }
}

/// Bytes of `image` changed one after the other, in places that a generator draws.
fn mutated(image: &[u8], rounds: u32, mut read: impl FnMut(&[u8])) {
    let mut state = 7_u64;
    let mut random = move |below: usize| {
        // Knuth's MMIX generator.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).expect("31 bits") % below
    };
    for round in 0..rounds {
        let mut bytes = image.to_vec();
        for _ in 0..1 + round % 4 {
            // Mostly where the tables are: at the end of squashfs, at the start of erofs.
            let near = 1 + random(if round % 3 == 0 { bytes.len() } else { bytes.len().min(3000) });
            let at = if image.starts_with(b"hsqs") && round % 2 == 0 { bytes.len() - near } else { near - 1 };
            bytes[at] = match random(4) {
                0 => 0,
                1 => 0xff,
                2 => bytes[at] ^ 1 << random(8),
                _ => u8::try_from(random(256)).expect("a byte"),
            };
        }
        read(&bytes);
    }
}

#[test]
fn hostile_images_are_refused_within_their_limits() {
    let mut small = Made::of_every_kind();
    small.file("large", &(0..20_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    small.tree.retain(|path, _| !matches!(path.as_bytes(), b"null" | b"sda17"));
    if !is_root() {
        small.tree.iter_mut().for_each(|(_, node)| (node.meta.uid, node.meta.gid) = (0, 0));
    }
    let folder = tempfile::tempdir().expect("a folder");
    unpack(&small, &folder.path().join("tree"));
    let judge = Judge { folder, made: small };
    let limits = Limits { names: 1000, text_bytes: 1 << 20, content_bytes: 64 << 20 };
    let mut counts = BTreeMap::new();
    for options in
        [&["-noI", "-noX", "-b", "4K"][..], &["-comp", "xz"], &["-comp", "lz4"], &["-comp", "zstd"]]
    {
        mutated(&fs::read(judge.squashfs(options)).expect("it was made"), 400, |bytes| {
            let good = squashfs::read(&bytes, &limits).is_ok();
            *counts.entry(("squashfs", good)).or_insert(0) += 1;
        });
    }
    for options in [&["-T1"][..], &["-Eforce-inode-extended", "--chunksize=4096"], &["-zlz4"]] {
        mutated(&fs::read(judge.erofs(options)).expect("it was made"), 400, |bytes| {
            let good = erofs::read(&bytes, &limits).is_ok();
            *counts.entry(("erofs", good)).or_insert(0) += 1;
        });
    }
    // Both ways out were taken, so the changes were neither harmless nor all seen at the superblock.
    assert!(counts.len() == 4 && counts.values().all(|count| *count > 20), "{counts:?}");
}

#[test]
fn limits_hold_whatever_the_image_says() {
    let judge = Judge::new();
    let squashfs_image = fs::read(judge.squashfs(&[])).expect("it was made");
    let erofs_image = fs::read(judge.erofs(&[])).expect("it was made");
    let all = Limits::default();
    for (limits, word) in [
        (Limits { names: 100, ..all }, "100 names"),
        (Limits { text_bytes: 1000, ..all }, "1000 bytes of names"),
        (Limits { content_bytes: 100_000, ..all }, "100000 bytes of content"),
    ] {
        for refused in
            [squashfs::read(&&squashfs_image[..], &limits), erofs::read(&&erofs_image[..], &limits)]
        {
            let refused = refused.expect_err("it is too much").to_string();
            assert!(refused.contains(word), "{refused}");
        }
    }
}
