//! The primitives that messages are made of: little-endian numbers, counted bytes, checked paths and names.
//!
//! A counted value is a u32 length and its bytes; a list is a u32 count and its items. Writing checks no limits: a
//! message that breaks one is encoded as it is, and the peer's [`Reader`] refuses it.

use crate::message::{MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_TEXT_BYTES};

/// Bytes that are no message of this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The payload ends inside a value.
    #[error("message ends inside {what}")]
    Short {
        /// The value.
        what: &'static str,
    },
    /// Bytes follow the message.
    #[error("{extra} bytes follow the message")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// A tag that stands for nothing.
    #[error("{what} has the unknown tag {tag}")]
    Tag {
        /// What was expected.
        what: &'static str,
        /// The byte found.
        tag: u8,
    },
    /// A length or count over its limit.
    #[error("{what} claims {claimed}, at most {limit} are allowed")]
    Limit {
        /// The value.
        what: &'static str,
        /// What it claims.
        claimed: usize,
        /// The limit.
        limit: usize,
    },
    /// Bytes that must be UTF-8 and are not.
    #[error("{what} is not UTF-8")]
    Utf8 {
        /// The value.
        what: &'static str,
    },
    /// A value outside of what its type can mean, such as a path with a NUL in it.
    #[error("{what} is not valid")]
    Invalid {
        /// The value.
        what: &'static str,
    },
}

/// Appends values to a payload.
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new(tag: u8) -> Self {
        Self(vec![tag])
    }

    /// Like `new`, with room for a bulk of `bytes`, which then is copied once.
    pub(crate) fn with_room(tag: u8, bytes: usize) -> Self {
        let mut payload = Vec::with_capacity(bytes.saturating_add(32));
        payload.push(tag);
        Self(payload)
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.u8(value.into());
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn i64(&mut self, value: i64) {
        self.raw(&value.to_le_bytes());
    }

    /// A count; one that does not fit is over every limit, as is the u32::MAX written for it.
    pub(crate) fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.raw(bytes);
    }

    pub(crate) fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }
}

/// Takes values off a payload. `what` names the value in errors.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(payload: &'a [u8]) -> Self {
        Self(payload)
    }

    /// Ends the message.
    pub(crate) fn finish(self) -> Result<(), DecodeError> {
        match self.0.len() {
            0 => Ok(()),
            extra => Err(DecodeError::Trailing { extra }),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], DecodeError> {
        let (value, rest) = self.0.split_first_chunk::<N>().ok_or(DecodeError::Short { what })?;
        self.0 = rest;
        Ok(*value)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        self.array(what).map(u8::from_le_bytes)
    }

    pub(crate) fn bool(&mut self, what: &'static str) -> Result<bool, DecodeError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            tag => Err(DecodeError::Tag { what, tag }),
        }
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, DecodeError> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn positive(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        match self.u32(what)? {
            0 => Err(DecodeError::Invalid { what }),
            value => Ok(value),
        }
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&mut self, what: &'static str) -> Result<i64, DecodeError> {
        self.array(what).map(i64::from_le_bytes)
    }

    pub(crate) fn nanoseconds(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        match self.u32(what)? {
            value if value < 1_000_000_000 => Ok(value),
            _ => Err(DecodeError::Invalid { what }),
        }
    }

    fn count(&mut self, limit: usize, what: &'static str) -> Result<usize, DecodeError> {
        let claimed = usize::try_from(self.u32(what)?).unwrap_or(usize::MAX);
        if claimed > limit {
            return Err(DecodeError::Limit { what, claimed, limit });
        }
        Ok(claimed)
    }

    /// Counted bytes, borrowed: nothing is allocated before they are known to be there.
    pub(crate) fn slice(&mut self, limit: usize, what: &'static str) -> Result<&'a [u8], DecodeError> {
        let length = self.count(limit, what)?;
        let (value, rest) = self.0.split_at_checked(length).ok_or(DecodeError::Short { what })?;
        self.0 = rest;
        Ok(value)
    }

    pub(crate) fn bytes(&mut self, limit: usize, what: &'static str) -> Result<Vec<u8>, DecodeError> {
        self.slice(limit, what).map(<[u8]>::to_vec)
    }

    /// Counted bytes that go into system calls as C strings.
    pub(crate) fn c_bytes(&mut self, limit: usize, what: &'static str) -> Result<Vec<u8>, DecodeError> {
        let value = self.slice(limit, what)?;
        if value.contains(&0) {
            return Err(DecodeError::Invalid { what });
        }
        Ok(value.to_vec())
    }

    fn utf8(&mut self, limit: usize, what: &'static str) -> Result<String, DecodeError> {
        let value = self.slice(limit, what)?;
        std::str::from_utf8(value).map(str::to_owned).map_err(|_| DecodeError::Utf8 { what })
    }

    /// A line or sentence for people; any characters, the receiver escapes them.
    pub(crate) fn text(&mut self, what: &'static str) -> Result<String, DecodeError> {
        self.utf8(MAX_TEXT_BYTES, what)
    }

    /// A name that becomes one component of a path or a word for the kernel; may be empty.
    pub(crate) fn name(&mut self, what: &'static str) -> Result<String, DecodeError> {
        let name = self.utf8(MAX_NAME_BYTES, what)?;
        if name.bytes().any(|byte| byte == 0 || byte == b'/') || name == "." || name == ".." {
            return Err(DecodeError::Invalid { what });
        }
        Ok(name)
    }

    /// An absolute path. `..` is allowed: it is resolved inside the step's root.
    pub(crate) fn absolute_path(&mut self, what: &'static str) -> Result<Vec<u8>, DecodeError> {
        let path = self.c_bytes(MAX_PATH_BYTES, what)?;
        if path.first() != Some(&b'/') {
            return Err(DecodeError::Invalid { what });
        }
        Ok(path)
    }

    /// A path that can be joined to a directory and stays beneath it: components that are neither empty nor `.` nor
    /// `..`, between single slashes. The empty path is the directory itself.
    pub(crate) fn relative_path(&mut self, what: &'static str) -> Result<Vec<u8>, DecodeError> {
        let path = self.c_bytes(MAX_PATH_BYTES, what)?;
        let stray =
            |name: &[u8]| name.is_empty() || name == b"." || name == b".." || name.len() > MAX_NAME_BYTES;
        if !path.is_empty() && path.split(|&byte| byte == b'/').any(stray) {
            return Err(DecodeError::Invalid { what });
        }
        Ok(path)
    }

    /// A list of at most `limit` items. The vector grows with the items that are there, not with the count.
    pub(crate) fn list<T>(
        &mut self,
        limit: usize,
        what: &'static str,
        mut item: impl FnMut(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let count = self.count(limit, what)?;
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(item(self)?);
        }
        Ok(items)
    }
}
