//! The working set of a frozen machine's copies: the pages that one is known to touch on its way to a step. They are put in place
//! before a copy runs, in few calls; left to the guest, each costs an exit and a fault of the host's, and twice that where a
//! page is read first and then written.
//!
//! It is looked up once, in the page table of a copy that has gone that way ([`WorkingSet::of`]), and says of each page whether the
//! copy had written there. It says nothing about contents: a page too many costs memory or time, one too few a fault. So it is
//! bounded, and where it is damaged there is none.
//!
//! As bytes: a head with the format's version and a digest, the size of the guest's memory, then for each range its first page
//! and its length in pages, doubled, with one added where they were written; all of them 64 bits, little-endian.
#![expect(
    unsafe_code,
    reason = "memory is populated by madvise(2), and kvm-ioctls has no KVM_PRE_FAULT_MEMORY"
)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use kiln_digest::Digest;
use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use crate::memory;

/// What a working set begins with: a word, and the format's version.
const MAGIC: &[u8; 8] = b"KILNPAGE";
const VERSION: u32 = 1;
/// Then the SHA-256 of all that follows it.
const DIGEST_BYTES: usize = 32;
/// Length of a range, as bytes.
const RANGE_BYTES: usize = 16;

/// Most pages of one, 64 MiB: ten times what copies were seen to touch. What more there is a guest has to touch itself.
pub const MOST_PAGES: u64 = 16 << 10;
/// Most ranges.
const MOST_RANGES: usize = 4096;
/// Longest that one is as bytes.
pub const MOST_BYTES: u64 = (MAGIC.len() + 4 + DIGEST_BYTES + 8 + MOST_RANGES * RANGE_BYTES) as u64;

const PAGE_BYTES: u64 = 4096;

// Of a page in /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY_BYTES: usize = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;
/// How many are read at a time.
const ENTRIES: usize = 8192;

/// KVM_PRE_FAULT_MEMORY (linux/kvm.h, since Linux 6.11).
const PRE_FAULT_MEMORY: libc::c_ulong = ioctl_expr(_IOC_READ | _IOC_WRITE, KVMIO, 0xd5, 64);
const _: () = assert!(size_of::<kvm_pre_fault_memory>() == 64, "the number has the size");
/// How often KVM is asked again that did nothing and said to.
const MOST_VAIN: u32 = 8;

/// What a copy does to a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It reads there.
    Read,
    /// It writes there.
    Write,
}

/// Pages one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    /// The first, by its number: where it is in the guest's memory, in pages.
    first: u64,
    pages: u64,
    access: Access,
}

impl Range {
    fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }
}

/// See the module. Its pages lie in memory of the size that it was made for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Bytes of the guest's memory.
    memory_bytes: u64,
    /// In their order.
    ranges: Vec<Range>,
}

/// Why bytes are no working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WorkingSetError {
    /// Another version wrote it, or it is none.
    #[error("this is no working set of this version")]
    Foreign,
    /// It is cut short, changed or too large.
    #[error("the working set is damaged")]
    Damaged,
    /// It is of another machine.
    #[error("the working set is of a machine with another size of memory")]
    OtherMachine,
}

impl WorkingSet {
    /// One without pages, of a machine with so much memory.
    pub fn empty(memory_bytes: u64) -> Self {
        Self { memory_bytes, ranges: Vec::new() }
    }

    /// What the mapping `memory` of a copy has there: pages of its own, which were written, and those of the file, which were
    /// read or lie beside one that was, as the host maps some at a time. `pagemap` is that of this process.
    ///
    /// # Errors
    /// What reading says; `FileTooLarge` for more than there can be.
    pub fn of(pagemap: &File, memory: &GuestMemoryMmap) -> io::Result<Self> {
        let memory_bytes = memory.iter().map(GuestMemoryRegion::len).sum();
        let mut set = Self::empty(memory_bytes);
        let mut entries = vec![0; ENTRIES * ENTRY_BYTES];
        for region in memory.iter() {
            let host = region.as_ptr() as u64 / PAGE_BYTES;
            let (first, pages) = (region.start_addr().0 / PAGE_BYTES, region.len() / PAGE_BYTES);
            let mut done = 0;
            while done < pages {
                let count = usize::try_from(pages - done).map_or(ENTRIES, |left| left.min(ENTRIES));
                let piece = entries.get_mut(..count * ENTRY_BYTES).unwrap_or_default();
                pagemap.read_exact_at(piece, (host + done) * ENTRY_BYTES as u64)?;
                for (number, entry) in (first + done..).zip(piece.as_chunks().0) {
                    if let Some(access) = access_of(u64::from_le_bytes(*entry)) {
                        set.push(number, access);
                    }
                }
                done += count as u64;
                if set.ranges.len() > MOST_RANGES || set.pages() > MOST_PAGES {
                    return Err(io::ErrorKind::FileTooLarge.into());
                }
            }
        }
        Ok(set)
    }

    /// Adds a page behind all others.
    fn push(&mut self, number: u64, access: Access) {
        match self.ranges.last_mut() {
            Some(last) if last.end() == number && last.access == access => last.pages += 1,
            _ => self.ranges.push(Range { first: number, pages: 1, access }),
        }
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.ranges.iter().fold(0, |sum, range| sum.saturating_add(range.pages))
    }

    /// How many of them are written.
    pub fn written_pages(&self) -> u64 {
        let written = self.ranges.iter().filter(|range| range.access == Access::Write);
        written.fold(0, |sum, range| sum.saturating_add(range.pages))
    }

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = self.memory_bytes.to_le_bytes().to_vec();
        for range in &self.ranges {
            body.extend(range.first.to_le_bytes());
            body.extend(((range.pages << 1) | u64::from(range.access == Access::Write)).to_le_bytes());
        }
        [&MAGIC[..], &VERSION.to_le_bytes(), Digest::of(&body).as_bytes(), &body].concat()
    }

    /// From bytes, which may be anything, for a machine with `memory_bytes` of memory.
    ///
    /// # Errors
    /// See [`WorkingSetError`].
    pub fn decode(bytes: &[u8], memory_bytes: u64) -> Result<Self, WorkingSetError> {
        use WorkingSetError::{Damaged, Foreign, OtherMachine};
        let rest = bytes.strip_prefix(MAGIC).ok_or(Foreign)?;
        let rest = rest.strip_prefix(&VERSION.to_le_bytes()).ok_or(Foreign)?;
        let (digest, body) = rest.split_at_checked(DIGEST_BYTES).ok_or(Damaged)?;
        if Digest::of(body).as_bytes() != digest {
            return Err(Damaged);
        }
        let (size, body) = body.split_first_chunk().ok_or(Damaged)?;
        if u64::from_le_bytes(*size) != memory_bytes {
            return Err(OtherMachine);
        }
        let (numbers, rest) = body.as_chunks();
        if !rest.is_empty() || !numbers.len().is_multiple_of(2) || numbers.len() / 2 > MOST_RANGES {
            return Err(Damaged);
        }
        let mut numbers = numbers.iter().map(|number| u64::from_le_bytes(*number));
        let mut set = Self::empty(memory_bytes);
        while let (Some(first), Some(length)) = (numbers.next(), numbers.next()) {
            let access = if length & 1 == 0 { Access::Read } else { Access::Write };
            set.ranges.push(Range { first, pages: length >> 1, access });
        }
        if set.is_sound() { Ok(set) } else { Err(Damaged) }
    }

    /// Whether its ranges are in order, lie in memory and are not too many.
    fn is_sound(&self) -> bool {
        let Ok(parts) = memory::parts(self.memory_bytes) else { return self.ranges.is_empty() };
        let lies_in_memory = |range: &Range| {
            parts.iter().any(|(start, length)| {
                let first = start.0 / PAGE_BYTES;
                range.first >= first && range.end() <= first + length / PAGE_BYTES
            })
        };
        let mut end = 0;
        self.pages() <= MOST_PAGES
            && self.ranges.iter().all(|range| {
                let is_behind = range.first >= std::mem::replace(&mut end, range.end());
                is_behind && range.pages > 0 && lies_in_memory(range)
            })
    }

    /// Has the host map its pages in `memory`, those that are written as copies of the process's own. What the host does not do is
    /// left to the guest.
    pub fn populate(&self, memory: &GuestMemoryMmap) {
        for range in &self.ranges {
            let place = memory.iter().find_map(|region| {
                let bytes = range.first.checked_mul(PAGE_BYTES)?.checked_sub(region.start_addr().0)?;
                let length = range.pages.checked_mul(PAGE_BYTES)?;
                let is_within = bytes.checked_add(length)? <= region.len();
                let (bytes, length) = (usize::try_from(bytes).ok()?, usize::try_from(length).ok()?);
                is_within.then(|| (region.as_ptr().wrapping_add(bytes), length))
            });
            let Some((start, length)) = place else { continue };
            let advice = match range.access {
                Access::Read => libc::MADV_POPULATE_READ,
                Access::Write => libc::MADV_POPULATE_WRITE,
            };
            // SAFETY: these bytes lie within a region of the guest's memory, as was just seen, which stays mapped for as long as
            // `memory` is borrowed. The call changes none of them: it does what touching each page would, and where touching it
            // would be a signal it is an error.
            if unsafe { libc::madvise(start.cast(), length, advice) } != 0
                && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
            {
                // Before Linux 5.14.
                return;
            }
        }
    }

    /// Has KVM, which has KVM_CAP_PRE_FAULT_MEMORY, map its pages for the guest as they are mapped in this process
    /// (Documentation/virt/kvm/api.rst, KVM_PRE_FAULT_MEMORY). All processors of a machine share what is mapped for one. What KVM does not do is
    /// left to the guest.
    pub fn map_into_guest(&self, vcpu: &VcpuFd) {
        for (first, end) in self.stretches() {
            let (gpa, size) = (first.saturating_mul(PAGE_BYTES), (end - first).saturating_mul(PAGE_BYTES));
            let mut left = kvm_pre_fault_memory { gpa, size, ..kvm_pre_fault_memory::default() };
            let mut vain = 0;
            while left.size > 0 {
                let before = left.size;
                // SAFETY: the descriptor is a processor's, and the structure is what this request reads and writes (its number has
                // the size). KVM maps what its memory slots say, which `Machine` made of memory that it keeps.
                let result = unsafe { ioctl_with_mut_ref(vcpu, PRE_FAULT_MEMORY, &mut left) };
                vain = if left.size < before { 0 } else { vain + 1 };
                let again = match result {
                    0 => true,
                    _ => {
                        matches!(io::Error::last_os_error().raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
                    }
                };
                if !again || vain >= MOST_VAIN {
                    return;
                }
            }
        }
    }

    /// Its pages without what is done to them: first ones, and those after the last.
    fn stretches(&self) -> Vec<(u64, u64)> {
        let mut stretches: Vec<(u64, u64)> = Vec::new();
        for range in &self.ranges {
            match stretches.last_mut() {
                Some((_, end)) if *end == range.first => *end = range.end(),
                _ => stretches.push((range.first, range.end())),
            }
        }
        stretches
    }
}

/// What was done to the page of a private mapping of which the page table says `entry`.
fn access_of(entry: u64) -> Option<Access> {
    let access = if entry & OF_A_FILE == 0 { Access::Write } else { Access::Read };
    (entry & (PRESENT | SWAPPED) != 0).then_some(access)
}

#[cfg(test)]
mod tests;
