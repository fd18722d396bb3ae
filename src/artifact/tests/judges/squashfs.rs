//! The squashfs writer, judged by unsquashfs, by mksquashfs's sizes, and by our reader, which has its own judges.

use std::fs::{self, File};
use std::num::NonZero;
use std::path::Path;

use kiln_artifact::image::Limits;
use kiln_artifact::squashfs::{self, Codec, Options};
use kiln_artifact::tree::{Contents, Kind, Tree};

use super::images;
use super::judge::{Made, is_root, run};

const CODECS: [(&str, Codec); 4] = [
    ("gzip", Codec::Gzip { level: 9 }),
    ("zstd", Codec::Zstd { level: 3 }),
    ("lz4", Codec::Lz4),
    ("xz", Codec::Xz { level: 1 }),
];

/// Writes the image, and has our reader compare it with the tree.
fn image(tree: &Tree, contents: &dyn Contents, options: &Options, folder: &Path) -> squashfs::Written {
    let file = File::create(folder.join("image")).expect("created");
    let written = squashfs::write(tree, contents, file, options).expect("a good tree");
    assert_eq!(fs::metadata(folder.join("image")).expect("written").len(), written.bytes);
    let file = File::open(folder.join("image")).expect("written");
    assert!(squashfs::read(&file, &Limits::default()).expect("readable").tree == *tree);
    written
}

fn unsquashed(folder: &Path) -> std::path::PathBuf {
    // Attributes of `trusted.` and `security.` are root's alone.
    let xattrs = if is_root() { "-xattrs" } else { "-user-xattrs" };
    run("unsquashfs", ["-quiet", "-no-progress", xattrs, "-d", "out", "image"], folder, b"");
    folder.join("out")
}

#[test]
fn every_kind_of_file_comes_back_from_every_codec() {
    for (name, codec) in CODECS {
        for tail_ends in [false, true] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let mut made = images::made();
            made.file(&"n".repeat(255), b"long").mode = 0;
            made.put(b"longlink", Kind::Symlink([b't'; 4095].into()), 0o777);
            let options = Options { codec, tail_ends, mkfs_time: 1_700_000_000, ..Options::default() };
            let written = image(&made.tree, &made.contents, &options, folder.path());
            made.compare(&unsquashed(folder.path()));
            let said =
                String::from_utf8(run("unsquashfs", ["-s", "image"], folder.path(), b"")).expect("text");
            for expected in [
                "Tue Nov 14 22:13:20 2023".to_owned(),
                format!("Compression {name}"),
                format!("Number of inodes {}", written.inodes),
                "Filesystem is exportable via NFS".to_owned(),
                "Block size 131072".to_owned(),
            ] {
                assert!(said.contains(&expected), "`{expected}` in\n{said}");
            }
        }
    }
}

#[test]
fn attributes_and_hard_links_come_back() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let made = images::made();
    image(&made.tree, &made.contents, &Options::default(), folder.path());
    let out = unsquashed(folder.path());
    let listed = |name: &str| {
        let shown = run("getfattr", ["-d", "-m", "-", "-e", "hex", name], &out, b"");
        String::from_utf8(shown).expect("text").lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    let note: String = b"a\n=b".repeat(200).iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(listed("ping").contains(&format!("user.note=0x{note}")));
    assert!(listed("ping").contains(&"user.other=0x".to_owned()), "{:?}", listed("ping"));
    assert!(listed("pong").contains(&format!("user.note=0x{note}")));
    if is_root() {
        assert!(listed("ping").iter().any(|line| line.starts_with("security.capability=0x01000002000400")));
    }
    use std::os::unix::fs::MetadataExt as _;
    let inode = |name: &str| fs::metadata(out.join(name)).expect("there").ino();
    assert_eq!(inode("bin/tool"), inode("zz"));
    assert_eq!(fs::metadata(out.join("zz")).expect("there").nlink(), 3);
}

#[test]
fn contents_of_every_length_round_every_block_size_come_back() {
    for log in [12, 15, 17, 20] {
        let block_bytes = 1_u32 << log;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut made = Made::new();
        let block = usize::try_from(block_bytes).expect("small");
        for length in
            [1, 2, block - 1, block, block + 1, 2 * block - 1, 2 * block, 2 * block + 1, 3 * block + 5]
        {
            let noise = |at: usize| at.wrapping_mul(2_654_435_761).to_le_bytes()[3];
            let content: Vec<u8> = (0..length).map(noise).collect();
            made.file(&format!("noise-{length}"), &content);
            made.file(&format!("again-{length}"), &content);
            made.file(&format!("zeros-{length}"), &vec![0; length]);
            let mut holes = content.clone();
            holes[..length.min(2 * block)].fill(0);
            made.file(&format!("holes-{length}"), &holes);
        }
        for tail_ends in [false, true] {
            let options = Options { block_bytes, tail_ends, codec: Codec::Lz4, ..Options::default() };
            image(&made.tree, &made.contents, &options, folder.path());
            made.compare(&unsquashed(folder.path()));
            fs::remove_dir_all(folder.path().join("out")).expect("ours");
        }
    }
}

#[test]
fn a_directory_of_a_hundred_thousand_is_listed_whole() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut made = Made::new();
    made.folder("many");
    for number in 0..100_000 {
        made.put(format!("many/{}{number}", "x".repeat(number % 40)).as_bytes(), Kind::Fifo, 0o644);
    }
    let options = Options { codec: Codec::Zstd { level: 1 }, ..Options::default() };
    image(&made.tree, &made.contents, &options, folder.path());
    let listing = run("unsquashfs", ["-lls", "image"], folder.path(), b"");
    let lines = listing.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"p")).count();
    assert_eq!(lines, 100_000);
}

#[test]
fn the_empty_tree_is_an_image() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let made = Made::new();
    let options = Options::default();
    assert_eq!(image(&made.tree, &made.contents, &options, folder.path()).inodes, 1);
    assert_eq!(fs::read_dir(unsquashed(folder.path())).expect("unpacked").count(), 0);
}

#[test]
fn equal_trees_give_equal_bytes_on_any_number_of_threads() {
    let made = images::made();
    for (_, codec) in CODECS {
        let bytes = |threads| {
            let options = Options { codec, threads: NonZero::new(threads), ..Options::default() };
            let mut out = std::io::Cursor::new(Vec::new());
            squashfs::write(&made.tree, &made.contents, &mut out, &options).expect("a good tree");
            out.into_inner()
        };
        let first = bytes(1);
        assert!((2..9).all(|threads| bytes(threads) == first));
    }
}

/// Names that were left out are not there, and what shared their content still has it.
#[test]
fn what_is_excluded_is_not_there() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut made = images::made();
    made.tree.remove_subtree(&super::judge::path("many"));
    made.tree.retain(|path, _| path.as_bytes() != b"bin/tool");
    image(&made.tree, &made.contents, &Options::default(), folder.path());
    let out = unsquashed(folder.path());
    made.compare(&out);
    assert!(!out.join("many").exists() && !out.join("bin/tool").exists() && out.join("bin/tool2").exists());
}

/// As large as what mksquashfs makes of the same files, or smaller, or larger by less than a hundredth.
#[test]
fn images_are_as_small_as_mksquashfs_makes_them() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut made = Made::new();
    // Text that repeats itself as sources do, in files from nothing to two blocks.
    for number in 0..400_usize {
        let line = |at: usize| format!("let x{} = f{}({});\n", at % 97, at * at % 1013, number * at % 61);
        let text: String = (0..number * 31).map(line).collect();
        made.file(&format!("source{number}.rs"), text.as_bytes());
    }
    images::unpack(&made, &folder.path().join("tree"));
    for (name, codec) in [("gzip", Codec::Gzip { level: 9 }), ("zstd", Codec::Zstd { level: 15 })] {
        let ours = image(&made.tree, &made.contents, &Options { codec, ..Options::default() }, folder.path());
        let arguments = ["tree", "theirs", "-noappend", "-quiet", "-no-progress", "-comp", name];
        run("mksquashfs", arguments, folder.path(), b"");
        let theirs = fs::metadata(folder.path().join("theirs")).expect("written").len();
        assert!(ours.bytes * 100 <= theirs * 101, "{name}: {} to {theirs}", ours.bytes);
    }
}

/// 5 GiB and 7 bytes: zeros, but for four bytes after 4 GiB and its end. Slow, since they are hashed: sizes and
/// places beyond 4 GiB occur nowhere else.
#[test]
fn a_sparse_file_of_five_gibibytes_is_small_and_comes_back() {
    use std::os::unix::fs::FileExt as _;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut made = Made::new();
    let digest = super::erofs::Sparse::DIGEST.parse().expect("a digest");
    made.put(b"sparse", Kind::File { digest, size: super::erofs::Sparse::LENGTH }, 0o644);
    let options = Options { block_bytes: 1 << 20, ..Options::default() };
    let written = image(&made.tree, &super::erofs::Sparse, &options, folder.path());
    assert!(written.bytes <= 8192, "{}", written.bytes);
    let file = File::open(unsquashed(folder.path()).join("sparse")).expect("unpacked");
    assert_eq!(file.metadata().expect("unpacked").len(), super::erofs::Sparse::LENGTH);
    for (at, expected) in super::erofs::Sparse::MARKS {
        let mut found = vec![1; expected.len() + 1];
        file.read_exact_at(&mut found, at - 1).expect("within");
        assert_eq!(found, [&[0], expected].concat());
    }
}
