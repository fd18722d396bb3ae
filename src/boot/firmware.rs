//! Firmware found on the host, and a variable store of a machine's own: with the given keys, empty, or without Secure Boot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kiln_artifact::variables::{
    GLOBAL_VARIABLE, Guid, SECURITY_DATABASE, VariableError, VariableStore, certificate_list,
    is_signature_lists,
};

/// What of Secure Boot a machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecureBoot {
    /// None: the firmware is built without it, or has no keys.
    Off,
    /// The firmware has no keys and takes any.
    Setup,
    /// On, with the keys of this folder: PK, KEK and db, each as .esl, .cer, .der, .crt or .pem; dbx where it is there.
    Keys(PathBuf),
    /// On, with the keys that machines are sold with, as the firmware's package has them.
    Vendor,
    /// Setup mode first, in which the firmware takes PK.auth, KEK.auth and db.auth of this folder.
    Enrol(PathBuf),
}

/// Firmware files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firmware {
    /// The code.
    pub code: PathBuf,
    /// The variable store that it comes with.
    pub vars: PathBuf,
    /// Whether it guards its variables by system management mode.
    pub smm: bool,
}

impl Firmware {
    /// Its code, for a machine.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open_code(&self) -> Result<fs::File, FirmwareError> {
        fs::File::open(&self.code).map_err(|source| FirmwareError::Read { path: self.code.clone(), source })
    }
}

/// Why a machine has no firmware.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// None of the known files is there.
    #[error("no UEFI firmware{} was found", if *.secure { " with Secure Boot" } else { "" })]
    Missing {
        /// Whether it was to have Secure Boot.
        secure: bool,
    },
    /// A file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A key is not there.
    #[error("there is no {name} in {}", .folder.display())]
    NoKey {
        /// Which.
        name: &'static str,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// A key's file holds something else.
    #[error("{} holds neither a certificate nor signature lists", .0.display())]
    NotAKey(PathBuf),
    /// Its package has no variables with the keys of machines' vendors.
    #[error("no variables with the keys that machines are sold with were found")]
    NoVendorKeys,
    /// The variable store cannot take them.
    #[error("cannot write keys into {}", .path.display())]
    Store {
        /// The store that the firmware comes with.
        path: PathBuf,
        /// Why.
        #[source]
        source: VariableError,
    },
}

impl FirmwareError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { .. } => Some(
                "install OVMF (Debian: apt install ovmf), or name it with --firmware CODE.fd and --firmware-vars VARS.fd"
                    .to_owned(),
            ),
            Self::NoVendorKeys => Some(
                "Debian's ovmf has OVMF_VARS_4M.ms.fd; name another with --firmware CODE.fd and --firmware-vars VARS.fd"
                    .to_owned(),
            ),
            Self::NoKey { name, .. } => Some(format!("{name}.esl, .cer, .der, .crt or .pem")),
            _ => None,
        }
    }
}

/// Code, variables and whether it has Secure Boot, where Debian, Arch and Fedora have them.
const KNOWN: [(&str, &str, bool); 8] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd", true),
    ("/usr/share/edk2/x64/OVMF_CODE.secboot.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd", true),
    ("/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd", true),
    ("/usr/share/OVMF/OVMF_CODE.secboot.fd", "/usr/share/OVMF/OVMF_VARS.fd", true),
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd", false),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd", false),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd", false),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd", false),
];

/// Code and variables with the keys that machines are sold with, Microsoft's, where Debian and Fedora have them.
const KNOWN_TO_VENDORS: [(&str, &str); 3] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"),
    ("/usr/share/OVMF/OVMF_CODE.secboot.fd", "/usr/share/OVMF/OVMF_VARS.ms.fd"),
];

/// Who the certificates belong to, as signature lists want it said. Made once, at random.
const OWNER: Guid =
    [0x1d, 0x5c, 0x61, 0x9e, 0x0b, 0x4f, 0x7a, 0x4d, 0x8e, 0x57, 0x2c, 0x9a, 0xd4, 0x63, 0x11, 0xf8];

/// Finds the host's firmware for a machine that has this of Secure Boot.
///
/// # Errors
/// [`FirmwareError::Missing`], [`FirmwareError::NoVendorKeys`].
pub fn find(secure_boot: &SecureBoot) -> Result<Firmware, FirmwareError> {
    let secure = *secure_boot != SecureBoot::Off;
    let there = |firmware: &Firmware| firmware.code.is_file() && firmware.vars.is_file();
    if *secure_boot == SecureBoot::Vendor {
        return KNOWN_TO_VENDORS
            .into_iter()
            .map(|(code, vars)| Firmware { code: code.into(), vars: vars.into(), smm: true })
            .find(there)
            .ok_or(FirmwareError::NoVendorKeys);
    }
    KNOWN
        .into_iter()
        .filter(|(.., has_it)| *has_it == secure)
        .map(|(code, vars, smm)| Firmware { code: code.into(), vars: vars.into(), smm })
        .find(there)
        .ok_or(FirmwareError::Missing { secure })
}

/// The variable store for one machine.
///
/// # Errors
/// A file cannot be read or is not what it should be, or the store cannot take the keys.
pub fn variables(firmware: &Firmware, secure_boot: &SecureBoot) -> Result<Vec<u8>, FirmwareError> {
    let bytes = read(&firmware.vars)?;
    let failed = |source| FirmwareError::Store { path: firmware.vars.clone(), source };
    let folder = match secure_boot {
        SecureBoot::Keys(folder) => folder,
        SecureBoot::Vendor => {
            let store = VariableStore::read(bytes).map_err(failed)?;
            // Of firmware that was named: without a PK there would be no Secure Boot, and everything would start.
            let has_keys = store.has("PK", GLOBAL_VARIABLE);
            return if has_keys { Ok(store.into_bytes()) } else { Err(FirmwareError::NoVendorKeys) };
        }
        SecureBoot::Off | SecureBoot::Setup | SecureBoot::Enrol(_) => return Ok(bytes),
    };
    let mut store = VariableStore::read(bytes).map_err(failed)?;
    for Keys { name, vendor, lists } in keys(folder)? {
        store.add_authenticated(name, vendor, &lists).map_err(failed)?;
    }
    Ok(store.into_bytes())
}

/// A variable of keys.
#[derive(Debug)]
pub struct Keys {
    name: &'static str,
    vendor: Guid,
    lists: Vec<u8>,
}

/// The keys in a folder.
///
/// # Errors
/// One is missing, or is none.
pub fn keys(folder: &Path) -> Result<Vec<Keys>, FirmwareError> {
    let mut keys = Vec::new();
    // PK is what turns Secure Boot on.
    for (name, vendor) in [
        ("db", SECURITY_DATABASE),
        ("dbx", SECURITY_DATABASE),
        ("KEK", GLOBAL_VARIABLE),
        ("PK", GLOBAL_VARIABLE),
    ] {
        match key(folder, name)? {
            Some(lists) => keys.push(Keys { name, vendor, lists }),
            None if name == "dbx" => {}
            None => return Err(FirmwareError::NoKey { name, folder: folder.to_owned() }),
        }
    }
    Ok(keys)
}

/// The signature lists of the key `name`, from the first of its files that is there.
fn key(folder: &Path, name: &str) -> Result<Option<Vec<u8>>, FirmwareError> {
    let files = ["esl", "cer", "der", "crt", "pem"].map(|kind| folder.join(format!("{name}.{kind}")));
    let Some(path) = files.into_iter().find(|path| path.exists()) else { return Ok(None) };
    let bytes = read(&path)?;
    if is_signature_lists(&bytes) {
        return Ok(Some(bytes));
    }
    let certificate = match pem_rfc7468::decode_vec(&bytes) {
        Ok(("CERTIFICATE", certificate)) => certificate,
        // DER of a sequence of 256 bytes or more (X.690 §8.1.3), as every certificate is.
        _ if bytes.starts_with(&[0x30, 0x82]) => bytes,
        _ => return Err(FirmwareError::NotAKey(path)),
    };
    Ok(Some(certificate_list(OWNER, &certificate)))
}

fn read(path: &Path) -> Result<Vec<u8>, FirmwareError> {
    fs::read(path).map_err(|source| FirmwareError::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_taken_as_der_pem_and_lists_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).expect("room");
        let der = [&[0x30, 0x82, 1, 0][..], &[5; 256]].concat();
        let list = certificate_list(OWNER, &der);
        write("PK.cer", &der);
        write("KEK.esl", &list);
        let pem = pem_rfc7468::encode_string("CERTIFICATE", pem_rfc7468::LineEnding::LF, &der).expect("PEM");
        write("db.crt", pem.as_bytes());
        write("dbx.esl", b"nonsense");
        write("empty.esl", b"");
        for name in ["PK", "KEK", "db"] {
            assert_eq!(key(folder.path(), name).expect(name), Some(list.clone()), "{name}");
        }
        for name in ["dbx", "empty"] {
            assert!(matches!(key(folder.path(), name), Err(FirmwareError::NotAKey(_))), "{name}");
        }
        assert!(matches!(key(folder.path(), "other"), Ok(None)));
    }
}
