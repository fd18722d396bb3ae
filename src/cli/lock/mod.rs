//! `kiln lock`: what is locked, what would change, and the bytes to take along.

mod changes;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use schemars::JsonSchema;
use serde::Serialize;

use super::show::{Narrator, line, note};
use super::{FAILED, Failure, USAGE, recipe};
use crate::engine::Host;
use crate::engine::lock::{self, Named, RelockError};
use crate::plan::{Plan, harmless, show_bytes};
use crate::settings::{Flags, Settings};
use changes::print;

/// Arguments of `kiln lock`.
#[derive(Debug, Args)]
#[command(after_help = "\
The lock file, kiln.lock, names every byte that came from outside by its digest. A build locks what is not locked yet and
changes nothing else in it. NAME is a root or source as the recipe calls it, what `kiln lock show` shows of an entry,
`kernel`, `toolbox`, or a root such as debian:bookworm+gcc.

Examples:
  kiln lock update -n                   what newer packages there are
  kiln lock update base                 take those of one root
  kiln lock vendor third-party.tar      all the bytes the lock names, in one file
  kiln build --offline --vendor third-party.tar")]
pub(super) struct LockArguments {
    #[command(subcommand)]
    verb: LockVerb,
}

#[derive(Debug, Subcommand)]
enum LockVerb {
    /// List what is locked
    Show {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Lock anew what archives, URLs and tags give now
    Update {
        /// Roots, kernels and sources [default: all that is locked or that the recipe names]
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Change nothing: say what would change
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// Take out what the recipe does not name
    Prune {
        /// Change nothing: say what would go
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// Put all the bytes that the lock names into a directory or archive
    Vendor {
        /// A directory; or an archive, where the name ends in .tar
        #[arg(value_name = "DIR|FILE.tar")]
        path: PathBuf,
    },
}

impl From<RelockError> for Failure {
    fn from(error: RelockError) -> Self {
        let code = if error.is_the_users() { USAGE } else { FAILED };
        let hint = error.hint();
        Self::new(&error, hint, code)
    }
}

/// Does what is asked.
pub(super) fn lock(arguments: &LockArguments, flags: Flags) -> Result<ExitCode, Failure> {
    let settings = Settings::read(flags)?;
    let plan = settings.recipe.as_ref().map(recipe::plan).transpose()?;
    let host = Host::open(settings)?;
    let mut narrator = Narrator::new(false);
    match &arguments.verb {
        LockVerb::Show { json } => show(&host, plan.as_ref(), *json)?,
        LockVerb::Update { names, dry_run } => {
            let updated =
                lock::update(&host, plan.as_ref(), names, *dry_run, &mut |text| narrator.progress(text));
            narrator.clear();
            let (changes, looked_at) = updated?;
            print(&changes);
            note(&match (changes.len(), dry_run) {
                (0, _) => format!("{looked_at} entries looked at, nothing changed"),
                (count, true) => format!("{count} of {looked_at} entries would change"),
                (count, false) => {
                    format!("{count} of {looked_at} entries changed in {}", host.lock_path().display())
                }
            });
        }
        LockVerb::Prune { dry_run } => {
            // Without a recipe everything would go.
            let _ = recipe::found(&host.settings)?;
            let changes = lock::prune(&host, &plan.unwrap_or_default(), *dry_run)?;
            print(&changes);
            note(&match (changes.len(), dry_run) {
                (0, _) => "the recipe names all that is locked".to_owned(),
                (count, true) => format!("{count} entries would go"),
                (count, false) => format!("{count} entries taken out of {}", host.lock_path().display()),
            });
        }
        LockVerb::Vendor { path } => {
            let path = host.settings.directory.join(path);
            let written = lock::vendor(&host, plan.as_ref(), &path, &mut |text| narrator.progress(text));
            narrator.clear();
            let written = written?;
            let files = written.new + written.kept;
            let mut text = format!("{files} files ({}) in {}", show_bytes(written.bytes), path.display());
            if written.kept > 0 {
                text += &format!(", {} of them there before", written.kept);
            }
            if written.others > 0 {
                text += &format!("; {} other files there are not of this lock", written.others);
            }
            note(&text);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What is locked under a name, as `--json` has it.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Row<'a> {
    /// What it is.
    kind: &'a str,
    /// What names it.
    name: String,
    /// Whether the recipe names it, where there is a recipe.
    in_recipe: Option<bool>,
    /// Whether all its bytes are in the store.
    in_store: bool,
    /// Its files.
    files: Vec<LockedFile>,
}

/// A file that is locked.
#[derive(Debug, Serialize, JsonSchema)]
struct LockedFile {
    /// What it is.
    what: String,
    /// Its digest.
    #[schemars(with = "String")]
    sha256: kiln_digest::Digest,
    /// Its bytes.
    size: u64,
}

impl<'a> Row<'a> {
    fn of(entry: &crate::engine::lock::Entry<'a>, in_recipe: Option<bool>, in_store: bool) -> Self {
        let files = entry.files().into_iter().map(|(what, sha256, size)| LockedFile { what, sha256, size });
        let (kind, name) = (entry.kind(), entry.name());
        Self { kind, name: name.to_string(), in_recipe, in_store, files: files.collect() }
    }
}

fn show(host: &Host, plan: Option<&Plan>, json: bool) -> Result<(), Failure> {
    let lock = lock::read(host)?;
    let named = plan.map(Named::of).transpose()?;
    let mut rows = Vec::new();
    for entry in lock.entries() {
        let is_named = named.as_ref().map(|named| named.has(entry));
        rows.push((entry, is_named, lock::is_here(host, entry)));
    }
    if json {
        let rows: Vec<Row<'_>> =
            rows.iter().map(|(entry, named, here)| Row::of(entry, *named, *here)).collect();
        line(&serde_json::to_string(&rows).unwrap_or_default());
        return Ok(());
    }
    if rows.is_empty() {
        note(&format!("nothing is locked in {}", host.lock_path().display()));
        return Ok(());
    }
    line("KIND     FILES  SIZE       STORE  NAME");
    for (entry, is_named, is_here) in rows {
        let here = if is_here { "all" } else { "-" };
        let aside = if is_named == Some(false) { "  (the recipe does not name it)" } else { "" };
        let (files, size) = (entry.files().len(), show_bytes(entry.total_bytes()));
        let text = format!("{:<7}  {files:<5}  {size:<9}  {here:<5}  {}{aside}", entry.kind(), entry.name());
        line(&harmless(text.as_bytes()));
    }
    Ok(())
}
