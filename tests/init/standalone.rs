//! A root whose init is initOS's own, on a machine without disks of its own: network, ssh server, login, and its end.

use std::path::PathBuf;
use std::process::Command;

use super::acceptance::held;
use super::images::{self, Image, disk, initrd, kernel, program, single_layout};
use super::machine::{Bus, Machine, Shape};

/// In the places of an ssh server's programs: what they were asked for, a key, and something that listens.
const SSHD: &str = "#!/bin/sh
echo sshd called $* >/dev/console
echo $$ >/run/sshd/pid
exec nc -ll -p 22 -e /bin/true
";
const KEYGEN: &str = "#!/bin/sh
while [ $# -gt 1 ]; do shift; done
echo secret >$1
echo ssh-ed25519 AAAAkey >$1.pub
";

/// A root with initOS's init in it, whose root user has the password `sesame`.
fn root() -> Image {
    let mut files = images::root();
    kernel().for_root(&mut files);
    files.file("sbin/initos-init-manual", 0o755, program("initos-init"));
    for name in ["bin/login", "bin/nc", "bin/true", "bin/kill", "bin/hostname", "sbin/getty", "sbin/modprobe"]
    {
        files.link(name, "/bin/busybox");
    }
    files.file("usr/sbin/sshd", 0o755, SSHD);
    files.file("usr/bin/ssh-keygen", 0o755, KEYGEN);
    let hashed = Command::new("openssl").args(["passwd", "-6", "-salt", "salt", "sesame"]).output();
    let hashed = String::from_utf8(hashed.expect("openssl is installed").stdout).expect("text");
    files.file("etc/shadow", 0o600, format!("root:{}:19000::::::\n", hashed.trim()));
    files.file("etc/group", 0o644, "root:x:0:\ntty:x:5:\n");
    Image::of(&files)
}

fn boot(root: &Image, initrd: &PathBuf) -> Machine {
    let disk = disk(&single_layout(root), "BOOTA");
    Machine::start(&Shape {
        kernel: &kernel().image,
        initrd,
        command_line: "quiet loglevel=5",
        disks: &[(&disk, Bus::Virtio)],
        keeps_writes: false,
        has_network: true,
    })
}

#[test]
fn a_root_alone_gets_an_address_a_server_and_a_login_and_ends_when_told() {
    let root = root();
    let initrd = initrd(&[
        ("local/initos.hash".to_owned(), root.hash.clone()),
        ("local/hostname".to_owned(), "kitchen".to_owned()),
        ("local/authorized_keys".to_owned(), "ssh-ed25519 AAAAmine".to_owned()),
    ]);
    let mut machine = boot(&root, &initrd);
    machine.expect("Handing over to /sbin/initos-init-manual");
    machine.expect("INITOS: Starting INITOS manual");
    machine.types("\recho SH$((1+1))ELL\r");
    machine.expect("INITOS: Starting INITOS standalone");
    machine.expect("INITOS: Host key: ssh-ed25519 AAAAkey");
    // These come in any order; what was matched is not looked at again.
    let said = machine.expect_all(&[
        "sshd called -D -e -o PasswordAuthentication=no",
        "INITOS: sshd is up",
        "INITOS: eth0 has the address 10.0.2.15/24",
        "kitchen login: ",
    ]);
    assert!(!said.contains("SH2ELL"), "{said}");
    machine.types("root\r");
    machine.expect("Password: ");
    machine.types("wrong\r");
    machine.expect("Login incorrect");
    machine.expect("login: ");
    machine.types("root\r");
    machine.expect("Password: ");
    machine.types("sesame\r");
    machine.expect("# ");
    // What ends is started again, and what is nobody's is reaped.
    machine.types("kill $(cat /run/sshd/pid)\r");
    machine.expect("sshd called");
    machine
        .types("(sleep 0 &); sleep 1; echo zombies $(grep -l '^State:.Z' /proc/[0-9]*/status | grep -c .)\r");
    machine.expect("zombies 0\r");
    machine.types("ls -ln /root/.ssh; cat /root/.ssh/authorized_keys /etc/resolv.conf /proc/net/route\r");
    machine.expect("-rw-------");
    machine.expect("AAAAmine");
    machine.expect("nameserver 10.0.2.3");
    machine.expect("eth0\t00000000\t0202000A");
    machine.types("poweroff\r");
    machine.expect("INITOS: Switching off");
    let printed = machine.ends();
    assert!(printed.contains("Power down") && !printed.contains("Kernel panic"), "{printed}");
    held("ssh-access");
}
