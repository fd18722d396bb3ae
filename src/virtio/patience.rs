//! How long a thread that serves queues looks out for the next request before it sleeps: a thread that sleeps is woken too
//! slowly for a guest that asks one thing after the other.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

/// How long at most. An emulated guest takes 0.1 to 0.4 ms to ask its next.
const MOST: Duration = Duration::from_millis(1);
/// How long where it was in vain before.
const LEAST: Duration = Duration::from_micros(20);

/// Twice as long as the next request took lately, where that was worth looking out for; shrinks with each that was not.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    window: Duration,
    /// When it began to look out in vain for the request that is to come.
    waits_since: Option<Instant>,
}

impl Default for Patience {
    fn default() -> Self {
        Self { window: MOST, waits_since: None }
    }
}

impl Patience {
    /// Looks out until `has_come` says so, or patience ends.
    pub fn look_out(&mut self, mut has_come: impl FnMut() -> bool) {
        let began = Instant::now();
        self.waits_since = Some(began);
        loop {
            if has_come() {
                return self.met();
            }
            if began.elapsed() >= self.window {
                return;
            }
            for _ in 0..50 {
                std::hint::spin_loop();
            }
            std::thread::yield_now();
        }
    }

    /// To be called when a request has come, whether it was looked out for or told of: one that came soon after it was
    /// no longer looked out for shows that patience was too short.
    pub fn met(&mut self) {
        if let Some(began) = self.waits_since.take() {
            self.learn(began.elapsed());
        }
    }

    fn learn(&mut self, took: Duration) {
        self.window =
            if took <= MOST { self.window.max(took * 2).min(MOST) } else { (self.window / 2).max(LEAST) };
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
    fn patience_shrinks_with_each_request_that_takes_long_and_grows_with_one_that_does_not() {
        let mut patience = Patience::default();
        for _ in 0..10 {
            patience.learn(Duration::from_secs(1));
        }
        assert_eq!(patience.window, LEAST);
        patience.learn(Duration::from_micros(100));
        assert_eq!(patience.window, Duration::from_micros(200), "though nobody looked out for so long");
        patience.learn(MOST);
        assert_eq!(patience.window, MOST);
    }

    #[test]
    fn a_request_that_was_not_waited_for_long_enough_counts_once_it_is_told_of() {
        let mut patience = Patience { window: LEAST, waits_since: None };
        patience.look_out(|| false);
        std::thread::sleep(2 * MOST);
        patience.met();
        assert_eq!((patience.window, patience.waits_since), (LEAST, None));
        patience.look_out(|| false);
        patience.waits_since = Some(Instant::now());
        patience.met();
        patience.look_out(|| true);
        assert!(patience.waits_since.is_none());
    }
}
