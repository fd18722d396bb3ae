//! The registry: one folder of a store, in which every machine of that store has a place.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;

use kiln_digest::Digest;

use super::door::{Door, DoorError};
use super::entry::{Entry, State, VERSION_OF_KILN, is_name, is_name_of_ready};
use super::place::{self, Place};
use super::ready::{Caller, Loan};
use super::registration::{Mode, Registration};

/// Why the registry cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Its folder cannot be made, read or written.
    #[error("the registry of machines `{path}` cannot be used")]
    Io {
        /// The folder.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Others could put machines into it.
    #[error("the registry of machines `{0}` is another user's, or open to others")]
    NotPrivate(PathBuf),
}

/// The folder.
#[derive(Debug, Clone)]
pub struct Registry {
    path: PathBuf,
}

impl Registry {
    /// The registry below `run`, made (mode 0700) where it is missing. What dead owners left is swept.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn open(run: &Path) -> Result<Self, RegistryError> {
        let path = run.join("machines");
        let fail = |source| RegistryError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(fail)?;
        let meta = fs::symlink_metadata(&path).map_err(fail)?;
        let is_ours = meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw();
        if !is_ours || meta.permissions().mode() & 0o077 != 0 {
            return Err(RegistryError::NotPrivate(path));
        }
        let registry = Self { path };
        for name in registry.names()? {
            place::sweep(&registry.path, &name).map_err(|source| registry.error(source))?;
        }
        Ok(registry)
    }

    fn error(&self, source: io::Error) -> RegistryError {
        RegistryError::Io { path: self.path.clone(), source }
    }

    /// What lies in the folder.
    fn names(&self) -> Result<Vec<String>, RegistryError> {
        let mut names = Vec::new();
        for found in fs::read_dir(&self.path).map_err(|source| self.error(source))? {
            names.extend(found.map_err(|source| self.error(source))?.file_name().into_string());
        }
        Ok(names)
    }

    /// The entries of those of `names` whose owners live, the oldest first.
    fn entries(&self, names: impl Iterator<Item = String>) -> Result<Vec<Entry>, RegistryError> {
        let mut entries = Vec::new();
        for name in names {
            entries.extend(place::look(&self.path, &name).map_err(|source| self.error(source))?);
        }
        entries.sort_by(|a, b| (a.started, &a.name).cmp(&(b.started, &b.name)));
        Ok(entries)
    }

    /// All machines whose owners live, the oldest first.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub fn machines(&self) -> Result<Vec<Entry>, RegistryError> {
        self.entries(self.names()?.into_iter())
    }

    /// Registers a machine of this process; its name is in the registration's entry. `stop` is called where somebody
    /// wants it to end while its step runs.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub fn register(
        &self,
        mut entry: Entry,
        stop: impl Fn() + Send + 'static,
    ) -> Result<Registration, RegistryError> {
        let fail = |source| RegistryError::Io { path: self.path.clone(), source };
        let (place, listener) = Place::take(&self.path, &mut entry).map_err(fail)?;
        Registration::open(place, entry, listener, Mode::Running(Box::new(stop))).map_err(fail)
    }

    /// Registers a machine of this process that waits for a step; `callers` hears of whoever comes.
    ///
    /// # Errors
    /// [`RegistryError::Io`].
    pub(super) fn register_ready(
        &self,
        mut entry: Entry,
        callers: Sender<Caller>,
    ) -> Result<Registration, RegistryError> {
        let fail = |source| RegistryError::Io { path: self.path.clone(), source };
        let (place, listener) = Place::take(&self.path, &mut entry).map_err(fail)?;
        Registration::open(place, entry, listener, Mode::Ready(Some(callers))).map_err(fail)
    }

    /// Borrows a machine that is ready for steps of this key; none where there is none that answers soon. One whose
    /// holder is silent is ended, or every run would wait for it.
    pub fn borrow(&self, key: &Digest) -> Option<Loan> {
        let ready = self.ready().into_iter().filter(|entry| entry.key.as_ref() == Some(key));
        ready.filter_map(|entry| Door::open_soon(&self.path, entry).ok()?.borrow().ok()).next()
    }

    /// The memory that the machines that wait for a step may grow to.
    pub(super) fn promised_bytes(&self) -> u64 {
        self.ready().iter().map(|entry| entry.memory_bytes).fold(0, u64::saturating_add)
    }

    /// The machines that wait for a step, the oldest first. They are told by their names, so that a keeper never reads
    /// the command of a step.
    fn ready(&self) -> Vec<Entry> {
        let names = self.names().unwrap_or_default().into_iter().filter(|name| is_name_of_ready(name));
        let machines = self.entries(names).unwrap_or_default();
        machines.into_iter().filter(|entry| entry.state == State::Ready).collect()
    }

    /// Makes room for a machine that is ready for steps of this key, where there may be `alike` of the key and `most` in
    /// all: those of other versions of kiln go, then the oldest. Whether there is room: not beside so many of the key.
    pub(super) fn make_room(&self, key: &Digest, alike: usize, most: usize) -> bool {
        let mut ready = self.ready();
        if ready.iter().filter(|entry| entry.key.as_ref() == Some(key)).count() >= alike {
            return false;
        }
        let mut stop = |entry: Entry| {
            let _ = Door::open_soon(&self.path, entry).and_then(Door::stop);
        };
        let (ours, others): (Vec<_>, Vec<_>) =
            ready.drain(..).partition(|entry| entry.kiln == VERSION_OF_KILN);
        others.into_iter().for_each(&mut stop);
        let too_many = (ours.len() + 1).saturating_sub(most);
        ours.into_iter().take(too_many).for_each(stop);
        true
    }

    /// Goes to the machine `name`.
    ///
    /// # Errors
    /// [`DoorError`].
    pub fn door(&self, name: &str) -> Result<Door, DoorError> {
        let io = |source| DoorError::Io { name: name.to_owned(), source };
        let entry = match is_name(name) {
            true => place::look(&self.path, name).map_err(io)?,
            false => None,
        };
        let Some(entry) = entry else {
            let known = self.machines().unwrap_or_default().into_iter().map(|entry| entry.name).collect();
            return Err(DoorError::Unknown { name: name.to_owned(), known });
        };
        Door::open(&self.path, entry)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc::channel;
    use std::thread;

    use super::super::talk::{Answer, say};
    use super::*;
    use crate::machine::jail::Held;
    use crate::machine::{Accelerator, Identity, Origin};

    fn entry() -> Entry {
        let identity = Identity {
            backend: "x 1.0".into(),
            accelerator: Accelerator::Tcg,
            jail: Held::default(),
            origin: Origin::Boot,
        };
        Entry::running("run", &[b"make".to_vec()], 1 << 30, 2, &identity)
    }

    fn names(registry: &Registry) -> Vec<String> {
        registry.machines().expect("a folder").into_iter().map(|entry| entry.name).collect()
    }

    #[test]
    fn a_machine_is_there_as_long_as_its_registration() {
        let run = tempfile::tempdir().expect("a folder");
        let registry = Registry::open(run.path()).expect("a registry");
        let one = registry.register(entry(), || {}).expect("registered");
        let two = registry.register(entry(), || {}).expect("registered");
        let (first, second) = (one.entry().name.clone(), two.entry().name.clone());
        assert_ne!(first, second);
        // Another kiln that opens it sweeps nothing of theirs.
        assert_eq!(names(&Registry::open(run.path()).expect("again")).len(), 2);
        drop(one);
        assert_eq!(names(&registry), [second]);
        drop(two);
        assert_eq!(fs::read_dir(run.path().join("machines")).expect("a folder").count(), 0);
        assert!(matches!(registry.door(&first), Err(DoorError::Unknown { known, .. }) if known.is_empty()));
    }

    #[test]
    fn whoever_registers_while_others_sweep_has_a_place() {
        let run = tempfile::tempdir().expect("a folder");
        Registry::open(run.path()).expect("a registry");
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let registry = Registry::open(run.path()).expect("it sweeps");
                        let one = registry.register(entry(), || {}).expect("registered");
                        assert!(names(&registry).contains(&one.entry().name));
                    }
                });
            }
        });
    }

    #[test]
    fn what_the_dead_left_is_swept_whatever_it_is() {
        let run = tempfile::tempdir().expect("a folder");
        let registry = Registry::open(run.path()).expect("a registry");
        let live = registry.register(entry(), || {}).expect("registered");
        for (name, text) in
            [("make-dead", "{}"), (".new-half", ""), ("make-json", "{\"name\":1}"), ("UPPER", "")]
        {
            let folder = run.path().join("machines").join(name);
            fs::create_dir(&folder).expect("a folder");
            fs::write(folder.join("entry.json"), text).expect("room");
        }
        assert_eq!(names(&registry), [live.entry().name.clone()]);
        assert_eq!(fs::read_dir(run.path().join("machines")).expect("a folder").count(), 1);
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_no_registry() {
        let run = tempfile::tempdir().expect("a folder");
        Registry::open(run.path()).expect("a registry");
        let path = run.path().join("machines");
        for mode in [0o770, 0o701, 0o777] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("it is ours");
            assert!(matches!(Registry::open(run.path()), Err(RegistryError::NotPrivate(_))), "{mode:o}");
        }
        fs::remove_dir(&path).expect("it is empty");
        std::os::unix::fs::symlink("/tmp", &path).expect("a link");
        assert!(Registry::open(run.path()).is_err());
    }

    /// One that waits for steps of a key.
    fn ready(key: &Digest) -> Entry {
        Entry { state: State::Ready, key: Some(*key), ..entry() }
    }

    #[test]
    fn a_machine_that_a_step_has_taken_is_not_ended_by_whoever_took_it_for_ready() {
        let run = tempfile::tempdir().expect("a folder");
        let registry = Registry::open(run.path()).expect("a registry");
        let key = Digest::of(b"key");
        let (sender, callers) = channel();
        let registration = registry.register_ready(ready(&key), sender).expect("registered");
        let borrowing = registry.clone();
        let borrower = thread::spawn(move || borrowing.borrow(&key).is_some());
        let Ok(Caller::Borrower(stream)) = callers.recv() else { panic!("nobody borrows it") };
        let stopped = registry.door(&registration.entry().name).expect("it is there").stop();
        assert!(
            matches!(&stopped, Err(DoorError::Refused { why, .. }) if why.contains("a step has it")),
            "{stopped:?}"
        );
        assert!(callers.try_recv().is_err(), "it was told to end");
        say(&stream, &Answer::Refused(String::new())).expect("it listens");
        assert!(!borrower.join().expect("no panic"));
    }

    #[test]
    fn there_is_room_for_as_many_machines_of_a_key_as_are_wanted() {
        let run = tempfile::tempdir().expect("a folder");
        let registry = Registry::open(run.path()).expect("a registry");
        let [key, other] = [&b"key"[..], b"other"].map(Digest::of);
        let (sender, _callers) = channel();
        let _first = registry.register_ready(ready(&key), sender.clone()).expect("registered");
        assert!(!registry.make_room(&key, 1, 4));
        assert!(registry.make_room(&key, 2, 4) && registry.make_room(&other, 1, 4));
        let _second = registry.register_ready(ready(&key), sender).expect("registered");
        assert!(!registry.make_room(&key, 2, 4));
        assert_eq!(registry.promised_bytes(), 2 << 30);
    }

    #[test]
    fn of_those_that_want_one_at_once_one_has_it_and_the_others_do_not_wait() {
        let run = tempfile::tempdir().expect("a folder");
        let registry = Registry::open(run.path()).expect("a registry");
        let key = Digest::of(b"key");
        let (sender, callers) = channel();
        let _ready = registry.register_ready(ready(&key), sender).expect("registered");
        let borrowers: Vec<_> = (0..8)
            .map(|_| {
                let registry = registry.clone();
                thread::spawn(move || registry.borrow(&key).is_some())
            })
            .collect();
        let Ok(Caller::Borrower(stream)) = callers.recv() else { panic!("nobody borrows it") };
        // Soon: whoever lends and is silent is ended.
        say(&stream, &Answer::Refused(String::new())).expect("it listens");
        for borrower in borrowers {
            assert!(!borrower.join().expect("no panic"));
        }
        assert!(callers.try_recv().is_err(), "it was promised twice");
    }

    #[test]
    fn a_machine_of_another_version_of_kiln_goes_when_one_of_this_version_comes() {
        let run = tempfile::tempdir().expect("a folder");
        let registry = Registry::open(run.path()).expect("a registry");
        let [theirs, ours] = [&b"theirs"[..], b"ours"].map(Digest::of);
        let ((sender, callers), (kept_sender, kept_callers)) = (channel(), channel());
        let old = Entry { kiln: "0.0.1".to_owned(), ..ready(&theirs) };
        let old = registry.register_ready(old, sender).expect("registered");
        let kept = registry.register_ready(ready(&ours), kept_sender).expect("registered");
        let making = registry.clone();
        // It waits for the process that held the machine, which is this one.
        let _maker = thread::spawn(move || making.make_room(&ours, 2, 4));
        assert!(matches!(callers.recv(), Ok(Caller::Stop)));
        drop(old);
        assert_eq!(names(&registry), [kept.entry().name.clone()]);
        let told = kept_callers.recv_timeout(std::time::Duration::from_millis(200));
        assert!(told.is_err(), "one of this version was told to end");
    }

    #[test]
    fn a_socket_that_is_another_users_gets_nothing() {
        if !rustix::process::geteuid().is_root() {
            // Nobody else can be played.
            return;
        }
        let run = tempfile::tempdir().expect("a folder");
        let registry = Registry::open(run.path()).expect("a registry");
        let key = Digest::of(b"key");
        let (sender, callers) = channel();
        let registration = registry.register_ready(ready(&key), sender).expect("registered");
        let name = registration.entry().name.clone();
        let open = tempfile::tempdir().expect("a folder");
        fs::set_permissions(open.path(), fs::Permissions::from_mode(0o777)).expect("it is ours");
        let theirs = open.path().join("socket");
        let path = theirs.clone();
        // The credentials of a thread, as the system has them.
        let listener = thread::spawn(move || {
            let nobody = rustix::fs::Uid::from_raw(65534);
            rustix::thread::set_thread_uid(nobody).expect("root may");
            UnixListener::bind(path).expect("everybody may")
        });
        let _listener = listener.join().expect("no panic");
        fs::rename(theirs, run.path().join("machines").join(&name).join("socket")).expect("one file system");
        assert!(registry.borrow(&key).is_none());
        assert!(matches!(registry.door(&name), Err(DoorError::NotOurs { .. })));
        assert!(callers.try_recv().is_err());
    }

    #[test]
    fn a_place_too_deep_for_a_socket_s_address_will_do() {
        let run = tempfile::tempdir().expect("a folder");
        let deep = run.path().join("d".repeat(120)).join("e".repeat(120));
        fs::create_dir_all(&deep).expect("folders");
        let registry = Registry::open(&deep).expect("a registry");
        let one = registry.register(entry(), || {}).expect("registered");
        let refused = registry.door(&one.entry().name).expect("it answers").enter().expect_err("it runs");
        assert!(
            matches!(&refused, DoorError::Refused { why, .. } if why.contains("still runs")),
            "{refused}"
        );
    }
}
