//! What tests of machines have in common: guests of a few instructions, and the KVM that runs them. What they do needs none
//! that is quick.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};

/// Where a guest's code is put and entered.
pub const CODE: u64 = 0x0100_0000;

/// A vmlinux of this code alone.
pub fn kernel(code: &[u8]) -> File {
    let mut file = vec![0; 120];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    file[24..32].copy_from_slice(&CODE.to_le_bytes());
    file[32] = 64;
    file[54] = 56;
    file[56] = 1;
    file[64] = 1;
    file[72] = 120;
    file[88..96].copy_from_slice(&CODE.to_le_bytes());
    for at in [96, 104] {
        file[at..at + 8].copy_from_slice(&(code.len() as u64).to_le_bytes());
    }
    file.extend_from_slice(code);
    let mut kernel = tempfile::tempfile().expect("a file");
    kernel.write_all(&file).expect("room");
    kernel
}

/// /dev/kvm, or word that there is none: then a test has nothing to say, unless KILN_KVM_REQUIRED says that it must.
#[expect(clippy::disallowed_methods, reason = "the tests' own environment")]
pub fn device() -> Option<File> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &device {
        assert!(std::env::var_os("KILN_KVM_REQUIRED").is_none(), "/dev/kvm cannot be opened here: {error}");
        let _ = writeln!(io::stderr(), "skipped: /dev/kvm cannot be opened here: {error}");
    }
    device.ok()
}
