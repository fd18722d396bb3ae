//! What a build leaves for `kiln sign`, as tests make it: unified images, and the record that they are held against. Two test
//! programs use it.

use std::fs;
use std::path::Path;

use kiln::sign::record::{Record, Unified};
use kiln_artifact::uefi::pe::Image;
use kiln_artifact::uefi::uki::{self, Parts};
use kiln_digest::Digest;

pub const COMMAND_LINE: &str = "console=ttyS0 quiet";

/// The least that an image has beside its stub.
pub fn parts(kernel: &[u8]) -> Parts<'_> {
    Parts {
        os_release: None,
        release: Some("6.12"),
        command_line: COMMAND_LINE,
        kernel,
        initrds: &[b"initrd"],
        sbat: None,
    }
}

/// An image of a stub and what it starts.
pub fn unified(stub: &[u8], kernel: &[u8], command_line: &str, initrd: &[u8]) -> Vec<u8> {
    let initrds = &[initrd][..];
    uki::write(stub, &Parts { command_line, initrds, ..parts(kernel) }).expect("a stub with room")
}

/// Puts an image where a build has it below `work`, and says so in `record`.
pub fn put(work: &Path, record: &mut Record, name: &str, bytes: &[u8]) {
    let file = format!("boot/{name}.efi");
    fs::write(work.join(&file), bytes).expect("room");
    let image = Image::parse(bytes).expect("well formed");
    let known = [".osrel", ".uname", ".cmdline", ".linux", ".initrd", ".sbat"];
    let sections = image.sections().iter().filter(|section| known.contains(&section.name.as_str()));
    let sections =
        sections.map(|section| (section.name.clone(), Digest::of(image.content(section)))).collect();
    let signed = format!("boot/efi/{}.EFI", name.to_uppercase());
    record.unified.push(Unified { file, sha256: Digest::of(bytes), signed, sections });
}

/// Puts the record where a build leaves it.
pub fn write(work: &Path, record: &Record) {
    let json = serde_json::to_vec_pretty(record).expect("plain data");
    fs::write(work.join("boot/record.json"), json).expect("room");
}
