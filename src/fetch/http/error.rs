//! Why something could not be fetched.

use std::io;
use std::path::{Path, PathBuf};

use kiln_digest::Digest;

use super::authority::Untrusted;
use crate::fetch::vendor::VendorError;

/// Why something could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No answer that is worth anything.
    #[error("cannot fetch {what} from `{url}`")]
    Unreachable {
        /// What was wanted, for people.
        what: String,
        /// Where it was looked for last.
        url: String,
        /// Why that failed.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The server's certificate is not to be trusted.
    #[error("{what} is not fetched from `{url}`: the server's certificate {why}")]
    Certificate {
        /// What was wanted.
        what: String,
        /// Where it was looked for last.
        url: String,
        /// What is wrong with it.
        why: Untrusted,
        /// The word of the one who looked at it.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The server has no such file.
    #[error("{what} is not at `{url}`")]
    Missing {
        /// What was wanted.
        what: String,
        /// Where it was looked for last.
        url: String,
    },
    /// A file:// mirror or the store cannot be read or written.
    #[error("cannot fetch {what} from `{url}`")]
    Io {
        /// What was wanted.
        what: String,
        /// Where from.
        url: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// More bytes than there may be, or fewer than there must be.
    #[error("{what} from `{url}` has {found} bytes where {expected} were expected")]
    Size {
        /// What was wanted.
        what: String,
        /// Where from.
        url: String,
        /// Its size in bytes, or the most it may have.
        expected: u64,
        /// How many came; where there were too many, those read before giving up.
        found: u64,
    },
    /// Other bytes than those that were asked for. Nothing of them was kept.
    #[error("{what} from `{url}` has digest {found}, not {expected}")]
    Digest {
        /// What was wanted.
        what: String,
        /// Where from.
        url: String,
        /// The digest it must have.
        expected: Digest,
        /// The digest it has.
        found: Digest,
    },
    /// A URL that is neither http, https nor file.
    #[error("`{url}` is not an http, https or file URL")]
    Url {
        /// The URL.
        url: String,
    },
    /// There is no place to fetch it from.
    #[error("{what} is not in the store, and there is nowhere to fetch it from")]
    NoSource {
        /// What was wanted.
        what: String,
    },
    /// It may not be fetched.
    #[error("{what} is not in the store{}, and --offline fetches nothing", vendor_text(.vendor.as_deref()))]
    Offline {
        /// What was wanted.
        what: String,
        /// The vendored bytes that lack it, where there are some.
        vendor: Option<PathBuf>,
    },
    /// It came so slowly that it was given up.
    #[error("{what} comes too slowly from `{url}`: {bytes} bytes in {seconds} s")]
    Slow {
        /// What was wanted.
        what: String,
        /// Where from.
        url: String,
        /// How much had come.
        bytes: u64,
        /// In how many seconds.
        seconds: u64,
    },
    /// It is among vendored bytes that cannot be used.
    #[error("{what} cannot be had from vendored bytes")]
    Vendor {
        /// What was wanted.
        what: String,
        /// What is wrong with them.
        #[source]
        source: Box<VendorError>,
    },
}

fn vendor_text(vendor: Option<&Path>) -> String {
    vendor.map(|path| format!(" nor among the vendored bytes in `{}`", path.display())).unwrap_or_default()
}

impl FetchError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { source, .. } if matches!(**source, ureq::Error::RequireHttpsOnly(_)) => {
                Some("the server leads from https to http, which is not followed: name another URL".into())
            }
            Self::Certificate { why, .. } => Some(why.hint()),
            Self::Unreachable { .. } | Self::NoSource { .. } => Some(
                "connect this host to the network, set http_proxy, or name a mirror that it can reach \
                 (a file:// folder will do)"
                    .into(),
            ),
            Self::Missing { .. } => Some(
                "the mirror may have moved on: name one that keeps old versions with --debian-snapshot, or lock again \
                 with `kiln lock update`"
                    .into(),
            ),
            Self::Digest { .. } | Self::Size { .. } => {
                Some("the mirror or something on the way changed it: try again, or use another mirror".into())
            }
            Self::Slow { .. } => Some("try again, or use another mirror".into()),
            Self::Offline { vendor: None, .. } => Some(
                "build once without --offline, or bring the bytes along: `kiln lock vendor DIR` where there is a network, \
                 --vendor DIR here"
                    .into(),
            ),
            Self::Offline { vendor: Some(_), .. } => Some(
                "make the vendored bytes anew where there is a network: `kiln lock vendor` takes all that the lock names \
                 now"
                    .into(),
            ),
            Self::Vendor { source, .. } => source.hint(),
            Self::Url { .. } | Self::Io { .. } => None,
        }
    }

    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }
}
