//! The command line of QEMU for a machine: a pure function of its spec. `{NAME}` stands for a descriptor.

use crate::machine::{Accelerator, Carrier};

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
    pub nested: bool,
    /// Serial and whether it is read-only, by disk.
    pub disks: &'a [(String, bool)],
    /// Whether the fs device is attached.
    pub shares: bool,
}

/// The kernel's command line.
///
/// `init_on_alloc` keeps pages that a device process filled from holding stale translated code under emulation;
/// `panic=-1` turns a panic into a reset, which ends the machine at once. `cryptomgr.notests` leaves out tests of
/// the kernel's ciphers, 0.4 s of an emulated boot. `no_timer_check`: on a busy host an emulated timer may starve
/// while the kernel tests it, and the kernel panics.
pub(super) fn kernel_command_line(shape: &Shape<'_>) -> String {
    let mut line = String::from(
        "console=ttyS0 quiet loglevel=4 panic=-1 init_on_alloc=1 cryptomgr.notests no_timer_check i8042.noaux i8042.nokbd \
         random.trust_cpu=off tsc=nowatchdog rcupdate.rcu_expedited=1",
    );
    if shape.carrier == Carrier::Vsock {
        line.push_str(" kiln.wire=vsock");
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
    let model = match (shape.nested, shape.accelerator) {
        (true, Accelerator::Tcg) => NESTED_CPU_MODEL,
        (true, Accelerator::Kvm) => "host",
        (false, _) => CPU_MODEL,
    };
    option("name", "guest={machine}");
    option(
        "machine",
        "q35,memory-backend=memory,sata=off,smbus=off,usb=off,vmport=off,graphics=off,hpet=off",
    );
    option("accel", accelerator);
    option("cpu", model);
    option("smp", &shape.cpus.to_string());
    option("m", &format!("{}B", shape.memory_bytes).replace('B', "b"));
    // Guest memory is shared with the device process, so it has to be a shared mapping.
    option("object", &format!("memory-backend-memfd,id=memory,share=on,size={}", shape.memory_bytes));
    option("kernel", "{kernel}");
    option("initrd", "{initramfs}");
    option("append", &kernel_command_line(shape));
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
        option(
            "device",
            &format!("vhost-user-fs-pci,chardev=fs,tag={},queue-size=1024", kiln_wire::SHARES_TAG),
        );
    }
    for (index, (serial, read_only)) in shape.disks.iter().enumerate() {
        let (set, mode) = (index + 1, if *read_only { "on" } else { "off" });
        option("add-fd", &format!("fd={{disk{index}}},set={set}"));
        // What a guest wrote to a disk decides nothing: the format is always raw. A disk dies with its machine or
        // is flushed by the agent, so the guest's flushes need not wait for the host's.
        option(
            "blockdev",
            &format!(
                "driver=raw,node-name=disk{index},read-only={mode},auto-read-only=off,discard=unmap,\
                 cache.no-flush=on,file.driver=file,file.filename=/dev/fdset/{set},file.locking=off,\
                 file.aio=threads"
            ),
        );
        option("device", &format!("virtio-blk-pci,drive=disk{index},serial={serial}"));
    }
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        list.push(flag.to_owned());
    }
    list.extend(["-display", "none", "-sandbox"].map(str::to_owned));
    list.push("on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned());
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_raw_and_keeps_its_mode() {
        let disks = [("root".to_owned(), true), ("scratch".to_owned(), false)];
        let shape = Shape {
            accelerator: Accelerator::Tcg,
            memory_bytes: 1 << 30,
            cpus: 2,
            carrier: Carrier::Serial,
            nested: false,
            disks: &disks,
            shares: true,
        };
        let line = arguments(&shape).join(" ");
        assert!(line.contains("driver=raw,node-name=disk0,read-only=on"), "{line}");
        assert!(line.contains("driver=raw,node-name=disk1,read-only=off"), "{line}");
        assert!(line.contains("serial=scratch"), "{line}");
        assert!(!line.contains("vsock"), "{line}");
    }
}
