//! What changed in the lock, for people: a line for an entry, a line for each package in it that is another.

use jiff::Timestamp;

use crate::cli::show::line;
use crate::engine::lock::{Detail, EntryChange, Fate, LockedPackage};
use crate::plan::{harmless, show_bytes};

/// Prints `changes` to standard output.
pub(super) fn print(changes: &[EntryChange]) {
    for text in changes.iter().flat_map(lines) {
        line(&harmless(text.as_bytes()));
    }
}

fn lines(change: &EntryChange) -> Vec<String> {
    let (before, after) = (show_bytes(change.bytes_before), show_bytes(change.bytes_after));
    let title = format!("{} {}", change.kind, change.name);
    let mut lines = vec![match change.fate {
        Fate::Added => format!("+ {title}: {after}"),
        Fate::Removed => format!("- {title}: {before}"),
        Fate::Changed if change.bytes_before == change.bytes_after => format!("~ {title}: {after}"),
        Fate::Changed => format!("~ {title}: {before} -> {after}"),
    }];
    lines.extend(change.details.iter().map(|detail| format!("    {}", one(detail))));
    if change.unchanged > 0 {
        let packages = if change.unchanged == 1 { "package" } else { "packages" };
        lines.push(format!("    = {} {packages} as before", change.unchanged));
    }
    lines
}

fn one(detail: &Detail) -> String {
    let date = |date: &Option<Timestamp>| date.map_or_else(|| "none".to_owned(), |date| date.to_string());
    let size = |package: &LockedPackage| show_bytes(package.size);
    let text = match detail {
        Detail::Index { suite, before, after } => {
            format!("~ index of {suite}: {} -> {}", date(before), date(after))
        }
        Detail::Added(package) => format!("+ {} {} ({})", package.name, package.version, size(package)),
        Detail::Removed(package) => format!("- {} {} ({})", package.name, package.version, size(package)),
        Detail::Version { before, after } => {
            let name = match before.name == after.name {
                true => after.name.clone(),
                false => format!("{} -> {}", before.name, after.name),
            };
            let sizes = format!("{} -> {}", size(before), size(after));
            format!("~ {name} {} -> {} ({sizes})", before.version, after.version)
        }
        Detail::Moved(package) => format!("~ {} {} lies elsewhere", package.name, package.version),
        Detail::SameVersion { before, after } => format!(
            "{} {} has OTHER BYTES UNDER THE SAME VERSION: sha256 {} -> {}",
            after.name, after.version, before.sha256, after.sha256
        ),
        Detail::Bytes { before, after } => {
            format!("OTHER BYTES AT THE SAME URL: sha256 {before} -> {after}")
        }
        Detail::Commit { before, after } => format!("THE TAG MOVED: commit {before} -> {after}"),
    };
    if detail.is_alarming() { format!("! {text}") } else { text }
}
