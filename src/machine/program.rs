//! kiln's program for machines, by the side of kiln: what a guest talks to, and what holds a machine until its step.
//!
//! It is a program of its own, because all of kiln's that is not for that is only of use to whoever takes such a process over,
//! and costs each of them memory: tables of addresses that the loader fills in, process by process.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::MachineError;

/// Its name where cargo builds it.
const NAME: &str = "kiln-machine";

/// Its place beside the folder of an installed kiln.
const INSTALLED: &str = "../libexec/kiln/machine";

/// It is not there.
#[derive(Debug, thiserror::Error)]
#[error("kiln's program for machines was not found: neither `{NAME}` beside kiln nor {INSTALLED}")]
pub struct Missing;

/// What to do about [`Missing`].
pub const HINT: &str = "build it with ci/build, which puts kiln and what belongs to it into target/dist";

// Protects nothing else: set once, before there is a second thread.
static IS_THIS: AtomicBool = AtomicBool::new(false);

/// Says that this process is it.
pub fn is_this() {
    IS_THIS.store(true, Ordering::Relaxed);
}

/// Where it is, if it is there.
pub fn find() -> Option<PathBuf> {
    if IS_THIS.load(Ordering::Relaxed) {
        return Some("/proc/self/exe".into());
    }
    let folder = std::env::current_exe().ok()?.parent()?.to_owned();
    [folder.join(NAME), folder.join(INSTALLED)].into_iter().find(|path| path.is_file())
}

/// Starts it as `subcommand`, with nothing of this process's environment.
///
/// # Errors
/// [`Missing`]; it cannot be opened.
pub(crate) fn command(subcommand: &str) -> io::Result<Command> {
    let mut command = Command::new(path().map_err(io::Error::other)?);
    command.arg(subcommand).env_clear().current_dir("/");
    Ok(command)
}

/// Which file it is.
///
/// # Errors
/// As for starting it.
pub(super) fn metadata() -> io::Result<Metadata> {
    path().map_err(io::Error::other)?.metadata()
}

/// Holds it open from now on.
///
/// # Errors
/// [`Missing`]; it cannot be opened.
pub fn open() -> Result<(), MachineError> {
    path().map(drop)
}

/// The path of the program as it was when it was first asked for: one that is put in its place later may be another version's.
fn path() -> Result<PathBuf, MachineError> {
    // Protects that all see one.
    static OPENED: Mutex<Option<File>> = Mutex::new(None);
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let number = match &*opened {
        Some(file) => file.as_raw_fd(),
        None => {
            let path = find().ok_or(Missing)?;
            let file = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
            let file =
                file.map_err(|errno| MachineError::io("open kiln's program for machines")(errno.into()))?;
            opened.insert(file.into()).as_raw_fd()
        }
    };
    Ok(format!("/proc/self/fd/{number}").into())
}
