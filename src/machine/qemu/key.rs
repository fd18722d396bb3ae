//! Under which name a template of QEMU's is kept: the digest of all that decides what is in it.

use std::fs;
use std::io;

use kiln_digest::Digest;

use super::{Places, Qemu, Spec, argv};
use crate::machine::template::key::{identity, kiln, processor};

/// Changes with what is frozen from the same parts.
const FORMAT: u32 = 1;

/// The key of the template for machines of `spec`.
///
/// # Errors
/// A program cannot be looked at.
pub fn of(qemu: &Qemu, spec: &Spec) -> io::Result<Digest> {
    let shape = qemu.shape(spec, &Places::default(), &[], argv::Start::Freeze);
    let program = fs::canonicalize(&qemu.program)?;
    let parts = [
        format!("template {FORMAT}, wire {}", kiln_wire::VERSION),
        // The device process is kiln, and the guest's driver knows what it offered.
        kiln()?,
        format!("qemu {} {}", program.display(), identity(&fs::metadata(&program)?)),
        format!("bundle {}", spec.bundle),
        // A guest that is emulated meets the rate of its time-stamp counter.
        processor()?,
        argv::arguments(&shape).join("\0"),
    ];
    Ok(Digest::of(parts.join("\n").as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::machine::{Accelerator, Carrier, Cpu, Disk, program};

    fn spec() -> Spec {
        Spec {
            kernel: "kernel".into(),
            initramfs: "initramfs".into(),
            bundle: Digest::of(b"bundle"),
            memory_bytes: 1 << 30,
            cpus: 2,
            shares: Vec::new(),
            disks: Vec::new(),
            carrier: Carrier::Serial,
            cpu: Cpu::Fixed,
            network: false,
            rehearsal: None,
        }
    }

    fn qemu(program: &Path, accelerator: Accelerator) -> Qemu {
        Qemu { program: program.to_owned(), accelerator, templates: None }
    }

    #[test]
    fn whatever_is_in_a_template_changes_its_key_and_a_step_does_not() {
        // A test has no program for machines beside it.
        program::is_this();
        let folder = tempfile::tempdir().expect("a folder");
        let [one, other] = ["one", "other"].map(|name| folder.path().join(name));
        for program in [&one, &other] {
            fs::write(program, "").expect("room");
        }
        let mut keys = Vec::new();
        let mut add = |program: &Path, accelerator, change: fn(&mut Spec)| {
            let mut spec = spec();
            change(&mut spec);
            let key = of(&qemu(program, accelerator), &spec).expect("a program");
            assert!(!keys.contains(&key));
            keys.push(key);
        };
        add(&one, Accelerator::Tcg, |_| {});
        add(&other, Accelerator::Tcg, |_| {});
        add(&one, Accelerator::Kvm, |_| {});
        add(&one, Accelerator::Tcg, |spec| spec.memory_bytes *= 2);
        add(&one, Accelerator::Tcg, |spec| spec.cpus += 1);
        add(&one, Accelerator::Tcg, |spec| spec.cpu = Cpu::Host);
        add(&one, Accelerator::Tcg, |spec| spec.bundle = Digest::of(b"another"));
        // Installed anew, even with the same contents.
        let before = of(&qemu(&one, Accelerator::Tcg), &spec()).expect("a program");
        fs::rename(&other, &one).expect("one folder");
        assert_ne!(of(&qemu(&one, Accelerator::Tcg), &spec()).expect("a program"), before);
        let before = of(&qemu(&one, Accelerator::Tcg), &spec()).expect("a program");
        let mut of_step = spec();
        let file = fs::File::open(&one).expect("a file");
        of_step.disks.push(Disk { serial: "root".to_owned(), file: file.into(), read_only: true });
        assert_eq!(of(&qemu(&one, Accelerator::Tcg), &of_step).expect("a program"), before);
    }
}
