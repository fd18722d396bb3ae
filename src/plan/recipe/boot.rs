//! What a step boots, as `kiln.toml` says it: an image, its firmware, what it should do, and what is changed before.

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

use super::Text;

/// `boot` of a step: an image that is booted as `kiln boot` does it, and must do what is expected.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BootTable {
    /// What is booted, in WORK: the raw image of a disk or CD, an EFI program such as a UKI, or a folder, which goes onto a
    /// FAT disk. One `*` stands for letters of a name that just one path has.
    #[schemars(with = "String")]
    pub image: Text,
    /// How the disk is attached: `virtio` (unless said), `nvme`, `usb` or `sata`.
    #[schemars(with = "Option<String>")]
    pub bus: Option<Text>,
    /// Name of a folder's FAT partition.
    #[schemars(with = "Option<String>")]
    pub label: Option<Text>,
    /// Secure Boot: `off` (unless said), `setup` (no keys), `vendor` (those that machines are sold with), `keys` (those of `keys`, from the beginning) or `enroll` (in setup
    /// mode the firmware takes the .auth files of `keys`).
    #[schemars(with = "Option<String>")]
    pub secure_boot: Option<Text>,
    /// A folder in WORK with PK, KEK and db, such as the boot/efi/KEYS of `sign`.
    #[schemars(with = "Option<String>")]
    pub keys: Option<Text>,
    /// Whether the machine has a TPM 2.0, new in each run.
    #[serde(default)]
    pub tpm: bool,
    /// What it should do: statements as `kiln boot` takes them, one a line.
    #[schemars(with = "Option<String>")]
    pub expect: Option<Text>,
    /// A file of statements in SRCDIR, in place of `expect`.
    #[schemars(with = "Option<String>")]
    pub script: Option<Text>,
    /// The private key for `ssh`, in SRCDIR; root.key in SECRETS unless said.
    #[schemars(with = "Option<String>")]
    pub ssh_key: Option<Text>,
    /// What is changed of the image before it is booted, one after the other.
    #[serde(default)]
    #[schemars(with = "Vec<ChangeTable>")]
    pub change: Vec<Spanned<ChangeTable>>,
    /// A folder in WORK for junit.xml, timeline.jsonl, console.txt and pictures of the screen; there also where it fails.
    #[schemars(with = "Option<String>")]
    pub report: Option<Text>,
}

/// A change of one file of the image: exactly one of flip, text, copy and sign says which.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ChangeTable {
    /// The file, below the image where that is a folder; the image itself unless said. One `*` as in `image`.
    #[schemars(with = "Option<String>")]
    pub file: Option<Text>,
    /// Inverts the lowest bit of the byte at this offset.
    #[schemars(with = "Option<u64>")]
    pub flip: Option<Spanned<u64>>,
    /// Of flip: the section of a PE image that the offset counts in, such as `.cmdline` of a UKI.
    #[schemars(with = "Option<String>")]
    pub section: Option<Text>,
    /// Its content becomes this.
    #[schemars(with = "Option<String>")]
    pub text: Option<Text>,
    /// Its content becomes that of this file of the image.
    #[schemars(with = "Option<String>")]
    pub copy: Option<Text>,
    /// Its signatures go: `none` leaves it without, `stranger` signs it with a key that no firmware knows.
    #[schemars(with = "Option<String>")]
    pub sign: Option<Text>,
}

impl BootTable {
    /// Every text in it, to be filled in.
    pub(super) fn texts(&mut self) -> impl Iterator<Item = &mut Text> {
        let own = [
            &mut self.bus,
            &mut self.label,
            &mut self.secure_boot,
            &mut self.keys,
            &mut self.expect,
            &mut self.script,
            &mut self.ssh_key,
            &mut self.report,
        ];
        let changes = self.change.iter_mut().flat_map(|change| {
            let change = change.get_mut();
            [&mut change.file, &mut change.section, &mut change.text, &mut change.copy, &mut change.sign]
        });
        own.into_iter().chain(changes).flatten().chain([&mut self.image])
    }
}
