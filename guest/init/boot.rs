//! From the kernel to the root's init: which image is opened, what is refused, and what happens then. Pure, over a
//! [`System`]; `linux` is the real one.
//!
//! ```text
//! start ──▶ modules ──▶ firmware's variables ──▶ slots ──▶ a partition whose hashes are the signed ones ──▶ verity
//!       ──▶ root (squashfs below a private layer) ──▶ modules, firmware ──▶ /local ──▶ the root's init
//! any failure ──▶ FAILED, logs on the partition, 20 s, restart. There is no shell on any way.
//! ```
//!
//! A signed image is named by a hash in /local or /boot of the initrd, which the firmware verified with the kernel. The copy
//! of the hash on the partition only says which partition is meant; what is opened is opened with the signed one.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fmt;
use std::time::Duration;

use crate::efi::{self, Start};
use crate::verity::{OnCorruption, RootHash, VerityError};

/// Modules without which nothing is found, beside the drivers that devices ask for. What a kernel has built in is no failure;
/// what is missing shows later.
const MODULES: [&str; 14] = [
    "simpledrm",
    // Hashes as quickly as the processor can; verity takes what is there when it is opened.
    "sha256-ssse3",
    "virtio_blk",
    "scsi_mod",
    "sd_mod",
    "nvme",
    "mmc_block",
    "squashfs",
    "overlay",
    "loop",
    "dm-verity",
    "vfat",
    "nls_cp437",
    // FAT wants its table for long names too.
    "nls_ascii",
];
/// How the partition is mounted: by the tables that are loaded for it. Without a word a kernel takes those that it was
/// configured with (`CONFIG_FAT_DEFAULT_IOCHARSET`), iso8859-1 unless somebody chose, which no initrd has.
pub const VOLUME_OPTIONS: &CStr = c"codepage=437,iocharset=ascii";
/// Beside them, for sticks. The image for sticks has them from the start, any other when no other bus had its partition.
const USB_MODULES: [&str; 6] = ["usbcore", "ehci-pci", "ohci-pci", "xhci-pci", "usb-storage", "uas"];
/// Drivers make further devices appear; this often is looked for those that they ask for.
const DRIVER_ROUNDS: usize = 4;
/// Programs of the initrd that take the place of the root's: an image whose initrd was made anew needs no new root.
const PROGRAMS: [&str; 2] = ["initos", "setup-initos"];

/// How long devices may take to appear.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a partition is looked for without drivers of USB. A disk that is there shows itself sooner, and its boot does
/// not pay for controllers that it does not need.
const WITHOUT_USB: Duration = Duration::from_secs(1);
/// Between looks at the devices.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How long a failure can be read before the machine restarts.
const BEFORE_RESTART: Duration = Duration::from_secs(20);

/// Where an opened image goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The root.
    Root,
    /// The modules of the running kernel.
    Modules,
    /// Firmware of devices.
    Firmware,
}

/// An image that a hash in the initrd names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Where it goes.
    pub role: Role,
    /// Its file on the partition; its tree has `.verity` behind it.
    pub file: String,
    /// The file of its hash on the partition.
    pub hash_file: String,
    /// The signed hash.
    pub hash: RootHash,
}

/// A partition with a FAT file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its device, below /dev.
    pub device: String,
    /// Its label; empty where it has none.
    pub label: String,
}

impl fmt::Display for Volume {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let label = if self.label.is_empty() { "no label" } else { &self.label };
        write!(to, "{} ({label})", self.device)
    }
}

/// What a boot is told by the signed command line and the initrd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orders {
    /// The kernel's release.
    pub release: String,
    /// Whether this is the image for sticks (`initos=usb`).
    pub is_usb: bool,
    /// What corruption does (`initos.corruption=restart` or `panic`).
    pub corruption: OnCorruption,
}

impl Orders {
    /// From the kernel's command line.
    #[must_use]
    pub fn read(release: &str, command_line: &str) -> Self {
        let says =
            |word: &str| command_line.split_ascii_whitespace().any(|known| known.eq_ignore_ascii_case(word));
        let corruption = match says("initos.corruption=panic") {
            true => OnCorruption::Panic,
            false => OnCorruption::Restart,
        };
        Self { release: release.to_owned(), is_usb: says("initos=usb"), corruption }
    }
}

/// What became of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loaded {
    /// It is there now, or was built in.
    Yes,
    /// This initrd does not have it.
    Absent,
}

/// What the state machine asks of the machine. Errors are words for people.
pub trait System {
    /// Writes to the kernel's log and to the virtio console.
    fn say(&mut self, text: &str);
    /// Loads a module of the initrd and what it needs.
    ///
    /// # Errors
    /// The kernel refuses.
    fn load_module(&mut self, name: &str) -> Result<Loaded, String>;
    /// The modules that the devices which are there ask for; those of USB only `with_usb`.
    fn drivers(&mut self, with_usb: bool) -> Vec<String>;
    /// A variable of the firmware's, with its attributes.
    fn variable(&mut self, name: &str) -> Option<Vec<u8>>;
    /// A file of the initrd's; none where there is none.
    fn initrd_file(&mut self, path: &str) -> Option<Vec<u8>>;
    /// The partitions that are there now.
    fn volumes(&mut self) -> Vec<Volume>;
    /// Mounts a partition as the one that may be booted from, to be read only: it may be somebody else's.
    ///
    /// # Errors
    /// It cannot be mounted.
    fn mount_volume(&mut self, device: &str) -> Result<(), String>;
    /// Lets it be written to, now that it is known to be ours.
    ///
    /// # Errors
    /// It cannot be, as a stick that is protected.
    fn write_volume(&mut self) -> Result<(), String>;
    /// Takes it away again, unless it is in use.
    fn unmount_volume(&mut self);
    /// A small file on the partition.
    fn volume_file(&mut self, path: &str) -> Option<Vec<u8>>;
    /// Opens an image of the partition through verity.
    ///
    /// # Errors
    /// A file is missing, or the kernel refuses.
    fn open(&mut self, image: &Image, corruption: OnCorruption) -> Result<(), String>;
    /// Closes what was opened.
    fn close(&mut self);
    /// Mounts the opened image, the root below a private layer.
    ///
    /// # Errors
    /// The kernel refuses: what verity finds corrupt among it.
    fn mount_image(&mut self, role: Role, release: &str) -> Result<(), String>;
    /// Whether the root has this path.
    fn root_has(&mut self, path: &str) -> bool;
    /// Puts a file into the root's private layer.
    ///
    /// # Errors
    /// It cannot be written.
    fn write_root(&mut self, path: &str, bytes: &[u8]) -> Result<(), String>;
    /// Copies the initrd's /local into the root.
    ///
    /// # Errors
    /// It cannot be written.
    fn copy_local(&mut self, to: &str) -> Result<(), String>;
    /// Copies files of the initrd's /sbin whose names begin so over those of the root's.
    ///
    /// # Errors
    /// They cannot be written.
    fn copy_programs(&mut self, prefixes: &[&str]) -> Result<(), String>;
    /// Writes what explains a failure onto the partition.
    fn write_logs(&mut self);
    /// Waits.
    fn pause(&mut self, time: Duration);
    /// Time since the kernel started.
    fn uptime(&mut self) -> Duration;
}

/// Why the root cannot be started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fatal {
    /// The initrd names no root.
    #[error("the initrd names no root: neither /local/initos.hash nor hash.recovery in /local or /boot")]
    NoHash,
    /// A hash in the initrd is none.
    #[error("{file} in the initrd: {source}")]
    BadHash {
        /// Which.
        file: String,
        /// What is wrong.
        source: VerityError,
    },
    /// No partition holds the images.
    #[error("boot partition not found: no {0} or other FAT holds the images that this initrd is signed for")]
    NoPartition(String),
    /// An image cannot be mounted.
    #[error("cannot mount the {role}: {why}")]
    Mount {
        /// Which.
        role: &'static str,
        /// Why.
        why: String,
    },
    /// The root is none.
    #[error("the root has no {0}")]
    NotARoot(String),
    /// The root's layer cannot be written.
    #[error("cannot prepare the root: {0}")]
    Prepare(String),
}

/// Finds, verifies and prepares the root. Gives the path of the init that takes over.
///
/// # Errors
/// [`Fatal`], after which only [`fail`] is left.
pub fn boot(system: &mut dyn System, orders: &Orders) -> Result<&'static str, Fatal> {
    system.say(&format!("Starting INITOS initramfs {}", orders.release));
    let usb: &[&str] = if orders.is_usb { &USB_MODULES } else { &[] };
    let first = [&MODULES, usb, &["efivarfs"]].concat();
    let mut drivers = Drivers::default();
    drivers.load(system, &first, orders.is_usb);
    let variable = |name: &str| format!("{name}-{}", efi::GLOBAL);
    let secure = system.variable(&variable("SecureBoot"));
    let start = Start::of(secure.as_deref(), system.variable(&variable("BootCurrent")).as_deref());
    system.say(if start.is_secure { "SECURE: Secure Boot is on" } else { "INSECURE: Secure Boot is off" });
    let images = images(system, &orders.release)?;
    let labels = efi::labels(start, orders.is_usb);
    let volume = find(system, &images, &labels, orders, &mut drivers)?;
    mount(system, &images, orders)?;
    describe(system, start, &volume)?;
    let init = choose(system, start, orders)?;
    system.say(&format!("Handing over to {init}"));
    Ok(init)
}

/// The drivers that were tried, whether they came or not.
#[derive(Default)]
struct Drivers(BTreeSet<String>);

impl Drivers {
    /// Loads these modules, and the drivers that devices ask for; those of USB only `with_usb`.
    fn load(&mut self, system: &mut dyn System, names: &[&str], with_usb: bool) {
        let mut absent: Vec<&str> = Vec::new();
        for name in names {
            match system.load_module(name) {
                Ok(Loaded::Yes) => {}
                Ok(Loaded::Absent) => absent.push(name),
                Err(why) => system.say(&format!("no module {name}: {why}")),
            }
        }
        if !absent.is_empty() {
            system.say(&format!("Not in this initrd: {}", absent.join(", ")));
        }
        for _ in 0..DRIVER_ROUNDS {
            let new: Vec<String> =
                system.drivers(with_usb).into_iter().filter(|name| self.0.insert(name.clone())).collect();
            if new.is_empty() {
                break;
            }
            for name in new {
                if let Err(why) = system.load_module(&name) {
                    system.say(&format!("no driver {name}: {why}"));
                }
            }
        }
    }
}

/// Says what failed, leaves logs, and waits until the machine may be restarted.
pub fn fail(system: &mut dyn System, fatal: &Fatal) {
    system.say(&format!("FAILED: {fatal}"));
    if matches!(fatal, Fatal::NoHash | Fatal::BadHash { .. } | Fatal::NoPartition(_)) {
        // No partition was taken. One that was passed over is where somebody will look.
        let volumes = system.volumes();
        let mut slots = volumes.iter().filter(|volume| efi::LABELS.contains(&volume.label.as_str()));
        if let Some(slot) = slots.find(|slot| system.mount_volume(&slot.device).is_ok())
            && system.write_volume().is_ok()
        {
            system.say(&format!("Leaving logs on {slot}"));
        }
    }
    system.write_logs();
    system.unmount_volume();
    system.say(&format!("Rebooting in {} sec", BEFORE_RESTART.as_secs()));
    system.pause(BEFORE_RESTART);
}

/// The images that hashes in the initrd name: one with all in it, or one for each role.
fn images(system: &mut dyn System, release: &str) -> Result<Vec<Image>, Fatal> {
    let single = [(
        Role::Root,
        "initos.hash".to_owned(),
        "initos/initos.sqfs".to_owned(),
        "initos/initos.hash".to_owned(),
    )];
    let separate = [
        (Role::Root, "recovery".to_owned()),
        (Role::Modules, format!("modules-{release}")),
        (Role::Firmware, "firmware".to_owned()),
    ]
    .map(|(role, name)| (role, format!("hash.{name}"), format!("{name}.sqfs"), format!("hash.{name}")));
    let mut found: Vec<Image> = Vec::new();
    for (role, name, file, hash_file) in single.into_iter().chain(separate) {
        let places = ["/local", "/boot"].map(|folder| format!("{folder}/{name}"));
        let Some((path, bytes)) =
            places.into_iter().find_map(|path| system.initrd_file(&path).map(|bytes| (path, bytes)))
        else {
            continue;
        };
        let hash = RootHash::read(&bytes).map_err(|source| Fatal::BadHash { file: path, source })?;
        // One with all in it leaves no place for another root.
        if !found.iter().any(|image| image.role == role) {
            found.push(Image { role, file, hash_file, hash });
        }
    }
    if found.iter().any(|image| image.role == Role::Root) { Ok(found) } else { Err(Fatal::NoHash) }
}

/// Opens the images on the first partition that has them, in the order of `labels`: on whatever bus, since it is the signed
/// hash that says which is right. Where no such partition had them in its time, any other will do, whatever it is called.
fn find(
    system: &mut dyn System,
    images: &[Image],
    labels: &[&str],
    orders: &Orders,
    drivers: &mut Drivers,
) -> Result<Volume, Fatal> {
    let start = system.uptime();
    let mut give_up = start + DEVICE_PATIENCE;
    let mut has_usb = orders.is_usb;
    let mut tried: Vec<String> = Vec::new();
    loop {
        let volumes = system.volumes();
        let all_there = labels.iter().all(|label| volumes.iter().any(|volume| volume.label == *label));
        let late = system.uptime() >= give_up;
        // A slot is passed over only when its partition was seen, or when it has had its time.
        for label in labels {
            let here: Vec<Volume> = volumes.iter().filter(|volume| volume.label == *label).cloned().collect();
            if here.is_empty() && !all_there && !late {
                break;
            }
            if let Some(volume) = try_each(system, images, here, &mut tried, orders.corruption) {
                return Ok(volume);
            }
        }
        if late {
            let others: Vec<Volume> =
                volumes.into_iter().filter(|volume| !tried.contains(&volume.device)).collect();
            if !others.is_empty() {
                system.say("Looking at partitions of any label");
            }
            let found = try_each(system, images, others, &mut tried, orders.corruption);
            return found.ok_or_else(|| Fatal::NoPartition(labels.join(", ")));
        }
        let now = system.uptime();
        if !has_usb && now >= start + WITHOUT_USB {
            system.say("Looking on USB too");
            drivers.load(system, &USB_MODULES, true);
            has_usb = true;
            // Devices have their time, however long the machine takes to load.
            give_up += system.uptime().saturating_sub(now);
        }
        system.pause(LOOK_AGAIN);
    }
}

/// Opens the images on the first of these partitions that has them, leaving out those that were tried.
fn try_each(
    system: &mut dyn System,
    images: &[Image],
    volumes: Vec<Volume>,
    tried: &mut Vec<String>,
    corruption: OnCorruption,
) -> Option<Volume> {
    for volume in volumes {
        if tried.contains(&volume.device) {
            continue;
        }
        tried.push(volume.device.clone());
        match try_volume(system, images, &volume, corruption) {
            Ok(()) => return Some(volume),
            Err(why) => system.say(&format!("Skipping {volume}: {why}")),
        }
    }
    None
}

fn try_volume(
    system: &mut dyn System,
    images: &[Image],
    volume: &Volume,
    corruption: OnCorruption,
) -> Result<(), String> {
    system.mount_volume(&volume.device)?;
    let result = open_all(system, images, volume, corruption);
    if result.is_err() {
        system.close();
        system.unmount_volume();
    } else if let Err(why) = system.write_volume() {
        system.say(&format!("No logs on {volume}: {why}"));
    }
    result
}

fn open_all(
    system: &mut dyn System,
    images: &[Image],
    volume: &Volume,
    corruption: OnCorruption,
) -> Result<(), String> {
    for image in images {
        let there =
            system.volume_file(&image.hash_file).ok_or_else(|| format!("it has no {}", image.hash_file))?;
        if RootHash::read(&there).ok().as_ref() != Some(&image.hash) {
            return Err(format!("{} is of another version", image.hash_file));
        }
    }
    let root = images.iter().find(|image| image.role == Role::Root);
    let short = root.map_or("", |image| image.hash.short());
    system.say(&format!("Found InitOS partition {} {short}", volume.device));
    for image in images {
        system.open(image, corruption).map_err(|why| format!("{}: {why}", image.file))?;
    }
    Ok(())
}

fn mount(system: &mut dyn System, images: &[Image], orders: &Orders) -> Result<(), Fatal> {
    let mut images: Vec<&Image> = images.iter().collect();
    images.sort_by_key(|image| image.role);
    system.say("Mounting overlay");
    for image in images {
        let role = match image.role {
            Role::Root => "root",
            Role::Modules => "modules",
            Role::Firmware => "firmware",
        };
        system.mount_image(image.role, &orders.release).map_err(|why| Fatal::Mount { role, why })?;
        system.say(&format!("Mounted verity {role}"));
    }
    if !system.root_has("/etc") {
        return Err(Fatal::NotARoot("/etc".to_owned()));
    }
    let modules = format!("/lib/modules/{}/modules.dep", orders.release);
    if system.root_has(&modules) { Ok(()) } else { Err(Fatal::NotARoot(modules)) }
}

/// Tells the root how it was booted, and gives it what the initrd has for it.
fn describe(system: &mut dyn System, start: Start, volume: &Volume) -> Result<(), Fatal> {
    let slot = efi::slot(start);
    let entry = start.entry.map_or_else(String::new, |entry| format!("{entry:04X}"));
    let files = [
        ("BOOT_CURRENT", entry.as_str()),
        ("BOOT_NEXT", slot.other().letter()),
        ("BOOT_SECURE", if start.is_secure { "1" } else { "0" }),
        ("BOOT_DEVICE", volume.device.as_str()),
    ];
    for (name, text) in files {
        system.write_root(&format!("/var/initos/{name}"), text.as_bytes()).map_err(Fatal::Prepare)?;
    }
    system.copy_local("/var/initos/local").map_err(Fatal::Prepare)?;
    system.copy_programs(&PROGRAMS).map_err(Fatal::Prepare)
}

/// The root's init: the way to unlock disks that the partition asks for, which nothing vouches for and which decides
/// nothing but who asks; else what any root has.
fn choose(system: &mut dyn System, start: Start, orders: &Orders) -> Result<&'static str, Fatal> {
    let wanted = match (orders.is_usb && !start.is_secure, system.volume_file("initos/tpm_handle").is_some())
    {
        (true, _) => "/sbin/initos-init-insecure",
        (false, true) => "/sbin/initos-init-tpm2",
        (false, false) => "/sbin/initos-init-manual",
    };
    let inits = [wanted, "/init", "/lib/systemd/systemd", "/sbin/init"];
    let found = inits.into_iter().find(|path| system.root_has(path));
    found.ok_or_else(|| Fatal::NotARoot(format!("init: {}", inits.join(", "))))
}

#[cfg(test)]
#[path = "boot_tests.rs"]
mod tests;
