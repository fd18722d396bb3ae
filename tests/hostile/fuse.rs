//! FUSE requests by name: number and layout of the body (linux/fuse.h 7.41). Written down apart from the server's own.

/// Name, opcode, body.
pub const REQUESTS: [(&str, u32, &str); 50] = [
    ("LOOKUP", 1, "name:z"),
    ("FORGET", 2, "nlookup:8=1"),
    ("GETATTR", 3, "getattr_flags:4 dummy:4 fh:8"),
    (
        "SETATTR",
        4,
        "valid:4 pad:4 fh:8 size:8 lock_owner:8 atime:8 mtime:8 ctime:8 nanos:4 mnanos:4 cnanos:4 mode:4",
    ),
    ("READLINK", 5, ""),
    ("SYMLINK", 6, "name:z to:z"),
    ("MKNOD", 8, "mode:4 rdev:4 umask:4 pad:4 name:z"),
    ("MKDIR", 9, "mode:4 umask:4 name:z"),
    ("UNLINK", 10, "name:z"),
    ("RMDIR", 11, "name:z"),
    ("RENAME", 12, "newdir:8 name:z to:z"),
    ("LINK", 13, "oldnodeid:8 name:z"),
    ("OPEN", 14, "flags:4 open_flags:4"),
    ("READ", 15, "fh:8 offset:8 size:4=4096 read_flags:4 lock_owner:8 flags:4 pad:4"),
    ("WRITE", 16, "fh:8 offset:8 size:4 write_flags:4 lock_owner:8 flags:4 pad:4 data:b"),
    ("STATFS", 17, ""),
    ("RELEASE", 18, "fh:8 flags:4 release_flags:4 lock_owner:8"),
    ("FSYNC", 20, "fh:8 fsync_flags:4 pad:4"),
    ("SETXATTR", 21, "size:4 flags:4 name:z value:b"),
    ("GETXATTR", 22, "size:4 pad:4 name:z"),
    ("LISTXATTR", 23, "size:4 pad:4"),
    ("REMOVEXATTR", 24, "name:z"),
    ("FLUSH", 25, "fh:8 unused:4 pad:4 lock_owner:8"),
    ("INIT", 26, "major:4=7 minor:4=41 max_readahead:4=131072 flags:4=4294967295 flags2:4 unused:b"),
    ("OPENDIR", 27, "flags:4 open_flags:4"),
    ("READDIR", 28, "fh:8 offset:8 size:4=4096 read_flags:4 lock_owner:8 flags:4 pad:4"),
    ("RELEASEDIR", 29, "fh:8 flags:4 release_flags:4 lock_owner:8"),
    ("FSYNCDIR", 30, "fh:8 fsync_flags:4 pad:4"),
    ("GETLK", 31, "fh:8 owner:8 start:8 end:8 type:4 pid_:4 lk_flags:4 pad:4"),
    ("SETLK", 32, "fh:8 owner:8 start:8 end:8 type:4 pid_:4 lk_flags:4 pad:4"),
    ("SETLKW", 33, "fh:8 owner:8 start:8 end:8 type:4 pid_:4 lk_flags:4 pad:4"),
    ("ACCESS", 34, "mask:4 pad:4"),
    ("CREATE", 35, "flags:4 mode:4 umask:4 open_flags:4 name:z"),
    ("INTERRUPT", 36, "of:8"),
    ("BMAP", 37, "block:8 blocksize:4 pad:4"),
    ("DESTROY", 38, ""),
    ("IOCTL", 39, "fh:8 flags:4 cmd:4 arg:8 in_size:4 out_size:4 data:b"),
    ("POLL", 40, "fh:8 kh:8 flags:4 events:4"),
    ("NOTIFY_REPLY", 41, "unused:8 offset:8 size:4 pad:4 unused2:8 unused3:8"),
    ("BATCH_FORGET", 42, "count:4 dummy:4 items:b"),
    ("FALLOCATE", 43, "fh:8 offset:8 length:8 mode:4 pad:4"),
    ("READDIRPLUS", 44, "fh:8 offset:8 size:4=4096 read_flags:4 lock_owner:8 flags:4 pad:4"),
    ("RENAME2", 45, "newdir:8 flags:4 pad:4 name:z to:z"),
    ("LSEEK", 46, "fh:8 offset:8 whence:4 pad:4"),
    ("COPY_FILE_RANGE", 47, "fh_in:8 off_in:8 nodeid_out:8 fh_out:8 off_out:8 length:8 flags:8"),
    ("SETUPMAPPING", 48, "fh:8 foffset:8 length:8 flags:8 moffset:8"),
    ("REMOVEMAPPING", 49, "count:4 items:b"),
    ("SYNCFS", 50, "pad:8"),
    ("TMPFILE", 51, "flags:4 mode:4 umask:4 open_flags:4 name:z"),
    ("STATX", 52, "getattr_flags:4 reserved:4 fh:8 sx_flags:4 sx_mask:4"),
];

/// Bytes of struct fuse_in_header and struct fuse_out_header.
pub const IN_BYTES: usize = 40;
pub const OUT_BYTES: usize = 16;

/// Names of the entries in the answer to READDIR, in their order; an error where it is none.
pub fn names(answer: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let (mut names, mut rest) = (Vec::new(), answer);
    while !rest.is_empty() {
        let length =
            rest.get(16..20).map(|bytes| bytes.iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte)));
        let length = length.ok_or("a listing ends in the middle of an entry")?;
        let whole = (24 + length).next_multiple_of(8);
        names.push(rest.get(24..24 + length).ok_or("an entry's name is cut off")?.to_vec());
        rest = rest.get(whole..).ok_or("an entry is not padded")?;
    }
    Ok(names)
}
