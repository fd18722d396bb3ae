//! The door to threads: a host may give none, because of its limits, and then whoever asked learns what for.
//!
//! Work that several threads share is done by those there are, the caller's among them.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle, available_parallelism};

use rustix::io::Errno;

/// What to do about [`Refused`].
pub const HINT: &str = "raise the limit of processes (`ulimit -u`) or of memory (`ulimit -v`), or that of the container or service, or end some that run";

/// The system's word for it, which is all that is left in what another process says.
pub const REFUSAL: &str = "Resource temporarily unavailable";

/// The host gives no more threads or processes.
#[derive(Debug, thiserror::Error)]
#[error("the host gives no {what}")]
pub struct Refused {
    what: String,
    #[source]
    source: io::Error,
}

impl Refused {
    /// `error`, which starting a process or thread said: where the host gives no `what`, it says so.
    pub fn told(what: impl Into<String>) -> impl FnOnce(io::Error) -> io::Error {
        move |error| match Errno::from_io_error(&error) {
            Some(Errno::AGAIN) => io::Error::new(error.kind(), Self { what: what.into(), source: error }),
            _ => error,
        }
    }

    /// Whether `error` comes of it.
    pub fn is_behind(error: &(dyn std::error::Error + 'static)) -> bool {
        let mut next = Some(error);
        while let Some(error) = next {
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            if inner.is_some_and(|inner| inner.is::<Self>()) {
                return true;
            }
            next = error.source();
        }
        false
    }
}

/// Stack of a thread that only passes something on.
const SMALL_STACK_BYTES: usize = 256 << 10;

/// Starts a thread that does `work`.
///
/// # Errors
/// The host gives none.
pub fn start<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.to_owned()).spawn(work).map_err(Refused::told(words(name)))
}

/// The same, with a stack of 256 KiB: for work that waits, and does little then.
///
/// # Errors
/// The host gives none.
pub fn start_small<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = Builder::new().name(name.to_owned()).stack_size(SMALL_STACK_BYTES);
    builder.spawn(work).map_err(Refused::told(words(name)))
}

/// The same, within `scope`.
///
/// # Errors
/// The host gives none.
pub fn start_in<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    Builder::new().name(name.to_owned()).spawn_scoped(scope, work).map_err(Refused::told(words(name)))
}

fn words(name: &str) -> String {
    format!("thread `{name}`")
}

/// Does `work` on `count` threads, the caller's among them, or on as many as there are.
pub fn share(count: usize, name: &str, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 1..count {
            if start_in(scope, name, &work).is_err() {
                break;
            }
        }
        work();
    });
}

/// Most threads of [`map`]: what it is for holds whole files in memory.
const MOST_MAPPING: usize = 4;

/// What `work` makes of `items`, in their order, on as many threads as there are processors, and four at most. Items are
/// begun in their order, and no more of them once one has failed.
///
/// # Errors
/// Of the items that failed, the error of the first.
pub fn map<T: Sync, R: Send, E: Send>(
    items: &[T],
    name: &str,
    work: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let count = available_parallelism().map_or(1, usize::from).min(MOST_MAPPING).min(items.len());
    let (next, has_failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    // Protects what was made so far, by the places of the items.
    let made = Mutex::new(BTreeMap::new());
    share(count, name, || {
        while !has_failed.load(Ordering::Relaxed) {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(place) else { break };
            let result = work(item);
            has_failed.fetch_or(result.is_err(), Ordering::Relaxed);
            made.lock().unwrap_or_else(PoisonError::into_inner).insert(place, result);
        }
    });
    made.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_host_refused_is_told_so() {
        let refused = Refused::told("thread `x`")(Errno::AGAIN.into());
        assert_eq!(refused.to_string(), "the host gives no thread `x`");
        assert!(Refused::is_behind(&refused));
        let other = Refused::told("thread `x`")(Errno::NOMEM.into());
        assert!(!Refused::is_behind(&other));
        // What a time-out of a socket says is the same number.
        assert!(!Refused::is_behind(&io::Error::from(Errno::AGAIN)));
    }

    #[test]
    fn what_is_made_of_items_is_in_their_order_and_the_first_error_is_the_one() {
        let items: Vec<u32> = (0..100).collect();
        assert_eq!(map(&items, "map", |item| Ok::<_, ()>(item * 2)), Ok((0..100).map(|n| n * 2).collect()));
        assert_eq!(map(&items, "map", |&item| if item < 50 { Ok(item) } else { Err(item) }), Err(50));
        assert_eq!(map(&[], "map", |_: &()| Err::<(), _>(())), Ok(Vec::new()));
    }

    #[test]
    fn shared_work_is_done_by_the_caller_too() {
        let left = Mutex::new(100);
        let take = || {
            let mut left = left.lock().expect("no panic");
            (*left > 0).then(|| *left -= 1)
        };
        for count in [0, 1, 4] {
            *left.lock().expect("no panic") = 100;
            share(count, "share", || while take().is_some() {});
            assert_eq!(*left.lock().expect("no panic"), 0);
        }
    }
}
