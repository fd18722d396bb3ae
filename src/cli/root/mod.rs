//! `kiln root`: the roots in the store, what they hold, and how they differ.

mod diff;
mod show;

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use kiln_digest::Digest;
use schemars::JsonSchema;
use serde::Serialize;

use super::choice::Choice;
use super::show::line;
use super::{FAILED, Failure, USAGE};
use crate::engine::Host;
use crate::plan::{harmless, show_age, show_bytes};
use crate::root::Filesystem;
use crate::root::catalog::{self, CatalogError, Entry};
pub(super) use diff::Differing;
use diff::{TROUBLE, diff};
pub(super) use show::Shown;
use show::show;

/// Digits of a digest that a person sees.
const DIGITS: usize = 12;

/// Arguments of `kiln root`.
#[derive(Debug, Args)]
#[command(after_help = "\
A root comes into the store with the first step that has it. ROOT is its digest, or some digits with which
that begins, or what it was made of, such as debian:bookworm+gcc or file:rootfs.squashfs.

Examples:
  kiln root ls
  kiln root show debian:bookworm | grep bin/sh
  kiln root diff debian:bookworm 39b1dce0         exit status 0: the same, 1: different, 2: trouble
  kiln root rm 39b1dce0")]
pub(super) struct RootArguments {
    #[command(subcommand)]
    verb: RootVerb,
}

#[derive(Debug, Subcommand)]
enum RootVerb {
    /// List the roots in the store, the last used first
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show where a root came from, and every file in it
    Show {
        /// The root
        #[arg(value_name = "ROOT")]
        root: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what differs between two roots
    Diff {
        /// One root
        #[arg(value_name = "A")]
        old: String,
        /// Another
        #[arg(value_name = "B")]
        new: String,
        /// Leave out what differs in nothing else
        #[arg(long, value_name = "ASPECT",
            value_parser = Choice(&["kind", "content", "mode", "owner", "time", "xattrs", "links"]))]
        ignore: Vec<String>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove roots that no running kiln uses
    Rm {
        /// The roots
        #[arg(value_name = "ROOT", required = true)]
        roots: Vec<String>,
    },
}

impl From<CatalogError> for Failure {
    fn from(error: CatalogError) -> Self {
        let code = if error.is_usage() { USAGE } else { FAILED };
        Self::new(&error, error.hint(), code)
    }
}

/// Does what is asked, where there is a store.
pub(super) fn root(arguments: &RootArguments, host: Result<Host, Failure>) -> Result<ExitCode, Failure> {
    match &arguments.verb {
        RootVerb::Ls { json } => list(&host?, *json),
        RootVerb::Show { root, json } => show(&host?, root, *json),
        RootVerb::Diff { old, new, ignore, json } => host
            .and_then(|host| diff(&host, old, new, ignore, *json))
            .map_err(|failure| Failure { code: TROUBLE, ..failure }),
        RootVerb::Rm { roots } => remove(&host?, roots),
    }
}

/// A root, as `--json` has it.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Listed<'a> {
    /// The digest of its tree's manifest.
    #[schemars(with = "String")]
    digest: &'a Digest,
    /// What is on its image.
    image: Filesystem,
    /// Bytes of its image.
    size: u64,
    /// When the image was made.
    #[schemars(with = "String")]
    made: &'a jiff::Timestamp,
    /// When a step got it last.
    #[schemars(with = "String")]
    used: &'a jiff::Timestamp,
    /// The names by which steps asked for it, the last one first.
    made_of: &'a [String],
    /// How many packages are in it.
    packages: usize,
}

impl<'a> Listed<'a> {
    fn of(entry: &'a Entry) -> Self {
        Self {
            digest: &entry.digest,
            image: entry.filesystem,
            size: entry.size_bytes,
            made: &entry.made,
            used: &entry.used,
            made_of: &entry.origins,
            packages: entry.provenance.packages.len(),
        }
    }
}

fn digits(digest: &Digest) -> String {
    digest.to_string()[..DIGITS].to_owned()
}

fn list(host: &Host, json: bool) -> Result<ExitCode, Failure> {
    let entries = catalog::list(&host.store)?;
    if json {
        let rows: Vec<Listed<'_>> = entries.iter().map(Listed::of).collect();
        line(&serde_json::to_string(&rows).unwrap_or_default());
        return Ok(ExitCode::SUCCESS);
    }
    line("DIGEST        IMAGE     SIZE       PACKAGES  AGE     USED        MADE OF");
    for entry in &entries {
        let packages = match entry.provenance.packages.len() {
            0 => "-".to_owned(),
            count => count.to_string(),
        };
        let used = format!("{} ago", show_age(entry.idle()));
        line(&harmless(
            format!(
                "{}  {:<8}  {:<9}  {packages:<8}  {:<6}  {used:<10}  {}",
                digits(&entry.digest),
                entry.filesystem.name(),
                show_bytes(entry.size_bytes),
                show_age(entry.age()),
                entry.origins.join(", "),
            )
            .as_bytes(),
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(host: &Host, roots: &[String]) -> Result<ExitCode, Failure> {
    // All names are good before anything is removed.
    let entries = roots.iter().map(|name| catalog::find(&host.store, name)).collect::<Result<Vec<_>, _>>()?;
    let mut seen = BTreeSet::new();
    for entry in entries.iter().filter(|entry| seen.insert(entry.digest)) {
        catalog::remove(&host.store, &entry.digest, entry.filesystem)?;
        line(&format!("removed sha256:{} ({})", entry.digest, show_bytes(entry.size_bytes)));
    }
    Ok(ExitCode::SUCCESS)
}
