//! The command line of QEMU for a machine: a pure function of its spec. `{NAME}` stands for a descriptor or a file.

use kiln_virtio::fs::MOST_REQUEST_QUEUES;

use crate::machine::slots::{SLOT_BYTES, SLOTS};
use crate::machine::{Accelerator, Carrier, Cpu, KERNEL_WORDS};

/// The processor every step sees, whatever the host has: x86-64-v2 as QEMU can give it under emulation and under
/// KVM alike, so that what a step does with its processor's features is the same everywhere.
const CPU_MODEL: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+sep,-svm";

/// For machines that run machines: all that can be given, AMD's virtualisation included.
const NESTED_CPU_MODEL: &str = "max,+svm,+npt";

/// What of a spec decides the command line.
#[derive(Debug)]
pub(super) struct Shape<'a> {
    pub accelerator: Accelerator,
    pub memory_bytes: u64,
    pub cpus: u16,
    pub carrier: Carrier,
    pub cpu: Cpu,
    /// Whether there is a network card, which QEMU serves with sockets of its own.
    pub network: bool,
    /// Which slots hold a disk.
    pub slots: [bool; SLOTS.len()],
    /// Serial and whether it is read-only, by disk beyond the slots.
    pub disks: &'a [(String, bool)],
    /// Whether the fs device is attached.
    pub shares: bool,
    /// How it comes to life.
    pub start: Start,
}

/// How a machine comes to life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// It boots, in memory of QEMU's own.
    Boot,
    /// It boots in memory that was handed over, to be frozen.
    Freeze,
    /// It goes on where another was frozen: its memory and its state are handed over.
    Thaw,
}

/// The set of descriptors that a machine's state is frozen to.
pub(super) const STATE_SET: usize = 1000;

/// The kernel's command line.
///
/// `no_timer_check`: on a busy host an emulated timer may starve while the kernel tests it, and the kernel panics.
pub(super) fn kernel_command_line(shape: &Shape<'_>) -> String {
    let mut line = format!("{KERNEL_WORDS} no_timer_check i8042.noaux i8042.nokbd");
    if shape.carrier == Carrier::Vsock {
        line.push_str(" kiln.wire=vsock");
    }
    if shape.network {
        line.push_str(" kiln.network=user");
    }
    line
}

/// The arguments after the program's name.
pub(super) fn arguments(shape: &Shape<'_>) -> Vec<String> {
    let mut list: Vec<String> = Vec::new();
    let mut option = |name: &str, value: &str| list.extend([format!("-{name}"), value.to_owned()]);
    let accelerator = match shape.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg,thread=multi",
    };
    let model = match (shape.cpu, shape.accelerator) {
        (Cpu::Fixed, _) => CPU_MODEL,
        (Cpu::Nested, Accelerator::Kvm) => "host",
        (Cpu::Host, Accelerator::Kvm) => "host,-vmx,-svm",
        (Cpu::Host, Accelerator::Tcg) => "max,-svm",
        (Cpu::Nested, Accelerator::Tcg) => NESTED_CPU_MODEL,
    };
    option("name", "guest={machine}");
    option(
        "machine",
        "q35,memory-backend=memory,smm=off,sata=off,smbus=off,usb=off,vmport=off,graphics=off,hpet=off",
    );
    option("accel", accelerator);
    option("cpu", model);
    option("smp", &shape.cpus.to_string());
    option("m", &format!("{}B", shape.memory_bytes).replace('B', "b"));
    // Guest memory is shared with the device process, so it has to be a shared mapping.
    let memory = match shape.start {
        Start::Boot => "memory-backend-memfd".to_owned(),
        // Only of memory that is a file with a name does QEMU leave the contents where they are.
        _ => "memory-backend-file,mem-path={memory}".to_owned(),
    };
    option("object", &format!("{memory},id=memory,share=on,size={}", shape.memory_bytes));
    if shape.start != Start::Boot {
        // A copy runs as soon as it is there, though the frozen machine was stopped.
        option("global", "migration.store-global-state=off");
    }
    match shape.start {
        Start::Boot => {}
        Start::Freeze => option("add-fd", &format!("fd={{state}},set={STATE_SET}")),
        Start::Thaw => option("incoming", "fd:{state}"),
    }
    if shape.start != Start::Thaw {
        option("kernel", "{kernel}");
        option("initrd", "{initramfs}");
        option("append", &kernel_command_line(shape));
    }
    // Changes with every machine, at which the guest's kernel draws from fresh entropy.
    option("device", "vmgenid,guid=auto");
    option("chardev", "socket,id=qmp,fd={qmp}");
    option("mon", "chardev=qmp,mode=control");
    option("chardev", "socket,id=console,fd={console}");
    option("serial", "chardev:console");
    if shape.carrier == Carrier::Serial {
        option("device", "virtio-serial-pci,max_ports=2");
        option("chardev", "socket,id=wire,fd={wire}");
        option("device", &format!("virtserialport,chardev=wire,name={}", kiln_wire::SERIAL_PORT_NAME));
    } else {
        option("chardev", "socket,id=vsock,fd={vsock}");
        option("device", "vhost-user-vsock-pci,chardev=vsock");
    }
    if shape.shares {
        option("chardev", "socket,id=fs,fd={fs}");
        let queues = shape.cpus.clamp(1, MOST_REQUEST_QUEUES.into());
        let tag = kiln_wire::SHARES_TAG;
        option(
            "device",
            &format!("vhost-user-fs-pci,chardev=fs,tag={tag},queue-size=1024,num-request-queues={queues}"),
        );
    }
    if shape.network {
        option("netdev", "user,id=net,ipv6=off");
        option("device", "virtio-net-pci,netdev=net,romfile=");
    }
    for (index, (slot, holds)) in SLOTS.iter().zip(shape.slots).enumerate() {
        let node = if holds { file_node(index, slot.read_only) } else { empty_node(index, slot.read_only) };
        if holds {
            list.extend(descriptor(index));
        }
        list.extend(["-blockdev".to_owned(), node]);
        list.extend(disk(index, slot.serial));
    }
    for (index, (serial, read_only)) in shape.disks.iter().enumerate() {
        let index = index + SLOTS.len();
        list.extend(descriptor(index));
        list.extend(["-blockdev".to_owned(), file_node(index, *read_only)]);
        list.extend(disk(index, serial));
    }
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        list.push(flag.to_owned());
    }
    list.extend(["-display", "none", "-sandbox"].map(str::to_owned));
    list.push("on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned());
    list
}

/// The descriptor of disk `index`, as a file that QEMU can open.
fn descriptor(index: usize) -> [String; 2] {
    ["-add-fd".to_owned(), format!("fd={{disk{index}}},set={}", index + 1)]
}

/// What a guest wrote to a disk decides nothing: the format is always raw. A disk dies with its machine or is flushed by
/// the agent, so the guest's flushes need not wait for the host's.
fn file_node(index: usize, read_only: bool) -> String {
    let (set, mode) = (index + 1, if read_only { "on" } else { "off" });
    format!(
        "driver=raw,node-name=disk{index},read-only={mode},auto-read-only=off,discard=unmap,cache.no-flush=on,\
         file.driver=file,file.filename=/dev/fdset/{set},file.locking=off,file.aio=threads"
    )
}

/// A slot without a disk reads as zeros, and is as large as a slot is in a template.
fn empty_node(index: usize, read_only: bool) -> String {
    let mode = if read_only { "on" } else { "off" };
    format!("driver=null-co,node-name=disk{index},read-only={mode},size={SLOT_BYTES},read-zeroes=on")
}

fn disk(index: usize, serial: &str) -> [String; 2] {
    ["-device".to_owned(), format!("virtio-blk-pci,drive=disk{index},serial={serial}")]
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape<'_> = Shape {
        accelerator: Accelerator::Tcg,
        memory_bytes: 1 << 30,
        cpus: 2,
        carrier: Carrier::Serial,
        cpu: Cpu::Fixed,
        network: false,
        slots: [true, true, false, false],
        disks: &[],
        shares: true,
        start: Start::Boot,
    };

    #[test]
    fn a_disk_is_raw_and_keeps_its_mode() {
        let disks = [("mine".to_owned(), false)];
        let line = arguments(&Shape { disks: &disks, ..SHAPE }).join(" ");
        assert!(line.contains("driver=raw,node-name=disk0,read-only=on"), "{line}");
        assert!(line.contains("driver=raw,node-name=disk1,read-only=off"), "{line}");
        assert!(line.contains("drive=disk1,serial=scratch"), "{line}");
        assert!(line.contains("driver=raw,node-name=disk4,read-only=off"), "{line}");
        assert!(line.contains("drive=disk4,serial=mine"), "{line}");
        assert!(!line.contains("vsock"), "{line}");
    }

    #[test]
    fn a_slot_without_a_disk_is_there_and_empty() {
        let line = arguments(&SHAPE).join(" ");
        assert!(line.contains("driver=null-co,node-name=disk2,read-only=on"), "{line}");
        assert!(line.contains("drive=disk2,serial=modules"), "{line}");
        assert!(!line.contains("{disk2}"), "{line}");
    }

    #[test]
    fn only_a_machine_that_is_to_have_a_network_has_a_card_and_is_told() {
        let without = arguments(&SHAPE).join(" ");
        assert!(!without.contains("net"), "{without}");
        let with = arguments(&Shape { network: true, ..SHAPE }).join(" ");
        assert!(with.contains("-netdev user,id=net") && with.contains("kiln.network=user"), "{with}");
    }

    /// What a guest can see of its machine's devices.
    fn devices(start: Start) -> Vec<String> {
        let list = arguments(&Shape { start, ..SHAPE });
        let of_guest =
            |option: &str| ["-machine", "-accel", "-cpu", "-smp", "-m", "-device"].contains(&option);
        list.chunks(2).filter(|pair| of_guest(&pair[0])).map(|pair| pair.join(" ")).collect()
    }

    #[test]
    fn a_copy_has_the_devices_of_the_machine_that_was_frozen_and_of_one_that_boots() {
        assert_eq!(devices(Start::Thaw), devices(Start::Freeze));
        assert_eq!(devices(Start::Boot), devices(Start::Freeze));
        assert!(devices(Start::Boot).len() > 10);
    }
}
