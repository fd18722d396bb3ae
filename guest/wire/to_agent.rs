//! Bytes of the messages from host to agent: a tag, then the fields in the order of their declaration.

use crate::codec::{DecodeError, Reader, Writer};
use crate::message::{
    Access, Clock, Exec, MAX_ARGUMENT_BYTES, MAX_ARGUMENTS, MAX_DATA_BYTES, MAX_FETCH, MAX_MOUNTS,
    MAX_PATH_BYTES, Mount, Scratch, Setup, Source, TerminalSize, ToAgent,
};

const HELLO: u8 = 0x01;
const SETUP: u8 = 0x02;
const EXEC: u8 = 0x03;
const STDIN: u8 = 0x04;
const SIGNAL: u8 = 0x05;
const LIST: u8 = 0x06;
const FETCH: u8 = 0x07;
const POWER_OFF: u8 = 0x08;
const MOUNT: u8 = 0x09;
const CREDIT: u8 = 0x0a;
const RESIZE: u8 = 0x0b;
const REHEARSE: u8 = 0x0c;
const SETTLE: u8 = 0x0d;

/// The kernel's _NSIG: the largest signal number.
const MAX_SIGNAL: u8 = 64;

impl ToAgent {
    /// The payload of this message's frame. Limits are the caller's to keep: a message over one of them is refused by
    /// `decode` on the other side.
    pub fn encode(&self) -> Vec<u8> {
        let mut w;
        match self {
            Self::Hello { version } => {
                w = Writer::new(HELLO);
                w.u16(*version);
            }
            Self::Setup(setup) => {
                w = Writer::new(SETUP);
                write_setup(&mut w, setup);
            }
            Self::Rehearse(setup) => {
                w = Writer::new(REHEARSE);
                write_setup(&mut w, setup);
            }
            Self::Settle { seed, scratch } => {
                w = Writer::new(SETTLE);
                w.raw(seed);
                write_scratch(&mut w, scratch);
            }
            Self::Mount(mount) => {
                w = Writer::new(MOUNT);
                write_mount(&mut w, mount);
            }
            Self::Exec(exec) => {
                w = Writer::new(EXEC);
                write_exec(&mut w, exec);
            }
            Self::Stdin { id, data } => {
                w = Writer::with_room(STDIN, data.len());
                w.u32(*id);
                w.bytes(data);
            }
            Self::Credit { id, bytes } => {
                w = Writer::new(CREDIT);
                w.u32(*id);
                w.u32(*bytes);
            }
            Self::Resize { id, size } => {
                w = Writer::new(RESIZE);
                w.u32(*id);
                write_size(&mut w, *size);
            }
            Self::Signal { id, signal } => {
                w = Writer::new(SIGNAL);
                w.u32(*id);
                w.u8(*signal);
            }
            Self::List { target } => {
                w = Writer::new(LIST);
                w.bytes(target);
            }
            Self::Fetch { ordinals } => {
                w = Writer::with_room(FETCH, ordinals.len().saturating_mul(4));
                w.count(ordinals.len());
                for &ordinal in ordinals {
                    w.u32(ordinal);
                }
            }
            Self::PowerOff => w = Writer::new(POWER_OFF),
        }
        w.finish()
    }

    /// The message in a frame's payload.
    ///
    /// # Errors
    /// The payload is no message: cut, too long, over a limit, or with a value that means nothing.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(payload);
        let message = match r.u8("message to the agent")? {
            HELLO => Self::Hello { version: r.u16("version")? },
            SETUP => Self::Setup(read_setup(&mut r)?),
            REHEARSE => Self::Rehearse(read_setup(&mut r)?),
            SETTLE => Self::Settle { seed: r.array("seed")?, scratch: read_scratch(&mut r)? },
            MOUNT => Self::Mount(read_mount(&mut r)?),
            EXEC => Self::Exec(read_exec(&mut r)?),
            STDIN => {
                Self::Stdin { id: r.u32("command id")?, data: r.bytes(MAX_DATA_BYTES, "standard input")? }
            }
            CREDIT => Self::Credit { id: r.u32("command id")?, bytes: r.positive("credit")? },
            RESIZE => Self::Resize { id: r.u32("command id")?, size: read_size(&mut r)? },
            SIGNAL => Self::Signal { id: r.u32("command id")?, signal: read_signal(&mut r)? },
            LIST => Self::List { target: r.absolute_path("target of a listing")? },
            FETCH => Self::Fetch { ordinals: r.list(MAX_FETCH, "ordinals", |r| r.u32("ordinal"))? },
            POWER_OFF => Self::PowerOff,
            tag => return Err(DecodeError::Tag { what: "message to the agent", tag }),
        };
        r.finish()?;
        Ok(message)
    }
}

fn read_signal(r: &mut Reader<'_>) -> Result<u8, DecodeError> {
    match r.u8("signal")? {
        signal @ 1..=MAX_SIGNAL => Ok(signal),
        _ => Err(DecodeError::Invalid { what: "signal" }),
    }
}

fn write_setup(w: &mut Writer, setup: &Setup) {
    w.raw(&setup.seed);
    w.bool(setup.warm_up);
    w.i64(setup.clock.seconds);
    w.u32(setup.clock.nanoseconds);
    write_source(w, &setup.root);
    w.bool(setup.scratch.is_some());
    if let Some(scratch) = &setup.scratch {
        write_scratch(w, scratch);
    }
    w.u64(setup.layer_bytes);
    w.u32(setup.processes);
    w.count(setup.mounts.len());
    for mount in &setup.mounts {
        write_mount(w, mount);
    }
    w.text(&setup.hostname);
    w.count(setup.load_modules.len());
    for module in &setup.load_modules {
        w.text(module);
    }
}

fn read_setup(r: &mut Reader<'_>) -> Result<Setup, DecodeError> {
    Ok(Setup {
        seed: r.array("seed")?,
        warm_up: r.bool("warm-up")?,
        clock: Clock { seconds: r.i64("clock")?, nanoseconds: r.nanoseconds("clock")? },
        root: read_source(r)?,
        scratch: if r.bool("scratch disk")? { Some(read_scratch(r)?) } else { None },
        layer_bytes: r.u64("layer size")?,
        processes: r.u32("limit of processes")?,
        mounts: r.list(MAX_MOUNTS, "mounts", read_mount)?,
        hostname: r.name("host name")?,
        load_modules: r.list(MAX_MOUNTS, "modules", |r| r.name("module"))?,
    })
}

fn write_scratch(w: &mut Writer, scratch: &Scratch) {
    w.text(&scratch.serial);
    w.u64(scratch.bytes);
}

fn read_scratch(r: &mut Reader<'_>) -> Result<Scratch, DecodeError> {
    Ok(Scratch { serial: r.name("scratch disk's serial")?, bytes: r.u64("bytes of a scratch disk")? })
}

fn write_mount(w: &mut Writer, mount: &Mount) {
    write_source(w, &mount.source);
    w.bytes(&mount.target);
    w.u8(match mount.access {
        Access::ReadOnly => 0,
        Access::Layered => 1,
        Access::Direct => 2,
    });
}

fn read_mount(r: &mut Reader<'_>) -> Result<Mount, DecodeError> {
    Ok(Mount {
        source: read_source(r)?,
        target: r.absolute_path("mount target")?,
        access: match r.u8("access")? {
            0 => Access::ReadOnly,
            1 => Access::Layered,
            2 => Access::Direct,
            tag => return Err(DecodeError::Tag { what: "access", tag }),
        },
    })
}

fn write_source(w: &mut Writer, source: &Source) {
    match source {
        Source::Share(name) => {
            w.u8(0);
            w.text(name);
        }
        Source::Disk { serial, filesystem, read_only } => {
            w.u8(1);
            w.text(serial);
            w.text(filesystem);
            w.bool(*read_only);
        }
        Source::Modules(name) => {
            w.u8(2);
            w.text(name);
        }
        Source::Within(path) => {
            w.u8(3);
            w.bytes(path);
        }
    }
}

fn read_source(r: &mut Reader<'_>) -> Result<Source, DecodeError> {
    Ok(match r.u8("source")? {
        0 => Source::Share(r.name("share")?),
        1 => Source::Disk {
            serial: r.name("disk's serial")?,
            filesystem: r.name("file system")?,
            read_only: r.bool("read-only disk")?,
        },
        2 => Source::Modules(r.name("disk of modules")?),
        3 => Source::Within(r.absolute_path("folder of the step's tree")?),
        tag => return Err(DecodeError::Tag { what: "source", tag }),
    })
}

fn write_exec(w: &mut Writer, exec: &Exec) {
    w.u32(exec.id);
    for strings in [&exec.argv, &exec.env] {
        w.count(strings.len());
        for string in strings {
            w.bytes(string);
        }
    }
    w.bytes(&exec.cwd);
    w.u64(exec.timeout_ms);
    w.u64(exec.grace_ms);
    w.bool(exec.stdin);
    w.bool(exec.terminal.is_some());
    if let Some(size) = exec.terminal {
        write_size(w, size);
    }
}

fn read_exec(r: &mut Reader<'_>) -> Result<Exec, DecodeError> {
    let id = r.u32("command id")?;
    let mut room = MAX_ARGUMENT_BYTES;
    let mut string = |r: &mut Reader<'_>| {
        let string = r.c_bytes(room, "argument bytes")?;
        // Cannot underflow: the read above is limited by it.
        room -= string.len();
        Ok(string)
    };
    let argv = r.list(MAX_ARGUMENTS, "arguments", &mut string)?;
    if argv.is_empty() {
        return Err(DecodeError::Invalid { what: "command without a program" });
    }
    let env = r.list(MAX_ARGUMENTS, "environment", &mut string)?;
    Ok(Exec {
        id,
        argv,
        env,
        cwd: r.c_bytes(MAX_PATH_BYTES, "working directory")?,
        timeout_ms: r.u64("time-out")?,
        grace_ms: r.u64("grace")?,
        stdin: r.bool("standard input")?,
        terminal: if r.bool("terminal")? { Some(read_size(r)?) } else { None },
    })
}

fn write_size(w: &mut Writer, size: TerminalSize) {
    w.u16(size.rows);
    w.u16(size.columns);
}

fn read_size(r: &mut Reader<'_>) -> Result<TerminalSize, DecodeError> {
    Ok(TerminalSize { rows: r.u16("terminal's rows")?, columns: r.u16("terminal's columns")? })
}
