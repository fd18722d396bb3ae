//! What is done beside the making of a step's world, each in a process of its own: most machines have more than one
//! processor, and the agent has no threads. All of it is over before anything of the step runs.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use kiln_wire::Setup;
use rustix::io::Errno;
use rustix::process::{Pid, setsid};

use crate::failure::{Doing, Failure};
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

    /// Begins to make the world of `setup` and to start a program in it, all of which goes with the process.
    ///
    /// # Errors
    /// There can be no process.
    pub fn rehearsing(setup: &Setup, shares: Option<OwnedFd>, stock: &mut Stock) -> Result<Self, Failure> {
        let pieces = stock.take()?;
        Self::start_in(sys::OWN_WORLD, "rehearsing a step".to_owned(), || {
            rehearse(setup, shares, pieces, stock)
        })
    }

    /// Begins to start a program as a command is started, which does nothing: an emulator has translated then, by another
    /// processor, what the kernel does for it.
    ///
    /// # Errors
    /// There can be no process.
    pub fn warming_up() -> Result<Self, Failure> {
        Self::start_in(sys::OWN_WORLD, "starting a program".to_owned(), warm_up)
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

/// What a command's process does before it executes a program.
fn become_like_a_command() -> Result<(), Errno> {
    setsid()?;
    sys::reset_signals();
    sys::close_on_exec_above_stdio()
}

fn warm_up() -> Result<(), Errno> {
    reap::mount_proc()?;
    let _signals = sys::child_signals()?;
    match sys::fork(0)? {
        Fork::Child => {
            become_like_a_command()?;
            // Not the first process of its namespace, it ends at once.
            let words = StringArray::new(vec![c"agent".to_owned()]);
            Err(sys::execve(c"/init", &words, &StringArray::new(Vec::new())))
        }
        Fork::Parent { child } => sys::wait(Some(child), true).map(drop),
    }
}

fn rehearse(what: &Setup, shares: Option<OwnedFd>, pieces: Pieces, stock: &Stock) -> Result<(), Errno> {
    let _world = setup::make(what, shares, pieces, stock).map_err(|failure| failure.errno)?;
    reap::enter_root()?;
    let signals = sys::child_signals()?;
    match sys::fork(0)? {
        Fork::Child => {
            become_like_a_command()?;
            // What they do does not matter: the kernel has started once what most commands begin with.
            let nothing = StringArray::new(Vec::new());
            let words = [c"sh", c"-eu", c"-c", c"/bin/true; exit"].map(CStr::to_owned);
            let _ = sys::execve(c"/bin/sh", &StringArray::new(words.to_vec()), &nothing);
            Err(sys::execve(c"/bin/true", &StringArray::new(vec![c"true".to_owned()]), &nothing))
        }
        // What it holds of the agent is nothing for a program of the root's.
        Fork::Parent { child } => sys::close_all_but([signals.as_fd(), signals.as_fd()], || {
            let _ = sys::wait(Some(child), true);
            sys::exit(0)
        }),
    }
}
