//! Starts of a machine that is played: files by path, and what is done to it.

use std::collections::BTreeMap;

use super::*;
use crate::config::Method;

#[derive(Default)]
struct Played {
    said: Vec<String>,
    printed: Vec<String>,
    files: BTreeMap<String, (Vec<u8>, u32)>,
    folders: BTreeMap<String, u32>,
    mounted: Vec<String>,
    ran: Vec<Vec<String>>,
    encrypted: Vec<String>,
    name: String,
}

impl System for Played {
    fn say(&mut self, text: &str) {
        self.said.push(text.to_owned());
    }
    fn print(&mut self, text: &str) {
        self.printed.push(text.to_owned());
    }
    fn mount(&mut self, _: &str, path: &str, _: &str) -> Result<(), String> {
        self.mounted.push(path.to_owned());
        Ok(())
    }
    fn read(&mut self, path: &str) -> Option<Vec<u8>> {
        self.files.get(path).map(|(bytes, _)| bytes.clone())
    }
    fn write(&mut self, path: &str, bytes: &[u8], mode: u32) -> Result<(), String> {
        self.files.insert(path.to_owned(), (bytes.to_vec(), mode));
        Ok(())
    }
    fn folder(&mut self, path: &str, mode: u32) -> Result<(), String> {
        self.folders.insert(path.to_owned(), mode);
        Ok(())
    }
    fn copy_over(&mut self, from: &str, to: &str) -> Result<(), String> {
        let copies: Vec<_> = self
            .files
            .iter()
            .filter_map(|(path, file)| Some((format!("{to}{}", path.strip_prefix(from)?), file.clone())))
            .collect();
        self.files.extend(copies);
        Ok(())
    }
    fn has(&mut self, path: &str) -> bool {
        self.files.keys().any(|file| file == path || file.starts_with(&format!("{path}/")))
    }
    fn files(&mut self, folder: &str, end: &str) -> Vec<String> {
        let is_there = |path: &&String| path.starts_with(folder) && path.ends_with(end);
        self.files.keys().filter(is_there).cloned().collect()
    }
    fn run(&mut self, command: &[&str]) -> Result<(), String> {
        self.ran.push(command.iter().map(ToString::to_string).collect());
        if command[0].ends_with("ssh-keygen") {
            let path = command[command.len() - 1];
            self.files.insert(path.to_owned(), (b"secret".to_vec(), 0o600));
            self.files.insert(format!("{path}.pub"), (b"ssh-ed25519 AAAA root@x\n".to_vec(), 0o644));
        }
        Ok(())
    }
    fn modaliases(&mut self) -> Vec<String> {
        let all = ["pci:a", "pci:b"];
        all[..2.min(self.ran.len() + 1)].iter().map(ToString::to_string).collect()
    }
    fn encrypted(&mut self) -> Vec<String> {
        self.encrypted.clone()
    }
    fn set_host_name(&mut self, name: &str) -> Result<(), String> {
        self.name = name.to_owned();
        Ok(())
    }
}

/// A root with all programs, started by the initrd with Secure Boot on.
fn machine() -> Played {
    let mut played = Played::default();
    for path in [
        "/sbin/modprobe",
        "/usr/sbin/sshd",
        "/usr/bin/ssh-keygen",
        "/sbin/agetty",
        "/bin/login",
        "/bin/sh",
        "/dev/tty1",
        "/dev/ttyS0",
    ] {
        put(&mut played, path, "");
    }
    put(&mut played, "/sys/class/tty/console/active", "tty1 ttyS0 hvc0\n");
    put(&mut played, "/var/initos/BOOT_SECURE", "1");
    played
}

fn put(played: &mut Played, path: &str, text: &str) {
    played.files.insert(path.to_owned(), (text.as_bytes().to_vec(), 0o644));
}

fn says(played: &Played, word: &str) -> bool {
    played.said.iter().any(|line| line.contains(word))
}

/// Commands that are kept running.
fn commands(standalone: &Standalone) -> Vec<String> {
    standalone.services.iter().map(|service| service.command.join(" ")).collect()
}

#[test]
fn a_machine_without_disks_gets_an_ssh_server_with_keys_only_and_logins() {
    let mut played = machine();
    put(&mut played, "/var/initos/local/authorized_keys", "ecdsa-sha2-nistp256 AAAA\n");
    let standalone = start(&mut played, Mode::Manual);
    let commands = commands(&standalone);
    assert!(commands[0].starts_with("/usr/sbin/sshd -D -e -o PasswordAuthentication=no"), "{commands:?}");
    assert!(commands[0].contains("PermitRootLogin=prohibit-password"));
    assert_eq!(commands[1..], ["/sbin/agetty -L 115200 tty1 linux", "/sbin/agetty -L 115200 ttyS0 vt220"]);
    assert_eq!(played.files["/root/.ssh/authorized_keys"].1, 0o600);
    assert_eq!(played.folders["/root/.ssh"], 0o700);
    assert_eq!(played.name, "initos");
    assert!(played.mounted.iter().any(|path| path == "/dev/pts"));
    assert!(says(&played, "Starting INITOS standalone") && says(&played, "Host key: ssh-ed25519 AAAA"));
    assert_eq!(played.printed, ["ssh-ed25519 AAAA root@x"]);
    assert!(standalone.has_sshd && standalone.interfaces.is_empty());
}

#[test]
fn drivers_are_asked_for_once_for_each_device() {
    let mut played = machine();
    start(&mut played, Mode::Manual);
    let asked: Vec<String> =
        played.ran.iter().filter(|c| c[0] == "/sbin/modprobe").map(|command| command.join(" ")).collect();
    assert_eq!(asked, ["/sbin/modprobe -a -b -q pci:a", "/sbin/modprobe -a -b -q pci:b"]);
}

#[test]
fn what_the_signed_initrd_says_of_the_machine_comes_before_the_roots_own() {
    let mut played = machine();
    put(&mut played, "/etc/hostname", "image\n");
    put(&mut played, "/etc/ssh/sshd_config", "Port 1\n");
    put(&mut played, "/var/initos/local/hostname", "kitchen\n");
    put(&mut played, "/var/initos/local/etc/ssh/sshd_config", "Port 22\n");
    put(&mut played, "/var/initos/local/etc/ssh/ssh_host_rsa_key", "secret");
    put(&mut played, "/var/initos/local/modprobe.d/x.conf", "blacklist x\n");
    put(&mut played, "/var/initos/local/interfaces", "iface eth1 inet dhcp\nbridge br0\n");
    put(&mut played, "/var/initos/local/initos.env", "A=b\n");
    let standalone = start(&mut played, Mode::Tpm2);
    assert_eq!(played.name, "kitchen");
    assert_eq!(played.files["/etc/ssh/sshd_config"].0, b"Port 22\n");
    assert!(played.files.contains_key("/etc/modprobe.d/x.conf"));
    assert!(!played.ran.iter().any(|command| command[0].ends_with("ssh-keygen")), "it has a key");
    assert_eq!(standalone.interfaces, [Interface { name: "eth1".into(), method: Method::Dhcp }]);
    assert_eq!(standalone.variables, [("A".to_owned(), "b".to_owned())]);
    assert!(says(&played, "interfaces: not understood: bridge br0"));
}

#[test]
fn a_shell_is_given_by_a_stick_without_secure_boot_and_by_nothing_else() {
    let shells = |mode: Mode, secure: Option<&str>| {
        let mut played = machine();
        played.files.remove("/var/initos/BOOT_SECURE");
        if let Some(secure) = secure {
            put(&mut played, "/var/initos/BOOT_SECURE", secure);
        }
        commands(&start(&mut played, mode)).iter().any(|command| command.contains("/bin/sh"))
    };
    assert!(shells(Mode::Insecure, Some("0")));
    for (mode, secure) in [
        (Mode::Insecure, Some("1")),
        (Mode::Insecure, None),
        (Mode::Manual, Some("0")),
        (Mode::Tpm2, Some("0")),
        (Mode::Manual, None),
    ] {
        assert!(!shells(mode, secure), "{mode:?} {secure:?}");
    }
    // Nor where there is nothing else to offer.
    let mut played = machine();
    for path in ["/sbin/agetty", "/bin/login", "/usr/sbin/sshd"] {
        played.files.remove(path);
    }
    assert!(start(&mut played, Mode::Manual).services.is_empty());
    assert!(says(&played, "no sshd") && says(&played, "no getty"));
}

#[test]
fn a_stick_is_believed_only_where_it_may_be() {
    let named = |mode: Mode, secure: &str| {
        let mut played = machine();
        put(&mut played, "/boot/efi/install/hostname", "stick\n");
        put(&mut played, "/var/initos/BOOT_SECURE", secure);
        start(&mut played, mode);
        played.name
    };
    assert_eq!(named(Mode::Insecure, "0"), "stick");
    assert_eq!(named(Mode::Insecure, "1"), "initos");
    assert_eq!(named(Mode::Manual, "0"), "initos");
}

#[test]
fn an_encrypted_disk_is_named_and_the_machine_goes_on_alone() {
    let mut played = machine();
    played.encrypted = vec!["vda3".to_owned()];
    let standalone = start(&mut played, Mode::Tpm2);
    assert!(says(&played, "vda3 is encrypted and stays locked") && says(&played, "INITOS standalone"));
    assert!(standalone.has_sshd);
}

#[test]
fn the_name_of_the_program_is_the_mode() {
    assert_eq!(Mode::of("/sbin/initos-init-tpm2"), Mode::Tpm2);
    assert_eq!(Mode::of("/sbin/initos-init-insecure"), Mode::Insecure);
    for name in ["/sbin/initos-init-manual", "/init", ""] {
        assert_eq!(Mode::of(name), Mode::Manual);
    }
}
