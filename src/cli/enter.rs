//! `kiln exec` and `kiln shell`: a command in a machine that was kept, or in one as a step of the recipe gets it.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

use clap::Args;
use kiln_wire::{Exec, Outcome, Stream, Usage};

use super::fresh::{self, Fresh, StepFlags};
use super::run::KILN_FAILED;
use super::show::{self, Form, GuestOutput};
use super::signals::PassedOn;
use super::terminal::{self, Raw};
use super::{CANNOT, Failure, USAGE};
use crate::agent::{ExecEnd, SessionError};
use crate::engine::Ended;
use crate::keeper::{DoorError, Registry};
use crate::plan::{Environment, harmless};
use crate::root::toolbox;
use crate::settings::{Flags, host_variable};

/// The number of the one command of a session.
const ID: u32 = 1;
const SIGPIPE: u8 = 13;
/// The shells that are tried, the best first; the toolbox's runs whatever the root holds.
const SHELLS: [&str; 3] = ["/bin/bash", "/bin/sh", toolbox::SHELL];

/// Arguments of `kiln exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
The command sees what the step saw (root, shares, what was written, variables), in namespaces of its own, and the
toolbox at /toolbox. Without --tty its output is shown as `kiln run` shows it, with everything that a terminal would
obey made harmless; with it, the machine draws on your terminal as it likes. Ctrl-C goes to the command; Ctrl-\\ ends
kiln, and with it the command, unless --tty passes that on too.

Where no machine has the name but a step of the recipe (kiln.toml here or in a folder above), the command runs in a machine as
the step gets it: root, kernel, variables, sources, clock, memory, processors, network (with --net full), and in WORK what
the steps that it needs put out; those that are not up to date are built first. The step's own command does not run, nor do its time-out and its limits
on output count, and nothing is merged or kept of what is done there.

Examples:
  kiln exec make-7f3a -- cat config.log
  kiln exec compile -- ls -lR /x
  kiln exec make-7f3a -- strace -f make
  kiln exec --tty make-7f3a -- top")]
pub(super) struct ExecArguments {
    /// Give the command this terminal
    #[arg(long, short)]
    tty: bool,
    /// Pass standard input to the command
    #[arg(long)]
    stdin: bool,
    /// Working directory [default: the step's]
    #[arg(long, short = 'C', value_name = "PATH")]
    directory: Option<String>,
    /// Set a variable, or pass the host's on
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// The machine, or the step
    #[arg(value_name = "NAME|STEP")]
    name: String,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    command: Vec<OsString>,
    // Last, as its heading is for all that follows.
    #[command(flatten)]
    of_step: StepFlags,
}

/// Arguments of `kiln shell`.
#[derive(Debug, Args)]
#[command(after_help = "\
Opens bash or sh of the machine's root, or the toolbox's where the root has none that runs. The toolbox (a shell, strace,
vi and other small programs) is at /toolbox, its programs at the end of PATH. What the machine writes reaches your
terminal as it is: enter only machines that you let draw on it.

Where no machine has the name but a step of the recipe, the shell opens in a machine as the step gets it, before its command
(see `kiln exec --help`); the machine ends with the shell.

Examples:
  kiln shell make-7f3a
  kiln shell compile
  kiln shell --toolbox -C / make-7f3a")]
pub(super) struct ShellArguments {
    /// Take the toolbox's shell, whatever the root has
    #[arg(long)]
    toolbox: bool,
    /// Working directory [default: the step's]
    #[arg(long, short = 'C', value_name = "PATH")]
    directory: Option<String>,
    /// The machine, or the step
    #[arg(value_name = "NAME|STEP")]
    name: String,
    // Last, as its heading is for all that follows.
    #[command(flatten)]
    of_step: StepFlags,
}

/// Whose machine is entered.
enum Place {
    /// One that was kept.
    Kept(Registry),
    /// A step's.
    Fresh(Box<Fresh>),
}

/// A command on its way into a machine.
struct Visit<'a> {
    place: Place,
    name: &'a str,
    with_terminal: bool,
    with_stdin: bool,
    directory: &'a str,
    env: Vec<Vec<u8>>,
    signals: PassedOn,
}

/// Runs a command in a machine and gives its status.
pub(super) fn exec(arguments: &ExecArguments, flags: Flags) -> ExitCode {
    status(try_exec(arguments, flags))
}

/// Opens a shell in a machine and gives its status.
pub(super) fn shell(arguments: &ShellArguments, flags: Flags) -> ExitCode {
    status(try_shell(arguments, flags))
}

fn status(done: Result<u8, Failure>) -> ExitCode {
    done.map_or_else(
        |failure| {
            show::failure(&failure.text, failure.hint.as_deref());
            ExitCode::from(match failure.code {
                code @ (USAGE | CANNOT) => code,
                _ => KILN_FAILED,
            })
        },
        ExitCode::from,
    )
}

fn try_exec(arguments: &ExecArguments, flags: Flags) -> Result<u8, Failure> {
    let env = variables(&arguments.env, arguments.tty)?;
    if arguments.tty && !terminal::is_there() {
        return Err(no_terminal("leave out --tty"));
    }
    let mut visit = Visit {
        place: find(&arguments.name, &arguments.of_step, flags)?,
        name: &arguments.name,
        with_terminal: arguments.tty,
        with_stdin: arguments.stdin || arguments.tty,
        directory: arguments.directory.as_deref().unwrap_or_default(),
        env,
        signals: PassedOn::start(arguments.tty).map_err(no_signals)?,
    };
    let argv: Vec<Vec<u8>> = arguments.command.iter().map(|word| word.as_bytes().to_vec()).collect();
    let program = harmless(argv.first().map(Vec::as_slice).unwrap_or_default());
    let ended = visit.run(argv)?;
    if let Ended::NotStarted { error, why } = &ended {
        let what = match error.kind() {
            _ if !why.is_empty() => format!("cannot be executed: {why}"),
            io::ErrorKind::NotFound => "was not found".to_owned(),
            _ => format!("cannot be executed: {error}"),
        };
        let hint = format!("{} has more programs", toolbox::PROGRAMS);
        show::failure(&format!("`{program}` {what} in {}", visit.machine()), Some(&hint));
    }
    Ok(super::verdict::exit_code(&ended))
}

fn try_shell(arguments: &ShellArguments, flags: Flags) -> Result<u8, Failure> {
    if !terminal::is_there() {
        return Err(no_terminal("run a command without one: kiln exec NAME -- CMD"));
    }
    let mut visit = Visit {
        place: find(&arguments.name, &arguments.of_step, flags)?,
        name: &arguments.name,
        with_terminal: true,
        with_stdin: true,
        directory: arguments.directory.as_deref().unwrap_or_default(),
        env: variables(&[], true)?,
        signals: PassedOn::start(true).map_err(no_signals)?,
    };
    let shells = if arguments.toolbox { &SHELLS[2..] } else { &SHELLS[..] };
    for shell in shells {
        match visit.run(vec![shell.as_bytes().to_vec()])? {
            // Not there, for another architecture, without its libraries: the next will do.
            Ended::NotStarted { .. } => {}
            ended => return Ok(super::verdict::exit_code(&ended)),
        }
    }
    Err(Failure {
        text: format!("{} has no shell that runs", visit.machine()),
        hint: Some("its toolbox is missing: it was said why when the machine was made".to_owned()),
        code: KILN_FAILED,
    })
}

/// The machine of this name, or the one that the step of this name gets.
fn find(name: &str, of_step: &StepFlags, flags: Flags) -> Result<Place, Failure> {
    let registry = super::registry(flags.clone())?;
    match registry.door(name) {
        Err(unknown @ DoorError::Unknown { .. }) => {
            Ok(Place::Fresh(Box::new(fresh::start(name, of_step, flags, &unknown)?)))
        }
        Err(error) => Err(error.into()),
        Ok(_) => {
            if fresh::is_step(name, flags) {
                show::note(&format!(
                    "`{name}` is a machine, and a step of the recipe too: this is the machine"
                ));
            }
            Ok(Place::Kept(registry))
        }
    }
}

fn no_signals(error: io::Error) -> Failure {
    Failure::new(&error, None, KILN_FAILED).about("hold signals")
}

fn no_terminal(hint: &str) -> Failure {
    Failure {
        text: "standard input and output are not a terminal".to_owned(),
        hint: Some(hint.to_owned()),
        code: USAGE,
    }
}

/// What the caller adds to the step's variables.
fn variables(named: &[String], with_terminal: bool) -> Result<Vec<Vec<u8>>, Failure> {
    let mut environment = Environment::empty();
    if with_terminal && let Some(kind) = host_variable("TERM") {
        environment.set("TERM", &kind);
    }
    for variable in named {
        environment.add(variable, host_variable).map_err(|error| Failure::new(&error, None, USAGE))?;
    }
    Ok(environment.lines())
}

impl Visit<'_> {
    /// The machine, in words.
    fn machine(&self) -> String {
        match self.place {
            Place::Kept(_) => format!("machine `{}`", self.name),
            Place::Fresh(_) => format!("the machine of step `{}`", self.name),
        }
    }

    /// Runs one command to its end.
    fn run(&mut self, argv: Vec<Vec<u8>>) -> Result<Ended, Failure> {
        let failed =
            |what: &'static str| move |error: io::Error| Failure::new(&error, None, KILN_FAILED).about(what);
        let input = self.with_stdin.then(|| io::stdin().as_fd().try_clone_to_owned()).transpose();
        let input = input.map_err(failed("take standard input"))?;
        let exec = Exec {
            id: ID,
            argv,
            env: self.env.clone(),
            cwd: self.directory.as_bytes().to_vec(),
            timeout_ms: 0,
            grace_ms: 0,
            stdin: self.with_stdin,
            terminal: self.with_terminal.then(terminal::size),
        };
        let mut joined = None;
        let (session, exec) = match &mut self.place {
            Place::Kept(registry) => (joined.insert(registry.door(self.name)?.enter()?), exec),
            Place::Fresh(fresh) => fresh.next(exec),
        };
        // From here on this process is the command's, also in what signals do.
        let passing = self.signals.to(session.controls(exec.id));
        let raw = self.with_terminal.then(Raw::take).transpose().map_err(failed("take the terminal"))?;
        let mut shown = GuestOutput::new(self.with_terminal.then_some(Form::Raw));
        let mut output = |stream: Stream, data: &[u8]| shown.write(stream, data);
        let end = session.exec(exec, input, &mut output);
        let _ = shown.finish();
        drop(raw);
        let hung_up_by = passing.hung_up_by();
        drop(passing);
        let by_signal = |signal| Ok(Ended::Ran(Outcome::Signal(signal), Usage::default()));
        match (end, hung_up_by) {
            (Ok(ExecEnd::Ran(outcome, usage)), _) => Ok(Ended::Ran(outcome, usage)),
            (Ok(ExecEnd::NotStarted { error, why }), _) => Ok(Ended::NotStarted { error, why }),
            // As if the signal had ended this process, which it was about to do.
            (Err(_), Some(signal)) => by_signal(signal),
            (Err(SessionError::Output(error)), _) if error.kind() == io::ErrorKind::BrokenPipe => {
                by_signal(SIGPIPE)
            }
            (Err(error @ SessionError::Closed), _) if let Place::Fresh(fresh) = &mut self.place => {
                Err(fresh.explain(error))
            }
            (Err(SessionError::Closed), _) => {
                let text = format!("machine `{}` ended under the command", self.name);
                Err(Failure { text, hint: None, code: KILN_FAILED })
            }
            (Err(error @ SessionError::Failed { .. }), _) => {
                let hint = "say where it is to run: -C PATH".to_owned();
                Err(Failure::new(&error, Some(hint), KILN_FAILED))
            }
            (Err(error), _) => Err(Failure::new(&error, None, KILN_FAILED)),
        }
    }
}
