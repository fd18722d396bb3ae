//! The real machine behind [`System`], and starting what is kept running.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, mount};

use crate::devices;
use crate::report;
use crate::services::Service;
use crate::start::System;
use crate::sys;

/// How an encrypted disk begins (LUKS2 on-disk format, §2.1).
const LUKS: [u8; 6] = *b"LUKS\xba\xbe";
/// The variables of everything that is started.
const VARIABLES: [(&str, &str); 3] =
    [("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root"), ("LANG", "C.UTF-8")];

/// The machine.
pub struct Linux;

fn words(path: &str, error: impl std::fmt::Display) -> String {
    format!("{path}: {error}")
}

fn copy_over(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_over(&entry.path(), &target)?;
            continue;
        }
        // What is there may be a link, which is not written through.
        match fs::remove_file(&target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

fn is_mounted(path: &str) -> bool {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(path))
}

impl System for Linux {
    fn say(&mut self, text: &str) {
        report::say(text);
    }

    fn print(&mut self, text: &str) {
        if let Ok(mut console) = File::options().write(true).open("/dev/console") {
            let _ = console.write_all(format!("{text}\r\n").as_bytes());
        }
    }

    fn mount(&mut self, kind: &str, path: &str, options: &str) -> Result<(), String> {
        if is_mounted(path) {
            return Ok(());
        }
        let flags = match path {
            "/dev" | "/dev/pts" => MountFlags::NOSUID | MountFlags::NOEXEC,
            "/dev/shm" => MountFlags::NOSUID | MountFlags::NODEV,
            _ => MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        };
        let options = std::ffi::CString::new(options).map_err(|error| words(path, error))?;
        mount(kind, path, kind, flags, Some(options.as_c_str())).map_err(|error| words(kind, error))
    }

    fn read(&mut self, path: &str) -> Option<Vec<u8>> {
        fs::read(path).ok()
    }

    fn write(&mut self, path: &str, bytes: &[u8], mode: u32) -> Result<(), String> {
        let file = File::options().write(true).create(true).truncate(true).mode(mode).open(path);
        let written = file.and_then(|mut file| {
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.write_all(bytes)
        });
        written.map_err(|error| error.to_string())
    }

    fn folder(&mut self, path: &str, mode: u32) -> Result<(), String> {
        if fs::metadata(path).is_ok_and(|meta| meta.is_dir() && meta.permissions().mode() & 0o7777 == mode) {
            return Ok(());
        }
        fs::create_dir_all(path).map_err(|error| error.to_string())?;
        // Of what is mounted, others have said it.
        if is_mounted(path) {
            return Ok(());
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|error| error.to_string())
    }

    fn copy_over(&mut self, from: &str, to: &str) -> Result<(), String> {
        copy_over(Path::new(from), Path::new(to)).map_err(|error| error.to_string())
    }

    fn has(&mut self, path: &str) -> bool {
        fs::metadata(path).is_ok()
    }

    fn files(&mut self, folder: &str, end: &str) -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut found: Vec<String> = entries
            .map(|entry| format!("{folder}/{}", entry.file_name().to_string_lossy()))
            .filter(|path| path.ends_with(end))
            .collect();
        found.sort_unstable();
        found
    }

    fn run(&mut self, command: &[&str]) -> Result<(), String> {
        let [program, arguments @ ..] = command else { return Ok(()) };
        let ended = Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(VARIABLES)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log())
            .status();
        match ended {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("{program}: {status}")),
            Err(error) => Err(words(program, error)),
        }
    }

    fn modaliases(&mut self) -> Vec<String> {
        devices::modaliases()
    }

    fn encrypted(&mut self) -> Vec<String> {
        let entries = fs::read_dir("/sys/class/block").into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let begins = |name: &String| {
            let mut start = [0; LUKS.len()];
            let read = File::open(format!("/dev/{name}")).and_then(|disk| disk.read_exact_at(&mut start, 0));
            read.is_ok() && start == LUKS
        };
        let mut found: Vec<String> = names.filter(begins).collect();
        found.sort_unstable();
        found
    }

    fn set_host_name(&mut self, name: &str) -> Result<(), String> {
        rustix::system::sethostname(name.as_bytes()).map_err(|error| error.to_string())
    }
}

/// Where errors of programs without a terminal go.
fn log() -> Stdio {
    File::options().write(true).open("/dev/kmsg").map_or_else(|_| Stdio::null(), Into::into)
}

/// Starts a service, and gives its number.
///
/// # Errors
/// In words.
pub fn spawn(service: &Service, variables: &[(String, String)]) -> Result<i32, String> {
    let [program, arguments @ ..] = &service.command[..] else { return Err("nothing to start".to_owned()) };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(VARIABLES);
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    match &service.terminal {
        Some(path) => {
            // Nobody but who is started is to have it as the controlling terminal.
            let open = || {
                let mut options = File::options();
                options.read(true).write(true).custom_flags(libc::O_NOCTTY);
                options.open(path).map_err(|error| words(path, error))
            };
            command.stdin(open()?).stdout(open()?).stderr(open()?).env("TERM", "linux").current_dir("/");
        }
        None => {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log());
        }
    }
    // A getty takes its terminal itself.
    let takes_terminal = service.terminal.is_some() && program.ends_with("/sh");
    sys::in_own_session(&mut command, takes_terminal);
    let child = command.spawn().map_err(|error| words(program, error))?;
    i32::try_from(child.id()).map_err(|error| error.to_string())
}

/// Whether something listens on the port, by what /proc/net/tcp and tcp6 say (Documentation/networking/proc_net_tcp.rst).
#[must_use]
pub fn listens(port: u16, tables: &str) -> bool {
    let wanted = format!(":{port:04X}");
    tables.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&wanted)) && words.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_listened_on_is_told_from_one_that_is_connected() {
        let header = "  sl  local_address rem_address   st tx_queue rx_queue\n";
        let line =
            |local: &str, state: &str| format!("{header}   0: {local} 00000000:0000 {state} 0:0 0:0\n");
        assert!(listens(22, &line("00000000:0016", "0A")));
        assert!(listens(22, &line("00000000000000000000000000000000:0016", "0A")));
        assert!(!listens(22, &line("0F02000A:0016", "01")));
        assert!(!listens(22, &line("00000000:0116", "0A")));
        assert!(!listens(22, header));
    }

    #[test]
    fn copying_replaces_links_instead_of_writing_through_them() {
        let top = std::env::temp_dir().join(format!("initos-init-{}", std::process::id()));
        let _ = fs::remove_dir_all(&top);
        fs::create_dir_all(top.join("from/ssh")).expect("a folder");
        fs::create_dir_all(top.join("to/ssh")).expect("a folder");
        fs::write(top.join("other"), "old").expect("room");
        fs::write(top.join("from/ssh/config"), "new").expect("room");
        std::os::unix::fs::symlink(top.join("other"), top.join("to/ssh/config")).expect("a link");
        copy_over(&top.join("from"), &top.join("to")).expect("it is ours");
        assert_eq!(fs::read_to_string(top.join("other")).expect("it stays"), "old");
        assert_eq!(fs::read_to_string(top.join("to/ssh/config")).expect("it is there"), "new");
        fs::remove_dir_all(top).expect("it is ours");
    }
}
