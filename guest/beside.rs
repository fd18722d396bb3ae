//! What is done beside the making of a step's world, each in a process of its own: most machines have more than one
//! processor, and the agent has no threads. All of it is over before a command runs.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use kiln_wire::Setup;
use rustix::io::{Errno, read, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, kill_process};

use crate::failure::{Doing, Failure};
use crate::setup::{ROOT_LOWER, RootDisk};
use crate::stock::{Pieces, Stock};
use crate::sys::{self, Fork, StringArray};
use crate::{reap, setup, swap};

/// A process that does one thing.
pub struct Beside {
    child: Pid,
    what: String,
}

impl Beside {
    /// Begins to swap to `device` instead of whatever of it is swapped to, see [`swap::to`].
    ///
    /// # Errors
    /// There can be no process.
    pub fn swapping(device: &str, bytes: u64) -> Result<Self, Failure> {
        Self::start_in(0, format!("swapping to {device}"), || swap::to(device, bytes))
    }

    fn start_in(
        namespaces: libc::c_int,
        what: String,
        act: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<Self, Failure> {
        match sys::fork(namespaces).doing(|| what.clone())? {
            Fork::Child => {
                let errno = act().err().map_or(0, Errno::raw_os_error);
                sys::exit(u8::try_from(errno).unwrap_or(u8::MAX))
            }
            Fork::Parent { child } => Ok(Self { child, what }),
        }
    }

    /// Begins to end it, however far it is.
    fn kill(&self) {
        // Nobody but this process waits for it, so the number is still its own.
        let _ = kill_process(self.child, Signal::KILL);
    }

    /// Waits for it to end, and gives what it came to.
    ///
    /// # Errors
    /// What went wrong.
    pub fn join(self) -> Result<(), Failure> {
        let ended = loop {
            match sys::wait(Some(self.child), true) {
                Ok(Some(ended)) => break ended,
                Ok(None) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Failure::new(self.what, errno)),
            }
        };
        match libc::WIFEXITED(ended.status).then(|| libc::WEXITSTATUS(ended.status)) {
            Some(0) => Ok(()),
            Some(errno) => Err(Failure::new(self.what, Errno::from_raw_os_error(errno))),
            None => Err(Failure::new(self.what, Errno::INTR)),
        }
    }
}

/// A process that waits for a step, mounts its root then while the agent does the rest, and starts a program of the root's as a
/// command is started: what the kernel does for a command, an emulator has translated by another processor when there is one.
pub struct WarmUp {
    helper: Beside,
    /// Out go the root's disk and leave to start a program, in comes whether the root is mounted.
    control: OwnedFd,
}

impl WarmUp {
    /// Makes it, before a step is known.
    ///
    /// # Errors
    /// There can be no process.
    pub fn prepare() -> Result<Self, Failure> {
        let what = "preparing a process";
        let (control, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .doing(|| what)?;
        // Whatever it starts ends with it.
        let helper = Beside::start_in(libc::CLONE_NEWPID, what.to_owned(), || {
            sys::close_all_but([theirs.as_fd(), theirs.as_fd()], || {
                let _ = warm_up(&theirs);
                sys::exit(0)
            })
        })?;
        Ok(Self { helper, control })
    }

    /// Lets it mount `disk` at its place, if the root is on one.
    pub fn begin(&self, disk: Option<&RootDisk>) {
        let words = disk.map_or("none".to_owned(), |disk| format!("{} {}", disk.device, disk.filesystem));
        // If it cannot be told, it does not help.
        let _ = write(&self.control, words.as_bytes());
    }

    /// Lets it start a program, which may draw random numbers.
    pub fn go_on(&self) {
        let _ = write(&self.control, &[1]);
    }

    /// Whether what it was to mount is mounted. Waits until it is, or cannot be.
    pub fn has_mounted(&self) -> bool {
        let mut is_mounted = [0];
        read(&self.control, &mut is_mounted) == Ok(1) && is_mounted == [1]
    }

    /// Begins to end it, however far it is, and what it has started.
    pub fn kill(&self) {
        self.helper.kill();
    }

    /// Ends it, and waits until nothing of it is left.
    pub fn end(self) {
        self.kill();
        // That it was killed.
        let _ = self.helper.join();
    }
}

fn warm_up(control: &OwnedFd) -> Result<(), Errno> {
    reap::be_spared_no_longer()?;
    let mut words = [0; 256];
    let length = read(control, &mut words)?;
    let words = str::from_utf8(words.get(..length).unwrap_or_default()).unwrap_or_default();
    let is_mounted = words.split_once(' ').is_some_and(|(device, filesystem)| {
        RootDisk { device: device.to_owned(), filesystem: filesystem.to_owned() }.mount().is_ok()
    });
    write(control, &[u8::from(is_mounted)])?;
    if read(control, &mut [0])? == 0 {
        return Ok(());
    }
    // No file system is mounted for it, which would have a number that a mount of the step's may have: a step sees those. A
    // program of the root's is the first of its processes, and sees no other.
    match sys::fork(libc::CLONE_NEWNS | if is_mounted { libc::CLONE_NEWPID } else { 0 })? {
        Fork::Child => {
            reap::leave_agent()?;
            if is_mounted {
                reap::enter(ROOT_LOWER)?;
                return Err(execute(c"/bin/true", &[c"true"]));
            }
            // Not the first process of its namespace, the agent ends at once.
            Err(execute(c"/init", &[c"agent"]))
        }
        Fork::Parent { child } => sys::wait(Some(child), true).map(drop),
    }
}

fn execute(path: &CStr, words: &[&CStr]) -> Errno {
    let words = words.iter().map(|&word| word.to_owned()).collect();
    sys::execve(path, &StringArray::new(words), &StringArray::new(Vec::new()))
}

/// Makes the world of `setup` and starts a program in it, all of which goes with the process that does it: but for the root,
/// which stays mounted as long as the kernel is to keep what it has read of it.
///
/// # Errors
/// What failed, by name.
pub fn rehearse(setup: Setup, shares: Option<OwnedFd>, stock: &mut Stock) -> Result<(), Failure> {
    let disk = RootDisk::of(&setup, &stock.disks)?;
    let pieces = stock.take()?;
    setup::seed(&setup.seed)?;
    let warm_up = stock.warm_up.take();
    if let Some(disk) = disk.filter(|disk| stock.root.as_ref() != Some(disk)) {
        let is_mounted = match warm_up.as_ref().filter(|_| setup.warm_up) {
            Some(warm_up) => {
                warm_up.begin(Some(&disk));
                warm_up.go_on();
                warm_up.has_mounted()
            }
            None => disk.mount().is_ok(),
        };
        stock.root = is_mounted.then_some(disk);
    }
    let rehearsal = Beside::start_in(sys::OWN_WORLD, "rehearsing a step".to_owned(), || {
        play(&setup, shares, pieces, stock)
    });
    let ended = rehearsal.and_then(Beside::join);
    if let Some(warm_up) = warm_up {
        warm_up.end();
    }
    // What is swapped to is the machine's and not the rehearsal's.
    ended.map(|()| stock.swapped = setup.scratch.or(stock.swapped.take()))
}

fn play(what: &Setup, shares: Option<OwnedFd>, pieces: Pieces, stock: &Stock) -> Result<(), Errno> {
    let _world = setup::make(what, shares, pieces, stock).map_err(|failure| failure.errno)?;
    reap::enter_root()?;
    let signals = sys::child_signals()?;
    match sys::fork(0)? {
        Fork::Child => {
            reap::leave_agent()?;
            reap::be_spared_no_longer()?;
            // What they do does not matter: the kernel has started once what most commands begin with.
            execute(c"/bin/sh", &[c"sh", c"-eu", c"-c", c"/bin/true; exit"]);
            Err(execute(c"/bin/true", &[c"true"]))
        }
        // What it holds of the agent is nothing for a program of the root's.
        Fork::Parent { child } => sys::close_all_but([signals.as_fd(), signals.as_fd()], || {
            let _ = sys::wait(Some(child), true);
            sys::exit(0)
        }),
    }
}
