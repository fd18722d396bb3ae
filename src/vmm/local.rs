//! A device on a thread of its own: it waits for notifications and for what the device waits for, calls the device and raises the
//! interrupts that the device returns.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use kiln_virtio::device::{Device, Outcome, StateError, Wake};
use kiln_virtio::patience::{self, Patience};
use kiln_virtio::process::Narrowing;
use kiln_virtio::ring::QueueError;
use virtio_queue::{Queue as Ring, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::mmio::{Frozen, Lines, Position, Queue, Target};
use crate::vcpu::End;
use crate::vm::{Confine, OnEnd};

/// VIRTIO_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;
/// The stack of a thread that serves a device.
const STACK_BYTES: usize = 256 << 10;

/// A device and, where the driver has set them up, its queues.
struct Served<D> {
    device: D,
    /// What is served.
    rings: Vec<Option<Ring>>,
    /// What the guest had when it was stopped.
    halted: Vec<Option<Ring>>,
    /// The driver is gone, and the device has to forget it: its own thread does that, which may do what that takes.
    forgets: bool,
    has_interrupted: bool,
    lines: Option<Lines>,
}

/// Why a device is not served any more.
#[derive(Debug, thiserror::Error)]
enum Broken {
    /// Its driver's doing.
    #[error("{0}: {source}", source = .0.source)]
    Queue(#[from] QueueError),
    /// The host's.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// The thread that serves a device.
pub struct Thread {
    /// What it and the device are called.
    pub name: &'static str,
    /// Confines it.
    pub confine: Confine,
    /// What it calls before it takes the next request, once it is there.
    pub narrowing: Option<Narrowing>,
}

/// A device of this process's. Its thread runs for as long as the process.
pub struct Local<D> {
    // Taken by the processor that starts or stops the device, and by the thread that serves it.
    served: Arc<Mutex<Served<D>>>,
    memory: GuestMemoryMmap,
    /// Rung when the device has queues to look at.
    bell: EventFd,
    device_type: u32,
    queue_sizes: Vec<u16>,
    features: u64,
    config: Vec<u8>,
}

impl<D: Device<()> + 'static> Local<D> {
    /// Starts a thread for `device`. A driver that breaks a queue ends the machine, which `on_end` hears.
    ///
    /// # Errors
    /// The system gives no thread or descriptor.
    pub fn new(run_by: Thread, device: D, memory: &GuestMemoryMmap, on_end: OnEnd) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let bell = event()?;
        let events = device.events().map(|events| events.as_raw_fd());
        let local = Self {
            memory: memory.clone(),
            device_type: device.device_type(),
            queue_sizes: device.queue_sizes().to_vec(),
            features: device.features(),
            config: device.config().to_vec(),
            bell: bell.try_clone()?,
            served: Arc::new(Mutex::new(Served {
                device,
                rings: Vec::new(),
                halted: Vec::new(),
                forgets: false,
                has_interrupted: false,
                lines: None,
            })),
        };
        let (served, memory) = (Arc::clone(&local.served), memory.clone());
        let Thread { name, confine, narrowing } = run_by;
        // Made here: its thread may not be let make one.
        let epoll = Epoll::new()?;
        let serve = move || {
            let mut server = Server { served, memory, narrowing, patience: Patience::default() };
            let served = confine().map_err(Broken::Host);
            match served.and_then(|()| server.serve(&epoll, &bell, events)) {
                Ok(()) => {}
                Err(error @ Broken::Queue(_)) => on_end(End::Device { what: format!("{name}: {error}") }),
                Err(Broken::Host(error)) => on_end(End::Thread { what: format!("{name}: {error}") }),
            }
        };
        thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(serve)?;
        Ok(local)
    }

    /// Serves `queues`, of which each is as far as `positions` say, from now on.
    fn begin(
        &self,
        features: u64,
        queues: &[Option<Queue>],
        positions: &[Option<Position>],
    ) -> io::Result<()> {
        let position = |index| positions.get(index).copied().flatten();
        let rings = queues
            .iter()
            .enumerate()
            .map(|(index, queue)| queue.map(|queue| ring(&queue, position(index), features)).transpose());
        let rings = rings.collect::<Result<_, _>>().map_err(io::Error::other)?;
        lock(&self.served).rings = rings;
        self.bell.write(1)
    }
}

fn lock<D>(served: &Mutex<Served<D>>) -> std::sync::MutexGuard<'_, Served<D>> {
    served.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Numbers of what is waited for beside queues, which have their own.
const BELL: u64 = u64::MAX;
const EVENTS: u64 = u64::MAX - 1;

/// What the thread works with.
struct Server<D> {
    served: Arc<Mutex<Served<D>>>,
    memory: GuestMemoryMmap,
    narrowing: Option<Narrowing>,
    patience: Patience,
}

impl<D: Device<()>> Server<D> {
    /// Serves until the driver breaks a queue.
    fn serve(
        &mut self,
        epoll: &Epoll,
        bell: &EventFd,
        events_of_device: Option<RawFd>,
    ) -> Result<(), Broken> {
        let watch = |descriptor: RawFd, number| {
            epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(EventSet::IN, number))
        };
        watch(bell.as_raw_fd(), BELL)?;
        let mut watched = false;
        let mut events = [EpollEvent::default(); 8];
        loop {
            let count = match epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            for event in &events[..count] {
                match (event.data(), usize::try_from(event.data())) {
                    (EVENTS, _) => self.work_off(Wake::Events)?,
                    (BELL, _) | (_, Err(_)) => {
                        let _ = bell.read();
                        let mut served = lock(&self.served);
                        if let (Some(lines), false) = (&served.lines, watched) {
                            for (number, event) in (0..).zip(&lines.notified) {
                                watch(event.as_raw_fd(), number)?;
                            }
                            events_of_device.map_or(Ok(()), |events| watch(events, EVENTS))?;
                            watched = true;
                        }
                        served.forget();
                        let queues = served.rings.len();
                        drop(served);
                        // What was made available before anybody watched.
                        (0..queues).try_for_each(|queue| self.work_off(Wake::Queue(queue)))?;
                    }
                    (_, Ok(queue)) => {
                        if let Some(lines) = &lock(&self.served).lines {
                            let _ = lines.notified.get(queue).map(EventFd::read);
                        }
                        self.work_off(Wake::Queue(queue))?;
                    }
                }
            }
        }
    }

    /// Works off what is there. Between two rounds a driver that stops the device has its turn.
    fn work_off(&mut self, wake: Wake) -> Result<(), Broken> {
        self.patience.met();
        loop {
            if let Some(lock_in) = self.narrowing.as_ref().and_then(|narrowing| narrowing.get()) {
                lock_in()?;
                self.narrowing = None;
            }
            let outcome = lock(&self.served).work(wake, &self.memory)?;
            if outcome.lingers {
                let (served, memory) = (&self.served, &self.memory);
                self.patience.look_out(|| {
                    lock(served).rings.iter().flatten().any(|ring| patience::has_come(ring, memory))
                });
            }
            if !outcome.again {
                return Ok(());
            }
            thread::yield_now();
        }
    }
}

impl<D: Device<()>> Served<D> {
    /// Does a round's work, raises its interrupt, and says what is left.
    fn work(&mut self, wake: Wake, memory: &GuestMemoryMmap) -> Result<Outcome, QueueError> {
        self.forget();
        let mut rings: Vec<Option<&mut Ring>> = self.rings.iter_mut().map(Option::as_mut).collect();
        let outcome = self.device.process(wake, &mut rings, memory)?;
        if outcome.interrupt != 0 {
            self.interrupt();
        }
        Ok(outcome)
    }

    fn interrupt(&mut self) {
        self.has_interrupted = true;
        if let Some(lines) = &self.lines {
            // Only a full counter fails, and then the interrupt is up anyway.
            let _ = lines.interrupt.write(1);
        }
    }

    /// Forgets the driver that is gone, before anything is done for the next.
    fn forget(&mut self) {
        if std::mem::take(&mut self.forgets) {
            self.device.reset();
            self.has_interrupted = false;
        }
    }

    /// Serves nothing more.
    fn halt(&mut self) {
        if !self.rings.is_empty() {
            self.halted = std::mem::take(&mut self.rings);
        }
    }
}

/// The queue as the device works on it, where `position` says how far it is.
fn ring(queue: &Queue, position: Option<Position>, features: u64) -> Result<Ring, virtio_queue::Error> {
    let mut ring = Ring::new(queue.size)?;
    ring.try_set_desc_table_address(queue.descriptors)?;
    ring.try_set_avail_ring_address(queue.available)?;
    ring.try_set_used_ring_address(queue.used)?;
    ring.set_event_idx(features & EVENT_IDX != 0);
    if let Some(position) = position {
        ring.set_next_avail(position.available);
        ring.set_next_used(position.used);
    }
    ring.set_ready(true);
    Ok(ring)
}

impl<D: Device<()> + 'static> Target for Local<D> {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn connect(&mut self, lines: Lines) -> io::Result<()> {
        lock(&self.served).lines = Some(lines);
        self.bell.write(1)
    }

    fn start(&mut self, features: u64, queues: &[Option<Queue>]) -> io::Result<()> {
        self.begin(features, queues, &[])
    }

    fn stop(&mut self) -> io::Result<()> {
        let mut served = lock(&self.served);
        served.rings.clear();
        served.forgets = true;
        drop(served);
        self.bell.write(1)
    }

    fn freeze(&mut self) -> Result<Frozen, StateError> {
        let mut served = lock(&self.served);
        served.forget();
        // What the guest asked for last may not have been looked at. A queue that it broke is told by the copy.
        for queue in 0..served.rings.len() {
            while served.work(Wake::Queue(queue), &self.memory).is_ok_and(|outcome| outcome.again) {}
        }
        let position = |ring: &Ring| Position { available: ring.next_avail(), used: ring.next_used() };
        let positions = served.rings.iter().map(|ring| ring.as_ref().map(position)).collect();
        let device = if served.device.can_freeze() { served.device.freeze()? } else { Vec::new() };
        served.rings.clear();
        Ok(Frozen { positions, device, has_interrupted: served.has_interrupted })
    }

    fn thaw(&mut self, features: u64, queues: &[Option<Queue>], frozen: &Frozen) -> io::Result<()> {
        {
            let mut served = lock(&self.served);
            if served.device.can_freeze() {
                served.device.thaw(&frozen.device).map_err(io::Error::other)?;
            }
        }
        self.begin(features, queues, &frozen.positions)?;
        // One that was raised when the machine was frozen may be lost; one too many does no harm. Of a device that never raised
        // one none is lost, and its driver is spared a visit in each copy.
        if frozen.has_interrupted {
            lock(&self.served).interrupt();
        }
        Ok(())
    }

    fn halt(&mut self) {
        lock(&self.served).halt();
    }

    fn finish(&mut self) {
        let mut served = lock(&self.served);
        served.halt();
        served.forget();
        let Served { device, halted, .. } = &mut *served;
        let mut queues: Vec<Option<&mut Ring>> = halted.iter_mut().map(Option::as_mut).collect();
        device.finish(&mut queues, &self.memory);
        served.halted.clear();
    }
}
