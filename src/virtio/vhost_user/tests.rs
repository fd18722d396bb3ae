use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::control::{Client, ClientError};
use crate::fs::Attributes;
use crate::fs::record::Observed;
use crate::process::{DeviceProcess, ProcessError};
use crate::testkit::{Ring, shared_memory};

/// A device process in a thread, its parent, and a driver behind a vhost-user front end.
struct Machine {
    process: JoinHandle<Result<(), ProcessError>>,
    client: Client,
    fs: Driver,
    vsock: Driver,
}

struct Driver {
    frontend: Frontend,
    memory: GuestMemoryMmap,
    ring: Ring,
    kick: EventFd,
    call: EventFd,
}

fn machine() -> Machine {
    let directory = tempfile::tempdir().expect("directory");
    let [(fs, fs_stream), (vsock, vsock_stream)] = ["fs", "vsock"].map(|name| {
        let listener = UnixListener::bind(directory.path().join(name)).expect("socket");
        let stream = UnixStream::connect(directory.path().join(name)).expect("socket");
        (OwnedFd::from(listener), stream)
    });
    // From here on nobody else can connect.
    drop(directory);
    let (ours, control) = UnixStream::pair().expect("pair");
    let process = DeviceProcess {
        fs,
        vsock: Some((vsock, 77)),
        control,
        confine: |_| Ok(()),
        narrow: |_| Ok(Box::new(|| Ok(()))),
    };
    let process = std::thread::spawn(|| process.run());
    let client = Client::new(ours).expect("client");
    let (fs, vsock) = (Driver::new(fs_stream, 1), Driver::new(vsock_stream, 1));
    Machine { process, client, fs, vsock }
}

impl Driver {
    /// Brings queue `index` up as QEMU does.
    fn new(stream: UnixStream, index: usize) -> Self {
        let mut frontend = Frontend::from_stream(stream, 3);
        let (memory, ring) = (shared_memory(), Ring::new(index as u64, 64));
        let (kick, call) = (EventFd::new(0).expect("event"), EventFd::new(0).expect("event"));
        frontend.set_owner().expect("owner");
        let features = frontend.get_features().expect("features");
        frontend.set_features(features & (1 << 30 | 1 << 32)).expect("features");
        let protocol = frontend.get_protocol_features().expect("features");
        frontend.set_protocol_features(protocol).expect("features");
        let regions: Vec<_> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).expect("region"))
            .collect();
        frontend.set_mem_table(&regions).expect("memory");
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = ring
            .addresses()
            .map(|address| memory.get_host_address(GuestAddress(address)).expect("address") as u64);
        let config = VringConfigData {
            queue_max_size: 64,
            queue_size: 64,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        frontend.set_vring_num(index, 64).expect("queue");
        frontend.set_vring_addr(index, &config).expect("queue");
        frontend.set_vring_base(index, 0).expect("queue");
        frontend.set_vring_call(index, &call).expect("queue");
        frontend.set_vring_kick(index, &kick).expect("queue");
        frontend.set_vring_enable(index, true).expect("queue");
        Self { frontend, memory, ring, kick, call }
    }

    /// Sends one FUSE request, and waits for the interrupt and the answer.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(40 + body.len()).expect("short");
        let mut request = [length, opcode, 1, 0].map(u32::to_le_bytes).concat();
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        self.ring.send(&self.memory, &request, 4096);
        self.kick.write(1).expect("event");
        self.call.read().expect("event");
        let (_, length) = self.ring.used(&self.memory).expect("an answer comes before its interrupt");
        let mut answer = vec![0; length as usize];
        self.memory.read_slice(&mut answer, GuestAddress(self.ring.answer())).expect("memory");
        answer
    }

    fn init(&mut self) {
        let version: Vec<u8> = [7_u32, 41].into_iter().flat_map(u32::to_le_bytes).chain([0; 56]).collect();
        assert_eq!(self.ask(26, 0, &version).len(), 80);
    }
}

#[test]
fn a_device_process_serves_its_guest_and_hands_the_record_to_its_parent() {
    let mut machine = machine();
    let host = tempfile::tempdir().expect("directory");
    std::fs::write(host.path().join("f"), "content").expect("file");
    let directory = File::open(host.path()).expect("directory");
    let attributes = Attributes::Fixed { mtime_seconds: 0 };
    machine.client.add_share(b"s", directory.as_fd(), attributes).expect("share");
    let again = machine.client.add_share(b"s", directory.as_fd(), attributes);
    assert!(matches!(again, Err(ClientError::Refused(why)) if why.contains("exists")));
    let not_a_directory = File::open(host.path().join("f")).expect("file");
    assert!(machine.client.add_share(b"f", not_a_directory.as_fd(), attributes).is_err());
    assert!(machine.client.remove_share(b"none").is_err());
    machine.client.narrow().expect("once");
    assert!(matches!(machine.client.narrow(), Err(ClientError::Refused(_))));
    let late = machine.client.add_share(b"late", directory.as_fd(), attributes);
    assert!(matches!(late, Err(ClientError::Refused(why)) if why.contains("any more")));

    machine.fs.init();
    let share = machine.fs.ask(1, 1, b"s\0");
    let node = u64::from_le_bytes(*share[16..].first_chunk().expect("entry"));
    machine.fs.ask(1, node, b"f\0");
    machine.fs.ask(1, node, b"missing\0");
    // A device that QEMU has hung up on still has its record.
    drop(machine.fs);
    drop(machine.vsock);
    let record = machine.client.finish().expect("record");
    let share = &record.shares[0];
    assert!(!record.full && share.changed.is_empty());
    assert_eq!(share.missed.iter().map(|path| path.to_string()).collect::<Vec<_>>(), ["missing"]);
    assert_eq!(share.entries.iter().last().map(|entry| entry.observed), Some(Observed::METADATA));
    assert_eq!(machine.client.finish().expect("record"), record);
    drop(machine.client);
    machine.process.join().expect("thread").expect("a parent that hangs up ends the process");
}

#[test]
fn the_guests_context_id_is_in_the_configuration_space() {
    let mut machine = machine();
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    let (_, config) = machine.vsock.frontend.get_config(0, 8, flags, &[0; 8]).expect("configuration");
    assert_eq!(config, 77_u64.to_le_bytes());
}

/// A vsock packet from the guest's `port` to port 5000 of the host.
fn packet(port: u32, op: u16, data: &[u8]) -> Vec<u8> {
    let mut packet = [77_u64, 2].map(u64::to_le_bytes).concat();
    let length = u32::try_from(data.len()).expect("short");
    packet.extend([port, 5000, length].map(u32::to_le_bytes).concat());
    packet.extend([1, op].map(u16::to_le_bytes).concat());
    packet.extend([0_u32, 65_536, 0].map(u32::to_le_bytes).concat());
    packet.extend(data);
    packet
}

#[test]
fn vs16_a_guest_that_connects_reaches_whoever_listens_at_the_parent_and_only_once() {
    use std::io::Read as _;
    let mut machine = machine();
    let incoming = machine.client.listen(5000).expect("port");
    // REQUEST and RW with two bytes, then another REQUEST.
    for packet in [packet(1000, 1, b""), packet(1000, 5, b"hi"), packet(1001, 1, b"")] {
        let driver = &mut machine.vsock;
        driver.ring.send(&driver.memory, &packet, 0);
        driver.kick.write(1).expect("event");
        driver.call.read().expect("event");
    }
    let mut stream = incoming.recv().expect("connection");
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes).expect("data");
    assert_eq!(&bytes, b"hi");
    // The parent has taken all events before the answer to its next request.
    machine.client.listen(6000).expect("port");
    assert!(incoming.recv().is_err(), "a second connection");
}

#[test]
fn a_process_without_a_vsock_device_says_so() {
    let directory = tempfile::tempdir().expect("directory");
    let fs = UnixListener::bind(directory.path().join("fs")).expect("socket").into();
    let (ours, control) = UnixStream::pair().expect("pair");
    std::thread::spawn(|| {
        DeviceProcess { fs, vsock: None, control, confine: |_| Ok(()), narrow: |_| Ok(Box::new(|| Ok(()))) }
            .run()
    });
    let client = Client::new(ours).expect("client");
    assert!(matches!(client.listen(1), Err(ClientError::Refused(_))));
    assert!(matches!(client.connect(1, std::time::Duration::MAX), Err(ClientError::Refused(_))));
}

#[test]
fn hv06_a_guest_that_breaks_a_queue_ends_the_process_and_the_parent_hears_why() {
    let mut machine = machine();
    machine.fs.init();
    machine.fs.ring.set_available(&machine.fs.memory, 3000);
    machine.fs.kick.write(1).expect("event");
    let ended = machine.process.join().expect("thread");
    assert!(matches!(&ended, Err(ProcessError::Misbehaved(what)) if what.starts_with("fs: ")), "{ended:?}");
    let refused = machine.client.finish().expect_err("it has ended");
    assert!(matches!(&refused, ClientError::Misbehaved(what) if what.contains("queue 1")), "{refused:?}");
    assert!(refused.to_string().starts_with("guest-misbehaved: fs: "), "{refused}");
    assert!(machine.client.misbehaved().is_some());
}

/// What the device of a machine that was just started does with `state`.
fn thaw(machine: &Machine, state: &[u8]) -> bool {
    use std::io::Write as _;
    let (load, mut end) = std::io::pipe().expect("pipe");
    let given = machine.fs.frontend.set_device_state_fd(
        VhostTransferStateDirection::LOAD,
        VhostTransferStatePhase::STOPPED,
        load.into(),
    );
    assert!(given.expect("taken").is_none());
    end.write_all(state).expect("written");
    drop(end);
    machine.fs.frontend.check_device_state().is_ok()
}

fn freeze(machine: &Machine) -> Option<Vec<u8>> {
    use std::io::Read as _;
    let (mut end, save) = std::io::pipe().expect("pipe");
    let direction = VhostTransferStateDirection::SAVE;
    let phase = VhostTransferStatePhase::STOPPED;
    let file = save.into();
    let given = machine.fs.frontend.set_device_state_fd(direction, phase, file);
    given.ok()?;
    machine.fs.frontend.check_device_state().expect("saved");
    let mut state = Vec::new();
    end.read_to_end(&mut state).expect("state");
    Some(state)
}

#[test]
fn a_driver_goes_on_with_the_device_that_takes_over_and_sees_its_shares() {
    let mut first = machine();
    first.fs.init();
    let state = freeze(&first).expect("nothing is held");
    assert!(state.len() <= MOST_STATE_BYTES);
    let mut second = machine();
    let directory = File::open("/").expect("directory");
    let attributes = Attributes::Fixed { mtime_seconds: 0 };
    second.client.add_share(b"s", directory.as_fd(), attributes).expect("share");
    assert!(thaw(&second, &state));
    // LOOKUP without an INIT before it.
    let share = second.fs.ask(1, 1, b"s\0");
    assert_eq!(share[4..8], [0; 4], "{share:?}");
    assert_eq!(freeze(&second), None, "a device with a share has more to tell than its frozen form can");
}

#[test]
fn what_is_no_state_of_the_device_is_refused_and_changes_nothing() {
    let mut machine = machine();
    for state in [&b""[..], b"kilnfs", b"kilnfs\x02\x01", &[0; 4096]] {
        assert!(!thaw(&machine, state), "{state:?}");
    }
    assert!(machine.fs.frontend.check_device_state().is_err(), "nothing was transferred");
    // Not started: everything but INIT is EIO.
    let answer = machine.fs.ask(1, 1, b"s\0");
    assert_eq!(answer[4..8], (-5_i32).to_le_bytes());
    machine.fs.init();
}
