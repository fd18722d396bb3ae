//! A kiln that can stay after its caller has its answer.
//!
//! Forking a process that has threads is no option, and neither is doing so before anything is known. So the run is done
//! from its start by a second kiln, in a session of its own: no terminal's hang-up and no Ctrl-C at a later prompt reaches
//! it or its machine. It has its caller's streams, and dies with its caller, until the moment it stays: then it lets go of
//! all of them and gives the exit status. Until then the first kiln only waits, and passes signals on; kill -9 of it ends
//! the run like any other end.
#![expect(unsafe_code, reason = "marks descriptors that kiln was started with")]

use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use rustix::process::{Pid, Signal};
use signal_hook::iterator::Signals;

use crate::threads::{self, Refused};

/// The first argument that makes `kiln` the one that can stay.
pub const SUBCOMMAND: &str = "__keep";

/// Runs this kiln again with `arguments`, the program's name first, and gives its exit status: when it ends, or when it
/// stays. `signals` are passed on to it: of a terminal's it hears nothing itself.
///
/// # Errors
/// What starting it says.
pub fn run(mut arguments: impl Iterator<Item = OsString>, signals: &[i32]) -> io::Result<u8> {
    let (mut ours, theirs) = UnixStream::pair()?;
    close_others_on_exec()?;
    // From here on, so that none ends this process and leaves the other without a word.
    let mut signals = Signals::new(signals)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(arguments.next().unwrap_or_else(|| "kiln".into()));
    // Its standard input is what tells it who started it; the real one goes over that.
    command.arg(SUBCOMMAND).args(arguments).stdin(OwnedFd::from(theirs));
    let mut child = command.spawn().map_err(Refused::told("process"))?;
    // It holds the other end, which must not live on here.
    drop(command);
    let pid = Pid::from_child(&child);
    let passing = threads::start("signals", move || {
        for signal in signals.forever() {
            // It may have ended; it is waited for last, so its number is its own until then.
            if let Some(signal) = Signal::from_named_raw(signal) {
                let _ = rustix::process::kill_process(pid, signal);
            }
        }
    });
    if let Err(error) = passing {
        // It has not been told what to do yet.
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    let parent = rustix::process::getpid().as_raw_pid().to_le_bytes();
    let stdin = [io::stdin().as_fd().try_clone_to_owned()?];
    let borrowed = stdin.each_ref().map(AsFd::as_fd);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
    rustix::net::sendmsg(&ours, &[IoSlice::new(&parent)], &mut ancillary, SendFlags::NOSIGNAL)?;
    let mut status = [0];
    match ours.read(&mut status) {
        Ok(1) => Ok(status[0]),
        // It ended; its own status says how.
        _ => {
            let ended = child.wait()?;
            let by_signal =
                || 128_u8.saturating_add(ended.signal().and_then(|n| u8::try_from(n).ok()).unwrap_or(0));
            Ok(ended.code().map_or_else(by_signal, |code| u8::try_from(code).unwrap_or(u8::MAX)))
        }
    }
}

/// The caller of a kiln that can stay.
#[derive(Debug)]
pub struct Caller {
    stream: UnixStream,
}

impl Caller {
    /// In the second kiln, before anything else: takes standard input from the caller, and its fate.
    ///
    /// # Errors
    /// It was not started by [`run`], or its caller is gone.
    pub fn meet() -> io::Result<Self> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        rustix::process::setsid()?;
        // It was executed as /proc/self/exe, which ps(1) and top(1) would show.
        let _ = rustix::thread::set_name(c"kiln");
        let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        let mut parent = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = rustix::net::recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut parent)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let stdin = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        // A caller that died before the first line above was in force is not this process's parent any more.
        let is_there = rustix::process::getppid().map(Pid::as_raw_pid) == Some(i32::from_le_bytes(parent));
        match stdin {
            Some(stdin) if message.bytes == parent.len() && is_there => {
                rustix::stdio::dup2_stdin(&stdin)?;
                Ok(Self { stream })
            }
            _ => Err(io::Error::other("the process that asked for this one is gone")),
        }
    }

    /// Lets go of all that is the caller's (streams, directory, fate) and gives it the exit status.
    ///
    /// # Errors
    /// It is gone, and whoever ended it did not want this process to stay.
    pub fn leave(mut self, status: u8) -> io::Result<()> {
        rustix::process::chdir("/")?;
        let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        rustix::process::set_parent_process_death_signal(None)?;
        self.stream.write_all(&[status])
    }
}

/// Keeps from the second kiln what the first was started with beside its standard streams: whoever waits for the end of
/// such a descriptor would wait for a kept machine.
fn close_others_on_exec() -> io::Result<()> {
    // SAFETY: this closes nothing now, so no owner of a descriptor is cheated; it only marks them for execve.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
