//! What a run needs of this host: a backend, a boot bundle and a root, found or made.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_digest::Digest;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::build::sources::Permission;
use super::step::Step;
use crate::apart::{self, Kept, Overlap};
use crate::cache::LOCKED;
use crate::fetch::http::{AuthorityError, Client};
use crate::fetch::lock::{Lock, LockError, LockedRoot, VERSION as LOCK_VERSION};
use crate::keeper::Registry;
use crate::machine::jail::attempt::Targets;
use crate::machine::jail::{Held, Profile};
use crate::machine::probe::{self, Cause, Verdict};
use crate::machine::qemu::Qemu;
use crate::machine::template::{Room, Templates};
use crate::machine::vmm::KilnVmm;
use crate::machine::{Accelerator, Carrier, MachineError, program};
use crate::plan::RootSpec;
use crate::root::bundle::{self, Bundle, BundleError};
use crate::root::debian::{Archive, ArchiveError, ArchiveSettings, DebianSpec};
use crate::root::toolbox::{self, ToolboxError};
use crate::root::{self, Root, RootError, Workshop};
use crate::settings::{BackendChoice, Settings};
use crate::store::{Store, StoreError};

/// Why this host cannot do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The certificate authorities that are trusted.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Debian's archive.
    #[error(transparent)]
    Debian(#[from] ArchiveError),
    /// The root.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The toolbox.
    #[error(transparent)]
    Toolbox(#[from] ToolboxError),
    /// What would be kept in the store shows signing keys.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// There is no agent to boot.
    #[error("{}", no_agent(.named.as_deref()))]
    NoAgent {
        /// What KILN_AGENT names.
        named: Option<PathBuf>,
    },
    /// It would have to be locked.
    #[error("{what} is not in the lock file `{path}`, and {flag} refuses anything else")]
    NotLocked {
        /// What would be.
        what: String,
        /// The lock file.
        path: PathBuf,
        /// What refuses it.
        flag: &'static str,
    },
    /// The lock has other packages for a root than its name says.
    #[error("the lock file `{path}` has no {package} in {spec}")]
    Contradiction {
        /// The lock file.
        path: PathBuf,
        /// The root.
        spec: String,
        /// What its name says.
        package: String,
    },
    /// The lock cannot be written where it is.
    #[error("the lock file `{path}` cannot be written")]
    LockFolder {
        /// The lock file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A step asks for the network, and is not to have it.
    #[error("step `{step}` asks for the network, which {}", if *offline { "--offline shuts" } else { "a recipe does not have by itself" })]
    Network {
        /// The step.
        step: String,
        /// Whether nobody is to have it.
        offline: bool,
    },
    /// A boundary that was demanded is not there.
    #[error("{demand} was demanded, and this host does not give it: {why}")]
    Boundary {
        /// `--require kvm`, `--untrusted`, …
        demand: &'static str,
        /// What is missing.
        why: String,
        /// How to get it, where that is known.
        fix: Option<&'static str>,
    },
}

fn no_agent(named: Option<&Path>) -> String {
    match named {
        Some(path) => format!("there is no agent at `{}`, which KILN_AGENT names", path.display()),
        None => "the agent was not found beside kiln, in ../libexec/kiln or by KILN_AGENT".to_owned(),
    }
}

impl HostError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Machine(error) => error.hint(),
            Self::NoAgent { .. } => Some(program::HINT.to_owned()),
            Self::Boundary { fix: Some(fix), .. } => {
                Some(format!("{fix}; `kiln doctor` says whether it is there then"))
            }
            Self::Boundary { .. } => Some("`kiln doctor` says what is missing and how to get it".to_owned()),
            Self::Network { offline: true, .. } => None,
            Self::Network { .. } => Some(
                "--net full lets it have this host's: what it does is then no longer decided by what kiln records"
                    .to_owned(),
            ),
            Self::Lock(error) => error.hint(),
            Self::NotLocked { .. } => Some(
                "lock it where there is a network, with `kiln lock update` or by building once, and keep the lock file"
                    .to_owned(),
            ),
            Self::Contradiction { spec, .. } => Some(format!("lock it anew: `kiln lock update {spec}`")),
            Self::LockFolder { .. } => Some("name another place with --lock FILE or KILN_LOCK".to_owned()),
            Self::Debian(error) => error.hint(),
            Self::Root(error) => error.hint(),
            Self::Store(error) => error.hint(),
            Self::Authority(error) => error.hint(),
            Self::Toolbox(error) => error.hint(),
            Self::Overlap(overlap) => Some(overlap.hint().to_owned()),
            Self::Bundle(_) => None,
        }
    }
}

/// A property of the boundary that a run can demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Require {
    /// Hardware virtualisation.
    Kvm,
    /// A jail around every process of the machine.
    Jail,
}

/// What a run demands of the boundary around its machine.
#[derive(Debug, Clone, Default)]
pub struct Boundary {
    /// What was demanded by name.
    pub require: Vec<Require>,
    /// Whether the work is not trusted: all of it is demanded.
    pub untrusted: bool,
}

/// Which kernel machines boot.
#[derive(Debug, Clone)]
pub enum KernelChoice {
    /// Debian's cloud kernel of this suite.
    Debian(String),
    /// A file, and a folder of modules.
    File {
        /// vmlinux or bzImage.
        kernel: PathBuf,
        /// Module tree.
        modules: Option<PathBuf>,
    },
    /// A blob of the store.
    Blob {
        /// The kernel.
        kernel: Digest,
        /// Manifest of the tree that has its modules.
        modules: Option<Digest>,
    },
}

/// This host, as the settings describe it.
pub struct Host {
    /// The settings.
    pub settings: Settings,
    /// The store.
    pub store: Store,
    client: Client,
    archive: Archive,
    /// Why KVM cannot be used, where it could be since this host booted.
    lost_kvm: OnceLock<String>,
    /// Whether the user was told.
    has_said_so: AtomicBool,
}

/// How long it is believed that the probe came to no end: the host may have been busy.
const HANG_SECONDS: u64 = 600;

/// The probe's verdict is good for one boot of the host and one kiln.
#[derive(Serialize, Deserialize)]
struct Remembered {
    verdict: Verdict,
    /// When it was found, seconds since 1970.
    #[serde(default)]
    found: i64,
}

/// What of the jail this host grants the processes of a machine, `qemu`'s or kiln's own VMM's, found out by locking some in.
///
/// # Errors
/// None can be locked in.
pub fn jail_of(qemu: &Qemu) -> io::Result<Held> {
    let targets = Targets::new()?;
    let others = targets.held(&Profile::Devices)?.both(&targets.held(&Profile::Vmm)?);
    Ok(targets.held(&qemu.profile(Vec::new(), false))?.both(&others))
}

/// Whether `step`, which asks for the network, may have it.
///
/// # Errors
/// [`HostError::Network`].
pub(super) fn network_of(settings: &Settings, step: &str) -> Result<(), HostError> {
    match (settings.network, settings.offline.value) {
        (true, false) => Ok(()),
        (_, offline) => Err(HostError::Network { step: step.to_owned(), offline }),
    }
}

impl Host {
    /// Opens the store; nothing else is touched until it is needed.
    ///
    /// # Errors
    /// [`HostError::Store`], [`HostError::Authority`].
    pub fn open(settings: Settings) -> Result<Self, HostError> {
        let store = Store::open(&settings.store.value)?;
        if let Some(limit_bytes) = settings.store_limit.value {
            crate::upkeep::collect::set_limit(&store, limit_bytes)?;
        }
        // Sweeps what killed kilns left. Whoever needs the registry hears of what is wrong with it.
        let _ = Registry::open(&store.run());
        let mut client = match &settings.ca_file.value {
            Some(path) => Client::trusting(path)?,
            None => Client::new(),
        };
        if let Some(path) = &settings.vendor.value {
            client = client.with_vendor(path);
        }
        if settings.offline.value {
            client = client.offline();
        }
        let archive = Archive::new(
            ArchiveSettings {
                mirror: settings.debian_mirror.value.clone(),
                security_mirror: settings.debian_security_mirror.value.clone(),
                snapshot: settings.debian_snapshot.value.clone(),
                keyring: settings.debian_keyring.value.clone(),
                allow_expired: settings.debian_allow_expired,
                ..ArchiveSettings::default()
            },
            client.clone(),
            &store,
            crate::clock::timestamp(),
        );
        Ok(Self {
            settings,
            store,
            client,
            archive,
            lost_kvm: OnceLock::new(),
            has_said_so: AtomicBool::new(false),
        })
    }

    /// What the code-running probe says about KVM, remembered until the host boots again. That it can be used is believed
    /// only as long as its device can be opened, and that it came to no end for ten minutes.
    pub fn kvm(&self, afresh: bool) -> Verdict {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let key = Digest::of(format!("kvm-probe 2 {boot} {}", env!("CARGO_PKG_VERSION")).as_bytes());
        let records = self.store.records("probe");
        let now_seconds = crate::clock::timestamp().as_second();
        let is_old = |found: i64| now_seconds.saturating_sub(found).unsigned_abs() > HANG_SECONDS;
        let remembered = records
            .get(&key)
            .filter(|remembered: &Remembered| !(remembered.verdict.has_hung() && is_old(remembered.found)));
        if !afresh && let Some(Remembered { verdict, .. }) = remembered {
            if !verdict.is_usable() || probe::open().is_ok() {
                return verdict;
            }
            let now = probe::probe();
            if !now.is_usable() {
                let _ = self.lost_kvm.set(now.to_string());
            }
            return now;
        }
        let verdict = probe::probe();
        // A device that could not be opened may be granted in a minute; figures stay.
        if !matches!(verdict, Verdict::Absent { .. }) {
            let _ = records.put(&key, &Remembered { verdict: verdict.clone(), found: now_seconds });
        }
        verdict
    }

    /// What the user should know, once, where KVM could be used since this host booted and was found not to be now.
    pub fn lost_kvm(&self) -> Option<String> {
        let why = self.lost_kvm.get().filter(|_| !self.has_said_so.swap(true, Ordering::Relaxed))?;
        Some(format!("this host had KVM that can be used, and has none now: {why}"))
    }

    /// Chooses accelerator and program by the settings, and holds them against what `boundary` demands.
    ///
    /// # Errors
    /// [`HostError::Boundary`] before anything is started; [`HostError::Machine`] without QEMU.
    pub fn backend(&self, boundary: &Boundary) -> Result<Qemu, HostError> {
        program::open()?;
        let verdict = match self.settings.backend.value {
            BackendChoice::Tcg => {
                Verdict::Absent { cause: Cause::Unwanted, why: "the backend is set to tcg".to_owned() }
            }
            _ => self.kvm(false),
        };
        let accelerator = if verdict.is_usable() { Accelerator::Kvm } else { Accelerator::Tcg };
        let no_kvm = |demand| HostError::Boundary { demand, why: verdict.to_string(), fix: verdict.fix() };
        if accelerator == Accelerator::Tcg {
            match self.settings.backend.value {
                BackendChoice::Kvm => return Err(no_kvm("the backend kvm")),
                BackendChoice::Vmm => return Err(no_kvm("the backend vmm")),
                _ => {}
            }
            if boundary.require.contains(&Require::Kvm) {
                return Err(no_kvm("--require kvm"));
            }
            if boundary.untrusted {
                return Err(HostError::Boundary {
                    demand: "--untrusted",
                    why: format!("{verdict}, and emulation is no security boundary"),
                    fix: verdict.fix(),
                });
            }
        }
        let mut qemu = Qemu::find(&self.settings.qemu.value, &self.settings.search_path, accelerator)?;
        if let Some(templates) = self.templates() {
            qemu = qemu.with_templates(templates);
        }
        let demand = match boundary {
            Boundary { untrusted: true, .. } => Some("--untrusted"),
            Boundary { require, .. } => require.contains(&Require::Jail).then_some("--require jail"),
        };
        if let Some(demand) = demand {
            let why = match jail_of(&qemu) {
                Ok(held) if held.is_whole() => return Ok(qemu),
                Ok(held) => held.what_is_missing(),
                Err(error) => format!("no process can be locked in: {error}"),
            };
            return Err(HostError::Boundary { demand, why, fix: None });
        }
        Ok(qemu)
    }

    /// Refuses `step` where it asks for a network that it is not to have.
    ///
    /// # Errors
    /// [`HostError::Network`].
    pub fn refuse_network(&self, step: &Step) -> Result<(), HostError> {
        match step.network {
            true => network_of(&self.settings, &step.name),
            false => Ok(()),
        }
    }

    /// Where templates are, if they are to be used.
    fn templates(&self) -> Option<Templates> {
        let store = self.store.clone();
        let place = || {
            let templates = Templates::new(store.templates(), store.temporary());
            templates.with_room(move |bytes| Ok(Box::new(store.reserve(bytes)?) as Room))
        };
        self.settings.template.value.then(place)
    }

    /// kiln's own VMM, where it runs the machines of steps rather than `qemu`, the backend that was chosen: where it was asked for,
    /// and where nothing was and KVM can be used. Roots are made with QEMU's all the same.
    pub fn vmm(&self, qemu: &Qemu) -> Option<KilnVmm> {
        let choice = self.settings.backend.value;
        let suits = matches!(choice, BackendChoice::Auto | BackendChoice::Vmm) && qemu.uses_kvm();
        suits.then(|| KilnVmm::new(self.templates()))
    }

    /// Where Debian packages come from.
    ///
    /// # Errors
    /// [`ArchiveError`] where neither a setting nor the host says.
    pub fn debian_mirror(&self) -> Result<String, ArchiveError> {
        self.archive.mirror(crate::root::debian::DEFAULT_KERNEL_SUITE)
    }

    /// The mirror of Debian packages, if it answers within `patience`.
    ///
    /// # Errors
    /// [`ArchiveError`] where there is none, or none that answers.
    pub fn probe_debian_mirror(&self, patience: Duration) -> Result<String, ArchiveError> {
        self.archive.probe(crate::root::debian::DEFAULT_KERNEL_SUITE, patience)
    }

    /// The agent's digest, after putting it into the store.
    fn agent(&self) -> Result<Digest, HostError> {
        let named = self.settings.agent.value.as_deref();
        let path = bundle::find_agent(named).filter(|path| path.is_file());
        let path = path.ok_or_else(|| HostError::NoAgent { named: named.map(Path::to_owned) })?;
        Ok(bundle::store_agent(&self.store, &path)?)
    }

    /// The flag that refuses what is not locked, where one does.
    pub fn refusing(&self) -> Option<&'static str> {
        match (self.settings.locked.value, self.settings.offline.value) {
            (true, _) => Some("--locked"),
            (false, true) => Some("--offline"),
            (false, false) => None,
        }
    }

    /// What may be done to have sources.
    pub fn permission(&self) -> Permission {
        Permission { locked: self.refusing(), client: self.client.clone() }
    }

    /// Debian's archives, as this host reaches them.
    pub fn archive(&self) -> &Archive {
        &self.archive
    }

    /// Whether the lock could be written, found out before anything is fetched for it.
    fn check_lock(&self, what: &str) -> Result<(), HostError> {
        let path = self.lock_path();
        if let Some(flag) = self.refusing() {
            return Err(HostError::NotLocked { what: what.to_owned(), path: path.to_owned(), flag });
        }
        let folder = path.parent().unwrap_or(Path::new("/"));
        let access = rustix::fs::access(folder, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK);
        access.map_err(|errno| HostError::LockFolder { path: path.to_owned(), source: errno.into() })
    }

    /// What the lock has of `what`, as `find` finds it; where it has nothing, what `look_up` gives, which is locked, and
    /// whether that was done. Of two kilns that lock it at once the first to write decides.
    fn locked<T: Clone + Serialize + DeserializeOwned>(
        &self,
        what: &str,
        (kind, name): (&str, &str),
        find: impl Fn(&Lock) -> Option<&T>,
        set: impl FnOnce(&mut Lock, T),
        look_up: impl FnOnce() -> Result<T, HostError>,
    ) -> Result<(T, bool), HostError> {
        if let Some(text) = Lock::text(self.lock_path())? {
            // To read a lock of a thousand packages takes longer than to start a machine: what it says of one thing is kept.
            let text_digest = Digest::of(text.as_bytes());
            let key = Digest::of(format!("{LOCK_VERSION} {kind} {name}\n{text_digest}").as_bytes());
            let kept = self.store.records(LOCKED);
            if let Some(found) = kept.get(&key) {
                return Ok((found, false));
            }
            if let Some(found) = find(&Lock::parse(&text, self.lock_path())?) {
                // Without it the next one reads the lock again.
                let _ = kept.put(&key, found);
                return Ok((found.clone(), false));
            }
        }
        self.check_lock(what)?;
        let new = look_up()?;
        let locked = Lock::change(self.lock_path(), |lock| {
            if find(lock).is_none() {
                set(lock, new.clone());
            }
            find(lock).cloned()
        })?;
        Ok((locked.unwrap_or(new), true))
    }

    /// Where the lock file lies.
    pub fn lock_path(&self) -> &Path {
        &self.settings.lock.value
    }

    /// The bundle of `choice`; a Debian kernel is locked and fetched where it is not there yet.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn bundle(
        &self,
        choice: &KernelChoice,
        carrier: Carrier,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Bundle, HostError> {
        let agent = self.agent()?;
        let suite = match choice {
            KernelChoice::File { kernel, modules } => {
                self.refuse_secrets("kernel", kernel)?;
                modules.as_ref().map_or(Ok(()), |modules| self.refuse_secrets("modules", modules))?;
                return Ok(bundle::from_files(&self.store, kernel, modules.as_deref(), &agent, carrier)?);
            }
            KernelChoice::Blob { kernel, modules } => {
                return Ok(bundle::from_blobs(&self.store, kernel, modules.as_ref(), &agent, carrier)?);
            }
            KernelChoice::Debian(suite) => suite,
        };
        let spec = format!("debian:{suite}");
        let (locked, is_new) = self.locked(
            &format!("the kernel of Debian {suite}"),
            ("kernel", &spec),
            |lock| lock.kernel(&spec),
            Lock::set_kernel,
            || {
                progress(&format!("looking up the kernel of Debian {suite}"));
                Ok(self.archive.resolve_kernel(suite, None)?)
            },
        )?;
        if is_new {
            progress(&format!("locked {} in {}", locked.package.name, self.lock_path().display()));
        }
        let key = locked.package.sha256;
        if let Some(bundle) = bundle::remembered(&self.store, &key, &agent, carrier) {
            return Ok(bundle);
        }
        progress(&format!("fetching {}", locked.package.name));
        self.archive.fetch_kernel(&locked, &|_| {})?;
        progress("unpacking the kernel");
        let tree = self.archive.unpack_kernel(&locked)?;
        Ok(bundle::from_package(&self.store, &key, &tree, &agent, carrier)?)
    }

    /// The image of the toolbox, made where it is not there yet: of the directory that the settings name, else of
    /// Debian packages, which are locked.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn toolbox(&self, progress: &mut dyn FnMut(&str)) -> Result<PathBuf, HostError> {
        if let Some(path) = &self.settings.toolbox.value {
            self.refuse_secrets("toolbox", path)?;
            return Ok(toolbox::of_directory(&self.store, &self.settings.directory.join(path))?);
        }
        let spec = toolbox::spec(crate::root::debian::DEFAULT_KERNEL_SUITE)?;
        let name = spec.to_string();
        let (locked, is_new) = self.locked(
            "the toolbox",
            ("toolbox", &name),
            |lock| lock.toolbox(&name),
            Lock::set_toolbox,
            || {
                progress("looking up the toolbox");
                Ok(self.archive.resolve_programs(&spec, None)?)
            },
        )?;
        if is_new {
            progress(&format!("locked the toolbox in {}", self.lock_path().display()));
        }
        Ok(toolbox::of_packages(&self.store, &self.archive, &locked, progress)?)
    }

    /// How long a machine that is ready waits for a step; none where there are to be none.
    pub fn keeper_idle(&self) -> Option<Duration> {
        self.settings.keeper.value.then_some(self.settings.keeper_idle.value)
    }

    /// The root of `spec`, made where it is not there yet: with machines of `qemu` that boot `bundle`.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn root(
        &self,
        spec: &RootSpec,
        qemu: &Qemu,
        bundle: &Bundle,
        cpus: u16,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Root, HostError> {
        if !spec.is_debian() {
            return self.imported_root(spec);
        }
        let locked = self.locked_root(spec, progress)?;
        let workshop = Workshop { store: &self.store, archive: &self.archive, backend: qemu, bundle, cpus };
        Ok(match spec {
            RootSpec::Packages(_) => root::of_files(&self.store, &self.archive, &locked, progress)?,
            _ => workshop.debian(&locked, progress)?,
        })
    }

    /// A root of files alone, for which no machine is needed: all but those whose packages are configured.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn root_of_files(&self, spec: &RootSpec, progress: &mut dyn FnMut(&str)) -> Result<Root, HostError> {
        match spec {
            RootSpec::Packages(_) => {
                let locked = self.locked_root(spec, progress)?;
                Ok(root::of_files(&self.store, &self.archive, &locked, progress)?)
            }
            _ => self.imported_root(spec),
        }
    }

    /// A root of the host's own files, none of which are keys.
    fn imported_root(&self, spec: &RootSpec) -> Result<Root, HostError> {
        self.refuse_secrets_in_root(spec)?;
        Ok(root::import(&self.store, spec)?)
    }

    /// Refuses a root of the host's own files that contains SECRETS or lies in it.
    ///
    /// # Errors
    /// [`HostError::Overlap`].
    pub(super) fn refuse_secrets_in_root(&self, spec: &RootSpec) -> Result<(), HostError> {
        match spec {
            RootSpec::Directory(path) | RootSpec::File(path) | RootSpec::Live(path) => {
                self.refuse_secrets("root", path)
            }
            RootSpec::Debian(_) | RootSpec::Packages(_) => Ok(()),
        }
    }

    fn refuse_secrets(&self, what: &'static str, path: &Path) -> Result<(), HostError> {
        let settings = &self.settings;
        let path = settings.directory.join(path);
        Ok(apart::refuse(what, &path, Kept::Secrets, &settings.secrets.value)?)
    }

    /// The packages of the root `spec`, as they are locked.
    fn locked_root(&self, spec: &RootSpec, progress: &mut dyn FnMut(&str)) -> Result<LockedRoot, HostError> {
        let spec: DebianSpec = spec.to_string().parse().map_err(RootError::from)?;
        let name = spec.to_string();
        let (locked, is_new) = self.locked(
            &format!("root {spec}"),
            ("root", &name),
            |lock| lock.root(&name),
            Lock::set_root,
            || {
                progress(&format!("resolving {spec}"));
                Ok(self.archive.resolve(&spec, None)?)
            },
        )?;
        if is_new {
            let count = locked.packages.len();
            progress(&format!("locked {count} packages in {}", self.lock_path().display()));
        }
        if let Some(package) = spec.lacks(&locked.packages) {
            let path = self.lock_path().to_owned();
            return Err(HostError::Contradiction { path, spec: name, package });
        }
        Ok(locked)
    }
}
