//! Before a machine starts: everything a step is given, opened, found or made, and described for agent and machine.

use std::collections::BTreeSet;
use std::fs::File;
use std::mem;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_wire::{Access, Exec, Mount, Scratch, Setup, Source, ToAgent};

use super::error::RunError;
use super::event::{Event, Listener};
use super::host::Host;
use super::inputs::{InputError, check_work, open_disk, open_share};
use super::merge;
use super::reads::Observable;
use super::step::{Clock, Keep, OPEN_NETWORK, Step};
use crate::apart::{self, Kept};
use crate::machine::qemu::Qemu;
use crate::machine::vmm::KilnVmm;
use crate::machine::{Attributes, Carrier, Cpu, Disk, PathBytes, Share, Spec, drawn, scratch, serial};
use crate::plan::{EnvError, Environment};
use crate::root::bundle::Bundle;
use crate::root::{Root, image, toolbox};
use crate::settings::Settings;
use crate::writes;

/// The host name of every machine.
const HOSTNAME: &str = "kiln";
/// The module that drives the network card of a machine that has one.
const NETWORK_DRIVER: &str = "virtio_net";
/// Everything opened and found before the machine starts.
pub(super) struct Prepared {
    pub qemu: Qemu,
    /// kiln's own VMM, where it is to run the step's machine instead.
    pub vmm: Option<KilnVmm>,
    pub bundle: Bundle,
    pub root: Root,
    pub environment: Environment,
    pub cpus: u16,
    pub shares: Vec<Share>,
    pub observables: Vec<Observable>,
    pub mounts: Vec<Mount>,
    pub disks: Vec<Disk>,
    pub work_target: String,
    pub directory: String,
    /// The toolbox's image, where the machine gets it.
    pub toolbox: Option<PathBuf>,
}

/// Where a guest sees the sources of a recipe.
pub(super) const SOURCES: &str = "/kiln/sources";

/// Where a guest sees SRCDIR and WORK.
pub(super) fn guest_places(settings: &Settings) -> (String, String) {
    let project = &settings.project.value;
    (format!("/ws/{project}"), format!("/x/{project}"))
}

/// The whole environment of `step`.
///
/// # Errors
/// [`EnvError`].
pub(super) fn environment(step: &Step, settings: &Settings) -> Result<Environment, EnvError> {
    let mut environment = Environment::fixed();
    let (source_target, work_target) = guest_places(settings);
    if settings.srcdir.value.is_some() {
        environment.set("SRCDIR", source_target.as_bytes());
    }
    environment.set("WORK", work_target.as_bytes());
    environment.set("TAG", settings.tag.value.as_bytes());
    if let Some(repo) = &settings.repo.value {
        environment.set("REPO", repo.as_bytes());
    }
    if step.sees_sources {
        environment.set("KILN_SOURCES", SOURCES.as_bytes());
    }
    for variable in &step.env {
        environment.add(variable, crate::settings::host_variable)?;
    }
    Ok(environment)
}

/// Opens and finds all that `step` needs.
///
/// # Errors
/// [`RunError`] before anything was started.
pub(super) fn prepare(
    step: &Step,
    host: &Host,
    work: &Path,
    events: Listener<'_>,
) -> Result<Prepared, RunError> {
    let settings = &host.settings;
    let environment = environment(step, settings)?;
    let (source_target, work_target) = guest_places(settings);
    let epoch = environment.source_date_epoch()?;
    let attributes = || match step.real_attributes {
        true => Attributes::Real,
        false => Attributes::Fixed { mtime_seconds: epoch },
    };
    if !step.outputs.is_empty() {
        check_work(work)?;
    }

    let secrets = &settings.secrets.value;
    let mut shares = Shares::default();
    let mut mounts = Vec::new();
    let refuse_store = |what, path: &Path| {
        apart::refuse(what, path, Kept::Store, &settings.store.value).map_err(InputError::from)
    };
    refuse_store("WORK", work)?;
    if let Some(source) = &settings.srcdir.value {
        refuse_store("SRCDIR", &settings.directory.join(source))?;
        let directory = open_share("SRCDIR", &settings.directory.join(source), secrets)?;
        let access = if step.source_layer { Access::Layered } else { Access::ReadOnly };
        mounts.push(shares.add("src", &source_target, directory, attributes(), access)?);
        shares.hide(step.view.iter().flat_map(|view| view.hidden.iter().cloned()).collect());
    }
    let directory = match &step.view {
        Some(view) => open_share("WORK", &view.work, secrets)?,
        None if work.exists() => open_share("WORK", work, secrets)?,
        None => empty_directory(host)?,
    };
    mounts.push(shares.add("work", &work_target, directory, attributes(), Access::Layered)?);
    if step.view.is_none() {
        let mut hidden = match step.outputs.are_everything() {
            // What it put out before is there to be written on.
            true => Vec::new(),
            false => merge::placed_by(&host.store, work, &step.name)?,
        };
        hidden.push(PathBytes(merge::STAGING.as_bytes().to_vec()));
        shares.hide(hidden);
    }
    if let Some(sources) = step.view.as_ref().and_then(|view| view.sources.as_ref()) {
        let directory = open_share("sources", sources, secrets)?;
        mounts.push(shares.add("sources", SOURCES, directory, attributes(), Access::ReadOnly)?);
    }
    for (index, mount) in step.mounts.iter().enumerate() {
        refuse_store("mount", &settings.directory.join(&mount.host))?;
        let directory = open_share("mount", &settings.directory.join(&mount.host), secrets)?;
        mounts.push(shares.add(
            &format!("mount{index}"),
            &mount.guest,
            directory,
            attributes(),
            Access::ReadOnly,
        )?);
    }
    for (inner, place) in &step.binds {
        let source = Source::Within(format!("{work_target}/{inner}").into_bytes());
        mounts.push(Mount { source, target: place.as_bytes().to_vec(), access: Access::Layered });
    }
    let mut disks = Vec::new();
    for (index, disk) in step.disks.iter().enumerate() {
        let (file, filesystem) = open_disk(disk, secrets)?;
        let serial = format!("disk{index}");
        let source = Source::Disk { serial: serial.clone(), filesystem, read_only: disk.read_only };
        let access = if disk.read_only { Access::ReadOnly } else { Access::Direct };
        mounts.push(Mount { source, target: disk.guest.clone().into_bytes(), access });
        disks.push(Disk { serial, file, read_only: disk.read_only });
    }

    if step.toolbox {
        mounts.push(toolbox_mount());
    }
    let mut places = BTreeSet::new();
    if let Some(mount) = mounts.iter().find(|mount| !places.insert(mount.target.as_slice())) {
        return Err(InputError::SamePlace(String::from_utf8_lossy(&mount.target).into_owned()).into());
    }
    host.refuse_secrets_in_root(&step.root)?;
    host.refuse_network(step)?;
    if step.network {
        let _ = events(Event::Warning(OPEN_NETWORK));
    }

    let qemu = host.backend(&step.boundary)?;
    if let Some(text) = host.lost_kvm() {
        let _ = events(Event::Warning(&text));
    }
    let cpus = match step.cpus {
        0 => std::thread::available_parallelism().ok().and_then(|n| u16::try_from(n.get()).ok()).unwrap_or(1),
        cpus => cpus,
    };
    let mut progress = |text: &str| {
        let _ = events(Event::Progress(text));
    };
    // It has no network card, and no processor with virtualisation.
    let vmm = host.vmm(&qemu).filter(|_| !step.network && step.cpu != Cpu::Nested);
    let bundle = host.bundle(&step.kernel, step.carrier, &mut progress)?;
    let root_bundle = match step.carrier {
        Carrier::Serial => bundle.clone(),
        Carrier::Vsock => host.bundle(&step.kernel, Carrier::Serial, &mut progress)?,
    };
    let root = host.root(&step.root, &qemu, &root_bundle, cpus, &mut progress)?;
    let toolbox = find_toolbox(step, host, events)?;
    for text in host.store.take_damage() {
        let _ = events(Event::Warning(&text));
    }
    let place = if settings.srcdir.value.is_some() { source_target } else { work_target.clone() };
    let directory = match &step.directory {
        Some(directory) if directory.starts_with('/') => directory.clone(),
        Some(directory) => format!("{place}/{directory}"),
        None => place,
    };
    if let Root::Live(path) = &root {
        let directory = open_share("root", path, secrets)?;
        shares.add("root", "/", directory, Attributes::Real, Access::Layered)?;
    }
    let Shares { list: shares, observables } = shares;
    Ok(Prepared {
        qemu,
        vmm,
        bundle,
        root,
        environment,
        cpus,
        shares,
        observables,
        mounts,
        disks,
        work_target,
        directory,
        toolbox,
    })
}

/// The toolbox, where the step sees it or may be looked into. For the latter it is not needed in every case, so not
/// having it is no failure.
fn find_toolbox(step: &Step, host: &Host, events: Listener<'_>) -> Result<Option<PathBuf>, RunError> {
    if !step.toolbox && step.keep == Keep::Never {
        return Ok(None);
    }
    let found = host.toolbox(&mut |text| {
        let _ = events(Event::Progress(text));
    });
    match found {
        Ok(path) => Ok(Some(path)),
        Err(error) if step.toolbox => Err(error.into()),
        Err(error) => {
            let mut text = format!("a machine that is kept or entered will have no toolbox: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(inner) = source {
                text.push_str(&format!(": {inner}"));
                source = inner.source();
            }
            let _ = events(Event::Warning(&text));
            Ok(None)
        }
    }
}

/// The toolbox as a tree of the guest's. Its disk comes last, so that it changes no other's name.
pub(super) fn toolbox_mount() -> Mount {
    let serial = serial::TOOLBOX.to_owned();
    let source = Source::Disk { serial, filesystem: "erofs".to_owned(), read_only: true };
    Mount { source, target: toolbox::PLACE.as_bytes().to_vec(), access: Access::ReadOnly }
}

/// Shares for the machine, and our own hold on each for the time after it.
#[derive(Default)]
struct Shares {
    list: Vec<Share>,
    observables: Vec<Observable>,
}

impl Shares {
    /// Leaves `paths` out of what the share added last shows.
    fn hide(&mut self, paths: Vec<PathBytes>) {
        if let Some(share) = self.list.last_mut() {
            share.hidden = paths;
        }
    }

    fn add(
        &mut self,
        name: &str,
        guest: &str,
        directory: OwnedFd,
        attributes: Attributes,
        access: Access,
    ) -> Result<Mount, RunError> {
        let held = directory.try_clone().map_err(|source| RunError::Io { what: "hold a share", source })?;
        self.observables.push(Observable {
            name: name.to_owned(),
            guest: guest.to_owned(),
            attributes,
            directory: held,
        });
        self.list.push(Share { name: name.to_owned(), directory, attributes, hidden: Vec::new() });
        Ok(Mount { source: Source::Share(name.to_owned()), target: guest.as_bytes().to_vec(), access })
    }
}

/// The store's empty directory, for a WORK that does not exist yet.
fn empty_directory(host: &Host) -> Result<OwnedFd, RunError> {
    let io = |source| RunError::Io { what: "open the store's empty directory", source };
    let folder = host.store.run().join("empty");
    writes::make_folders(&folder).map_err(io)?;
    Ok(File::open(folder).map_err(io)?.into())
}

/// What the agent is told, what it runs, and what the machine is made of. Shares, disks and mounts go over to these.
///
/// # Errors
/// [`RunError::Io`] where a descriptor or a file cannot be had.
pub(super) fn describe(
    step: &Step,
    host: &Host,
    prepared: &mut Prepared,
) -> Result<(Setup, Exec, Spec), RunError> {
    let io = |what| move |source| RunError::Io { what, source };
    let mut disks = Vec::new();
    let root = match &prepared.root {
        Root::Image(image) => {
            let file = image.descriptor().map_err(io("open the root's image"))?;
            disks.push(Disk { serial: serial::ROOT.to_owned(), file, read_only: true });
            let filesystem = image.filesystem.name().to_owned();
            Source::Disk { serial: serial::ROOT.to_owned(), filesystem, read_only: true }
        }
        Root::Live(_) => Source::Share("root".to_owned()),
    };
    let mut mounts = mem::take(&mut prepared.mounts);
    let mut load_modules = step.modules.clone();
    if step.network {
        load_modules.push(NETWORK_DRIVER.to_owned());
    }
    let with_modules = step.module_tree || !load_modules.is_empty();
    if let (true, Some(modules)) = (with_modules, &prepared.bundle.modules) {
        let file = File::open(image::path(&host.store, modules)).map_err(io("open the module image"))?;
        disks.push(Disk { serial: serial::MODULES.to_owned(), file: file.into(), read_only: true });
        let source = Source::Modules(serial::MODULES.to_owned());
        mounts.insert(0, Mount { source, target: b"/lib/modules".to_vec(), access: Access::ReadOnly });
    }
    let scratch = scratch::disk(&host.store.temporary(), step.scratch_bytes);
    disks.push(scratch.map_err(io("make the scratch disk"))?);
    disks.append(&mut prepared.disks);
    if let Some(path) = &prepared.toolbox {
        let file = File::open(path).map_err(io("open the toolbox's image"))?;
        disks.push(Disk { serial: serial::TOOLBOX.to_owned(), file: file.into(), read_only: true });
    }
    let seed = drawn().map_err(io("draw a seed"))?;
    let clock = match step.clock {
        Clock::Fixed => kiln_wire::Clock { seconds: seconds(prepared)?, nanoseconds: 0 },
        Clock::Host => host_clock(),
    };
    let setup = Setup {
        seed,
        warm_up: prepared.vmm.is_none() && !prepared.qemu.uses_kvm() && prepared.cpus > 1,
        clock,
        root,
        scratch: Some(Scratch { serial: serial::SCRATCH.to_owned(), bytes: step.scratch_bytes }),
        layer_bytes: step.scratch_bytes.saturating_add(step.memory_bytes / 2),
        processes: step.limits.processes,
        mounts,
        hostname: HOSTNAME.to_owned(),
        load_modules,
    };
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let exec = Exec {
        id: 1,
        argv: step.argv.clone(),
        env: prepared.environment.lines(),
        cwd: prepared.directory.clone().into_bytes(),
        timeout_ms: step.timeout.map_or(0, |timeout| milliseconds(timeout).max(1)),
        grace_ms: milliseconds(step.grace),
        stdin: false,
        terminal: None,
    };
    let spec = Spec {
        kernel: host.store.blobs().path(&prepared.bundle.kernel),
        initramfs: host.store.blobs().path(&prepared.bundle.initramfs),
        bundle: prepared.bundle.digest(),
        memory_bytes: step.memory_bytes,
        cpus: prepared.cpus,
        shares: mem::take(&mut prepared.shares),
        disks,
        carrier: step.carrier,
        cpu: step.cpu,
        network: step.network,
        rehearsal: rehearsal(&setup),
    };
    Ok((setup, exec, spec))
}

/// What a guest with the host's clock is told. It goes wrong from the moment at which it is taken.
pub(super) fn host_clock() -> kiln_wire::Clock {
    let now = crate::clock::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(now.as_secs()).unwrap_or_default();
    kiln_wire::Clock { seconds, nanoseconds: now.subsec_nanos() }
}

/// What a machine for such a step can rehearse; none where its root is a share.
fn rehearsal(setup: &Setup) -> Option<Vec<u8>> {
    let Source::Disk { .. } = setup.root else { return None };
    let rehearsed =
        Setup { seed: drawn().ok()?, mounts: Vec::new(), load_modules: Vec::new(), ..setup.clone() };
    Some(ToAgent::Rehearse(rehearsed).encode())
}

/// SOURCE_DATE_EPOCH as file systems count.
pub(super) fn seconds(prepared: &Prepared) -> Result<i64, RunError> {
    Ok(i64::try_from(prepared.environment.source_date_epoch()?).unwrap_or(i64::MAX))
}
