//! The canonical text of a tree, whose digest is the tree's identity, and its strict reader.
//!
//! ```text
//! kiln-tree 1
//! d / 0755 0 0 0.000000000
//! f /bin/tool 0755 0 0 1700000000.000000000 DIGEST SIZE user.note=a\x20b
//! h /bin/tool2 /bin/tool
//! l /lib 0777 0 0 1700000000.000000000 usr/lib
//! c /null 0666 0 0 0.000000000 1 3
//! ```
//! One line a node in path order, fields parted by one space: type (`d`, `f`, `h`ard link, symbolic `l`ink, `c`,
//! `b`, `p` FIFO, `s`ocket), path, octal mode, owner, group, modification time, what belongs to the type, extended
//! attributes by name. Bytes other than printable ASCII, and space, `=` and `\`, are written `\xHH`, so any bytes
//! come back. There is one text for a tree: the reader refuses every other.

use std::collections::BTreeMap;
use std::str::FromStr;

use kiln_digest::{Digest, Hasher};

use super::{Kind, Meta, Node, PathError, Timestamp, Tree, TreeError, TreePath};

const VERSION_LINE: &[u8] = b"kiln-tree 1\n";

/// Why some bytes are not a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The first line is not that of this version.
    #[error("the manifest does not begin with `kiln-tree 1`")]
    Version,
    /// A line that lacks a field, or has one that does not parse.
    #[error("line {line} of the manifest has no good {field}")]
    Field {
        /// Counted from 1.
        line: usize,
        /// What was looked for.
        field: &'static str,
    },
    /// A line that is not as [`Tree::manifest`] writes it, or not in order.
    #[error("line {line} of the manifest is not in canonical form or order")]
    NotCanonical {
        /// Counted from 1.
        line: usize,
    },
    /// The lines are good and the tree is not.
    #[error("the manifest's tree is not well formed")]
    Tree(#[from] TreeError),
}

impl Tree {
    /// The canonical text. It is one only for a tree that passes [`Tree::check`].
    pub fn manifest(&self) -> Vec<u8> {
        let mut text = VERSION_LINE.to_vec();
        for (path, node) in &self.nodes {
            write_line(&mut text, path, node);
        }
        text
    }

    /// The digest of [`Tree::manifest`]: the tree's identity.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::default();
        hasher.update(VERSION_LINE);
        let mut line = Vec::new();
        for (path, node) in &self.nodes {
            line.clear();
            write_line(&mut line, path, node);
            hasher.update(&line);
        }
        hasher.finish().0
    }

    /// Reads what [`Tree::manifest`] writes, and nothing else: the result gives the same bytes again. Memory is
    /// within a small multiple of `text`.
    ///
    /// # Errors
    /// [`ManifestError`], naming the line.
    pub fn parse_manifest(text: &[u8]) -> Result<Self, ManifestError> {
        let mut rest = text.strip_prefix(VERSION_LINE).ok_or(ManifestError::Version)?;
        let mut nodes: Vec<(TreePath, Node)> = Vec::new();
        let mut canonical = Vec::new();
        let mut line = 1;
        while !rest.is_empty() {
            line += 1;
            let end =
                rest.iter().position(|&byte| byte == b'\n').ok_or(ManifestError::NotCanonical { line })?;
            let (this, after) = rest.split_at(end + 1);
            let (path, node) =
                parse_line(&this[..end]).map_err(|field| ManifestError::Field { line, field })?;
            canonical.clear();
            write_line(&mut canonical, &path, &node);
            let in_order = nodes.last().is_none_or(|(last, _)| *last < path);
            if canonical != this || !in_order {
                return Err(ManifestError::NotCanonical { line });
            }
            nodes.push((path, node));
            rest = after;
        }
        // Made of nodes in order at once, the map costs no comparisons down its height.
        let tree = Self { nodes: nodes.into_iter().collect() };
        tree.check()?;
        Ok(tree)
    }
}

const DIGITS: &[u8; 16] = b"0123456789abcdef";

fn write_line(line: &mut Vec<u8>, path: &TreePath, node: &Node) {
    let letter = match node.kind {
        Kind::Directory => b'd',
        Kind::File { .. } => b'f',
        Kind::HardLink(_) => b'h',
        Kind::Symlink(_) => b'l',
        Kind::CharDevice { .. } => b'c',
        Kind::BlockDevice { .. } => b'b',
        Kind::Fifo => b'p',
        Kind::Socket => b's',
    };
    line.extend([letter, b' ', b'/']);
    escape(line, path.as_bytes());
    if let Kind::HardLink(target) = &node.kind {
        line.extend(b" /");
        escape(line, target.as_bytes());
        line.push(b'\n');
        return;
    }
    let Meta { mode, uid, gid, mtime: Timestamp { seconds, nanoseconds }, xattrs } = &node.meta;
    line.push(b' ');
    line.extend([9, 6, 3, 0].map(|shift| DIGITS[usize::from(mode >> shift & 7)]));
    decimals(line, &[(*uid).into(), (*gid).into()]);
    line.extend_from_slice(if *seconds < 0 { b" -" } else { b" " });
    decimal(line, seconds.unsigned_abs());
    line.push(b'.');
    let mut divisor = 100_000_000;
    while divisor > 0 {
        line.push(DIGITS[(nanoseconds / divisor % 10) as usize]);
        divisor /= 10;
    }
    match &node.kind {
        Kind::File { digest, size } => {
            line.push(b' ');
            for &byte in digest.as_bytes() {
                line.extend([DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
            }
            decimals(line, &[*size]);
        }
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
            decimals(line, &[(*major).into(), (*minor).into()]);
        }
        Kind::Symlink(text) => {
            line.push(b' ');
            escape(line, text);
        }
        Kind::Directory | Kind::HardLink(_) | Kind::Fifo | Kind::Socket => {}
    }
    for (name, value) in xattrs {
        line.push(b' ');
        escape(line, name);
        line.push(b'=');
        escape(line, value);
    }
    line.push(b'\n');
}

/// By hand, because a manifest of 10^6 lines spends half its time in formatting otherwise.
fn decimal(line: &mut Vec<u8>, number: u64) {
    let mut digits = [0; 20];
    let mut rest = number;
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = DIGITS[(rest % 10) as usize];
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    line.extend_from_slice(&digits[start..]);
}

/// A space before each number.
fn decimals(line: &mut Vec<u8>, numbers: &[u64]) {
    for &number in numbers {
        line.push(b' ');
        decimal(line, number);
    }
}

fn escape(line: &mut Vec<u8>, bytes: &[u8]) {
    for &byte in bytes {
        if byte.is_ascii_graphic() && !matches!(byte, b'\\' | b'=') {
            line.push(byte);
        } else {
            line.extend([b'\\', b'x', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
    }
}

fn unescape(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    loop {
        match rest {
            [] => return Some(bytes),
            [b'\\', b'x', high, low, tail @ ..] => {
                let nibble =
                    |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
                bytes.push(nibble(*high)? << 4 | nibble(*low)?);
                rest = tail;
            }
            [b'\\', ..] => return None,
            [byte, tail @ ..] => {
                bytes.push(*byte);
                rest = tail;
            }
        }
    }
}

/// The node of a line without its newline, or which field is bad. Whether it is canonical is the caller's to see.
fn parse_line(line: &[u8]) -> Result<(TreePath, Node), &'static str> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut next = |name| fields.next().ok_or(name);
    let letter = next("type")?;
    let path = path(next("path")?).ok_or("path")?;
    if letter == b"h" {
        let target = self::path(next("target")?).ok_or("target")?;
        return Ok((path, Node::hard_link(target)));
    }
    let mode = str_of(next("mode")?).and_then(|text| u16::from_str_radix(text, 8).ok()).ok_or("mode")?;
    let uid = number(next("owner")?).ok_or("owner")?;
    let gid = number(next("group")?).ok_or("group")?;
    let mtime = timestamp(next("modification time")?).ok_or("modification time")?;
    let kind = match letter {
        b"d" => Kind::Directory,
        b"f" => Kind::File {
            digest: number(next("digest")?).ok_or("digest")?,
            size: number(next("size")?).ok_or("size")?,
        },
        b"l" => Kind::Symlink(unescape(next("link text")?).ok_or("link text")?.into()),
        b"c" | b"b" => {
            let major = number(next("major number")?).ok_or("major number")?;
            let minor = number(next("minor number")?).ok_or("minor number")?;
            if letter == b"c" {
                Kind::CharDevice { major, minor }
            } else {
                Kind::BlockDevice { major, minor }
            }
        }
        b"p" => Kind::Fifo,
        b"s" => Kind::Socket,
        _ => return Err("type"),
    };
    let mut xattrs = BTreeMap::new();
    for field in fields {
        let equals = field.iter().position(|&byte| byte == b'=').ok_or("extended attribute")?;
        let name = unescape(&field[..equals]).ok_or("extended attribute")?;
        let value = unescape(&field[equals + 1..]).ok_or("extended attribute")?;
        xattrs.insert(name, value);
    }
    Ok((path, Node { kind, meta: Meta { mode, uid, gid, mtime, xattrs } }))
}

fn str_of(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

fn number<T: FromStr>(field: &[u8]) -> Option<T> {
    str_of(field)?.parse().ok()
}

fn path(field: &[u8]) -> Option<TreePath> {
    let bytes = unescape(field.strip_prefix(b"/")?)?;
    TreePath::new(&bytes).map_err(|_: PathError| ()).ok()
}

fn timestamp(field: &[u8]) -> Option<Timestamp> {
    let (seconds, nanoseconds) = str_of(field)?.split_once('.')?;
    Some(Timestamp { seconds: seconds.parse().ok()?, nanoseconds: nanoseconds.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::sample;
    use super::*;

    const TEXT: &str = "kiln-tree 1\n\
        d / 0755 0 0 0.000000000\n\
        f /a 4755 1 2 -1.500000000 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 0 user.x=\\x00y\n\
        h /b /a\n\
        d /c 1777 0 0 0.000000000\n\
        l /c/\\x20\\xff\\x5c\\x3d 0777 0 0 0.000000000 ../a\n\
        c /n 0666 0 0 0.000000000 1 3\n\
        p /p 0600 4294967295 0 9223372036854775807.999999999\n";

    #[test]
    fn the_text_is_as_documented_and_its_digest_is_the_trees() {
        let tree = Tree::parse_manifest(TEXT.as_bytes()).expect("a good manifest");
        assert_eq!(tree.len(), 7);
        assert_eq!(str_of(&tree.manifest()), Some(TEXT));
        assert_eq!(tree.digest(), Digest::of(TEXT.as_bytes()));
        let odd = TreePath::new(b"c/ \xff\\=").expect("a good path");
        assert_eq!(tree.get(&odd).map(|node| &node.kind), Some(&Kind::Symlink(b"../a"[..].into())));
        assert_eq!(Tree::new().manifest(), b"kiln-tree 1\nd / 0755 0 0 0.000000000\n");
    }

    #[test]
    fn any_other_text_is_refused() {
        let mutations = [
            ("kiln-tree 1", "kiln-tree 2"),
            ("kiln-tree 1\n", ""),
            ("0755 0 0 0.0", "755 0 0 0.0"),
            ("0755 0 0 0.0", "0755 0 0 00.0"),
            ("0755 0 0 0.0", "0755 +0 0 0.0"),
            ("0755 0 0 0.0", "0755  0 0 0.0"),
            ("0.000000000\nf", "0.000000000 \nf"),
            ("0.000000000\nf", "0.0\nf"),
            ("0.000000000\nf", "0.000000000\r\nf"),
            ("e3b0", "E3B0"),
            ("\\x20", " "),
            ("\\xff", "\\xFF"),
            ("\\x5c", "\\"),
            ("/c/", "/\\x63/"),
            ("user.x=", "user.x"),
            ("\\x00y", "\\x00y user.x=1"),
            ("\\x00y", "\\x00y user.a=1"),
            ("h /b /a", "h /b /a 0755"),
            ("h /b /a", "h /b /zz"),
            ("h /b /a", "h /b a"),
            ("h /b /a\n", "h /b /a\nh /b /a\n"),
            ("c /n 0666 0 0 0.000000000 1 3", "c /n 0666 0 0 0.000000000 1"),
            ("c /n", "x /n"),
            ("4294967295", "4294967296"),
            (".999999999\n", ".999999999"),
            (".999999999", ".1999999999"),
            ("d /c 1777 0 0 0.000000000\n", ""),
            ("d / 0755 0 0 0.000000000\n", ""),
            ("/p 0600", "/B 0600"),
            ("/p 0600", "/../p 0600"),
        ];
        for (from, to) in mutations {
            let mutated = TEXT.replacen(from, to, 1);
            assert_ne!(mutated, TEXT, "`{from}` is in the text");
            assert!(Tree::parse_manifest(mutated.as_bytes()).is_err(), "`{from}` -> `{to}`");
        }
    }

    #[test]
    fn every_truncation_is_refused_or_a_whole_tree() {
        for end in 0..TEXT.len() {
            let cut = &TEXT.as_bytes()[..end];
            match Tree::parse_manifest(cut) {
                Ok(tree) => assert_eq!(tree.manifest(), cut),
                Err(_) => assert!(!cut.ends_with(b"\n") || end == "kiln-tree 1\n".len(), "{end}"),
            }
        }
    }

    proptest! {
        #[test]
        fn every_tree_comes_back_from_its_manifest(tree in sample::trees()) {
            let text = tree.manifest();
            prop_assert_eq!(Digest::of(&text), tree.digest());
            let back = Tree::parse_manifest(&text);
            prop_assert_eq!(back.as_ref(), Ok(&tree));
            prop_assert_eq!(back.expect("parsed").manifest(), text);
        }

        #[test]
        fn hostile_bytes_never_panic(text in proptest::collection::vec(any::<u8>(), 0..200), at in 0..TEXT.len()) {
            let mut bytes = TEXT.as_bytes().to_vec();
            bytes.splice(at..at, text);
            if let Ok(tree) = Tree::parse_manifest(&bytes) {
                prop_assert_eq!(tree.manifest(), bytes);
            }
        }
    }
}
