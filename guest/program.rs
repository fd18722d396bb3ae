//! What a command's process executes: arguments and environment as execve(2) takes them, and the paths to try.

use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kiln_wire::Exec;
use rustix::io::Errno;

use crate::obstacle;
use crate::sys::{self, StringArray};

/// Where a program is looked for when the environment has no PATH (confstr(3), `_CS_PATH`).
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";

/// A program ready to be executed.
pub struct Program {
    candidates: Vec<CString>,
    argv: StringArray,
    env: StringArray,
    folder: CString,
}

impl Program {
    /// The program of a request.
    ///
    /// # Errors
    /// EINVAL: a NUL in a string, or no arguments; the wire refuses both.
    pub fn new(exec: &Exec) -> Result<Self, Errno> {
        let c_string = |bytes: &[u8]| CString::new(bytes).map_err(|_| Errno::INVAL);
        let c_strings =
            |strings: &[Vec<u8>]| strings.iter().map(|string| c_string(string)).collect::<Result<_, _>>();
        let path = exec.env.iter().find_map(|variable| variable.strip_prefix(b"PATH="));
        let name = exec.argv.first().ok_or(Errno::INVAL)?;
        Ok(Self {
            candidates: candidates(name, path).iter().map(|path| c_string(path)).collect::<Result<_, _>>()?,
            argv: StringArray::new(c_strings(&exec.argv)?),
            env: StringArray::new(c_strings(&exec.env)?),
            folder: c_string(if exec.cwd.is_empty() { b"/" } else { &exec.cwd })?,
        })
    }

    /// The working directory.
    pub fn folder(&self) -> &CStr {
        &self.folder
    }

    /// Executes the first candidate that is a program, as execvp(3) does, save that a file that is no program is not
    /// given to a shell. Returns only to say why none was executed.
    pub fn execute(&self) -> Errno {
        let mut reason = Errno::NOENT;
        for path in &self.candidates {
            match sys::execve(path, &self.argv, &self.env) {
                Errno::NOENT | Errno::NOTDIR => {}
                // One that may not be executed is named only if no other is found.
                Errno::ACCESS => reason = Errno::ACCESS,
                error => return error,
            }
        }
        reason
    }
}

impl Program {
    /// Why the first candidate that is there cannot be executed, beyond what `errno` says; empty where nothing is known.
    pub fn obstacle(&self, errno: Errno) -> String {
        let paths = self.candidates.iter().map(|path| Path::new(OsStr::from_bytes(path.to_bytes())));
        let mut there = paths.filter(|path| path.symlink_metadata().is_ok());
        there.find_map(|path| obstacle::of(path, errno)).unwrap_or_default()
    }
}

/// The paths at which `name` may be, in the order of `path`.
fn candidates(name: &[u8], path: Option<&[u8]>) -> Vec<Vec<u8>> {
    if name.is_empty() {
        return Vec::new();
    }
    if name.contains(&b'/') {
        return vec![name.to_vec()];
    }
    let join = |folder: &[u8]| match folder {
        // An empty element is the working directory.
        b"" => name.to_vec(),
        folder => [folder, b"/", name].concat(),
    };
    path.unwrap_or(DEFAULT_PATH).split(|&byte| byte == b':').map(join).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_for_along_the_path() {
        assert_eq!(candidates(b"cc", Some(b"/a:/b/")), [b"/a/cc".to_vec(), b"/b//cc".to_vec()]);
        assert_eq!(candidates(b"cc", Some(b":/a:")), [b"cc".to_vec(), b"/a/cc".to_vec(), b"cc".to_vec()]);
        assert_eq!(candidates(b"cc", None), [b"/bin/cc".to_vec(), b"/usr/bin/cc".to_vec()]);
    }

    #[test]
    fn a_path_is_not_looked_for() {
        assert_eq!(candidates(b"./cc", Some(b"/a")), [b"./cc".to_vec()]);
        assert!(candidates(b"", Some(b"/a")).is_empty());
    }
}
