//! What lies on disk, field by field (`Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h`), and nothing of
//! where it lies. All numbers are little-endian.

use crate::tree::{Kind, Timestamp};

/// Block size; the kernel maps smaller than its pages only since 6.4, and x86's pages have this size.
pub(super) const BLOCK_BYTES: usize = 4096;
/// As [`BLOCK_BYTES`], for sums of lengths.
pub(super) const BLOCK: u64 = 4096;
/// Inodes begin at multiples of this; an inode's number is its byte address divided by it.
pub(super) const SLOT_BYTES: usize = 32;

const SUPERBLOCK_AT: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
/// `EROFS_FEATURE_COMPAT_SB_CHKSUM` and `EROFS_FEATURE_COMPAT_MTIME`: there is a check sum, and times are mtimes.
const FEATURE_COMPAT: u32 = 0x1 | 0x2;

/// How a file's bytes are laid out (`EROFS_INODE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// In consecutive blocks.
    FlatPlain = 0,
    /// As `FlatPlain`, but what does not fill a block follows the inode.
    FlatInline = 2,
}

/// The fields of the superblock that vary.
pub(super) struct Superblock {
    pub root_nid: u16,
    pub inodes: u64,
    /// The time of compact inodes.
    pub time: Timestamp,
    pub blocks: u32,
    pub uuid: [u8; 16],
}

impl Superblock {
    /// The whole first block of the image.
    pub(super) fn block(&self) -> [u8; BLOCK_BYTES] {
        let mut fields = Fields(Vec::with_capacity(128));
        fields.u32(MAGIC);
        fields.u32(0); // checksum, below
        fields.u32(FEATURE_COMPAT);
        fields.u8(12); // blkszbits
        fields.u8(0); // sb_extslots
        fields.u16(self.root_nid);
        fields.u64(self.inodes);
        fields.bytes(&self.time.seconds.to_le_bytes());
        fields.u32(self.time.nanoseconds);
        fields.u32(self.blocks);
        fields.u32(0); // meta_blkaddr: inode numbers count from the image's start
        fields.u32(0); // xattr_blkaddr: no shared attributes
        fields.bytes(&self.uuid);
        // volume_name, feature_incompat and all that newer features use: zero, so every kernel reads it.
        fields.0.resize(128, 0);
        let mut block = [0; BLOCK_BYTES];
        block[SUPERBLOCK_AT..SUPERBLOCK_AT + fields.0.len()].copy_from_slice(&fields.0);
        // The kernel sums from the superblock to the end of its block, the field itself taken as zero.
        let checksum = crc32c(&block[SUPERBLOCK_AT..]);
        block[SUPERBLOCK_AT + 4..SUPERBLOCK_AT + 8].copy_from_slice(&checksum.to_le_bytes());
        block
    }
}

/// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), seeded with all ones and not inverted at the end, as
/// the kernel's `crc32c(~0, …)` gives it.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| sum >> 1 ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

/// An inode: `struct erofs_inode_compact` or `_extended`.
pub(super) struct Inode {
    pub extended: bool,
    pub layout: Layout,
    /// The length in bytes of the attributes that follow; a multiple of four.
    pub xattr_bytes: usize,
    /// `st_mode`, type included.
    pub mode: u16,
    pub links: u32,
    pub size: u64,
    /// The first block of the content, or a device's number.
    pub block_or_device: u32,
    /// What 32-bit programs see as `st_ino`.
    pub number: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
}

/// What a compact inode can hold of a node.
pub(super) fn fits_compact(links: u32, size: u64, uid: u32, gid: u32) -> bool {
    [links, uid, gid].iter().all(|&number| u16::try_from(number).is_ok()) && u32::try_from(size).is_ok()
}

impl Inode {
    pub(super) fn header_bytes(extended: bool) -> usize {
        if extended { 64 } else { 32 }
    }

    /// Appends the inode to `out`.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let narrow = |number: u32| u16::try_from(number).expect("a compact inode was checked to fit");
        let mut fields = Fields(std::mem::take(out));
        fields.u16(u16::from(self.extended) | (self.layout as u16) << 1);
        // "total size of inline xattrs: sizeof(header) + 4 * (i_xattr_icount - 1)"; none is zero.
        let xattr_count = self.xattr_bytes.checked_sub(XATTR_HEADER_BYTES).map_or(0, |rest| rest / 4 + 1);
        fields.u16(u16::try_from(xattr_count).expect("attributes were checked to fit"));
        fields.u16(self.mode);
        if self.extended {
            fields.u16(0);
            fields.u64(self.size);
            fields.u32(self.block_or_device);
            fields.u32(self.number);
            fields.u32(self.uid);
            fields.u32(self.gid);
            fields.bytes(&self.mtime.seconds.to_le_bytes());
            fields.u32(self.mtime.nanoseconds);
            fields.u32(self.links);
            fields.bytes(&[0; 16]);
        } else {
            fields.u16(narrow(self.links));
            fields.u32(u32::try_from(self.size).expect("a compact inode was checked to fit"));
            fields.u32(0);
            fields.u32(self.block_or_device);
            fields.u32(self.number);
            fields.u16(narrow(self.uid));
            fields.u16(narrow(self.gid));
            fields.u32(0);
        }
        *out = fields.0;
    }
}

/// The type bits of `st_mode` and the `FT_*` of directory entries (`fs_types.h`).
pub(super) fn file_type(kind: &Kind) -> (u16, u8) {
    match kind {
        Kind::File { .. } | Kind::HardLink(_) => (0o100_000, 1),
        Kind::Directory => (0o040_000, 2),
        Kind::CharDevice { .. } => (0o020_000, 3),
        Kind::BlockDevice { .. } => (0o060_000, 4),
        Kind::Fifo => (0o010_000, 5),
        Kind::Socket => (0o140_000, 6),
        Kind::Symlink(_) => (0o120_000, 7),
    }
}

/// `struct erofs_dirent`.
pub(super) const DIRENT_BYTES: usize = 12;

/// Appends a directory entry, whose name begins `name_at` bytes into its block.
pub(super) fn write_dirent(out: &mut Vec<u8>, nid: u64, name_at: usize, file_type: u8) {
    let mut fields = Fields(std::mem::take(out));
    fields.u64(nid);
    fields.u16(u16::try_from(name_at).expect("an offset in a block"));
    fields.u8(file_type);
    fields.u8(0);
    *out = fields.0;
}

/// `struct erofs_xattr_ibody_header`: name filter, count of shared attributes and reserved bytes, all zero.
pub(super) const XATTR_HEADER_BYTES: usize = 12;
/// `struct erofs_xattr_entry`, without name and value.
const XATTR_ENTRY_BYTES: usize = 4;
/// What `i_xattr_icount` can say.
const MAX_XATTRS_BYTES: usize = XATTR_HEADER_BYTES + 4 * (u16::MAX as usize - 1);

/// The index of an attribute's namespace (`EROFS_XATTR_INDEX_*`) and what is left of its name; none where erofs
/// has no index for it.
fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => [(1, &b"user."[..]), (4, b"trusted."), (6, b"security.")]
            .into_iter()
            .find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?))),
    }
}

/// How long the attributes are on disk; none where an attribute, or all together, cannot be held.
pub(super) fn xattrs_bytes<'a>(
    xattrs: impl IntoIterator<Item = (&'a Vec<u8>, &'a Vec<u8>)>,
) -> Option<usize> {
    let mut total = 0;
    for (name, value) in xattrs {
        let (_, suffix) = split_xattr_name(name)?;
        if value.len() > usize::from(u16::MAX) || suffix.len() > usize::from(u8::MAX) {
            return None;
        }
        total += (XATTR_ENTRY_BYTES + suffix.len() + value.len()).next_multiple_of(4);
    }
    let total = if total == 0 { 0 } else { XATTR_HEADER_BYTES + total };
    (total <= MAX_XATTRS_BYTES).then_some(total)
}

/// Appends attributes that [`xattrs_bytes`] has measured.
pub(super) fn write_xattrs<'a>(
    out: &mut Vec<u8>,
    xattrs: impl IntoIterator<Item = (&'a Vec<u8>, &'a Vec<u8>)>,
) {
    let mut fields = Fields(std::mem::take(out));
    let mut is_first = true;
    for (name, value) in xattrs {
        if is_first {
            fields.bytes(&[0; XATTR_HEADER_BYTES]);
            is_first = false;
        }
        let (index, suffix) = split_xattr_name(name).expect("attributes were checked to fit");
        fields.u8(u8::try_from(suffix.len()).expect("attributes were checked to fit"));
        fields.u8(index);
        fields.u16(u16::try_from(value.len()).expect("attributes were checked to fit"));
        fields.bytes(suffix);
        fields.bytes(value);
        let padded = fields.0.len().next_multiple_of(4);
        fields.0.resize(padded, 0);
    }
    *out = fields.0;
}

/// Appends numbers in the order of a C structure.
struct Fields(Vec<u8>);

impl Fields {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn u8(&mut self, number: u8) {
        self.bytes(&[number]);
    }

    fn u16(&mut self, number: u16) {
        self.bytes(&number.to_le_bytes());
    }

    fn u32(&mut self, number: u32) {
        self.bytes(&number.to_le_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.bytes(&number.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_sum_is_castagnolis() {
        // RFC 3720 §B.4, undone the final inversion.
        assert_eq!(!crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn attributes_that_erofs_cannot_hold_have_no_length() {
        let length = |name: &[u8], value: usize| xattrs_bytes([(&name.to_vec(), &vec![0; value])]);
        assert_eq!(length(b"user.a", 1), Some(12 + 8));
        assert_eq!(length(b"system.posix_acl_access", 4), Some(12 + 8));
        assert_eq!(length(b"security.capability", 65_535), Some(12 + 65_552));
        assert_eq!(length(b"security.capability", 65_536), None);
        assert_eq!(length(b"system.nfs4_acl", 1), None);
        assert_eq!(length(b"user", 1), None);
        let five: Vec<_> = (0..5).map(|n| (format!("user.{n}").into_bytes(), vec![0; 60_000])).collect();
        assert_eq!(xattrs_bytes(five.iter().map(|(name, value)| (name, value))), None);
    }
}
