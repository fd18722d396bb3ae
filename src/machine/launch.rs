//! The child's half of starting a process: `kiln __launch`, which becomes what its parent asks for.
//!
//! The parent sends one message over standard input: what to become, and the descriptors it may hold, by name. So
//! no descriptor is ever inheritable in the parent, whose other threads may be starting processes too. Before
//! anything else the child asks to die with its parent. This is the door that a jail closes behind itself.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

/// The first argument that makes `kiln` a child of itself.
pub const SUBCOMMAND: &str = "__launch";

/// Most bytes of a request; an argument vector is far below it.
pub(super) const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Most descriptors of a request (Linux's SCM_MAX_FD).
pub(super) const MAX_DESCRIPTORS: usize = 253;

/// What the child is to become.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Become {
    /// Another program, started with an empty environment. `{NAME}` in an argument stands for the number of the
    /// descriptor of that name.
    Program {
        /// Its path.
        path: PathBuf,
        /// Its arguments, the program's name left out.
        arguments: Vec<String>,
    },
    /// The device process of a machine: descriptors `fs`, `control` and, with a CID, `vsock`.
    Devices {
        /// The guest's vsock address, where it has the device.
        vsock_cid: Option<u64>,
    },
    /// The code-running test of /dev/kvm, which prints its figure.
    KvmProbe,
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

/// Runs the child. Returns only when it could not become what was asked, or when that has ended.
pub fn main() -> ExitCode {
    match launch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The parent reads this pipe and shows it as what the program said.
            let _ = io::Write::write_all(&mut io::stderr(), format!("kiln: {error}\n").as_bytes());
            ExitCode::from(125)
        }
    }
}

fn launch() -> Result<(), Box<dyn std::error::Error>> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let (request, descriptors) = receive()?;
    if rustix::process::getppid().map(Pid::as_raw_pid) != Some(request.parent) {
        return Err("the process that asked for this one is gone".into());
    }
    match request.what {
        Become::Program { path, arguments } => {
            for descriptor in descriptors.values() {
                rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
            }
            let arguments = arguments.iter().map(|text| substitute(text, &descriptors));
            let error =
                Command::new(path).args(arguments).env_clear().stdin(std::process::Stdio::null()).exec();
            Err(error.into())
        }
        Become::Devices { vsock_cid } => serve_devices(descriptors, vsock_cid),
        Become::KvmProbe => {
            let speed = super::probe::measure_here()?;
            io::Write::write_all(&mut io::stdout(), format!("{speed}\n").as_bytes())?;
            Ok(())
        }
    }
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
    };
    process.run()?;
    Ok(())
}

fn substitute(argument: &str, descriptors: &BTreeMap<String, OwnedFd>) -> OsString {
    let mut text = argument.to_owned();
    for (name, descriptor) in descriptors {
        text = text.replace(&format!("{{{name}}}"), &descriptor.as_raw_fd().to_string());
    }
    text.into()
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
