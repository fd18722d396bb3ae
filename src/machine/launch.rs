//! The child's half of starting a process: kiln's program for machines, which becomes what its parent asks for.
//!
//! The parent sends one message over standard input: what to become, and the descriptors it may hold, by name. So
//! no descriptor is ever inheritable in the parent, whose other threads may be starting processes too. Before
//! anything else the child asks to die with its parent, and what it becomes it becomes in a [`jail`], of which it tells
//! its parent over the same connection.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use kiln_vmm::memory::MemoryError;
use kiln_vmm::vm::VmError;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use super::fetcher::Fetcher;
use super::jail::attempt::Trial;
use super::jail::{self, Held, Profile};
use super::vmm::Vmm;
use super::{Failure, in_full};

/// The name of the guest's memory among the descriptors.
pub(super) const RAM: &str = "ram";

/// The name of the machine of the kiln `parent`, by which people find its processes.
pub(super) fn machine_name(parent: i32) -> String {
    format!("kiln-{parent}")
}

/// The first argument that makes kiln's program for machines a child of kiln's.
pub const SUBCOMMAND: &str = "__launch";

/// Most bytes of a request; an argument vector is far below it.
pub(super) const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Most descriptors of a request (Linux's SCM_MAX_FD).
pub(super) const MAX_DESCRIPTORS: usize = 253;

/// What the child is to become.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Become {
    /// QEMU, started with an empty environment, in its jail. In an argument `{NAME}` stands for the number of the
    /// descriptor or the path of the file of that name, and `{machine}` for the name by which people find the
    /// machine's processes. The guest's memory, where it is the descriptor `ram`, is the file `{memory}`.
    Qemu {
        /// Its jail, which names the program.
        profile: Profile,
        /// Its arguments, the program's name left out.
        arguments: Vec<String>,
    },
    /// An emulated TPM in its jail, with an empty environment. In an argument `{NAME}` stands for the number of the
    /// descriptor of that name, and `{state}` for the folder of its state.
    Tpm {
        /// Its jail, which names the program.
        profile: Profile,
        /// Its arguments, the program's name left out.
        arguments: Vec<String>,
    },
    /// The device process of a machine, in its jail: descriptors `fs`, `control` and, with a CID, `vsock`. It gets shares
    /// over `control`, and is narrowed to them then.
    Devices {
        /// The guest's vsock address, where it has the device.
        vsock_cid: Option<u64>,
    },
    /// kiln's own VMM, in its jail.
    Vmm(Vmm),
    /// A program that fetches, in its jail.
    Fetcher(Fetcher),
    /// The code-running test of /dev/kvm, which prints its figure.
    KvmProbe,
    /// Something that a jail must not let happen, tried in one.
    Attempt(Trial),
}

/// What the parent sends.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    /// Who must be alive.
    pub parent: i32,
    /// What to become.
    pub what: Become,
    /// Names of the descriptors that come with it, in their order.
    pub descriptors: Vec<String>,
}

/// What a child says of itself while it locks itself in, a line each.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Word {
    /// Another child of the parent's goes on in its place, the first of its namespace.
    WentOn(i32),
    /// What holds.
    Held(Held),
}

/// Runs the child. Returns only when it could not become what was asked, or when that has ended.
pub fn main() -> ExitCode {
    match launch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The parent reads this pipe, and shows it as what the program said.
            let _ = io::Write::write_all(&mut io::stderr(), failure(error.as_ref()).line().as_bytes());
            ExitCode::from(125)
        }
    }
}

/// What the parent is told of `error`.
fn failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    let (hint, is_hosts) = if let Some(error) = error.downcast_ref::<VmError>() {
        (error.hint(), error.is_hosts())
    } else if let Some(error) = error.downcast_ref::<MemoryError>() {
        (error.hint(), error.is_hosts())
    } else {
        (None, error.is::<io::Error>())
    };
    Failure { said: in_full(error), hint, is_hosts }
}

fn launch() -> Result<(), Box<dyn std::error::Error>> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    jail::close_inherited()?;
    let (request, mut descriptors) = receive()?;
    if rustix::process::getppid().map(Pid::as_raw_pid) != Some(request.parent) {
        return Err("the process that asked for this one is gone".into());
    }
    match request.what {
        Become::Qemu { mut profile, arguments } => {
            if let (Profile::Qemu { memory, .. }, Some(ram)) = (&mut profile, descriptors.get(RAM)) {
                *memory = Some(ram.as_raw_fd());
            }
            let Profile::Qemu { program, files, .. } = &profile else {
                return Err("this is no jail for QEMU".into());
            };
            // Emulation's buffer of translated code asks for huge pages, of which a machine that waits fills a part.
            rustix::thread::disable_transparent_huge_pages(true)?;
            let held = jail::enter(&profile, &[], &[], went_on, nothing)?;
            let mut words = vec![("machine".to_owned(), machine_name(request.parent))];
            let number = |file: &OwnedFd| file.as_raw_fd().to_string();
            words.extend(descriptors.iter().map(|(name, file)| (name.clone(), number(file))));
            let names = files.iter().map(|(name, _)| name.as_str()).chain([jail::MEMORY]);
            let paths = names.filter_map(|name| Some((name.to_owned(), profile.path_of(name, &held)?)));
            words.extend(paths.map(|(name, path)| (name, path.display().to_string())));
            become_program(program, &arguments, &words, held, descriptors.values())
        }
        Become::Tpm { profile, arguments } => {
            let Profile::Tpm { program, .. } = &profile else {
                return Err("this is no jail for a TPM".into());
            };
            let held = jail::enter(&profile, &[], &[], went_on, nothing)?;
            let mut words: Vec<(String, String)> =
                descriptors.iter().map(|(name, file)| (name.clone(), file.as_raw_fd().to_string())).collect();
            let state = profile.path_of(jail::STATE, &held).unwrap_or_default();
            words.push((jail::STATE.to_owned(), state.display().to_string()));
            become_program(program, &arguments, &words, held, descriptors.values())
        }
        Become::Devices { vsock_cid } => {
            enter_with_shares(&Profile::Devices, nothing)?;
            serve_devices(descriptors, vsock_cid)
        }
        Become::Vmm(vmm) => {
            jail::limit_files(vmm.most_file_bytes(&descriptors)?)?;
            enter_with_shares(&Profile::Vmm, || vmm.open_own(&mut descriptors))?;
            vmm.run(descriptors)
        }
        Become::Fetcher(fetcher) => {
            jail::fetcher::enter(&fetcher)?;
            let mut command = Command::new(&fetcher.program);
            command.args(&fetcher.arguments).env_clear().envs(fetcher.environment);
            Err(command.current_dir(&fetcher.place).stdin(Stdio::null()).exec().into())
        }
        Become::KvmProbe => {
            let verdict = serde_json::to_vec(&super::probe::judge_here())?;
            io::Write::write_all(&mut io::stdout(), &verdict)?;
            Ok(())
        }
        Become::Attempt(trial) => {
            let held = jail::enter(&trial.profile, &[], &trial.without, went_on, nothing)?;
            reply(held)?;
            trial.carry_out()
        }
    }
}

/// Enters the jail of `profile`, which serves shares, and tells the parent what holds.
fn enter_with_shares(
    profile: &Profile,
    open_own: impl FnOnce() -> io::Result<()>,
) -> Result<(), Box<dyn std::error::Error>> {
    // It sees no file of the host by name; what it is handed may lie anywhere.
    let anywhere = open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let held = jail::enter(profile, &[&anywhere], &[], went_on, open_own)?;
    drop(anywhere);
    reply(held)?;
    Ok(())
}

/// Tells the parent what holds and executes `program`, which keeps `descriptors`. Returns only to say why not.
fn become_program<'a>(
    program: &Path,
    arguments: &[String],
    words: &[(String, String)],
    held: Held,
    descriptors: impl Iterator<Item = &'a OwnedFd>,
) -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = arguments.iter().map(|text| substitute(text, words)).collect();
    reply(held)?;
    for descriptor in descriptors {
        rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
    }
    let mut command = Command::new(program);
    Err(command.args(arguments).env_clear().stdin(Stdio::null()).exec().into())
}

/// Tells the parent which layers of the jail hold.
fn reply(held: Held) -> io::Result<()> {
    tell(&Word::Held(held))
}

/// What most open for themselves.
fn nothing() -> io::Result<()> {
    Ok(())
}

/// Tells the parent by which number it knows the process that goes on.
fn went_on(number: i32) -> io::Result<()> {
    tell(&Word::WentOn(number))
}

fn tell(word: &Word) -> io::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    rustix::net::send(io::stdin(), &line, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn serve_devices(
    mut descriptors: BTreeMap<String, OwnedFd>,
    vsock_cid: Option<u64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut take = |name: &str| descriptors.remove(name).ok_or(format!("no descriptor `{name}`"));
    let vsock = match vsock_cid {
        Some(cid) => Some((take("vsock")?, cid)),
        None => None,
    };
    let process = kiln_virtio::process::DeviceProcess {
        fs: take("fs")?,
        vsock,
        control: UnixStream::from(take("control")?),
        confine: jail::enter_thread,
        narrow: jail::narrow,
    };
    process.run()?;
    Ok(())
}

/// `argument` with every `{NAME}` replaced by what `words` say.
fn substitute(argument: &str, words: &[(String, String)]) -> String {
    words.iter().fold(argument.to_owned(), |text, (name, word)| text.replace(&format!("{{{name}}}"), word))
}

fn receive() -> Result<(Request, BTreeMap<String, OwnedFd>), Box<dyn std::error::Error>> {
    let stdin = io::stdin();
    let mut bytes = vec![0; MAX_REQUEST_BYTES];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        stdin.as_fd(),
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let request: Request = serde_json::from_slice(&bytes[..message.bytes])?;
    let received: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.len() != request.descriptors.len() {
        return Err("descriptors were lost on the way".into());
    }
    let descriptors = request.descriptors.iter().cloned().zip(received).collect();
    Ok((request, descriptors))
}

#[cfg(test)]
mod tests {
    use kiln_vmm::boot::BootError;

    use super::*;
    use crate::machine::Death;

    #[test]
    fn a_child_that_fails_tells_its_parent_the_way_out_and_whether_the_host_is_to_blame() {
        let told = |error: VmError| {
            let line = failure(&error).line();
            Failure::of_line(line.trim_end()).unwrap_or_else(|| panic!("no failure: {line}"))
        };
        let boot = told(VmError::Boot(BootError::NoKernel));
        assert!(!boot.is_hosts);
        let death = Death::Failed(boot);
        assert!(death.hint().is_some_and(|hint| hint.contains("bzImage")), "{death}");
        let lacks = told(VmError::Lacks("a clock that can be set"));
        assert!(lacks.is_hosts && lacks.hint().is_some_and(|hint| hint.contains("--backend tcg")), "{lacks}");
        let most = told(VmError::Cpus { asked: 9, most: 4 });
        assert!(most.hint().is_some_and(|hint| hint.contains("at most 4")), "{most}");
        let none = io::Error::from(rustix::io::Errno::NOMEM);
        assert!(failure(&none).hint().is_some_and(|hint| hint.contains("memory")));
        assert_eq!(Failure::of_line("kiln: the guest asked for a reset"), None);
    }
}
