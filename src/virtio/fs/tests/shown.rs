//! What a guest is shown of a share.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rustix::fs::{CWD, Mode, XattrFlags};
use rustix::io::Errno;

use super::*;
use crate::fs::MOST_REQUEST_QUEUES;

#[test]
fn files_show_type_mode_size_and_content() {
    let host = tempfile::tempdir().expect("directory");
    std::fs::create_dir(host.path().join("d")).expect("directory");
    std::fs::write(host.path().join("d/f"), b"some bytes").expect("file");
    std::fs::set_permissions(host.path().join("d/f"), PermissionsExt::from_mode(0o4751)).expect("mode");
    symlink("../elsewhere", host.path().join("d/l")).expect("link");
    let mut guest = Guest::of(host.path(), EPOCH);
    let file = guest.walk("s/d/f");
    let attr = guest.attr(file).expect("attributes");
    assert_eq!((attr.mode.get(), attr.size.get(), attr.blocks.get()), (0o104_751, 10, 1));
    assert_eq!((attr.uid.get(), attr.gid.get(), attr.nlink.get()), (0, 0, 1));
    for time in [attr.mtime, attr.ctime, attr.atime] {
        assert_eq!(time.get(), 1_700_000_000);
    }
    assert_eq!(guest.read(file, 0, 4096), Ok(b"some bytes".to_vec()));
    assert_eq!(guest.read(file, 5, 3), Ok(b"byt".to_vec()));
    assert_eq!(guest.read(file, 10, 100), Ok(vec![]));
    let link = guest.walk("s/d/l");
    assert_eq!(guest.attr(link).expect("attributes").mode.get(), 0o120_777);
    assert_eq!(guest.ask(op::READLINK, link, b""), Ok(b"../elsewhere".to_vec()));
    let directory = guest.walk("s/d");
    assert_eq!(guest.attr(directory).expect("attributes").size.get(), 4096);
}

#[test]
fn listings_are_sorted_by_bytes_and_agree_with_stat() {
    let host = tempfile::tempdir().expect("directory");
    for name in ["b", "a", "B", "a-b", "a.b", "zz", "é"] {
        std::fs::write(host.path().join(name), name).expect("file");
    }
    std::fs::create_dir(host.path().join("dir")).expect("directory");
    let mut guest = Guest::of(host.path(), EPOCH);
    let root = guest.walk("s");
    let entries = guest.list(root);
    let names: Vec<_> = entries.iter().map(|(name, ..)| String::from_utf8_lossy(name)).collect();
    assert_eq!(names, [".", "..", "B", "a", "a-b", "a.b", "b", "dir", "zz", "é"]);
    for (name, inode, kind) in &entries[2..] {
        let entry = guest.lookup(root, name).expect("listed");
        assert_eq!(entry.attr.ino.get(), *inode);
        assert_eq!(*kind, entry.attr.mode.get() >> 12);
        assert!(entry.entry_valid.get() > 1_000_000 && entry.attr_valid.get() > 1_000_000);
    }
    assert_eq!(entries[0].1, guest.attr(root).expect("attributes").ino.get());
}

#[test]
fn inode_numbers_are_made_of_the_path() {
    let (one, other) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
    let mut numbers = Vec::new();
    for host in [&one, &other] {
        std::fs::create_dir(host.path().join("d")).expect("directory");
        std::fs::write(host.path().join("d/f"), "x").expect("file");
        std::fs::hard_link(host.path().join("d/f"), host.path().join("d/g")).expect("link");
        let mut guest = Guest::of(host.path(), EPOCH);
        let nodes = [guest.walk("s/d/f"), guest.walk("s/d/g")];
        numbers.push(nodes.map(|node| guest.attr(node).expect("attributes").ino.get()));
    }
    assert_eq!(numbers[0], numbers[1]);
    assert_ne!(numbers[0][0], numbers[0][1]);
    assert!(numbers[0].iter().all(|number| number >> 63 == 0));
}

#[test]
fn a_share_with_real_attributes_shows_the_hosts() {
    let host = tempfile::tempdir().expect("directory");
    let path = host.path().join("f");
    std::fs::write(&path, "x").expect("file");
    std::fs::hard_link(&path, host.path().join("g")).expect("link");
    let mut guest = Guest::of(host.path(), Attributes::Real);
    let node = guest.walk("s/f");
    let (attr, real) = (guest.attr(node).expect("attributes"), path.metadata().expect("stat"));
    assert_eq!((attr.ino.get(), attr.nlink.get()), (real.ino(), 2));
    assert_eq!(u64::from(attr.uid.get()), u64::from(real.uid()));
    assert_eq!(attr.mtime.get().cast_signed(), real.mtime());
    assert_eq!(i64::from(attr.mtime_nanos.get()), real.mtime_nsec());
    assert_eq!(attr.blocks.get(), real.blocks());
}

#[test]
fn absence_may_be_cached_within_a_share_and_not_at_the_top() {
    let host = tempfile::tempdir().expect("directory");
    let mut guest = Guest::of(host.path(), EPOCH);
    let root = guest.walk("s");
    let absent = guest.lookup(root, b"absent").expect("an answer without a node");
    assert_eq!(absent.nodeid.get(), 0);
    assert!(absent.entry_valid.get() > 1_000_000);
    assert_eq!(guest.lookup(TOP, b"later").err(), Some(libc::ENOENT));
    assert_eq!(guest.lookup(TOP, b"s").expect("share").entry_valid.get(), 0);
}

#[test]
fn shares_come_and_go_while_the_guest_runs() {
    let host = tempfile::tempdir().expect("directory");
    std::fs::write(host.path().join("f"), "x").expect("file");
    let mut guest = Guest::of(host.path(), EPOCH);
    assert_eq!(guest.names(TOP), [".", "..", "s"]);
    let before = guest.attr(TOP).expect("attributes");
    guest.share("later", host.path(), EPOCH);
    assert_eq!(guest.names(TOP), [".", "..", "later", "s"]);
    // A cached listing is dropped when the modification time differs.
    assert_ne!(guest.attr(TOP).expect("attributes").mtime_nanos, before.mtime_nanos);
    let file = guest.walk("later/f");
    assert_eq!(guest.read(file, 0, 10), Ok(b"x".to_vec()));
    assert!(guest.shares.with_tree(|tree| tree.remove_share(b"later")));
    assert_eq!(guest.lookup(TOP, b"later").err(), Some(libc::ENOENT));
    assert_eq!(guest.read(file, 0, 10), Err(libc::ESTALE));
    assert_eq!(guest.record().shares.len(), 2);
    guest.share("later", host.path(), EPOCH);
    let again = guest.walk("later/f");
    assert_ne!(again, file);
    assert_eq!(guest.read(again, 0, 10), Ok(b"x".to_vec()));
}

#[test]
fn only_names_are_taken_for_shares() {
    let host = tempfile::tempdir().expect("directory");
    let guest = Guest::of(host.path(), EPOCH);
    let long = [b'x'; 256];
    for name in [b"".as_slice(), b".", b"..", b"a/b", b"a\0", &long, b"s"] {
        let share =
            Share { directory: File::open(host.path()).expect("directory").into(), attributes: EPOCH };
        assert!(guest.shares.with_tree(|tree| tree.add_share(name, share)).is_err());
    }
}

#[test]
fn extended_attributes_are_those_of_the_host() {
    let host = tempfile::tempdir().expect("directory");
    let path = host.path().join("f");
    std::fs::write(&path, "x").expect("file");
    std::fs::write(host.path().join("plain"), "x").expect("file");
    symlink("f", host.path().join("l")).expect("link");
    for name in ["user.two", "user.one"] {
        match rustix::fs::setxattr(&path, name, name.as_bytes(), XattrFlags::empty()) {
            // This file system has none to show.
            Err(Errno::NOTSUP) => return,
            result => result.expect("attribute"),
        }
    }
    let mut guest = Guest::of(host.path(), EPOCH);
    let (file, plain, link) = (guest.walk("s/f"), guest.walk("s/plain"), guest.walk("s/l"));
    let sized = |size: u32, name: &[u8]| [&size.to_le_bytes(), &[0; 4], name].concat();
    let list = b"user.one\0user.two\0".to_vec();
    assert_eq!(guest.ask(op::LISTXATTR, file, &sized(1000, b"")), Ok(list.clone()));
    assert_eq!(guest.ask(op::LISTXATTR, file, &sized(18, b"")), Ok(list));
    assert_eq!(guest.ask(op::LISTXATTR, file, &sized(17, b"")), Err(libc::ERANGE));
    assert_eq!(guest.ask(op::LISTXATTR, file, &sized(0, b"")), Ok(vec![18, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(guest.ask(op::GETXATTR, file, &sized(100, b"user.one\0")), Ok(b"user.one".to_vec()));
    assert_eq!(guest.ask(op::GETXATTR, file, &sized(7, b"user.one\0")), Err(libc::ERANGE));
    assert_eq!(guest.ask(op::GETXATTR, file, &sized(0, b"user.one\0")), Ok(vec![8, 0, 0, 0, 0, 0, 0, 0]));
    for name in [b"user.none\0".as_slice(), b"\0", b"user.o\0", b"security.capability\0"] {
        assert_eq!(guest.ask(op::GETXATTR, file, &sized(100, name)), Err(libc::ENODATA));
    }
    for _ in 0..2 {
        assert_eq!(guest.ask(op::GETXATTR, plain, &sized(100, b"user.one\0")), Err(libc::ENODATA));
        assert_eq!(guest.ask(op::LISTXATTR, link, &sized(100, b"")), Ok(vec![]));
    }
    assert_eq!(guest.ask(op::LISTXATTR, TOP, &sized(100, b"")), Ok(vec![]));
}

#[test]
fn fs07_special_files_are_shown_and_never_opened() {
    let host = tempfile::tempdir().expect("directory");
    let fifo = host.path().join("fifo");
    rustix::fs::mkfifoat(CWD, &fifo, Mode::from(0o644)).expect("fifo");
    let _socket = std::os::unix::net::UnixListener::bind(host.path().join("socket")).expect("socket");
    let mut guest = Guest::of(host.path(), EPOCH);
    for (name, kind) in [("fifo", libc::S_IFIFO), ("socket", libc::S_IFSOCK)] {
        let node = guest.walk(&format!("s/{name}"));
        assert_eq!(guest.attr(node).expect("attributes").mode.get() & libc::S_IFMT, kind);
        // Opening the FIFO for reading would succeed, or wait: neither may happen.
        assert_eq!(guest.read(node, 0, 10), Err(libc::EINVAL));
        assert_eq!(guest.ask(op::LISTXATTR, node, &[0; 8]), Ok(vec![0; 8]));
        assert_eq!(guest.lookup(node, b"x").err(), Some(libc::ENOTDIR));
    }
    assert!(guest.share_record().changed.is_empty());
}

#[test]
fn fs28_a_large_directory_is_listed_in_order_and_once() {
    let host = tempfile::tempdir().expect("directory");
    for number in 0..5_000 {
        symlink("nowhere", host.path().join(format!("{number:05}"))).expect("link");
    }
    let mut guest = Guest::of(host.path(), EPOCH);
    let root = guest.walk("s");
    let names = guest.names(root);
    assert_eq!(names.len(), 5_002);
    assert!(names.is_sorted() && names[2] == "00000" && names[5_001] == "04999");
}

#[test]
fn a_path_longer_than_the_kernel_takes_is_reached() {
    let host = tempfile::tempdir().expect("directory");
    let name = "d".repeat(200);
    let mut directory = std::os::fd::OwnedFd::from(File::open(host.path()).expect("directory"));
    for _ in 0..30 {
        rustix::fs::mkdirat(&directory, &name, Mode::from(0o755)).expect("directory");
        let flags = rustix::fs::OFlags::DIRECTORY;
        directory = rustix::fs::openat(&directory, &name, flags, Mode::empty()).expect("directory");
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let file = rustix::fs::openat(&directory, "f", flags, Mode::from(0o644)).expect("file");
    rustix::io::write(&file, b"deep").expect("file");
    let mut guest = Guest::of(host.path(), EPOCH);
    let node = guest.walk(&format!("s/{}f", format!("{name}/").repeat(30)));
    assert_eq!(guest.read(node, 0, 10), Ok(b"deep".to_vec()));
}

#[test]
fn a_file_system_of_the_kernels_is_an_empty_folder() {
    let mut guest = Guest::of(Path::new("/"), Attributes::Real);
    for name in ["proc", "sys"] {
        let folder = guest.walk(&format!("s/{name}"));
        assert_eq!(guest.attr(folder).expect("attributes").mode.get() & 0o170_000, 0o040_000);
        assert_eq!(guest.names(folder), [".", ".."], "{name}");
        let absent = guest.lookup(folder, b"version").expect("an answer");
        assert_eq!(absent.nodeid.get(), 0, "{name}");
    }
    // A process list that changes spoils nothing.
    guest.shares.with_tree(|tree| tree.settle());
    assert_eq!(guest.share_record().changed, []);
}

#[test]
fn a_device_has_as_many_request_queues_as_it_was_made_with_and_answers_on_each() {
    let (device, _shares) = Fs::new(Settings::default());
    assert_eq!((queues_of(&device), device.config[36]), (2, 1));
    let mut device = device.with_request_queues(2);
    assert_eq!((queues_of(&device), device.config[36]), (3, 2));
    let memory = memory();
    let mut rings = [Ring::new(1, 16), Ring::new(2, 16)];
    for (unique, ring) in (1..).zip(&mut rings) {
        ring.send(&memory, &request(40, op::STATFS, unique, TOP, &[]), 4096);
    }
    let [first, second] = &mut rings;
    let mut queues = [None, Some(&mut first.queue), Some(&mut second.queue)];
    let outcome = Device::<()>::process(&mut device, Wake::Queue(2), &mut queues, &memory).expect("rings");
    assert_eq!(outcome.interrupt, 0b110);
    assert!(rings.iter_mut().all(|ring| ring.used(&memory).is_some()));
    assert_eq!(queues_of(&device.with_request_queues(255)), 1 + usize::from(MOST_REQUEST_QUEUES));
}

fn queues_of(device: &Fs) -> usize {
    Device::<()>::queue_sizes(device).len()
}
