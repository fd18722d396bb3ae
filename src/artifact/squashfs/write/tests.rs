//! What is written is what our reader reads, whatever the tree; and what the format cannot hold is named.

use std::collections::BTreeMap;
use std::io::Cursor;

use kiln_digest::Digest;
use proptest::prelude::*;

use super::*;
use crate::image::{Image, Limits};
use crate::tree::sample::trees_with_contents;
use crate::tree::{Kind, Meta, Node, Timestamp};

type Made = BTreeMap<Digest, Vec<u8>>;

fn image(tree: &Tree, contents: &dyn Contents, options: &Options) -> Result<Vec<u8>, SquashfsError> {
    let mut out = Cursor::new(Vec::new());
    let written = write(tree, contents, &mut out, options)?;
    let image = out.into_inner();
    assert_eq!(image.len() as u64, written.bytes);
    assert_eq!(image.len() % 4096, 0);
    Ok(image)
}

fn read(image: &[u8]) -> Image {
    crate::squashfs::read(&image, &Limits::default()).expect("our own image")
}

fn path(text: &str) -> TreePath {
    TreePath::new(text.as_bytes()).expect("a good path")
}

fn with(nodes: impl IntoIterator<Item = (String, Kind, Meta)>) -> Tree {
    let mut tree = Tree::new();
    for (name, kind, meta) in nodes {
        tree.insert(path(&name), Node { kind, meta });
    }
    tree
}

/// Takes from `tree` what the format has no place for, and says whether anything had to go but nanoseconds.
fn cut(tree: &mut Tree) -> bool {
    let mut had_to_go = false;
    for (_, node) in tree.iter_mut() {
        node.meta.mtime.nanoseconds = 0;
        if u32::try_from(node.meta.mtime.seconds).is_err() {
            node.meta.mtime = Timestamp::default();
            had_to_go = true;
        }
        let before = node.meta.xattrs.len();
        node.meta.xattrs.retain(|name, _| !name.starts_with(b"system."));
        had_to_go |= node.meta.xattrs.len() < before;
    }
    had_to_go
}

fn options() -> impl Strategy<Value = Options> {
    let codecs = prop_oneof![
        (1..=9_u32).prop_map(|level| Codec::Gzip { level }),
        (1..=5_i32).prop_map(|level| Codec::Zstd { level }),
        (0..=3_u32).prop_map(|level| Codec::Xz { level }),
        Just(Codec::Lz4),
    ];
    (codecs, 12..=20_u32, any::<u32>(), any::<bool>(), 1..4_usize).prop_map(
        |(codec, log, mkfs_time, tail_ends, threads)| Options {
            codec,
            block_bytes: 1 << log,
            mkfs_time,
            tail_ends,
            drop_xattrs: false,
            threads: NonZero::new(threads),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_is_read((mut tree, contents) in trees_with_contents(), options in options()) {
        let first = image(&tree, &contents, &options);
        if cut(&mut tree) {
            let error = first.expect_err("something has no place");
            prop_assert!(matches!(error, SquashfsError::Unrepresentable { .. }), "{error}");
        }
        let image = image(&tree, &contents, &options).expect("everything has a place");
        prop_assert_eq!(read(&image).tree, tree);
    }

    #[test]
    fn the_number_of_threads_does_not_show((mut tree, contents) in trees_with_contents(), options in options()) {
        cut(&mut tree);
        let with = |threads| {
            image(&tree, &contents, &Options { threads: NonZero::new(threads), ..options }).expect("a good tree")
        };
        prop_assert!(with(1) == with(5));
    }
}

#[test]
fn what_the_format_cannot_hold_is_named() {
    let options = Options::default();
    let failing = |change: fn(&mut Meta)| {
        let mut meta = Meta::default();
        change(&mut meta);
        let tree = with([("a".to_owned(), Kind::Fifo, Meta::default()), ("b".to_owned(), Kind::Fifo, meta)]);
        image(&tree, &Made::new(), &options).expect_err("no place").to_string()
    };
    assert_eq!(failing(|meta| meta.mtime.seconds = -1), "squashfs cannot hold the modification time of `b`");
    assert_eq!(
        failing(|meta| meta.mtime.seconds = 1 << 32),
        "squashfs cannot hold the modification time of `b`"
    );
    assert_eq!(
        failing(|meta| drop(meta.xattrs.insert(b"system.posix_acl_access".to_vec(), vec![1]))),
        "squashfs cannot hold the extended attributes outside `user.`, `trusted.` and `security.` of `b`"
    );
    for (options, message) in [
        (Options { block_bytes: 2048, ..options }, "squashfs has no blocks of 2048 bytes"),
        (Options { block_bytes: 12_288, ..options }, "squashfs has no blocks of 12288 bytes"),
        (Options { block_bytes: 2 << 20, ..options }, "squashfs has no blocks of 2097152 bytes"),
        (
            Options { codec: Codec::Gzip { level: 0 }, ..options },
            "there is no such compression: Gzip { level: 0 }",
        ),
        (
            Options { codec: Codec::Zstd { level: 23 }, ..options },
            "there is no such compression: Zstd { level: 23 }",
        ),
    ] {
        let error = image(&Tree::new(), &Made::new(), &options).expect_err("not in the format");
        assert_eq!(error.to_string(), message);
        assert!(error.hint().is_some());
    }
}

#[test]
fn attributes_can_be_left_out() {
    let mut meta = Meta::default();
    meta.xattrs.insert(b"system.posix_acl_access".to_vec(), vec![1]);
    let tree = with([("a".to_owned(), Kind::Fifo, meta)]);
    let options = Options { drop_xattrs: true, ..Options::default() };
    let image = image(&tree, &Made::new(), &options).expect("left out");
    let read = read(&image).tree;
    assert!(read.get(&path("a")).expect("there").meta.xattrs.is_empty());
}

#[test]
fn the_65536th_owner_is_one_too_many() {
    let owned = |count: u32| {
        with((0..count).map(|id| (format!("f{id:05}"), Kind::Fifo, Meta { uid: id, ..Meta::default() })))
    };
    let options = Options::default();
    assert_eq!(read(&image(&owned(65_535), &Made::new(), &options).expect("room")).tree, owned(65_535));
    let error = image(&owned(65_536), &Made::new(), &options).expect_err("no room");
    assert!(matches!(error, SquashfsError::TooManyOwners(at) if at == path("f65535")));
}

#[test]
fn trees_at_the_limits_come_back() {
    // Folders as deep as a path can name them, names as long as they can be, attributes as large as they can be.
    let mut deep = (0..2047).map(|depth| (vec!["d"; depth + 1].join("/"), Kind::Directory, Meta::default()));
    let mut tree = with(deep.by_ref());
    for number in 0..300 {
        let name = format!("{number:03}{}", "n".repeat(252));
        tree.insert(path(&name), Node { kind: Kind::Socket, meta: Meta::default() });
    }
    let mut meta = Meta::default();
    for number in 0..40 {
        meta.xattrs.insert(format!("user.{number:0250}").into_bytes(), vec![number; 65_536]);
    }
    tree.insert(path("x"), Node { kind: Kind::Symlink([b't'; 4095].into()), meta });
    let image = image(&tree, &Made::new(), &Options::default()).expect("all has its place");
    assert_eq!(read(&image).tree, tree);
}

#[test]
fn contents_that_are_not_what_the_tree_says_are_an_error() {
    for (said, given) in
        [(&b"content"[..], &b"Content"[..]), (b"content", b"conten"), (b"content", b"contents")]
    {
        let digest = Digest::of(said);
        let kind = Kind::File { digest, size: said.len() as u64 };
        let tree = with([("file".to_owned(), kind, Meta::default())]);
        let contents: Made = [(digest, given.to_vec())].into();
        let error = image(&tree, &contents, &Options::default()).expect_err("a lie");
        assert!(matches!(error, SquashfsError::Content(_)), "{error}");
    }
}

#[test]
fn an_output_that_fails_ends_the_writing() {
    let content: Vec<u8> =
        (0..4_000_000_u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let digest = Digest::of(&content);
    let tree = with([("file".to_owned(), Kind::File { digest, size: 4_000_000 }, Meta::default())]);
    let contents: Made = [(digest, content)].into();
    for room in [0, 50, 5000, 100_000] {
        let mut little = vec![0; room];
        let error = write(&tree, &contents, Cursor::new(&mut little[..]), &Options::default());
        assert!(matches!(error, Err(SquashfsError::Content(ContentError::Write(_)))), "{room}: {error:?}");
    }
}
