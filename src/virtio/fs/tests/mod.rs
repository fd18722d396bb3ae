//! A guest that speaks FUSE, for the tests of the fs device.

mod cost;
mod hostile;
mod interference;
mod model;
mod record;
mod shown;
mod walks;

use std::fs::File;
use std::path::Path;

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, op};
use super::record::{Assembler, Record, ShareRecord};
use super::{Attributes, Fs, Settings, Share, Shares};
use crate::device::{Device, Wake};
use crate::ring::QueueError;
use crate::testkit::{Ring, memory};

pub const EPOCH: Attributes = Attributes::Fixed { mtime_seconds: 1_700_000_000 };
pub const TOP: u64 = 1;

pub struct Guest {
    pub memory: GuestMemoryMmap,
    pub ring: Ring,
    pub device: Fs,
    pub shares: Shares,
    /// Which of its processes asks.
    pub process: u32,
    unique: u64,
}

impl Guest {
    /// A guest whose driver has not said INIT yet.
    pub fn silent(open_files: usize) -> Self {
        Self::with(Settings { open_files, ..Settings::default() })
    }

    pub fn with(settings: Settings<'_>) -> Self {
        let (device, shares) = Fs::new(settings);
        Self { memory: memory(), ring: Ring::new(1, 256), device, shares, process: 0, unique: 0 }
    }

    /// A guest that may go on, with `directory` shared as `s`.
    pub fn of(directory: &Path, attributes: Attributes) -> Self {
        let mut guest = Self::silent(16);
        guest.share("s", directory, attributes);
        guest.init();
        guest
    }

    pub fn share(&self, name: &str, directory: &Path, attributes: Attributes) {
        let directory = File::open(directory).expect("directory").into();
        let added =
            self.shares.with_tree(|tree| tree.add_share(name.as_bytes(), Share { directory, attributes }));
        added.expect("share");
    }

    pub fn init(&mut self) {
        let body: [u32; 16] = [7, 41, 1 << 17, u32::MAX, u32::MAX, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let answer = self.ask(op::INIT, 0, body.as_bytes()).expect("init");
        assert_eq!(answer.len(), 64);
        assert_eq!(answer[..8], [7, 0, 0, 0, 41, 0, 0, 0]);
    }

    /// Lets the device work on the request queue.
    pub fn kick(&mut self) -> Result<(), QueueError> {
        let mut queues: [Option<&mut Queue>; 2] = [None, Some(&mut self.ring.queue)];
        loop {
            let outcome = Device::<()>::process(&mut self.device, Wake::Queue(1), &mut queues, &self.memory)?;
            if !outcome.again {
                return Ok(());
            }
        }
    }

    /// Sends bytes as they are and gives back what was written.
    pub fn raw(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        self.ring.send(&self.memory, request, room);
        self.kick().expect("ring");
        let (head, length) = self.ring.used(&self.memory).expect("every request is used");
        assert_eq!(head, 0);
        assert!(length <= room, "{length} bytes in a room of {room}");
        let mut answer = vec![0; length as usize];
        self.memory.read_slice(&mut answer, GuestAddress(self.ring.answer())).expect("memory");
        answer
    }

    /// Sends one request with a right header; `None` where it gets no answer.
    pub fn send(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Option<Result<Vec<u8>, i32>> {
        self.unique += 1;
        let length = u32::try_from(40 + body.len()).expect("short");
        let mut bytes = request(length, opcode, self.unique, node, body);
        bytes[32..36].copy_from_slice(&self.process.to_le_bytes());
        let answer = self.raw(&bytes, room);
        if answer.is_empty() {
            return None;
        }
        let (header, payload) = abi::OutHeader::read_from_prefix(&answer).expect("header");
        assert_eq!(header.unique.get(), self.unique);
        assert_eq!(header.length.get() as usize, answer.len());
        match header.error.get() {
            0 => Some(Ok(payload.to_vec())),
            error => {
                assert!(payload.is_empty() && (-4095..0).contains(&error));
                Some(Err(-error))
            }
        }
    }

    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.send(opcode, node, body, 0x1000).expect("answer")
    }

    pub fn lookup(&mut self, directory: u64, name: &[u8]) -> Result<abi::EntryOut, i32> {
        let answer = self.ask(op::LOOKUP, directory, &[name, b"\0"].concat())?;
        Ok(abi::EntryOut::read_from_bytes(&answer).expect("entry"))
    }

    /// The node at a path from the top.
    pub fn walk(&mut self, path: &str) -> u64 {
        path.split('/').fold(TOP, |directory, name| {
            let entry = self.lookup(directory, name.as_bytes()).expect(name);
            assert_ne!(entry.nodeid.get(), 0, "{name} is absent");
            entry.nodeid.get()
        })
    }

    pub fn read(&mut self, node: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.ask(op::READ, node, &read_in(offset, size))
    }

    /// All entries of a directory: name, inode number, kind.
    pub fn list(&mut self, node: u64) -> Vec<(Vec<u8>, u64, u32)> {
        let (mut entries, mut offset) = (Vec::new(), 0);
        loop {
            let answer = self.ask(op::READDIR, node, &read_in(offset, 0x1000)).expect("listing");
            if answer.is_empty() {
                return entries;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let (head, tail) = abi::Dirent::read_from_prefix(rest).expect("entry");
                let length = head.name_length.get() as usize;
                entries.push((tail[..length].to_vec(), head.ino.get(), head.kind.get()));
                offset = head.offset.get();
                rest = &tail[length.next_multiple_of(8)..];
            }
        }
    }

    pub fn names(&mut self, node: u64) -> Vec<String> {
        let entries = self.list(node);
        entries.into_iter().map(|(name, ..)| String::from_utf8_lossy(&name).into_owned()).collect()
    }

    pub fn attr(&mut self, node: u64) -> Result<abi::Attr, i32> {
        let answer = self.ask(op::GETATTR, node, &[0; 16])?;
        Ok(abi::AttrOut::read_from_bytes(&answer).expect("attributes").attr)
    }

    pub fn record(&self) -> Record {
        let mut assembler = Assembler::default();
        let mut record = None;
        self.shares
            .with_tree(|tree| {
                tree.settle();
                tree.export(|part| {
                    record = assembler.push(part)?;
                    Ok::<(), super::record::AssembleError>(())
                })
            })
            .expect("parts in order");
        record.expect("an end")
    }

    /// The record of the only share.
    pub fn share_record(&self) -> ShareRecord {
        self.record().shares.remove(0)
    }
}

pub fn request(length: u32, opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let header = abi::InHeader {
        length: length.into(),
        opcode: opcode.into(),
        unique: unique.into(),
        nodeid: node.into(),
        uid: 0.into(),
        gid: 0.into(),
        pid: 0.into(),
        extension_length: 0.into(),
        padding: 0.into(),
    };
    [header.as_bytes(), body].concat()
}

pub fn read_in(offset: u64, size: u32) -> Vec<u8> {
    let ask = abi::ReadIn {
        fh: 0.into(),
        offset: offset.into(),
        size: size.into(),
        read_flags: 0.into(),
        lock_owner: 0.into(),
        flags: 0.into(),
        padding: 0.into(),
    };
    ask.as_bytes().to_vec()
}
