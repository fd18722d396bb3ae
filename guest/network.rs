//! The network of a machine whose step has one: the other end is QEMU's user network, whose addresses are always the same,
//! so nothing is asked for. No other machine has a network card.

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;

use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;

use crate::failure::{Doing, Failure};
use crate::place::StepRoot;
use crate::sys;

/// The word of the kernel's command line that asks for it.
const WORD: &str = "kiln.network=user";
/// The first network card's name; no udev renames it.
const INTERFACE: &str = "eth0";
/// The addresses that QEMU's user network gives by DHCP (`-netdev user` in qemu(1)).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const RESOLVER: &[u8] = b"nameserver 10.0.2.3\n";

/// Whether this machine has a network.
pub fn is_wanted() -> bool {
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    command_line.split_ascii_whitespace().any(|word| word == WORD)
}

/// Gives the network card its address and a way out, and the step's root its resolver.
///
/// # Errors
/// There is no card, which is to say that its driver was not loaded, or something of it cannot be set.
pub fn set_up(root: &StepRoot) -> Result<(), Failure> {
    sys::interface_up(INTERFACE, ADDRESS, MASK).doing(|| format!("setting up {INTERFACE}"))?;
    sys::default_route(GATEWAY).doing(|| format!("adding the route by {GATEWAY}"))?;
    let what = || "writing /etc/resolv.conf in the root";
    let folder = root.folder(b"/etc")?;
    // It may be a link to where a resolver of another host writes.
    match unlinkat(&folder, "resolv.conf", AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error).doing(what),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = openat(&folder, "resolv.conf", flags, Mode::from_raw_mode(0o644)).doing(what)?;
    File::from(file).write_all(RESOLVER).doing(what)
}
