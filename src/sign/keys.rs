//! Opens a set of keys and refuses what is not safe to sign with: loose modes, keys that do not belong together, one
//! in the place of another, certificates that are not valid now.

use std::io;
use std::path::Path;
use std::time::Duration;

use der::zeroize::Zeroizing;
use kiln_artifact::uefi::auth::{self, AuthError, Variable};
use kiln_artifact::uefi::esl::{self, EslError};
use kiln_artifact::uefi::{CertificateError, Signer};
use p256::elliptic_curve::sec1::ToSec1Point as _;
use rsa::pkcs1v15::SigningKey;
use rsa::pkcs8::{DecodePrivateKey as _, DecodePublicKey as _};
use rsa::signature::{SignatureEncoding as _, Signer as _};
use sha2::Sha256;

use super::KEYS;
use super::folder::{Folder, FolderError};
use super::make;
use super::private::{self, Privates};

/// No key, certificate or enrolment file is nearly as long.
const FILE_BYTES_MAX: u64 = 64 << 10;
const ROOT: &str = "root.pem";
const AUTHORIZED: &str = "authorized_keys";
/// From when on it is said that a certificate will expire.
const WARNING: Duration = Duration::from_secs(90 * 24 * 3600);
/// What goes to those who enrol the keys.
const PUBLIC: [&str; 10] =
    ["PK.auth", "PK.crt", "PK.cer", "KEK.auth", "KEK.crt", "KEK.cer", "db.auth", "db.crt", "db.cer", ROOT];

/// Why keys are not used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// No keys.
    #[error("there are no keys in `{0}`")]
    None(String),
    /// A file or folder, or who may read it.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// A certificate that is none.
    #[error("`{file}` cannot be used")]
    Certificate {
        /// The file.
        file: String,
        /// Why not.
        #[source]
        source: CertificateError,
    },
    /// A private key that is none.
    #[error("`{0}` is no RSA key in PEM (PKCS #8, without a passphrase)")]
    Key(String),
    /// A private key of another certificate.
    #[error("`{key}` is not the key of `{certificate}`: they do not belong together")]
    Apart {
        /// The key.
        key: String,
        /// The certificate.
        certificate: String,
    },
    /// A certificate in another form that is not the same.
    #[error("`{file}` is not `{certificate}` in another form: they do not belong together")]
    Form {
        /// The file.
        file: String,
        /// The certificate.
        certificate: String,
    },
    /// A list under another owner than that of its enrolment file.
    #[error(
        "`{list}` is not the list in `{enrolment}`, but for its certificate: they do not belong together"
    )]
    Owner {
        /// The list.
        list: String,
        /// The enrolment file.
        enrolment: String,
    },
    /// The mesh's root.
    #[error("`{0}` is no public P-256 key in PEM")]
    Root(&'static str),
    /// Who may log in.
    #[error("`{AUTHORIZED}` does not have the key of `{ROOT}`: they do not belong together")]
    Login,
    /// The same certificate in two places.
    #[error("{first} and {second} have the same key: whoever signs images could replace the owner's keys")]
    Same {
        /// One place.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// An enrolment file that firmware would not take, or that enrols something else.
    #[error("`{file}` does not enrol `{certificate}`")]
    Enrolment {
        /// The file.
        file: String,
        /// What it should enrol.
        certificate: String,
        /// Why not.
        #[source]
        source: Option<EnrolmentError>,
    },
    /// A certificate before or after its time.
    #[error("the certificate `{file}` {fault}")]
    Time {
        /// The file.
        file: String,
        /// What is wrong.
        fault: String,
    },
    /// A private key where everybody would read it.
    #[error("`{0}` has a private key in it, and would be published")]
    Published(String),
    /// The library refuses to sign.
    #[error("cannot sign with `{0}`")]
    Sign(String, #[source] rsa::signature::Error),
}

/// What is wrong with an enrolment file.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// Its signature.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// Its list.
    #[error(transparent)]
    List(#[from] EslError),
}

impl KeyError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::None(_) => Some("`kiln sign --init` makes them".to_owned()),
            Self::Folder(error) => error.hint(),
            Self::Time { .. } => {
                Some("make new keys (`kiln sign --init` with another SECRETS) and enrol them".to_owned())
            }
            Self::Published(file) => Some(format!("leave only what is public in `{file}`")),
            Self::Apart { .. } | Self::Form { .. } | Self::Owner { .. } | Self::Enrolment { .. } => {
                Some("take all files of one set".to_owned())
            }
            Self::Login => Some("take both of one set; the keys of others may stand beside it".to_owned()),
            _ => None,
        }
    }
}

/// A set that was found to be in order, as far as it is there: where images are signed, only db's key is needed.
#[derive(Debug)]
pub struct Keys {
    db: Signer,
    /// What is said of keys that are in order and will not be for long.
    pub warnings: Vec<String>,
    folder: Folder,
    privates: Privates,
}

impl Keys {
    /// Opens the set below `secrets`, at the time `now` since the epoch.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn open(secrets: &Path, now: Duration) -> Result<Self, KeyError> {
        let outer = match Folder::open(secrets) {
            Err(FolderError::System { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(KeyError::None(secrets.join(KEYS).display().to_string()));
            }
            outer => outer?,
        };
        outer.check_private()?;
        if !outer.has(KEYS) {
            return Err(KeyError::None(secrets.join(KEYS).display().to_string()));
        }
        let folder = outer.folder(Path::new(KEYS))?;
        folder.check_private()?;
        let signer = |name: &str| -> Result<Signer, KeyError> {
            let file = format!("{name}.crt");
            let bytes = read(&folder, &file)?;
            Signer::from_pem(&bytes).map_err(|source| KeyError::Certificate { file, source })
        };
        let signers = [("PK", signer("PK")?), ("KEK", signer("KEK")?), ("db", signer("db")?)];
        let mut warnings = Vec::new();
        let mut privates = Privates::default();
        for (index, (name, signer)) in signers.iter().enumerate() {
            warnings.extend(check_time(name, signer, now)?);
            let same = |(_, other): &&(&str, Signer)| other.key() == signer.key();
            if let Some((first, _)) = signers[..index].iter().find(same) {
                return Err(KeyError::Same { first, second: name });
            }
            let file = format!("{name}.key");
            if folder.has(&file) {
                private(&folder, &file, signer)?;
            }
            let public = signer.certificate().tbs_certificate().subject_public_key_info();
            privates.public(&file, public.subject_public_key.raw_bytes());
        }
        let [(_, pk), (_, kek), (_, db)] = signers;
        for (variable, enrolled, by) in
            [(Variable::Pk, &pk, &pk), (Variable::Kek, &kek, &pk), (Variable::Db, &db, &kek)]
        {
            let list = check_enrolment(&folder, variable, enrolled, by)?;
            check_forms(&folder, variable.name(), enrolled, &list)?;
        }
        if folder.has("root.key") {
            folder.check_secret(Path::new("root.key"))?;
        }
        for name in folder.names()?.iter().filter_map(|name| std::str::from_utf8(name).ok()) {
            if name.ends_with(".key") {
                let bytes = Zeroizing::new(folder.read(Path::new(name), FILE_BYTES_MAX)?);
                privates.secret(name, &bytes);
            }
        }
        if folder.has(ROOT) {
            privates.public("root.key", check_root(&folder)?.to_sec1_point(false).as_bytes());
        }
        Ok(Self { db, warnings, folder, privates })
    }

    /// Who signs images.
    pub fn db(&self) -> &Signer {
        &self.db
    }

    /// Signs `message` with db's key, which is in memory no longer than that takes.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        const DB: &str = "db.key";
        let key = private(&self.folder, DB, &self.db)?;
        // The library blinds with random numbers of the system's, which the signature does not show.
        key.try_sign(message)
            .map(|signature| signature.to_vec())
            .map_err(|error| KeyError::Sign(DB.to_owned(), error))
    }

    /// The files that whoever enrols the keys needs, and the public half of the mesh's root: name and content.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn public(&self) -> Result<Vec<(&'static str, Vec<u8>)>, KeyError> {
        PUBLIC.into_iter().map(|name| Ok((name, self.publish(name)?))).collect()
    }

    /// What an initrd has of the set: who may log in, and the public half of the mesh's root.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn local(&self) -> Result<[(&'static str, Vec<u8>); 2], KeyError> {
        Ok([(AUTHORIZED, self.publish(AUTHORIZED)?), (ROOT, self.publish(ROOT)?)])
    }

    /// The name of a private key of the set that is in `bytes`.
    pub fn find_private(&self, bytes: &[u8]) -> Option<&str> {
        self.privates.find(bytes)
    }

    fn publish(&self, name: &str) -> Result<Vec<u8>, KeyError> {
        let bytes = read(&self.folder, name)?;
        if private::has_private_key(&bytes) || self.privates.find(&bytes).is_some() {
            return Err(KeyError::Published(name.to_owned()));
        }
        Ok(bytes)
    }
}

/// The file `name`, which none but its owner may write.
fn read(folder: &Folder, name: &str) -> Result<Vec<u8>, KeyError> {
    Ok(folder.read_guarded(Path::new(name), FILE_BYTES_MAX)?)
}

/// Checks that the other forms of the certificate `name`, as far as there are some, are `signer`'s, and the list that which its
/// enrolment file has: firmware measures who the owner in it is (PCR 7), so that it matters by which of them it was enrolled.
fn check_forms(folder: &Folder, name: &str, signer: &Signer, enrolled: &[u8]) -> Result<(), KeyError> {
    let (cer, esl) = (format!("{name}.cer"), format!("{name}.esl"));
    let other = |file: &str| KeyError::Form { file: file.to_owned(), certificate: format!("{name}.crt") };
    if folder.has(&cer) && read(folder, &cer)? != signer.der() {
        return Err(other(&cer));
    }
    if folder.has(&esl) {
        let list = read(folder, &esl)?;
        if !has_alone(&list, signer).unwrap_or(false) {
            return Err(other(&esl));
        }
        if list != enrolled {
            return Err(KeyError::Owner { list: esl, enrolment: format!("{name}.auth") });
        }
    }
    Ok(())
}

/// Whether a signature list has the certificate of `signer` and no other.
fn has_alone(list: &[u8], signer: &Signer) -> Result<bool, EslError> {
    Ok(matches!(esl::read(list)?[..], [(_, der)] if der == signer.der()))
}

/// The public half of the mesh's root, which its key and who may log in belong to, where they are there.
fn check_root(folder: &Folder) -> Result<p256::PublicKey, KeyError> {
    const KEY: &str = "root.key";
    let text = read(folder, ROOT)?;
    let public =
        std::str::from_utf8(&text).ok().and_then(|text| p256::PublicKey::from_public_key_pem(text).ok());
    let public = public.ok_or(KeyError::Root(ROOT))?;
    if folder.has(KEY) {
        let text = Zeroizing::new(folder.read(Path::new(KEY), FILE_BYTES_MAX)?);
        // Keys in other formats than kiln makes are not read: nothing is signed with this one here.
        let key = std::str::from_utf8(&text).ok().and_then(|text| p256::SecretKey::from_pkcs8_pem(text).ok());
        if key.is_some_and(|key| key.public_key() != public) {
            return Err(KeyError::Apart { key: KEY.to_owned(), certificate: ROOT.to_owned() });
        }
    }
    if folder.has(AUTHORIZED) {
        let text = String::from_utf8_lossy(&read(folder, AUTHORIZED)?).into_owned();
        let wanted = make::ssh_key(&public);
        // Options may stand before it, a name behind it.
        let names = |line: &str| !line.trim_start().starts_with('#') && line.contains(&wanted);
        if !text.lines().any(names) {
            return Err(KeyError::Login);
        }
    }
    Ok(public)
}

/// The private key in `file`, which must be `signer`'s and readable to nobody else.
fn private(folder: &Folder, file: &str, signer: &Signer) -> Result<SigningKey<Sha256>, KeyError> {
    folder.check_secret(Path::new(file))?;
    let text = Zeroizing::new(folder.read(Path::new(file), FILE_BYTES_MAX)?);
    let key = std::str::from_utf8(&text).ok().and_then(|text| rsa::PrivateKey::from_pkcs8_pem(text).ok());
    let key = key.ok_or_else(|| KeyError::Key(file.to_owned()))?;
    if key.as_public_key() != signer.key() {
        let certificate = file.replace(".key", ".crt");
        return Err(KeyError::Apart { key: file.to_owned(), certificate });
    }
    Ok(SigningKey::new(key))
}

fn check_time(name: &str, signer: &Signer, now: Duration) -> Result<Option<String>, KeyError> {
    let validity = signer.certificate().tbs_certificate().validity();
    let (begin, end) = (validity.not_before.to_unix_duration(), validity.not_after.to_unix_duration());
    let file = format!("{name}.crt");
    if now < begin {
        let fault =
            format!("is valid from {} on, which is later than this host's clock", validity.not_before);
        return Err(KeyError::Time { file, fault });
    }
    if now > end {
        return Err(KeyError::Time { file, fault: format!("expired at {}", validity.not_after) });
    }
    let left = end - now;
    let days = left.as_secs() / (24 * 3600);
    Ok((left < WARNING)
        .then(|| format!("the certificate `{file}` expires in {days} days, at {}", validity.not_after)))
}

/// Checks that the enrolment file of `variable` has `enrolled` alone and is signed `by` the one above it, and returns the list
/// that it has.
fn check_enrolment(
    folder: &Folder,
    variable: Variable,
    enrolled: &Signer,
    by: &Signer,
) -> Result<Vec<u8>, KeyError> {
    let file = format!("{}.auth", variable.name());
    let bytes = folder.read(Path::new(&file), FILE_BYTES_MAX)?;
    let check = || -> Result<Option<&[u8]>, EnrolmentError> {
        let list = auth::verify(variable, &bytes, by)?;
        Ok(has_alone(list, enrolled)?.then_some(list))
    };
    let source = match check() {
        Ok(Some(list)) => return Ok(list.to_vec()),
        Ok(None) => None,
        Err(error) => Some(error),
    };
    Err(KeyError::Enrolment { file, certificate: format!("{}.crt", variable.name()), source })
}
