//! Proof, by type, that an answer is in the record.
//!
//! The server can only send a [`Recorded`] or a [`Refusal`], and each has few constructors, all of them here:
//! one for every kind of note, which makes the note, and one for what is the same whatever the host has. So an
//! answer about a share that was not noted does not compile; which note belongs to an answer is decided in
//! `tree`, the only place that sees what is not proven yet.

use std::collections::BTreeMap;

use rustix::io::Errno;

use super::index::{Index, NodeId};
use super::missed::Missed;
use super::record::{Change, Observed};

/// An answer that may be given: what it tells is in the record.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Recorded<T>(T);

impl<T> Recorded<T> {
    /// `answer`, once it is noted that it tells `what` of `node`.
    pub fn observation(index: &mut Index, node: NodeId, what: Observed, answer: T) -> Self {
        index.observe(node, what);
        Self(answer)
    }

    /// `answer`, once it is noted that there is no `name` in `directory`.
    ///
    /// # Errors
    /// EIO where there is no room for the note: the answer is not given.
    pub fn absence(missed: &mut Missed, directory: NodeId, name: &[u8], answer: T) -> Result<Self, Refusal> {
        if missed.insert(directory.place(), name) { Ok(Self(answer)) } else { Err(Refusal(Errno::IO)) }
    }

    /// An answer that tells nothing of what is shared: it follows from the request and from how the device was
    /// set up.
    pub fn constant(answer: T) -> Self {
        Self(answer)
    }

    /// The same in another form.
    pub fn map<U>(self, form: impl FnOnce(T) -> U) -> Recorded<U> {
        Recorded(form(self.0))
    }

    /// The same in another form, which may be that of an error: the note covers it.
    ///
    /// # Errors
    /// What `form` says.
    pub fn and_then<U>(self, form: impl FnOnce(T) -> Result<U, Errno>) -> Result<Recorded<U>, Refusal> {
        form(self.0).map(Recorded).map_err(Refusal)
    }

    /// The answer, to be sent.
    pub fn into_answer(self) -> T {
        self.0
    }
}

/// An error that may be given as an answer: what it tells of the host is in the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal(Errno);

impl Refusal {
    /// An error that follows from the request and from what was answered before.
    pub fn constant(error: Errno) -> Self {
        Self(error)
    }

    /// `error`, once it is noted that `node` is not as the guest was told, or refused.
    pub fn change(changes: &mut Changes, node: NodeId, what: Change, error: Errno) -> Self {
        changes.note(node, what);
        Self(error)
    }

    /// The error, to be sent.
    pub fn errno(self) -> Errno {
        self.0
    }
}

/// What did not hold still, by node: how, the first time that was seen.
#[derive(Debug, Default)]
pub struct Changes(BTreeMap<NodeId, Change>);

impl Changes {
    /// Notes a change. Only the first of a node counts.
    pub fn note(&mut self, node: NodeId, what: Change) {
        self.0.entry(node).or_insert(what);
    }

    /// True where all held still.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How a node changed, if it did.
    pub fn of(&self, node: NodeId) -> Option<Change> {
        self.0.get(&node).copied()
    }
}
