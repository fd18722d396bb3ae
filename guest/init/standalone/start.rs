//! From the initrd's hand-over to a machine that can be logged in to: what is mounted, copied, made and kept running. Pure,
//! over a [`System`]; `linux` is the real one.
//!
//! ```text
//! start ──▶ mounts ──▶ /local over /etc ──▶ drivers ──▶ encrypted disks ──▶ standalone: name, keys, sshd, logins
//! ```
//!
//! Nothing here fails for good: what cannot be done is said, and the rest is done. There is no way to a shell but through
//! sshd or a login, but for one: the image for sticks, started without Secure Boot.

use crate::config::{self, Interface};
use crate::services::Service;

/// By which name it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A person unlocks disks.
    Manual,
    /// A TPM does.
    Tpm2,
    /// It is on a stick, without Secure Boot.
    Insecure,
}

impl Mode {
    /// From the name that the program was called by.
    #[must_use]
    pub fn of(name: &str) -> Self {
        match name.rsplit('/').next().unwrap_or_default() {
            "initos-init-tpm2" => Self::Tpm2,
            "initos-init-insecure" => Self::Insecure,
            _ => Self::Manual,
        }
    }

    fn shown(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Tpm2 => "TPM2",
            Self::Insecure => "insecure",
        }
    }
}

/// What is asked of the machine. Errors are words for people.
pub trait System {
    /// Writes to the kernel's log and to the virtio console.
    fn say(&mut self, text: &str);
    /// Prints on the console, for whoever sits there.
    fn print(&mut self, text: &str);
    /// Mounts a file system, unless something is mounted there.
    ///
    /// # Errors
    /// The kernel refuses.
    fn mount(&mut self, kind: &str, path: &str, options: &str) -> Result<(), String>;
    /// A file's bytes; none where there is none.
    fn read(&mut self, path: &str) -> Option<Vec<u8>>;
    /// Writes a file with this mode.
    ///
    /// # Errors
    /// It cannot be written.
    fn write(&mut self, path: &str, bytes: &[u8], mode: u32) -> Result<(), String>;
    /// Makes a folder with this mode, or gives it that.
    ///
    /// # Errors
    /// It cannot be made.
    fn folder(&mut self, path: &str, mode: u32) -> Result<(), String>;
    /// Copies what is in a folder into another, over what is there.
    ///
    /// # Errors
    /// Something cannot be copied.
    fn copy_over(&mut self, from: &str, to: &str) -> Result<(), String>;
    /// Whether there is something.
    fn has(&mut self, path: &str) -> bool;
    /// The files in a folder whose names end so.
    fn files(&mut self, folder: &str, end: &str) -> Vec<String>;
    /// Runs a program to its end.
    ///
    /// # Errors
    /// It cannot be started, or does not succeed.
    fn run(&mut self, command: &[&str]) -> Result<(), String>;
    /// What the devices that are there ask for.
    fn modaliases(&mut self) -> Vec<String>;
    /// Disks that are encrypted (LUKS).
    fn encrypted(&mut self) -> Vec<String>;
    /// Gives the machine its name.
    ///
    /// # Errors
    /// The kernel refuses.
    fn set_host_name(&mut self, name: &str) -> Result<(), String>;
}

/// What is left to be done all the time.
#[derive(Debug, PartialEq, Eq)]
pub struct Standalone {
    /// Programs.
    pub services: Vec<Service>,
    /// Cards, as they were named; none where the first wired one is to be asked for an address.
    pub interfaces: Vec<Interface>,
    /// Variables of what is started.
    pub variables: Vec<(String, String)>,
    /// Whether an ssh server is among the services.
    pub has_sshd: bool,
}

/// What the signed initrd says of this machine.
const LOCAL: &str = "/var/initos/local";
/// What an unsigned stick says, which counts only in [`Mode::Insecure`].
const INSTALL: &str = "/boot/efi/install";
const HOST_KEY: &str = "/etc/ssh/ssh_host_ed25519_key";
/// File systems that any root needs; most are there already.
const MOUNTS: [(&str, &str, &str); 6] = [
    ("devtmpfs", "/dev", "mode=0755"),
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("tmpfs", "/run", "mode=0755"),
    ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "mode=1777"),
];
/// Drivers make further devices appear, and TPMs and disks take their time.
const DRIVER_ROUNDS: usize = 2;

/// Does all of it but what goes on for ever.
pub fn start(system: &mut dyn System, mode: Mode) -> Standalone {
    for (kind, path, options) in MOUNTS {
        let mounted = system.folder(path, 0o755).and_then(|()| system.mount(kind, path, options));
        tell(system, path, mounted);
    }
    system.say(&format!("Starting INITOS {}", mode.shown()));
    // Without the initrd's word it counts as secure.
    let is_insecure =
        mode == Mode::Insecure && text(system, "/var/initos/BOOT_SECURE").as_deref() == Some("0");
    configure(system);
    load_drivers(system);
    // Unlocking comes in here: with a key from the TPM or from a person, after which the root is on the disk and no
    // longer this one.
    for disk in system.encrypted() {
        system.say(&format!("{disk} is encrypted and stays locked"));
    }
    standalone(system, is_insecure)
}

fn standalone(system: &mut dyn System, is_insecure: bool) -> Standalone {
    system.say("Starting INITOS standalone");
    let from = |name: &str| -> Vec<String> {
        let install = is_insecure.then(|| format!("{INSTALL}/{name}"));
        install.into_iter().chain([format!("{LOCAL}/{name}")]).collect()
    };
    name(system, &from("hostname"));
    let interfaces = from("interfaces").iter().find_map(|path| text(system, path));
    let (interfaces, unknown) = config::interfaces(&interfaces.unwrap_or_default());
    for line in unknown {
        system.say(&format!("interfaces: not understood: {line}"));
    }
    let variables = config::variables(&text(system, &format!("{LOCAL}/initos.env")).unwrap_or_default());
    let sshd = sshd(system);
    let has_sshd = sshd.is_some();
    let services = sshd.into_iter().chain(logins(system, is_insecure)).collect();
    Standalone { services, interfaces, variables, has_sshd }
}

/// What this machine's files say, over what is the same on all.
fn configure(system: &mut dyn System) {
    for (from, to) in [("etc", "/etc"), ("modprobe.d", "/etc/modprobe.d")] {
        let from = format!("{LOCAL}/{from}");
        if system.has(&from) {
            let copied = system.copy_over(&from, to);
            tell(system, to, copied);
        }
    }
    if let Some(keys) = system.read(&format!("{LOCAL}/authorized_keys")) {
        let written = system
            .folder("/root/.ssh", 0o700)
            .and_then(|()| system.write("/root/.ssh/authorized_keys", &keys, 0o600));
        tell(system, "/root/.ssh/authorized_keys", written);
    }
}

fn load_drivers(system: &mut dyn System) {
    let Some(modprobe) = program(system, &["/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe"]) else {
        system.say("this root has no modprobe: no drivers are loaded");
        return;
    };
    let mut tried = std::collections::BTreeSet::new();
    for _ in 0..DRIVER_ROUNDS {
        let new: Vec<String> =
            system.modaliases().into_iter().filter(|alias| tried.insert(alias.clone())).collect();
        if new.is_empty() {
            return;
        }
        let command: Vec<&str> =
            [modprobe, "-a", "-b", "-q"].into_iter().chain(new.iter().map(String::as_str)).collect();
        // That most devices need nothing, or nothing that there is, is no failure.
        let _ = system.run(&command);
    }
}

fn name(system: &mut dyn System, places: &[String]) {
    let places = places.iter().map(String::as_str).chain(["/etc/hostname"]);
    let texts: Vec<String> = places.filter_map(|path| text(system, path)).collect();
    let name = texts.iter().find_map(|text| config::host_name(text)).unwrap_or("initos");
    let named = system.set_host_name(name);
    tell(system, "host name", named);
}

/// The ssh server, with a key of its own: whoever comes in has a key too.
fn sshd(system: &mut dyn System) -> Option<Service> {
    let sshd = program(system, &["/usr/sbin/sshd", "/sbin/sshd"]);
    let keygen = program(system, &["/usr/bin/ssh-keygen", "/bin/ssh-keygen"]);
    let (Some(sshd), Some(keygen)) = (sshd, keygen) else {
        system.say("this root has no sshd");
        return None;
    };
    // Other kinds of keys may have come with this machine's files.
    if system.files("/etc/ssh", "_key").is_empty() {
        let made = system
            .folder("/etc/ssh", 0o755)
            .and_then(|()| system.run(&[keygen, "-q", "-t", "ed25519", "-N", "", "-f", HOST_KEY]));
        tell(system, HOST_KEY, made);
    }
    for path in system.files("/etc/ssh", "_key.pub") {
        if let Some(key) = text(system, &path) {
            system.say(&format!("Host key: {key}"));
            system.print(&key);
        }
    }
    if !system.has("/root/.ssh/authorized_keys") {
        system.say("no authorized_keys: nobody can come in by ssh");
    }
    let privileges = system.folder("/run/sshd", 0o755);
    tell(system, "/run/sshd", privileges);
    let options = [
        "PasswordAuthentication=no",
        "KbdInteractiveAuthentication=no",
        "PermitEmptyPasswords=no",
        "PermitRootLogin=prohibit-password",
    ];
    let options = options.iter().flat_map(|option| ["-o", option]);
    // What a command line says comes before any configuration (sshd(8)).
    let command = [sshd, "-D", "-e"].into_iter().chain(options).map(ToOwned::to_owned).collect();
    Some(Service { command, terminal: None })
}

/// A login on each console; a shell only where that is allowed.
fn logins(system: &mut dyn System, is_insecure: bool) -> Vec<Service> {
    let consoles = text(system, "/sys/class/tty/console/active").unwrap_or_default();
    let consoles: Vec<&str> = consoles.split_ascii_whitespace().collect();
    let getty = program(system, &["/sbin/agetty", "/usr/sbin/agetty", "/sbin/getty", "/bin/getty"]);
    let login = program(system, &["/bin/login", "/usr/bin/login"]);
    if !is_insecure && (getty.is_none() || login.is_none()) {
        system.say("this root has no getty or no login: its consoles have none");
        return Vec::new();
    }
    let present = consoles.into_iter().filter(|console| system.has(&format!("/dev/{console}")));
    let present: Vec<String> = present.map(ToOwned::to_owned).collect();
    let service = |console: String| {
        let kind = if console.starts_with("tty") && !console.starts_with("ttyS") { "linux" } else { "vt220" };
        let words = match (is_insecure, getty) {
            (false, Some(getty)) => vec![getty, "-L", "115200", &console, kind],
            _ => vec!["/bin/sh", "-l"],
        };
        let command = words.into_iter().map(ToOwned::to_owned).collect();
        Service { command, terminal: Some(format!("/dev/{console}")) }
    };
    present.into_iter().map(service).collect()
}

/// The first of these programs that there is.
fn program(system: &mut dyn System, paths: &[&'static str]) -> Option<&'static str> {
    paths.iter().find(|path| system.has(path)).copied()
}

/// A file as text, without the white space around it.
fn text(system: &mut dyn System, path: &str) -> Option<String> {
    system.read(path).map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// Says what could not be done.
fn tell(system: &mut dyn System, what: &str, result: Result<(), String>) {
    if let Err(why) = result {
        system.say(&format!("{what}: {why}"));
    }
}

#[cfg(test)]
#[path = "start_tests.rs"]
mod tests;
