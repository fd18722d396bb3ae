//! The block device (virtio 1.3 §5.2): a file's raw bytes, read and written where they are.
//!
//! What is available is taken first and answered then, in its order, so that the host can begin with all that is to be read at once.
//! What can be wrong with a request is answered. What the host cannot read or write is not: whoever made the disk is told, to
//! end the machine. A disk can say that it is larger than its file, or have none, and be a template's place for one that
//! comes later: what lies behind the file's end is answered as not readable.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use kiln_virtio::device::{COMMON_FEATURES, Device, Outcome, StateError, Wake};
use kiln_virtio::ring::{Chain, Limits, QueueError, Readable, Taken, Writable};
use rustix::fs::{Advice, fadvise};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

/// VIRTIO_ID_BLOCK.
pub const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [256];
/// VIRTIO_BLK_F_SIZE_MAX, _SEG_MAX and _RO; _FLUSH, _DISCARD and _WRITE_ZEROES, which only a disk that is written to has.
const SIZES: u64 = 1 << 1;
const SEGMENTS: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const WRITES: u64 = 1 << 9 | 1 << 13 | 1 << 14;
/// Most buffers of one request, and most bytes of each: together what is taken. A larger request would go back without a
/// word, and a driver may take that for success.
const MOST_SEGMENTS: u32 = 126;
const MOST_SEGMENT_BYTES: u32 = 64 << 10;
const SECTOR_BYTES: u64 = 512;
/// Most bytes of one request.
const MOST_BYTES: usize = 8 << 20;
const LIMITS: Limits =
    Limits { readable_bytes: MOST_BYTES + 16, writable_bytes: MOST_BYTES + 1, slices: 512 };
/// How many zeroes are written at a time.
const PIECE_BYTES: usize = 128 << 10;
/// After how many requests, or bytes of them, a driver that wants to stop the device has its turn.
const ROUND_REQUESTS: usize = 32;
const ROUND_BYTES: usize = 4 << 20;
/// After so long the same, where the host's disk is slow: what was taken and not begun is taken again.
const ROUND_TIME: Duration = Duration::from_millis(50);
/// After a round of so many bytes at most, it is worth to look out for the next one.
const BRIEF_BYTES: usize = 64 << 10;

/// Types of requests, and their ends.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// Bytes of a disk's name.
const ID_BYTES: usize = 20;

/// How much one request may discard or zero: segments, and sectors of each. Where the file system cannot zero, zeroes are
/// written, which must not take long.
const DISCARDS: (u32, u32) = (16, 1 << 21);
const ZEROES: (u32, u32) = (1, 1 << 15);
/// What holes of most file systems are aligned to, sectors.
const HOLE_SECTORS: u32 = 8;
/// Bytes of a segment (virtio 1.3 §5.2.6): its first sector, how many, and flags, of which there is one: that the room may be
/// given back.
const SEGMENT_BYTES: usize = 16;
const UNMAP: u32 = 1;

/// A swap header is the first page.
const SWAP_HEADER_SECTORS: u64 = 8;

/// Hears of what the host could not read or write.
type OnFailure = Box<dyn Fn(&io::Error) + Send>;

/// A file as a disk.
pub struct Disk {
    file: Option<File>,
    failed: OnFailure,
    /// The host failed, and nothing is answered any more.
    is_dead: bool,
    /// What is written dies with the machine.
    is_scratch: bool,
    round_time: Duration,
    id: [u8; ID_BYTES],
    read_only: bool,
    /// Bytes that can be reached: whole sectors of the file within the capacity.
    bytes: u64,
    config: Vec<u8>,
}

/// A request that was taken from the queue.
struct Request<'m> {
    /// Of its chain.
    head: u16,
    /// What is asked for, where there is room to say how it ended; else there is nobody to tell.
    asked: Option<Asked<'m>>,
}

/// What a request asks for.
struct Asked<'m> {
    /// Its type and its first sector, where it has as much.
    header: Option<(u32, u64)>,
    /// What is behind the header.
    readable: Readable<'m, ()>,
    room: Writable<'m, ()>,
    /// The last byte of the room, for how it ended.
    status: Writable<'m, ()>,
}

impl<'m> Request<'m> {
    fn new(taken: Taken<'m, ()>) -> Self {
        let asked = taken.chain.ok().and_then(|Chain { mut readable, writable: mut room }| {
            let behind = room.remaining_bytes().checked_sub(1)?;
            let status = room.split_off(behind)?;
            // Type, a field that is reserved, and sector.
            let header = readable.read_array::<16>().map(|header| (word(&header, 0), long(&header, 8)));
            Some(Asked { header, readable, room, status })
        });
        Self { head: taken.head, asked }
    }

    /// Bytes of data, either way.
    fn bytes(&self) -> usize {
        self.asked.as_ref().map_or(0, |asked| asked.readable.remaining_bytes() + asked.room.remaining_bytes())
    }
}

/// A part of a disk that is to be discarded or zeroed.
struct Segment {
    at: u64,
    bytes: u64,
    unmap: bool,
}

impl Disk {
    /// A disk called `serial` of all whole sectors of `file`; `failed` is called when the host cannot read or write it.
    ///
    /// # Errors
    /// The file's size cannot be told.
    pub fn new(
        file: File,
        serial: &str,
        read_only: bool,
        failed: impl Fn(&io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Self::slot(Some(file), serial, read_only, bytes, failed)
    }

    /// A disk called `serial` that says it has `capacity_bytes`, whatever `file` has; without one it reads as
    /// zeros, and only a swap header can be written, which is lost. A driver that knows the one can go on with the other. `failed` is called when the host
    /// cannot read or write the file.
    ///
    /// # Errors
    /// The file's size cannot be told.
    pub fn slot(
        file: Option<File>,
        serial: &str,
        read_only: bool,
        capacity_bytes: u64,
        failed: impl Fn(&io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let capacity_sectors = capacity_bytes / SECTOR_BYTES;
        let sectors = match &file {
            Some(file) => capacity_sectors.min(file.metadata()?.len() / SECTOR_BYTES),
            None => 0,
        };
        let mut id = [0; ID_BYTES];
        for (place, byte) in id.iter_mut().zip(serial.bytes()) {
            *place = byte;
        }
        Ok(Self {
            file,
            failed: Box::new(failed),
            is_dead: false,
            is_scratch: false,
            round_time: ROUND_TIME,
            id,
            read_only,
            bytes: sectors * SECTOR_BYTES,
            config: configuration(capacity_sectors),
        })
    }

    /// The same disk, where what is written is of no use once the machine is gone: a flush is answered, and nothing is
    /// waited for.
    #[must_use]
    pub fn scratch(mut self) -> Self {
        self.is_scratch = true;
        self
    }

    /// Has the host begin with all that `requests` are to read, of which each would otherwise wait for the one before it. A page that is
    /// in the host's memory costs next to nothing, and what the host makes of the advice is its own affair.
    fn read_ahead(&self, requests: &[Request<'_>]) {
        let Some(file) = &self.file else { return };
        let reads = requests.iter().filter_map(|request| {
            let asked = request.asked.as_ref()?;
            let (_, sector) = asked.header.filter(|(kind, _)| *kind == IN)?;
            let bytes = asked.room.remaining_bytes() as u64;
            Some((self.within(sector, bytes)?, NonZeroU64::new(bytes)?))
        });
        let reads: Vec<_> = reads.collect();
        if reads.len() > 1 {
            for (at, bytes) in reads {
                let _ = fadvise(file, at, Some(bytes), Advice::WillNeed);
            }
        }
    }

    /// Does one request, and gives how it ended.
    ///
    /// # Errors
    /// What the host says of its file.
    fn answer(&self, asked: &mut Asked<'_>) -> io::Result<u8> {
        let Asked { header: Some((kind, sector)), readable, room, .. } = asked else { return Ok(FAILED) };
        let (kind, sector) = (*kind, *sector);
        let done = match (kind, &self.file) {
            (GET_ID, _) => room.remaining_bytes() >= ID_BYTES && room.write(&self.id),
            (FLUSH | DISCARD | WRITE_ZEROES, _) if self.read_only => return Ok(UNSUPPORTED),
            // A kernel looks for partitions when it finds a disk.
            (IN, None) => zeros(room),
            // A machine that is frozen swaps to a disk that it does not have yet. The header stays in its memory; a page that it
            // swapped out would not.
            (FLUSH, None) => true,
            (OUT, None) => !self.read_only && sector < SWAP_HEADER_SECTORS,
            (DISCARD | WRITE_ZEROES, None) => false,
            (IN, Some(file)) => match self.within(sector, room.remaining_bytes() as u64) {
                Some(at) => read(file, at, room).map(|()| true)?,
                None => false,
            },
            (OUT, Some(_)) if self.read_only => false,
            (OUT, Some(file)) => match self.within(sector, readable.remaining_bytes() as u64) {
                Some(at) => readable.write_file_at(file.as_fd(), at).map(|()| true)?,
                None => false,
            },
            (FLUSH, Some(_)) if self.is_scratch => true,
            (FLUSH, Some(file)) => file.sync_data().map(|()| true)?,
            (DISCARD, Some(file)) => match self.segments(readable, DISCARDS) {
                Ok(segments) if segments.iter().any(|segment| segment.unmap) => return Ok(UNSUPPORTED),
                Ok(segments) => return discard(file, &segments),
                Err(ended) => return Ok(ended),
            },
            (WRITE_ZEROES, Some(file)) => match self.segments(readable, ZEROES) {
                Ok(segments) => segments.iter().try_for_each(|segment| zero(file, segment)).map(|()| true)?,
                Err(ended) => return Ok(ended),
            },
            _ => return Ok(UNSUPPORTED),
        };
        Ok(if done { OK } else { FAILED })
    }

    /// Where `sector` is, if `bytes` from there are whole sectors of the file.
    fn within(&self, sector: u64, bytes: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR_BYTES)?;
        let is_there = bytes.is_multiple_of(SECTOR_BYTES) && start.checked_add(bytes)? <= self.bytes;
        is_there.then_some(start)
    }

    /// What is to be discarded or zeroed, all of it checked before any of it is done; or how the request ends.
    fn segments(
        &self,
        readable: &mut Readable<'_, ()>,
        (most, most_sectors): (u32, u32),
    ) -> Result<Vec<Segment>, u8> {
        let bytes = readable.remaining_bytes();
        let most_bytes = usize::try_from(most).unwrap_or(0) * SEGMENT_BYTES;
        if bytes == 0 || bytes > most_bytes || !bytes.is_multiple_of(SEGMENT_BYTES) {
            return Err(FAILED);
        }
        let mut segments = Vec::new();
        while let Some(segment) = readable.read_array::<SEGMENT_BYTES>() {
            let (sectors, flags) = (word(&segment, 8), word(&segment, 12));
            if flags & !UNMAP != 0 {
                return Err(UNSUPPORTED);
            }
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            let at =
                self.within(long(&segment, 0), bytes).filter(|_| sectors <= most_sectors).ok_or(FAILED)?;
            segments.push(Segment { at, bytes, unmap: flags & UNMAP != 0 });
        }
        Ok(segments)
    }
}

/// The configuration space (virtio 1.3 §5.2.4), as far as it goes with what is offered.
fn configuration(sectors: u64) -> Vec<u8> {
    let mut config = sectors.to_le_bytes().to_vec();
    config.extend(MOST_SEGMENT_BYTES.to_le_bytes());
    config.extend(MOST_SEGMENTS.to_le_bytes());
    // Geometry, block size, topology, the cache's mode and the number of queues are not offered.
    config.resize(36, 0);
    let ((discard_segments, discard_sectors), (zero_segments, zero_sectors)) = (DISCARDS, ZEROES);
    for number in [discard_sectors, discard_segments, HOLE_SECTORS, zero_sectors, zero_segments] {
        config.extend(number.to_le_bytes());
    }
    // Zeroing may give room back.
    config.extend([1, 0, 0, 0]);
    config
}

/// The little-endian number of 32 bits at `at`.
fn word(bytes: &[u8; 16], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// The little-endian number of 64 bits at `at`.
fn long(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

/// Fills all of `room` with zeros.
fn zeros(room: &mut Writable<'_, ()>) -> bool {
    const PIECE: [u8; 4096] = [0; 4096];
    while room.remaining_bytes() > 0 && room.write(&PIECE[..PIECE.len().min(room.remaining_bytes())]) {}
    true
}

fn read(file: &File, at: u64, room: &mut Writable<'_, ()>) -> io::Result<()> {
    let wanted = room.remaining_bytes();
    match room.read_file_at(file.as_fd(), at, wanted)? {
        count if count == wanted => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Makes holes of `segments`, and says how that ended.
fn discard(file: &File, segments: &[Segment]) -> io::Result<u8> {
    for segment in segments {
        match allocate(file, FallocateMode::PunchHole, segment) {
            Err(error) if is_unsupported(&error) => return Ok(UNSUPPORTED),
            result => result?,
        }
    }
    Ok(OK)
}

/// Has a segment read as zeroes: with no room where that is allowed, else with the room that it has.
fn zero(file: &File, segment: &Segment) -> io::Result<()> {
    let mode = if segment.unmap { FallocateMode::PunchHole } else { FallocateMode::ZeroRange };
    match allocate(file, mode, segment) {
        Err(error) if is_unsupported(&error) => {}
        result => return result,
    }
    let zeroes = vec![0; PIECE_BYTES];
    let end = segment.at + segment.bytes;
    let mut at = segment.at;
    while at < end {
        let count = usize::try_from(end - at).map_or(PIECE_BYTES, |rest| rest.min(PIECE_BYTES));
        file.write_all_at(&zeroes[..count], at)?;
        at += count as u64;
    }
    Ok(())
}

/// fallocate(2), which leaves the file as long as it is. Nothing is none of its sizes.
fn allocate(file: &File, mode: FallocateMode, segment: &Segment) -> io::Result<()> {
    if segment.bytes == 0 {
        return Ok(());
    }
    fallocate(file, mode, true, segment.at, segment.bytes).map_err(io::Error::from)
}

/// Whether it is the file system that cannot do this, or not in such pieces, rather than the host that failed.
fn is_unsupported(error: &io::Error) -> bool {
    const CODES: [i32; 4] = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENODEV, libc::EINVAL];
    error.raw_os_error().is_some_and(|code| CODES.contains(&code))
}

impl Device<()> for Disk {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | SIZES | SEGMENTS | if self.read_only { READ_ONLY } else { WRITES }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn process(
        &mut self,
        _wake: Wake,
        queues: &mut [Option<&mut Queue>],
        memory: &GuestMemoryMmap,
    ) -> Result<Outcome, QueueError> {
        let mut outcome = Outcome::default();
        if let Some(Some(queue)) = queues.first_mut()
            && !self.is_dead
        {
            self.serve(queue, memory, &mut outcome).map_err(|source| QueueError { queue: 0, source })?;
        }
        Ok(outcome)
    }

    fn reset(&mut self) {}

    fn can_freeze(&self) -> bool {
        true
    }

    /// Between two requests a disk knows nothing of its driver.
    fn freeze(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn thaw(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() { Ok(()) } else { Err(StateError::Malformed) }
    }
}

impl Disk {
    fn serve(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        outcome: &mut Outcome,
    ) -> Result<(), virtio_queue::Error> {
        let (mut requests, mut bytes) = (Vec::new(), 0_usize);
        queue.disable_notification(memory)?;
        loop {
            if requests.len() == ROUND_REQUESTS || bytes >= ROUND_BYTES {
                outcome.again = true;
                break;
            }
            let Some(taken) = Chain::next_of(queue, memory, LIMITS)? else {
                if !requests.is_empty() {
                    // A driver that waited for one of these asks its next thing at once.
                    outcome.again = true;
                    outcome.lingers = bytes <= BRIEF_BYTES;
                    break;
                }
                if queue.enable_notification(memory)? {
                    queue.disable_notification(memory)?;
                    continue;
                }
                return Ok(());
            };
            let request = Request::new(taken);
            bytes = bytes.saturating_add(request.bytes());
            requests.push(request);
        }
        self.read_ahead(&requests);
        let begun = Instant::now();
        let mut requests = requests.into_iter();
        while let Some(Request { head, asked }) = requests.next() {
            let mut written = 0;
            if let Some(mut asked) = asked {
                let ended = match self.answer(&mut asked) {
                    Ok(ended) => ended,
                    Err(error) => {
                        self.is_dead = true;
                        (self.failed)(&error);
                        return Ok(());
                    }
                };
                if asked.status.write(&[ended]) {
                    written = asked.room.written_bytes() + 1;
                }
            }
            queue.add_used(memory, head, u32::try_from(written).unwrap_or(u32::MAX))?;
            // Never more than are in a round.
            let left = u16::try_from(requests.len()).unwrap_or(0);
            if left > 0 && begun.elapsed() >= self.round_time {
                queue.set_next_avail(queue.next_avail().wrapping_sub(left));
                outcome.again = true;
                outcome.lingers = false;
                break;
            }
        }
        if queue.needs_notification(memory)? {
            outcome.interrupt_for(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
