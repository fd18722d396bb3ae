//! Keys made where there is no room for them: all of the set or nothing.

use std::process::Command;

use super::{Signing, Told};

#[test]
fn on_a_disk_that_is_full_no_key_is_left_and_with_room_all_are_made() {
    let signing = Signing::new();
    std::fs::create_dir(signing.host.path("secrets")).expect("a folder");
    let kiln = signing.host.kiln();
    // A disk of so many pages, in a mount namespace of the test's own: each of the set's files is the one that does not fit.
    let script = r#"
        failed=0
        for pages in $(seq 0 24); do
            mount -t tmpfs -o size=$((pages * 4 + 1))k,mode=700 none secrets
            if "$@" >said 2>&1; then
                [ "$(ls secrets/uefi-keys | wc -l)" = 18 ] || { echo "$pages pages: not all"; exit 1; }
                "$@" >said 2>&1 || { cat said; exit 1; }
            else
                failed=$((failed + 1))
                grep -q "No space left on device" said || { cat said; exit 1; }
                ! find secrets -mindepth 1 | grep . || { echo "left with $pages pages"; exit 1; }
                ! grep -rl "PRIVATE KEY" . || { echo "a key with $pages pages"; exit 1; }
            fi
            umount secrets
        done
        echo "failed $failed times"
    "#;
    let mut apart = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        apart.args(["--user", "--map-root-user"]);
    }
    apart.args(["--mount", "sh", "-euc", script, "sh"]).arg(kiln.get_program()).args(["sign", "--init"]);
    apart.env_clear().envs(kiln.get_envs().filter_map(|(name, value)| Some((name, value?))));
    apart.env("SECRETS", signing.host.path("secrets")).env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    let told = Told::by(apart.current_dir(kiln.get_current_dir().expect("a folder of its own")));
    assert_eq!(told.code, Some(0), "{}{}", told.stdout, told.stderr);
    // With fewer pages than files, and not with more.
    assert!(told.stdout.contains("failed 18 times"), "{}", told.stdout);
}
