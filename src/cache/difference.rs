//! The first thing in which the files of now differ from what a step was told, in words.

use std::fmt;

use kiln_digest::Digest;
use kiln_virtio::fs::record::PathBytes;

/// What is different about a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// It was looked for in vain, and is there now.
    Appeared,
    /// It was there, and is not now.
    Vanished,
    /// It is of another kind: what it was and is.
    Kind(&'static str, &'static str),
    /// It has another content: the digests.
    Content(Option<Digest>, Digest),
    /// It has other permissions.
    Mode(u32, u32),
    /// It has another size, and only that was asked about.
    Size(u64, u64),
    /// A folder that was listed has other entries.
    Listing,
    /// It has other extended attributes.
    Xattrs,
    /// It cannot be read: the system's word.
    Unreadable(String),
    /// The share is not there any more.
    NoShare,
}

/// A difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Where the guest saw the share.
    pub guest: String,
    /// The path in it.
    pub path: PathBytes,
    /// What is different about it.
    pub what: What,
}

/// The first digits of a digest.
fn short(digest: &Digest) -> String {
    digest.to_string().chars().take(12).collect()
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.0.is_empty() {
            true => write!(f, "`{}`", self.guest)?,
            false => write!(f, "`{}/{}`", self.guest, self.path)?,
        }
        match &self.what {
            What::Appeared => f.write_str(", which it looked for in vain, is there now"),
            What::Vanished => f.write_str(" is gone"),
            What::Kind(was, is) => write!(f, " was a {was} and is a {is}"),
            What::Content(Some(was), is) => write!(f, " changed: content {} was {}", short(is), short(was)),
            What::Content(None, _) => f.write_str(" changed"),
            What::Mode(was, is) => write!(f, " changed: mode {:04o} was {:04o}", is & 0o7777, was & 0o7777),
            What::Size(was, is) => write!(f, " changed: size {is} was {was}"),
            What::Listing => f.write_str(", which it listed, has other entries now"),
            What::Xattrs => f.write_str(" has other extended attributes"),
            What::Unreadable(why) => write!(f, " cannot be read: {why}"),
            What::NoShare => f.write_str(" is not there for it any more"),
        }
    }
}
