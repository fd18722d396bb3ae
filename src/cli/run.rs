//! `kiln run`: one command in its own machine.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::again;
use super::choice::Choice;
use super::drun::LAYOUT;
use super::events::Line;
use super::interrupt::Interrupts;
use super::keep::{self, KeepFlags};
use super::kernel::KernelFlags;
use super::named::NameFlags;
use super::show::{self, Form, GuestOutput, Narrator, line};
use super::{CANNOT, Failure, USAGE, verdict};
use crate::agent::{Limits, SessionError};
use crate::engine::RunError;
use crate::engine::{
    Boundary, Clock, DiskArgument, Event, Host, MountArgument, Phase, ReadsError, ReadsReport, Report,
    Require, Step, run as run_step,
};
use crate::keeper::Kept;
use crate::keeper::background::Caller;
use crate::machine::{Carrier, Cpu};
use crate::plan::{
    MEMORY_BYTES, Outputs, RootSpec, SCRATCH_BYTES, parse_bytes, parse_duration, show_bytes, show_duration,
};
use crate::root::debian::DebianSpec;
use crate::settings::{Flags, Settings};

/// Arguments of `kiln run`.
#[derive(Debug, Args)]
#[command(after_help = "\
The guest sees: the root at /, read-only below a private layer; SRCDIR at /ws/PROJECT, read-only; WORK at
/x/PROJECT, its content below a private layer; no network unless --net full; a fixed environment with SRCDIR and WORK.
Only what --out declares leaves the machine, and only when the command succeeds.

Examples:
  kiln run -- cat /etc/os-release
  kiln run --src . --reads reads.json -- grep -rn main .
  kiln run --root debian:bookworm+gcc,make,libc6-dev \\
      --src ./zlib --src-writable --work out --out 'lib*.a' \\
      -- sh -c './configure && make && cp libz.a $WORK/'
  kiln run --root file:rootfs.tar.xz --clock fixed --timeout 10m -- /build.sh
  kiln run --step lib --out lib.a -- sh -c 'make -s lib.a && cp lib.a $WORK/'
  kiln run --step test --needs lib -- ./test   in a script: each runs again only when something it read changed
  kiln run --keep --src . -- make              where it fails, `kiln shell` looks into the machine")]
pub(super) struct RunArguments {
    /// Where / comes from: debian:SUITE+PKG,PKG…, dir:PATH, file:ARCHIVE.tar[.gz|.xz|.zst], file:IMAGE (squashfs
    /// or erofs) or live:PATH
    #[arg(long, value_name = "ROOT", default_value = "debian:bookworm")]
    pub root: String,
    /// Source tree, read-only at /ws/PROJECT [env: SRCDIR] [default: /ws/PROJECT, else the recipe's folder]
    #[arg(long, value_name = "DIR")]
    pub src: Option<PathBuf>,
    /// Give the guest's view of the source tree a private writable layer, dropped at the end
    #[arg(long)]
    src_writable: bool,
    /// Where outputs go, at /x/PROJECT [env: WORK] [default: /x/PROJECT, else $HOME/.cache/PROJECT]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Another directory, read-only
    #[arg(long, value_name = "HOST:GUEST")]
    mount: Vec<String>,
    /// A disk image: mounted at GUEST, or a block device where GUEST is below /dev
    #[arg(long, value_name = "FILE:GUEST[:ro]")]
    disk: Vec<String>,
    /// Declare outputs: a glob of paths below WORK; a folder is taken whole
    #[arg(long, value_name = "GLOB")]
    out: Vec<String>,
    /// Let outputs replace files in WORK that kiln did not put there
    #[arg(long)]
    pub overwrite: bool,
    /// Set a variable, or pass the host's on
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Working directory in the guest, or one below the default [default: /ws/PROJECT, else /x/PROJECT]
    #[arg(long, short = 'C', value_name = "PATH")]
    directory: Option<String>,
    /// Pass standard input to the command
    #[arg(long)]
    pub stdin: bool,
    /// Memory of the machine
    #[arg(long, value_name = "SIZE", default_value = "2G")]
    pub memory: String,
    /// Processors of the machine [default: the host's]
    #[arg(long, value_name = "N")]
    cpus: Option<u16>,
    /// One model that is the same on every host, or all that this one can give but virtualisation: what the command does may depend on it then
    #[arg(long, value_name = "CPU", default_value = "fixed", value_parser = Choice(&["fixed", "host"]))]
    cpu: String,
    /// Space for what the command writes, beyond memory
    #[arg(long, value_name = "SIZE", default_value = "16G")]
    scratch: String,
    /// Stop the command after this long, such as 90s or 1m30s
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<String>,
    /// How long it has between SIGTERM and SIGKILL
    #[arg(long, value_name = "TIME", default_value = "10s")]
    grace: String,
    /// The host's, or one that starts at SOURCE_DATE_EPOCH
    #[arg(long, value_name = "CLOCK", default_value = "host", value_parser = Choice(&["host", "fixed"]))]
    clock: String,
    /// What files of shares show as owner and time
    #[arg(long, value_name = "WHAT", default_value = "fixed", value_parser = Choice(&["fixed", "real"]))]
    attributes: String,
    #[command(flatten)]
    kernel: KernelFlags,
    /// Load a kernel module; the module tree is attached at /lib/modules
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
    /// Attach the kernel's modules at /lib/modules
    #[arg(long)]
    module_tree: bool,
    /// Offer virtualisation to the guest, and all else that this host can give
    #[arg(long, conflicts_with = "cpu")]
    nested: bool,
    /// The network: none, or full: what this host reaches, by addresses of its own, 10.0.2.2 for the host itself
    #[arg(long, value_name = "NETWORK", default_value = "none", value_parser = Choice(&["none", "full"]))]
    pub net: String,
    /// What carries messages between host and guest
    #[arg(long, value_name = "CARRIER", default_value = "serial", value_parser = Choice(&["serial", "vsock"]))]
    wire: String,
    /// Boot a machine, rather than copy one that was booted before [env: KILN_TEMPLATE=off]
    #[arg(long)]
    pub no_template: bool,
    /// Neither take a machine that is ready, nor have one made for the next run [env: KILN_KEEPER=off]
    #[arg(long)]
    pub no_keeper: bool,
    /// How long a machine that is made for the next run waits for it [env: KILN_KEEPER_IDLE; default: 60s]
    #[arg(long, value_name = "TIME")]
    pub keeper_idle: Option<String>,
    #[command(flatten)]
    keep: KeepFlags,
    /// Fail unless this holds
    #[arg(long, value_name = "WHAT", value_parser = Choice(&["kvm", "jail"]))]
    require: Vec<String>,
    /// The code is not trusted: demand hardware virtualisation and a whole jail
    #[arg(long)]
    untrusted: bool,
    /// How the command's output is shown: raw, harmless (control characters and CI commands broken), or auto:
    /// harmless on a terminal and where a CI system reads
    #[arg(long, value_name = "FORM", default_value = "auto")]
    output: String,
    /// What is allowed at most: printed=SIZE (1G), outputs=SIZE (64G), files=COUNT (4000000),
    /// processes=COUNT (4096)
    #[arg(long, value_name = "NAME=VALUE")]
    limit: Vec<String>,
    /// Write what the command read of its shares, as JSON with digests
    #[arg(long, value_name = "FILE")]
    pub reads: Option<PathBuf>,
    /// Write events as JSON, one a line, to standard output
    #[arg(long)]
    pub json: bool,
    /// Say nothing but the command's own output and errors
    #[arg(long, short)]
    pub quiet: bool,
    /// Whether it has the layout of `kiln drun`: folders of WORK at the places of a system, and everything that is written
    /// there as its outputs.
    #[arg(skip)]
    pub layout: bool,
    /// Steps of the recipe, one of which the command may have been meant to be.
    #[arg(skip)]
    pub steps: Vec<String>,
    #[command(flatten)]
    pub named: NameFlags,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    pub command: Vec<std::ffi::OsString>,
}

impl RunArguments {
    /// Whether this run may have to outlive its caller. One that says something wrong will not get so far.
    pub fn may_stay(&self) -> bool {
        self.keep.may_stay() && step(self).is_ok()
    }
}

/// The network of `--net` that is this host's.
pub(super) const FULL: &str = "full";
/// 128 + SIGPIPE.
const SIGPIPE_STATUS: u8 = 128 + 13;
/// kiln failed where the command should have run.
pub(super) const KILN_FAILED: u8 = 125;

/// What is left of a run that can be looked into: its machine, and the words that name its store.
type Left = Option<(Kept, String)>;

/// Runs the command and gives its status: to `caller` and this process's, where its machine stays.
pub(super) fn run(arguments: &RunArguments, flags: Flags, caller: Option<Caller>) -> ExitCode {
    let mut left = None;
    let code = match try_run(arguments, flags, &mut left) {
        Ok(code) => code,
        Err(failure) => {
            let again = (!matches!(failure.code, USAGE | CANNOT)).then(again::command);
            if arguments.json {
                let (text, hint) = (&failure.text, failure.hint.as_deref());
                line(&Line::Error { text, hint, again: again.as_deref() }.to_string());
            }
            show::failure(&failure.text, failure.hint.as_deref());
            if let Some(again) = again.filter(|_| !arguments.json) {
                show::note(&format!("again: {again}"));
            }
            match failure.code {
                code @ (USAGE | CANNOT) => code,
                _ => KILN_FAILED,
            }
        }
    };
    match (left, caller, arguments.keep.idle()) {
        (Some((kept, store)), Some(caller), Ok(idle)) => {
            keep::stay(kept, caller, idle, &store, arguments.json, code)
        }
        (None, Some(_), _) if matches!(code, KILN_FAILED | verdict::TIMED_OUT) && !arguments.json => {
            show::note("there is no machine left to keep");
            ExitCode::from(code)
        }
        _ => ExitCode::from(code),
    }
}

fn usage(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::new(error, None, USAGE)
}

pub(super) fn one_of<T: Copy>(name: &str, value: &str, choices: &[(&str, T)]) -> Result<T, Failure> {
    choices.iter().find(|(word, _)| *word == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        Failure {
            text: format!("--{name} takes {}, not `{value}`", words.join(" or ")),
            hint: None,
            code: USAGE,
        }
    })
}

pub(super) fn step(arguments: &RunArguments) -> Result<Step, Failure> {
    arguments.keep.idle()?;
    let about = |flag: &str, error: &dyn std::error::Error| Failure {
        text: format!("{flag}: {error}"),
        hint: None,
        code: USAGE,
    };
    let bytes = |flag, text: &str| parse_bytes(text).map_err(|error| about(flag, &error));
    let duration = |flag, text: &str| parse_duration(text).map_err(|error| about(flag, &error));
    let network = one_of("net", &arguments.net, &[("none", false), ("full", true)])?;
    if network && arguments.untrusted {
        return Err(Failure {
            text: "--untrusted and --net full contradict each other: QEMU would keep this host's network"
                .to_owned(),
            hint: None,
            code: USAGE,
        });
    }
    let outputs = match arguments.layout {
        true => Outputs::everything(),
        false => Outputs::parse(arguments.out.iter().map(String::as_str)).map_err(|error| usage(&error))?,
    };
    let mut globs: Vec<&str> = outputs.globs().collect();
    globs.sort_unstable();
    let memory_bytes = bytes("--memory", &arguments.memory)?;
    let wrong = |text: String| Failure { text, hint: None, code: USAGE };
    if memory_bytes < *MEMORY_BYTES.start() {
        let text = format!("--memory {} is too little: a machine needs 128M to boot", arguments.memory);
        return Err(wrong(text));
    }
    if memory_bytes > *MEMORY_BYTES.end() {
        return Err(wrong(format!("--memory {} is too much: 8T is the most", arguments.memory)));
    }
    let scratch_bytes = bytes("--scratch", &arguments.scratch)?;
    if scratch_bytes < *SCRATCH_BYTES.start() {
        return Err(wrong(format!("--scratch {} is too little: 1M is the least", arguments.scratch)));
    }
    if scratch_bytes > *SCRATCH_BYTES.end() {
        return Err(wrong(format!("--scratch {} is too much: 8T is the most", arguments.scratch)));
    }
    let timeout = arguments.timeout.as_deref().map(|text| duration("--timeout", text)).transpose()?;
    let cpus = arguments.cpus.unwrap_or(0);
    if arguments.cpus == Some(0) || cpus > 64 {
        return Err(Failure { text: "--cpus takes 1 to 64".to_owned(), hint: None, code: USAGE });
    }
    if timeout.is_some_and(|timeout| timeout.is_zero()) {
        let text = "--timeout 0 leaves the command no time: leave it out for no limit".to_owned();
        return Err(Failure { text, hint: None, code: USAGE });
    }
    let requirements = [("kvm", Require::Kvm), ("jail", Require::Jail)];
    Ok(Step {
        // Runs that declare the same outputs are the same step: the later one's outputs replace the earlier one's.
        name: if arguments.layout {
            "drun".to_owned()
        } else if globs.is_empty() {
            "run".to_owned()
        } else {
            format!("run {}", globs.join(" "))
        },
        root: root(&arguments.root)?,
        kernel: arguments.kernel.choice(),
        argv: arguments
            .command
            .iter()
            .map(|word| std::os::unix::ffi::OsStrExt::as_bytes(word.as_os_str()).to_vec())
            .collect(),
        env: arguments.env.clone(),
        directory: arguments.directory.clone(),
        source_layer: arguments.src_writable,
        mounts: arguments
            .mount
            .iter()
            .map(|text| text.parse::<MountArgument>().map_err(|error| usage(&error)))
            .collect::<Result<_, _>>()?,
        disks: arguments
            .disk
            .iter()
            .map(|text| text.parse::<DiskArgument>().map_err(|error| usage(&error)))
            .collect::<Result<_, _>>()?,
        binds: if arguments.layout { LAYOUT.to_vec() } else { Vec::new() },
        outputs,
        overwrite: arguments.overwrite,
        memory_bytes: memory_bytes.next_multiple_of(1 << 20),
        cpus,
        scratch_bytes: scratch_bytes.next_multiple_of(4096),
        timeout,
        grace: duration("--grace", &arguments.grace)?,
        clock: one_of("clock", &arguments.clock, &[("host", Clock::Host), ("fixed", Clock::Fixed)])?,
        carrier: one_of("wire", &arguments.wire, &[("serial", Carrier::Serial), ("vsock", Carrier::Vsock)])?,
        modules: arguments.module.clone(),
        module_tree: arguments.module_tree,
        toolbox: arguments.keep.toolbox,
        keep: arguments.keep.keep()?,
        cpu: match arguments.nested {
            true => Cpu::Nested,
            false => one_of("cpu", &arguments.cpu, &[("fixed", Cpu::Fixed), ("host", Cpu::Host)])?,
        },
        network,
        real_attributes: one_of("attributes", &arguments.attributes, &[("fixed", false), ("real", true)])?,
        boundary: Boundary {
            require: arguments
                .require
                .iter()
                .map(|word| one_of("require", word, &requirements))
                .collect::<Result<_, _>>()?,
            untrusted: arguments.untrusted,
        },
        report_reads: arguments.reads.is_some(),
        limits: limits(&arguments.limit)?,
        sees_sources: false,
        view: None,
    })
}

/// What a step may have and what may leave its machine, with what `--limit` says of it.
fn limits(named: &[String]) -> Result<Limits, Failure> {
    let mut limits = Limits::default();
    for text in named {
        let wrong = |why: &str| Failure { text: format!("--limit {text}: {why}"), hint: None, code: USAGE };
        let bytes = |value: &str| parse_bytes(value).map_err(|error| wrong(&error.to_string()));
        match text.split_once('=') {
            Some(("printed", value)) => limits.printed_bytes = bytes(value)?,
            Some(("outputs", value)) => limits.total_bytes = bytes(value)?,
            Some(("files", value)) => limits.entries = value.parse().map_err(|_| wrong("is no count"))?,
            Some(("processes", value)) => {
                let count = value.parse().ok().filter(|count| *count > 0);
                limits.processes = count.ok_or_else(|| wrong("is no count above 0"))?;
            }
            _ => {
                return Err(wrong(
                    "the limits are printed=SIZE, outputs=SIZE, files=COUNT and processes=COUNT",
                ));
            }
        }
    }
    Ok(limits)
}

/// The root by its name, which is checked whole before anything is fetched.
fn root(text: &str) -> Result<RootSpec, Failure> {
    let root = text.parse::<RootSpec>().map_err(|error| usage(&error))?;
    if root.is_debian() {
        text.parse::<DebianSpec>().map_err(|error| Failure::new(&error, error.hint(), USAGE))?;
    }
    Ok(root)
}

/// Whether the report of reads could be written, found out before the step runs.
fn check_reads(path: &Path) -> Result<(), Failure> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let checked = match std::fs::read_dir(folder) {
        Ok(_) if path.exists() => File::options().append(true).open(path).map(drop),
        Ok(_) => rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).map_err(io::Error::from),
        Err(error) => Err(error),
    };
    checked.map_err(|source| usage(&ReadsError::Write { path: path.to_owned(), source }))
}

fn try_run(arguments: &RunArguments, flags: Flags, left: &mut Left) -> Result<u8, Failure> {
    let step = step(arguments)?;
    if let Some(path) = &arguments.reads {
        check_reads(path)?;
    }
    let host = Host::open(Settings::read(flags)?)?;
    let interrupts = Interrupts::watch(&host.settings.work.value, host.store.temporary(), arguments.json);
    let interrupts =
        interrupts.map_err(|error| Failure::new(&error, None, super::FAILED).about("watch for signals"))?;
    let input = arguments.stdin.then(|| io::stdin().as_fd().try_clone_to_owned()).transpose();
    let input = input
        .map_err(|source| RunError::Io { what: "take standard input", source })
        .map_err(Failure::from)?;
    let mut narrator = Narrator::new(arguments.quiet || arguments.json);
    let forms = [("auto", None), ("raw", Some(Form::Raw)), ("harmless", Some(Form::Log))];
    let mut output = GuestOutput::new(one_of("output", &arguments.output, &forms)?);
    if output.is_changed() && arguments.output == "auto" && !arguments.json {
        narrator.say(
            "a CI system reads this log: what the command writes is made harmless (--output raw: as it is)",
        );
    }
    let mut phases: Vec<(Phase, Duration)> = Vec::new();
    let mut show_event = |event: Event<'_>| {
        interrupts.note(&event);
        if let Event::Phase(phase, time) = event {
            phases.push((phase, time));
        }
        if arguments.json {
            return show::try_line(&Line::of_event(None, &event).to_string());
        }
        match event {
            Event::Progress(text) => narrator.progress(text),
            Event::Warning(text) => narrator.warn(text),
            Event::Machine(identity) => narrator.say(&identity.to_string()),
            Event::Output(stream, data) => {
                narrator.clear();
                return output.write(stream, data);
            }
            // Of its machine the end of the run tells.
            Event::Phase(..) | Event::Kept(..) => {}
        }
        Ok(())
    };
    let run = run_step(&step, &host, input, &mut show_event);
    *left = run.kept.map(|kept| (kept, keep::store_words(&host.settings)));
    let report = match run.result {
        // As a command ends whose reader has gone: killed by SIGPIPE, without a word.
        Err(RunError::Session(SessionError::Output(error))) if error.kind() == io::ErrorKind::BrokenPipe => {
            return Ok(SIGPIPE_STATUS);
        }
        Err(error) => {
            interrupts.settle();
            return Err(error.into());
        }
        Ok(report) => report,
    };
    if let Err(error) = output.finish()
        && error.kind() == io::ErrorKind::BrokenPipe
    {
        return Ok(SIGPIPE_STATUS);
    }
    let code = verdict::exit_code(&report.ended);
    if let Some(path) = &arguments.reads {
        write_reads(path, &report.reads)
            .map_err(|source| ReadsError::Write { path: path.clone(), source })
            .map_err(|error| Failure::new(&error, None, super::FAILED))?;
    }
    if arguments.json {
        let again = (code != 0).then(again::command);
        line(&Line::of_report(&report, &phases, code, again).to_string());
    } else {
        tell(&mut narrator, &report, &phases);
        if let Some((text, hint)) = verdict::complaint(&step, arguments, &report.ended) {
            show::failure(&text, hint.as_deref());
            show::note(&format!("again: {}", again::command()));
        }
    }
    Ok(code)
}

fn write_reads(path: &Path, reads: &ReadsReport) -> io::Result<()> {
    let write = |file: &File| {
        let mut file = BufWriter::new(file);
        reads.write(&mut file)?;
        file.flush()
    };
    // A terminal or a pipe is written to; a file, or a link that a step may have put there, is replaced.
    if std::fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        return write(&File::options().write(true).open(path)?);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    let file = tempfile::Builder::new().permissions(mode).tempfile_in(folder)?;
    write(file.as_file())?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn tell(narrator: &mut Narrator, report: &Report, phases: &[(Phase, Duration)]) {
    if let Some(collected) = &report.collected {
        if collected.files.0 > 0 || !collected.changed.is_empty() {
            narrator.say(&format!(
                "{} output file{} ({}), {} changed in {}",
                collected.files.0,
                if collected.files.0 == 1 { "" } else { "s" },
                show_bytes(collected.files.1),
                collected.changed.len(),
                report.work.canonicalize().as_deref().unwrap_or(&report.work).display()
            ));
        }
        if let Some(first) = collected.undeclared.first() {
            let more = collected.undeclared.len() - 1;
            let rest = if more == 0 { String::new() } else { format!(" and {more} more") };
            narrator.say(&format!(
                "written in WORK but not declared, dropped: {first}{rest} (--out declares outputs)"
            ));
        }
    }
    let (files, bytes) = report.reads.contents();
    let (asked, missed) = report.reads.paths();
    if asked > 0 {
        narrator.say(&format!(
            "read {files} file{} ({}), asked about {asked} path{}, missed {missed}",
            if files == 1 { "" } else { "s" },
            show_bytes(bytes),
            if asked == 1 { "" } else { "s" }
        ));
    }
    if let Some(why) = report.reads.spoiled() {
        narrator.warn(&format!("the record of reads is spoiled: {why}"));
    }
    let total: Duration = phases.iter().map(|(_, time)| *time).sum();
    let parts: Vec<String> = phases
        .iter()
        .filter(|(_, time)| *time >= Duration::from_millis(10))
        .map(|(phase, time)| format!("{} {}", phase.name(), show_duration(*time)))
        .collect();
    narrator.say(&format!("{} in all: {}", show_duration(total), parts.join(", ")));
}
