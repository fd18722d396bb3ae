//! Carries a [`Device`] over the vhost-user protocol to QEMU.
//!
//! One [`Carrier`] serves one device on one connection: a thread of the protocol crate's takes QEMU's messages,
//! another waits for notifications and calls the device. This file locks the queues for the device, raises the
//! interrupts it returns, tells of a driver that has broken a queue, and takes no memory that could be taken away.
//! A device that can be frozen hands its state over as QEMU saves or loads a stopped machine.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::SealFlags;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::device::{Device, MOST_STATE_BYTES, Outcome, Wake};
use crate::patience::{self, Patience};
use crate::process::{Confine, Narrowing, Thread};
use crate::ring::QueueError;

/// Why a device could not be served.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The device could not be set up, or its connection was not accepted.
    #[error("cannot start the vhost-user device: {0}")]
    Start(String),
    /// The device's own descriptor cannot be waited for.
    #[error("cannot wait for the device's events")]
    Events(#[source] io::Error),
    /// A thread could not be confined.
    #[error("cannot confine a thread")]
    Confine(#[source] io::Error),
    /// QEMU sent what the protocol does not allow.
    #[error("the vhost-user protocol was broken: {0}")]
    Connection(String),
}

/// Hears of a queue that the driver broke, on the thread that serves queues.
type OnBroken = Box<dyn Fn(QueueError) + Send + Sync>;

/// Serves one device to one QEMU.
pub struct Carrier<D: Device<()> + 'static> {
    state: Arc<State<D>>,
}

struct State<D> {
    // Protects the device and what is known of its driver. Taken before any queue's lock.
    device: Mutex<Served<D>>,
    queues: usize,
    features: u64,
    confinement: Confinement,
    on_broken: OnBroken,
}

/// How a device's threads are confined.
pub struct Confinement {
    /// Confines each of them.
    pub confine: Confine,
    /// The kind of the one that serves queues.
    pub thread: Thread,
    /// What that one calls before it takes the next request, once it is there.
    pub narrowing: Narrowing,
}

struct Served<D> {
    device: D,
    /// The memory that was checked last, whatever the protocol crate has by now.
    memory: Arc<GuestMemoryMmap>,
    /// The driver broke a queue: nothing is served any more.
    broken: bool,
    transfer: Transfer,
}

/// How far QEMU is with a frozen machine's device.
enum Transfer {
    /// Nothing is under way.
    Idle,
    /// The state was written.
    Saved,
    /// The state comes from here; it is there when QEMU asks how it went.
    Loading(File),
}

/// A handle to the state, in the form the protocol crate wants.
struct Backend<D>(Arc<State<D>>);

impl<D> Clone for Backend<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: Device<()> + 'static> Carrier<D> {
    /// A carrier of `device`, whose threads are confined. `on_broken` is called on the one that serves queues when the
    /// driver has broken one: nothing is served from then on.
    pub fn new(
        device: D,
        confinement: Confinement,
        on_broken: impl Fn(QueueError) + Send + Sync + 'static,
    ) -> Self {
        let mut features = device.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if device.can_freeze() {
            // QEMU migrates no device without it, not even where the machine is stopped and nothing is logged.
            features |= VhostUserVirtioFeatures::LOG_ALL.bits();
        }
        let state = State {
            queues: device.queue_sizes().len(),
            features,
            confinement,
            device: Mutex::new(Served {
                device,
                memory: Arc::default(),
                broken: false,
                transfer: Transfer::Idle,
            }),
            on_broken: Box::new(on_broken),
        };
        Self { state: Arc::new(state) }
    }

    /// Accepts one connection on `listener`, a bound and listening unix socket, serves it until QEMU hangs up,
    /// and returns.
    ///
    /// # Errors
    /// See [`CarryError`]. That QEMU hangs up is none.
    pub fn serve(self, listener: OwnedFd) -> Result<(), CarryError> {
        let start = |error: vhost_user_backend::Error| CarryError::Start(error.to_string());
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let name = "vhost-user".to_owned();
        let mut daemon = VhostUserDaemon::new(name, Backend(self.state.clone()), memory).map_err(start)?;
        let events = {
            let served = self.state.device.lock().unwrap_or_else(PoisonError::into_inner);
            served.device.events().map(|events| events.as_raw_fd())
        };
        if let Some(events) = events {
            for handler in daemon.get_epoll_handlers() {
                let data = self.state.queues as u64 + 1;
                handler.register_listener(events, EventSet::IN, data).map_err(CarryError::Events)?;
            }
        }
        // The thread of the queues runs by now, and waits; the one for messages inherits this one's confinement.
        (self.state.confinement.confine)(Thread::Messages).map_err(CarryError::Confine)?;
        let mut listener = Listener::from(UnixListener::from(listener));
        daemon.start(&mut listener).map_err(start)?;
        drop(listener);
        match daemon.wait() {
            Ok(()) => Ok(()),
            Err(vhost_user_backend::Error::HandleRequest(
                vhost::vhost_user::Error::Disconnected | vhost::vhost_user::Error::PartialMessage,
            )) => Ok(()),
            Err(error) => Err(CarryError::Connection(error.to_string())),
        }
    }
}

impl<D: Device<()> + 'static> VhostUserBackend for Backend<D> {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.0.queues
    }

    fn max_queue_size(&self) -> usize {
        self.with(|served| served.device.queue_sizes().iter().copied().max().unwrap_or(0).into())
    }

    fn features(&self) -> u64 {
        self.0.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE;
        // QEMU keeps the fs device's configuration space itself, and warns where it is offered another.
        let keeps_config = self.with(|served| served.device.device_type() != crate::fs::DEVICE_TYPE);
        features.set(VhostUserProtocolFeatures::CONFIG, keeps_config);
        // A log of what the device writes is asked for only of a machine that runs on while it is migrated; that is
        // refused, as this memory has no bitmap.
        let freezes = VhostUserProtocolFeatures::DEVICE_STATE | VhostUserProtocolFeatures::LOG_SHMFD;
        features.set(freezes, self.with(|served| served.device.can_freeze()));
        features
    }

    fn reset_device(&self) {
        self.with(|served| served.device.reset());
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The queues know it themselves.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.with(|served| {
            let config = served.device.config();
            let offset = offset as usize;
            let end = offset.saturating_add(size as usize);
            config.get(offset..end).map(<[u8]>::to_vec).unwrap_or_default()
        })
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        let memory = memory.memory().clone().into_inner();
        memory.iter().try_for_each(stays)?;
        self.with(|served| served.memory = memory);
        Ok(())
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        mut file: File,
    ) -> io::Result<Option<File>> {
        let transfer = match direction {
            VhostTransferStateDirection::SAVE => {
                let state = self.with(|served| served.device.freeze()).map_err(io::Error::other)?;
                // Far less than a pipe holds.
                file.write_all(&state)?;
                Transfer::Saved
            }
            VhostTransferStateDirection::LOAD => Transfer::Loading(file),
        };
        self.with(|served| served.transfer = transfer);
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        match self.with(|served| std::mem::replace(&mut served.transfer, Transfer::Idle)) {
            Transfer::Idle => Err(io::Error::other("no state was transferred")),
            Transfer::Saved => Ok(()),
            Transfer::Loading(file) => {
                // QEMU has closed its end. One that has not waits for itself: this thread has nothing but its messages.
                let mut state = Vec::new();
                file.take(MOST_STATE_BYTES as u64 + 1).read_to_end(&mut state)?;
                self.with(|served| served.device.thaw(&state)).map_err(io::Error::other)
            }
        }
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::CLOEXEC | EventFlag::NONBLOCK).ok()
    }

    fn stop_vring(&self, _queue_index: u32) -> io::Result<()> {
        // A request is answered before the device's lock is given back, so once it can be had none is under way.
        self.with(|_| Ok(()))
    }

    fn handle_event(
        &self,
        event: u16,
        _ready: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        let wake = match usize::from(event) {
            index if index < self.0.queues => Wake::Queue(index),
            _ => Wake::Events,
        };
        let _alive = AbortOnPanic;
        self.confine_this_thread();
        with_patience(Patience::met);
        loop {
            self.narrow_this_thread();
            let outcome = self.serve_once(wake, vrings)?;
            if outcome.lingers {
                self.linger(vrings);
            }
            if !outcome.again {
                return Ok(());
            }
        }
    }
}

impl<D: Device<()> + 'static> Backend<D> {
    fn with<T>(&self, with: impl FnOnce(&mut Served<D>) -> T) -> T {
        with(&mut self.0.device.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Before a thread that serves queues looks at the first of them.
    fn confine_this_thread(&self) {
        thread_local! { static CONFINED: Cell<bool> = const { Cell::new(false) } }
        if !CONFINED.replace(true) && (self.0.confinement.confine)(self.0.confinement.thread).is_err() {
            // An error here would only be logged, and the queue served all the same.
            std::process::abort();
        }
    }

    /// Before a thread takes a request that follows the end of giving.
    fn narrow_this_thread(&self) {
        thread_local! { static NARROWED: Cell<bool> = const { Cell::new(false) } }
        if let Some(lock_in) = self.0.confinement.narrowing.get()
            && !NARROWED.replace(true)
            && lock_in().is_err()
        {
            std::process::abort();
        }
    }

    /// Looks out for the next request in any queue, for as long as that has paid off lately.
    fn linger(&self, vrings: &[VringMutex]) {
        let has_come = |served: &mut Served<D>| {
            vrings.iter().any(|vring| {
                let state = vring.get_ref();
                patience::has_come(state.get_queue(), &served.memory)
            })
        };
        with_patience(|patience| patience.look_out(|| self.with(has_come)));
    }

    fn serve_once(&self, wake: Wake, vrings: &[VringMutex]) -> io::Result<Outcome> {
        self.with(|served| {
            let memory = Arc::clone(&served.memory);
            let mut states: Vec<_> = vrings.iter().map(VringT::get_mut).collect();
            let mut queues: Vec<Option<&mut Queue>> = Vec::with_capacity(states.len());
            for state in &mut states {
                // Whether a ring lies in memory shows when it is used.
                let runs = !served.broken && state.is_enabled() && state.get_queue().ready();
                queues.push(runs.then(|| state.get_queue_mut()));
            }
            let outcome = match served.device.process(wake, &mut queues, &memory) {
                Ok(outcome) => outcome,
                Err(error) => {
                    served.broken = true;
                    (self.0.on_broken)(error);
                    Outcome::default()
                }
            };
            for (index, state) in states.iter().enumerate() {
                if outcome.interrupt >> index & 1 == 1 {
                    state.signal_used_queue()?;
                }
            }
            Ok(outcome)
        })
    }
}

/// Works with the patience of this thread.
fn with_patience(with: impl FnOnce(&mut Patience)) {
    thread_local! { static PATIENCE: Cell<Patience> = Cell::default() }
    let mut patience = PATIENCE.get();
    with(&mut patience);
    PATIENCE.set(patience);
}

/// A device whose thread has ended would leave the guest waiting for ever: a panic there ends the process, and
/// QEMU sees the connection end.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// Refuses guest memory of which a part is missing or could be taken away while it is used: whoever touched that
/// would die of SIGBUS. QEMU seals its memory (`memory-backend-memfd`, `seal=on`).
fn stays(region: &GuestRegionMmap) -> io::Result<()> {
    let refuse = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    let Some(file) = region.file_offset() else { return refuse("guest memory without a file") };
    // The seal first: after it the size can only grow.
    match rustix::fs::fcntl_get_seals(file.file()) {
        Ok(seals) if seals.contains(SealFlags::SHRINK) => {}
        _ => return refuse("guest memory that may shrink"),
    }
    let length = rustix::fs::fstat(file.file())?.st_size;
    match file.start().checked_add(region.len()).and_then(|end| i64::try_from(end).ok()) {
        Some(end) if end <= length => Ok(()),
        _ => refuse("guest memory beyond the end of its file"),
    }
}

#[cfg(test)]
mod tests;
