//! `kiln store`: what is in the store, what may go, and whether it is what was written.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use kiln_digest::Digest;
use schemars::JsonSchema;
use serde::Serialize;

use super::show::{self, Narrator, line};
use super::{FAILED, Failure, USAGE, recipe};
use crate::engine::Host;
use crate::engine::lock::{self, refetch};
use crate::plan::{harmless, parse_bytes, parse_duration, show_bytes};
use crate::upkeep::UpkeepError;
use crate::upkeep::census::Census;
use crate::upkeep::collect::{Order, collect};
use crate::upkeep::verify::{Damage, Verified, repair, verify};

/// Fewest digits that name a blob.
const FEWEST_DIGITS: usize = 4;

/// Arguments of `kiln store`.
#[derive(Debug, Args)]
#[command(after_help = "\
What a running kiln uses is never removed. What was removed and is needed again is made or fetched anew.

Examples:
  kiln store du
  kiln store gc --to 20G                  what was used least recently goes first
  kiln store verify || kiln store repair
  kiln store why 39b1dce0                 what keeps that blob")]
pub(super) struct StoreArguments {
    #[command(subcommand)]
    verb: StoreVerb,
}

#[derive(Debug, Subcommand)]
enum StoreVerb {
    /// Say what takes up how much, by kind
    Du {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove what nothing names, and what was used least recently, down to the ceiling
    Gc {
        /// Down to this size instead of the ceiling (store-limit)
        #[arg(long, value_name = "SIZE")]
        to: Option<String>,
        /// Remove what nothing names where it was not used for so long
        #[arg(long, value_name = "TIME", default_value = "336h")]
        unused: String,
        /// Only say what would go
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// Hold everything against its digest; exit status 1 where something is damaged
    Verify,
    /// Remove what is damaged and what names it, and fetch again what the lock has
    Repair,
    /// Say what keeps a blob or an image
    Why {
        /// Its digest, or some digits with which that begins
        #[arg(value_name = "DIGEST")]
        digest: String,
    },
}

impl From<UpkeepError> for Failure {
    fn from(error: UpkeepError) -> Self {
        Self::new(&error, None, FAILED)
    }
}

/// Does what is asked.
pub(super) fn store(arguments: &StoreArguments, host: &Host) -> Result<ExitCode, Failure> {
    match &arguments.verb {
        StoreVerb::Du { json } => du(host, *json),
        StoreVerb::Gc { to, unused, dry_run } => gc(host, to.as_deref(), unused, *dry_run),
        StoreVerb::Verify => {
            let verified = verify(&host.store)?;
            tell(&verified);
            Ok(ExitCode::from(if verified.damage.is_empty() { 0 } else { FAILED }))
        }
        StoreVerb::Repair => repaired(host),
        StoreVerb::Why { digest } => why(host, digest),
    }
}

/// What takes up how much, in bytes, as `--json` has it.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Usage {
    /// By kind.
    kinds: BTreeMap<String, u64>,
    /// All together.
    total: u64,
    /// How much the store may hold, where there is a limit.
    limit: Option<u64>,
}

fn du(host: &Host, json: bool) -> Result<ExitCode, Failure> {
    let census = Census::take(&host.store)?;
    let limit = host.settings.store_limit.value;
    let name = |kind| serde_json::to_value(kind).ok().and_then(|name| Some(name.as_str()?.to_owned()));
    let usage: Vec<(String, u64)> =
        census.usage().into_iter().map(|(kind, bytes)| (name(kind).unwrap_or_default(), bytes)).collect();
    if json {
        let usage = Usage { kinds: usage.into_iter().collect(), total: census.total(), limit };
        line(&serde_json::to_string(&usage).unwrap_or_default());
        return Ok(ExitCode::SUCCESS);
    }
    for (kind, bytes) in usage {
        line(&format!("{kind:<11} {:>10}", show_bytes(bytes)));
    }
    line(&format!("{:<11} {:>10}", "total", show_bytes(census.total())));
    line(&format!("{:<11} {:>10}", "limit", limit.map_or_else(|| "none".to_owned(), show_bytes)));
    Ok(ExitCode::SUCCESS)
}

fn gc(host: &Host, to: Option<&str>, unused: &str, dry_run: bool) -> Result<ExitCode, Failure> {
    let usage = |text: String| Failure { text, hint: None, code: USAGE };
    let to = to.map(parse_bytes).transpose().map_err(|error| usage(format!("--to: {error}")))?;
    let unused: Duration = parse_duration(unused).map_err(|error| usage(format!("--unused: {error}")))?;
    let most_bytes = to.or(host.settings.store_limit.value);
    let collected = collect(&host.store, &Order { most_bytes, unused: Some(unused), dry_run, own: true })?;
    for (name, bytes) in &collected.taken {
        line(&harmless(format!("{:>10}  {name}", show_bytes(*bytes)).as_bytes()));
    }
    let verb = if dry_run { "would remove" } else { "removed" };
    let (bytes, left) = (show_bytes(collected.bytes()), show_bytes(collected.left_bytes));
    line(&format!("{verb} {bytes}; {left} are left"));
    match most_bytes.filter(|most| collected.left_bytes > *most) {
        None => Ok(ExitCode::SUCCESS),
        Some(most) => {
            let text = format!("more than {} is in use or must stay", show_bytes(most));
            let hint = "end the kilns that use it (`kiln ps`), or give it more room".to_owned();
            Err(Failure { text, hint: Some(hint), code: FAILED })
        }
    }
}

fn tell(verified: &Verified) {
    for damage in &verified.damage {
        line(&harmless(format!("{} {}", damage.name, damage.what).as_bytes()));
    }
    line(&format!("{} checked, {} damaged", verified.checked, verified.damage.len()));
}

/// Repairs until nothing more is found: what names a thing that was removed may be named itself. Then what the lock names is
/// fetched again, and of the rest it is said what brings it back.
fn repaired(host: &Host) -> Result<ExitCode, Failure> {
    let mut lost = BTreeMap::new();
    loop {
        let verified = verify(&host.store)?;
        tell(&verified);
        if verified.damage.is_empty() {
            break;
        }
        let census = Census::take(&host.store)?;
        for digest in verified.damage.iter().filter_map(Damage::blob) {
            let keepers = census.why(&digest.to_string()).remove(&digest).unwrap_or_default();
            lost.entry(digest).or_insert(keepers);
        }
        let held = repair(&host.store, &verified.damage)?;
        if !held.is_empty() {
            for damage in &held {
                show::failure(&format!("{} is in use", damage.name), Some("end what uses it (`kiln ps`)"));
            }
            return Ok(ExitCode::from(FAILED));
        }
    }
    match lost.is_empty() {
        true => Ok(ExitCode::SUCCESS),
        false => put_back(host, lost),
    }
}

/// Fetches what of `lost` can be fetched, and says of the rest who put it there.
fn put_back(host: &Host, mut lost: BTreeMap<Digest, Vec<(String, String)>>) -> Result<ExitCode, Failure> {
    let plan = host.settings.recipe.as_ref().map(recipe::plan).transpose()?;
    let digests = lost.keys().copied().collect();
    let mut narrator = Narrator::new(false);
    let fetched = refetch(host, plan.as_ref(), &digests, &mut |text| narrator.progress(text));
    narrator.clear();
    let mut code = ExitCode::SUCCESS;
    for one in fetched? {
        match one.result {
            Ok(()) => line(&harmless(format!("{} was fetched again", one.what).as_bytes())),
            Err(error) => {
                let failure = Failure::from(error);
                show::failure(
                    &format!("{} cannot be fetched again: {}", one.what, failure.text),
                    failure.hint.as_deref(),
                );
                code = ExitCode::from(FAILED);
            }
        }
        lost.remove(&one.digest);
    }
    for (digest, keepers) in lost {
        let text = match keepers.first() {
            Some((unit, what)) => format!("{digest}, {what}: the next build has it anew ({unit})"),
            None => format!("{digest}: nothing named it"),
        };
        line(&harmless(text.as_bytes()));
    }
    Ok(code)
}

fn why(host: &Host, digits: &str) -> Result<ExitCode, Failure> {
    if digits.len() < FEWEST_DIGITS {
        let text = format!("`{digits}` is no digest: write {FEWEST_DIGITS} digits at least");
        return Err(Failure { text, hint: None, code: USAGE });
    }
    let mut found = Census::take(&host.store)?.why(digits);
    let names = lock::names(host, digits)?;
    for digest in names.keys() {
        found.entry(*digest).or_default();
    }
    if found.is_empty() {
        let text = format!("the store has no blob and no image `{digits}`, and the lock names none");
        return Err(Failure { text, hint: None, code: FAILED });
    }
    for (digest, keepers) in found {
        line(&digest.to_string());
        for (unit, what) in &keepers {
            line(&harmless(format!("  {unit}: {what}").as_bytes()));
        }
        let name = names.get(&digest);
        if let Some(name) = name {
            line(&harmless(format!("  {}: {name}", host.lock_path().display()).as_bytes()));
        }
        if keepers.is_empty() {
            line(match name {
                None => "  nothing names it: it goes when it was not used for long (`kiln store gc`)",
                Some(_) if host.store.blobs().path(&digest).is_file() => {
                    "  nothing in the store names it: it goes when it was not used for long, and is fetched again when it is needed"
                }
                Some(_) => "  the store does not have it: it is fetched when it is needed",
            });
        }
    }
    Ok(ExitCode::SUCCESS)
}
