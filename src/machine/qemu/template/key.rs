//! Under which name a template is kept: the digest of all that decides what is in it.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

use kiln_digest::Digest;

use super::{Places, Qemu, Spec, argv};
use crate::machine::Accelerator;

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
        format!("kiln {}", identity(&fs::metadata("/proc/self/exe")?)),
        format!("qemu {} {}", program.display(), identity(&fs::metadata(&program)?)),
        format!("bundle {}", spec.bundle),
        format!("processor {}", processor(qemu.accelerator)?),
        argv::arguments(&shape).join("\0"),
    ];
    Ok(Digest::of(parts.join("\n").as_bytes()))
}

/// Tells a program from another that was installed in its place.
fn identity(meta: &Metadata) -> String {
    format!("{} {} {}.{:09}", meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec())
}

/// What of the host's processor a guest meets: nothing where it is emulated.
fn processor(accelerator: Accelerator) -> io::Result<String> {
    if accelerator == Accelerator::Tcg {
        return Ok(String::new());
    }
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let names = ["vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags"];
    let first = text.split("\n\n").next().unwrap_or_default();
    let of_model = |line: &&str| names.contains(&line.split(':').next().unwrap_or_default().trim());
    Ok(first.lines().filter(of_model).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::machine::{Carrier, Disk};

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
            nested: false,
            network: false,
        }
    }

    fn qemu(program: &Path, accelerator: Accelerator) -> Qemu {
        Qemu { program: program.to_owned(), accelerator, templates: None }
    }

    #[test]
    fn whatever_is_in_a_template_changes_its_key_and_a_step_does_not() {
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
