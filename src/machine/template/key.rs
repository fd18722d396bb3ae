//! What goes into the key of a template, whichever backend makes it.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

use crate::machine::program;

/// Tells a program from another that was installed in its place.
pub fn identity(meta: &Metadata) -> String {
    format!("{} {} {}.{:09}", meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec())
}

/// Tells this kiln from another, in the processes that hold its machines as in itself.
///
/// # Errors
/// It cannot be looked at.
pub fn kiln() -> io::Result<String> {
    Ok(format!("kiln {}", identity(&program::metadata()?)))
}

/// What of the host's processor a guest may meet.
///
/// # Errors
/// The system does not say.
pub fn processor() -> io::Result<String> {
    fs::read_to_string("/proc/cpuinfo").map(|text| processor_in(&text))
}

fn processor_in(text: &str) -> String {
    let names = ["vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags"];
    let first = text.split("\n\n").next().unwrap_or_default();
    let of_model = |line: &&str| names.contains(&line.split(':').next().unwrap_or_default().trim());
    format!("processor {}", first.lines().filter(of_model).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_processor_is_told_by_its_model_its_microcode_and_what_it_can_and_not_by_its_pace() {
        let told = |model: &str, microcode: &str, flags: &str, pace: &str| {
            let one = |number| {
                format!(
                    "processor\t: {number}\nvendor_id\t: V\nmodel name\t: {model}\nmicrocode\t: {microcode}\n\
                     cpu MHz\t\t: {pace}\nflags\t\t: {flags}\nbogomips\t: {pace}\n\n"
                )
            };
            processor_in(&[one(0), one(1)].concat())
        };
        let host = told("M", "0x1", "fpu sse2", "2000.1");
        assert_eq!(told("M", "0x1", "fpu sse2", "1999.8"), host);
        for other in [
            told("N", "0x1", "fpu sse2", "2000.1"),
            told("M", "0x2", "fpu sse2", "2000.1"),
            told("M", "0x1", "fpu", "2000.1"),
        ] {
            assert_ne!(other, host);
        }
    }
}
