//! The command line of QEMU for a machine with firmware: a pure function. `{NAME}` stands for a descriptor.

use super::{Bus, Format, Network};
use crate::machine::Accelerator;

/// The set of descriptors that screenshots are written to.
pub(super) const SCREEN_SET: usize = 900;

/// What decides the command line.
#[derive(Debug)]
pub(super) struct Shape<'a> {
    pub accelerator: Accelerator,
    pub memory_bytes: u64,
    pub cpus: u16,
    /// Whether the firmware keeps its variables to itself by system management mode, as Secure Boot needs.
    pub smm: bool,
    pub tpm: bool,
    pub network: Network,
    pub disks: &'a [DiskShape],
}

/// What of a disk decides it.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskShape {
    pub bus: Bus,
    pub format: Format,
    pub read_only: bool,
    /// Whether what is written goes to a layer of its own.
    pub overlay: bool,
}

/// The arguments after the program's name.
pub(super) fn arguments(shape: &Shape<'_>) -> Vec<String> {
    let mut list: Vec<String> = Vec::new();
    let mut option = |name: &str, value: &str| list.extend([format!("-{name}"), value.to_owned()]);
    let (accelerator, cpu) = match shape.accelerator {
        Accelerator::Kvm => ("kvm", "host"),
        // Other people's systems may need any feature.
        Accelerator::Tcg => ("tcg,thread=multi", "max"),
    };
    let smm = if shape.smm { "on" } else { "off" };
    option("name", "guest={machine}");
    option("machine", &format!("q35,smm={smm},vmport=off,pflash0=code,pflash1=vars"));
    option("accel", accelerator);
    option("cpu", cpu);
    option("smp", &shape.cpus.to_string());
    option("m", &format!("{}b", shape.memory_bytes));
    if shape.smm {
        // Else whatever runs in the guest can write the variables that say which keys are trusted.
        option("global", "driver=cfi.pflash01,property=secure,value=on");
    }
    // OVMF's Secure Boot builds leave suspend to memory out, and expect the chipset to do so too.
    option("global", "ICH9-LPC.disable_s3=1");
    for (set, (node, mode)) in [("code", "on"), ("vars", "off")].into_iter().enumerate() {
        let set = set + 1;
        option("add-fd", &format!("fd={{{node}}},set={set}"));
        option(
            "blockdev",
            &format!(
                "driver=raw,node-name={node},read-only={mode},auto-read-only=off,file.driver=file,\
                 file.filename=/dev/fdset/{set},file.locking=off"
            ),
        );
    }
    option("chardev", "socket,id=qmp,fd={qmp}");
    option("mon", "chardev=qmp,mode=control");
    option("chardev", "socket,id=console,fd={console}");
    option("serial", "chardev:console");
    option("device", "VGA");
    option("add-fd", &format!("fd={{screen}},set={SCREEN_SET}"));
    option("device", "virtio-rng-pci");
    if shape.tpm {
        option("chardev", "socket,id=tpm,fd={tpm}");
        option("tpmdev", "emulator,id=tpm,chardev=tpm");
        option("device", "tpm-crb,tpmdev=tpm");
    }
    match shape.network {
        Network::None => {}
        Network::User { ssh, outside } => {
            let restrict = if outside { "off" } else { "on" };
            // QEMU takes a port that is free and says which, so nobody can come before it.
            let forward = if ssh { ",hostfwd=tcp:127.0.0.1:0-:22" } else { "" };
            option("netdev", &format!("user,id=net,restrict={restrict}{forward}"));
            // No boot from the network: what is tested is the image.
            option("device", "virtio-net-pci,netdev=net,romfile=");
        }
    }
    if shape.disks.iter().any(|disk| disk.bus == Bus::Usb) {
        option("device", "qemu-xhci,id=xhci");
    }
    for (index, disk) in shape.disks.iter().enumerate() {
        disk_options(&mut option, index, *disk);
    }
    for flag in ["-nodefaults", "-no-user-config"] {
        list.push(flag.to_owned());
    }
    list.extend(["-display", "none", "-sandbox"].map(str::to_owned));
    list.push("on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned());
    list
}

/// Sets of descriptors: 1 and 2 are the firmware's, each disk has two.
fn disk_options(option: &mut impl FnMut(&str, &str), index: usize, disk: DiskShape) {
    let (set, layer_set) = (10 + 2 * index, 11 + 2 * index);
    let protocol = |set: usize| {
        format!("file.driver=file,file.filename=/dev/fdset/{set},file.locking=off,file.aio=threads")
    };
    let base = if disk.overlay { format!("base{index}") } else { format!("disk{index}") };
    let mode = if disk.read_only || disk.overlay { "on" } else { "off" };
    option("add-fd", &format!("fd={{disk{index}}},set={set}"));
    match disk.format {
        Format::Raw => option(
            "blockdev",
            &format!(
                "driver=raw,node-name={base},read-only={mode},auto-read-only=off,discard=unmap,{}",
                protocol(set)
            ),
        ),
        // A qcow2 file names other files of the host in its header, and none of them is opened: `backing` leaves one out, and
        // an image with a data file (incompatible feature, bit 2) is refused before it comes here, by `boot::image`.
        Format::Qcow2 => option(
            "blockdev",
            &format!(
                "{{\"driver\":\"qcow2\",\"node-name\":\"{base}\",\"read-only\":{},\"backing\":null,\
                 \"file\":{{\"driver\":\"file\",\"filename\":\"/dev/fdset/{set}\",\"locking\":\"off\"}}}}",
                disk.read_only || disk.overlay
            ),
        ),
    }
    if disk.overlay {
        option("add-fd", &format!("fd={{layer{index}}},set={layer_set}"));
        option(
            "blockdev",
            &format!(
                "driver=qcow2,node-name=disk{index},backing={base},discard=unmap,cache.no-flush=on,{}",
                protocol(layer_set)
            ),
        );
    }
    let serial = format!("kiln{index}");
    let device = match disk.bus {
        Bus::Virtio => format!("virtio-blk-pci,drive=disk{index},serial={serial}"),
        Bus::Nvme => format!("nvme,drive=disk{index},serial={serial}"),
        Bus::Usb => format!("usb-storage,bus=xhci.0,drive=disk{index},serial={serial},removable=on"),
        Bus::Sata => format!("ide-hd,bus=ide.{index},drive=disk{index},serial={serial}"),
    };
    option("device", &format!("{device},bootindex={index}"));
}
