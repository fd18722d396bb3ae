//! The erofs writer, judged by the guest's kernel: tree, image, Linux, GNU tar, our reader, tree.

use std::fs::File;

use kiln_artifact::erofs;
use kiln_artifact::tree::Timestamp;

use super::host::Host;
use super::made::Made;

#[test]
fn a_linux_kernel_shows_the_tree_that_was_written() {
    let host = Host::new();
    let mut made = Made::new();
    made.file("old", b"old".to_vec()).mtime = Timestamp { seconds: -2, nanoseconds: 500_000_000 };
    let image = File::create(host.path("image")).expect("room");
    erofs::write(&made.tree, &made.contents, image).expect("a good tree");

    let script = "tar --xattrs '--xattrs-include=*' --format=posix --sort=name -C /mnt -c . > $WORK/tree.tar";
    let mut command = host.kiln();
    command.args(["run", "--root", "debian:bookworm", "--disk", "image:/mnt:ro", "--out", "tree.tar"]);
    host.end(command.args(["--", "sh", "-c", script]), &[]).ends(0, &[]);

    made.compare(&host.path("work/tree.tar"));
}
