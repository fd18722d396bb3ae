//! A caller's side of a machine's socket: to enter it, or to end it.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::entry::Entry;
use super::place;
use super::ready::{LENDER_PATIENCE, Lifeline, Loan};
use super::registration::is_ours;
use super::talk::{Answer, Greeting, Request, VERSION, hear, hear_descriptors, say};
use crate::agent::{Session, SessionError};
use crate::machine::ready::is_end;

/// How long an owner may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one may that can be done without.
const SHORT_PATIENCE: Duration = Duration::from_secs(1);
/// How long it may take to end: a disk may have to be left clean.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// Why a machine cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// There is no such machine.
    #[error("there is no machine `{name}`")]
    Unknown {
        /// The name.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// Its owner cannot be spoken to.
    #[error("machine `{name}` cannot be reached")]
    Io {
        /// Its name.
        name: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Its owner does not answer.
    #[error("whoever holds machine `{name}` does not answer")]
    Silent {
        /// Its name.
        name: String,
    },
    /// Its owner is not of this user.
    #[error("whoever answers for machine `{name}` is another user's")]
    NotOurs {
        /// Its name.
        name: String,
    },
    /// Another kiln's.
    #[error("machine `{name}` was started by another version of kiln")]
    Version {
        /// Its name.
        name: String,
    },
    /// Its owner does not want to.
    #[error("machine `{name}`: {why}")]
    Refused {
        /// Its name.
        name: String,
        /// In its owner's words.
        why: String,
    },
    /// It did not end, not even by force.
    #[error("machine `{name}` does not end")]
    Endless {
        /// Its name.
        name: String,
    },
    /// The conversation cannot begin.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl DoorError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown { known, .. } if known.is_empty() => Some(
                "there is no machine at all; `kiln run --keep` keeps one, `--store` or KILN_STORE names another store"
                    .to_owned(),
            ),
            Self::Unknown { known, .. } => Some(format!("there is {}", known.join(", "))),
            Self::Silent { name } => Some(format!("end it by force: kiln stop {name}")),
            Self::Version { name } => Some(format!("enter it with that kiln, or end it: kiln stop {name}")),
            _ => None,
        }
    }
}

/// A machine's open door.
#[derive(Debug)]
pub struct Door {
    area: PathBuf,
    entry: Entry,
    /// None where its owner does not answer.
    stream: io::Result<(UnixStream, Greeting)>,
}

impl Door {
    pub(super) fn open(area: &Path, entry: Entry) -> Result<Self, DoorError> {
        Self::open_within(area, entry, PATIENCE)
    }

    /// Of a machine that one can do without.
    pub(super) fn open_soon(area: &Path, entry: Entry) -> Result<Self, DoorError> {
        Self::open_within(area, entry, SHORT_PATIENCE)
    }

    fn open_within(area: &Path, entry: Entry, patience: Duration) -> Result<Self, DoorError> {
        let stream = place::connect(area, &entry.name).and_then(|stream| {
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            Ok(stream)
        });
        if stream.as_ref().is_ok_and(|stream| !is_ours(stream)) {
            return Err(DoorError::NotOurs { name: entry.name });
        }
        let stream = stream.and_then(|stream| {
            let greeting = hear(&stream)?;
            Ok((stream, greeting))
        });
        Ok(Self { area: area.to_owned(), entry, stream })
    }

    /// Enters the machine, to run one command: the session's first, and only one.
    ///
    /// # Errors
    /// [`DoorError`].
    pub fn enter(self) -> Result<Session, DoorError> {
        let name = self.entry.name;
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::WouldBlock => DoorError::Silent { name: name.clone() },
            _ => DoorError::Io { name: name.clone(), source },
        };
        let (stream, greeting) = self.stream.map_err(io)?;
        if greeting != Greeting::ours() {
            return Err(DoorError::Version { name });
        }
        let answer = say(&stream, &Request::Enter).and_then(|()| hear(&stream));
        match answer.map_err(io)? {
            Answer::Granted => {}
            Answer::Refused(why) => return Err(DoorError::Refused { name, why }),
        }
        stream.set_read_timeout(None).map_err(io)?;
        Ok(Session::join(stream)?)
    }

    /// Borrows the machine for a step.
    ///
    /// # Errors
    /// Its owner does not want to, or does not answer in time.
    pub(super) fn borrow(mut self) -> io::Result<Loan> {
        let stream = std::mem::replace(&mut self.stream, Err(io::ErrorKind::NotConnected.into()));
        let loan = stream.and_then(|(stream, greeting)| Self::borrow_over(stream, greeting));
        if matches!(&loan, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            // It may have been stopped by a signal, and would not end by itself.
            let _ = self.kill();
        }
        loan
    }

    fn borrow_over(stream: UnixStream, greeting: Greeting) -> io::Result<Loan> {
        if greeting != Greeting::ours() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        say(&stream, &Request::Borrow)?;
        if let Answer::Refused(why) = hear(&stream)? {
            return Err(io::Error::other(why));
        }
        let (identity, has_rehearsed, notes) = hear(&stream)?;
        let descriptors = hear_descriptors(&stream, 2)?.try_into();
        let descriptors = descriptors.map_err(|_| io::ErrorKind::InvalidData)?;
        stream.set_read_timeout(Some(LENDER_PATIENCE))?;
        Ok(Loan { identity, has_rehearsed, notes, descriptors, lender: Box::new(Lifeline::new(stream)) })
    }

    /// Ends the machine, and whoever holds it; by force where it does not answer.
    ///
    /// # Errors
    /// [`DoorError::Endless`], [`DoorError::Io`]; [`DoorError::Refused`] of one that was ready and has a step meanwhile.
    pub fn stop(self) -> Result<(), DoorError> {
        let mut refused = None;
        let asked = match &self.stream {
            Ok((stream, greeting)) if greeting.version == VERSION => {
                let mut ends = || -> io::Result<()> {
                    say(stream, &Request::Stop)?;
                    if let Answer::Refused(why) = hear(stream)? {
                        refused = Some(why);
                        return Ok(());
                    }
                    stream.set_read_timeout(Some(END_PATIENCE))?;
                    // Nothing more is said; the stream ends with the process.
                    hear::<Answer>(stream).map(drop)
                };
                matches!(ends(), Err(error) if is_end(&error))
            }
            _ => false,
        };
        if let Some(why) = refused {
            return Err(DoorError::Refused { name: self.entry.name, why });
        }
        if asked || !place::is_alive(&self.area, &self.entry.name) {
            return Ok(());
        }
        self.kill()
    }

    fn kill(&self) -> Result<(), DoorError> {
        let name = self.entry.name.clone();
        let io = |source| DoorError::Io { name: name.clone(), source };
        let pid = Pid::from_raw(self.entry.pid).ok_or_else(|| io(io::ErrorKind::InvalidData.into()))?;
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        // The owner locks its place for life: where the lock still holds, its number is still its own.
        if !place::is_alive(&self.area, &name) {
            return Ok(());
        }
        pidfd_send_signal(&process, Signal::KILL).map_err(|errno| io(errno.into()))?;
        let mut fds =
            [rustix::event::PollFd::from_borrowed_fd(process.as_fd(), rustix::event::PollFlags::IN)];
        let patience = rustix::time::Timespec { tv_sec: 10, tv_nsec: 0 };
        match rustix::event::poll(&mut fds, Some(&patience)) {
            Ok(1..) => Ok(()),
            _ => Err(DoorError::Endless { name }),
        }
    }
}
