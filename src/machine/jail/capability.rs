//! Capabilities: all are given up, for good.

use std::io;

use rustix::io::Errno;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::Profile;

/// Gives up all capabilities, in every set. Where kiln is root, who serves shares keeps the one that reads and
/// searches whatever the owner: a share shows what root would see, and nothing else can be opened anyway.
///
/// # Errors
/// What capset(2) and prctl(2) say.
pub(super) fn drop_all(profile: &Profile) -> io::Result<()> {
    let kept = match profile {
        Profile::Devices | Profile::Vmm if rustix::process::geteuid().is_root() => {
            CapabilitySet::DAC_READ_SEARCH
        }
        _ => CapabilitySet::empty(),
    };
    let held = rustix::thread::capabilities(None)?;
    if held.effective.contains(CapabilitySet::SETPCAP) {
        rustix::thread::set_capabilities_secure_bits(
            CapabilitiesSecureBits::NO_ROOT
                | CapabilitiesSecureBits::NO_ROOT_LOCKED
                | CapabilitiesSecureBits::NO_SETUID_FIXUP
                | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
                | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
                | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
        )?;
        for number in 0..u64::BITS {
            match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(
                1 << number,
            )) {
                // The first number that the kernel does not know.
                Err(Errno::INVAL) => break,
                result => result?,
            }
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let permitted = held.permitted & kept;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: permitted, permitted, inheritable: CapabilitySet::empty() },
    )?;
    Ok(())
}
