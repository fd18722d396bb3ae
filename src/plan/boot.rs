//! What a step boots on real firmware: which image, on what, what it should do, and what is changed of it before.

use kiln_artifact::fat::Label;

use super::make::Pattern;
use super::script::Statement;

/// How the disk is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bus {
    /// virtio-blk.
    #[default]
    Virtio,
    /// NVMe.
    Nvme,
    /// A USB stick.
    Usb,
    /// SATA.
    Sata,
}

/// What of Secure Boot the firmware has. Folders of keys are in WORK.
#[derive(Debug, Clone)]
pub enum Trust {
    /// None.
    Off,
    /// No keys: it takes any.
    Setup,
    /// The keys that machines are sold with.
    Vendor,
    /// PK, KEK and db of this folder from the beginning.
    Keys(Pattern),
    /// Setup mode, in which it takes PK.auth, KEK.auth and db.auth of this folder.
    Enroll(Pattern),
}

/// What is expected.
#[derive(Debug, Clone)]
pub enum Expected {
    /// These statements.
    Statements(Vec<Statement>),
    /// Those of a file in SRCDIR.
    File(String),
}

/// What becomes of a file of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alteration {
    /// The lowest bit of the byte at this offset is another: of the file, or of a section of the PE image that it is.
    Flip {
        /// The section.
        section: Option<String>,
        /// The offset.
        at: u64,
    },
    /// Its content is this.
    Text(String),
    /// Its content is that of this file of the image.
    Copy(Pattern),
    /// Nobody signed it.
    Unsigned,
    /// Somebody signed it whom no firmware knows.
    Stranger,
}

/// A file of the image, and what becomes of it.
#[derive(Debug, Clone)]
pub struct Change {
    /// Below the image where that is a folder; the image itself where this is empty.
    pub file: Pattern,
    /// What becomes of it.
    pub what: Alteration,
}

/// A boot.
#[derive(Debug, Clone)]
pub struct Boot {
    /// A disk image, a program or a folder in WORK.
    pub image: Pattern,
    /// How it is attached.
    pub bus: Bus,
    /// What the partition of a folder is called.
    pub label: Option<Label>,
    /// Secure Boot.
    pub trust: Trust,
    /// Whether it has a TPM.
    pub tpm: bool,
    /// What it should do.
    pub expected: Expected,
    /// The private key for ssh, in SRCDIR; that of SECRETS where none is named.
    pub ssh_key: Option<String>,
    /// What is changed before.
    pub changes: Vec<Change>,
    /// The folder in WORK for what is left of it.
    pub report: Option<Pattern>,
}
