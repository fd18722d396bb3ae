//! The conversation with the host: one loop that waits for the wire, the commands and the clock, and does nothing else
//! that could block for long. `List` and `Fetch` are served to their end; commands' output waits in its pipes meanwhile.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kiln_wire::{Exec, FromAgent, ToAgent, VERSION};
use rustix::event::{PollFd, poll};
use rustix::fs::Timespec;
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use crate::boot::{self, Booted};
use crate::command::Command;
use crate::failure::{Doing, Failure, cut, errno_number};
use crate::layer::Listing;
use crate::link::{ABSENCE, Link, LinkError};
use crate::meter::Meter;
use crate::setup::{self, World};
use crate::stock::Stock;
use crate::{beside, shutdown, swap};

/// How often memory in use is sampled while a command runs.
const SAMPLE: Duration = Duration::from_millis(150);

/// Why a session ended without `PowerOff`.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The wire is of no more use.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The host's message does not belong here.
    #[error("the host broke the protocol: {0}")]
    Protocol(&'static str),
    /// The agent cannot work.
    #[error(transparent)]
    Machine(#[from] Failure),
}

/// The state of the conversation.
struct Session {
    link: Link,
    meter: Meter,
    null: OwnedFd,
    /// For the first host that says hello.
    complaints: Vec<Failure>,
    /// The device of shares, until `Setup`.
    shares: Option<OwnedFd>,
    /// What the first host was answered, but for the time.
    about: Option<About>,
    /// Laid in once that host has its answer.
    stock: Option<Stock>,
    world: Option<World>,
    commands: BTreeMap<u32, Command>,
    /// The last `List`: which layer, and what was in it.
    listing: Option<(usize, Listing)>,
    sampled: Instant,
}

/// Talks to the host until it says `PowerOff`, which leaves a machine ready to be switched off.
///
/// # Errors
/// The machine cannot go on.
pub fn run(link: Link, booted: Booted) -> Result<(), SessionError> {
    let meter = Meter::open()?;
    let null = File::options().read(true).open("/dev/null").doing(|| "opening /dev/null")?.into();
    let mut session = Session {
        link,
        meter,
        null,
        complaints: booted.complaints,
        shares: booted.shares,
        about: None,
        stock: None,
        world: None,
        commands: BTreeMap::new(),
        listing: None,
        sampled: Instant::now(),
    };
    loop {
        while let Some(message) = session.link.next()? {
            match message {
                ToAgent::PowerOff => return session.power_off(),
                message => session.answer(message)?,
            }
        }
        session.link.write()?;
        session.wait()?;
        session.advance()?;
    }
}

/// What a machine is.
struct About {
    kernel: String,
    memory_bytes: u64,
    cpus: u16,
}

impl About {
    fn new(meter: &Meter) -> Self {
        let cpus = std::thread::available_parallelism();
        Self {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            memory_bytes: meter.memory_bytes(),
            cpus: cpus.map_or(1, |count| u16::try_from(count.get()).unwrap_or(u16::MAX)),
        }
    }

    fn ready(&self) -> FromAgent {
        let uptime = clock_gettime(ClockId::Boottime);
        let microseconds =
            |time: Timespec| u64::try_from(time.tv_sec * 1_000_000 + time.tv_nsec / 1000).unwrap_or(0);
        FromAgent::Ready {
            version: VERSION,
            kernel: self.kernel.clone(),
            uptime_us: microseconds(uptime),
            memory_bytes: self.memory_bytes,
            cpus: self.cpus,
        }
    }
}

impl Session {
    fn answer(&mut self, message: ToAgent) -> Result<(), SessionError> {
        if let ToAgent::Hello { version } = message {
            return self.greet(version);
        }
        let Some(stock) = &mut self.stock else {
            return Err(SessionError::Protocol("a message before Hello"));
        };
        let result = match message {
            ToAgent::Setup(setup) => {
                if self.world.is_some() {
                    return Err(SessionError::Protocol("a second Setup"));
                }
                self.link.bind();
                let world = stock.take();
                let world = world.and_then(|pieces| setup::make(&setup, self.shares.take(), pieces, stock));
                if let Some(warm_up) = &stock.warm_up {
                    warm_up.kill();
                }
                world.map(|world| {
                    self.world = Some(world);
                    if setup.processes > 0 {
                        match stock.group(setup.processes) {
                            Ok(group) => self.meter.group = Some(group),
                            // A kernel without it runs steps all the same; memory limits them too.
                            Err(failure) => {
                                let text = format!("the step's processes are not limited: {failure}");
                                self.link.queue(&FromAgent::Log(cut(text)));
                            }
                        }
                    }
                    self.link.queue(&FromAgent::SetupDone);
                })
            }
            ToAgent::Rehearse(setup) => {
                if self.world.is_some() {
                    return Err(SessionError::Protocol("a rehearsal after Setup"));
                }
                let shares = self.shares.as_ref().and_then(|shares| shares.try_clone().ok());
                beside::rehearse(setup, shares, stock).map(|()| self.link.queue(&FromAgent::SetupDone))
            }
            ToAgent::Settle { seed, scratch } => {
                if self.world.is_some() {
                    return Err(SessionError::Protocol("a machine that settles after Setup"));
                }
                setup::seed(&seed)
                    .and_then(|()| swap::begin_empty(&scratch, stock))
                    .map(|()| self.link.queue(&FromAgent::SetupDone))
            }
            ToAgent::Mount(mount) => match &mut self.world {
                Some(world) => world.mount(&mount).map(|()| self.link.queue(&FromAgent::Mounted)),
                None => return Err(SessionError::Protocol("a mount before Setup")),
            },
            ToAgent::Exec(exec) => return self.start(&exec),
            // In these, a command that is no longer there has ended meanwhile; the host will learn of it.
            ToAgent::Stdin { id, data } => {
                if self.commands.get_mut(&id).is_some_and(|command| !command.feed(&data)) {
                    return Err(SessionError::Protocol("more input than there was credit for"));
                }
                return Ok(());
            }
            ToAgent::Credit { id, bytes } => {
                if self.commands.get_mut(&id).is_some_and(|command| !command.regain(bytes)) {
                    return Err(SessionError::Protocol("more output taken than was sent"));
                }
                return Ok(());
            }
            ToAgent::Resize { id, size } => {
                if let Some(command) = self.commands.get(&id) {
                    command.resize(size);
                }
                return Ok(());
            }
            ToAgent::Signal { id, signal } => {
                if let Some(command) = self.commands.get(&id) {
                    command.signal(signal);
                }
                return Ok(());
            }
            ToAgent::List { target } => self.list(&target),
            ToAgent::Fetch { ordinals } => self.fetch(&ordinals),
            // These come elsewhere.
            ToAgent::Hello { .. } | ToAgent::PowerOff => Ok(()),
        };
        if let Err(failure) = result {
            self.link.queue(&failure.message());
        }
        Ok(())
    }

    fn greet(&mut self, version: u16) -> Result<(), SessionError> {
        if self.world.is_some() {
            return Err(SessionError::Protocol("a Hello after Setup"));
        }
        let about = self.about.get_or_insert_with(|| About::new(&self.meter));
        self.link.queue(&about.ready());
        if version != VERSION {
            self.link.flush()?;
            return Err(SessionError::Protocol("another version"));
        }
        let mut complaints = std::mem::take(&mut self.complaints);
        if self.stock.is_none() {
            // The host has its answer first. A machine is frozen after another, so its copies have these drivers, and what is
            // in stock.
            self.link.flush()?;
            complaints.extend(boot::load_drivers());
            self.stock = Some(Stock::lay_in(about.cpus));
        }
        for complaint in complaints {
            self.link.queue(&FromAgent::Log(cut(complaint.to_string())));
        }
        Ok(())
    }

    fn start(&mut self, exec: &Exec) -> Result<(), SessionError> {
        let (Some(world), Some(stock)) = (&self.world, &mut self.stock) else {
            return Err(SessionError::Protocol("a command before Setup"));
        };
        if self.commands.contains_key(&exec.id) {
            return Err(SessionError::Protocol("a second command with the same id"));
        }
        stock.settle();
        match Command::start(exec, &self.null, &world.terminals, &self.meter) {
            Ok(command) => {
                self.commands.insert(exec.id, command);
            }
            Err(error) => {
                let what = "making the command's streams and processes".to_owned();
                let (id, errno, why) = (exec.id, errno_number(error.0), String::new());
                self.link.queue(&FromAgent::ExecFailed { id, what, errno, why });
            }
        }
        Ok(())
    }

    fn list(&mut self, target: &[u8]) -> Result<(), Failure> {
        let layers = self.world.as_ref().map_or(&[][..], World::layers);
        let found = layers.iter().enumerate().find(|(_, layer)| layer.is_at(target));
        let what = || format!("listing the layer of {}", target.escape_ascii());
        let (index, layer) = found.ok_or(Errno::NOENT).doing(what)?;
        self.listing = None;
        self.listing = Some((index, layer.list(&mut self.link)?));
        Ok(())
    }

    fn fetch(&mut self, ordinals: &[u32]) -> Result<(), Failure> {
        let listed = self.listing.as_ref().zip(self.world.as_ref());
        let ((index, listing), world) = listed.ok_or(Errno::NOENT).doing(|| "fetching before a listing")?;
        for &ordinal in ordinals {
            let path = listing.path(ordinal).zip(world.layers().get(*index));
            let (path, layer) = path.ok_or(Errno::NOENT).doing(|| format!("fetching entry {ordinal}"))?;
            layer.fetch(ordinal, &path, &mut self.link)?;
        }
        self.link.queue(&FromAgent::FetchDone);
        Ok(())
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> Result<(), SessionError> {
        let has_room = self.link.has_room();
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        fds.extend(self.link.interest().map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)));
        for command in self.commands.values() {
            fds.extend(command.interests(has_room).map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)));
        }
        let now = Instant::now();
        let deadlines = self.commands.values().filter_map(Command::wake_at);
        let sample = (!self.commands.is_empty()).then(|| self.sampled + SAMPLE);
        let absence = self.link.is_absent().then(|| now + ABSENCE);
        let wake_at = deadlines.chain(sample).chain(absence).min();
        let timeout = wake_at.map(|wake_at| {
            let rest = wake_at.saturating_duration_since(now);
            Timespec {
                tv_sec: i64::try_from(rest.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: rest.subsec_nanos().into(),
            }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(Failure::new("waiting", error).into()),
        }
    }

    /// Looks everywhere: all descriptors are non-blocking, and there are few of them.
    fn advance(&mut self) -> Result<(), SessionError> {
        self.link.read()?;
        let now = Instant::now();
        if !self.commands.is_empty() && now >= self.sampled + SAMPLE {
            self.sampled = now;
            let used_bytes = self.meter.used_bytes();
            self.commands.values_mut().for_each(|command| command.sample(used_bytes));
        }
        let (link, meter) = (&mut self.link, &self.meter);
        self.commands.retain(|_, command| !command.advance(now, link, meter));
        Ok(())
    }

    fn power_off(mut self) -> Result<(), SessionError> {
        for command in self.commands.values() {
            command.kill_now();
        }
        let direct = self.world.as_ref().map_or(&[][..], World::direct);
        for failure in shutdown::end_all(direct) {
            self.link.queue(&FromAgent::Log(cut(failure.to_string())));
        }
        self.link.queue(&FromAgent::Bye);
        Ok(self.link.flush_to_host()?)
    }
}
