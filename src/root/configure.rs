//! Making a Debian root: packages fetched, unpacked, and configured by their own scripts inside a machine.
//!
//! The root is the unpacked tree plus what the machine's writable layer holds afterwards. The clock of that
//! machine starts at the date of the signed index, times after it are set back to it, and what the scripts leave
//! that is not a function of the packages (logs, caches of inode numbers) is taken away by the script itself: two
//! roots of one lock are one digest.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Duration;

use kiln_artifact::tree::{Layer, Timestamp, Tree, TreePath};
use kiln_digest::Digest;
use kiln_wire::{Clock, EntryKind, Exec, Outcome, Scratch, Setup, Source, Stream};

use super::catalog::{self, Provenance};
use super::debian::{Archive, CONFIGURE_SCRIPT, total_bytes};
use super::image::{self, Filesystem, Image};
use super::{Root, RootError};
use crate::agent::{ExecEnd, Limits, Listing, Session, SessionError};
use crate::fetch::lock::LockedRoot;
use crate::machine::{Backend, Carrier, Cpu, Disk, Machine, Spec, scratch, serial};
use crate::plan::{Environment, RootSpec, show_bytes};
use crate::root::bundle::Bundle;
use crate::store::Store;

/// Changes with what is made of the same packages.
const FORMAT: u32 = 1;
/// Memory of the configuring machine.
const MEMORY_BYTES: u64 = 2 << 30;
/// Space for what the scripts write, beyond memory.
const SCRATCH_BYTES: u64 = 16 << 30;
/// How long all maintainer scripts together may take.
const TIMEOUT: Duration = Duration::from_secs(3600);
/// How much of what the scripts said is shown when they fail.
const SAID_BYTES: usize = 4096;

/// What making a root needs.
pub struct Workshop<'a> {
    /// Where everything is kept.
    pub store: &'a Store,
    /// Where packages come from.
    pub archive: &'a Archive,
    /// Who runs the configuring machine.
    pub backend: &'a dyn Backend,
    /// What it boots.
    pub bundle: &'a Bundle,
    /// Its processors.
    pub cpus: u16,
}

impl Workshop<'_> {
    /// The root of `locked`: remembered, or made now.
    ///
    /// # Errors
    /// [`RootError`].
    pub fn debian(&self, locked: &LockedRoot, progress: &mut dyn FnMut(&str)) -> Result<Root, RootError> {
        let key = key(locked);
        let io = |what| move |source| RootError::Io { what, source };
        let spec: RootSpec = locked.spec.parse().unwrap_or_else(|_| RootSpec::Debian(locked.spec.clone()));
        let find = || -> Result<Option<Root>, RootError> {
            let Some(tree) = self.store.records("root").get::<Digest>(&key) else { return Ok(None) };
            let image =
                Image::open(self.store, &tree, Filesystem::Erofs).map_err(io("open a root's image"))?;
            let Some(image) = image else { return Ok(None) };
            catalog::note(self.store, &image, &spec, || Provenance::of_debian(locked, None))?;
            Ok(Some(Root::Image(image)))
        };
        if let Some(root) = find()? {
            return Ok(root);
        }
        // One kiln makes a root; others that need it wait and find it.
        let lock_path = self.store.lock_path("root", &key);
        let lock = std::fs::File::create(&lock_path).map_err(io("lock a root"))?;
        if lock.try_lock().is_err() {
            progress("waiting for another kiln that makes this root");
            lock.lock().map_err(io("lock a root"))?;
        }
        if let Some(root) = find()? {
            return Ok(root);
        }
        let total = total_bytes(&locked.packages);
        progress(&format!("fetching {} packages ({})", locked.packages.len(), show_bytes(total)));
        self.archive.fetch(locked, &|_| {})?;
        progress(&format!("unpacking {} packages", locked.packages.len()));
        let unpacked = self.archive.unpack(locked)?;
        let tree = self.configure(&unpacked, locked, progress)?;
        progress("writing the root's image");
        let image = Image::of_tree(self.store, &tree)?;
        catalog::keep_manifest(self.store, &tree)?;
        self.store.records("root").put(&key, &image.digest).map_err(io("remember a root"))?;
        let provenance = || Provenance::of_debian(locked, Some(self.bundle));
        catalog::note(self.store, &image, &spec, provenance)?;
        Ok(Root::Image(image))
    }

    fn configure(
        &self,
        unpacked: &Tree,
        locked: &LockedRoot,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Tree, RootError> {
        let lower = image::make(self.store, unpacked)?;
        let lower_path = image::path(self.store, &lower);
        progress(&format!("configuring {} packages in a machine: 0 done", locked.packages.len()));
        let mut machine = self.backend.start(self.spec(&lower_path)?)?;
        let wire = machine.wire()?;
        let tree =
            self.converse(wire, unpacked, locked, progress).map_err(|error| died(error, &mut *machine));
        drop(machine);
        let _ = std::fs::remove_file(lower_path);
        tree
    }

    fn spec(&self, lower: &std::path::Path) -> Result<Spec, RootError> {
        let io = |what| move |source| RootError::Io { what, source };
        let root = std::fs::File::open(lower).map_err(io("open the unpacked root"))?;
        let scratch =
            scratch::disk(&self.store.temporary(), SCRATCH_BYTES).map_err(io("make a scratch disk"))?;
        let root = Disk { serial: serial::ROOT.to_owned(), file: OwnedFd::from(root), read_only: true };
        Ok(Spec {
            kernel: self.store.blobs().path(&self.bundle.kernel),
            initramfs: self.store.blobs().path(&self.bundle.initramfs),
            bundle: self.bundle.digest(),
            memory_bytes: MEMORY_BYTES,
            cpus: self.cpus,
            shares: Vec::new(),
            disks: vec![root, scratch],
            carrier: Carrier::Serial,
            cpu: Cpu::Fixed,
            network: false,
            rehearsal: None,
        })
    }

    fn converse(
        &self,
        wire: std::os::unix::net::UnixStream,
        unpacked: &Tree,
        locked: &LockedRoot,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Tree, RootError> {
        let epoch = locked.source_date_epoch();
        let mut session = Session::open(wire, Duration::from_secs(120))?;
        let mut seed = [0; 64];
        // The scripts' random numbers are the same each time, as their clock is.
        for (byte, source) in seed.iter_mut().zip(Digest::of(b"root").as_bytes().iter().cycle()) {
            *byte = *source;
        }
        session.setup(Setup {
            seed,
            warm_up: false,
            clock: Clock { seconds: epoch, nanoseconds: 0 },
            root: Source::Disk {
                serial: serial::ROOT.to_owned(),
                filesystem: "erofs".to_owned(),
                read_only: true,
            },
            scratch: Some(Scratch { serial: serial::SCRATCH.to_owned(), bytes: SCRATCH_BYTES }),
            layer_bytes: SCRATCH_BYTES,
            processes: 0,
            mounts: Vec::new(),
            hostname: "kiln".to_owned(),
            load_modules: Vec::new(),
        })?;
        let mut environment = Environment::fixed();
        environment.set("SOURCE_DATE_EPOCH", epoch.to_string().as_bytes());
        let exec = Exec {
            id: 1,
            argv: [b"/bin/sh".to_vec(), b"-eu".to_vec(), b"-c".to_vec(), CONFIGURE_SCRIPT.into()].into(),
            env: environment.lines(),
            cwd: b"/".to_vec(),
            timeout_ms: u64::try_from(TIMEOUT.as_millis()).unwrap_or(u64::MAX),
            grace_ms: 5000,
            stdin: false,
            terminal: None,
        };
        let mut said = Vec::new();
        let mut done = 0;
        let end = session.exec(exec, None, &mut |stream, data| {
            if stream == Stream::Stdout {
                done +=
                    data.split(|&byte| byte == b'\n').filter(|line| line.starts_with(b"Setting up ")).count();
                progress(&format!(
                    "configuring {} packages in a machine: {done} done",
                    locked.packages.len()
                ));
            }
            said.extend_from_slice(data);
            let excess = said.len().saturating_sub(SAID_BYTES);
            said.drain(..excess);
            Ok(())
        })?;
        let how = match end {
            ExecEnd::Ran(Outcome::Exit(0), _) => None,
            ExecEnd::Ran(Outcome::Exit(code), _) => Some(format!("exit status {code}")),
            ExecEnd::Ran(Outcome::Signal(signal), _) => Some(format!("killed by signal {signal}")),
            ExecEnd::Ran(Outcome::TimedOut, _) => Some(format!("not done after {} s", TIMEOUT.as_secs())),
            ExecEnd::NotStarted { error, why } if why.is_empty() => Some(error.to_string()),
            ExecEnd::NotStarted { why, .. } => Some(why),
        };
        if let Some(how) = how {
            let said = crate::plan::harmless(&said);
            return Err(RootError::Configure { how, said });
        }
        let limits = Limits::default();
        let mut listing = Listing::receive(&mut session, b"/", &limits)?;
        let wanted: BTreeSet<u32> = listing
            .entries()
            .filter(|(path, _)| !is_volatile(path))
            .map(|(_, entry)| entry.ordinal)
            .collect();
        listing.fetch(&mut session, self.store.blobs(), &limits, &wanted)?;
        let (bytes, _) = listing.totals();
        progress(&format!("collected {} from the machine", show_bytes(bytes)));
        let mut tree = unpacked.clone().overlay(&layer(&listing))?;
        for (_, node) in tree.iter_mut() {
            if node.meta.mtime.seconds >= epoch {
                node.meta.mtime = Timestamp { seconds: epoch, nanoseconds: 0 };
            }
        }
        Ok(tree)
    }
}

/// A machine that died explains a closed conversation.
fn died(error: RootError, machine: &mut dyn Machine) -> RootError {
    match error {
        RootError::Session(SessionError::Closed)
        | RootError::Transfer(crate::agent::TransferError::Session(SessionError::Closed)) => {
            RootError::Died(machine.death(Duration::from_secs(5)))
        }
        other => other,
    }
}

/// What of a running system is no part of a root.
fn is_volatile(path: &TreePath) -> bool {
    let mut parts = path.components();
    let first = parts.next().unwrap_or_default();
    matches!(first, b"proc" | b"sys" | b"dev" | b"run" | b"tmp") && parts.next().is_some()
}

fn layer(listing: &Listing) -> Layer {
    let mut layer = Layer::new();
    for (path, entry) in listing.entries().filter(|(path, _)| !is_volatile(path)) {
        match &entry.kind {
            EntryKind::Whiteout => layer.whiteout(path.clone()),
            EntryKind::Directory { opaque: true } => layer.opaque(path.clone()),
            _ => {}
        }
        if let Some(node) = listing.node(entry.ordinal) {
            layer.insert(path.clone(), node);
        }
    }
    layer
}

fn key(locked: &LockedRoot) -> Digest {
    let mut text = format!("debian root {FORMAT} {}\n{CONFIGURE_SCRIPT}\n", locked.source_date_epoch());
    for package in &locked.packages {
        text.push_str(&format!("{}\n", package.sha256));
    }
    Digest::of(text.as_bytes())
}
