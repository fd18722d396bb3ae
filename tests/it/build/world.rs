//! A recipe, a SRCDIR, a WORK and a store of a test's own, and a runner that plays steps without a machine: it reads and
//! writes real files, and reports what it read as the fs device does.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kiln::boot::trial::{Answer, Input, Moment, Rig, carry_out};
use kiln::boot::{self, Boot, Verdict};
use kiln::cache::{Entry, ShareTrace};
use kiln::engine::build::sources::{self, Permission};
use kiln::engine::build::{Build, BuildError, Gate, News, Options, Outcome, Ran, Runner, Summary, Timeline};
use kiln::engine::merge::Merge;
use kiln::engine::{Boundary, Ended, Event, Listener, Phase, RunError, Step};
use kiln::machine::qemu::firmware::GuestEvent;
use kiln::plan::boot::Trust;
use kiln::plan::recipe::Recipe;
use kiln::plan::{Plan, RootSpec};
use kiln::root::directory;
use kiln::settings::{Flags, Settings};
use kiln::store::Store;
use kiln_artifact::tree::{Kind, Meta, Node, Tree, TreePath};
use kiln_digest::{Digest, Hasher};
use kiln_virtio::fs::record::{Kind as FileKind, Observed};
use kiln_virtio::fs::{fingerprint_of, kind_of};
use kiln_wire::{Outcome as Exit, Stream, Usage};

/// All of it.
pub struct World {
    folder: PathBuf,
    // Goes with this, where it is this one's own.
    _own: Option<tempfile::TempDir>,
    pub settings: Settings,
    pub store: Store,
    pub options: Options,
    /// How many steps a player gets ready while others run.
    pub ahead: usize,
}

/// What a build came to, as tests look at it.
pub struct Built {
    pub summary: Summary,
    /// Steps that ran, in the order in which they began.
    pub ran: Vec<String>,
    /// Why.
    pub reasons: BTreeMap<String, String>,
    /// Most that ran at once.
    pub most: usize,
    /// Most that were ready at once and waited for their turn.
    pub most_ready: usize,
}

impl Built {
    pub fn outcome(&self, step: &str) -> &Outcome {
        let found = self.summary.outcomes.iter().find(|(name, _)| name == step);
        &found.unwrap_or_else(|| panic!("no outcome of {step}")).1
    }
}

impl World {
    pub fn new() -> Self {
        let own = tempfile::tempdir().expect("a folder");
        let mut world = Self::at(own.path());
        world._own = Some(own);
        world
    }

    /// The one in `folder`, which stays.
    pub fn at(folder: &Path) -> Self {
        Self::sharing(folder, &folder.join("store"))
    }

    /// The same, with the store `store`.
    pub fn sharing(folder: &Path, store: &Path) -> Self {
        let path = |name: &str| folder.join(name);
        for name in ["src", "work"] {
            fs::create_dir_all(path(name)).expect("a folder");
        }
        let settings = Settings::read(Flags {
            project: Some("p".to_owned()),
            work: Some(path("work")),
            srcdir: Some(path("src")),
            store: Some(store.to_owned()),
            lock: Some(path("kiln.lock")),
            ..Flags::default()
        });
        let store = Store::open(store).expect("a store");
        let options = Options {
            jobs: 2,
            keep_going: false,
            dry_run: false,
            overwrite: false,
            scope: kiln::cache::Scope::default(),
            read_scopes: Vec::new(),
        };
        let settings = settings.expect("good settings");
        Self { settings, folder: folder.to_owned(), _own: None, store, options, ahead: 0 }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A file of SRCDIR.
    pub fn source(&self, name: &str, text: &str) {
        let path = self.path("src").join(name);
        fs::create_dir_all(path.parent().expect("below src")).expect("a folder");
        fs::write(path, text).expect("room");
    }

    /// A file of WORK.
    pub fn work(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path("work").join(name)).ok()
    }

    /// Builds what `recipe` says.
    pub fn build(&self, recipe: &str) -> Built {
        self.build_targets(recipe, &[])
    }

    pub fn build_targets(&self, text: &str, targets: &[&str]) -> Built {
        let (built, _) = self.build_then(text, targets, |_, _| ());
        built
    }

    /// Builds what the step `name` of `recipe` needs, and gives the step for somebody who enters it.
    pub fn enter(&self, recipe: &str, needs: &[&str], name: &str) -> Result<Step, BuildError> {
        let (_, step) = self.build_then(recipe, needs, |build, summary| {
            build.stage(build.plan.named(name).expect("a step"), &summary.outputs)
        });
        step
    }

    /// Builds all of `recipe`, through `gate`, and lets `hear` hear each piece of news first.
    pub fn build_through(&self, recipe: &str, gate: &Gate, hear: &mut dyn FnMut(&News<'_>)) -> Built {
        let (built, _) = self.build_with(recipe, &[], gate, hear, |_, _| ());
        built
    }

    /// Builds `targets`, and does something more with the build.
    fn build_then<T>(
        &self,
        text: &str,
        targets: &[&str],
        more: impl FnOnce(&Build<'_, Player<'_>>, &Summary) -> T,
    ) -> (Built, T) {
        self.build_with(text, targets, &Gate::default(), &mut |_| {}, more)
    }

    fn build_with<T>(
        &self,
        text: &str,
        targets: &[&str],
        gate: &Gate,
        hear: &mut dyn FnMut(&News<'_>),
        more: impl FnOnce(&Build<'_, Player<'_>>, &Summary) -> T,
    ) -> (Built, T) {
        let recipe = Recipe::parse(text, "kiln.toml").unwrap_or_else(|fault| panic!("{fault}"));
        let plan = Plan::of(&recipe, text, "kiln.toml").unwrap_or_else(|fault| panic!("{fault}"));
        let targets: Vec<String> = targets.iter().map(|name| (*name).to_owned()).collect();
        let wanted = plan.wanted(&targets).expect("known targets");
        let runner = Player::new(self);
        let permission = Permission::default();
        let steps = wanted.iter().flat_map(|id| &plan.step(*id).sources);
        let sources = sources::lock(steps, &self.settings, &self.store, &permission, &mut |_| {});
        let build = Build {
            plan: &plan,
            settings: &self.settings,
            store: &self.store,
            runner: &runner,
            given: BTreeMap::new(),
            folder: self.folder.clone(),
            sources: sources.expect("sources that can be had"),
            permission,
            options: self.options.clone(),
        };
        let mut reasons = BTreeMap::new();
        let mut news = |news: News<'_>| {
            hear(&news);
            if let News::Starts(step, why) = news {
                reasons.insert(step.to_owned(), why.to_owned());
            }
            Ok(())
        };
        let summary = build.run(&wanted, gate, &mut Timeline::default(), &mut news).expect("it goes");
        let more = more(&build, &summary);
        let ran = runner.ran.into_inner().expect("no panic");
        let [most, most_ready] = [runner.most, runner.most_ready].map(AtomicUsize::into_inner);
        (Built { summary, ran, reasons, most, most_ready }, more)
    }
}

/// Plays steps: their commands are lines of `read PATH`, `stat PATH`, `list FOLDER`, `use PATH` (of WORK), `write PATH TEXT`,
/// `copy PATH FROM…` (all of SRCDIR, or of WORK with `work:` before), `change PATH` (of SRCDIR, as a person does meanwhile),
/// `wait`, `say`, `fail`, `lose` (its outputs), `later COUNT` (so many words while it is merged) and `then PATH TEXT` (what another
/// kiln's run of the same step puts out as soon as this one has merged).
pub struct Player<'a> {
    world: &'a World,
    ran: Mutex<Vec<String>>,
    now: AtomicUsize,
    most: AtomicUsize,
    ready: AtomicUsize,
    most_ready: AtomicUsize,
}

/// What a step has seen of a share.
struct Seen {
    name: &'static str,
    top: PathBuf,
    entries: BTreeMap<Vec<u8>, Observed>,
    missed: BTreeSet<Vec<u8>>,
}

impl Seen {
    /// Looks a path up, as a kernel does: each folder on the way to it.
    fn look(&mut self, path: &str, observed: Observed) -> bool {
        let mut so_far = String::new();
        self.entries.entry(Vec::new()).or_insert(Observed::METADATA);
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !so_far.is_empty() {
                so_far.push('/');
            }
            so_far += part;
            if fs::symlink_metadata(self.top.join(&so_far)).is_err() {
                self.missed.insert(so_far.into_bytes());
                return false;
            }
            self.entries.entry(so_far.clone().into_bytes()).or_insert(Observed::METADATA);
        }
        *self.entries.entry(so_far.into_bytes()).or_insert(observed) |= observed;
        true
    }

    fn read(&mut self, path: &str) -> Option<Vec<u8>> {
        self.look(path, Observed::METADATA | Observed::CONTENT)
            .then(|| fs::read(self.top.join(path)).expect("a file"))
    }

    fn share(&self) -> ShareTrace {
        let entry = |(path, observed): (&Vec<u8>, &Observed)| {
            let place = self.top.join(OsStr::from_bytes(path));
            let stat = rustix::fs::lstat(&place).expect("it was there");
            let kind = kind_of(stat.st_mode).expect("a kind");
            let observed = match kind {
                FileKind::Regular if stat.st_size == 0 => *observed | Observed::CONTENT,
                _ => *observed,
            };
            Entry {
                path: path.clone(),
                kind,
                observed,
                fingerprint: fingerprint_of(&stat),
                content: observed
                    .contains(Observed::CONTENT)
                    .then(|| Digest::of(&fs::read(&place).expect("a file"))),
                listing: observed.contains(Observed::LISTING).then(|| listing(&place)),
                xattrs: None,
            }
        };
        ShareTrace {
            name: self.name.to_owned(),
            guest: if self.name == "src" { "/ws/p" } else { "/x/p" }.to_owned(),
            entries: self.entries.iter().map(entry).collect(),
            missed: self.missed.iter().cloned().collect(),
        }
    }
}

fn listing(folder: &Path) -> Digest {
    let entries = fs::read_dir(folder).expect("a folder").flatten();
    let mut names: Vec<(char, Vec<u8>)> = entries
        .map(|entry| {
            let is_folder = entry.file_type().expect("a type").is_dir();
            (if is_folder { 'd' } else { 'f' }, entry.file_name().as_bytes().to_vec())
        })
        .collect();
    names.sort();
    let mut hasher = Hasher::default();
    for (letter, name) in names {
        hasher.update(letter.to_string().as_bytes());
        hasher.update(&name);
        hasher.update(b"\0");
    }
    hasher.finish().0
}

impl<'a> Player<'a> {
    pub fn new(world: &'a World) -> Self {
        let [now, most, ready, most_ready] = [const { AtomicUsize::new(0) }; 4];
        Self { world, ran: Mutex::default(), now, most, ready, most_ready }
    }

    fn play(&self, step: &Step, events: Listener<'_>) -> Result<Ran, RunError> {
        let view = step.view.as_ref().expect("a step of a build has a view");
        let seen = |name, top: &Path| Seen {
            name,
            top: top.to_owned(),
            entries: BTreeMap::new(),
            missed: BTreeSet::new(),
        };
        let mut source = seen("src", &self.world.path("src"));
        let mut work = seen("work", &view.work);
        let mut outputs: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let (mut spoiled, mut code, mut said_later, mut is_lost) = (None, 0, 0, false);
        let mut of_another = None;
        let script = String::from_utf8(step.argv.last().expect("a command").clone()).expect("text");
        for line in script.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["read", path] => drop(source.read(path)),
                ["stat", path] => drop(source.look(path, Observed::METADATA)),
                ["list", path] => drop(source.look(path, Observed::METADATA | Observed::LISTING)),
                ["use", path] => drop(work.read(path)),
                ["write", path, ref text @ ..] => {
                    drop(outputs.insert(path.to_owned(), text.join(" ").into_bytes()))
                }
                ["copy", path, ref from @ ..] => {
                    let read = from.iter().map(|from| match from.strip_prefix("work:") {
                        Some(from) => work.read(from),
                        None => source.read(from),
                    });
                    outputs.insert(
                        path.to_owned(),
                        read.map(Option::unwrap_or_default).collect::<Vec<_>>().concat(),
                    );
                }
                ["change", path] => {
                    fs::write(self.world.path("src").join(path), "changed meanwhile").expect("room");
                    spoiled = Some(format!("`/ws/p/{path}` was modified while the step ran"));
                }
                ["say"] => {
                    let said = events(Event::Output(Stream::Stdout, b"said\n"));
                    said.map_err(|source| RunError::Io { what: "tell", source })?;
                }
                ["wait"] => std::thread::sleep(Duration::from_millis(30)),
                ["fail"] => code = 3,
                ["lose"] => is_lost = true,
                ["then", path, text] => {
                    of_another = Some(BTreeMap::from([(path.to_owned(), text.as_bytes().to_vec())]));
                }
                ["later", count] => said_later = count.parse().expect("a number"),
                [] => {}
                _ => panic!("what is `{line}`?"),
            }
        }
        let told = events(Event::Output(Stream::Stdout, format!("{} speaks\n", step.name).as_bytes()));
        told.map_err(|source| RunError::Io { what: "tell", source })?;
        if is_lost {
            return Err(RunError::MissingOutputs(vec!["nothing".to_owned()]));
        }
        self.now.fetch_sub(1, Ordering::SeqCst);
        if code == 0 {
            let _ = events(Event::Phase(Phase::Collect, Duration::ZERO));
        }
        let _ = events(Event::Phase(Phase::Record, Duration::ZERO));
        for _ in 0..said_later {
            let _ = events(Event::Warning("inside the gate"));
        }
        let mut manifest = None;
        let (mut changed, mut unmerged, mut looks) = (0, None, None);
        if code == 0 {
            let tree_of =
                |outputs| self.tree(outputs).map_err(|source| RunError::Io { what: "keep outputs", source });
            let tree = tree_of(&outputs)?;
            let merge = Merge {
                store: &self.world.store,
                work: &self.world.settings.work.value,
                step: &step.name,
                overwrite: step.overwrite,
            };
            if !step.outputs.is_empty() {
                match merge.run(&tree) {
                    Ok(merged) => {
                        changed = merged.placed.len();
                        looks = Some(merged.looks);
                    }
                    Err(error) => unmerged = Some(error),
                }
            }
            if let Some(outputs) = &of_another {
                merge.run(&tree_of(outputs)?).expect("the other kiln merges too");
                settle(self.world);
            }
            let io = |source: io::Error| RunError::Io { what: "keep the manifest", source };
            manifest = Some(self.world.store.blobs().put(&tree.manifest()[..]).map_err(io)?.0);
        }
        Ok(Ran {
            ended: Ended::Ran(Exit::Exit(code), Usage::default()),
            outputs: manifest,
            unmerged,
            looks,
            log: None,
            shares: vec![source.share(), work.share()],
            spoiled,
            undeclared: Vec::new(),
            changed,
            command: Duration::from_millis(1),
            held_bytes: None,
            machine: "a player".to_owned(),
        })
    }

    fn tree(&self, outputs: &BTreeMap<String, Vec<u8>>) -> io::Result<Tree> {
        let mut tree = Tree::new();
        for (path, bytes) in outputs {
            let path = TreePath::new(path.as_bytes()).expect("a good path");
            let mut above = path.parent();
            while let Some(folder) = above.filter(|folder| tree.get(folder).is_none()) {
                above = folder.parent();
                let meta = Meta { mode: 0o755, ..Meta::default() };
                tree.insert(folder, Node { kind: Kind::Directory, meta });
            }
            let (digest, size) = self.world.store.blobs().put(&bytes[..])?;
            let meta = Meta { mode: 0o644, ..Meta::default() };
            tree.insert(path, Node { kind: Kind::File { digest, size }, meta });
        }
        Ok(tree)
    }
}

/// Nobody types into what is played.
struct Audience<'a> {
    told: &'a mut dyn FnMut(boot::Told<'_>),
    moments: Vec<Moment>,
    ssh_key: Option<PathBuf>,
}

impl Rig for Audience<'_> {
    fn type_in(&mut self, _: &[u8]) -> Result<(), String> {
        Ok(())
    }

    /// Nobody is there to speak to; what is said is written over the key, as a person may do meanwhile.
    fn ssh(&mut self, said: &str, _: Instant) -> Result<Answer, String> {
        let key = self.ssh_key.as_ref().ok_or("there is no key")?;
        fs::write(key, said).map_err(|error| error.to_string())?;
        Ok(Answer { ended: Ok(0), output: Vec::new() })
    }

    fn host_key(&mut self) -> Option<String> {
        None
    }

    fn screenshot(&mut self, _: &str) -> Result<(), String> {
        Ok(())
    }

    fn told(&mut self, moment: &Moment) {
        (self.told)(boot::Told::Moment(moment));
        self.moments.push(moment.clone());
    }
}

impl Runner for Player<'_> {
    fn identify(&self, step: &Step, _: &mut dyn FnMut(&str)) -> Result<Vec<(String, String)>, RunError> {
        Ok(vec![("root".to_owned(), step.root.to_string())])
    }

    fn files(&self, root: &RootSpec, _: &mut dyn FnMut(&str)) -> Result<Arc<Tree>, RunError> {
        let RootSpec::Directory(path) = root else { unreachable!("only folders are played") };
        Ok(Arc::new(directory::import(&self.world.store, path).expect("a folder")))
    }

    fn firmware(&self, _: &Trust) -> Result<Vec<(String, String)>, BuildError> {
        Ok(Vec::new())
    }

    fn boot(
        &self,
        wanted: &mut Boot,
        _: bool,
        _: &Boundary,
        told: &mut dyn FnMut(boot::Told<'_>),
    ) -> Result<Verdict, BuildError> {
        let (sender, inputs) = channel();
        let image = &wanted.disks[0].path;
        let says = if image.is_dir() { image.join("says") } else { image.clone() };
        let says = fs::read(says).expect("an image that says something");
        for input in [Input::Printed(says), Input::Silent, Input::Event(GuestEvent::Ended)] {
            sender.send(input).expect("the trial is there");
        }
        if let Some(report) = &wanted.report {
            fs::create_dir(report).expect("room");
            fs::write(report.join("console.txt"), "all of it").expect("room");
        }
        let ssh_key = wanted.ssh.as_ref().map(|ssh| ssh.key.clone());
        let mut rig = Audience { told, moments: Vec::new(), ssh_key };
        let patience = Duration::from_secs(10);
        let outcome = carry_out(&wanted.script, &mut rig, &inputs, Instant::now(), patience);
        Ok(Verdict { outcome, moments: rig.moments, total: Duration::from_secs(1) })
    }

    fn ahead(&self, _: usize) -> usize {
        self.world.ahead
    }

    fn run(&self, step: &Step, events: Listener<'_>) -> Result<Ran, RunError> {
        let ready = self.ready.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_ready.fetch_max(ready, Ordering::SeqCst);
        let begins = events(Event::Phase(Phase::Setup, Duration::ZERO));
        self.ready.fetch_sub(1, Ordering::SeqCst);
        begins.map_err(|source| RunError::Io { what: "begin", source })?;
        self.ran.lock().unwrap_or_else(PoisonError::into_inner).push(step.name.clone());
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        self.play(step, events)
    }
}

/// The steps that did something in a build, which is good.
pub fn done(world: &World, recipe: &str) -> Vec<String> {
    let built = world.build(recipe);
    assert!(built.summary.is_good(), "{:?}", built.summary.outcomes);
    built.reasons.into_keys().collect()
}

/// Makes all files older than any tick: what happens to them next shows in their times.
pub fn settle(world: &World) {
    let _ = File::open(world.path("src"));
    std::thread::sleep(Duration::from_millis(30));
}
