//! How long a thread that serves queues looks out for the next request before it sleeps: a thread that sleeps is woken too
//! slowly for a guest that asks one thing after the other.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

/// How long at most. An emulated guest takes about 0.1 ms to ask its next.
const MOST: Duration = Duration::from_micros(400);
/// How long where it was in vain before.
const LEAST: Duration = Duration::from_micros(20);

/// Grows with each look-out that was not in vain, and shrinks with each that was.
#[derive(Debug, Clone, Copy)]
pub struct Patience(Duration);

impl Default for Patience {
    fn default() -> Self {
        Self(MOST)
    }
}

impl Patience {
    /// Looks out until `has_come` says so, or patience ends.
    pub fn look_out(&mut self, mut has_come: impl FnMut() -> bool) {
        let began = Instant::now();
        loop {
            if has_come() {
                self.0 = (self.0 * 2).min(MOST);
                return;
            }
            if began.elapsed() >= self.0 {
                self.0 = (self.0 / 2).max(LEAST);
                return;
            }
            for _ in 0..50 {
                std::hint::spin_loop();
            }
            std::thread::yield_now();
        }
    }
}

/// Whether the driver made something available that `queue` has not taken. A ring that cannot be looked at is for whoever
/// works on it to complain about.
pub fn has_come<B: Bitmap + 'static>(queue: &Queue, memory: &GuestMemoryMmap<B>) -> bool {
    let available = || queue.avail_idx(memory, Ordering::Acquire);
    queue.ready() && available().is_ok_and(|index| index.0 != queue.next_avail())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_shrinks_when_it_was_in_vain_and_grows_again() {
        let mut patience = Patience::default();
        for _ in 0..10 {
            patience.look_out(|| false);
        }
        assert_eq!(patience.0, LEAST);
        for _ in 0..10 {
            patience.look_out(|| true);
        }
        assert_eq!(patience.0, MOST);
    }
}
