//! The fs device: requests and descriptor chains of a hostile driver, on two shares that hold one of everything.
//!
//! An input is steps, each a shape (one byte), the room for the answer (two), a length (two) and so many bytes. The
//! shape says how the bytes come to the device: see [`Shape`].

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use kiln_virtio::device::{Device, Wake};
use kiln_virtio::fs::record::{AssembleError, Assembler};
use kiln_virtio::fs::{Attributes, Fs, Settings, Share};
use tempfile::TempDir;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::driver::{Seen, Target, campaign};
use crate::random::Random;
use crate::testkit::{INDIRECT, NEXT, Ring, WRITE, describe_at, memory};

/// What no guest may read: it lies beside the shares, and links in them lead there.
const SECRET: &[u8] = b"SECRET";
/// Most steps of one input that are done.
const MOST_STEPS: usize = 64;
const NAMES: [&[u8]; 14] = [
    b"a",
    b"empty",
    b"dir",
    b"deep",
    b"file",
    b"out",
    b"in",
    b"fifo",
    b"hidden",
    b"absent",
    b"..",
    b"s",
    b"r",
    b"\xff\xfe\n",
];
/// What Linux sends, and what a read-only server must refuse.
const OPCODES: [u32; 34] = [
    1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 21, 22, 23, 24, 26, 27, 28, 34, 35, 36, 38,
    41, 42, 43, 44, 46, 51,
];

/// How a step's bytes come to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// A request in one descriptor, its answer in another.
    Plain,
    /// The same, in pieces of that many bytes.
    Pieces(u8),
    /// The same, through an indirect table.
    Indirect,
    /// The bytes are the descriptor table itself, and head 0 is offered.
    Table,
    /// The first two bytes are the available index.
    Available,
}

impl Shape {
    fn of(byte: u8) -> Self {
        match byte {
            0..=0x9f => Self::Plain,
            0xa0..=0xbf => Self::Pieces(byte - 0x9f),
            0xc0..=0xdf => Self::Indirect,
            0xe0..=0xf7 => Self::Table,
            _ => Self::Available,
        }
    }
}

struct Fuse {
    memory: GuestMemoryMmap,
    // Holds the files for as long as the target lives.
    _folder: TempDir,
    shared: File,
}

fn make_share(share: &Path) {
    fs::create_dir_all(share.join("dir/deep")).expect("a folder");
    fs::write(share.join("a"), vec![b'k'; 70_000]).expect("a file");
    fs::write(share.join("empty"), b"").expect("a file");
    fs::write(share.join("hidden"), SECRET).expect("a file");
    fs::write(share.join("dir/file"), b"kkkk").expect("a file");
    for number in 0..40 {
        fs::write(share.join(format!("dir/deep/{number}-{}", "n".repeat(number))), b"").expect("a file");
    }
    symlink("../outside", share.join("out")).expect("a link");
    symlink("../outside", share.join("dir/out")).expect("a link");
    symlink("a", share.join("in")).expect("a link");
    fs::write(share.join(std::ffi::OsStr::from_bytes(b"\xff\xfe\n")), b"k").expect("a file");
    rustix::fs::mknodat(rustix::fs::CWD, share.join("fifo"), rustix::fs::FileType::Fifo, 0o644.into(), 0)
        .expect("a fifo");
    // A file system without attributes serves as well.
    let _ = rustix::fs::setxattr(share.join("a"), "user.k", &[b'k'; 300], rustix::fs::XattrFlags::empty());
}

struct Step<'a> {
    shape: Shape,
    room: u32,
    bytes: &'a [u8],
}

/// The next step, and what follows it.
fn next_step(input: &[u8]) -> Option<(Step<'_>, &[u8])> {
    let ([shape, room @ .., low, high], rest) = input.split_first_chunk::<5>()?;
    let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
    let (bytes, rest) = rest.split_at(length);
    Some((Step { shape: Shape::of(*shape), room: u16::from_le_bytes(*room).into(), bytes }, rest))
}

/// Puts buffers of `sizes` bytes one behind the other from `at` on, and describes them.
fn describe_pieces(
    guest: (&GuestMemoryMmap, u64),
    first: u16,
    (mut at, mut left): (u64, u32),
    piece: u32,
    flags: u16,
) -> u16 {
    let mut index = first;
    while left > 0 && index < 120 {
        let length = if index == 119 { left } else { left.min(piece) };
        let place = guest.1 + u64::from(index) * 16;
        describe_at(guest.0, place, (at, length), flags | NEXT, index + 1);
        at += u64::from(length);
        left -= length;
        index += 1;
    }
    index
}

impl Fuse {
    /// Makes the step's chain available, and says whether it is a whole request with a room.
    fn offer(&self, ring: &mut Ring, step: &Step<'_>) -> bool {
        let length = u32::try_from(step.bytes.len()).expect("two bytes");
        let memory = &self.memory;
        let piece = match step.shape {
            Shape::Plain => {
                ring.send(memory, step.bytes, step.room);
                return true;
            }
            Shape::Pieces(piece) => u32::from(piece) * 8 - 7,
            Shape::Indirect => u32::MAX,
            Shape::Table => {
                memory.write_slice(step.bytes, GuestAddress(ring.addresses()[0])).expect("memory");
                ring.offer(memory, 0);
                return false;
            }
            Shape::Available => {
                let index = step.bytes.first_chunk().map_or(0, |index| u16::from_le_bytes(*index));
                ring.set_available(memory, index);
                return false;
            }
        };
        memory.write_slice(step.bytes, GuestAddress(ring.data())).expect("memory");
        let table = match step.shape {
            Shape::Indirect => ring.answer() - 0x10000,
            _ => ring.addresses()[0],
        };
        let middle = describe_pieces((memory, table), 0, (ring.data(), length), piece, 0);
        let end = describe_pieces((memory, table), middle, (ring.answer(), step.room), piece.max(128), WRITE);
        if end == 0 {
            describe_at(memory, table, (ring.data(), 0), 0, 0);
        } else {
            let flags = table + u64::from(end - 1) * 16 + 12;
            let last: u16 = memory.read_obj(GuestAddress(flags)).expect("memory");
            memory.write_obj(last & !NEXT, GuestAddress(flags)).expect("memory");
        }
        if step.shape == Shape::Indirect {
            ring.describe(memory, 0, (table, u32::from(end.max(1)) * 16), INDIRECT, 0);
        }
        ring.offer(memory, 0);
        true
    }

    /// Checks the answer of `written` bytes to `request`.
    fn check(&self, ring: &Ring, request: &[u8], written: u32, seen: &mut Seen) {
        let opcode = request.get(4..8).map_or(0, |bytes| u32::from_le_bytes(bytes.try_into().expect("four")));
        // Those beyond what FUSE has are one and the same.
        let opcode = opcode.min(64);
        if written == 0 {
            return seen.note(u64::from(opcode) << 16 | 0xffff);
        }
        let mut answer = vec![0; written as usize];
        self.memory.read_slice(&mut answer, GuestAddress(ring.answer())).expect("memory");
        let (head, payload) = answer.split_first_chunk::<16>().expect("an answer has a header");
        let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four"));
        assert_eq!(number(0), written, "the header says how long the answer is");
        assert_eq!(head[8..16], request[8..16], "an answer is to its request");
        let error = number(4).cast_signed();
        assert!((-4095..=0).contains(&error), "error {error}");
        assert!(error == 0 || payload.is_empty(), "an error has no payload");
        assert!(!payload.windows(SECRET.len()).any(|bytes| bytes == SECRET), "what was not shared came out");
        if opcode == 15 {
            assert!(payload.iter().all(|byte| *byte == b'k'), "a READ gives what the file holds");
        }
        let size = u64::from(written.next_power_of_two().trailing_zeros());
        seen.note(u64::from(opcode) << 16 | size << 12 | u64::from(error.unsigned_abs()));
    }
}

impl Target for Fuse {
    const NAME: &'static str = "fuse";

    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("outside"), SECRET).expect("a file");
        make_share(&folder.path().join("share"));
        let shared = File::open(folder.path().join("share")).expect("the share");
        Self { memory: memory(), _folder: folder, shared }
    }

    fn generate(&mut self, random: &mut Random, input: &mut Vec<u8>) {
        let mut push = |shape: u8, room: u16, bytes: &[u8]| {
            input.push(shape);
            input.extend(room.to_le_bytes());
            input.extend(u16::try_from(bytes.len()).expect("short").to_le_bytes());
            input.extend_from_slice(bytes);
        };
        if !random.once_in(32) {
            push(0, 256, &request(random, 26, 0, &init()));
        }
        // The shares themselves, which are what has children.
        if !random.once_in(8) {
            for share in [b"s\0", b"r\0"] {
                push(0, 256, &request(random, 1, 1, share));
            }
        }
        for _ in 0..=random.below(10) {
            // Tables of the driver's own cost a fresh memory.
            let shape = if random.once_in(32) { random.byte() } else { random.byte() % 0xe0 };
            let room = random.pick(&[256, 256, 256, 4096, 4096, 8000, 16, 17, 0, 128]);
            let bytes = match Shape::of(shape) {
                Shape::Table => table(random),
                Shape::Available => random.edge32().to_le_bytes().to_vec(),
                _ => any_request(random),
            };
            push(shape, room, &bytes);
        }
    }

    fn parts(input: &[u8]) -> Vec<usize> {
        let (mut ends, mut rest) = (Vec::new(), input);
        while let Some((_, behind)) = next_step(rest) {
            rest = behind;
            ends.push(input.len() - rest.len());
        }
        ends
    }

    fn run(&mut self, input: &[u8], seen: &mut Seen) {
        let (mut device, shares) = Fs::new(Settings { open_files: 3, ..Settings::default() });
        let fixed = Attributes::Fixed { mtime_seconds: 1_700_000_000 };
        for (name, attributes) in [(b"s", fixed), (b"r", Attributes::Real)] {
            let directory = self.shared.try_clone().expect("a descriptor").into();
            let added = shares.with_tree(|tree| tree.add_share(name, Share { directory, attributes }));
            added.expect("a share");
            shares.with_tree(|tree| tree.hide(name, [b"hidden".as_slice().into()]));
        }
        let mut ring = Ring::new(1, 256);
        let [table, available, used] = ring.addresses();
        for (at, length) in [(table, 16), (available, 4), (used, 4)] {
            self.memory.write_slice(&[0; 16][..length], GuestAddress(at)).expect("memory");
        }
        let (mut rest, mut steps, mut dirty, mut broken) = (input, 0, false, false);
        while let Some((step, behind)) = next_step(rest) {
            (rest, steps) = (behind, steps + 1);
            if steps > MOST_STEPS {
                break;
            }
            let whole = self.offer(&mut ring, &step);
            dirty |= !whole;
            let mut queues: [Option<&mut Queue>; 2] = [None, Some(&mut ring.queue)];
            let mut calls = 0;
            loop {
                match Device::<()>::process(&mut device, Wake::Queue(1), &mut queues, &self.memory) {
                    Ok(outcome) if outcome.again => calls += 1,
                    Ok(_) => break,
                    Err(_) => {
                        seen.note(1);
                        broken = true;
                        break;
                    }
                }
                // Tables may let the device write to the ring of what is available.
                assert!(calls < 2 || !whole, "one request is not more than a call takes");
                if calls > MOST_STEPS {
                    break;
                }
            }
            if broken {
                break;
            }
            // Tables may let the device write anywhere, the rings included; then the driver believes nothing.
            while let Some((head, written)) = ring.used(&self.memory) {
                if dirty {
                    break;
                }
                assert_eq!(head, 0);
                assert!(written <= step.room, "{written} bytes in a room of {}", step.room);
                self.check(&ring, step.bytes, written, seen);
            }
        }
        if dirty || broken {
            self.memory = memory();
        }
        // The record is taken at the end of a run, whatever the guest did; not each time, because it is dear.
        if input.last().is_some_and(|byte| byte % 16 == 0) {
            let mut assembler = Assembler::default();
            let mut record = None;
            shares
                .with_tree(|tree| {
                    tree.settle();
                    tree.export(|part| {
                        record = assembler.push(part)?;
                        Ok::<(), AssembleError>(())
                    })
                })
                .expect("parts in order");
            assert_eq!(record.expect("an end").shares.len(), 2);
        }
    }

    fn memory_limit(_: usize) -> usize {
        // Lists and values of attributes are read into 64 KiB; a listing is put together in 128 KiB.
        1 << 20
    }
}

fn init() -> Vec<u8> {
    [7_u32, 41, 1 << 17, u32::MAX].iter().flat_map(|word| word.to_le_bytes()).chain([0; 48]).collect()
}

fn request(random: &mut Random, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + body.len()).expect("short");
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(random.u64().to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend_from_slice(body);
    bytes
}

/// A request about a node that may be there.
fn any_request(random: &mut Random) -> Vec<u8> {
    let node = match random.below(16) {
        0 => random.edge(),
        1 => 1,
        _ => 2 + random.below(16) as u64,
    };
    let name = |random: &mut Random| [random.pick(&NAMES), b"\0"].concat();
    let read_in = |random: &mut Random| {
        let mut body = [0; 40];
        body[8..16].copy_from_slice(&random.edge().to_le_bytes());
        body[16..20].copy_from_slice(&random.edge32().to_le_bytes());
        body.to_vec()
    };
    let xattr = |random: &mut Random| {
        let mut body = random.pick(&[0_u32, 4, 300, 4096, u32::MAX]).to_le_bytes().to_vec();
        body.extend([0; 4]);
        body
    };
    let (opcode, body) = match random.below(16) {
        0..=4 => (1, name(random)),
        5 => (3, vec![0; 16]),
        6 | 7 => (15, read_in(random)),
        8 | 9 => (28, read_in(random)),
        10 => (5, Vec::new()),
        11 => {
            (22, [xattr(random), random.pick(&[&b"user.k\0"[..], b"\0", b"security.x\0"]).to_vec()].concat())
        }
        12 => (23, xattr(random)),
        13 => (2, random.edge().to_le_bytes().to_vec()),
        14 => {
            let count = random.below(4);
            let mut body = random.edge().to_le_bytes().to_vec();
            for _ in 0..count {
                body.extend((random.below(20) as u64).to_le_bytes());
                body.extend(random.edge().to_le_bytes());
            }
            (42, body)
        }
        _ => {
            let length = random.below(64);
            (random.pick(&OPCODES), random.bytes(length))
        }
    };
    let mut bytes = request(random, opcode, node, &body);
    if random.once_in(32) {
        let length = random.edge32().to_le_bytes();
        bytes[..4].copy_from_slice(&length);
    }
    bytes
}

/// Descriptors, of which many lie in memory.
fn table(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..=random.below(6) {
        let address = match random.below(4) {
            0 => random.edge(),
            1 => 0x20000 + random.below(0x10000) as u64,
            _ => 0x40_0000 + random.below(0x10_0000) as u64,
        };
        bytes.extend(address.to_le_bytes());
        bytes.extend(random.edge32().to_le_bytes());
        let flags = random.pick(&[0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 0xffff]);
        bytes.extend(flags.to_le_bytes());
        bytes.extend((random.u16() % 8).to_le_bytes());
    }
    bytes
}

#[test]
fn no_driver_breaks_the_fs_device() {
    campaign::<Fuse>();
}
