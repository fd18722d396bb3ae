//! Whether a step has to run, and what is kept of it when it did.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kiln_artifact::tree::{Kind as NodeKind, Tree, TreePath};
use kiln_digest::Digest;
use kiln_virtio::fs::record::{Kind, Observed};

use super::late::Taken;
use super::runner::{Ran, failure};
use super::{Build, BuildError, view};
use crate::cache::verify::{Hashed, Verdict, verify};
use crate::cache::{Entry, Found, Hidden, Index, Key, LastRun, Place, Places, Scope, ShareTrace, Trace};
use crate::clock::now_nanos;
use crate::engine::merge::{Looks, Merge};
use crate::machine::in_full;
use crate::plan::{PlannedStep, StepId};
use crate::sign::Leaks;
use crate::writes::Folder;

/// How a step stands.
#[derive(Debug)]
pub enum Standing {
    /// A trace holds.
    Holds {
        /// Digest of its outputs' manifest.
        outputs: Digest,
        /// Outputs that WORK lacked, and has now.
        restored: usize,
        /// What holds.
        trace: Box<Trace>,
        /// Whose it is.
        scope: Scope,
    },
    /// It has to run: why, in words.
    Must(String),
}

/// Why a step runs of which nothing is known.
pub const NEVER_RAN: &str = "it never ran here";

/// How a step stands, for people.
pub type Explained = Standing;

/// What the WORK at `work` is called in the store's notes of what steps did in it.
pub fn work_name(work: &Path) -> Vec<u8> {
    std::fs::canonicalize(work).as_deref().unwrap_or(work).as_os_str().as_bytes().to_vec()
}

/// What all checks of a build share.
pub(super) struct Checker<'a, R> {
    pub build: &'a Build<'a, R>,
    pub index: Index,
    pub hashed: Hashed,
    pub hidden: Hidden,
    nothing_hidden: Hidden,
    source: Option<OwnedFd>,
    pub work: Vec<u8>,
    /// What steps see that are shown nothing.
    nothing: OnceLock<Arc<Folder>>,
    leaks: OnceLock<Leaks>,
    /// Whether the store and WORK are on one file system.
    is_beside: OnceLock<bool>,
    // Protects the manifests that were read; held only to look one up or put one in.
    trees: Mutex<BTreeMap<Digest, Arc<Tree>>>,
    // Protects what steps that are made here have taken, by their names; held only to look something up or put it in.
    taken: Mutex<BTreeMap<String, Taken>>,
    // Protects what steps did before this build, as far as it was asked for; held only to look one up or put one in.
    before: Mutex<BTreeMap<String, Option<Arc<LastRun>>>>,
}

impl<'a, R> Checker<'a, R> {
    pub fn new(build: &'a Build<'a, R>, hidden: Hidden) -> Self {
        let settings = build.settings;
        let source = settings.srcdir.value.as_ref().map(|source| settings.directory.join(source));
        Self {
            build,
            index: build.index(),
            hashed: Hashed::default(),
            hidden,
            nothing_hidden: Hidden::default(),
            source: source.and_then(|source| File::open(source).ok()).map(OwnedFd::from),
            work: work_name(&settings.work.value),
            nothing: OnceLock::new(),
            leaks: OnceLock::new(),
            is_beside: OnceLock::new(),
            trees: Mutex::default(),
            taken: Mutex::default(),
            before: Mutex::default(),
        }
    }

    /// SRCDIR, where there is one.
    pub fn source(&self) -> Option<&OwnedFd> {
        self.source.as_ref()
    }

    /// Looks at what `step` has taken from outside WORK, or notes some of it.
    pub fn taken<T>(&self, step: &str, look: impl FnOnce(&mut Taken) -> T) -> T {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        look(taken.entry(step.to_owned()).or_default())
    }

    /// Lets go of what `step` has taken: nothing more is made of it.
    pub fn let_go(&self, step: &str) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(step);
    }

    /// What finds signing keys where no step may see them or make something of them.
    pub fn leaks(&self) -> &Leaks {
        self.leaks.get_or_init(|| Leaks::of(&self.build.settings.secrets.value))
    }

    fn io(what: &'static str, path: PathBuf) -> impl FnOnce(std::io::Error) -> BuildError {
        move |source| BuildError::Io { what, path, source }
    }

    /// The outputs that a manifest says; none where the store does not have it as it was.
    pub fn tree(&self, manifest: &Digest) -> Option<Arc<Tree>> {
        if let Some(tree) = self.trees.lock().unwrap_or_else(PoisonError::into_inner).get(manifest) {
            return Some(Arc::clone(tree));
        }
        let bytes = self.build.store.blobs().read(manifest).ok()?;
        let tree = Arc::new(Tree::parse_manifest(&bytes).ok()?);
        let mut trees = self.trees.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(trees.entry(*manifest).or_insert(tree)))
    }

    /// What the step sees in WORK, where `needs` are the steps it needs with their outputs.
    pub fn view(&self, step: &PlannedStep, needs: &[(StepId, Digest)]) -> Result<Arc<Tree>, BuildError> {
        let mut trees = Vec::with_capacity(needs.len());
        for (id, manifest) in needs {
            let name = self.build.plan.step(*id).name.as_str();
            let tree = self.tree(manifest).ok_or_else(|| BuildError::Lost {
                step: name.to_owned(),
                path: "the manifest of its outputs".to_owned(),
                digest: *manifest,
            })?;
            trees.push((name, tree));
        }
        view::union(&trees, &step.inputs)
    }

    /// `tree` in a directory, as a step is shown it; all that are shown nothing share one. `owner` names the step that put
    /// out a path.
    pub fn directory(
        &self,
        tree: &Tree,
        owner: impl Fn(&TreePath) -> String,
    ) -> Result<Arc<Folder>, BuildError> {
        if !view::is_nothing(tree) {
            return Ok(Arc::new(view::write(tree, self.build.store, owner)?));
        }
        if let Some(nothing) = self.nothing.get() {
            return Ok(Arc::clone(nothing));
        }
        let nothing = Arc::new(view::write(tree, self.build.store, owner)?);
        Ok(Arc::clone(self.nothing.get_or_init(|| nothing)))
    }

    /// What the step sees of sources.
    pub fn sources(&self, step: &PlannedStep) -> Tree {
        self.build.sources.tree(step.sources.iter().map(|source| source.name.as_str()))
    }

    /// How the step stands. What `merges` gives is held while WORK is changed.
    pub fn check<G>(
        &self,
        step: &PlannedStep,
        key: &Key,
        needs: &[(StepId, Digest)],
        merges: &dyn Fn() -> G,
    ) -> Result<Standing, BuildError> {
        let digest = key.digest();
        let traces = self.index.traces(&digest);
        if traces.is_empty() {
            return Ok(Standing::Must(self.why_unknown(step, key)));
        }
        let reads = |name: &str| {
            let mut shares = traces.iter().flat_map(|found| &found.trace.shares);
            shares.any(|share| share.name == name && !(share.entries.is_empty() && share.missed.is_empty()))
        };
        let view = if reads("work") { self.view(step, needs)? } else { Arc::default() };
        let sources = if reads("sources") { self.sources(step) } else { Tree::default() };
        let mut places = Places::new();
        places.insert("work".to_owned(), Place::Tree(&view));
        places.insert("sources".to_owned(), Place::Tree(&sources));
        if let Some(source) = &self.source {
            let directory = source.try_clone().map_err(Self::io("open", PathBuf::from("SRCDIR")))?;
            places.insert("src".to_owned(), Place::Live { directory, hidden: &self.hidden });
        }
        let mut first = None;
        for found in traces {
            match verify(&found.trace, &places, &self.hashed, now_nanos()) {
                Verdict::Differs(difference) => {
                    first.get_or_insert(difference);
                }
                // What a collection has taken meanwhile may have lost its outputs.
                Verdict::Holds(_) if !self.index.hold(&found) => {}
                Verdict::Holds(renewed) => {
                    let Found { scope, trace, .. } = found;
                    let restored = match self.restore(step, &trace.outputs, merges) {
                        Ok(restored) => restored,
                        Err(BuildError::Lost { path, .. }) => {
                            return Ok(Standing::Must(format!("the store has lost its output `{path}`")));
                        }
                        Err(error) => return Err(error),
                    };
                    let outputs = trace.outputs;
                    let trace = match renewed {
                        Some(renewed) => {
                            // Not to have it costs the next build some hashing.
                            if scope == *self.index.scope() && !self.build.options.dry_run {
                                let _ = self.index.add(&digest, &renewed);
                            }
                            renewed
                        }
                        None => Box::new(trace),
                    };
                    return Ok(Standing::Holds { outputs, restored, trace, scope });
                }
            }
        }
        let why = first.map_or_else(|| self.why_unknown(step, key), |difference| difference.to_string());
        Ok(Standing::Must(why))
    }

    /// Why there is no trace under a key.
    fn why_unknown(&self, step: &PlannedStep, key: &Key) -> String {
        let Some(last) = self.before(step) else {
            return NEVER_RAN.to_owned();
        };
        let failure = last.failure.as_ref().map(|how| format!("it failed the last time: it {how}"));
        let not_kept = || last.not_kept.as_ref().map(|why| format!("its last result was not kept: {why}"));
        key.difference(&last.key)
            .or(failure)
            .or_else(not_kept)
            .unwrap_or_else(|| format!("the store has no trace of it in scope `{}`", self.index.scope()))
    }

    /// What the step did last before this build.
    fn before(&self, step: &PlannedStep) -> Option<Arc<LastRun>> {
        if let Some(before) = self.before.lock().unwrap_or_else(PoisonError::into_inner).get(&step.name) {
            return before.clone();
        }
        let before = self.index.last_run(&self.work, &step.name).map(Arc::new);
        self.before.lock().unwrap_or_else(PoisonError::into_inner).insert(step.name.clone(), before.clone());
        before
    }

    /// How much memory the step's machine held the last time.
    pub fn last_held_bytes(&self, step: &PlannedStep) -> Option<u64> {
        self.before(step)?.held_bytes
    }

    /// Gives WORK what it lacks of a step's outputs, and says how much that was.
    fn restore<G>(
        &self,
        step: &PlannedStep,
        manifest: &Digest,
        merges: &dyn Fn() -> G,
    ) -> Result<usize, BuildError> {
        let work = &self.build.settings.work.value;
        let lost = |path: String, digest: Digest| BuildError::Lost { step: step.name.clone(), path, digest };
        if step.outputs.is_empty() {
            return Ok(0);
        }
        if let Some(placed) =
            self.index.placed(&self.work, &step.name).filter(|placed| placed.outputs == *manifest)
            && let Ok(directory) = File::open(work)
        {
            let place = Place::Live { directory: directory.into(), hidden: &self.nothing_hidden };
            let places = [("work".to_owned(), place)].into();
            match verify(&placed, &places, &self.hashed, now_nanos()) {
                Verdict::Holds(None) => return Ok(0),
                Verdict::Holds(Some(renewed)) => {
                    let _ = self.index.note_placed(&self.work, &step.name, *renewed);
                    return Ok(0);
                }
                Verdict::Differs(_) => {}
            }
        }
        let tree = self.tree(manifest).ok_or_else(|| lost("the manifest".to_owned(), *manifest))?;
        if self.build.options.dry_run {
            return Ok(0);
        }
        for (path, node) in tree.iter() {
            let NodeKind::File { digest, .. } = &node.kind else { continue };
            if !self.build.store.blobs().is_sound(digest) {
                // It would stand in the way of the blob as it should be.
                self.build.store.blobs().discard_damaged(digest);
                return Err(lost(path.to_string(), *digest));
            }
        }
        let overwrite = self.build.options.overwrite;
        let _passed = merges();
        let merged = Merge { store: self.build.store, work, step: &step.name, overwrite }.run(&tree)?;
        self.note_placed(step, manifest, &tree, &merged.looks);
        Ok(merged.placed.len())
    }

    /// Notes what WORK looks like where a step's outputs are, as the merge saw it. Without it they are read again next time.
    fn note_placed(&self, step: &PlannedStep, manifest: &Digest, tree: &Tree, looks: &Looks) {
        let kind = |path: &TreePath| {
            let read = Observed::METADATA | Observed::CONTENT;
            Some(match &tree.shown(path)?.kind {
                NodeKind::File { digest, .. } => (Kind::Regular, read, Some(*digest)),
                NodeKind::Symlink(text) => (Kind::Link, read, Some(Digest::of(text))),
                // That one is there with nothing in it says no other entry; more of it is a person's to change.
                NodeKind::Directory if tree.is_empty_folder(path) => {
                    (Kind::Directory, Observed::empty(), None)
                }
                _ => return None,
            })
        };
        let entry = |(path, (kind, observed, content)): (&TreePath, _)| {
            Entry {
                path: path.as_bytes().to_vec(),
                kind,
                observed,
                // What the merge did not see as it put it there is looked at the next time: nothing looks like this.
                fingerprint: looks.fingerprints.get(path).copied().unwrap_or_default(),
                content,
                listing: None,
                xattrs: None,
            }
        };
        let kinds = tree.iter().filter_map(|(path, _)| Some((path, kind(path)?)));
        let entries = kinds.map(entry).collect();
        let share =
            ShareTrace { name: "work".to_owned(), guest: "WORK".to_owned(), entries, missed: Vec::new() };
        let (log, command_ms, machine) = (None, 0, String::new());
        let stamped_nanos = looks.stamped_nanos;
        let placed =
            Trace { stamped_nanos, shares: vec![share], outputs: *manifest, log, command_ms, machine };
        let _ = self.index.note_placed(&self.work, &step.name, placed);
    }

    /// Makes what a trace names survive a power failure, but for a log. The merge has synced the outputs, where they and
    /// WORK are on one file system.
    fn sync(&self, outputs: &Digest) -> Result<(), BuildError> {
        let store = self.build.store;
        let is_beside = || store.is_beside(&self.build.settings.work.value);
        let synced = match *self.is_beside.get_or_init(is_beside) {
            true => store.sync_blobs(&[*outputs]),
            false => store.sync(),
        };
        let path = self.build.settings.store.value.clone();
        synced.map_err(|error| Self::io("sync", path)(std::io::Error::other(error)))
    }

    /// Notes that the step began, printed `log` and came to no end of its own but `error`. Without the note, the one of the time
    /// before is what people are shown.
    pub fn note_error(&self, step: &PlannedStep, key: &Key, log: Digest, why: &str, error: &BuildError) {
        let run = LastRun {
            step: step.name.clone(),
            key: key.clone(),
            failure: Some(format!("ended with an error: {}", in_full(error))),
            why: why.to_owned(),
            log: Some(log),
            outputs: None,
            not_kept: Some("it failed".to_owned()),
            command_ms: 0,
            held_bytes: self.last_held_bytes(step),
        };
        let _ = self.index.note_run(&self.work, &run);
    }

    /// What a step's run left behind, kept: a trace where it may be believed. Gives why it may not, and whether its outputs
    /// are those of the last time.
    pub fn keep(
        &self,
        step: &PlannedStep,
        key: &Key,
        ran: &Ran,
        why: &str,
        stamped_nanos: i64,
    ) -> Result<(Option<String>, bool), BuildError> {
        let store = || self.build.settings.store.value.clone();
        let (before, log) = (self.before(step), ran.log);
        let command_ms = u64::try_from(ran.command.as_millis()).unwrap_or(u64::MAX);
        let mut not_kept = ran.spoiled.clone();
        let failure = failure(ran);
        if let (Some(outputs), None) = (ran.outputs, &failure) {
            if !step.outputs.is_empty()
                && let Some(looks) = &ran.looks
                && let Some(tree) = self.tree(&outputs)
            {
                self.note_placed(step, &outputs, &tree, looks);
            }
            if not_kept.is_none() {
                self.sync(&outputs)?;
                let trace = Trace {
                    stamped_nanos,
                    shares: ran.shares.clone(),
                    outputs,
                    log,
                    command_ms,
                    machine: ran.machine.clone(),
                };
                self.index.add(&key.digest(), &trace).map_err(Self::io("write a trace to", store()))?;
            }
        } else {
            not_kept = Some("it failed".to_owned());
        }
        let run = LastRun {
            step: step.name.clone(),
            key: key.clone(),
            failure,
            why: why.to_owned(),
            log,
            outputs: ran.outputs,
            not_kept: not_kept.clone(),
            command_ms,
            // Where it is not known of this run, that of the one before is the best guess.
            held_bytes: ran.held_bytes.or_else(|| before.as_ref()?.held_bytes),
        };
        self.index.note_run(&self.work, &run).map_err(Self::io("write a record to", store()))?;
        let same = ran.outputs.is_some() && before.is_some_and(|before| before.outputs == ran.outputs);
        Ok((not_kept, same))
    }
}
