//! `kiln init` and `kiln recipe`: a recipe to begin with, the schema that editors use, and a look whether one is good.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::show::{line, note};
use super::{FAILED, Failure, USAGE};
use crate::plan::Plan;
use crate::plan::recipe::{Fault, Recipe, TEMPLATE};
use crate::settings::{Flags, RECIPE, RecipeFile, Settings};

/// Arguments of `kiln init`.
#[derive(Debug, Args)]
pub(super) struct InitArguments {
    /// The folder [default: this one]
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// Arguments of `kiln recipe`.
#[derive(Debug, Args)]
pub(super) struct RecipeArguments {
    #[command(subcommand)]
    verb: RecipeVerb,
}

#[derive(Debug, Subcommand)]
enum RecipeVerb {
    /// Print the JSON schema of kiln.toml
    Schema,
    /// Say whether the recipe is good, and name its steps in an order in which they can run
    Check,
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        let hint = fault.hint.clone();
        Self::new(&fault, hint, USAGE)
    }
}

/// The recipe of this folder or of one above.
pub(super) fn found(settings: &Settings) -> Result<&RecipeFile, Failure> {
    settings.recipe.as_ref().ok_or_else(|| Failure {
        text: format!("there is no {RECIPE} here or in a folder above"),
        hint: Some("`kiln init` writes one".to_owned()),
        code: USAGE,
    })
}

/// The plan of a recipe.
pub(super) fn plan(file: &RecipeFile) -> Result<Plan, Failure> {
    Ok(Plan::of(&file.recipe, &file.text, &file.name)?)
}

/// Writes a recipe where there is none.
pub(super) fn init(arguments: &InitArguments) -> Result<ExitCode, Failure> {
    let folder = arguments.directory.as_deref().unwrap_or(Path::new("."));
    let path = folder.join(RECIPE);
    let name = folder
        .canonicalize()
        .ok()
        .and_then(|folder| Some(folder.file_name()?.to_string_lossy().into_owned()));
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let mut name: String =
        name.unwrap_or_default().chars().map(|c| if good(c) { c } else { '-' }).take(64).collect();
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        "project".clone_into(&mut name);
    }
    let text = TEMPLATE.replace("\"PROJECT\"", &format!("\"{name}\""));
    write_new(folder, &path, text.as_bytes()).map_err(|error| Failure {
        text: format!("cannot write `{}`: {error}", path.display()),
        hint: None,
        code: FAILED,
    })?;
    note(&format!("wrote {}: `kiln build` builds it", path.display()));
    Ok(ExitCode::SUCCESS)
}

/// Writes a file where there is none: whole or not at all.
fn write_new(folder: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mode = Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new().permissions(mode).tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.persist_noclobber(path).map_err(|error| error.error)?;
    Ok(())
}

/// `kiln recipe`.
pub(super) fn recipe(arguments: &RecipeArguments, flags: Flags) -> Result<ExitCode, Failure> {
    match arguments.verb {
        RecipeVerb::Schema => {
            let text = serde_json::to_string_pretty(&Recipe::schema());
            line(&text.map_err(|error| Failure::new(&error, None, FAILED))?);
        }
        RecipeVerb::Check => {
            let settings = Settings::read(flags)?;
            for step in &plan(found(&settings)?)?.steps {
                line(&step.name);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
