//! A device that this process serves itself, on a thread of its own: it waits for notifications, calls the device and raises
//! the interrupts that the device returns.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use kiln_virtio::device::{Device, Wake};
use virtio_queue::{Queue as Ring, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::mmio::{Queue, Target};
use crate::vcpu::End;
use crate::vm::Confine;

/// VIRTIO_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;
/// The stack of a thread that serves a device.
const STACK_BYTES: usize = 256 << 10;

/// A device and, where the driver has set them up, its queues.
struct Served<D> {
    device: D,
    rings: Vec<Option<Ring>>,
    interrupt: Option<EventFd>,
    notified: Vec<EventFd>,
}

/// A device of this process's. Its thread runs for as long as the process.
pub struct Local<D> {
    // Taken by the processor that starts or stops the device, and by the thread that serves it.
    served: Arc<Mutex<Served<D>>>,
    /// Rung when the device has queues to look at.
    bell: EventFd,
    device_type: u32,
    queue_sizes: Vec<u16>,
    features: u64,
    config: Vec<u8>,
}

impl<D: Device<()> + 'static> Local<D> {
    /// Starts a thread for `device`, called `name` and confined by `confine`. A driver that breaks a queue ends the machine.
    ///
    /// # Errors
    /// The system gives no thread or descriptor.
    pub fn new(
        name: &'static str,
        device: D,
        memory: &GuestMemoryMmap,
        confine: Confine,
        ends: Sender<End>,
    ) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let bell = event()?;
        let local = Self {
            device_type: device.device_type(),
            queue_sizes: device.queue_sizes().to_vec(),
            features: device.features(),
            config: device.config().to_vec(),
            bell: bell.try_clone()?,
            served: Arc::new(Mutex::new(Served {
                device,
                rings: Vec::new(),
                interrupt: None,
                notified: Vec::new(),
            })),
        };
        let (served, memory) = (Arc::clone(&local.served), memory.clone());
        let serve = move || {
            let broken = confine().and_then(|()| serve(&served, &bell, &memory));
            if let Err(error) = broken {
                let _ = ends.send(End::Device { what: format!("{name}: {error}") });
            }
        };
        thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(serve)?;
        Ok(local)
    }
}

fn lock<D>(served: &Mutex<Served<D>>) -> std::sync::MutexGuard<'_, Served<D>> {
    served.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bell's number among what is waited for; queues have their own.
const BELL: u64 = u64::MAX;

/// Serves until the driver breaks a queue.
fn serve<D: Device<()>>(
    served: &Mutex<Served<D>>,
    bell: &EventFd,
    memory: &GuestMemoryMmap,
) -> io::Result<()> {
    let epoll = Epoll::new()?;
    let watch = |event: &EventFd, number| {
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, number))
    };
    watch(bell, BELL)?;
    let mut watched = false;
    let mut events = [EpollEvent::default(); 8];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        };
        for event in &events[..count] {
            match usize::try_from(event.data()) {
                Ok(queue) if event.data() != BELL => {
                    if let Some(event) = lock(served).notified.get(queue) {
                        let _ = event.read();
                    }
                    work_off(served, queue, memory)?;
                }
                _ => {
                    let _ = bell.read();
                    let served_now = lock(served);
                    // The descriptors stay the same when a driver starts again.
                    for (number, event) in (0..).zip(served_now.notified.iter().filter(|_| !watched)) {
                        watch(event, number)?;
                    }
                    watched = true;
                    let queues = served_now.rings.len();
                    drop(served_now);
                    // What was made available before anybody watched.
                    (0..queues).try_for_each(|queue| work_off(served, queue, memory))?;
                }
            }
        }
    }
}

/// Works a queue off. Between two rounds a driver that stops the device has its turn.
fn work_off<D: Device<()>>(
    served: &Mutex<Served<D>>,
    queue: usize,
    memory: &GuestMemoryMmap,
) -> io::Result<()> {
    while lock(served).work(queue, memory)? {
        thread::yield_now();
    }
    Ok(())
}

impl<D: Device<()>> Served<D> {
    /// Does a round's work, and says whether there is more.
    fn work(&mut self, queue: usize, memory: &GuestMemoryMmap) -> io::Result<bool> {
        let mut rings: Vec<Option<&mut Ring>> = self.rings.iter_mut().map(Option::as_mut).collect();
        let outcome =
            self.device.process(Wake::Queue(queue), &mut rings, memory).map_err(io::Error::other)?;
        if outcome.interrupt != 0
            && let Some(interrupt) = &self.interrupt
        {
            // Only a full counter fails, and then the interrupt is up anyway.
            let _ = interrupt.write(1);
        }
        Ok(outcome.again)
    }
}

/// The queue as the device works on it.
fn ring(queue: &Queue, features: u64) -> Result<Ring, virtio_queue::Error> {
    let mut ring = Ring::new(queue.size)?;
    ring.try_set_desc_table_address(queue.descriptors)?;
    ring.try_set_avail_ring_address(queue.available)?;
    ring.try_set_used_ring_address(queue.used)?;
    ring.set_event_idx(features & EVENT_IDX != 0);
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

    fn start(
        &mut self,
        features: u64,
        queues: &[Option<Queue>],
        notified: &[EventFd],
        interrupt: &EventFd,
    ) -> io::Result<()> {
        let rings = queues.iter().map(|queue| queue.map(|queue| ring(&queue, features)).transpose());
        let rings = rings.collect::<Result<_, _>>().map_err(io::Error::other)?;
        let mut served = lock(&self.served);
        if served.notified.is_empty() {
            served.notified = notified.iter().map(EventFd::try_clone).collect::<io::Result<_>>()?;
        }
        (served.rings, served.interrupt) = (rings, Some(interrupt.try_clone()?));
        drop(served);
        self.bell.write(1)
    }

    fn stop(&mut self) -> io::Result<()> {
        let mut served = lock(&self.served);
        served.rings.clear();
        served.device.reset();
        Ok(())
    }
}
