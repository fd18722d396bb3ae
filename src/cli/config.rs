//! `kiln config`: every setting, its value and its origin.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::show::line;
use super::{Failure, USAGE};
use crate::engine::Host;
use crate::plan::{show_age, show_bytes};
use crate::settings::{Origin, Setting, Settings};

/// Arguments of `kiln config`.
#[derive(Debug, Args)]
pub(super) struct ConfigArguments {
    /// Print this setting's value and nothing else
    #[arg(value_name = "NAME")]
    name: Option<String>,
}

/// Prints the settings, or one of them.
pub(super) fn config(arguments: &ConfigArguments, settings: Settings) -> Result<ExitCode, Failure> {
    let recipe = settings.recipe.clone();
    let rows = rows(settings);
    if let Some(name) = &arguments.name {
        let Some((_, value, _)) = rows.iter().find(|(known, ..)| known == name) else {
            let known: Vec<&str> = rows.iter().map(|(name, ..)| *name).collect();
            let hint = Some(format!("the settings are {}", known.join(", ")));
            return Err(Failure { text: format!("there is no setting `{name}`"), hint, code: USAGE });
        };
        line(value);
        return Ok(ExitCode::SUCCESS);
    }
    for (name, value, origin) in &rows {
        line(&format!("{name:<22} {value:<45} ({origin})"));
    }
    match recipe {
        Some(recipe) => line(&format!("recipe: {}", recipe.path.display())),
        None => line("recipe: none"),
    }
    Ok(ExitCode::SUCCESS)
}

type Row = (&'static str, String, Origin);

fn rows(settings: Settings) -> Vec<Row> {
    fn row<T>(name: &'static str, setting: &Setting<T>, show: impl Fn(&T) -> String) -> Row {
        (name, show(&setting.value), setting.origin.clone())
    }
    fn text(none: &'static str) -> impl Fn(&Option<String>) -> String {
        move |value| value.clone().unwrap_or_else(|| none.to_owned())
    }
    fn file(none: &'static str) -> impl Fn(&Option<PathBuf>) -> String {
        move |value| value.as_ref().map_or_else(|| none.to_owned(), |path| path.display().to_string())
    }
    let path = |path: &PathBuf| path.display().to_string();
    let on_or_off = |on: &bool| if *on { "on" } else { "off" }.to_owned();
    let mut rows = vec![
        row("PROJECT", &settings.project, Clone::clone),
        row("WORK", &settings.work, path),
        row("SRCDIR", &settings.srcdir, file("none")),
        row("SECRETS", &settings.secrets, path),
        row("REPO", &settings.repo, text("none")),
        row("TAG", &settings.tag, Clone::clone),
        row("KILN_STORE", &settings.store, path),
        row("KILN_STORE_LIMIT", &settings.store_limit, |limit| {
            limit.map_or_else(|| "none".to_owned(), show_bytes)
        }),
        row("KILN_BACKEND", &settings.backend, ToString::to_string),
        row("KILN_QEMU", &settings.qemu, Clone::clone),
        row("KILN_TEMPLATE", &settings.template, on_or_off),
        row("KILN_KEEPER", &settings.keeper, on_or_off),
        row("KILN_KEEPER_IDLE", &settings.keeper_idle, |idle| show_age(*idle)),
        row("KILN_AGENT", &settings.agent, file("beside kiln")),
        row("KILN_TOOLBOX", &settings.toolbox, file("Debian packages")),
        row("KILN_LOCK", &settings.lock, path),
        row("KILN_LOCKED", &settings.locked, on_or_off),
        row("KILN_OFFLINE", &settings.offline, on_or_off),
        row("KILN_VENDOR", &settings.vendor, file("none")),
        row("KILN_CA_FILE", &settings.ca_file, file("those that browsers trust")),
        row(
            "debian.security-mirror",
            &settings.debian_security_mirror,
            text("what the host's APT sources name"),
        ),
        row("debian.snapshot", &settings.debian_snapshot, text("none")),
        row("debian.keyring", &settings.debian_keyring, file("what the host's APT sources name")),
    ];
    let origin = settings.debian_mirror.origin.clone();
    let mirror = match settings.debian_mirror.value.clone() {
        Some(mirror) => (mirror, origin),
        // Without a setting the host says; a store that cannot be opened leaves that unsaid here.
        None => match Host::open(settings).map(|host| host.debian_mirror()) {
            Ok(Ok(mirror)) => (mirror, Origin::Host),
            _ => ("none".to_owned(), origin),
        },
    };
    rows.push(("debian.mirror", mirror.0, mirror.1));
    rows
}
