//! Templates: machines that booted until their agents were ready and were frozen then, with nothing of a step in them. A
//! step's machine is a copy of one.
//!
//! ```text
//! key ──▶ files::open ──▶ thaw ──▶ the copy's agent answers ──▶ a machine
//!            │ none, or damaged            │ the copy does not come up
//!            └──▶ make, under a lock ◀─────┘ once, with a note; after that the machine boots
//! ```
//!
//! Where copies map the template's memory, one that is nobody's goes their way first, as far as a rehearsal goes, and the pages that
//! it touched are kept as the template's working set ([`kiln_vmm::working_set`]).
//!
//! This is the same for every backend whose machines can be frozen ([`Freezer`]). A template's memory is a sparse file: a copy by
//! QEMU has its own in memory, and those by kiln's VMM share what they only read. Its state is what the backend knows
//! beside. What every copy has from its template was drawn before there was a step: layout of the kernel
//! and of the agent, no number of the step's. The agent is seeded and its clock set before anything of a step runs
//! (`Setup`), and each copy has another generation id, at which the kernel's generator starts afresh.

mod error;
mod files;
pub(super) mod greeting;
pub(super) mod key;
pub(super) mod ram;

use std::any::Any;
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::mem;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kiln_digest::Digest;
use kiln_vmm::working_set::WorkingSet;
use kiln_wire::{FromAgent, Scratch, ToAgent};

pub(super) use self::error::TemplateError;
pub(super) use self::files::Template;
use self::greeting::{Greeting, exchange, greet};
use super::ready::Lendable;
use super::slots::Places;
use super::{Carrier, Cpu, Disk, MachineError, Spec, drawn, in_full, scratch, serial};
use crate::shortage::Shortage;
use crate::writes;

/// How long a machine may take to boot before there is no template of it. An emulated one needs two seconds.
pub(super) const BOOT_PATIENCE: Duration = Duration::from_secs(60);
/// How long a copy's agent may take to answer. It needs a tenth of a second.
pub(super) const COPY_PATIENCE: Duration = Duration::from_secs(30);
/// How long to wait for another kiln that makes the same template.
const MAKING_PATIENCE: Duration = Duration::from_secs(120);
/// How often to look whether it is done.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How long a machine that does not answer may take to be gone.
const DEATH_PATIENCE: Duration = Duration::from_secs(2);
/// What a guest's clock may lack that counts the ticks of a timer.
const CLOCK_TICKS: Duration = Duration::from_millis(20);
/// How long no template is tried again after it could not be made or no copy of it came up, or there was no room to keep it: a file says so
/// for each.
const LEFT_ALONE: [(&str, Duration); 2] =
    [(files::BARREN, Duration::from_secs(600)), (files::FULL, Duration::from_secs(30))];

/// Room that is held while what it is for is written.
pub type Room = Box<dyn Any + Send>;

/// Asked for room for so many bytes before they are written.
type Reserve = Arc<dyn Fn(u64) -> io::Result<Room> + Send + Sync>;

/// A place for templates.
#[derive(Clone)]
pub struct Templates {
    folder: PathBuf,
    temporary: PathBuf,
    reserve: Reserve,
}

impl fmt::Debug for Templates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Templates").field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// A backend whose machines can be frozen, and go on as copies.
pub(super) trait Freezer {
    /// Its machines.
    type Machine: Lendable;

    /// Whether its copies have a use for their template's working set.
    const HAS_WORKING_SETS: bool = false;

    /// Where its templates are, if it has any.
    fn templates(&self) -> Option<&Templates>;

    /// What decides what is in the template for machines of `spec`.
    ///
    /// # Errors
    /// A program cannot be looked at.
    fn key(&self, spec: &Spec) -> io::Result<Digest>;

    /// Boots a machine of `spec`, which has nothing of a step in it, until it has [settled](settle), and freezes it: all but
    /// its memory goes to `state`.
    ///
    /// # Errors
    /// See [`TemplateError`].
    fn freeze(&self, spec: &Spec, state: File) -> Result<Frozen, TemplateError>;

    /// A machine of `spec` without its shares that goes on where `template` was frozen, and whose agent has answered.
    ///
    /// # Errors
    /// See [`TemplateError`].
    fn thaw(&self, template: &Template, spec: &Spec) -> Result<Self::Machine, TemplateError>;

    /// What a copy of `template` for `spec` touches until it has carried out `rehearsal`. It is made for that and thrown away.
    ///
    /// # Errors
    /// See [`TemplateError`]; that there is none.
    fn find_working_set(
        &self,
        _template: &Template,
        _spec: &Spec,
        _rehearsal: &[u8],
    ) -> Result<WorkingSet, TemplateError> {
        Err(TemplateError::Damaged("its copies have no use for a working set"))
    }
}

/// A machine that was frozen.
pub(super) struct Frozen {
    /// Its memory.
    pub ram: File,
    /// The version of the program that wrote its state.
    pub version: String,
    /// What its agent complained of.
    pub complaints: Vec<String>,
}

/// Whether a machine of `spec` can be the copy of a template. What the wire over vsock and machines within machines
/// need is not part of any, nor are disks beyond the slots.
pub(super) fn suits(spec: &Spec) -> bool {
    let has_what_templates_have = spec.carrier == Carrier::Serial && spec.cpu != Cpu::Nested && !spec.network;
    has_what_templates_have && Places::of(&spec.disks).fit_a_copy()
}

/// The machine of `spec` with nothing of a step in it.
fn blank(spec: &Spec) -> Spec {
    Spec {
        kernel: spec.kernel.clone(),
        initramfs: spec.initramfs.clone(),
        bundle: spec.bundle,
        memory_bytes: spec.memory_bytes,
        cpus: spec.cpus,
        shares: Vec::new(),
        disks: Vec::new(),
        carrier: spec.carrier,
        cpu: spec.cpu,
        network: spec.network,
        rehearsal: None,
    }
}

/// The machine of `spec` without its shares, and with a scratch disk of its own in `temporary`; none where it would write to
/// another disk.
fn stand_in(spec: &Spec, temporary: &Path) -> io::Result<Option<Spec>> {
    let mut disks = Vec::new();
    for disk in &spec.disks {
        if disk.read_only {
            let (serial, file) = (disk.serial.clone(), disk.file.try_clone()?);
            disks.push(Disk { serial, file, read_only: true });
        } else if disk.serial == serial::SCRATCH {
            disks.push(scratch::disk(temporary, disk.size()?)?);
        } else {
            return Ok(None);
        }
    }
    Ok(Some(Spec { disks, ..blank(spec) }))
}

impl Templates {
    /// Templates that are kept in `folder`, and made in `temporary`, a folder on the same file system.
    pub fn new(folder: PathBuf, temporary: PathBuf) -> Self {
        Self { folder, temporary, reserve: Arc::new(|_| Ok(Box::new(()))) }
    }

    /// The same, where `reserve` is asked for room for a template, in bytes, before it is written. What that refuses is not kept.
    #[must_use]
    pub fn with_room(self, reserve: impl Fn(u64) -> io::Result<Room> + Send + Sync + 'static) -> Self {
        Self { reserve: Arc::new(reserve), ..self }
    }

    /// A copy of the template for `spec`, which is made where there is none; it has no shares yet. Where there can be no
    /// copy, what the user should know of that.
    pub(super) fn copy<F: Freezer>(&self, freezer: &F, spec: &Spec) -> Result<F::Machine, Vec<String>> {
        let mut notes = Vec::new();
        let Ok(key) = freezer.key(spec) else { return Err(notes) };
        for _ in 0..2 {
            let mut template = match self.find_or_make(freezer, spec, &key, &mut notes) {
                Ok(template) => template,
                Err(TemplateError::Barren) => return Err(notes),
                Err(error) => {
                    notes.push(format!("there is no template, so the machine booted: {}", in_full(&error)));
                    return Err(notes);
                }
            };
            if F::HAS_WORKING_SETS && template.working_set.is_none() {
                template.working_set = self.find_working_set(freezer, spec, &key, &template);
            }
            match freezer.thaw(&template, spec) {
                Ok(mut machine) => {
                    machine.note(notes);
                    return Ok(machine);
                }
                Err(error) if error.is_hosts() => {
                    let why = in_full(&error);
                    notes.push(format!("no copy of a template came up, so the machine booted: {why}"));
                    return Err(notes);
                }
                Err(error) => {
                    let why = in_full(&error);
                    notes.push(format!("a template was thrown away, as no copy of it came up: {why}"));
                    self.discard(&key);
                }
            }
        }
        // The second was new: a third would cost every run as much, and fare no better.
        let _ = writes::create(&self.left_alone(&key, files::BARREN));
        Err(notes)
    }

    /// The file that says for a while why there is no template `key`.
    fn left_alone(&self, key: &Digest, why: &str) -> PathBuf {
        self.folder.join(format!("{key}.{why}"))
    }

    /// The working set of `template`, which is kept then; none where nobody says what is to be rehearsed, or another kiln is at it.
    /// Where it cannot be found it is one without pages, and nobody looks for it again.
    fn find_working_set<F: Freezer>(
        &self,
        freezer: &F,
        spec: &Spec,
        key: &Digest,
        template: &Template,
    ) -> Option<WorkingSet> {
        let rehearsal = spec.rehearsal.as_ref()?;
        let stand_in = stand_in(spec, &self.temporary).ok()??;
        let lock = writes::create(&self.lock_path(key)).ok()?;
        lock.try_lock().ok()?;
        let path = self.folder.join(key.to_string());
        let found = freezer.find_working_set(template, &stand_in, rehearsal);
        let set = found.unwrap_or_else(|_| WorkingSet::empty(spec.memory_bytes));
        // Where it cannot be kept, the next looks for it again.
        let _ = files::keep_working_set(&path, &set);
        Some(set)
    }

    fn find_or_make<F: Freezer>(
        &self,
        freezer: &F,
        spec: &Spec,
        key: &Digest,
        notes: &mut Vec<String>,
    ) -> Result<Template, TemplateError> {
        let path = self.folder.join(key.to_string());
        if let Ok(Some(template)) = files::open(&path, spec.memory_bytes) {
            return Ok(template);
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(TemplateError::io("make a folder for templates"))?;
        // One kiln makes a template; others that need it wait and find it.
        let lock = self.lock(key)?;
        match files::open(&path, spec.memory_bytes) {
            Ok(Some(template)) => return Ok(template),
            Ok(None) => {}
            Err(error) if error.is_hosts() => return Err(error),
            Err(error) => {
                notes.push(format!("a template was thrown away and made anew: {error}"));
                files::remove(&path, &self.temporary);
            }
        }
        let left_alone = |why: &str| self.left_alone(key, why);
        if LEFT_ALONE.iter().any(|(why, age)| files::is_younger(&left_alone(why), &lock, *age)) {
            return Err(TemplateError::Barren);
        }
        // Where there is no room at all nothing is booted for it.
        drop((self.reserve)(1).map_err(TemplateError::io("keep a template"))?);
        let mut made = self.make(freezer, spec, key, true);
        if let Err(why) = &made
            && why.is_chance()
        {
            // On a busy host QEMU has been seen to abort while its machine boots, and an emulated kernel to panic, not to load a
            // module, which every copy would lack, and to mistake the rate of its clock. Complaints that come again are so.
            notes.push(format!("the machine for a template was booted again: {}", in_full(why)));
            made = self.make(freezer, spec, key, false);
        }
        if let Err(error) = made {
            if !error.is_hosts() {
                let is_full = error.shortage() == Some(Shortage::Room);
                let _ = writes::create(&left_alone(if is_full { files::FULL } else { files::BARREN }));
            }
            return Err(error);
        }
        files::collect(&self.folder, &self.temporary, key);
        match files::open(&path, spec.memory_bytes)? {
            Some(template) => Ok(template),
            None => Err(TemplateError::Damaged("it is gone")),
        }
    }

    fn lock_path(&self, key: &Digest) -> PathBuf {
        self.folder.join(format!("{key}.lock"))
    }

    /// The lock under which the template `key` is made and thrown away; its file was written to just now.
    fn lock(&self, key: &Digest) -> Result<File, TemplateError> {
        let io = TemplateError::io;
        let lock = writes::create(&self.lock_path(key)).map_err(io("lock a template"))?;
        let give_up = Instant::now() + MAKING_PATIENCE;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < give_up => thread::sleep(LOOK_AGAIN),
                Err(TryLockError::WouldBlock) => return Err(TemplateError::Locked),
                Err(TryLockError::Error(source)) => return Err(io("lock a template")(source)),
            }
        }
        files::touch(&lock).map_err(io("lock a template"))?;
        Ok(lock)
    }

    /// Boots a machine, freezes it, and keeps it as the template `key`; not where its agent complains and it is to be `whole`.
    fn make<F: Freezer>(
        &self,
        freezer: &F,
        spec: &Spec,
        key: &Digest,
        whole: bool,
    ) -> Result<(), TemplateError> {
        let io = TemplateError::io;
        let folder = tempfile::Builder::new()
            .prefix("template-")
            .tempdir_in(&self.temporary)
            .map_err(io("make a folder for a template"))?;
        let state = files::new_state(folder.path()).map_err(io("make a file for a template's state"))?;
        let Frozen { ram, version, complaints } = freezer.freeze(&blank(spec), state)?;
        if whole && !complaints.is_empty() {
            return Err(TemplateError::Complained(complaints.join("; ")));
        }
        // What of its memory is not zero, and its state, which is small.
        let bytes = ram.metadata().map_err(io("keep a template"))?.blocks() * 512;
        let _room = (self.reserve)(bytes).map_err(io("keep a template"))?;
        files::write(folder.path(), &key.to_string(), &ram, &version).map_err(io("keep a template"))?;
        files::publish(folder, &self.folder.join(key.to_string())).map_err(io("keep a template"))
    }

    fn discard(&self, key: &Digest) {
        if let Ok(_lock) = self.lock(key) {
            files::remove(&self.folder.join(key.to_string()), &self.temporary);
        }
    }
}

/// Holds all of the template at `path` against its digests, its memory too.
///
/// # Errors
/// What is not as it was written.
pub fn verify(path: &Path) -> io::Result<()> {
    files::verify(path).map_err(io::Error::other)
}

/// A copy for `spec` with its shares, where it can be one. Where it cannot, what the user should know of that.
///
/// # Errors
/// The shares are to blame: a machine that boots would not have them either.
pub(super) fn copy<F: Freezer>(
    freezer: &F,
    spec: &Spec,
) -> Result<Result<F::Machine, Vec<String>>, MachineError> {
    match freezer.templates() {
        Some(templates) if suits(spec) => match templates.copy(freezer, spec) {
            Ok(mut machine) => machine.give(&spec.shares).map(|()| Ok(machine)),
            Err(notes) => Ok(Err(notes)),
        },
        _ => Ok(Err(Vec::new())),
    }
}

/// Waits for a machine that boots since `started`, and lets it do what is the same for every step. What its agent complained of is
/// returned: by its last answer, all that it had to say has been read.
pub(super) fn settle(machine: &mut impl Lendable, started: Instant) -> Result<Vec<String>, TemplateError> {
    let mut first = greeting(machine, BOOT_PATIENCE).map_err(|error| match error {
        TemplateError::Unheard(source) if source.kind() == io::ErrorKind::TimedOut => {
            TemplateError::Silent(BOOT_PATIENCE)
        }
        error => error,
    })?;
    let mut complaints = mem::take(&mut first.complaints);
    let scratch = Scratch { serial: serial::SCRATCH.to_owned(), bytes: scratch::USUAL_BYTES };
    let message =
        ToAgent::Settle { seed: drawn().map_err(TemplateError::io("draw a seed"))?, scratch }.encode();
    // Twice: the second answer says that nothing was swapped out meanwhile.
    for _ in 0..2 {
        complaints.extend(asked(machine, |wire| {
            exchange(wire, &message, COPY_PATIENCE, |message| *message == FromAgent::SetupDone)
        })?);
    }
    let last = greeting(machine, COPY_PATIENCE)?;
    check_clock(started, &first, &last)?;
    complaints.extend(last.complaints);
    Ok(complaints)
}

/// Holds the clock of a machine that was `started` then, as it showed itself in two greetings, against the host's.
fn check_clock(started: Instant, first: &Greeting, last: &Greeting) -> Result<(), TemplateError> {
    // What it can have counted since it was started at most, and since it first answered at least.
    let most = last.between.end.duration_since(started);
    let least = last.between.start.duration_since(first.between.end);
    let (uptime, counted) = (last.uptime, last.uptime.saturating_sub(first.uptime));
    if uptime > most + most / 10 || counted + CLOCK_TICKS < least - least / 10 {
        return Err(TemplateError::Untimely { most, least, uptime, counted });
    }
    Ok(())
}

/// Waits for the machine's agent to answer.
///
/// # Errors
/// It does not.
pub(super) fn answer(machine: &mut impl Lendable, patience: Duration) -> Result<(), TemplateError> {
    greeting(machine, patience).map(drop)
}

fn greeting(machine: &mut impl Lendable, patience: Duration) -> Result<Greeting, TemplateError> {
    asked(machine, |wire| greet(wire, patience))
}

/// Lets the machine's agent carry out `rehearsal`, a message.
pub(super) fn rehearse(machine: &mut impl Lendable, rehearsal: &[u8]) -> Result<(), TemplateError> {
    asked(machine, |wire| greeting::rehearse(wire, rehearsal, COPY_PATIENCE))
}

fn asked<T>(
    machine: &mut impl Lendable,
    ask: impl FnOnce(&UnixStream) -> io::Result<T>,
) -> Result<T, TemplateError> {
    let Some(wire) = machine.wire_held() else {
        return Err(TemplateError::Damaged("its wire is not there"));
    };
    match ask(wire) {
        Ok(told) => Ok(told),
        Err(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
            Err(TemplateError::Died(machine.death(DEATH_PATIENCE)))
        }
        Err(source) => Err(TemplateError::Unheard(source)),
    }
}

#[cfg(test)]
mod tests {
    use kiln_virtio::fs::record::Record;

    use super::*;
    use crate::machine::{Death, Failure, Identity, Machine, Share};

    /// A machine that there is none of.
    enum Never {}

    impl Machine for Never {
        fn identity(&self) -> &Identity {
            match *self {}
        }

        fn wire(&mut self) -> Result<UnixStream, MachineError> {
            match *self {}
        }

        fn observed(&mut self) -> Result<Record, MachineError> {
            match *self {}
        }

        fn observed_so_far(&mut self) -> Result<Record, MachineError> {
            match *self {}
        }

        fn death(&mut self, _: Duration) -> Death {
            match *self {}
        }

        fn console(&self) -> String {
            match *self {}
        }
    }

    impl Lendable for Never {
        fn wire_held(&self) -> Option<&UnixStream> {
            match *self {}
        }

        fn control_socket(&self) -> Option<&UnixStream> {
            match *self {}
        }

        fn stop(&mut self) {
            match *self {}
        }

        fn note(&mut self, _: Vec<String>) {
            match *self {}
        }

        fn give(&mut self, _: &[Share]) -> Result<(), MachineError> {
            match *self {}
        }
    }

    /// Machines that can be frozen unless there is an error for it, and whose copies fail with another.
    struct Failing {
        freezing: Option<fn() -> TemplateError>,
        thawing: fn() -> TemplateError,
    }

    impl Freezer for Failing {
        type Machine = Never;

        fn templates(&self) -> Option<&Templates> {
            None
        }

        fn key(&self, _: &Spec) -> io::Result<Digest> {
            Ok(Digest::of(b"a template"))
        }

        fn freeze(&self, spec: &Spec, mut state: File) -> Result<Frozen, TemplateError> {
            if let Some(error) = self.freezing {
                return Err(error());
            }
            io::Write::write_all(&mut state, b"state").map_err(TemplateError::io("write"))?;
            let ram = kiln_virtio::ram::new(spec.memory_bytes).map_err(TemplateError::io("make"))?;
            Ok(Frozen { ram, version: "1".to_owned(), complaints: Vec::new() })
        }

        fn thaw(&self, _: &Template, _: &Spec) -> Result<Never, TemplateError> {
            Err((self.thawing)())
        }
    }

    #[test]
    fn a_template_that_there_is_no_room_for_is_not_written() {
        let place = tempfile::tempdir().expect("a folder");
        let templates = Templates::new(place.path().join("templates"), place.path().to_owned())
            // Not for all of it.
            .with_room(|bytes| match bytes {
                1 => Ok(Box::new(())),
                bytes => Err(io::Error::other(format!("no room for {bytes} bytes"))),
            });
        let freezer = Failing { freezing: None, thawing: damaged };
        let notes = templates.copy(&freezer, &nobodys()).err().expect("no copy");
        assert!(notes.iter().any(|note| note.contains("no room for 0 bytes")), "{notes:?}");
        assert!(!place.path().join("templates").join(Digest::of(b"a template").to_string()).exists());
    }

    fn nobodys() -> Spec {
        Spec {
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            bundle: Digest::of(b"a bundle"),
            memory_bytes: 1 << 20,
            cpus: 1,
            shares: Vec::new(),
            disks: Vec::new(),
            carrier: Carrier::Serial,
            cpu: Cpu::Fixed,
            network: false,
            rehearsal: None,
        }
    }

    /// Which of the template and the words that there can be none and that there was no room are left after a copy was
    /// wanted, in this order.
    fn left_by(freezing: Option<fn() -> TemplateError>, thawing: fn() -> TemplateError) -> [bool; 3] {
        let place = tempfile::tempdir().expect("a folder");
        let templates = Templates::new(place.path().join("templates"), place.path().to_owned());
        let notes = templates.copy(&Failing { freezing, thawing }, &nobodys()).err().expect("no copy");
        assert!(!notes.is_empty());
        let path = place.path().join("templates").join(Digest::of(b"a template").to_string());
        [path.is_dir(), path.with_extension("barren").exists(), path.with_extension("full").exists()]
    }

    fn full() -> TemplateError {
        TemplateError::io("keep a template")(rustix::io::Errno::NOSPC.into())
    }

    fn refused_by_the_ceiling() -> TemplateError {
        let source = io::Error::new(io::ErrorKind::StorageFull, "the store may hold 1 MiB");
        TemplateError::io("keep a template")(source)
    }

    fn refused() -> TemplateError {
        MachineError::Kvm(rustix::io::Errno::ACCESS.into()).into()
    }

    fn busy() -> TemplateError {
        let said = "KVM does not make a machine: Device or resource busy (os error 16)".to_owned();
        TemplateError::Died(Death::Failed(Failure { said, hint: None, is_hosts: true }))
    }

    fn damaged() -> TemplateError {
        let said = "KVM does not take all of a processor's state: Invalid argument (os error 22)".to_owned();
        TemplateError::Died(Death::Failed(Failure { said, hint: None, is_hosts: false }))
    }

    #[test]
    fn a_host_that_lost_kvm_keeps_its_templates_and_makes_them_when_it_is_back() {
        for error in [refused, busy] {
            assert_eq!(left_by(None, error), [true, false, false], "{}", error());
            assert_eq!(left_by(Some(error), damaged), [false, false, false], "{}", error());
        }
        assert_eq!(left_by(None, damaged), [false, true, false]);
        assert_eq!(left_by(Some(damaged), damaged), [false, true, false]);
        for error in [full, refused_by_the_ceiling] {
            assert_eq!(left_by(Some(error), damaged), [false, false, true]);
        }
    }

    #[test]
    fn a_machine_whose_clock_goes_wrong_is_not_frozen() {
        let started = Instant::now();
        let after = |ms| started + Duration::from_millis(ms);
        let greeting = |uptime, between| Greeting {
            complaints: Vec::new(),
            uptime: Duration::from_millis(uptime),
            between,
        };
        let check = |first, last| {
            let (first, last) =
                (greeting(first, started..after(2000)), greeting(last, after(2400)..after(2500)));
            check_clock(started, &first, &last)
        };
        // Between what the host saw of it, and a timer's ticks behind that.
        for (first, last) in [(1500, 1950), (2000, 2500), (900, 1260)] {
            assert!(check(first, last).is_ok(), "{first} {last}");
        }
        for (first, last, words) in
            [(28_000, 36_000, "36.0s at most 2.5s"), (1800, 1900, "100.0ms more at least 400.0ms")]
        {
            let error = check(first, last).expect_err("another rate");
            assert!(error.to_string().contains(words) && error.is_chance(), "{error}");
        }
    }

    #[test]
    fn what_the_host_lacks_says_nothing_about_a_template() {
        let of_ours = io::Error::from_raw_os_error(rustix::io::Errno::NOMEM.raw_os_error());
        assert!(TemplateError::from(MachineError::io("start QEMU")(of_ours)).is_hosts());
        let killed = |said: &str| {
            let (program, status) = ("qemu-system-x86_64".into(), "exit status: 1".to_owned());
            TemplateError::Died(Death::Killed { program, status, said: said.to_owned() })
        };
        assert!(killed("cannot set up guest memory 'ram': Cannot allocate memory").is_hosts());
        assert!(killed("ioctl(KVM_CREATE_VM) failed: 16 Device or resource busy").is_hosts());
        assert!(!killed("Unknown savevm section").is_hosts());
        assert!(!TemplateError::Damaged("its state is damaged").is_hosts());
    }
}
