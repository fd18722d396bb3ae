//! Makes a set of keys: PK, KEK and db for firmware, and the mesh's root; with what enrols and publishes them.
//!
//! Private keys are PKCS #8 in PEM, which other tools sign with too. The set appears whole or not at all: it is made in a
//! folder of its own that is renamed last.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr as _;
use std::time::Duration;

use base64ct::{Base64, Encoding as _};
use der::pem::LineEnding;
use der::{Encode as _, EncodePem as _};
use getrandom::SysRng;
use kiln_artifact::uefi::auth::{AuthError, Request, Time as FirmwareTime, Variable};
use kiln_artifact::uefi::esl::{self, EslError, Guid};
use kiln_artifact::uefi::{CertificateError, Signer};
use kiln_digest::Digest;
use p256::elliptic_curve::Generate as _;
use p256::elliptic_curve::sec1::ToSec1Point as _;
use rsa::pkcs1v15::SigningKey;
use rsa::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _};
use rsa::signature::{Keypair as _, SignatureEncoding as _, Signer as _};
use sha2::Sha256;
use x509_cert::Certificate;
use x509_cert::TbsCertificate;
use x509_cert::builder::profile::BuilderProfile;
use x509_cert::builder::{Builder as _, CertificateBuilder};
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage, KeyUsages, SubjectKeyIdentifier};
use x509_cert::ext::{Extension, ToExtension as _};
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::spki::SubjectPublicKeyInfoRef;
use x509_cert::time::{Time, Validity};

use super::KEYS;
use super::folder::{Folder, FolderError, rename_to_new};

/// What all firmware takes; some of it nothing longer.
const RSA_BITS: usize = 2048;
/// Ten years: firmware does not look, but tools that verify do.
const VALIDITY: Duration = Duration::from_secs(3650 * 24 * 3600);

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// Keys or a part of them are there.
    #[error("`{0}` is there already")]
    There(PathBuf),
    /// A file or folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// Writing.
    #[error("cannot write `{path}`")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A domain that is no name.
    #[error("`{0}` is no domain: letters, digits, dots and hyphens")]
    Domain(String),
    /// The system has no random numbers, or a library refuses its own work.
    #[error("cannot make a {what}")]
    Crypto {
        /// What was to be made.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A certificate that cannot be read again.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// A signature list that cannot be written.
    #[error(transparent)]
    List(#[from] EslError),
    /// An enrolment file that cannot be written.
    #[error(transparent)]
    Auth(#[from] AuthError),
}

impl MakeError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::There(path) => {
                Some(format!("keys are never overwritten: move {} away first", path.display()))
            }
            Self::Folder(error) => error.hint(),
            _ => None,
        }
    }
}

fn crypto<E: std::error::Error + Send + Sync + 'static>(what: &'static str) -> impl Fn(E) -> MakeError {
    move |source| MakeError::Crypto { what, source: Box::new(source) }
}

/// A key for firmware, with its certificate.
struct Made {
    key: SigningKey<Sha256>,
    signer: Signer,
}

/// Makes the keys of `domain` below `secrets`, valid from `now` (since the epoch), and returns their folder.
///
/// # Errors
/// [`MakeError`]; nothing is left then.
pub fn make(secrets: &Path, domain: &str, now: Duration) -> Result<PathBuf, MakeError> {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
    if domain.is_empty() || domain.len() > 48 || !domain.chars().all(known) {
        return Err(MakeError::Domain(domain.to_owned()));
    }
    let place = secrets.join(KEYS);
    if fs::symlink_metadata(&place).is_ok() {
        return Err(MakeError::There(place));
    }
    let write = |path: &Path| {
        let path = path.to_owned();
        move |source| MakeError::Write { path, source }
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(secrets).map_err(write(secrets))?;
    Folder::open(secrets)?.check_private()?;
    let unfinished =
        tempfile::Builder::new().prefix(".uefi-keys-").tempdir_in(secrets).map_err(write(secrets))?;
    for (name, bytes, mode) in files(domain, now)? {
        let path = unfinished.path().join(name);
        let mut options = fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(mode).open(&path);
        let written =
            file.and_then(|mut file| io::Write::write_all(&mut file, &bytes).and_then(|()| file.sync_all()));
        written.map_err(write(&path))?;
    }
    let folder = fs::File::open(unfinished.path()).and_then(|folder| folder.sync_all());
    folder.map_err(write(unfinished.path()))?;
    // A plain rename would replace an empty folder that somebody made meanwhile.
    match rename_to_new(rustix::fs::CWD, unfinished.path(), &place) {
        Ok(()) => {}
        Err(rustix::io::Errno::EXIST) => return Err(MakeError::There(place)),
        Err(errno) => return Err(write(&place)(errno.into())),
    }
    // It has another name now, and is not to be removed.
    let _ = unfinished.keep();
    fs::File::open(secrets).and_then(|secrets| secrets.sync_all()).map_err(write(secrets))?;
    Ok(place)
}

/// Whether there is nothing at `secrets`, or an empty folder.
pub fn is_blank(secrets: &Path) -> bool {
    match Folder::open(secrets) {
        Ok(folder) => folder.is_empty().unwrap_or(false),
        Err(_) => fs::symlink_metadata(secrets).is_err(),
    }
}

type File = (String, Vec<u8>, u32);

/// The files of a set: name, content and mode.
fn files(domain: &str, now: Duration) -> Result<Vec<File>, MakeError> {
    const SECRET: u32 = 0o600;
    const PUBLIC: u32 = 0o644;
    let mut files: Vec<File> = Vec::new();
    let (pk, kek, db) =
        (firmware(domain, "PK", now)?, firmware(domain, "KEK", now)?, firmware(domain, "db", now)?);
    let owner = owner(&pk.signer);
    let time = firmware_time(&pk.signer);
    // Each by the one above it: PK by itself.
    for (made, variable, by) in
        [(&pk, Variable::Pk, &pk), (&kek, Variable::Kek, &pk), (&db, Variable::Db, &kek)]
    {
        let name = variable.name();
        let key = made.key.to_pkcs8_pem(LineEnding::LF).map_err(crypto("private key"))?;
        let certificate = made.signer.certificate().to_pem(LineEnding::LF).map_err(crypto("certificate"))?;
        let list = esl::write(&owner, made.signer.der())?;
        let request = Request::new(variable, time, &list);
        let signature = by.key.try_sign(request.to_be_signed()).map_err(crypto("signature"))?;
        let auth = request.attach(&by.signer, &signature.to_vec())?;
        files.push((format!("{name}.key"), key.as_bytes().to_vec(), SECRET));
        files.push((format!("{name}.crt"), certificate.into_bytes(), PUBLIC));
        files.push((format!("{name}.cer"), made.signer.der().to_vec(), PUBLIC));
        files.push((format!("{name}.esl"), list, PUBLIC));
        files.push((format!("{name}.auth"), auth, PUBLIC));
    }
    let root = p256::SecretKey::try_generate_from_rng(&mut SysRng).map_err(crypto("P-256 key"))?;
    let key = root.to_pkcs8_pem(LineEnding::LF).map_err(crypto("private key"))?;
    let public = root.public_key().to_public_key_pem(LineEnding::LF).map_err(crypto("public key"))?;
    files.push(("root.key".to_owned(), key.as_bytes().to_vec(), SECRET));
    files.push(("root.pem".to_owned(), public.into_bytes(), PUBLIC));
    files.push(("authorized_keys".to_owned(), authorized_key(&root.public_key(), domain), PUBLIC));
    Ok(files)
}

/// An RSA key and a certificate that it signs itself.
fn firmware(domain: &str, role: &'static str, now: Duration) -> Result<Made, MakeError> {
    let key = rsa::PrivateKey::new(&mut SysRng, RSA_BITS).map_err(crypto("RSA key"))?;
    let key = SigningKey::<Sha256>::new(key);
    let certificate =
        certificate(&key, &format!("CN={domain} ({role})"), now).map_err(crypto("certificate"))?;
    let der = certificate.to_der().map_err(crypto("certificate"))?;
    Ok(Made { key, signer: Signer::from_der(&der)? })
}

/// What [`crypto`] takes.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BuildError(String);

fn certificate(key: &SigningKey<Sha256>, name: &str, now: Duration) -> Result<Certificate, BuildError> {
    let text = |error: &dyn std::fmt::Display| BuildError(error.to_string());
    let mut serial = [0; 16];
    getrandom::fill(&mut serial).map_err(|error| text(&error))?;
    // A number that is positive, and 16 bytes long.
    serial[0] = serial[0] & 0x7f | 0x40;
    let at =
        |time: Duration| der::DateTime::from_unix_duration(time).map(|time| Time::GeneralTime(time.into()));
    let now = Duration::from_secs(now.as_secs());
    let not_before = at(now).map_err(|error| text(&error))?;
    let not_after = at(now + VALIDITY).map_err(|error| text(&error))?;
    let name = Name::from_str(name).map_err(|error| text(&error))?;
    let public = key.verifying_key().to_public_key_der().map_err(|error| text(&error))?;
    let public = der::Decode::from_der(public.as_bytes()).map_err(|error: der::Error| text(&error))?;
    let serial = SerialNumber::new(&serial).map_err(|error| text(&error))?;
    let validity = Validity::new(not_before, not_after);
    let builder = CertificateBuilder::new(OwnAuthority(name), serial, validity, public);
    let builder = builder.map_err(|error| text(&error))?;
    builder.build::<_, rsa::pkcs1v15::Signature>(key).map_err(|error| text(&error))
}

/// A certificate that vouches for itself, and may sign code and others.
struct OwnAuthority(Name);

impl BuilderProfile for OwnAuthority {
    fn get_issuer(&self, subject: &Name) -> Name {
        subject.clone()
    }

    fn get_subject(&self) -> Name {
        self.0.clone()
    }

    fn build_extensions(
        &self,
        key: SubjectPublicKeyInfoRef<'_>,
        _issuer_key: SubjectPublicKeyInfoRef<'_>,
        tbs: &TbsCertificate,
    ) -> x509_cert::builder::Result<Vec<Extension>> {
        let usage = KeyUsage(KeyUsages::DigitalSignature | KeyUsages::KeyCertSign);
        let constraints = BasicConstraints { ca: true, path_len_constraint: None };
        let mut extensions = vec![SubjectKeyIdentifier::try_from(key)?.to_extension(tbs.subject(), &[])?];
        extensions.push(constraints.to_extension(tbs.subject(), &extensions)?);
        extensions.push(usage.to_extension(tbs.subject(), &extensions)?);
        Ok(extensions)
    }
}

/// Who answers for the certificates, for firmware: a GUID that follows from PK's, so that all three have the same and it
/// need not be kept.
fn owner(pk: &Signer) -> Guid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&Digest::of(pk.der()).as_bytes()[..16]);
    // RFC 9562 §5.8: version 8, made as its maker likes. In memory the version is in the eighth byte.
    bytes[7] = bytes[7] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Guid::from_bytes(bytes)
}

/// The time of the enrolment files: that at which the keys began, so that a later set replaces an earlier.
fn firmware_time(pk: &Signer) -> FirmwareTime {
    let time = pk.certificate().tbs_certificate().validity().not_before.to_date_time();
    FirmwareTime {
        year: time.year(),
        month: time.month(),
        day: time.day(),
        hour: time.hour(),
        minute: time.minutes(),
        second: time.seconds(),
    }
}

/// The line of `authorized_keys`.
fn authorized_key(key: &p256::PublicKey, domain: &str) -> Vec<u8> {
    format!("{} root@{domain}\n", ssh_key(key)).into_bytes()
}

/// The kind and the key, as lines of `authorized_keys` have them (RFC 5656 §3.1).
pub(super) fn ssh_key(key: &p256::PublicKey) -> String {
    const KIND: &str = "ecdsa-sha2-nistp256";
    let point = key.to_sec1_point(false);
    let mut blob = Vec::new();
    for field in [KIND.as_bytes(), b"nistp256", point.as_bytes()] {
        // None has more than 65 bytes.
        blob.extend([0, 0, 0]);
        blob.extend(u8::try_from(field.len()));
        blob.extend(field);
    }
    format!("{KIND} {}", Base64::encode_string(&blob))
}
