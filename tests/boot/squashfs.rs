//! The squashfs writer, judged by the guest's kernel: tree, image, Linux, GNU tar, our reader, tree.

use std::fs::File;

use kiln_artifact::squashfs::{self, Codec, Options};

use super::host::Host;
use super::made::Made;

#[test]
#[ignore = "takes minutes: `ci/test slow` runs it"]
fn a_linux_kernel_shows_the_tree_that_was_packed_with_any_codec() {
    let host = Host::new();
    let mut made = Made::new();
    // Blocks, zeros among them, an end, and the same again.
    let noise = |at: u32| at.wrapping_mul(2_654_435_761).to_le_bytes()[3];
    let content: Vec<u8> = (0..700_001).map(|at| if at < 300_000 { 0 } else { noise(at) }).collect();
    made.file("blocks", content.clone());
    made.file("again", content);
    let codecs = [
        ("gzip", Codec::Gzip { level: 9 }),
        ("zstd", Codec::Zstd { level: 15 }),
        ("xz", Codec::Xz { level: 6 }),
        ("lz4", Codec::Lz4),
    ];
    let mut command = host.kiln();
    command.args(["run", "--root", "debian:bookworm"]);
    for (name, codec) in codecs {
        let options = Options { codec, tail_ends: name == "zstd", ..Options::default() };
        let image = File::create(host.path(name)).expect("room");
        squashfs::write(&made.tree, &made.contents, image, &options).expect("a good tree");
        command.arg("--disk").arg(format!("{name}:/mnt/{name}:ro"));
        command.arg("--out").arg(format!("{name}.tar"));
    }
    let script = "for name in gzip zstd xz lz4; do
        tar --xattrs '--xattrs-include=*' --format=posix --sort=name -C /mnt/$name -c . > $WORK/$name.tar
    done";
    host.end(command.args(["--", "sh", "-euc", script]), &[]).ends(0, &[]);
    for (name, _) in codecs {
        made.compare(&host.path("work").join(format!("{name}.tar")));
    }
}
