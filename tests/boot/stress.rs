//! Slow, and worth it: under emulation QEMU keeps translations of guest code by page, and drops one when the guest or
//! QEMU writes the page. The file server writes guest memory behind QEMU's back. If a page that once held code is
//! filled with other code and the old translation runs, a program computes nonsense. So: a machine with little memory
//! executes far more program pages from a share than it has room for, twice, and all it computes is compared.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::host::Host;

const PROGRAMS: usize = 150;

#[test]
fn programs_from_a_share_compute_the_same_under_memory_pressure() {
    let host = Host::new();
    let busybox = fs::read("/bin/busybox").expect("busybox-static is installed: see ci/setup test");
    let text = (0..3000_u32).fold(String::new(), |mut text, number| {
        let _ = writeln!(text, "{} line {number}", number.wrapping_mul(2_654_435_761));
        text
    });
    host.file("src/data", text);
    let mut script = String::from("cd ${1:-.}\n");
    // 150 files of 2 MB each are more than the page cache of 256 MiB holds.
    assert!(busybox.len() * PROGRAMS > 256 << 20);
    for number in 0..PROGRAMS {
        let name = format!("busybox-{number}");
        // Different bytes, so that nothing takes two of them for one.
        let path = host.file(&format!("src/{name}"), [&busybox[..], number.to_string().as_bytes()].concat());
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a mode");
    }
    for round in 0..2 {
        for index in 0..PROGRAMS {
            // Another order each round: 7 and 11 have no factor in common with 150.
            let number = index * [7, 11][round] % PROGRAMS;
            let run = match (number + round) % 10 {
                0 => "sha256sum < data",
                1 => "md5sum data",
                2 => "sort -rn data | head -n 3",
                3 => "awk '{ s = (s * 31 + $1) % 1000003 } END { print s }' data",
                4 => "sed -n 's/line \\(.*7\\)$/\\1/p' data | tail -n 2",
                5 => "gzip -c data | gunzip -c | sha1sum",
                6 => "bzip2 -c data | bunzip2 -c | cksum",
                7 => "expr 1234567 '*' 7654321 % 1000007",
                8 => "tr a-z b-za < data | od -c | tail -n 3",
                _ => "sh -c 'i=0; while [ $i -lt 300 ]; do i=$((i + 1)); done; echo $((i * 12345 % 678))'",
            };
            let run = run.replace("| ", &format!("| ./busybox-{number} "));
            let _ = writeln!(script, "./busybox-{number} {run}");
        }
    }
    host.file("src/script", &script);
    let ours = Command::new("/bin/busybox").args(["sh", "script"]).current_dir(host.path("src")).output();
    let ours = String::from_utf8(ours.expect("busybox").stdout).expect("text");
    assert!(ours.lines().count() > 2 * PROGRAMS);
    let told = host.run(&["--memory", "256M", "--src", "src"], &["sh", "script"]);
    told.ends(0, &[]);
    for (number, (ours, theirs)) in ours.lines().zip(told.text().lines()).enumerate() {
        assert_eq!(theirs, ours, "line {number}");
    }
    assert_eq!(told.text().len(), ours.len());
}
