//! The same driver over both transports: what fs and vsock answer over vhost-user, as QEMU's guests have them, and over
//! virtio-mmio, as those of our own VMM do, is the same to the byte, whether the driver is good or hostile. And what only
//! our own VMM has, a disk, a source of random numbers and a balloon, answers the same with and without event indexes.

#![allow(clippy::disallowed_methods, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kiln_virtio::balloon::Balloon;
use kiln_virtio::control::Client;
use kiln_virtio::device::Device;
use kiln_virtio::fs::{Attributes, Fs, Settings, Share};
use kiln_virtio::process::{DeviceProcess, ProcessError};
use kiln_virtio::rng::Rng;
use kiln_virtio::vsock::{Backend, Connector, Vsock};
use kiln_vmm::disk::Disk;
use kiln_vmm::local::{Local, Thread};
use kiln_vmm::mmio::{Carried, Registers};
use kiln_vmm::vcpu::End;
use kiln_vmm::vm::Slot;
use testkit::{INDIRECT, NEXT, Ring, SEAM, WRITE, describe_at, shared_memory};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

#[path = "../../virtio/testkit.rs"]
#[expect(dead_code, reason = "shared with the tests of the devices")]
mod testkit;

const CID: u64 = 77;
const QUEUE_SIZE: u16 = 64;
const PATIENCE: Duration = Duration::from_secs(20);
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
/// What only vhost-user has: its protocol's features, and the log of a migration.
const TRANSPORT: u64 = 1 << 30 | 1 << 26;
/// Receive buffers that a vsock device has at a time.
const BUFFERS: u16 = 32;
const BUFFER_BYTES: u32 = 4096;
const POISON: u8 = 0xa5;

/// A device behind some transport, and the driver's side of its queues.
struct Driven {
    memory: GuestMemoryMmap,
    rings: Vec<Ring>,
    notified: Vec<EventFd>,
    features: u64,
    /// Whether the driver has broken a queue.
    broken: Box<dyn Fn() -> bool>,
    /// The device where it is on a bus.
    carried: Option<Arc<Mutex<dyn Carried>>>,
    /// What lives as long as the device.
    _keep: Box<dyn std::any::Any>,
}

/// The devices of one machine over vhost-user, in a thread instead of a process.
struct Process {
    thread: Mutex<Option<JoinHandle<Result<(), ProcessError>>>>,
    _client: Client,
    _front_ends: Vec<Frontend>,
    _calls: Vec<EventFd>,
}

fn rings(count: usize) -> Vec<Ring> {
    (0..count).map(|index| Ring::new(index as u64, QUEUE_SIZE)).collect()
}

/// Accepts nothing.
struct Nobody;

impl Backend for Nobody {
    fn connect_from_guest(&mut self, _: u32) -> Option<UnixStream> {
        None
    }
}

/// fs (0) or vsock (1) of a device process, over vhost-user.
fn over_vhost_user(device: usize, share: &File, wanted: u64) -> Driven {
    let directory = tempfile::tempdir().expect("directory");
    let [(fs, fs_stream), (vsock, vsock_stream)] = ["fs", "vsock"].map(|name| {
        let listener = UnixListener::bind(directory.path().join(name)).expect("socket");
        let stream = UnixStream::connect(directory.path().join(name)).expect("socket");
        (OwnedFd::from(listener), stream)
    });
    let (ours, control) = UnixStream::pair().expect("pair");
    let (confine, vsock) = (|_| Ok(()), Some((vsock, CID)));
    let process = DeviceProcess { fs, vsock, control, confine, narrow: |_| Ok(Box::new(|| Ok(()))) };
    let thread = std::thread::spawn(|| process.run());
    let client = Client::new(ours).expect("client");
    client.add_share(b"s", share.as_fd(), Attributes::Fixed { mtime_seconds: 1 }).expect("a share");
    let mut front_ends = [fs_stream, vsock_stream].map(|stream| Frontend::from_stream(stream, 3));
    let (memory, rings) = (shared_memory(), rings(2));
    let front_end = &mut front_ends[device];
    front_end.set_owner().expect("owner");
    let features = front_end.get_features().expect("features");
    front_end.set_features(features & (wanted | 1 << 30)).expect("features");
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
    let keep = Arc::new(Process {
        thread: Mutex::new(Some(thread)),
        _client: client,
        _front_ends: front_ends.into(),
        _calls: calls,
    });
    let process = Arc::clone(&keep);
    let broken = move || {
        let thread = process.thread.lock().expect("a whole lock");
        thread.as_ref().is_none_or(JoinHandle::is_finished)
    };
    Driven {
        memory,
        rings,
        notified,
        features: features & !TRANSPORT,
        broken: Box::new(broken),
        carried: None,
        _keep: Box::new(keep),
    }
}

fn slot<D: Device<()> + 'static>(device: D, memory: &GuestMemoryMmap) -> (Slot, Receiver<End>) {
    let (sender, ends) = channel();
    let thread = Thread { name: "device", confine: || Ok(()), narrowing: None };
    let on_end = Arc::new(move |end| drop(sender.send(end)));
    let local = Local::new(thread, device, memory, on_end).expect("a thread");
    (Registers::slot(local, memory).expect("registers"), ends)
}

/// Any device, over virtio-mmio.
fn over_mmio<D: Device<()> + 'static>(device: D, wanted: u64, keep: Option<Connector>) -> Driven {
    let memory = shared_memory();
    let rings = rings(device.queue_sizes().len().min(3));
    let (slot, ends) = slot(device, &memory);
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
    let broken = move || ends.try_recv().is_ok();
    let (carried, keep) = (Some(window), Box::new((slot.interrupt, keep)));
    Driven {
        memory,
        rings,
        notified: slot.notified,
        features,
        broken: Box::new(broken),
        carried,
        _keep: keep,
    }
}

impl Driven {
    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("memory");
    }

    fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("memory");
        bytes
    }

    /// Waits for the next used element of `queue`; none where the device has ended.
    fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.rings[queue].used(&self.memory) {
                return Some(used);
            }
            if (self.broken)() {
                return None;
            }
            assert!(Instant::now() < deadline, "queue {queue} is silent");
            std::thread::yield_now();
        }
    }

    /// Offers the chain at `head` of `queue`, and gives what came of it in bytes: the used element, and the room as it is then.
    fn offer(&mut self, queue: usize, head: u16) -> Vec<u8> {
        let room = self.rings[queue].answer();
        self.rings[queue].offer(&self.memory, head);
        self.notified[queue].write(1).expect("a notification");
        match self.used(queue) {
            None => b"broken".to_vec(),
            Some((head, length)) => {
                let mut came = [head, length].map(u32::to_le_bytes).concat();
                came.extend(self.read(room, 1024));
                came
            }
        }
    }

    /// One request with `room` for its answer.
    fn ask(&mut self, queue: usize, request: &[u8], room: u32) -> Vec<u8> {
        let (at, answer) = (self.rings[queue].data(), self.rings[queue].answer());
        let length = u32::try_from(request.len()).expect("short");
        self.write(at, request);
        self.write(answer, &[POISON; 1024]);
        let more = if room > 0 { NEXT } else { 0 };
        self.rings[queue].describe(&self.memory, 0, (at, length), more, 1);
        self.rings[queue].describe(&self.memory, 1, (answer, room), WRITE, 0);
        self.offer(queue, 0)
    }

    /// Chains that are wrong in every way that is known, with good ones between them.
    fn hostile_chains(&mut self, queue: usize, good: &[u8]) -> Vec<Vec<u8>> {
        let (at, answer) = (self.rings[queue].data(), self.rings[queue].answer());
        let (end, length) = (SEAM + (1 << 20), u32::try_from(good.len()).expect("short"));
        // Address, length, flags and next of each descriptor.
        type Chain = Vec<((u64, u32), u16, u16)>;
        let chains: Vec<Chain> = vec![
            vec![((at, length), NEXT, 0)],
            vec![((at, 1), NEXT, 1), ((at, 1), NEXT, 0)],
            vec![((at, length), NEXT, 999)],
            vec![((at, 0), 0, 0)],
            vec![((at, u32::MAX), 0, 0)],
            vec![((end - 1, 2), 0, 0)],
            vec![((u64::MAX - 3, 8), WRITE, 0)],
            vec![((answer, 64), WRITE | NEXT, 1), ((at, length), 0, 0)],
            vec![((at, length), NEXT, 1), ((answer, u32::MAX), WRITE, 0)],
            vec![((at, length), INDIRECT, 0)],
            vec![((at, 15), INDIRECT | NEXT, 1)],
            vec![((at, length), NEXT, 1), ((at, 16), INDIRECT, 0)],
            vec![((at, length / 2), NEXT, 1), ((at, 0), NEXT, 2), ((answer, 300), WRITE, 0)],
            vec![((SEAM - 4, 20), NEXT, 1), ((SEAM - 400, 300), WRITE, 0)],
        ];
        let mut answers = Vec::new();
        for chain in chains {
            self.write(at, good);
            self.write(answer, &[POISON; 1024]);
            for (index, (piece, flags, next)) in (0..).zip(chain) {
                self.rings[queue].describe(&self.memory, index, piece, flags, next);
            }
            answers.push(self.offer(queue, 0));
            answers.push(self.ask(queue, good, 1000));
        }
        // A good one by way of an indirect table.
        let table = at + 0x8000;
        self.write(answer, &[POISON; 1024]);
        describe_at(&self.memory, table, (at, length), NEXT, 1);
        describe_at(&self.memory, table + 16, (answer, 1000), WRITE, 0);
        self.rings[queue].describe(&self.memory, 0, (table, 32), INDIRECT, 0);
        answers.push(self.offer(queue, 0));
        answers
    }

    /// Breaks `queue`; what comes of that.
    fn break_ring(&mut self, queue: usize, good: &[u8], index: Option<u16>) -> Vec<u8> {
        match index {
            Some(index) => {
                self.rings[queue].set_available(&self.memory, index);
                self.notified[queue].write(1).expect("a notification");
                self.used(queue).map_or(b"broken".to_vec(), |_| b"served".to_vec())
            }
            None => {
                self.write(self.rings[queue].data(), good);
                self.offer(queue, QUEUE_SIZE)
            }
        }
    }
}

/// Numbers that are the same each time (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u8) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u8::try_from(self.0 % u64::from(bound)).expect("below a byte")
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let index = self.below(u8::try_from(from.len()).expect("few"));
        from[usize::from(index)]
    }
}

fn fuse(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + body.len()).expect("short");
    let mut request = [length, opcode].map(u32::to_le_bytes).concat();
    request.extend([unique, node].map(u64::to_le_bytes).concat());
    request.extend([0; 16]);
    request.extend(body);
    request
}

/// What a driver of the fs device hears.
fn fs_answers(driven: &mut Driven) -> Vec<Vec<u8>> {
    let init = [&[7_u32, 41, 1 << 17, u32::MAX].map(u32::to_le_bytes).concat()[..], &[0; 48]].concat();
    let mut answers = vec![
        driven.ask(1, &fuse(1, 1, 1, b"s\0"), 1000),
        driven.ask(1, &fuse(26, 2, 0, &init), 1000),
        driven.ask(1, &fuse(1, 3, 1, b"s\0"), 1000),
    ];
    answers.extend(driven.hostile_chains(1, &fuse(3, 4, 1, &[0; 16])));
    let names: [&[u8]; 9] = [b"s\0", b"f\0", b"d\0", b"..\0", b"\0", b"none\0", b"a/b\0", b"x", b"x\0"];
    let mut numbers = Numbers(7);
    for unique in 10..1500 {
        let opcode = numbers.below(56);
        let node = numbers.pick(&[0, 1, 2, 3, 4, 5, 99, u64::MAX]);
        let body = match opcode {
            1 => numbers.pick(&names).to_vec(),
            // INIT would begin anew.
            26 => continue,
            _ => (0..numbers.below(9) * 8).map(|_| numbers.pick(&[0, 0, 0, 0, 1, 16, 255])).collect(),
        };
        let room = numbers.pick(&[0, 15, 16, 200, 1000, 1000, 1000]);
        let opcode = u32::from(opcode);
        answers.push(driven.ask(1, &fuse(opcode, unique, node, &body), room));
    }
    answers
}

/// What a driver of the vsock device receives: packets without end in one order, whoever is quicker.
fn vsock_answers(driven: &mut Driven) -> Vec<Vec<u8>> {
    let post = |driven: &mut Driven, index: u16| {
        let at = driven.rings[0].data() + u64::from(index) * u64::from(BUFFER_BYTES);
        driven.rings[0].describe(&driven.memory, index, (at, BUFFER_BYTES), WRITE, 0);
        driven.rings[0].offer(&driven.memory, index);
    };
    for index in 0..BUFFERS {
        post(driven, index);
    }
    driven.notified[0].write(1).expect("a notification");
    let packet = |op: u16, kind: u16, ports: [u32; 2], cids: [u64; 2], data: &[u8], claimed: u32| {
        let mut bytes = cids.map(u64::to_le_bytes).concat();
        bytes.extend([ports[0], ports[1], claimed].map(u32::to_le_bytes).concat());
        bytes.extend([kind, op].map(u16::to_le_bytes).concat());
        bytes.extend([0_u32, 65_536, 0].map(u32::to_le_bytes).concat());
        bytes.extend(data);
        bytes
    };
    let mut answers = driven.hostile_chains(1, &packet(1, 1, [9, 9], [CID, 2], b"", 0));
    let mut numbers = Numbers(9);
    for _ in 0..600 {
        let op = u16::from(numbers.below(9));
        let kind = numbers.pick(&[1, 1, 1, 2, 0]);
        let cids = numbers.pick(&[[CID, 2], [CID, 2], [CID, 2], [5, 2], [CID, 3]]);
        let ports = [1, 2].map(|_| u32::from(numbers.below(4)));
        let data = vec![7; if op == 5 { 10 } else { 0 }];
        let length = u32::try_from(data.len()).expect("short");
        let claimed = numbers.pick(&[length, length, u32::MAX]);
        answers.push(driven.ask(1, &packet(op, kind, ports, cids, &data, claimed), 0));
        // What has come meanwhile is taken, for there to be room.
        answers.extend(received(driven, &post, false));
    }
    // The last one's answer comes behind all others.
    driven.ask(1, &packet(1, 1, [4242, 9], [CID, 2], b"", 0), 0);
    answers.extend(received(driven, &post, true));
    // In which step of the driver's a packet came is no property of the device's.
    let (mut sent, mut came): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.len() > 1000);
    sent.append(&mut came);
    sent
}

/// The packets that the device has sent; with `to_the_end`, all up to that to port 4242.
fn received(driven: &mut Driven, post: &impl Fn(&mut Driven, u16), to_the_end: bool) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let Some((head, length)) = driven.rings[0].used(&driven.memory) else {
            if !to_the_end {
                break;
            }
            assert!(Instant::now() < deadline, "the last packet is not answered");
            std::thread::yield_now();
            continue;
        };
        let at = driven.rings[0].data() + u64::from(head) * u64::from(BUFFER_BYTES);
        let bytes = driven.read(at, length as usize);
        post(driven, u16::try_from(head).expect("an index"));
        let last = bytes.get(20..24) == Some(&4242_u32.to_le_bytes());
        packets.push(bytes);
        if last {
            break;
        }
    }
    driven.notified[0].write(1).expect("a notification");
    packets
}

fn shared() -> (tempfile::TempDir, File) {
    let host = tempfile::tempdir().expect("directory");
    std::fs::create_dir(host.path().join("d")).expect("directory");
    for (name, content) in [("f", "content"), ("d/f", "inside")] {
        std::fs::write(host.path().join(name), content).expect("file");
    }
    std::os::unix::fs::symlink("/", host.path().join("x")).expect("link");
    let directory = File::open(host.path()).expect("directory");
    (host, directory)
}

fn fs_over_mmio(share: &File, features: u64) -> Driven {
    let (device, shares) = Fs::new(Settings::default());
    let directory = share.try_clone().expect("a descriptor").into();
    let share = Share { directory, attributes: Attributes::Fixed { mtime_seconds: 1 } };
    shares.with_tree(|tree| tree.add_share(b"s", share)).expect("a share");
    over_mmio(device, features, None)
}

fn vsock_over_mmio(features: u64) -> Driven {
    let (device, connector) = Vsock::new(CID, 1000, Box::new(Nobody)).expect("descriptors");
    over_mmio(device, features, Some(connector))
}

#[test]
fn what_a_guest_that_was_stopped_had_asked_for_is_served_no_more() {
    let (_host, share) = shared();
    let mut driven = fs_over_mmio(&share, !0);
    let device = driven.carried.clone().expect("over mmio");
    let look_up = fuse(1, 1, 1, b"s\0");
    assert_ne!(driven.ask(1, &look_up, 1000), b"broken");
    device.lock().expect("a whole lock").halt();
    driven.rings[1].offer(&driven.memory, 0);
    driven.notified[1].write(1).expect("a notification");
    std::thread::sleep(Duration::from_millis(200));
    device.lock().expect("a whole lock").finish();
    assert_eq!(driven.rings[1].used(&driven.memory), None);
    assert!(!(driven.broken)());
}

/// Fails at the first answer that differs.
fn assert_same(one: &[Vec<u8>], other: &[Vec<u8>]) {
    for (index, (one, other)) in one.iter().zip(other).enumerate() {
        assert_eq!(one, other, "answer {index}");
    }
    assert_eq!(one.len(), other.len());
}

#[test]
fn the_fs_device_answers_the_same_over_both_transports() {
    let (_host, share) = shared();
    for features in [VERSION_1, VERSION_1 | EVENT_IDX | 1 << 28] {
        let (mut one, mut other) = (over_vhost_user(0, &share, features), fs_over_mmio(&share, features));
        assert_eq!(one.features, other.features);
        let answers = fs_answers(&mut one);
        assert!(answers.len() > 1000 && answers.iter().any(|answer| answer.len() > 1000));
        assert_same(&answers, &fs_answers(&mut other));
    }
}

#[test]
fn the_vsock_device_answers_the_same_over_both_transports() {
    let (_host, share) = shared();
    for features in [VERSION_1, VERSION_1 | EVENT_IDX | 1 << 28] {
        let (mut one, mut other) = (over_vhost_user(1, &share, features), vsock_over_mmio(features));
        assert_eq!(one.features, other.features);
        let answers = vsock_answers(&mut one);
        assert!(answers.iter().filter(|answer| answer.len() == 44).count() > 100, "packets come back");
        assert_same(&answers, &vsock_answers(&mut other));
    }
}

#[test]
fn a_queue_that_is_broken_ends_either_transport() {
    let (_host, share) = shared();
    let good = fuse(3, 4, 1, &[0; 16]);
    for index in [Some(65), Some(3000), Some(u16::MAX), None] {
        let both = [over_vhost_user(0, &share, VERSION_1), fs_over_mmio(&share, VERSION_1)];
        for mut driven in both {
            assert_eq!(driven.break_ring(1, &good, index), b"broken", "{index:?}");
        }
        let both = [over_vhost_user(1, &share, VERSION_1), vsock_over_mmio(VERSION_1)];
        for mut driven in both {
            assert_eq!(driven.break_ring(1, &[0; 44], index), b"broken", "{index:?}");
        }
    }
}

#[test]
fn a_disk_answers_the_same_whatever_was_negotiated() {
    let answers = |features: u64| {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(64 * 512).expect("room");
        let disk = Disk::new(file, "same", false, |_| ()).expect("a disk");
        let mut driven = over_mmio(disk, features, None);
        let header =
            |kind: u32, sector: u64| [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let mut answers = driven.hostile_chains(0, &header(8, 0));
        let mut numbers = Numbers(3);
        for _ in 0..1000 {
            let kind = numbers.pick(&[0, 1, 4, 8, 11, 13, 5]);
            let mut request = header(kind, numbers.below(70).into());
            match kind {
                1 => request.extend([numbers.below(255); 512]),
                11 | 13 => request.extend(
                    [header(0, 0)[8..].to_vec(), vec![numbers.below(9), 0, 0, 0, 0, 0, 0, 0]].concat(),
                ),
                _ => {}
            }
            let room = numbers.pick(&[1, 513, 21, 500]);
            answers.push(driven.ask(0, &request, room));
        }
        answers
    };
    let plain = answers(VERSION_1);
    for features in [VERSION_1 | EVENT_IDX, VERSION_1 | 1 << 28, u64::MAX] {
        assert_same(&plain, &answers(features));
    }
}

#[test]
fn random_numbers_come_as_many_at_a_time_whatever_was_negotiated_and_never_twice() {
    let answers = |features: u64| {
        let mut driven = over_mmio(Rng::new(), features, None);
        let mut answers = driven.hostile_chains(0, b"no request");
        let mut numbers = Numbers(5);
        for _ in 0..1000 {
            let room = numbers.pick(&[0, 1, 64, 255, 256, 257, 1000]);
            let request = numbers.pick(&[&b""[..], &b""[..], &b"no request"[..]]);
            answers.push(driven.ask(0, request, room));
        }
        answers
    };
    // What was given, apart from what else there is to see: how much it was, and that the rest of the room is as before.
    let mut given = std::collections::BTreeSet::new();
    let mut seen = |features| {
        let mut answers = answers(features);
        for answer in &mut answers {
            let length = answer.get(4..8).and_then(|length| length.try_into().ok()).map(u32::from_le_bytes);
            let numbers = 8..8 + length.expect("not broken") as usize;
            let numbers = answer.get_mut(numbers).expect("within the room");
            assert!(numbers.len() < 64 || given.insert(numbers.to_vec()), "the same numbers again");
            numbers.fill(0);
        }
        answers
    };
    let plain = seen(VERSION_1);
    assert!(plain.iter().filter(|answer| answer[4..8] == 256_u32.to_le_bytes()).count() > 100);
    for features in [VERSION_1 | EVENT_IDX, VERSION_1 | 1 << 28, u64::MAX] {
        assert_same(&plain, &seen(features));
    }
}

#[test]
fn a_source_of_random_numbers_ends_with_its_queue() {
    for index in [Some(65), Some(3000), Some(u16::MAX), None] {
        let mut driven = over_mmio(Rng::new(), VERSION_1, None);
        assert_eq!(driven.break_ring(0, &[], index), b"broken", "{index:?}");
    }
}

#[test]
fn reports_of_free_memory_do_the_same_whatever_was_negotiated() {
    let answers = |features: u64| {
        let mut driven = over_mmio(Balloon::new(), features, None);
        let mut answers = Vec::new();
        for queue in [2, 0, 1] {
            answers.extend(driven.hostile_chains(queue, b"no report"));
            for room in [0, 1, 4095, 4096, 8192, 8193, 1 << 20, u32::MAX] {
                answers.push(driven.ask(queue, b"", room));
                answers.push(driven.ask(queue, b"pages", room));
            }
        }
        answers
    };
    let plain = answers(VERSION_1);
    let came_back = |answer: &&Vec<u8>| answer[8..] == [0; 1024];
    assert_eq!(plain.iter().filter(came_back).count(), 2 * 4, "what holds whole pages, of reports alone");
    for features in [VERSION_1 | EVENT_IDX, VERSION_1 | 1 << 28, VERSION_1 | 1 << 5, u64::MAX] {
        assert_same(&plain, &answers(features));
    }
}

#[test]
fn a_balloon_ends_with_any_of_its_queues() {
    for queue in [0, 1, 2] {
        for index in [Some(65), Some(u16::MAX), None] {
            let mut driven = over_mmio(Balloon::new(), VERSION_1, None);
            assert_eq!(driven.break_ring(queue, &[], index), b"broken", "{queue} {index:?}");
        }
    }
}

/// The device in `driven` as a machine that is frozen has it, taken over by `device` in the same memory. The guest does no more.
fn thawed<D: Device<()> + 'static>(driven: &Driven, device: D) -> (Slot, Receiver<End>) {
    let carried = driven.carried.as_ref().expect("over mmio");
    let state = carried.lock().expect("a whole lock").freeze().expect("a state");
    let (slot, ends) = slot(device, &driven.memory);
    slot.device.lock().expect("a whole lock").thaw(&state).expect("its state");
    (slot, ends)
}

#[test]
fn a_copy_interrupts_a_driver_that_was_interrupted_before_and_spares_others() {
    for was_served in [false, true] {
        let mut driven = over_mmio(Balloon::new(), VERSION_1, None);
        if was_served {
            driven.ask(2, b"", 4096);
        }
        let (slot, _ends) = thawed(&driven, Balloon::new());
        assert_eq!(slot.interrupt.read().is_ok(), was_served);
    }
}

#[test]
fn a_request_for_random_numbers_waits_for_a_copy() {
    let mut driven = over_mmio(Rng::silent(), VERSION_1, None);
    let room = driven.rings[0].answer();
    driven.write(room, &[POISON; 1024]);
    driven.rings[0].describe(&driven.memory, 0, (room, 64), WRITE, 0);
    driven.rings[0].offer(&driven.memory, 0);
    driven.notified[0].write(1).expect("a notification");
    let (_slot, _ends) = thawed(&driven, Rng::silent());
    assert_eq!(driven.rings[0].used(&driven.memory), None);
    assert_eq!(driven.read(room, 1024), [POISON; 1024]);
    let mut driven = over_mmio(Rng::silent(), VERSION_1, None);
    driven.rings[0].describe(&driven.memory, 0, (room, 64), WRITE, 0);
    driven.rings[0].offer(&driven.memory, 0);
    let (slot, _ends) = thawed(&driven, Rng::new());
    assert_eq!(driven.used(0), Some((0, 64)));
    let deadline = Instant::now() + PATIENCE;
    while slot.interrupt.read().is_err() {
        assert!(Instant::now() < deadline, "the driver is not told");
        std::thread::yield_now();
    }
    // With numbers in its guest's memory, it is no template.
    let state = slot.device.lock().expect("a whole lock").freeze();
    assert!(state.is_err());
}
