//! The last bytes of what a process or a guest's console prints, read by a thread that ends with the stream.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::threads;

const KEPT_BYTES: usize = 64 << 10;

/// Keeps the end of a stream.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail {
    // The last KEPT_BYTES of the stream, written by the reading thread only.
    kept: Arc<Mutex<VecDeque<u8>>>,
    // The stream whose peer is hung up on when this one ends; none once it has ended, which is told.
    at_end: Arc<(Mutex<AtEnd>, Condvar)>,
}

#[derive(Debug, Default)]
enum AtEnd {
    #[default]
    Unread,
    Nothing,
    HangUp(UnixStream),
    Ended,
}

impl Tail {
    /// Reads `stream` until it ends, in a thread of its own.
    ///
    /// # Errors
    /// There is no thread.
    pub fn follow(mut stream: impl Read + Send + 'static) -> io::Result<Self> {
        let tail = Self::default();
        *tail.at_end() = AtEnd::Nothing;
        let kept = tail.clone();
        threads::start("tail", move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                let mut bytes = kept.lock();
                bytes.extend(&buffer[..count]);
                let excess = bytes.len().saturating_sub(KEPT_BYTES);
                bytes.drain(..excess);
            }
            drop(stream);
            if let AtEnd::HangUp(other) = std::mem::replace(&mut *kept.at_end(), AtEnd::Ended) {
                let _ = other.shutdown(Shutdown::Both);
            }
            kept.at_end.1.notify_all();
        })?;
        Ok(tail)
    }

    /// Hangs up on `other` when the stream ends, or now if it has ended.
    pub fn hang_up_at_end(&self, other: UnixStream) {
        let mut at_end = self.at_end();
        if matches!(*at_end, AtEnd::Ended) {
            let _ = other.shutdown(Shutdown::Both);
        } else {
            *at_end = AtEnd::HangUp(other);
        }
    }

    /// Waits until the stream has ended, for `patience` at most. Where nobody reads it there is nothing to wait for.
    pub fn wait_for_end(&self, patience: Duration) {
        let is_read = |at_end: &mut AtEnd| !matches!(at_end, AtEnd::Ended | AtEnd::Unread);
        drop(self.at_end.1.wait_timeout_while(self.at_end(), patience, is_read));
    }

    fn at_end(&self) -> MutexGuard<'_, AtEnd> {
        self.at_end.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was kept, with control characters made harmless.
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = self.lock().iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
    }
}
