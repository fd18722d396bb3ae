//! Reads what `strace -ff -y` writes, a file for each process, and notes what each call asks of the shares.
//!
//! A process starts where its parent was when it forked. Descriptors come with the path that they are open at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::asked::{Asked, Question, World};

/// One call that succeeded or failed.
struct Call {
    name: String,
    arguments: Vec<Vec<u8>>,
    /// Negative where it failed.
    result: i64,
}

/// Reads one line: `name(argument, …) = result …`; none for what is no call, or has no result.
fn parse(line: &[u8]) -> Option<Call> {
    let open = line.iter().position(|byte| *byte == b'(')?;
    let name = String::from_utf8(line[..open].to_vec()).ok()?;
    let (mut arguments, mut argument) = (Vec::new(), Vec::new());
    let (mut depth, mut quoted, mut escaped, mut path) = (0_u32, false, false, false);
    let mut rest = line[open + 1..].iter();
    loop {
        let byte = *rest.next()?;
        let plain = !quoted && !path;
        match byte {
            _ if escaped => escaped = false,
            b'\\' if !plain => escaped = true,
            b'"' if !path => quoted = !quoted,
            b'<' if plain && argument.last().is_some_and(u8::is_ascii_alphanumeric) => path = true,
            b'>' if path => path = false,
            b'(' | b'[' | b'{' if plain => depth += 1,
            b')' if plain && depth == 0 => break,
            b')' | b']' | b'}' if plain => depth -= 1,
            b',' if plain && depth == 0 => {
                arguments.push(argument.trim_ascii().to_vec());
                argument.clear();
                continue;
            }
            _ => {}
        }
        argument.push(byte);
    }
    arguments.push(argument.trim_ascii().to_vec());
    let result = String::from_utf8_lossy(rest.as_slice()).into_owned();
    let result = result.trim().strip_prefix("= ")?;
    let digits: String =
        result.chars().take_while(|digit| digit.is_ascii_hexdigit() || matches!(digit, '-' | 'x')).collect();
    let result = match digits.strip_prefix("0x") {
        Some(_) => 1,
        None => digits.parse().ok()?,
    };
    Some(Call { name, arguments, result })
}

/// The bytes that strace wrote with C's escapes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), text);
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'\\' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.iter().take(3).take_while(|digit| (b'0'..b'8').contains(digit)).count();
        if digits > 0 {
            let octal = std::str::from_utf8(&rest[..digits]).expect("digits");
            bytes.push(u8::from_str_radix(octal, 8).expect("a byte"));
            rest = &rest[digits..];
        } else if let Some((escaped, tail)) = rest.split_first() {
            bytes.push(match escaped {
                b'n' => b'\n',
                b't' => b'\t',
                b'r' => b'\r',
                b'v' => 11,
                b'f' => 12,
                other => *other,
            });
            rest = tail;
        }
    }
    bytes
}

/// A path argument.
fn text(argument: &[u8]) -> Option<Vec<u8>> {
    argument.strip_prefix(b"\"")?.strip_suffix(b"\"").map(unescape)
}

/// The path of a descriptor argument: `3</path>`, `AT_FDCWD</path>`.
fn descriptor(argument: &[u8]) -> Option<Vec<u8>> {
    let start = argument.iter().position(|byte| *byte == b'<')?;
    let path = unescape(argument[start + 1..].strip_suffix(b">")?);
    (path.starts_with(b"/") && !path.ends_with(b" (deleted)")).then_some(path)
}

/// Where a call has a path: which argument, the descriptor before it if any, and whether a link at its end is followed.
const PATHS: &[(&str, &[(usize, bool)])] = &[
    ("access", &[(0, true)]),
    ("chdir", &[(0, true)]),
    ("chmod", &[(0, true)]),
    ("creat", &[(0, true)]),
    ("execve", &[(0, true)]),
    ("getxattr", &[(0, true)]),
    ("lgetxattr", &[(0, false)]),
    ("link", &[(0, false), (1, false)]),
    ("listxattr", &[(0, true)]),
    ("llistxattr", &[(0, false)]),
    ("lstat", &[(0, false)]),
    ("mkdir", &[(0, false)]),
    ("open", &[(0, true)]),
    ("readlink", &[(0, false)]),
    ("rename", &[(0, false), (1, false)]),
    ("rmdir", &[(0, false)]),
    ("stat", &[(0, true)]),
    ("statfs", &[(0, true)]),
    ("symlink", &[(1, false)]),
    ("unlink", &[(0, false)]),
];
/// The same, of calls in which a descriptor comes before each path.
const PATHS_AT: &[(&str, &[(usize, bool)])] = &[
    ("faccessat", &[(1, true)]),
    ("faccessat2", &[(1, true)]),
    ("fchmodat", &[(1, true)]),
    ("linkat", &[(1, false), (3, false)]),
    ("mkdirat", &[(1, false)]),
    ("newfstatat", &[(1, true)]),
    ("openat", &[(1, true)]),
    ("readlinkat", &[(1, false)]),
    ("renameat", &[(1, false), (3, false)]),
    ("renameat2", &[(1, false), (3, false)]),
    ("statx", &[(1, true)]),
    ("symlinkat", &[(2, false)]),
    ("unlinkat", &[(1, false)]),
    ("utimensat", &[(1, true)]),
];
/// Calls that tell bytes of what is open at a descriptor, and which argument that is.
const READS: &[(&str, usize)] = &[
    ("copy_file_range", 0),
    ("mmap", 4),
    ("pread64", 0),
    ("preadv", 0),
    ("read", 0),
    ("readv", 0),
    ("sendfile", 1),
];
/// Calls that concern no share.
const OTHERS: &[&str] = &["clone", "clone3", "exit_group", "fork", "getcwd", "vfork"];

fn of<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table.iter().find(|(other, _)| *other == name).map(|(_, value)| *value)
}

/// Notes what the processes of `folder` asked; the first of them started in `start`.
pub fn replay(folder: &Path, start: &[u8], world: &World, asked: &mut Asked) {
    let mut calls = BTreeMap::new();
    for file in std::fs::read_dir(folder).expect("traces").flatten() {
        let name = file.file_name().into_string().expect("a name of ours");
        let process: i64 =
            name.strip_prefix("t.").and_then(|process| process.parse().ok()).expect("t.PROCESS");
        let text = std::fs::read(file.path()).expect("a trace");
        calls.insert(process, text.split(|byte| *byte == b'\n').filter_map(parse).collect::<Vec<_>>());
    }
    let children: BTreeSet<i64> = calls.values().flatten().filter_map(forked).collect();
    let first = calls.keys().find(|process| !children.contains(process)).copied().expect("a first process");
    let mut replay = Replay { world, asked, written: BTreeSet::new() };
    let mut waiting = vec![(first, start.to_vec())];
    while let Some((process, mut at)) = waiting.pop() {
        for call in calls.remove(&process).into_iter().flatten() {
            replay.call(&call, &mut at);
            waiting.extend(forked(&call).map(|child| (child, at.clone())));
        }
    }
    assert!(calls.is_empty(), "processes that nobody started: {:?}", calls.keys());
}

fn forked(call: &Call) -> Option<i64> {
    (matches!(&*call.name, "clone" | "clone3" | "fork" | "vfork") && call.result > 0).then_some(call.result)
}

struct Replay<'a> {
    world: &'a World,
    asked: &'a mut Asked,
    /// What was written: bytes of it are no longer the host's.
    written: BTreeSet<Vec<u8>>,
}

impl Replay<'_> {
    fn call(&mut self, call: &Call, at: &mut Vec<u8>) {
        let name = &*call.name;
        let argument = |index: usize| call.arguments.get(index).map(Vec::as_slice).unwrap_or_default();
        let has = |flag: &str| {
            call.arguments
                .iter()
                .any(|argument| argument.split(|byte| *byte == b'|').any(|other| other == flag.as_bytes()))
        };
        if let Some(index) = of(READS, name) {
            if call.result > 0
                && let Some(path) = descriptor(argument(index))
            {
                self.content(&path);
            }
            return;
        }
        match name {
            "fchdir" if call.result == 0 => *at = descriptor(argument(0)).expect("a folder"),
            "getdents64" => self.note(&descriptor(argument(0)), Question::Listing),
            "fgetxattr" | "flistxattr" => self.note(&descriptor(argument(0)), Question::Xattrs),
            _ if OTHERS.contains(&name) || name == "fchdir" => {}
            _ => {
                let (paths, from) = match (of(PATHS, name), of(PATHS_AT, name)) {
                    (Some(paths), _) => (paths, false),
                    (_, Some(paths)) => (paths, true),
                    (None, None) => panic!("what does {name} ask?"),
                };
                for &(index, follow) in paths {
                    let Some(path) = text(argument(index)) else { continue };
                    let from = if from { descriptor(argument(index - 1)) } else { Some(at.clone()) };
                    // An empty path is the descriptor's own, which was asked about when it was opened.
                    let (Some(from), false) = (from, path.is_empty()) else { continue };
                    let creates = has("O_EXCL");
                    let follow = follow && !creates && !has("AT_SYMLINK_NOFOLLOW") && !has("O_NOFOLLOW");
                    let found = self.world.resolve(&from, &path, follow, self.asked);
                    self.found(name, found, call.result, &has, at);
                }
            }
        }
    }

    /// What else a call asks of the place its path leads to.
    fn found(
        &mut self,
        name: &str,
        found: Option<Vec<u8>>,
        result: i64,
        has: &dyn Fn(&str) -> bool,
        at: &mut Vec<u8>,
    ) {
        match name {
            "chdir" if result == 0 => *at = found.expect("a folder that was entered"),
            "execve" if result == 0 => found.iter().for_each(|path| self.content(path)),
            "readlink" | "readlinkat" if result >= 0 => self.note(&found, Question::Target),
            "getxattr" | "lgetxattr" | "listxattr" | "llistxattr" => self.note(&found, Question::Xattrs),
            "open" | "openat" if result >= 0 && (has("O_WRONLY") || has("O_RDWR") || has("O_TRUNC")) => {
                self.written.extend(found);
            }
            "rename" | "renameat" | "renameat2" if result == 0 => self.written.extend(found),
            _ => {}
        }
    }

    fn content(&mut self, path: &[u8]) {
        let place = self.world.place(path);
        let on_host = place.as_ref().map(|place| self.world.on_host(place));
        if on_host.is_some_and(|file| file.is_file()) && !self.written.contains(path) {
            self.note(&Some(path.to_vec()), Question::Content);
        }
    }

    /// Notes a question about a path that is in a share, and on the host.
    fn note(&mut self, path: &Option<Vec<u8>>, question: Question) {
        if let Some(place) = path.as_deref().and_then(|path| self.world.place(path))
            && self.world.on_host(&place).symlink_metadata().is_ok()
        {
            self.asked.note(place, question);
        }
    }
}

#[test]
fn calls_are_read_as_strace_writes_them() {
    let call = parse(br#"openat(AT_FDCWD</ws/a, b>, "x\"\303\274, y", O_RDONLY|O_CLOEXEC) = 3</ws/z>"#)
        .expect("a call");
    assert_eq!((&*call.name, call.result, call.arguments.len()), ("openat", 3, 3));
    assert_eq!(descriptor(&call.arguments[0]).expect("a path"), b"/ws/a, b");
    assert_eq!(text(&call.arguments[1]).expect("a path"), "x\"\u{fc}, y".as_bytes());
    let call = parse(b"newfstatat(3</a>, \"\", {st_mode=S_IFREG|0644, st_size=7, ...}, AT_EMPTY_PATH) = 0")
        .expect("a call");
    assert_eq!((call.arguments.len(), call.result), (4, 0));
    let call = parse(b"access(\"/a\", R_OK)      = -1 ENOENT (No such file or directory)").expect("a call");
    assert_eq!(call.result, -1);
    let call = parse(b"execve(\"/bin/sh\", [...], 0x7ffe /* 14 vars */) = 0").expect("a call");
    assert_eq!((call.arguments.len(), call.result), (3, 0));
    let call = parse(b"mmap(NULL, 8, PROT_READ, MAP_PRIVATE, 3</a>, 0) = 0x7fd871cc0000").expect("a call");
    assert_eq!((descriptor(&call.arguments[4]), call.result), (Some(b"/a".to_vec()), 1));
    assert!(parse(b"exit_group(1)                           = ?").is_none());
    assert!(parse(b"+++ exited with 0 +++").is_none());
}
