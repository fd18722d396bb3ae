//! The recipe as a file: where it is found, and its bytes made text. What the text says is the plan's business.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{RECIPE, SettingsError};
use crate::plan::recipe::{Fault, Recipe};

/// Longest recipe that is read: one of 10,000 steps has two mebibytes.
const MOST_BYTES: u64 = 16 << 20;

/// A recipe that was read.
#[derive(Debug, Clone)]
pub struct RecipeFile {
    /// Where it lies.
    pub path: PathBuf,
    /// What errors call it.
    pub name: String,
    /// Its text, with line ends of Unix: a script of lines that end otherwise would hand them to the shell.
    pub text: String,
    /// What it says.
    pub recipe: Arc<Recipe>,
}

/// The nearest thing that has the recipe's name, in `directory` or above.
pub(super) fn find(directory: &Path) -> Option<PathBuf> {
    let mut places = directory.ancestors().map(|folder| folder.join(RECIPE));
    places.find(|path| fs::symlink_metadata(path).is_ok())
}

impl RecipeFile {
    /// Reads the recipe at `path`, which was found from `directory`, and gives its variables the values of `given`.
    pub(super) fn read(path: PathBuf, directory: &Path, given: &[String]) -> Result<Self, SettingsError> {
        let name = path.strip_prefix(directory).unwrap_or(&path).display().to_string();
        let bytes = read(&path)?;
        let fault = |fault| SettingsError::Recipe(Box::new(fault));
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let text = String::from_utf8_lossy(error.as_bytes());
            let wrong = Fault::at(&text, &name, at..at + 1, "this is not UTF-8".to_owned());
            fault(wrong.hint("save the file in the encoding UTF-8"))
        })?;
        let text = if text.contains('\r') { text.replace("\r\n", "\n") } else { text };
        let mut recipe = Recipe::parse(&text, &name).map_err(fault)?;
        set(&mut recipe, given)?;
        Ok(Self { path, name, text, recipe: Arc::new(recipe) })
    }
}

/// Gives variables of `recipe` the values of `given`, each NAME=VALUE.
pub(super) fn set(recipe: &mut Recipe, given: &[String]) -> Result<(), SettingsError> {
    given.iter().try_for_each(|given| {
        recipe.set(given).map_err(|source| SettingsError::Variable { given: given.clone(), source })
    })
}

fn read(path: &Path) -> Result<Vec<u8>, SettingsError> {
    let failed = |source| SettingsError::Read { path: path.to_owned(), source };
    let what = match fs::metadata(path) {
        Ok(meta) if meta.is_file() => None,
        Ok(meta) if meta.is_dir() => Some("a directory"),
        Ok(_) => Some("no file"),
        // A link that leads to nothing, or to itself.
        Err(_) if path.is_symlink() => Some("a link to no file"),
        Err(error) => return Err(failed(error)),
    };
    if let Some(what) = what {
        return Err(SettingsError::NoFile { path: path.to_owned(), what });
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(SettingsError::TooLong { path: path.to_owned(), limit_bytes: MOST_BYTES });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_has_the_line_ends_of_unix_whatever_the_file_has() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(RECIPE);
        let lines = "[steps.a]\nrun = \"\"\"\necho a\necho \\r\n\"\"\"\n";
        let read = |text: &str| {
            fs::write(&path, text).expect("room");
            RecipeFile::read(path.clone(), folder.path(), &[]).expect("a good recipe").text
        };
        assert_eq!(read(&lines.replace('\n', "\r\n")), read(lines));
    }
}
