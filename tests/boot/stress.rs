//! Slow, and worth it.
//!
//! Runs by the hundred, of which a third fails, leave no more than the first did.
//!
//! And: under emulation QEMU keeps translations of guest code by page, and drops one when the guest or
//! QEMU writes the page. The file server writes guest memory behind QEMU's back. If a page that once held code is
//! filled with other code and the old translation runs, a program computes nonsense. So: a machine with little memory
//! executes far more program pages from a share than it has room for, twice, and all it computes is compared.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
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

/// The files below `folder`, by number and bytes, and links as what they are.
fn weight(folder: &Path) -> (usize, u64) {
    let mut sum = (0, 0);
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let meta = fs::symlink_metadata(entry.path()).expect("it is there");
        let (files, bytes) = if meta.is_dir() { weight(&entry.path()) } else { (1, meta.len()) };
        sum = (sum.0 + files, sum.1 + bytes);
    }
    sum
}

#[test]
#[ignore = "takes minutes: `ci/test slow` runs it"]
fn two_hundred_runs_of_which_a_third_fails_leave_what_the_first_ones_left() {
    let host = Host::new();
    host.file("src/a", "content");
    // Arguments, script and status; a timeout waits for a second each time, and is less often.
    let good = (&["--src=src", "--out=o"][..], "cat a > $WORK/o", 0);
    let bad = [
        (&["--out=o"][..], "exit 3", 3),
        (&["--out=missing"], "true", 125),
        (&["--limit=printed=1K"], "yes", 125),
        (&[], "kill -9 1; echo o > /proc/sysrq-trigger; sleep 10", 125),
        (&["--mount=/no/where:/m"], "true", 2),
        (&["--timeout=1s"], "sleep 10", 124),
    ];
    let run = |number: usize| {
        let (arguments, script, status) = if number % 3 == 0 { bad[number / 3 % bad.len()] } else { good };
        let told = host.run(&[&["--quiet", "--overwrite"], arguments].concat(), &["sh", "-c", script]);
        assert_eq!(told.code, Some(status), "{number}: {told:?}");
    };
    // Each kind once, before it is weighed.
    (0..18).for_each(run);
    let own = fs::canonicalize(host.path("store")).expect("a store");
    let before = (weight(&own), weight(&host.path("work")));
    (18..200).for_each(run);
    let after = (weight(&own), weight(&host.path("work")));
    assert_eq!(before.0.0, after.0.0, "files in the store: {before:?} {after:?}");
    assert_eq!(before.1, after.1);
    // Records may be written anew with other numbers in them.
    assert!(after.0.1 < before.0.1 + (1 << 20), "bytes in the store: {before:?} {after:?}");
}
