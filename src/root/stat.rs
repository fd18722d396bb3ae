//! Whether a file is as it was when it was hashed last, told by its times without reading it.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// A file changed less than this before it was hashed may change again without its times showing it.
const RACY: Duration = Duration::from_secs(2);

/// What identified a file's content when it was hashed: device, inode, size, modification and change time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stat(u64, u64, u64, i64, i64, i64, i64);

impl Stat {
    pub fn of(meta: &Metadata) -> Self {
        let (m, c) = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
        Self(meta.dev(), meta.ino(), meta.size(), m.0, m.1, c.0, c.1)
    }

    /// Whether a later change would show: what is younger must be hashed again the next time.
    pub fn is_old(&self, now: SystemTime) -> bool {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(self.5).is_ok_and(|changed| changed + RACY.as_secs() < since.as_secs())
    }
}
