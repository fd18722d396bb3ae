//! Ready machines: copies of a template that were made ahead of need, with a step's disks and none of its shares.
//!
//! Whoever made one holds all of it ([`Ready`]), and lends it for one step: two descriptors go to the borrower, the wire and
//! the connection to the device process. The borrower ([`Lent`]) adds its shares and talks to the agent as with a machine of
//! its own; what else it must know or do it asks of the lender ([`Lender`]).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kiln_digest::Digest;
use kiln_virtio::control::Client;
use kiln_virtio::fs::record::Record;

use super::server::give;
use super::slots::Places;
use super::template::greeting::{greet, rehearse};
use super::template::{Freezer, suits};
use super::{Death, Disk, Identity, Machine, MachineError, Origin, Share, Spec};

/// What whoever lends is called.
const LENDER: &str = "the process that held the machine";
/// What became of one that says nothing.
const SILENT: &str = "did not answer, and was killed";

/// How long an agent that is ready may take to say so.
const CHECK_PATIENCE: Duration = Duration::from_millis(500);

/// How long a rehearsal may take.
const REHEARSAL_PATIENCE: Duration = Duration::from_secs(10);

/// A machine that can be lent.
pub(super) trait Lendable: Machine {
    /// The wire, where nobody has taken it.
    fn wire_held(&self) -> Option<&UnixStream>;

    /// The connection to whoever serves its shares.
    fn control_socket(&self) -> Option<&UnixStream>;

    /// Ends it.
    fn stop(&mut self);

    /// Takes what the user should know of how it came to be.
    fn note(&mut self, notes: Vec<String>);

    /// Gives it `shares`, which are all that it may read from then on.
    ///
    /// # Errors
    /// Whoever serves them does not take them.
    fn give(&mut self, shares: &[Share]) -> Result<(), MachineError>;
}

/// A machine that waits for its step.
pub struct Ready {
    machine: Box<dyn Lendable>,
}

impl Ready {
    /// What it is.
    pub fn identity(&self) -> &Identity {
        self.machine.identity()
    }

    /// What the user should know of how it came to be.
    pub fn notes(&self) -> &[String] {
        self.machine.notes()
    }

    /// What a borrower gets: the wire, and the connection to the device process.
    ///
    /// # Errors
    /// What dup(2) says; `NotConnected` where the machine has no wire any more.
    pub fn descriptors(&self) -> io::Result<[OwnedFd; 2]> {
        match (self.machine.wire_held(), self.machine.control_socket()) {
            (Some(wire), Some(control)) => Ok([wire.try_clone()?.into(), control.try_clone()?.into()]),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// The machine itself, for what its borrower asks.
    pub fn machine(&mut self) -> &mut dyn Machine {
        &mut *self.machine
    }

    /// Asks the agent whether it is there.
    ///
    /// # Errors
    /// It does not answer.
    pub fn check(&mut self) -> io::Result<()> {
        greet(self.wire()?, CHECK_PATIENCE).map(drop)
    }

    /// Lets the agent rehearse a step: `message` says which.
    ///
    /// # Errors
    /// It cannot.
    pub fn rehearse(&mut self, message: &[u8]) -> io::Result<()> {
        rehearse(self.wire()?, message, REHEARSAL_PATIENCE)
    }

    fn wire(&self) -> io::Result<&UnixStream> {
        self.machine.wire_held().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Ends the guest.
    pub fn stop(&mut self) {
        self.machine.stop();
    }
}

/// Whether an error in what is said to another process means that it is gone.
pub fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// Whoever holds a machine that was lent.
pub trait Lender: Send {
    /// Ends the guest.
    ///
    /// # Errors
    /// The lender is gone, and the guest with it; `WouldBlock` where it did not answer, and was killed.
    fn stop(&mut self) -> io::Result<()>;

    /// Waits at most `patience` for the machine to be gone, and says how it went.
    ///
    /// # Errors
    /// The lender is gone, and does not say.
    fn death(&mut self, patience: Duration) -> io::Result<Death>;

    /// The end of what the guest's kernel printed.
    ///
    /// # Errors
    /// The lender is gone.
    fn console(&self) -> io::Result<String>;

    /// Its process, where the system says.
    fn process(&self) -> Option<i32>;
}

/// A machine that was lent.
pub struct Lent {
    identity: Identity,
    wire: Option<UnixStream>,
    control: Client,
    lender: Box<dyn Lender>,
    notes: Vec<String>,
}

impl Lent {
    /// Takes over what `lender` gave, and gives the machine its shares. `notes` are what the user should know of how it came
    /// to be.
    ///
    /// # Errors
    /// The device process does not take them.
    pub fn new(
        identity: Identity,
        [wire, control]: [OwnedFd; 2],
        lender: Box<dyn Lender>,
        notes: Vec<String>,
        shares: &[Share],
    ) -> Result<Self, MachineError> {
        let control = Client::new(UnixStream::from(control));
        let control = control.map_err(MachineError::io("speak to the device process"))?;
        give(&control, shares).map_err(|error| MachineError::Device(error.to_string()))?;
        let identity = Identity { origin: Origin::Ready, ..identity };
        Ok(Self { identity, wire: Some(wire.into()), control, lender, notes })
    }
}

impl Machine for Lent {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn wire(&mut self) -> Result<UnixStream, MachineError> {
        self.wire.take().ok_or_else(|| MachineError::Device("the wire was taken before".to_owned()))
    }

    fn observed(&mut self) -> Result<Record, MachineError> {
        // Where whoever serves the shares also runs the guest, it has to stay for the record. Where the lender is gone, so is
        // the guest; where it says nothing, the guest may read on after the record was taken.
        if self.control.stop_guest().is_err()
            && let Err(error) = self.lender.stop()
            && error.kind() == io::ErrorKind::WouldBlock
        {
            return Err(MachineError::Device(format!("{LENDER} {SILENT}")));
        }
        self.observed_so_far()
    }

    fn observed_so_far(&mut self) -> Result<Record, MachineError> {
        self.control.finish().map_err(|error| MachineError::Device(error.to_string()))
    }

    fn death(&mut self, patience: Duration) -> Death {
        self.lender.death(patience).unwrap_or_else(|error| Death::Killed {
            program: LENDER.into(),
            status: match error.kind() {
                io::ErrorKind::WouldBlock => SILENT.to_owned(),
                _ if is_end(&error) => "without a word".to_owned(),
                _ => error.to_string(),
            },
            said: String::new(),
        })
    }

    fn console(&self) -> String {
        self.lender.console().unwrap_or_default()
    }

    fn processes(&self) -> Vec<i32> {
        self.lender.process().into_iter().collect()
    }
}

/// A backend whose machines can be made ready.
pub trait Readies {
    /// Under which key a machine for `spec` can be made ready and found; none where it has to be made for its step.
    ///
    /// # Errors
    /// A program or a disk cannot be looked at.
    fn ready_key(&self, spec: &Spec) -> io::Result<Option<Digest>>;

    /// Makes a machine ready for a step with the disks of `spec`; none where there is no template for it, of which the run
    /// that looked for one has told.
    ///
    /// # Errors
    /// [`MachineError`]: what came of making it.
    fn make_ready(&self, spec: &Spec) -> Result<Option<Ready>, MachineError>;
}

impl<F: Freezer<Machine: 'static>> Readies for F {
    fn ready_key(&self, spec: &Spec) -> io::Result<Option<Digest>> {
        if self.templates().is_none() || !suits(spec) {
            return Ok(None);
        }
        let mut parts = vec![self.key(spec)?.to_string()];
        for (index, disk) in Places::of(&spec.disks).numbered() {
            parts.push(format!("{index} {}", identity(disk)?));
        }
        Ok(Some(Digest::of(parts.join("\n").as_bytes())))
    }

    fn make_ready(&self, spec: &Spec) -> Result<Option<Ready>, MachineError> {
        match self.templates().map(|templates| templates.copy(self, spec)) {
            Some(Ok(machine)) => Ok(Some(Ready { machine: Box::new(machine) })),
            Some(Err(notes)) if !notes.is_empty() => Err(MachineError::Device(notes.join("; "))),
            _ => Ok(None),
        }
    }
}

/// Tells what is on a disk: for one that is only read, which file it is and when that changed; for another, its size, as
/// each machine has its own.
fn identity(disk: &Disk) -> io::Result<String> {
    let meta = File::from(disk.file.try_clone()?).metadata()?;
    Ok(match disk.read_only {
        false => format!("writable {}", meta.len()),
        true => format!(
            "{} {} {} {}.{} {}.{}",
            meta.dev(),
            meta.ino(),
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec()
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_disk_that_is_only_read_is_known_by_its_file_and_another_by_its_size() {
        let disk = |file: &File, read_only| Disk {
            serial: "x".to_owned(),
            file: file.try_clone().expect("a descriptor").into(),
            read_only,
        };
        let [one, other] = [(); 2].map(|()| tempfile::tempfile().expect("a file"));
        let shows = |file, read_only| identity(&disk(file, read_only)).expect("a file");
        assert_eq!(shows(&one, true), shows(&one, true));
        assert_ne!(shows(&one, true), shows(&other, true));
        assert_eq!(shows(&one, false), shows(&other, false));
        let before = shows(&one, true);
        one.write_all_at(b"x", 0).expect("room");
        assert_ne!(shows(&one, true), before);
        assert_ne!(shows(&one, false), shows(&other, false));
    }
}
