//! The last bytes of what a process or a guest's console prints, read by a thread that ends with the stream.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::threads;

const KEPT_BYTES: usize = 64 << 10;

/// Keeps the end of a stream.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail {
    // The last KEPT_BYTES of the stream, written by the reading thread only.
    kept: Arc<Mutex<VecDeque<u8>>>,
    // The stream whose peer is hung up on when this one ends; none once it has ended.
    at_end: Arc<Mutex<AtEnd>>,
}

#[derive(Debug, Default)]
enum AtEnd {
    #[default]
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
            let mut at_end = kept.at_end.lock().unwrap_or_else(PoisonError::into_inner);
            if let AtEnd::HangUp(other) = std::mem::replace(&mut *at_end, AtEnd::Ended) {
                let _ = other.shutdown(Shutdown::Both);
            }
        })?;
        Ok(tail)
    }

    /// Hangs up on `other` when the stream ends, or now if it has ended.
    pub fn hang_up_at_end(&self, other: UnixStream) {
        let mut at_end = self.at_end.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*at_end, AtEnd::Ended) {
            let _ = other.shutdown(Shutdown::Both);
        } else {
            *at_end = AtEnd::HangUp(other);
        }
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
