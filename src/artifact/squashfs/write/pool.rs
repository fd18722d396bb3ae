//! Compresses blocks on several threads, and writes them in the order in which they were given.
//!
//! The caller's thread reads contents, gives blocks and writes results; the others do nothing but compress. What is
//! written depends on the order alone, so the number of threads does not show.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, Scope};

use super::compressor::Compressor;
use super::{Codec, SquashfsError};
use crate::content::ContentError;
use crate::squashfs::walk::STORED;

/// Blocks that may be on their way for each thread: enough that none waits while one of the others has a hard one.
const BLOCKS_PER_THREAD: usize = 16;

/// A block on its way to a thread. `room` takes what comes of it.
struct Job {
    number: usize,
    block: Vec<u8>,
    room: Vec<u8>,
}

/// A block that came back: what is to be written is in `room`, unless `is_stored`, when it is the block.
struct Done {
    job: Job,
    is_stored: io::Result<bool>,
}

impl Done {
    /// What the caller is told of a thread that panics, lest it wait for the block for ever.
    fn failed(number: usize) -> Self {
        let job = Job { number, block: Vec::new(), room: Vec::new() };
        Self { job, is_stored: Err(io::ErrorKind::BrokenPipe.into()) }
    }
}

/// What the threads share. The lock guards the receiving end, which each holds only until it has a job.
pub(super) struct Queue(Mutex<Receiver<Job>>);

/// Where a block lies, and its length as block lists have it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub at: u64,
    pub size: u32,
}

/// Blocks that are written.
pub(super) struct Places {
    /// In the order in which they were given.
    pub blocks: Vec<Placed>,
    /// Where the last one ends.
    pub at: u64,
}

/// The caller's end.
pub(super) struct Pool {
    jobs: Sender<Job>,
    done: Receiver<Done>,
    /// What came back too early.
    early: BTreeMap<usize, Done>,
    spare: Vec<(Vec<u8>, Vec<u8>)>,
    given: usize,
    most_under_way: usize,
    places: Places,
}

/// The two ends of a queue.
pub(super) fn queue() -> (JobSender, Queue) {
    let (sender, receiver) = channel();
    (JobSender(sender), Queue(Mutex::new(receiver)))
}

/// The end of a queue that [`Pool::start`] takes.
pub(super) struct JobSender(Sender<Job>);

impl Pool {
    /// Starts `threads` threads. The first block will be written at byte `at`.
    pub fn start<'scope, 'queue: 'scope>(
        scope: &'scope Scope<'scope, 'queue>,
        (jobs, queue): (JobSender, &'queue Queue),
        threads: NonZero<usize>,
        (codec, block_bytes): (Codec, u32),
        at: u64,
    ) -> Result<Self, SquashfsError> {
        let (results, done) = channel();
        let mut started = 0;
        for _ in 0..threads.get() {
            let mut compressor = Compressor::new(codec, block_bytes).map_err(SquashfsError::Compress)?;
            let results = results.clone();
            let thread = Builder::new().name("squashfs".to_owned()).spawn_scoped(scope, move || {
                while let Some(job) = queue.next() {
                    let number = job.number;
                    let done = catch_unwind(AssertUnwindSafe(|| compressed(&mut compressor, job)));
                    let (done, panic) = match done {
                        Ok(done) => (done, None),
                        Err(panic) => (Done::failed(number), Some(panic)),
                    };
                    // Nobody listens any more where the caller has failed.
                    let is_over = results.send(done).is_err();
                    if let Some(panic) = panic {
                        resume_unwind(panic);
                    }
                    if is_over {
                        return;
                    }
                }
            });
            match thread {
                Ok(_) => started += 1,
                Err(error) if started == 0 => return Err(SquashfsError::Thread(error)),
                // Those that there are do it.
                Err(_) => break,
            }
        }
        Ok(Self {
            jobs: jobs.0,
            done,
            early: BTreeMap::new(),
            spare: Vec::new(),
            given: 0,
            most_under_way: threads.get().saturating_mul(BLOCKS_PER_THREAD),
            places: Places { blocks: Vec::new(), at },
        })
    }

    /// Gives a block, and returns its number. Writes what has come back, and waits where too much is under way.
    pub fn give(&mut self, block: &[u8], out: &mut impl Write) -> Result<usize, SquashfsError> {
        while self.given - self.places.blocks.len() >= self.most_under_way {
            self.write_next(out)?;
        }
        let (mut copy, room) = self.spare.pop().unwrap_or_default();
        copy.clear();
        copy.extend_from_slice(block);
        let number = self.given;
        self.given += 1;
        // It fails where all threads have panicked, of which `write_next` hears.
        let _ = self.jobs.send(Job { number, block: copy, room });
        Ok(number)
    }

    /// Writes all that is under way.
    pub fn finish(&mut self, out: &mut impl Write) -> Result<(), SquashfsError> {
        while self.places.blocks.len() < self.given {
            self.write_next(out)?;
        }
        Ok(())
    }

    /// Lets the threads go.
    pub fn retire(self) -> Places {
        self.places
    }

    /// Waits for the block that is next in order, and writes it.
    fn write_next(&mut self, out: &mut impl Write) -> Result<(), SquashfsError> {
        let next = self.places.blocks.len();
        let done = loop {
            if let Some(done) = self.early.remove(&next) {
                break done;
            }
            let gone = |_| SquashfsError::Compress(io::ErrorKind::BrokenPipe.into());
            let done = self.done.recv().map_err(gone)?;
            self.early.insert(done.job.number, done);
        };
        let is_stored = done.is_stored.map_err(SquashfsError::Compress)?;
        let Job { block, room, .. } = done.job;
        let bytes = if is_stored { &block } else { &room };
        out.write_all(bytes).map_err(ContentError::Write)?;
        let length = u32::try_from(bytes.len()).map_err(|_| SquashfsError::TooLarge)?;
        let size = if is_stored { length | STORED } else { length };
        self.places.blocks.push(Placed { at: self.places.at, size });
        self.places.at += u64::from(length);
        self.spare.push((block, room));
        Ok(())
    }
}

impl Queue {
    fn next(&self) -> Option<Job> {
        // A poisoned lock is another thread's panic; there is nothing behind it to be left half done.
        let receiver = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        receiver.recv().ok()
    }
}

fn compressed(compressor: &mut Compressor, mut job: Job) -> Done {
    job.room.clear();
    let is_stored = compressor.compress(&job.block).map(|smaller| match smaller {
        Some(smaller) => {
            job.room.extend_from_slice(smaller);
            false
        }
        None => true,
    });
    Done { job, is_stored }
}
