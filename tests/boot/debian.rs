//! A root of Debian packages, configured in a machine of its own the first time.

use super::host::Host;

#[test]
fn a_debian_root_is_configured_and_runs_its_programs() {
    let host = Host::new();
    let script = r#"
        echo '[release]'; . /etc/os-release; echo $VERSION_CODENAME
        echo '[states]'; dpkg-query -W -f '${db:Status-Abbrev}\n' | sort | uniq -c | sed 's/^ *[0-9]* //'
        echo '[audit]'; dpkg --audit
        echo '[user]'; whoami; getent passwd root | cut -d: -f7
        echo '[perl]'; perl -e 'print 6 * 7, "\n"'
        echo '[bash]'; bash -c 'echo ${BASH_VERSION%%.*}'
        echo '[tmp]'; mktemp | cut -c1-9; stat -c %a /tmp
        echo '[left]'; find / -xdev -name '*.dpkg-new' -o -xdev -name '*.dpkg-tmp'
        echo '[end]'
    "#;
    let mut command = host.kiln();
    let told = host.end(command.args(["run", "--root", "debian:bookworm", "--", "sh", "-c", script]), &[]);
    told.ends(0, &[]);
    assert_eq!(told.section("release"), ["bookworm"]);
    assert_eq!(told.section("states"), ["ii "]);
    assert_eq!(told.section("audit"), [""; 0]);
    assert_eq!(told.section("user"), ["root", "/bin/bash"]);
    assert_eq!(told.section("perl"), ["42"]);
    assert_eq!(told.section("bash"), ["5"]);
    assert_eq!(told.section("tmp"), ["/tmp/tmp.", "1777"]);
    assert_eq!(told.section("left"), [""; 0]);
}
