//! Guests of a few instructions, on whatever KVM there is: what they do needs none that is quick.

use std::sync::{PoisonError, mpsc};

use vm_memory::GuestAddress;

use self::testkit::{CODE, device, kernel};
use super::*;
use crate::bus::{Effect, Window};
use crate::memory::{LEAST_BYTES, make_file, map, map_private};

#[path = "../testkit.rs"]
mod testkit;

/// What a guest printed.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn parts(kvm: impl Into<OwnedFd>, code: &[u8]) -> (Parts, Printed) {
    let printed = Printed::default();
    let parts = Parts {
        kvm: kvm.into(),
        origin: Origin::Boot {
            kernel: kernel(code),
            initramfs: tempfile::tempfile().expect("a file"),
            command_line: String::new(),
        },
        generation: [7; 16],
        memory: map(&make_file(LEAST_BYTES).expect("memory"), LEAST_BYTES).expect("a mapping"),
        working_set: None,
        cpus: 1,
        model: Model::Fixed,
        console: Box::new(printed.clone()),
        devices: Vec::new(),
        on_end: Arc::new(|_| {}),
    };
    (parts, printed)
}

/// How the machine of `parts` ends, whose threads are confined by `confine`.
fn end_of(mut parts: Parts, confine: Confine) -> End {
    let (sender, ends) = mpsc::channel();
    parts.on_end = Arc::new(move |end| drop(sender.send(end)));
    let _running = Machine::new(parts).expect("a machine").start(confine).expect("threads");
    ends.recv().expect("an end")
}

fn run(code: &[u8]) -> Option<(End, Vec<u8>)> {
    let (parts, printed) = parts(device()?, code);
    let end = end_of(parts, || Ok(()));
    let printed = printed.0.lock().expect("a whole lock").clone();
    Some((end, printed))
}

#[test]
fn a_guest_prints_and_switches_off() {
    // mov dx, 0x3f8; mov al, 'k'; out dx, al; mov al, 'i'; out dx, al; mov dx, 0x600; mov al, 0x34; out dx, al
    let code = b"\x66\xba\xf8\x03\xb0k\xee\xb0i\xee\x66\xba\x00\x06\xb0\x34\xee\xeb\xfe";
    let Some((end, printed)) = run(code) else { return };
    assert_eq!((end, &printed[..]), (End::PoweredOff, &b"ki"[..]));
}

#[test]
fn a_guest_that_resets_is_told_from_one_that_switches_off() {
    // mov dx, 0x602; mov al, 1; out dx, al
    let Some((end, _)) = run(b"\x66\xba\x02\x06\xb0\x01\xee\xeb\xfe") else { return };
    assert_eq!(end, End::Reset);
}

#[test]
fn a_triple_fault_is_called_that() {
    // ud2, with no table of interrupts.
    let Some((end, _)) = run(b"\x0f\x0b\xeb\xfe") else { return };
    assert_eq!(end, End::TripleFault { cpu: 0 });
}

#[test]
fn a_guest_that_goes_on_where_no_memory_is_ends_for_want_of_an_instruction() {
    // mov eax, 0xd0000000; jmp rax
    let Some((end, _)) = run(b"\xb8\x00\x00\x00\xd0\xff\xe0") else { return };
    assert_eq!(end, End::InternalError { cpu: 0, suberror: kvm_bindings::KVM_INTERNAL_ERROR_EMULATION });
    assert!(
        end.to_string().ends_with("processor 0: it cannot emulate an instruction of the guest's"),
        "{end}"
    );
}

#[test]
fn what_no_device_has_reads_as_ones() {
    // mov ebx, 0xd0000000; mov eax, [rbx]; inc eax; mov dx, 0x3f8; add al, 'a'; out dx, al, and off.
    let code =
        b"\xbb\x00\x00\x00\xd0\x8b\x03\xff\xc0\x66\xba\xf8\x03\x04a\xee\x66\xba\x00\x06\xb0\x34\xee\xeb\xfe";
    let Some((end, printed)) = run(code) else { return };
    assert_eq!((end, &printed[..]), (End::PoweredOff, &b"a"[..]));
}

/// A device that keeps what is written to it.
struct Kept(mpsc::Sender<(u64, Vec<u8>)>);

impl Window for Kept {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        self.0.send((offset, data.to_vec())).expect("somebody listens");
        Effect::Nothing
    }
}

impl Carried for Kept {
    fn freeze(&mut self) -> Result<DeviceState, StateError> {
        Err(StateError::Unsupported)
    }

    fn thaw(&mut self, _state: &DeviceState) -> io::Result<()> {
        Ok(())
    }

    fn halt(&mut self) {}

    fn finish(&mut self) {}
}

#[test]
fn of_acknowledgements_only_those_that_change_something_come_to_the_registers() {
    // mov ebx, 0xd0000064; mov dword [rbx], 1; the same with 2, 3 and 1; mov byte [rbx], 1, and off.
    let code =
        b"\xbb\x64\x00\x00\xd0\xc7\x03\x01\x00\x00\x00\xc7\x03\x02\x00\x00\x00\xc7\x03\x03\x00\x00\x00\
        \xc7\x03\x01\x00\x00\x00\xc6\x03\x01\x66\xba\x00\x06\xb0\x34\xee\xeb\xfe";
    let Some(device) = device() else { return };
    let (mut parts, _) = parts(device, code);
    let (sender, written) = mpsc::channel();
    let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an event");
    parts.devices.push(Slot { device: Arc::new(Mutex::new(Kept(sender))), interrupt, notified: Vec::new() });
    assert_eq!(end_of(parts, || Ok(())), End::PoweredOff);
    let written: Vec<_> = written.try_iter().collect();
    assert_eq!(written, [(0x64, vec![2, 0, 0, 0]), (0x64, vec![3, 0, 0, 0]), (0x64, vec![1])]);
}

/// A device that keeps what is written to it, and takes its time over it.
struct Slow(Kept);

impl Window for Slow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let effect = self.0.write(offset, data);
        thread::sleep(Duration::from_millis(300));
        effect
    }
}

impl Carried for Slow {
    fn freeze(&mut self) -> Result<DeviceState, StateError> {
        self.0.freeze()
    }

    fn thaw(&mut self, state: &DeviceState) -> io::Result<()> {
        self.0.thaw(state)
    }

    fn halt(&mut self) {}

    fn finish(&mut self) {}
}

#[test]
fn an_instruction_of_several_accesses_is_whole_when_a_machine_is_frozen() {
    // mov ebx, 0xd0000ffc; mov rax, 0x8877665544332211; mov [rbx], rax, over the end of a device and into the next; and so on.
    let code = b"\xbb\xfc\x0f\x00\xd0\x48\xb8\x11\x22\x33\x44\x55\x66\x77\x88\x48\x89\x03\xeb\xfb";
    let Some(device) = device() else { return };
    let (mut parts, _) = parts(device, code);
    let (sender, written) = mpsc::channel();
    for _ in 0..2 {
        let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an event");
        let device = Arc::new(Mutex::new(Slow(Kept(sender.clone()))));
        parts.devices.push(Slot { device, interrupt, notified: Vec::new() });
    }
    let mut running = Machine::new(parts).expect("a machine").start(|| Ok(())).expect("threads");
    let mut halves = vec![written.recv().expect("a first half")];
    // These devices have no state to be frozen, which is asked for once the processor has stopped.
    assert!(running.freeze().is_err());
    halves.extend(written.try_iter());
    let first = (0xffc, vec![0x11, 0x22, 0x33, 0x44]);
    let second = (0, vec![0x55, 0x66, 0x77, 0x88]);
    assert_eq!(halves, [first, second]);
}

#[test]
fn processors_that_wait_end_with_the_one_that_switches_off() {
    let Some(device) = device() else { return };
    let (parts, _) = parts(device, b"\x66\xba\x00\x06\xb0\x34\xee\xeb\xfe");
    assert_eq!(end_of(Parts { cpus: 3, ..parts }, || Ok(())), End::PoweredOff);
}

#[test]
fn a_thread_that_cannot_be_confined_runs_no_guest() {
    let Some(device) = device() else { return };
    let (parts, printed) = parts(device, b"\x66\xba\xf8\x03\xb0k\xee\xeb\xfe");
    let end = end_of(parts, || Err(io::Error::other("no")));
    assert_eq!(end, End::Failed { cpu: 0, what: "no".to_owned() });
    assert!(printed.0.lock().expect("a whole lock").is_empty());
}

#[test]
fn what_is_not_kvm_is_refused() {
    let (parts, _) = parts(tempfile::tempfile().expect("a file"), b"\xf4");
    assert!(matches!(Machine::new(parts).err(), Some(VmError::Version(_))));
}

#[test]
fn a_machine_has_at_least_one_processor() {
    let Some(device) = device() else { return };
    let (parts, _) = parts(device, b"\xf4");
    let made = Machine::new(Parts { cpus: 0, ..parts });
    assert!(matches!(made.err(), Some(VmError::Cpus { asked: 0, .. })));
}

/// Prints `k`, waits for the byte at [`MARK`] to be set, prints it and switches off.
const WAITS: &[u8] = b"\xbb\x00\x08\x00\x01\x66\xba\xf8\x03\xb0k\xee\x80\x3b\x00\x74\xfb\x8a\x03\xee\
                       \x66\xba\x00\x06\xb0\x34\xee\xeb\xfe";
const MARK: GuestAddress = GuestAddress(CODE + 0x800);

/// A machine of [`WAITS`] that was frozen while it waited, and its memory.
fn frozen(device: &File, cpus: u8) -> (Snapshot, File) {
    let ram = make_file(LEAST_BYTES).expect("memory");
    let (parts, printed) = parts(device.try_clone().expect("a descriptor"), WAITS);
    let parts = Parts { cpus, memory: map(&ram, LEAST_BYTES).expect("a mapping"), ..parts };
    let mut running = Machine::new(parts).expect("a machine").start(|| Ok(())).expect("threads");
    while printed.0.lock().expect("a whole lock").is_empty() {
        thread::yield_now();
    }
    (running.freeze().expect("a snapshot"), ram)
}

#[test]
fn copies_of_a_frozen_machine_go_on_where_it_was_each_for_itself() {
    let Some(device) = device() else { return };
    let (snapshot, ram) = frozen(&device, 2);
    let bytes = snapshot.encode().expect("text");
    for mark in *b"xy" {
        let memory = map_private(&ram, LEAST_BYTES).expect("a mapping");
        let snapshot = Snapshot::decode(&bytes).expect("a snapshot");
        let (parts, printed) = parts(device.try_clone().expect("a descriptor"), WAITS);
        memory.write_obj(mark, MARK).expect("memory");
        let origin = Origin::Frozen(Box::new(snapshot));
        let end = end_of(Parts { origin, memory, cpus: 2, ..parts }, || Ok(()));
        assert_eq!((end, &printed.0.lock().expect("a whole lock")[..]), (End::PoweredOff, &[mark][..]));
    }
}

#[test]
fn a_copy_that_has_its_working_set_ahead_goes_on_as_any_other() {
    let Some(device) = device() else { return };
    let (snapshot, ram) = frozen(&device, 2);
    let bytes = snapshot.encode().expect("text");
    let pagemap = File::open("/proc/self/pagemap").expect("/proc");
    let run = |working_set| {
        let memory = map_private(&ram, LEAST_BYTES).expect("a mapping");
        let (parts, printed) = parts(device.try_clone().expect("a descriptor"), WAITS);
        let origin = Origin::Frozen(Box::new(Snapshot::decode(&bytes).expect("a snapshot")));
        let (sender, ends) = mpsc::channel();
        let on_end: OnEnd = Arc::new(move |end| drop(sender.send(end)));
        let parts = Parts { origin, memory: memory.clone(), working_set, cpus: 2, on_end, ..parts };
        let machine = Machine::new(parts).expect("a machine");
        let before = WorkingSet::of(&pagemap, &memory).expect("few pages");
        memory.write_obj(b'z', MARK).expect("memory");
        let running = machine.start(|| Ok(())).expect("threads");
        let end = ends.recv().expect("an end");
        drop(running);
        assert_eq!((end, &printed.0.lock().expect("a whole lock")[..]), (End::PoweredOff, &b"z"[..]));
        (before, WorkingSet::of(&pagemap, &memory).expect("few pages"))
    };
    let (before, touched) = run(None);
    assert!(before.written_pages() < touched.written_pages());
    let (before, after) =
        run(Some(WorkingSet::decode(&touched.encode(), LEAST_BYTES).expect("a working set")));
    assert_eq!(before.written_pages(), touched.written_pages(), "they are there before it runs");
    assert_eq!(after.written_pages(), touched.written_pages());
}

#[test]
fn a_snapshot_is_of_its_own_machine_alone() {
    let Some(device) = device() else { return };
    let (snapshot, ram) = frozen(&device, 1);
    let bytes = snapshot.encode().expect("text");
    let thawed = |cpus, change: fn(&mut Snapshot)| {
        let mut snapshot = Snapshot::decode(&bytes).expect("a snapshot");
        change(&mut snapshot);
        let (parts, _) = parts(device.try_clone().expect("a descriptor"), WAITS);
        let memory = map_private(&ram, LEAST_BYTES).expect("a mapping");
        Machine::new(Parts { origin: Origin::Frozen(Box::new(snapshot)), memory, cpus, ..parts }).err()
    };
    assert!(matches!(thawed(2, |_| {}), Some(VmError::OtherMachine("other parts"))));
    let error = thawed(1, |snapshot| snapshot.memory_bytes *= 2);
    assert!(matches!(error, Some(VmError::OtherMachine("another size of memory"))));
    let error = thawed(1, |snapshot| snapshot.processors[0].leaves[0].ebx ^= 1);
    assert!(matches!(error, Some(VmError::OtherMachine("other processors than this host's can be"))));
    // IA32_MTRRCAP can be set by nobody: what it holds in a machine is its value in all of them.
    let error = thawed(1, |snapshot| snapshot.processors[0].push_register(0xfe, 1));
    assert!(matches!(error, Some(VmError::Cpu(CpuError::Msr(0xfe)))), "{error:?}");
    assert!(thawed(1, |snapshot| snapshot.processors[0].push_register(0xfe, 0x508)).is_none());
    assert!(thawed(1, |_| {}).is_none());
}
