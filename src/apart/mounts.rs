//! What the host has mounted where, for finding out whether one directory shows what lies in another: a bind mount
//! gives a file a second path, which comparing paths does not see.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A line of /proc/self/mountinfo (proc_pid_mountinfo(5)), as far as it says what is shown where.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    /// `major:minor` of the file system.
    device: String,
    /// What of the file system is mounted.
    inner: PathBuf,
    /// Where.
    point: PathBuf,
}

/// A place in a file system, however it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place<'a> {
    device: &'a str,
    inner: PathBuf,
}

impl Place<'_> {
    /// Whether one of the two is in the other.
    fn overlaps(&self, other: &Place<'_>) -> bool {
        self.device == other.device
            && (self.inner.starts_with(&other.inner) || other.inner.starts_with(&self.inner))
    }
}

/// What is mounted.
#[derive(Debug, Clone, Default)]
pub struct Mounts(Vec<Mount>);

impl Mounts {
    /// This process's. Where they cannot be read there are none.
    pub fn read() -> Self {
        Self::parse(&std::fs::read("/proc/self/mountinfo").unwrap_or_default())
    }

    fn parse(text: &[u8]) -> Self {
        let lines = text.split(|&byte| byte == b'\n');
        Self(lines.filter_map(parse_line).collect())
    }

    /// Whether `directory` shows something of `other` or lies in it, by the mounts at and below it. Both paths are
    /// canonical.
    pub fn shows(&self, directory: &Path, other: &Path) -> bool {
        let Some(other) = self.place(other) else { return false };
        let own = self.place(directory);
        let below = self.0.iter().filter(|mount| mount.point.starts_with(directory));
        let below = below.map(|mount| Place { device: &mount.device, inner: mount.inner.clone() });
        own.into_iter().chain(below).any(|place| place.overlaps(&other))
    }

    /// Where `path` lies. Of several mounts at one point the last one is seen.
    fn place(&self, path: &Path) -> Option<Place<'_>> {
        let holds = |mount: &&Mount| path.starts_with(&mount.point);
        let mount = self.0.iter().filter(holds).max_by_key(|mount| mount.point.as_os_str().len())?;
        let rest = path.strip_prefix(&mount.point).ok()?;
        Some(Place { device: &mount.device, inner: mount.inner.join(rest) })
    }
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ').skip(2);
    let device = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let mut path = || Some(PathBuf::from(OsString::from_vec(unescape(fields.next()?))));
    let (inner, point) = (path()?, path()?);
    // What is no path, such as `net:[4026531840]`, lies in nothing.
    (inner.is_absolute() && point.is_absolute()).then_some(Mount { device, inner, point })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw - proc proc rw
24 22 8:2 / /home rw shared:2 - ext4 /dev/sda2 rw
25 22 8:2 /me/.ssh/keys /srv/tree/inner\\040keys rw - ext4 /dev/sda2 rw
26 22 8:2 /me /mnt/me rw - ext4 /dev/sda2 rw
27 22 0:4 net:[4026531840] /run/ns rw - nsfs nsfs rw
28 22 0:30 / /srv/tree/tmp rw - tmpfs tmpfs rw
";

    #[test]
    fn a_second_path_to_the_same_place_is_seen() {
        let mounts = Mounts::parse(TEXT.as_bytes());
        assert_eq!(mounts.0.len(), 6);
        let keys = Path::new("/home/me/.ssh/keys");
        for (directory, shows) in [
            // By the mount below it, and by what it is itself.
            ("/srv/tree", true),
            ("/srv/tree/inner keys", true),
            ("/srv", true),
            ("/mnt/me", true),
            ("/mnt/me/.ssh", true),
            ("/home", true),
            ("/", true),
            // Keys within keys are keys.
            ("/srv/tree/inner keys/below", true),
            ("/mnt/me/other", false),
            ("/srv/tree/tmp", false),
            ("/srv/tree/other", false),
            ("/home/you", false),
            // The same path on another file system.
            ("/me/.ssh/keys", false),
        ] {
            assert_eq!(mounts.shows(Path::new(directory), keys), shows, "{directory}");
        }
    }

    #[test]
    fn what_is_mounted_over_a_place_is_what_is_seen_there() {
        let text = format!("{TEXT}29 22 0:40 / /home rw - tmpfs tmpfs rw\n");
        let mounts = Mounts::parse(text.as_bytes());
        let keys = Path::new("/home/me/.ssh/keys");
        assert!(!mounts.shows(Path::new("/mnt/me"), keys), "these keys are on the tmpfs");
    }

    #[test]
    fn lines_that_are_none_are_passed_over() {
        for text in
            [&b""[..], b"\n\n", b"1 2", b"1 2 8:1 / ", b"\xff \xff \xff \xff \xff", b"1 2 8:1 \\9 \\04"]
        {
            assert!(!Mounts::parse(text).shows(Path::new("/a"), Path::new("/a/b")));
        }
        assert!(Mounts::read().shows(Path::new("/proc"), Path::new("/proc/sys")));
    }
}
