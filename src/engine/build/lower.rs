//! From a step of a plan to one that [`crate::engine::run`] takes, and to its key.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use kiln_digest::Digest;
use kiln_virtio::fs::record::PathBytes;

use super::BuildError;
use super::sources::Locked;
use crate::agent::Limits;
use crate::cache::{Hidden, Key};
use crate::engine::host::{Boundary, KernelChoice};
use crate::engine::prepare::{environment, guest_places};
use crate::engine::step::{Clock, Keep, Step};
use crate::machine::{Carrier, Cpu, scratch};
use crate::plan::graph::{Command, Ignore, Kernel, Root};
use crate::plan::recipe::{ClockWord, NetworkWord};
use crate::plan::{EnvError, PlannedStep, RootSpec};
use crate::root::debian::DEFAULT_KERNEL_SUITE;
use crate::settings::Settings;

/// Memory of a machine, where the recipe does not say.
const MEMORY_BYTES: u64 = 2 << 30;
/// From SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(10);

/// A step, lowered.
#[derive(Debug)]
pub struct Lowered {
    /// What is run, without its view.
    pub step: Step,
    /// What it is.
    pub key: Key,
}

/// Memory of the machine of `planned`.
pub(super) fn memory_bytes(planned: &PlannedStep) -> u64 {
    planned.limits.memory_bytes.unwrap_or(MEMORY_BYTES).next_multiple_of(1 << 20)
}

/// What a step gets of what others put out.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Its root.
    pub root: Option<RootSpec>,
    /// Its kernel.
    pub kernel: Option<KernelChoice>,
}

/// `spec`, whose path is relative to `folder`.
pub(super) fn located(spec: &RootSpec, folder: &Path) -> RootSpec {
    match spec {
        RootSpec::Directory(path) => RootSpec::Directory(folder.join(path)),
        RootSpec::File(path) => RootSpec::File(folder.join(path)),
        RootSpec::Live(path) => RootSpec::Live(folder.join(path)),
        RootSpec::Debian(_) | RootSpec::Packages(_) => spec.clone(),
    }
}

/// The step `planned`, which takes a machine, as it is run, without its view. Paths of roots are relative to `folder`;
/// what others put out for it is in `found`.
pub(super) fn lower(
    planned: &PlannedStep,
    settings: &Settings,
    folder: &Path,
    overwrite: bool,
    found: &Found,
) -> Step {
    let last = match &planned.command {
        Command::Text(text) => text.clone(),
        Command::Script(path) => format!("{}/{path}", guest_places(settings).0),
        Command::Make(_) | Command::Sign | Command::Boot(_) => String::new(),
    };
    let words = planned.interpreter.iter().cloned().chain([last]);
    let limits = &planned.limits;
    let standard = Limits::default();
    let kernel = match &planned.kernel {
        Some(Kernel::Debian(suite)) => KernelChoice::Debian(suite.clone()),
        Some(Kernel::File { kernel, modules }) => KernelChoice::File {
            kernel: folder.join(kernel),
            modules: modules.as_ref().map(|modules| folder.join(modules)),
        },
        None | Some(Kernel::Step(_)) => KernelChoice::Debian(DEFAULT_KERNEL_SUITE.to_owned()),
    };
    let root = match &planned.root {
        Root::Spec(spec) => located(spec, folder),
        Root::Step(_) => RootSpec::Debian(DEFAULT_KERNEL_SUITE.to_owned()),
    };
    Step {
        name: planned.name.clone(),
        root: found.root.clone().unwrap_or(root),
        kernel: found.kernel.clone().unwrap_or(kernel),
        argv: words.map(String::into_bytes).collect(),
        env: planned.env.clone(),
        directory: planned.directory.clone(),
        source_layer: planned.writable_source,
        mounts: Vec::new(),
        disks: Vec::new(),
        binds: Vec::new(),
        outputs: planned.outputs.clone(),
        overwrite,
        memory_bytes: memory_bytes(planned),
        cpus: limits.cpus.unwrap_or(0),
        scratch_bytes: limits.scratch_bytes.unwrap_or(scratch::USUAL_BYTES).next_multiple_of(4096),
        timeout: limits.timeout,
        grace: GRACE,
        clock: match planned.clock {
            ClockWord::Host => Clock::Host,
            ClockWord::Fixed => Clock::Fixed,
        },
        carrier: Carrier::default(),
        modules: Vec::new(),
        module_tree: false,
        cpu: Cpu::Fixed,
        network: planned.network == NetworkWord::Full,
        real_attributes: false,
        toolbox: false,
        keep: Keep::Never,
        boundary: Boundary { require: Vec::new(), untrusted: planned.untrusted },
        report_reads: true,
        limits: Limits {
            entries: limits.files.map_or(standard.entries, |files| u32::try_from(files).unwrap_or(u32::MAX)),
            total_bytes: limits.outputs_bytes.unwrap_or(standard.total_bytes),
            printed_bytes: limits.printed_bytes.unwrap_or(standard.printed_bytes),
            processes: limits.processes.unwrap_or(standard.processes),
        },
        sees_sources: !planned.sources.is_empty(),
        view: None,
    }
}

/// The key of `step`, which `planned` became. `host` are the parts that only the host knows.
///
/// # Errors
/// [`EnvError`] where its environment cannot be made.
pub(super) fn key(
    planned: &PlannedStep,
    step: &Step,
    settings: &Settings,
    ignore: &Ignore,
    sources: &Locked,
    host: Vec<(String, String)>,
) -> Result<Key, EnvError> {
    let mut key = Key::default();
    // Escaped, so that no two commands are one text.
    let text = |bytes: &[u8]| PathBytes(bytes.to_vec()).into_text();
    for (number, word) in step.argv.iter().enumerate() {
        let is_last = number + 1 == step.argv.len();
        key.add(
            match is_last {
                true => Cow::Borrowed("the command"),
                false => format!("word {number} of the command line").into(),
            },
            text(word),
        );
    }
    for (name, value) in host {
        key.add(format!("the {name}"), value);
    }
    let passed: BTreeSet<&str> =
        planned.env.iter().filter(|variable| !variable.contains('=')).map(String::as_str).collect();
    for (name, value) in environment(step, settings)?.iter() {
        let (name, value) = (text(name.as_bytes()), text(value));
        // What is the host's own may be nothing to be kept in a file.
        let value = match passed.contains(&*name) {
            true => format!("sha256:{}", Digest::of(value.as_bytes())),
            false => value,
        };
        key.add(format!("variable {name}"), value);
    }
    let (source, work) = guest_places(settings);
    let directory = match &step.directory {
        // One below where it starts otherwise.
        Some(directory) if !directory.starts_with('/') => format!("./{directory}"),
        directory => directory.clone().unwrap_or_default(),
    };
    key.add("the place of SRCDIR", if settings.srcdir.value.is_some() { source } else { "none".to_owned() });
    key.add("the place of WORK", work);
    // It is hidden there, and what lies in its place in another build is not.
    if let Some(source) = &settings.srcdir.value
        && let Ok(inner) =
            meant(&settings.directory, &settings.work.value).strip_prefix(meant(&settings.directory, source))
    {
        key.add("the place of WORK in SRCDIR", text(inner.as_os_str().as_bytes()));
    }
    key.add("the working directory", directory);
    key.add("writable-source", step.source_layer.to_string());
    key.add("the clock", if step.clock == Clock::Fixed { "fixed" } else { "host" });
    key.add("the network", if step.network { "full" } else { "none" });
    key.add("what is ignored", ignore.globs().join("\n"));
    key.add("the declared outputs", step.outputs.globs().collect::<Vec<_>>().join("\n"));
    key.add("the declared inputs", planned.inputs.globs().collect::<Vec<_>>().join("\n"));
    for source in &planned.sources {
        let digest = sources.get(&source.name).map(|locked| locked.sha256.to_string());
        key.add(format!("source {}", source.name), digest.unwrap_or_default());
    }
    Ok(key)
}

/// Where `path` is, by what there is of it: the folder `above` it.
fn real(above: &Path, path: &Path) -> Option<PathBuf> {
    let rest = path.strip_prefix(above).ok()?;
    std::fs::canonicalize(above).ok().map(|above| above.join(rest))
}

/// Where `path` leads from `directory`: by its words alone where they say it, since a thousand steps ask.
fn meant(directory: &Path, path: &Path) -> PathBuf {
    let path = directory.join(path);
    match path.components().any(|component| component == Component::ParentDir) {
        true => path.ancestors().find_map(|above| real(above, &path)).unwrap_or(path),
        false => path,
    }
}

/// What of SRCDIR steps are not shown: what the recipe ignores, and WORK where it lies in there.
///
/// # Errors
/// WORK is SRCDIR: what steps put out would be among what they are made of.
pub(super) fn hidden(settings: &Settings, ignore: &Ignore) -> Result<Hidden, BuildError> {
    let mut hidden = Hidden { ignore: ignore.clone(), ..Hidden::default() };
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    let source = settings.srcdir.value.as_ref().and_then(|source| real(&settings.directory.join(source)));
    if let (Some(source), Some(work)) = (source, real(&settings.work.value))
        && let Ok(inner) = work.strip_prefix(&source)
    {
        if inner.as_os_str().is_empty() {
            return Err(BuildError::OnePlace { path: work });
        }
        hidden.paths.insert(inner.as_os_str().as_bytes().to_vec());
    }
    Ok(hidden)
}
