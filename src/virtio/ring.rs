//! One descriptor chain of a split virtqueue (virtio 1.3 §2.7), walked once and bounded: the only way in which
//! bytes come out of guest memory, and the only way back in.
//!
//! [`Chain::next_of`] takes the next available chain, checks all of it and turns it into two lists of memory
//! slices. After that nothing of the descriptor table is read again, and each readable byte is copied out at
//! most once, so a driver that changes them meanwhile changes nothing that was checked. Called by the devices.
#![expect(
    unsafe_code,
    reason = "files and sockets straight from and into guest memory, which can go back to the host"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// A queue that cannot be served any more, because the driver broke its ring.
#[derive(Debug, thiserror::Error)]
#[error("queue {queue} is unusable")]
pub struct QueueError {
    /// Index of the queue.
    pub queue: usize,
    /// What is wrong with its ring.
    #[source]
    pub source: virtio_queue::Error,
}

/// Limits of one chain. A chain beyond them is refused whole.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most bytes the driver may offer for reading.
    pub readable_bytes: usize,
    /// Most bytes the driver may offer for writing.
    pub writable_bytes: usize,
    /// Most memory slices, readable and writable together.
    pub slices: usize,
}

/// Why a chain was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The chain loops, leaves its table, nests indirect tables, or its table is not in memory.
    #[error("descriptor chain does not end")]
    Unended,
    /// A buffer lies outside of the guest's memory.
    #[error("buffer outside of guest memory")]
    Memory,
    /// A readable buffer follows a writable one (virtio 1.3 §2.7.4.2).
    #[error("readable buffer after a writable one")]
    Order,
    /// More bytes or pieces than [`Limits`] allow.
    #[error("descriptor chain is too long")]
    TooLong,
}

/// Bytes of one chain that the driver offers for reading.
pub struct Readable<'m, B: Bitmap + 'static> {
    slices: VecDeque<VolatileSlice<'m, BS<'m, B>>>,
    remaining_bytes: usize,
}

/// Room in one chain that the driver offers for writing.
pub struct Writable<'m, B: Bitmap + 'static> {
    slices: VecDeque<VolatileSlice<'m, BS<'m, B>>>,
    remaining_bytes: usize,
    written_bytes: usize,
}

/// One descriptor chain, checked.
pub struct Chain<'m, B: Bitmap + 'static> {
    /// What the driver sends.
    pub readable: Readable<'m, B>,
    /// Where the driver expects the answer.
    pub writable: Writable<'m, B>,
}

/// The next available chain: its head, and what became of it.
pub struct Taken<'m, B: Bitmap + 'static> {
    /// The head to be put in the used ring, also where the chain is refused.
    pub head: u16,
    /// The chain, or why it was refused.
    pub chain: Result<Chain<'m, B>, ChainError>,
}

impl<'m, B: Bitmap + 'static> Chain<'m, B> {
    /// Takes the next available chain of `queue`, or `None` where there is none.
    ///
    /// # Errors
    /// The available ring is not in memory, or its index is further ahead than the queue is long.
    pub fn next_of(
        queue: &mut Queue,
        memory: &'m GuestMemoryMmap<B>,
        limits: Limits,
    ) -> Result<Option<Taken<'m, B>>, virtio_queue::Error> {
        let size = queue.size();
        let available = queue.avail_idx(memory, Ordering::Acquire)?.0;
        if available == queue.next_avail() {
            return Ok(None);
        }
        // A driver only ever moves the index on, so whatever the iterator reads now, it has to find a chain.
        let descriptors = queue.iter(memory)?.next().ok_or(virtio_queue::Error::InvalidAvailRingIndex)?;
        let head = descriptors.head_index();
        if head >= size {
            return Err(virtio_queue::Error::InvalidDescriptorIndex);
        }
        Ok(Some(Taken { head, chain: Self::walk(descriptors, memory, limits) }))
    }

    /// As [`Chain::next_of`]; where there is none, the driver is to notify of the next one from now on.
    ///
    /// # Errors
    /// Those of [`Chain::next_of`].
    pub fn next_or_notify(
        queue: &mut Queue,
        memory: &'m GuestMemoryMmap<B>,
        limits: Limits,
    ) -> Result<Option<Taken<'m, B>>, virtio_queue::Error> {
        loop {
            if let Some(taken) = Self::next_of(queue, memory, limits)? {
                return Ok(Some(taken));
            }
            // One may have come before the driver was told to.
            if !queue.enable_notification(memory)? {
                return Ok(None);
            }
        }
    }

    fn walk(
        descriptors: DescriptorChain<&GuestMemoryMmap<B>>,
        memory: &'m GuestMemoryMmap<B>,
        limits: Limits,
    ) -> Result<Self, ChainError> {
        let mut readable = Readable { slices: VecDeque::new(), remaining_bytes: 0 };
        let mut writable = Writable { slices: VecDeque::new(), remaining_bytes: 0, written_bytes: 0 };
        // The iterator also ends where it meets an invalid descriptor: then the last one it gave says that
        // another follows.
        let mut ended = false;
        for descriptor in descriptors {
            ended = !descriptor.has_next();
            let length = descriptor.len() as usize;
            let (slices, total, limit) = if descriptor.is_write_only() {
                (&mut writable.slices, &mut writable.remaining_bytes, limits.writable_bytes)
            } else if writable.slices.is_empty() {
                (&mut readable.slices, &mut readable.remaining_bytes, limits.readable_bytes)
            } else {
                return Err(ChainError::Order);
            };
            *total = total.checked_add(length).filter(|sum| *sum <= limit).ok_or(ChainError::TooLong)?;
            for slice in GuestMemoryBackend::get_slices(memory, descriptor.addr(), length) {
                slices.push_back(slice.map_err(|_| ChainError::Memory)?);
            }
            if readable.slices.len() + writable.slices.len() > limits.slices {
                return Err(ChainError::TooLong);
            }
        }
        if ended { Ok(Self { readable, writable }) } else { Err(ChainError::Unended) }
    }
}

impl<B: Bitmap + 'static> Readable<'_, B> {
    /// Bytes not yet read.
    pub fn remaining_bytes(&self) -> usize {
        self.remaining_bytes
    }

    /// Copies the next bytes into `buffer`, as many as there are and fit, and returns how many.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buffer.len() {
            let Some(slice) = self.slices.pop_front() else { break };
            let copied = slice.copy_to(&mut buffer[done..]);
            done += copied;
            if copied < slice.len()
                && let Ok(rest) = slice.offset(copied)
            {
                self.slices.push_front(rest);
            }
        }
        self.remaining_bytes = self.remaining_bytes.saturating_sub(done);
        done
    }

    /// Copies exactly `N` bytes, or none where fewer remain.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.remaining_bytes >= N && self.read(&mut bytes) == N).then_some(bytes)
    }

    /// Sends the next bytes to the socket `to`, as many as there are and it takes without blocking, straight
    /// from guest memory. Returns how many it took.
    ///
    /// # Errors
    /// What the system call fails with; nothing is consumed then.
    pub fn send_to(&mut self, to: BorrowedFd<'_>, most_bytes: usize) -> io::Result<usize> {
        self.drain(most_bytes, |vectors, count| {
            // SAFETY: a msghdr is plain data for which all zeroes is a valid value.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = vectors.cast_mut();
            message.msg_iovlen = usize::try_from(count).unwrap_or(0);
            // SAFETY: the vectors describe guest memory that stays mapped during the call, which only reads it.
            // That the guest changes it meanwhile decides which bytes are sent, and nothing else.
            unsafe { libc::sendmsg(to.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
        })
    }

    /// Writes all that remains to `file` at `offset`, straight from guest memory.
    ///
    /// # Errors
    /// What pwritev(2) fails with; some may have been written then.
    pub fn write_file_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        let mut done = 0_usize;
        while self.remaining_bytes > 0 {
            let at = offset.checked_add(done as u64).and_then(|at| i64::try_from(at).ok());
            let at = at.ok_or(io::ErrorKind::InvalidInput)?;
            match self.drain(usize::MAX, |vectors, count| {
                // SAFETY: as in `send_to`: the call only reads guest memory, which stays mapped meanwhile.
                unsafe { libc::pwritev(file.as_raw_fd(), vectors, count, at) }
            }) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets `call` read the next bytes, at most `most_bytes`, and consumes what it says it took.
    fn drain(
        &mut self,
        most_bytes: usize,
        call: impl FnOnce(*const libc::iovec, libc::c_int) -> isize,
    ) -> io::Result<usize> {
        let mut vectors = Vec::with_capacity(self.slices.len().min(MAX_VECTORS));
        let mut left = most_bytes;
        // The guards keep the pointers valid for as long as they live.
        let guards: Vec<_> = self.slices.iter().take(MAX_VECTORS).map(VolatileSlice::ptr_guard).collect();
        for guard in &guards {
            let length = guard.len().min(left);
            vectors.push(libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: length });
            left -= length;
        }
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(0);
        let taken = call(vectors.as_ptr(), count);
        drop(guards);
        let taken = usize::try_from(taken).map_err(|_| io::Error::last_os_error())?;
        self.skip(taken);
        Ok(taken)
    }

    fn skip(&mut self, mut count: usize) {
        self.remaining_bytes = self.remaining_bytes.saturating_sub(count);
        while count > 0 {
            let Some(slice) = self.slices.pop_front() else { break };
            if count < slice.len() {
                if let Ok(rest) = slice.offset(count) {
                    self.slices.push_front(rest);
                }
                break;
            }
            count -= slice.len();
        }
    }
}

/// What memory of a guest's is a mapping of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// A file of which it is all there is.
    Shared,
    /// A file of which others have their own copies, or nothing.
    Private,
}

/// Bytes of a page of the host's.
const PAGE_BYTES: usize = 4096;

/// IOV_MAX: most pieces one vectored system call takes.
const MAX_VECTORS: usize = 1024;

impl<'m, B: Bitmap + 'static> Writable<'m, B> {
    /// Bytes of room left.
    pub fn remaining_bytes(&self) -> usize {
        self.remaining_bytes
    }

    /// Bytes written so far.
    pub fn written_bytes(&self) -> usize {
        self.written_bytes
    }

    /// Writes all of `bytes`, or nothing and returns false where there is too little room.
    #[must_use]
    pub fn write(&mut self, bytes: &[u8]) -> bool {
        if bytes.len() > self.remaining_bytes {
            return false;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let Some(slice) = self.slices.pop_front() else { return false };
            let length = slice.len().min(rest.len());
            // `copy_from` copies what fits and marks it dirty.
            slice.copy_from(&rest[..length]);
            rest = &rest[length..];
            if length < slice.len()
                && let Ok(tail) = slice.offset(length)
            {
                self.slices.push_front(tail);
            }
        }
        self.remaining_bytes -= bytes.len();
        self.written_bytes += bytes.len();
        true
    }

    /// Splits off what lies behind the first `at` bytes of room, so that the rest can be filled before them.
    /// `None` where there is less room than `at`.
    pub fn split_off(&mut self, at: usize) -> Option<Writable<'m, B>> {
        let behind_bytes = self.remaining_bytes.checked_sub(at)?;
        let mut head = VecDeque::new();
        let mut wanted = at;
        while wanted > 0 {
            let slice = self.slices.pop_front()?;
            if slice.len() <= wanted {
                wanted -= slice.len();
                head.push_back(slice);
            } else {
                let (first, rest) = slice.split_at(wanted).ok()?;
                head.push_back(first);
                self.slices.push_front(rest);
                wanted = 0;
            }
        }
        self.remaining_bytes = at;
        let slices = std::mem::replace(&mut self.slices, head);
        Some(Writable { slices, remaining_bytes: behind_bytes, written_bytes: 0 })
    }

    /// Reads up to `most_bytes` of `file` at `offset` straight into the room, and returns how many came.
    /// Fewer than asked means end of file.
    ///
    /// # Errors
    /// What preadv(2) fails with before it has read anything.
    pub fn read_file_at(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        most_bytes: usize,
    ) -> io::Result<usize> {
        let mut done = 0_usize;
        while done < most_bytes && self.remaining_bytes > 0 {
            let at = offset.checked_add(done as u64).and_then(|at| i64::try_from(at).ok());
            let Some(at) = at else { break };
            match self.fill(most_bytes - done, |vectors, count| {
                // SAFETY: `fill` passes vectors of guest memory that stays mapped during the call. The kernel
                // writes there; guest memory is only ever looked at through volatile slices, so no reference
                // to it exists.
                unsafe { libc::preadv(file.as_raw_fd(), vectors, count, at) }
            }) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Receives up to `most_bytes` from the socket `from` straight into the room, without blocking.
    ///
    /// # Errors
    /// What the system call fails with.
    pub fn receive_from(&mut self, from: BorrowedFd<'_>, most_bytes: usize) -> io::Result<usize> {
        self.fill(most_bytes, |vectors, count| {
            // SAFETY: a msghdr is plain data for which all zeroes is a valid value.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = vectors.cast_mut();
            message.msg_iovlen = usize::try_from(count).unwrap_or(0);
            // SAFETY: as in `read_file_at`: the kernel writes to guest memory that stays mapped.
            unsafe { libc::recvmsg(from.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// Lets `call` write to the front of the room, at most `most_bytes`, and consumes what it says it wrote.
    fn fill(
        &mut self,
        most_bytes: usize,
        call: impl FnOnce(*const libc::iovec, libc::c_int) -> isize,
    ) -> io::Result<usize> {
        let mut vectors = Vec::with_capacity(self.slices.len().min(MAX_VECTORS));
        let mut left = most_bytes;
        // The guards keep the pointers valid for as long as they live.
        let guards: Vec<_> = self.slices.iter().take(MAX_VECTORS).map(VolatileSlice::ptr_guard_mut).collect();
        for guard in &guards {
            let length = guard.len().min(left);
            if length == 0 {
                break;
            }
            vectors.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: length });
            left -= length;
        }
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(0);
        let written = call(vectors.as_ptr(), count);
        drop(guards);
        let written = usize::try_from(written).map_err(|_| io::Error::last_os_error())?;
        self.consume(written);
        Ok(written)
    }

    /// Gives all whole pages of the host's that lie in the room back to the host: whoever touches one then finds zeros or, in a private
    /// mapping, what the file has there. What the host does not take stays.
    pub fn give_back(&mut self, backing: Backing) {
        let advice = match backing {
            Backing::Shared => libc::MADV_REMOVE,
            Backing::Private => libc::MADV_DONTNEED,
        };
        for slice in self.slices.drain(..) {
            let guard = slice.ptr_guard_mut();
            let before = guard.as_ptr().align_offset(PAGE_BYTES);
            let bytes = guard.len().saturating_sub(before) / PAGE_BYTES * PAGE_BYTES;
            if bytes > 0 {
                // SAFETY: these pages lie within the slice, so in guest memory, which stays mapped: only what is in them
                // changes, as if the guest had written there. It is looked at through volatile slices alone, so no
                // reference to it exists.
                unsafe { libc::madvise(guard.as_ptr().wrapping_add(before).cast(), bytes, advice) };
                slice.bitmap().mark_dirty(before, bytes);
            }
        }
        self.remaining_bytes = 0;
    }

    fn consume(&mut self, mut count: usize) {
        self.remaining_bytes = self.remaining_bytes.saturating_sub(count);
        self.written_bytes += count;
        while count > 0 {
            let Some(slice) = self.slices.pop_front() else { break };
            let length = slice.len().min(count);
            slice.bitmap().mark_dirty(0, length);
            if length < slice.len()
                && let Ok(tail) = slice.offset(length)
            {
                self.slices.push_front(tail);
            }
            count -= length;
        }
    }
}

#[cfg(test)]
mod tests;
