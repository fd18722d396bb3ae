//! kiln's own virtual machine monitor: one machine on KVM, built for one job, a step's.
//!
//! It boots a Linux kernel straight into 64-bit mode, names its devices in ACPI tables and carries them over
//! virtio-mmio; there is no firmware, no PCI and no legacy device but a serial port for early messages. What runs in
//! it is hostile from its first instruction, so whatever a guest reads or writes ends in a bounded function of
//! numbers, and how it ends is a value ([`End`]).
//!
//! | room | what |
//! | --- | --- |
//! | [`memory`] | guest memory in one sealed memfd, and where things lie in it |
//! | [`boot`] | kernel, initramfs, command line and the kernel's boot parameters in memory |
//! | [`acpi`] | the tables that tell the kernel of processors, devices and power-off |
//! | [`cpu`] | the processor that a guest sees, and its registers at the start |
//! | [`bus`] | which device an address belongs to |
//! | [`mmio`] | the registers of a virtio-mmio device |
//! | [`local`] | a device on a thread of its own |
//! | [`disk`] | the block device |
//! | [`serial`] | the serial port, and the ports of power-off and reset |
//! | [`vcpu`] | the loop that runs a virtual processor |
//! | [`processor`] | all that one holds |
//! | [`snapshot`] | all of a frozen machine but its memory |
//! | [`working_set`] | the pages of it that its copies touch first |
//! | [`vm`] | all of it put together |
//!
//! What it is not: it opens no path, starts no process and locks nothing in. Its caller hands it descriptors, and is
//! locked in already.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "a test fails by panicking"))]

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod cpu;
pub mod disk;
pub mod local;
pub mod memory;
pub mod mmio;
pub mod processor;
pub mod serial;
pub mod snapshot;
pub mod vcpu;
pub mod vm;
pub mod working_set;

pub use vcpu::End;
pub use vm::{Machine, Origin, Parts, VmError};
