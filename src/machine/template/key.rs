//! What goes into the key of a template, whichever backend makes it.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

/// Tells a program from another that was installed in its place.
pub fn identity(meta: &Metadata) -> String {
    format!("{} {} {}.{:09}", meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec())
}

/// Tells this kiln from another.
///
/// # Errors
/// It cannot be looked at.
pub fn kiln() -> io::Result<String> {
    Ok(format!("kiln {}", identity(&fs::metadata("/proc/self/exe")?)))
}

/// What of the host's processor a guest may meet.
///
/// # Errors
/// The system does not say.
pub fn processor() -> io::Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let names = ["vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags"];
    let first = text.split("\n\n").next().unwrap_or_default();
    let of_model = |line: &&str| names.contains(&line.split(':').next().unwrap_or_default().trim());
    Ok(format!("processor {}", first.lines().filter(of_model).collect::<Vec<_>>().join("\n")))
}
