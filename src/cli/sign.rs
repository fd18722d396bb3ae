//! `kiln sign`: makes keys, shows what would be signed, and signs it; here, or with signatures from elsewhere.

use std::iter;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use clap::Args;

use super::show::{line, note};
use super::{FAILED, Failure, USAGE};
use crate::apart::{self, Kept};
use crate::clock;
use crate::settings::Settings;
use crate::sign::images::{Source, Written};
use crate::sign::keys::{KeyError, Keys};
use crate::sign::local::{Local, LocalError, Origin};
use crate::sign::make::{self, MakeError};
use crate::sign::work::{Roots, Work};
use crate::sign::{SignError, close_process};

/// Arguments of `kiln sign`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kiln sign --init                        make PK, KEK, db and the mesh's root key in SECRETS
  kiln sign -n                            check the parts in WORK, and say what would be signed
  kiln sign                               assemble and sign them
  kiln sign --verify                      hold what was signed against the parts, the keys and the configuration
  kiln sign --host alice                  with what SECRETS/hosts/alice/local has, too
  kiln sign --work /mnt/copy              in a copy of WORK; nothing else of the build is needed
  kiln sign --request out                 write what is to be signed, for keys that are elsewhere
  openssl dgst -sha256 -sign db.key -out out/A.EFI.signature out/A.EFI.to-be-signed
  kiln sign --signatures out              assemble the same images from such signatures

WORK/boot/record.json says what was built; nothing else is signed. Into the initrd's /local go the root hashes of
the images, computed again, root.pem and authorized_keys, then SECRETS/local, then SECRETS/hosts/HOST/local.
At the end comes a list of all that was put out, by digest, length and path: two signings are the same if these are.
No machine, no network, no recipe, no store.")]
pub(super) struct SignArguments {
    /// Make keys, and sign nothing
    #[arg(long)]
    init: bool,
    /// Whose keys they are, in the certificates' names
    #[arg(long, value_name = "DOMAIN", default_value = "mesh.internal", requires = "init")]
    domain: String,
    /// Check everything, say what would be signed, and sign nothing
    #[arg(long, short = 'n', conflicts_with = "init")]
    dry_run: bool,
    /// Verify what was signed: the signatures, and that it is what would be signed now
    #[arg(long, conflicts_with_all = ["init", "dry_run", "request", "signatures"])]
    verify: bool,
    /// Where the images and their record are [env: WORK]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Add the configuration of this host to the initrd, over that of all hosts
    #[arg(long, value_name = "HOST", conflicts_with = "init")]
    host: Option<String>,
    /// Take configuration from DIR/local and DIR/hosts, not from SECRETS
    #[arg(long, value_name = "DIR", conflicts_with = "init")]
    config: Option<PathBuf>,
    /// Write what is to be signed into this folder, as NAME.to-be-signed; only the public half of db is needed
    #[arg(long, value_name = "DIR", conflicts_with_all = ["init", "dry_run", "signatures"])]
    request: Option<PathBuf>,
    /// Take signatures from this folder, as NAME.signature (RSASSA-PKCS1-v1_5, SHA-256)
    #[arg(long, value_name = "DIR", conflicts_with_all = ["init", "dry_run"])]
    signatures: Option<PathBuf>,
}

impl From<MakeError> for Failure {
    fn from(error: MakeError) -> Self {
        let code = if matches!(error, MakeError::Domain(_)) { USAGE } else { FAILED };
        let hint = error.hint();
        Self::new(&error, hint, code)
    }
}

impl From<KeyError> for Failure {
    fn from(error: KeyError) -> Self {
        let hint = error.hint();
        Self::new(&error, hint, FAILED)
    }
}

impl From<SignError> for Failure {
    fn from(error: SignError) -> Self {
        let hint = error.hint();
        let code = if matches!(error, SignError::Local(LocalError::Host(_))) { USAGE } else { FAILED };
        Self::new(&error, hint, code)
    }
}

/// Does what `kiln sign` says.
pub(super) fn sign(arguments: &SignArguments, settings: &Settings) -> Result<ExitCode, Failure> {
    close_process();
    let now = clock::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (work, secrets) = (&settings.work.value, &settings.secrets.value);
    if arguments.init {
        return init(arguments, settings, now);
    }
    let work = Work::open(work, secrets, arguments.config.as_deref())?;
    let keys = open_keys(arguments, settings, now)?;
    let read = Local::read(secrets, arguments.config.as_deref(), arguments.host.as_deref(), keys.as_ref());
    let local = read.map_err(SignError::from)?;
    if local.is_host_unknown {
        let host = arguments.host.as_deref().unwrap_or_default();
        note(&format!("nothing is configured for host {host:?}: its image has what all hosts have"));
    }
    let roots = work.verify()?;
    if let Some(keys) = keys.as_ref().filter(|_| arguments.verify) {
        list(&work.verify_signed(&roots, &local, keys)?);
        note(&format!("{} by {}", images("verified", &work), signer(keys)));
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.dry_run {
        work.check(&roots, &local)?;
    }
    show(&work, &roots, &local, arguments.dry_run);
    let Some(keys) = keys.as_ref().filter(|_| !arguments.dry_run) else {
        note("everything is as it was built; nothing was signed");
        return Ok(ExitCode::SUCCESS);
    };
    let by = signer(keys);
    if let Some(folder) = &arguments.request {
        for name in work.request(&roots, &local, keys.db(), folder)? {
            line(&folder.join(name).display().to_string());
        }
        note(&format!("to be signed by {by}; then: kiln sign --signatures {}", folder.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let source = arguments.signatures.as_deref().map_or(Source::Keys, Source::Folder);
    list(&work.sign(&roots, &local, keys, source)?);
    note(&format!("{} by {by}", images("signed", &work)));
    Ok(ExitCode::SUCCESS)
}

/// Whose signatures db's are.
fn signer(keys: &Keys) -> String {
    keys.db().certificate().tbs_certificate().subject().to_string()
}

fn list(files: &[Written]) {
    for file in files {
        line(&format!("{} {:>9} {}", file.sha256, file.size_bytes, file.path));
    }
}

/// What was `done` to how many images.
fn images(done: &str, work: &Work) -> String {
    let count = work.record.kernels.len() + work.record.unified.len();
    format!("{done} {count} image{}", if count == 1 { "" } else { "s" })
}

/// The keys; none where there are none and they are not needed. The first signing makes them.
fn open_keys(arguments: &SignArguments, settings: &Settings, now: Duration) -> Result<Option<Keys>, Failure> {
    let secrets = &settings.secrets.value;
    let keys = match Keys::open(secrets, now) {
        Err(KeyError::None(_)) if arguments.dry_run => {
            note("there are no keys yet: what they give to the initrd is left out here");
            return Ok(None);
        }
        Err(KeyError::None(_))
            if arguments.request.is_none()
                && arguments.signatures.is_none()
                && !arguments.verify
                && make::is_blank(secrets) =>
        {
            note(&format!("SECRETS ({}) is empty: this makes keys first", secrets.display()));
            init(arguments, settings, now)?;
            Keys::open(secrets, now)?
        }
        keys => keys?,
    };
    for warning in &keys.warnings {
        note(&format!("warning: {warning}"));
    }
    Ok(Some(keys))
}

/// What is signed, as what; and of what it is made, where the user wants to know.
fn show(work: &Work, roots: &Roots, local: &Local<'_>, in_full: bool) {
    for kernel in &work.record.kernels {
        let part = |what: &str, file: &str, digest: &dyn std::fmt::Display| {
            line(&format!("  {what:<9} {file} {digest}"));
        };
        let name = format!("kernel {}", kernel.release);
        if in_full {
            line(&name);
            kernel.parts().for_each(|(what, file)| part(what, &file.file, &file.sha256));
            for image in &kernel.verity {
                if let Some(root) = roots.get(image) {
                    part("verity", &image.image, &format!("{root} as /local/{}", image.name));
                }
            }
            for (path, origin) in local.files() {
                let origin = match origin {
                    Origin::Keys => "of the keys",
                    Origin::All => "of all hosts",
                    Origin::Host => "of this host",
                };
                part("local", &format!("/local/{path}"), &origin);
            }
        }
        for place in &kernel.signed {
            line(&format!("{name} -> {place}"));
        }
    }
    for image in &work.record.unified {
        line(&format!("{} -> {}", image.file, image.signed));
    }
}

/// Makes keys where no step sees them, or finds that those that are there are in order.
fn init(arguments: &SignArguments, settings: &Settings, now: Duration) -> Result<ExitCode, Failure> {
    let secrets = &settings.secrets.value;
    let srcdir = settings.srcdir.value.as_ref().map(|srcdir| ("SRCDIR", settings.directory.join(srcdir)));
    for (what, path) in iter::once(("WORK", settings.work.value.clone())).chain(srcdir) {
        apart::refuse_to_make(what, &path, Kept::Secrets, secrets).map_err(SignError::from)?;
    }
    match make::make(secrets, &arguments.domain, now) {
        Ok(place) => note(&format!("made keys in {}: keep a copy, nobody else has them", place.display())),
        Err(MakeError::There(place)) => {
            let keys = Keys::open(secrets, now)?;
            note(&format!("the keys in {} are in order, and stay", place.display()));
            keys.warnings.iter().for_each(|warning| note(&format!("warning: {warning}")));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(ExitCode::SUCCESS)
}
