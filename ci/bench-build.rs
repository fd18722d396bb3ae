//! For `ci/bench build`: a recipe of many steps over many files, with the traces that running it would have left, and the
//! time that planning and scheduling take without machines.
//!
//! `prepare DIR STEPS FILES` writes kiln.toml, the files and the traces: `kiln build` there has nothing to do.
//! `overhead DIR STEPS` builds a graph of so many steps that do nothing: all, none, and one that nothing needs; and prints
//! microseconds for each step.

#![allow(clippy::print_stdout, clippy::panic, reason = "it prints figures, and fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln::boot::{Boot, Told, Verdict};
use kiln::cache::{Entry, Scope, ShareTrace};
use kiln::engine::build::sources::{Locked, Permission};
use kiln::engine::build::{Build, BuildError, Gate, Machines, Options, Ran, Runner, Timeline};
use kiln::engine::{Boundary, Ended, Event, Host, Listener, Phase, RunError, Step};
use kiln::plan::boot::Trust;
use kiln::plan::recipe::Recipe;
use kiln::plan::{Plan, RootSpec};
use kiln::settings::{Flags, Settings};
use kiln_artifact::tree::Tree;
use kiln_digest::Digest;
use kiln_virtio::fs::record::Observed;
use kiln_virtio::fs::{fingerprint_of, kind_of};
use kiln_wire::{Outcome, Usage};

/// Plays a step that reads every file of the folder of its name.
struct Player<'a> {
    host: &'a Host,
    machines: Option<Machines<'a>>,
    source: PathBuf,
}

fn entry(top: &Path, path: &str) -> io::Result<Entry> {
    let place = top.join(path);
    let fingerprint = fingerprint_of(&rustix::fs::lstat(&place)?);
    let kind = kind_of(fingerprint.mode).ok_or(io::ErrorKind::Unsupported)?;
    let is_folder = place.is_dir();
    Ok(Entry {
        path: path.as_bytes().to_vec(),
        kind,
        observed: if is_folder { Observed::METADATA } else { Observed::METADATA | Observed::CONTENT },
        fingerprint,
        content: if is_folder { None } else { Some(Digest::of(&fs::read(&place)?)) },
        listing: None,
        xattrs: None,
    })
}

impl Player<'_> {
    fn share(&self, step: &str) -> io::Result<ShareTrace> {
        let mut paths: BTreeSet<String> = ["".to_owned(), step.to_owned()].into();
        for file in fs::read_dir(self.source.join(step))? {
            paths.insert(format!("{step}/{}", file?.file_name().to_string_lossy()));
        }
        let entries = paths.iter().map(|path| entry(&self.source, path)).collect::<io::Result<_>>()?;
        Ok(ShareTrace { name: "src".to_owned(), guest: "/ws/bench".to_owned(), entries, missed: Vec::new() })
    }
}

impl Runner for Player<'_> {
    fn identify(
        &self,
        step: &Step,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Vec<(String, String)>, RunError> {
        match &self.machines {
            Some(machines) => machines.identify(step, progress),
            None => Ok(Vec::new()),
        }
    }

    fn files(&self, _: &RootSpec, _: &mut dyn FnMut(&str)) -> Result<Arc<Tree>, RunError> {
        Ok(Arc::default())
    }

    // As machines do.
    fn ahead(&self, jobs: usize) -> usize {
        jobs
    }

    fn run(&self, step: &Step, events: Listener<'_>) -> Result<Ran, RunError> {
        let io = |source| RunError::Io { what: "play a step", source };
        for phase in [Phase::Setup, Phase::Collect, Phase::Record] {
            events(Event::Phase(phase, Duration::ZERO)).map_err(io)?;
        }
        let shares = match self.machines.is_some() {
            true => vec![self.share(&step.name).map_err(io)?],
            false => Vec::new(),
        };
        let (outputs, _) = self.host.store.blobs().put(&Tree::new().manifest()[..]).map_err(io)?;
        Ok(Ran {
            ended: Ended::Ran(Outcome::Exit(0), Usage::default()),
            outputs: Some(outputs),
            unmerged: None,
            looks: None,
            log: None,
            shares,
            spoiled: None,
            undeclared: Vec::new(),
            changed: 0,
            command: Duration::ZERO,
            held_bytes: None,
            machine: String::new(),
        })
    }

    fn firmware(&self, _: &Trust) -> Result<Vec<(String, String)>, BuildError> {
        panic!("no step of the recipe boots");
    }

    fn boot(
        &self,
        _: &mut Boot,
        _: bool,
        _: &Boundary,
        _: &mut dyn FnMut(Told<'_>),
    ) -> Result<Verdict, BuildError> {
        panic!("no step of the recipe boots");
    }
}

fn build(text: &str, folder: &Path, is_real: bool) -> Result<(Duration, usize), Box<dyn Error>> {
    let began = Instant::now();
    let recipe = Recipe::parse(text, "kiln.toml")?;
    let plan = Plan::of(&recipe, text, "kiln.toml")?;
    let flags = Flags {
        project: Some("bench".to_owned()),
        work: Some(folder.join("out")),
        srcdir: Some(folder.to_owned()),
        ..Flags::default()
    };
    let host = Host::open(Settings::read(flags)?)?;
    let machines = is_real.then(|| Machines::new(&host));
    let player = Player { host: &host, machines, source: folder.to_owned() };
    let build = Build {
        plan: &plan,
        settings: &host.settings,
        store: &host.store,
        runner: &player,
        given: BTreeMap::new(),
        folder: folder.to_owned(),
        sources: Locked::default(),
        permission: Permission::default(),
        options: Options {
            jobs: 2,
            keep_going: false,
            dry_run: false,
            overwrite: false,
            scope: Scope::default(),
            read_scopes: Vec::new(),
        },
    };
    let wanted = plan.wanted(&[])?;
    let summary = build.run(&wanted, &Gate::default(), &mut Timeline::default(), &mut |_| Ok(()))?;
    let ran = summary.count(|outcome| matches!(outcome, kiln::engine::build::Outcome::Ran { .. }));
    if !summary.is_good() {
        return Err("the build failed".into());
    }
    Ok((began.elapsed(), ran))
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["prepare", folder, steps, files, root] => {
            let (steps, files) = (steps.parse::<usize>()?, files.parse::<usize>()?);
            let folder = Path::new(folder);
            let mut text =
                format!("project = \"bench\"\n[settings]\nwork = \"out\"\n[roots.r]\nfrom = \"{root}\"\n");
            for step in 0..steps {
                text += &format!("[steps.s{step}]\nrun = \"cat s{step}/*\"\n");
                let place = folder.join(format!("s{step}"));
                fs::create_dir_all(&place)?;
                for file in 0..files / steps {
                    fs::write(place.join(format!("file-{file}.c")), format!("int file_{step}_{file};\n"))?;
                }
            }
            fs::write(folder.join("kiln.toml"), &text)?;
            // Files are older than any tick when they are stamped.
            std::thread::sleep(Duration::from_secs(1));
            let (time, ran) = build(&text, &folder.canonicalize()?, true)?;
            println!("{ran} of {steps} steps played over {files} files in {:.1} s", time.as_secs_f64());
        }
        ["overhead", folder, steps] => {
            let steps = steps.parse::<u32>()?;
            // Rows of a hundred, each step needing the one before it.
            let text = |last: &str| -> String {
                let step = |n: u32| {
                    let needs = if n.is_multiple_of(100) {
                        String::new()
                    } else {
                        format!("needs = [\"s{}\"]\n", n - 1)
                    };
                    let does = if n + 1 == steps { last } else { "true" };
                    format!("[steps.s{n}]\nrun = \"{does} {n}\"\n{needs}")
                };
                (0..steps).map(step).collect()
            };
            for (what, last) in [
                ("steps that run (played), with their traces written", "true"),
                ("steps that are up to date", "true"),
                ("steps of which one, that nothing needs, has changed", "false"),
            ] {
                let (time, ran) = build(&text(last), Path::new(folder), false)?;
                let each = time.as_secs_f64() * 1e6 / f64::from(steps);
                println!("{steps} {what}: {:.2} s, {each:.0} us each ({ran} ran)", time.as_secs_f64());
            }
        }
        _ => return Err("usage: prepare DIR STEPS FILES ROOT | overhead DIR STEPS".into()),
    }
    Ok(())
}
