//! Why a program that is there cannot be executed, in words. The kernel's answer is a number: ENOENT also where the
//! program is there and its loader is not, ENOEXEC whatever it is that is no program.
//!
//! Called in the process that was to become the program, in the step's root and with nothing more than the program
//! would have had: what it reads may be hostile.

use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::Errno;

/// How many interpreters of interpreters the kernel follows (BINPRM_MAX_RECURSION in fs/exec.c allows five).
const MOST_INTERPRETERS: usize = 5;
/// As much of a script's first line as the kernel looks at (BINPRM_BUF_SIZE).
const HEAD_BYTES: usize = 256;
/// EM_X86_64 and EM_386 of linux/elf-em.h: what a machine runs.
const OURS: [u16; 2] = [62, 3];
const PT_INTERP: u32 = 3;

/// What stands in the way of the program at `path`, of which the kernel said `errno`. None where there is no program,
/// or nothing to add.
pub fn of(path: &Path, errno: Errno) -> Option<String> {
    let meta = match path.metadata() {
        Ok(meta) => meta,
        Err(_) => {
            let target = path.read_link().ok()?;
            return Some(format!(
                "it is a link to `{}`, which is not there",
                shown(target.as_os_str().as_bytes())
            ));
        }
    };
    match errno {
        Errno::ACCESS if meta.is_dir() => Some("it is a folder".to_owned()),
        Errno::ACCESS if meta.mode() & 0o111 == 0 => {
            Some(format!("its mode {:04o} lets nobody execute it", meta.mode() & 0o7777))
        }
        Errno::NOENT | Errno::NOEXEC => {
            let mut path = path.to_owned();
            // The program is there: what is not is its interpreter, or that one's.
            for _ in 0..MOST_INTERPRETERS {
                match look_at(&path)? {
                    Finding::Needs { what, interpreter } => {
                        let next = Path::new(std::ffi::OsStr::from_bytes(&interpreter)).to_owned();
                        if next.symlink_metadata().is_err() {
                            return Some(format!("its {what} `{}` is not there", shown(&interpreter)));
                        }
                        path = next;
                    }
                    Finding::Is(what) => return Some(what),
                }
            }
            None
        }
        _ => None,
    }
}

/// What a file is, as far as it keeps a program from running.
enum Finding {
    /// It needs another program, which may be what is missing.
    Needs { what: &'static str, interpreter: Vec<u8> },
    /// This.
    Is(String),
}

fn look_at(path: &Path) -> Option<Finding> {
    // A FIFO in a program's place must not be waited for.
    let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
    if !file.metadata().ok()?.is_file() {
        return Some(Finding::Is("it is no regular file".to_owned()));
    }
    let mut head = Vec::new();
    file.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head).ok()?;
    match head.as_slice() {
        [] => Some(Finding::Is("it is empty".to_owned())),
        [b'#', b'!', rest @ ..] => {
            let line = rest.split(|&byte| byte == b'\n').next().unwrap_or_default();
            let line = line.trim_ascii_start();
            let end = line.iter().position(|byte| matches!(byte, b' ' | b'\t')).unwrap_or(line.len());
            let interpreter = line.get(..end).unwrap_or_default().to_vec();
            Some(Finding::Needs { what: "interpreter", interpreter })
        }
        [0x7f, b'E', b'L', b'F', ..] => elf(&file, &head),
        _ => Some(Finding::Is("it is neither a program of Linux nor a script with `#!`".to_owned())),
    }
}

fn elf(file: &File, head: &[u8]) -> Option<Finding> {
    let u16_at = |bytes: &[u8], at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let u32_at = |bytes: &[u8], at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let u64_at = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let big_endian = head.get(5) == Some(&2);
    let machine = u16_at(head, 18)?;
    let machine = if big_endian { machine.swap_bytes() } else { machine };
    if big_endian || !OURS.contains(&machine) {
        return Some(Finding::Is(format!("it is for {}, and the machine is x86-64", processor(machine))));
    }
    let wide = head.get(4) == Some(&2);
    let (offset, size, count) = if wide {
        (u64_at(head, 32)?, u16_at(head, 54)?, u16_at(head, 56)?)
    } else {
        (u32_at(head, 28)?.into(), u16_at(head, 42)?, u16_at(head, 44)?)
    };
    let mut interpreter = None;
    for index in 0..count.min(256) {
        let mut header = [0; 56];
        let at = offset.checked_add(u64::from(index) * u64::from(size))?;
        let length = if wide { 56 } else { 32 };
        file.read_exact_at(header.get_mut(..length)?, at).ok()?;
        if u32_at(&header, 0)? == PT_INTERP {
            let (start, bytes) = if wide {
                (u64_at(&header, 8)?, u64_at(&header, 32)?)
            } else {
                (u32_at(&header, 4)?.into(), u32_at(&header, 16)?.into())
            };
            let mut path = vec![0; usize::try_from(bytes.min(4096)).ok()?];
            file.read_exact_at(&mut path, start).ok()?;
            path.truncate(path.iter().position(|&byte| byte == 0).unwrap_or(path.len()));
            interpreter = Some(path);
        }
    }
    interpreter.map(|interpreter| Finding::Needs { what: "loader", interpreter })
}

/// Processors by their numbers in linux/elf-em.h.
fn processor(machine: u16) -> String {
    let name = match machine {
        2 | 43 => "SPARC",
        8 => "MIPS",
        20 => "32-bit PowerPC",
        21 => "64-bit PowerPC",
        22 => "s390",
        40 => "32-bit ARM",
        183 => "64-bit ARM",
        243 => "RISC-V",
        258 => "LoongArch",
        other => return format!("processor type {other}"),
    };
    name.to_owned()
}

/// A path from a file that may hold anything.
fn shown(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::PathBuf;

    use super::*;

    fn file(folder: &tempfile::TempDir, name: &str, content: &[u8]) -> PathBuf {
        let path = folder.path().join(name);
        fs::write(&path, content).expect("room");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
        path
    }

    /// An ELF file for `machine`, with a loader.
    fn program(machine: u16, loader: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 3;
        bytes[64 + 8] = 64 + 56;
        bytes[64 + 32] = u8::try_from(loader.len()).expect("short");
        [&bytes, loader].concat()
    }

    #[test]
    fn what_is_missing_is_named_however_deep_it_lies() {
        let folder = tempfile::tempdir().expect("a folder");
        let dynamic = file(&folder, "dynamic", &program(62, b"/lib64/none.so.2\0"));
        let script = file(&folder, "script", format!("#! {} -e\necho", dynamic.display()).as_bytes());
        let windows = file(&folder, "windows", b"#!/none/sh\r\necho");
        for (path, expected) in [
            (&dynamic, "its loader `/lib64/none.so.2` is not there"),
            (&script, "its loader `/lib64/none.so.2` is not there"),
            (&windows, "its interpreter `/none/sh\\r` is not there"),
        ] {
            assert_eq!(of(path, Errno::NOENT).as_deref(), Some(expected));
        }
        symlink("nowhere", folder.path().join("link")).expect("a link");
        let link = of(&folder.path().join("link"), Errno::NOENT);
        assert_eq!(link.as_deref(), Some("it is a link to `nowhere`, which is not there"));
        assert_eq!(of(&folder.path().join("none"), Errno::NOENT), None);
    }

    #[test]
    fn what_is_no_program_of_this_machine_is_said_to_be_what_it_is() {
        let folder = tempfile::tempdir().expect("a folder");
        for (content, expected) in [
            (&b""[..], "it is empty"),
            (b"hello\n", "it is neither a program of Linux nor a script with `#!`"),
            (&program(183, b"/lib/ld.so\0"), "it is for 64-bit ARM, and the machine is x86-64"),
            (&program(9999, b"/lib/ld.so\0"), "it is for processor type 9999, and the machine is x86-64"),
        ] {
            let path = file(&folder, "program", content);
            assert_eq!(of(&path, Errno::NOEXEC).as_deref(), Some(expected));
        }
        let mut big_endian = program(0, b"");
        big_endian[5] = 2;
        big_endian[19] = 22;
        let path = file(&folder, "program", &big_endian);
        assert_eq!(of(&path, Errno::NOEXEC).as_deref(), Some("it is for s390, and the machine is x86-64"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("ours");
        assert_eq!(of(&path, Errno::ACCESS).as_deref(), Some("its mode 0644 lets nobody execute it"));
        assert_eq!(of(folder.path(), Errno::ACCESS).as_deref(), Some("it is a folder"));
    }

    #[test]
    fn hostile_headers_are_looked_at_and_no_more() {
        let folder = tempfile::tempdir().expect("a folder");
        let good = program(62, b"/lib64/none.so.2\0");
        for length in 0..good.len() {
            let _ = of(&file(&folder, "cut", &good[..length]), Errno::NOENT);
        }
        for at in 4..good.len() {
            for value in [0, 0x7f, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                let _ = of(&file(&folder, "changed", &bytes), Errno::NOENT);
            }
        }
        let own = file(&folder, "own", b"#!own");
        let own_path = own.display().to_string();
        fs::write(&own, format!("#!{own_path}\n")).expect("room");
        assert_eq!(of(&own, Errno::NOENT), None, "a circle ends");
    }
}
