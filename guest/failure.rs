//! What the host is told when a request fails: what was being done, to what, and the kernel's reason.

use std::io;

use kiln_wire::{FromAgent, MAX_TEXT_BYTES};
use rustix::io::Errno;

/// A request that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {errno}")]
pub struct Failure {
    /// What was being done, to what; no reason in it.
    pub what: String,
    /// The kernel's reason.
    pub errno: Errno,
}

impl Failure {
    /// A failure that the agent itself found.
    pub fn new(what: impl Into<String>, errno: Errno) -> Self {
        Self { what: what.into(), errno }
    }

    /// The message for the host.
    pub fn message(self) -> FromAgent {
        FromAgent::Failed { what: cut(self.what), errno: errno_number(self.errno) }
    }
}

/// Linux's number of an error.
pub fn errno_number(errno: Errno) -> u16 {
    u16::try_from(errno.raw_os_error()).unwrap_or(0)
}

/// Cuts a text to what a message may hold.
pub fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
    text
}

/// Says what was being done when a system call failed.
pub trait Doing<T> {
    /// Adds `what`, which is only written down on failure.
    ///
    /// # Errors
    /// Those of the system call.
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T, Failure>;
}

impl<T> Doing<T> for Result<T, Errno> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T, Failure> {
        self.map_err(|errno| Failure::new(what(), errno))
    }
}

impl<T> Doing<T> for io::Result<T> {
    fn doing<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(what(), Errno::from_io_error(&error).unwrap_or(Errno::IO)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let text = cut("ä".repeat(MAX_TEXT_BYTES) + "x");
        assert_eq!(text.len(), MAX_TEXT_BYTES);
        let odd = cut(format!("x{}", "ä".repeat(MAX_TEXT_BYTES)));
        assert_eq!(odd.len(), MAX_TEXT_BYTES - 1);
    }
}
