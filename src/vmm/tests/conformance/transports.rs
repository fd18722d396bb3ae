//! A device brought up over vhost-user, alone or in a device process, and over virtio-mmio.

use std::any::Any;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_virtio::control::Client;
use kiln_virtio::device::Device;
use kiln_virtio::fs::Attributes;
use kiln_virtio::process::{DeviceProcess, Narrowing, Thread};
use kiln_virtio::vhost_user::{Carrier, Confinement};
use kiln_vmm::local::{self, Local};
use kiln_vmm::mmio::Registers;
use kiln_vmm::vm::Slot;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::driven::{Driven, QUEUE_SIZE};
use crate::testkit::{Ring, shared_memory};

pub const CID: u64 = 77;
/// What only vhost-user has: its protocol's features, and the log of a migration.
const TRANSPORT: u64 = PROTOCOL_FEATURES | 1 << 26;
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// As many queues as the tests' memory has buffers for.
const MOST_QUEUES: usize = 4;

fn rings(count: usize) -> Vec<Ring> {
    (0..count.min(MOST_QUEUES)).map(|index| Ring::new(index as u64, QUEUE_SIZE)).collect()
}

/// A socket that waits for a front end, and the front end's end of it.
fn socket() -> (OwnedFd, UnixStream) {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("device");
    let listener = UnixListener::bind(&path).expect("socket");
    (listener.into(), UnixStream::connect(&path).expect("socket"))
}

/// Brings a device with `queues` queues up over vhost-user, as QEMU does.
fn brought_up(
    stream: UnixStream,
    queues: usize,
    wanted: u64,
    broken: impl Fn() -> bool + 'static,
    keep: impl Any,
) -> Driven {
    let mut front_end = Frontend::from_stream(stream, queues as u64);
    let (memory, rings) = (shared_memory(), rings(queues));
    front_end.set_owner().expect("owner");
    let features = front_end.get_features().expect("features");
    let accepted = features & !TRANSPORT & wanted | PROTOCOL_FEATURES;
    front_end.set_features(accepted).expect("features");
    let protocol = front_end.get_protocol_features().expect("features");
    front_end.set_protocol_features(protocol).expect("features");
    let regions: Vec<_> = memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).expect("region"))
        .collect();
    front_end.set_mem_table(&regions).expect("memory");
    let (mut notified, mut calls) = (Vec::new(), Vec::new());
    for (index, ring) in rings.iter().enumerate() {
        let (kick, call) = (EventFd::new(0).expect("event"), EventFd::new(0).expect("event"));
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = ring
            .addresses()
            .map(|address| memory.get_host_address(GuestAddress(address)).expect("address") as u64);
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        front_end.set_vring_num(index, QUEUE_SIZE).expect("queue");
        front_end.set_vring_addr(index, &config).expect("queue");
        front_end.set_vring_base(index, 0).expect("queue");
        front_end.set_vring_call(index, &call).expect("queue");
        front_end.set_vring_kick(index, &kick).expect("queue");
        front_end.set_vring_enable(index, true).expect("queue");
        notified.push(kick);
        calls.push(call);
    }
    Driven {
        memory,
        rings,
        notified,
        features: features & !TRANSPORT,
        broken: Box::new(broken),
        carried: None,
        prompt: None,
        _keep: Box::new((front_end, calls, keep)),
    }
}

/// fs (0) or vsock (1) of a device process, in a thread instead of a process.
pub fn of_device_process(device: usize, share: &File, wanted: u64) -> Driven {
    let [(fs, fs_stream), (vsock, vsock_stream)] = [socket(), socket()];
    let (ours, control) = UnixStream::pair().expect("pair");
    let (confine, vsock) = (|_| Ok(()), Some((vsock, CID)));
    let process = DeviceProcess { fs, vsock, control, confine, narrow: |_| Ok(Box::new(|| Ok(()))) };
    let thread = std::thread::spawn(|| process.run());
    let client = Client::new(ours).expect("client");
    client.add_share(b"s", share.as_fd(), Attributes::Fixed { mtime_seconds: 1 }).expect("a share");
    let mut streams = vec![fs_stream, vsock_stream];
    let stream = streams.remove(device);
    brought_up(stream, 2, wanted, move || thread.is_finished(), (client, streams))
}

/// Any device, over vhost-user.
fn over_vhost_user<D: Device<()> + 'static>(device: D, wanted: u64) -> Driven {
    let (listener, stream) = socket();
    let queues = device.queue_sizes().len();
    let ended = Arc::new(AtomicBool::new(false));
    let on_broken = {
        let ended = Arc::clone(&ended);
        move |_| ended.store(true, Ordering::Release)
    };
    let confinement =
        Confinement { confine: |_| Ok(()), thread: Thread::StreamQueues, narrowing: Narrowing::default() };
    let carrier = Carrier::new(device, confinement, on_broken);
    std::thread::spawn(move || carrier.serve(listener));
    brought_up(stream, queues, wanted, move || ended.load(Ordering::Acquire), ())
}

/// A device of a machine with `memory`, and whether its driver has broken it.
pub fn slot<D: Device<()> + 'static>(device: D, memory: &GuestMemoryMmap) -> (Slot, Arc<AtomicBool>) {
    let ended = Arc::new(AtomicBool::new(false));
    let on_end = {
        let ended = Arc::clone(&ended);
        Arc::new(move |_| ended.store(true, Ordering::Release))
    };
    let thread = local::Thread { name: "device", confine: || Ok(()), narrowing: None };
    let local = Local::new(thread, device, memory, on_end).expect("a thread");
    (Registers::slot(local, memory).expect("registers"), ended)
}

/// Any device, over virtio-mmio. `keep` lives as long.
pub fn over_mmio<D: Device<()> + 'static>(device: D, wanted: u64, keep: impl Any) -> Driven {
    let memory = shared_memory();
    let rings = rings(device.queue_sizes().len());
    let (slot, ended) = slot(device, &memory);
    let window = slot.device;
    let set = |offset: u64, value: u64| {
        let value = u32::try_from(value & u64::from(u32::MAX)).expect("masked");
        window.lock().expect("a whole lock").write(offset, &value.to_le_bytes());
    };
    let get = |offset: u64| {
        let mut word = [0; 4];
        window.lock().expect("a whole lock").read(offset, &mut word);
        u64::from(u32::from_le_bytes(word))
    };
    let mut features = 0;
    for page in [0, 1] {
        set(0x14, page);
        features |= get(0x10) << (32 * page);
    }
    set(0x70, 1);
    set(0x70, 3);
    for page in [0, 1] {
        set(0x24, page);
        set(0x20, (features & wanted) >> (32 * page));
    }
    set(0x70, 11);
    for (index, ring) in rings.iter().enumerate() {
        set(0x30, index as u64);
        set(0x38, QUEUE_SIZE.into());
        for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(ring.addresses()) {
            set(register, address);
        }
        set(0x44, 1);
    }
    set(0x70, 15);
    assert_eq!(get(0x70), 15);
    Driven {
        memory,
        rings,
        notified: slot.notified,
        features,
        broken: Box::new(move || ended.load(Ordering::Acquire)),
        carried: Some(window),
        prompt: None,
        _keep: Box::new((slot.interrupt, keep)),
    }
}

/// The same device over either transport, which offer the same.
pub fn over_both<D: Device<()> + 'static>(mut device: impl FnMut() -> D, wanted: u64) -> [Driven; 2] {
    let both = [over_vhost_user(device(), wanted), over_mmio(device(), wanted, ())];
    assert_eq!(both[0].features, both[1].features);
    both
}
