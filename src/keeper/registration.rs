//! A registered machine's side of its socket: who may speak, and what each gets.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::net::Shutdown;

use super::entry::{Entry, State};
use super::place::Place;
use super::ready::Caller;
use super::relay::Guests;
use super::talk::{Answer, Greeting, Request, hear, say};
use crate::threads;

/// How long a caller may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the door stays shut where the host has nothing left to open it with.
const BREATH: Duration = Duration::from_millis(100);
/// Callers at once; more are turned away.
const MOST_CALLERS: usize = 64;

/// A machine that others of the same user can find. Dropping it takes it out of the registry.
pub struct Registration {
    place: Place,
    entry: Entry,
    inside: Arc<Inside>,
    /// The socket that the thread at the door listens to.
    listener: UnixListener,
    // Dropped last: who hears of the end finds no entry any more.
    _end: End,
}

/// Tells those who wait for the machine's end of it, when dropped.
struct End(Arc<Inside>);

impl Drop for End {
    fn drop(&mut self) {
        *self.0.is_over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.over.notify_all();
    }
}

/// What callers' threads and the machine's owner share.
struct Inside {
    mode: Mutex<Mode>,
    callers: AtomicUsize,
    // Whether the machine is gone.
    is_over: Mutex<bool>,
    over: Condvar,
}

pub(super) enum Mode {
    /// The step runs; this ends it.
    Running(Box<dyn Fn() + Send>),
    /// The step is over.
    Kept(Arc<Guests>),
    /// It waits for a step; none once it was promised to somebody.
    Ready(Option<Sender<Caller>>),
}

impl Inside {
    fn mode(&self) -> MutexGuard<'_, Mode> {
        self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the machine's end: its holder may have others, and live on.
    fn wait_for_end(&self) {
        let is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
        let _over = self.over.wait_while(is_over, |is_over| !*is_over);
    }
}

impl Registration {
    pub(super) fn open(place: Place, entry: Entry, listener: UnixListener, mode: Mode) -> io::Result<Self> {
        let inside = Arc::new(Inside {
            mode: Mutex::new(mode),
            callers: AtomicUsize::new(0),
            is_over: Mutex::default(),
            over: Condvar::new(),
        });
        let (shared, listening) = (Arc::clone(&inside), listener.try_clone()?);
        threads::start_small("door", move || {
            loop {
                match listening.accept() {
                    Ok((caller, _)) => admit(caller, &shared),
                    // It was shut.
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // No descriptors, no memory: that passes, or everything else ends too.
                    Err(_) => thread::sleep(BREATH),
                }
            }
        })?;
        let end = End(Arc::clone(&inside));
        Ok(Self { place, entry, inside, listener, _end: end })
    }

    /// What the registry says of the machine.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// From now on callers may enter.
    pub(super) fn let_in(&mut self, guests: Arc<Guests>, idle: Duration) -> io::Result<()> {
        self.entry.state = State::Kept;
        self.entry.idle_seconds = Some(idle.as_secs());
        *self.inside.mode() = Mode::Kept(guests);
        self.place.write(&self.entry)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
    }
}

/// Whether the process at the other end is of this process's user. The folder keeps others out; this does too.
pub(super) fn is_ours(stream: &UnixStream) -> bool {
    let peer = rustix::net::sockopt::socket_peercred(stream.as_fd());
    peer.is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

/// A caller among those that there are.
struct Seat {
    inside: Arc<Inside>,
    /// How many callers there are with it.
    number: usize,
}

impl Seat {
    fn take(inside: &Arc<Inside>) -> Self {
        Self { inside: Arc::clone(inside), number: inside.callers.fetch_add(1, Ordering::AcqRel) + 1 }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.inside.callers.fetch_sub(1, Ordering::AcqRel);
    }
}

fn admit(caller: UnixStream, inside: &Arc<Inside>) {
    let seat = Seat::take(inside);
    if !is_ours(&caller) || seat.number > MOST_CALLERS {
        return;
    }
    // Where there is no thread, the caller is hung up on.
    let _ = threads::start_small("caller", move || {
        // A caller that hangs up or speaks nonsense is its own affair.
        let _ = answer(&caller, &seat.inside);
    });
}

fn answer(caller: &UnixStream, inside: &Inside) -> io::Result<()> {
    caller.set_read_timeout(Some(PATIENCE))?;
    caller.set_write_timeout(Some(PATIENCE))?;
    say(caller, &Greeting::ours())?;
    let request: Request = hear(caller)?;
    let guests = match &mut *inside.mode() {
        Mode::Running(stop) => {
            if request == Request::Stop {
                say(caller, &Answer::Granted)?;
                stop();
            }
            None
        }
        Mode::Kept(guests) => Some(Arc::clone(guests)),
        Mode::Ready(owner) => {
            return match (request, owner.take()) {
                (Request::Borrow, Some(owner)) => {
                    let caller = caller.try_clone()?;
                    owner.send(Caller::Borrower(caller)).map_err(|_| io::ErrorKind::NotConnected.into())
                }
                (Request::Stop, Some(owner)) => {
                    say(caller, &Answer::Granted)?;
                    let _ = owner.send(Caller::Stop);
                    loop {
                        thread::park();
                    }
                }
                (_, None) => say(caller, &Answer::Refused("a step has it, or it ends".to_owned())),
                (_, owner_left) => {
                    *owner = owner_left;
                    say(caller, &Answer::Refused("it waits for a step".to_owned()))
                }
            };
        }
    };
    match (request, guests) {
        (Request::Stop, guests) => {
            if let Some(guests) = guests {
                say(caller, &Answer::Granted)?;
                guests.stop();
            }
            // The stream ends when the machine is gone, or with this process.
            inside.wait_for_end();
            Ok(())
        }
        (Request::Enter, Some(guests)) => {
            say(caller, &Answer::Granted)?;
            // A person may take any time, as may a terminal that was stopped.
            caller.set_read_timeout(None)?;
            caller.set_write_timeout(None)?;
            guests.serve(caller)
        }
        (Request::Borrow, _) => say(caller, &Answer::Refused("it has a step".to_owned())),
        (Request::Enter, None) => {
            say(caller, &Answer::Refused("its step still runs; it can be entered once it is kept".to_owned()))
        }
    }
}
