//! pax extended headers (IEEE 1003.1-2017, "pax Extended Header"): records, and what they say of a member.

use std::collections::BTreeMap;

use super::TarError;
use super::sparse::Extent;
use crate::tree::Timestamp;

const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// Records in the order they were written; values are any bytes.
#[derive(Debug, Default)]
pub(super) struct Records(Vec<(Vec<u8>, Vec<u8>)>);

impl Records {
    /// Parses the body of an extended header, which lies at byte `at` of the archive.
    pub(super) fn parse(body: &[u8], at: u64) -> Result<Self, TarError> {
        let bad = || TarError::Header { at, what: "a pax record is malformed" };
        let mut records = Vec::new();
        let mut rest = body;
        while !rest.is_empty() {
            // "%d %s=%s\n", the number being the length of the whole record.
            let space = rest.iter().take(20).position(|&byte| byte == b' ').ok_or_else(bad)?;
            let length: usize = decimal(&rest[..space]).and_then(|n| n.try_into().ok()).ok_or_else(bad)?;
            let record = rest.get(space + 1..length).ok_or_else(bad)?;
            let record = record.strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record.iter().position(|&byte| byte == b'=').filter(|&at| at > 0).ok_or_else(bad)?;
            records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
            rest = &rest[length..];
        }
        Ok(Self(records))
    }

    /// Adds later records of a global header.
    pub(super) fn extend(&mut self, later: Self) {
        for (key, value) in later.0 {
            self.0.retain(|(old, _)| *old != key);
            self.0.push((key, value));
        }
    }
}

/// What records say of a member, as far as a tree can hold it.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub path: Option<Vec<u8>>,
    pub link_path: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    pub mtime: Option<Timestamp>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub sparse: Sparse,
}

/// GNU's records about sparse files (GNU tar manual, "Storing Sparse Files", versions 0.0, 0.1 and 1.0).
#[derive(Debug, Default)]
pub(super) struct Sparse {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    /// The file's whole length.
    pub size: Option<u64>,
    /// The map of versions 0.0 and 0.1.
    pub extents: Option<Vec<Extent>>,
}

impl Pax {
    /// The effect of `global` records, overridden by those `own` to the member.
    pub(super) fn new(global: &Records, own: Option<&Records>, at: u64) -> Result<Self, TarError> {
        let mut pax = Self::default();
        let mut sparse_name = None;
        for (key, value) in global.0.iter().chain(own.iter().flat_map(|own| &own.0)) {
            let bad = TarError::Header { at, what: "a pax record's value is malformed" };
            pax.apply(key, value, &mut sparse_name).ok_or(bad)?;
        }
        if sparse_name.is_some() {
            // The header's own name is made up, so that readers that do not know sparse files do no harm.
            pax.path = sparse_name;
        }
        Ok(pax)
    }

    fn apply(&mut self, key: &[u8], value: &[u8], sparse_name: &mut Option<Vec<u8>>) -> Option<()> {
        // "If <value> is empty, it shall delete any header block field, previously entered extended header value".
        let text = || Some(value.to_vec()).filter(|value| !value.is_empty());
        let number = || if value.is_empty() { Some(None) } else { decimal(value).map(Some) };
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link_path = text(),
            b"size" => self.size = number()?,
            b"uid" => self.uid = number()?,
            b"gid" => self.gid = number()?,
            b"mtime" => self.mtime = if value.is_empty() { None } else { Some(timestamp(value)?) },
            b"GNU.sparse.major" => self.sparse.major = number()?,
            b"GNU.sparse.minor" => self.sparse.minor = number()?,
            b"GNU.sparse.name" => *sparse_name = text(),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = number()?,
            b"GNU.sparse.map" => {
                let numbers: Option<Vec<u64>> = value.split(|&byte| byte == b',').map(decimal).collect();
                let numbers = numbers.filter(|numbers| numbers.len() % 2 == 0)?;
                self.sparse.extents = Some(
                    numbers.chunks_exact(2).map(|pair| Extent { offset: pair[0], length: pair[1] }).collect(),
                );
            }
            b"GNU.sparse.offset" => {
                let extent = Extent { offset: decimal(value)?, length: 0 };
                self.sparse.extents.get_or_insert_default().push(extent);
            }
            b"GNU.sparse.numbytes" => {
                self.sparse.extents.as_mut()?.last_mut()?.length = decimal(value)?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    self.xattrs.insert(xattr_name(name), value.to_vec());
                }
            }
        }
        Some(())
    }
}

/// An attribute's name, of which GNU tar writes `=` and `%` as `%3D` and `%25`.
fn xattr_name(mut text: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(text.len());
    loop {
        text = match text {
            [] => return name,
            [b'%', b'3', b'D', rest @ ..] => {
                name.push(b'=');
                rest
            }
            [b'%', b'2', b'5', rest @ ..] => {
                name.push(b'%');
                rest
            }
            [byte, rest @ ..] => {
                name.push(*byte);
                rest
            }
        };
    }
}

/// A number of decimal digits alone.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds, possibly negative and with a fraction, of which what is below a nanosecond is cut off downwards.
fn timestamp(text: &[u8]) -> Option<Timestamp> {
    let (is_negative, text) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let whole = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    let has_remainder = fraction.iter().skip(9).any(|&digit| digit != b'0');
    Some(match (is_negative, nanoseconds + u32::from(is_negative && has_remainder)) {
        (false, nanoseconds) => Timestamp { seconds: whole, nanoseconds },
        (true, 0) => Timestamp { seconds: -whole, nanoseconds: 0 },
        (true, up) => Timestamp { seconds: -whole - 1, nanoseconds: 1_000_000_000 - up },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_keep_newlines_and_equals_signs_in_values() {
        let records = Records::parse(b"12 path=a\nb\n8 k=a=b\n6 gid=\n5 a=\n", 0);
        assert!(records.is_err(), "a length that ends within the record is refused");
        let records = Records::parse(b"12 path=a\nb\n8 k=a=b\n7 gid=\n5 a=\n", 0).expect("good records");
        let expected: [(&[u8], &[u8]); 4] = [(b"path", b"a\nb"), (b"k", b"a=b"), (b"gid", b""), (b"a", b"")];
        assert_eq!(records.0, expected.map(|(key, value)| (key.to_vec(), value.to_vec())));
    }

    #[test]
    fn malformed_records_are_refused() {
        for body in [
            &b"x"[..],
            b"5",
            b"5 ",
            b"0 a=\n",
            b"1 a=\n",
            b"2 a=\n",
            b"4 a=\n",
            b"6 a=\n",
            b"5 =a\n",
            b"5 aa\n",
            b"+5 a=",
            b"-5 a=\n",
            b"5  a=\n",
            b"99999999999999999999 a=\n",
            b"18446744073709551615 a=\n",
            b"\0\0\0\0",
        ] {
            assert!(Records::parse(body, 0).is_err(), "{}", body.escape_ascii());
        }
    }

    #[test]
    fn a_time_has_a_sign_and_a_fraction() {
        for (text, expected) in [
            ("0", Some((0, 0))),
            ("1700000000.25", Some((1_700_000_000, 250_000_000))),
            ("1.0000000019", Some((1, 1))),
            ("-1", Some((-1, 0))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-0.5", Some((-1, 500_000_000))),
            ("-0.0000000001", Some((-1, 999_999_999))),
            ("9223372036854775807.", Some((i64::MAX, 0))),
            ("9223372036854775808", None),
            ("", None),
            (".5", None),
            ("1.5e3", None),
            ("+1", None),
            ("--1", None),
        ] {
            let parsed = timestamp(text.as_bytes()).map(|time| (time.seconds, time.nanoseconds));
            assert_eq!(parsed, expected, "{text}");
        }
    }

    #[test]
    fn own_records_override_global_ones_and_empty_ones_delete() {
        let global = Records::parse(b"9 path=g\n8 uid=7\n8 gid=8\n", 0).expect("good records");
        let own = Records::parse(b"7 uid=\n8 gid=9\n", 0).expect("good records");
        let pax = Pax::new(&global, Some(&own), 0).expect("good values");
        assert_eq!((pax.path.as_deref(), pax.uid, pax.gid), (Some(&b"g"[..]), None, Some(9)));
    }
}
