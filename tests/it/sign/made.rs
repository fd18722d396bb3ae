//! Keys made where there is no room for them: all of the set or nothing.

use super::super::host::in_own_mounts;
use super::{Signing, Told};

#[test]
fn on_a_disk_that_is_full_no_key_is_left_and_with_room_all_are_made() {
    let signing = Signing::new();
    std::fs::create_dir(signing.host.path("secrets")).expect("a folder");
    let mut kiln = signing.host.kiln();
    kiln.env("SECRETS", signing.host.path("secrets")).args(["sign", "--init"]);
    // A disk of so many pages, in a mount namespace of the test's own: each of the set's files is the one that does not fit.
    let script = r#"
        failed=0
        for pages in $(seq 1 24); do
            mount -t tmpfs -o size=$((pages * 4))k,mode=700 none secrets
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
    let told = Told::by(&mut in_own_mounts(&kiln, script));
    assert_eq!(told.code, Some(0), "{}{}", told.stdout, told.stderr);
    // With fewer pages than the set has files, and not with more.
    assert!(told.stdout.contains("failed 17 times"), "{}", told.stdout);
}
