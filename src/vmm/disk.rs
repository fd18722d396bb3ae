//! The block device (virtio 1.3 §5.2): a file's raw bytes, read and written where they are.
//!
//! A disk dies with its machine or is synced by whoever handed it over, so no flush is offered, and a driver that is offered
//! none asks for none. What the host cannot read or write is not answered: whoever made the disk is told, to end the machine.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use kiln_virtio::device::{COMMON_FEATURES, Device, Outcome, Wake};
use kiln_virtio::ring::{Chain, Limits, QueueError, Readable, Writable};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

/// VIRTIO_ID_BLOCK.
pub const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [256];
/// VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX and VIRTIO_BLK_F_RO.
const SIZES: u64 = 1 << 1;
const SEGMENTS: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
/// Most buffers of one request, and most bytes of each: together what is taken. A larger request would go back without a
/// word, and a driver may take that for success.
const MOST_SEGMENTS: u32 = 126;
const MOST_SEGMENT_BYTES: u32 = 64 << 10;
const SECTOR_BYTES: u64 = 512;
/// Most bytes of one request.
const MOST_BYTES: usize = 8 << 20;
const LIMITS: Limits =
    Limits { readable_bytes: MOST_BYTES + 16, writable_bytes: MOST_BYTES + 1, slices: 512 };
/// How much is copied at a time on its way to the file.
const PIECE_BYTES: usize = 128 << 10;

/// Types of requests, and their ends.
const IN: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// Bytes of a disk's name.
const ID_BYTES: usize = 20;

/// Hears of what the host could not read or write.
type OnFailure = Box<dyn Fn(&io::Error) + Send>;

/// A file as a disk.
pub struct Disk {
    file: File,
    failed: OnFailure,
    /// The host failed, and nothing is answered any more.
    is_dead: bool,
    id: [u8; ID_BYTES],
    read_only: bool,
    bytes: u64,
    config: Vec<u8>,
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
        let sectors = file.metadata()?.len() / SECTOR_BYTES;
        let mut id = [0; ID_BYTES];
        for (place, byte) in id.iter_mut().zip(serial.bytes()) {
            *place = byte;
        }
        // Capacity, most bytes of a segment, and most segments.
        let mut config = sectors.to_le_bytes().to_vec();
        config.extend(MOST_SEGMENT_BYTES.to_le_bytes());
        config.extend(MOST_SEGMENTS.to_le_bytes());
        let (failed, is_dead) = (Box::new(failed), false);
        Ok(Self { file, failed, is_dead, id, read_only, bytes: sectors * SECTOR_BYTES, config })
    }

    /// Does one request, and gives how it ended.
    ///
    /// # Errors
    /// What the host says of its file.
    fn answer(&self, readable: &mut Readable<'_, ()>, room: &mut Writable<'_, ()>) -> io::Result<u8> {
        let Some(header) = readable.read_array::<16>() else { return Ok(FAILED) };
        let [kind, sector] = [&header[..8], &header[8..]].map(|half| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(half);
            u64::from_le_bytes(bytes)
        });
        let kind = u32::try_from(kind & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        let within = |length: usize| {
            let start = sector.checked_mul(SECTOR_BYTES)?;
            let length = u64::try_from(length).ok().filter(|length| length.is_multiple_of(SECTOR_BYTES))?;
            (start.checked_add(length)? <= self.bytes).then_some(start)
        };
        let done = match kind {
            IN => match within(room.remaining_bytes()) {
                Some(at) => self.read(at, room).map(|()| true)?,
                None => false,
            },
            OUT if self.read_only => false,
            OUT => match within(readable.remaining_bytes()) {
                Some(at) => self.write(at, readable).map(|()| true)?,
                None => false,
            },
            GET_ID => room.remaining_bytes() >= ID_BYTES && room.write(&self.id),
            _ => return Ok(UNSUPPORTED),
        };
        Ok(if done { OK } else { FAILED })
    }

    fn read(&self, at: u64, room: &mut Writable<'_, ()>) -> io::Result<()> {
        let wanted = room.remaining_bytes();
        match room.read_file_at(self.file.as_fd(), at, wanted)? {
            count if count == wanted => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn write(&self, mut at: u64, readable: &mut Readable<'_, ()>) -> io::Result<()> {
        let mut piece = vec![0; PIECE_BYTES.min(readable.remaining_bytes())];
        while readable.remaining_bytes() > 0 {
            let count = readable.read(&mut piece);
            self.file.write_all_at(&piece[..count], at)?;
            at += count as u64;
        }
        Ok(())
    }
}

impl Device<()> for Disk {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | SIZES | SEGMENTS | if self.read_only { READ_ONLY } else { 0 }
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
}

impl Disk {
    fn serve(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        outcome: &mut Outcome,
    ) -> Result<(), virtio_queue::Error> {
        let mut taken = 0;
        queue.disable_notification(memory)?;
        loop {
            if taken == queue.size() {
                outcome.again = true;
                break;
            }
            let Some(next) = Chain::next_of(queue, memory, LIMITS)? else {
                if queue.enable_notification(memory)? {
                    queue.disable_notification(memory)?;
                    continue;
                }
                break;
            };
            taken += 1;
            let mut written = 0;
            if let Ok(Chain { mut readable, mut writable }) = next.chain {
                // The last byte of the room is for how it ended; without one there is nobody to tell.
                let behind = writable.remaining_bytes().checked_sub(1);
                if let Some(mut status) = behind.and_then(|at| writable.split_off(at)) {
                    let ended = match self.answer(&mut readable, &mut writable) {
                        Ok(ended) => ended,
                        Err(error) => {
                            self.is_dead = true;
                            (self.failed)(&error);
                            return Ok(());
                        }
                    };
                    if status.write(&[ended]) {
                        written = writable.written_bytes() + 1;
                    }
                }
            }
            queue.add_used(memory, next.head, u32::try_from(written).unwrap_or(u32::MAX))?;
        }
        if taken > 0 && queue.needs_notification(memory)? {
            outcome.interrupt_for(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
