//! A command's standard input on its way to the agent: read no faster than the command takes it, and not at all once the
//! command is over, so that what comes after it on a terminal is left to whoever reads that next.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kiln_wire::{Credit, ToAgent};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::session::Writer;
use crate::threads;

/// How much is read at once.
const PIECE_BYTES: usize = 64 << 10;

/// The thread that sends an input. Dropping it stops the reading.
pub(super) struct Feeder {
    account: Arc<Account>,
    /// Readable once the command is over.
    stop: Arc<OwnedFd>,
}

/// What may still be sent; the feeding thread spends, the session's regains.
#[derive(Default)]
struct Account {
    // The credit, and whether the command is over.
    state: Mutex<(Credit, bool)>,
    changed: Condvar,
}

impl Account {
    fn lock(&self) -> MutexGuard<'_, (Credit, bool)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for credit; `None` once the command is over.
    fn available(&self) -> Option<usize> {
        let waiting = self.changed.wait_while(self.lock(), |(credit, over)| credit.left() == 0 && !*over);
        let (credit, over) = *waiting.unwrap_or_else(PoisonError::into_inner);
        (!over).then(|| credit.left())
    }
}

impl Feeder {
    /// Sends what comes from `input` to the command `id`, and then its end.
    ///
    /// # Errors
    /// There are no more descriptors, or threads.
    pub fn start(writer: Writer, id: u32, input: OwnedFd) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let account = Arc::<Account>::default();
        let feeder = Self { account: Arc::clone(&account), stop: Arc::clone(&stop) };
        threads::start("input", move || feed(&writer, id, input.into(), &account, &stop))?;
        Ok(feeder)
    }

    /// The command has taken so much. Returns false where it was not sent so much.
    #[must_use]
    pub fn regain(&self, bytes: u32) -> bool {
        let good = self.account.lock().0.regain(bytes);
        self.account.changed.notify_one();
        good
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.account.lock().1 = true;
        self.account.changed.notify_one();
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }
}

fn feed(writer: &Writer, id: u32, mut input: File, account: &Account, stop: &OwnedFd) {
    let mut buffer = vec![0; PIECE_BYTES];
    while let Some(credit) = account.available() {
        let mut fds = [PollFd::new(&input, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if fds[1].revents().is_empty() => {}
            Err(Errno::INTR) => continue,
            _ => return,
        }
        // An unreadable input ends like an empty one: the command sees its end.
        let count = input.read(&mut buffer[..credit.min(PIECE_BYTES)]).unwrap_or(0);
        // Cannot be overdrawn: only this thread spends.
        let _ = account.lock().0.spend(count);
        let sent = writer.send(&ToAgent::Stdin { id, data: buffer[..count].to_vec() });
        if sent.is_err() || count == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use kiln_wire::{CREDIT_BYTES, FrameReader, MAX_PAYLOAD_BYTES};

    use super::*;

    fn read(stream: &mut UnixStream, reader: &mut FrameReader) -> Vec<u8> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(payload) = reader.next().expect("frames") {
                match ToAgent::decode(&payload) {
                    Ok(ToAgent::Stdin { id: 7, data }) => return data,
                    other => panic!("{other:?}"),
                }
            }
            let count = stream.read(&mut buffer).expect("a socket");
            assert!(count > 0, "the feeder hung up");
            reader.push(&buffer[..count]);
        }
    }

    #[test]
    fn no_more_is_read_than_was_taken() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let (mut input, end) = UnixStream::pair().expect("a pair");
        let feeder = Feeder::start(Writer::new(ours), 7, end.into()).expect("an eventfd");
        let whole = vec![9; usize::try_from(CREDIT_BYTES).expect("small") + 1];
        let writing = thread::spawn(move || input.write_all(&whole).map(|()| input));
        let mut reader = FrameReader::new(MAX_PAYLOAD_BYTES);
        let mut bytes = 0;
        while bytes < usize::try_from(CREDIT_BYTES).expect("small") {
            bytes += read(&mut theirs, &mut reader).len();
        }
        assert_eq!(bytes, usize::try_from(CREDIT_BYTES).expect("small"));
        assert!(!feeder.regain(CREDIT_BYTES + 1));
        assert!(feeder.regain(1));
        assert_eq!(read(&mut theirs, &mut reader), [9]);
        assert!(feeder.regain(1));
        drop(writing.join().expect("no panic").expect("it was read"));
        assert!(read(&mut theirs, &mut reader).is_empty(), "the end of input");
    }

    #[test]
    fn what_comes_after_the_command_is_left_alone() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let (mut input, end) = UnixStream::pair().expect("a pair");
        let kept = end.try_clone().expect("a descriptor");
        drop(Feeder::start(Writer::new(ours), 7, end.into()).expect("an eventfd"));
        // The thread has ended when its half of the stream is closed.
        assert_eq!(theirs.read(&mut [0; 1]).expect("a socket"), 0);
        input.write_all(b"later").expect("room");
        let mut later = [0; 5];
        (&kept).read_exact(&mut later).expect("nobody took it");
        assert_eq!(&later, b"later");
    }
}
