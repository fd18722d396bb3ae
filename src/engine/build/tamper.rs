//! Changes to a copy of an image before it is booted, so that a boot shows who finds them.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use kiln_artifact::uefi::authenticode::{self, Others, Request, SignatureError};
use kiln_artifact::uefi::pe::{Image, PeError};

use crate::plan::boot::Alteration;
use crate::sign::keys::{KeyError, Keys};
use crate::sign::make;

/// Whose key no firmware knows.
const STRANGER: &str = "stranger.invalid";

/// Why a file is not changed.
#[derive(Debug, thiserror::Error)]
pub enum TamperError {
    /// It, or its copy.
    #[error("cannot {what} `{}`", .path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// It is no PE image.
    #[error("it is no EFI program")]
    Image(#[from] PeError),
    /// It has no such section.
    #[error("it has no section `{0}`")]
    Section(String),
    /// It ends before.
    #[error("it has {length} bytes{}, and none at {at}", section.as_ref().map(|name| format!(" in `{name}`")).unwrap_or_default())]
    Short {
        /// In what.
        section: Option<String>,
        /// How many it has.
        length: u64,
        /// Which was asked for.
        at: u64,
    },
    /// It has no signature, so that it would stay as it is.
    #[error("nobody has signed it")]
    NotSigned,
    /// Signatures.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// The stranger has no key.
    #[error(transparent)]
    Make(#[from] make::MakeError),
    /// The stranger's key.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Changes the file at `path` as `what` says. `copied` is the file whose content it gets, where it gets another's. A
/// stranger's keys are in `scratch` meanwhile.
///
/// # Errors
/// [`TamperError`].
pub(super) fn change(
    path: &Path,
    what: &Alteration,
    copied: Option<&Path>,
    scratch: &Path,
) -> Result<(), TamperError> {
    let error = |what| {
        let path = path.to_owned();
        move |source| TamperError::Io { what, path, source }
    };
    fs::set_permissions(path, Permissions::from_mode(0o644)).map_err(error("change"))?;
    let read = || fs::read(path).map_err(error("read"));
    let written = match what {
        Alteration::Flip { section, at } => return flip(path, section.as_deref(), *at),
        Alteration::Text(text) => text.clone().into_bytes(),
        Alteration::Copy(_) => {
            let Some(from) = copied else { return Ok(()) };
            return fs::copy(from, path).map(drop).map_err(error("copy into"));
        }
        Alteration::Unsigned => unsigned(&read()?)?,
        Alteration::Stranger => signed_by_stranger(&unsigned(&read()?)?, scratch)?,
    };
    fs::write(path, written).map_err(error("write"))
}

/// Inverts the lowest bit of one byte.
fn flip(path: &Path, section: Option<&str>, at: u64) -> Result<(), TamperError> {
    let error = |source| TamperError::Io { what: "change", path: path.to_owned(), source };
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(error)?;
    let (start, length) = match section {
        None => (0, file.metadata().map_err(error)?.len()),
        Some(name) => {
            let bytes = fs::read(path).map_err(error)?;
            let image = Image::parse(&bytes)?;
            let found = image.sections().iter().find(|section| section.name == name);
            let found = found.ok_or_else(|| TamperError::Section(name.to_owned()))?;
            let bytes = |count| u64::try_from(count).unwrap_or(u64::MAX);
            let in_use = u64::from(found.virtual_size_bytes).min(bytes(found.file.len()));
            (bytes(found.file.start), in_use)
        }
    };
    if at >= length {
        return Err(TamperError::Short { section: section.map(ToOwned::to_owned), length, at });
    }
    invert(&file, start + at).map_err(error)
}

fn invert(file: &File, at: u64) -> io::Result<()> {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1], at)
}

/// The image without its signatures.
fn unsigned(bytes: &[u8]) -> Result<Vec<u8>, TamperError> {
    let image = Image::parse(bytes)?;
    match image.certificates().is_empty() {
        true => Err(TamperError::NotSigned),
        false => Ok(authenticode::detach(&image)?),
    }
}

fn signed_by_stranger(bytes: &[u8], scratch: &Path) -> Result<Vec<u8>, TamperError> {
    let folder = tempfile::tempdir_in(scratch).map_err(|source| TamperError::Io {
        what: "make a folder in",
        path: scratch.to_owned(),
        source,
    })?;
    let now = crate::clock::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    make::make(folder.path(), STRANGER, now)?;
    let keys = Keys::open(folder.path(), now)?;
    let image = Image::parse(bytes)?;
    let request = Request::new(&image, keys.db())?;
    let signature = keys.sign(request.to_be_signed())?;
    Ok(request.attach(&signature, Others::Replace)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_file(folder: &Path) -> PathBuf {
        let path = folder.join("hash");
        fs::write(&path, "abc").expect("room");
        path
    }

    #[test]
    fn one_bit_is_another_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = text_file(folder.path());
        let flip = |at| Alteration::Flip { section: None, at };
        change(&path, &flip(1), None, folder.path()).expect("it has three bytes");
        assert_eq!(fs::read(&path).expect("written"), b"acc");
        let short = change(&path, &flip(3), None, folder.path()).expect_err("it has three bytes");
        assert_eq!(short.to_string(), "it has 3 bytes, and none at 3");
    }

    #[test]
    fn what_would_change_nothing_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = text_file(folder.path());
        let section = Alteration::Flip { section: Some(".cmdline".to_owned()), at: 0 };
        for what in [section, Alteration::Unsigned, Alteration::Stranger] {
            let error = change(&path, &what, None, folder.path()).expect_err("it is no program");
            assert!(matches!(error, TamperError::Image(_)), "{error}");
        }
        assert_eq!(fs::read(&path).expect("there"), b"abc");
    }
}
