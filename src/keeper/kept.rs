//! A machine whose step is over, held for whoever wants to look into it, and for no longer than that.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kiln_wire::Exec;

use super::entry::Entry;
use super::registration::Registration;
use super::relay::{Guests, News, complete};
use crate::agent::{Hub, Session};
use crate::machine::Machine;

/// How long a machine may take to leave its disks clean.
const CLEAN_PATIENCE: Duration = Duration::from_secs(20);

/// What is left of a run that can be looked into.
pub struct Kept {
    /// The machine.
    pub machine: Box<dyn Machine>,
    /// The conversation with its agent, between commands.
    pub session: Session,
    /// Its place in the registry.
    pub registration: Registration,
    /// What its step's command ran in: the variables.
    pub environment: Vec<Vec<u8>>,
    /// And the working directory.
    pub directory: Vec<u8>,
    /// Whether it has the toolbox.
    pub has_toolbox: bool,
    /// Whether it writes to a disk of the user's, which has to be left clean.
    pub writes_disks: bool,
}

/// A kept machine that can be entered.
pub struct Keeper {
    // Dropped in this order: who finds no entry finds no machine either.
    machine: Box<dyn Machine>,
    registration: Registration,
    hub: Hub,
    news: Receiver<News>,
    idle: Duration,
    writes_disks: bool,
}

impl Kept {
    /// `exec` with what it leaves out of what the step's command ran in.
    pub fn complete(&self, exec: Exec) -> Exec {
        complete(exec, &self.environment, &self.directory)
    }

    /// Opens it to callers; with nobody in it, it stays for `idle`.
    ///
    /// # Errors
    /// There can be no threads, or its entry cannot be written.
    pub fn open(self, idle: Duration) -> io::Result<Keeper> {
        let Self { machine, session, mut registration, environment, directory, writes_disks, .. } = self;
        let (sender, news) = channel();
        let at_end = sender.clone();
        let hub = Hub::new(session, move |_| {
            let _ = at_end.send(News::Gone);
        })?;
        let guests = Guests::new(hub.clone(), environment, directory, sender);
        registration.let_in(Arc::new(guests), idle)?;
        Ok(Keeper { machine, registration, hub, news, idle, writes_disks })
    }
}

impl Keeper {
    /// What the registry says of the machine.
    pub fn entry(&self) -> &Entry {
        self.registration.entry()
    }

    /// Stays until somebody stops the machine, nobody was in it for its idle time, or it dies by itself.
    pub fn stay(self) {
        let (mut callers, mut alive) = (0_usize, true);
        let mut since = Instant::now();
        loop {
            let news = match callers {
                // A moment that no clock reaches never comes.
                0 => match self.idle.checked_sub(since.elapsed()) {
                    Some(left) => self.news.recv_timeout(left),
                    None => Err(RecvTimeoutError::Timeout),
                },
                _ => self.news.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match news {
                Ok(News::Came) => callers += 1,
                Ok(News::Left) => {
                    callers = callers.saturating_sub(1);
                    since = Instant::now();
                }
                Ok(News::Gone) => {
                    alive = false;
                    break;
                }
                Ok(News::Stop) | Err(_) => break,
            }
        }
        if alive && self.writes_disks && self.hub.power_off().is_ok() {
            let by = Instant::now() + CLEAN_PATIENCE;
            while let Some(left) = by.checked_duration_since(Instant::now()) {
                match self.news.recv_timeout(left) {
                    Ok(News::Gone) | Err(_) => break,
                    Ok(_) => {}
                }
            }
        }
        drop(self.machine);
        drop(self.registration);
    }
}
