//! Fetching: what comes from outside, by digest, and the lock file that names it.
//!
//! - [`lock`]: `kiln.lock`, every byte that came from outside.
//! - [`http`]: a client that gives back only what has the digest that was asked for.
//! - [`vendor`]: the bytes that a lock names, carried along in a directory or an archive.
//! - [`git`]: the tree of a commit, as an archive.
//!
//! What a source *means* (an index, a package, a layer) is the business of the rooms in `root`.

pub mod git;
pub mod http;
pub mod lock;
mod unfinished;
pub mod vendor;
