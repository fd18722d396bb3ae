//! A step's key: what it is, in named parts, so that two keys that differ can be told apart in words.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use kiln_digest::Digest;
use kiln_virtio::fs::record::PathBytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Counts up when a step of the same key would be shown something else by this kiln than by earlier ones.
const CONTRACT: u32 = 2;

/// What the digest of a key is of, before its parts.
const FIRST: &[u8] = b"kiln step key\0";

/// A part's name, most of which are the same for all steps, and its value.
type Part = (Cow<'static, str>, String);

/// What a step is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Key {
    // Shared: whoever notes what a step did has its key too, which may be long.
    #[serde(serialize_with = "write_parts", deserialize_with = "read_parts")]
    parts: Arc<Vec<Part>>,
    /// Of the parts, once somebody asked for it.
    #[serde(skip)]
    digest: OnceLock<Digest>,
}

fn write_parts<S: Serializer>(parts: &[Part], serializer: S) -> Result<S::Ok, S::Error> {
    parts.serialize(serializer)
}

fn read_parts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Vec<Part>>, D::Error> {
    Vec::deserialize(deserializer).map(Arc::new)
}

impl Default for Key {
    fn default() -> Self {
        let parts = Arc::new(vec![("contract".into(), CONTRACT.to_string())]);
        Self { parts, digest: OnceLock::new() }
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.parts == other.parts
    }
}

impl Eq for Key {}

impl Key {
    /// Adds a part. Names are for people; their order counts.
    pub fn add(&mut self, name: impl Into<Cow<'static, str>>, value: impl Into<String>) {
        Arc::make_mut(&mut self.parts).push((name.into(), value.into()));
        self.digest = OnceLock::new();
    }

    /// The value of the part `name`.
    pub fn value(&self, name: &str) -> Option<&String> {
        self.parts.iter().find(|(part, _)| part == name).map(|(_, value)| value)
    }

    /// The digest under which traces are kept.
    pub fn digest(&self) -> Digest {
        *self.digest.get_or_init(|| self.digest_of_parts())
    }

    fn digest_of_parts(&self) -> Digest {
        // In one piece: to hash so many short ones takes twice as long.
        let length: usize = self.parts.iter().map(|(name, value)| 16 + name.len() + value.len()).sum();
        let mut bytes = Vec::with_capacity(FIRST.len() + length);
        bytes.extend(FIRST);
        for text in self.parts.iter().flat_map(|(name, value)| [&**name, value]) {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        Digest::of(&bytes)
    }

    /// The first part in which this key differs from an `earlier` one, in words.
    pub fn difference(&self, earlier: &Self) -> Option<String> {
        let changed = self.parts.iter().find(|(name, now)| earlier.value(name) != Some(now));
        if let Some((name, now)) = changed {
            return Some(match earlier.value(name) {
                None => format!("{name} is new: {}", short(now)),
                Some(was) if was.contains('\n') || now.contains('\n') => {
                    format!("{name} changed{}", first_line(was, now))
                }
                Some(was) => {
                    let (was, now) = both(was, now);
                    format!("{name} was {was} and is {now}")
                }
            });
        }
        let gone = earlier.parts.iter().find(|(name, _)| self.value(name).is_none());
        gone.map(|(name, was)| format!("{name} is gone: it was {}", short(was)))
    }
}

/// Most characters of a value that are shown.
const LONGEST: usize = 100;

/// A value as it was written, on one line.
fn on_a_line(value: &str) -> String {
    // Most are escaped, so that no two are one text; what it meant is more to a reader.
    let written = PathBytes::from_escaped(value).and_then(|bytes| String::from_utf8(bytes.0).ok());
    written.as_deref().unwrap_or(value).replace('\n', "\\n")
}

/// What of `text` is shown: all of it, or what follows the first `from` characters.
fn cut(text: &str, from: usize) -> String {
    let (before, rest) = (if from == 0 { "" } else { "…" }, text.chars().skip(from));
    match rest.clone().count() {
        0..=LONGEST => format!("`{before}{}`", rest.collect::<String>()),
        _ => format!("`{before}{}…`", rest.take(LONGEST - 1).collect::<String>()),
    }
}

/// A value that fits on a line.
fn short(value: &str) -> String {
    cut(&on_a_line(value.trim_end()), 0)
}

/// Two values that differ, of long ones what is about the first difference.
fn both(was: &str, now: &str) -> (String, String) {
    let differ_before = was.trim_end() != now.trim_end();
    let [was, now] = [was, now].map(|value| on_a_line(if differ_before { value.trim_end() } else { value }));
    let alike = was.chars().zip(now.chars()).take_while(|(was, now)| was == now).count();
    let fit = [&was, &now].iter().all(|value| value.chars().count() <= LONGEST);
    let from = if fit || alike < LONGEST / 2 { 0 } else { alike - LONGEST / 4 };
    (cut(&was, from), cut(&now, from))
}

/// The first line in which two texts differ.
fn first_line(was: &str, now: &str) -> String {
    let (mut was, mut now) = (was.lines(), now.lines());
    loop {
        match (was.next(), now.next()) {
            (None, None) => return String::new(),
            (Some(was), Some(now)) if was == now => {}
            (Some(was), None) => return format!(": the line {} is gone", short(was)),
            (None, Some(now)) => return format!(": the line {} is new", short(now)),
            (Some(was), Some(now)) => {
                let (was, now) = both(was, now);
                return format!(": {now} was {was}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(parts: &[(&str, &str)]) -> Key {
        let mut key = Key::default();
        parts.iter().for_each(|(name, value)| key.add((*name).to_owned(), *value));
        key
    }

    #[test]
    fn no_two_lists_of_parts_have_one_digest() {
        let keys = [&[("a", "bc")][..], &[("ab", "c")], &[("a", "b"), ("c", "")], &[("a", "b")], &[]];
        let mut digests: Vec<Digest> = keys.iter().map(|parts| key(parts).digest()).collect();
        digests.sort_unstable();
        digests.dedup();
        assert_eq!(digests.len(), keys.len());
    }

    #[test]
    fn the_first_part_that_differs_is_named() {
        let was = key(&[("command", "a\nb\nc"), ("variable CFLAGS", "-O2")]);
        for (parts, words) in [
            (&[("command", "a\nx\nc"), ("variable CFLAGS", "-O3")][..], "command changed: `x` was `b`"),
            (&[("command", "a\nb\nc"), ("variable CFLAGS", "-O3")], "variable CFLAGS was `-O2` and is `-O3`"),
            (&[("command", "a\nb\nc"), ("variable CC", "gcc")], "variable CC is new: `gcc`"),
            (&[("command", "a\nb\nc")], "variable CFLAGS is gone: it was `-O2`"),
            (
                &[("command", "a\nb\nc"), ("variable CFLAGS", "-O2 %25s")],
                "variable CFLAGS was `-O2` and is `-O2 %s`",
            ),
        ] {
            assert_eq!(key(parts).difference(&was).as_deref(), Some(words));
        }
        assert_eq!(was.difference(&was), None);
    }

    #[test]
    fn of_long_values_the_part_is_shown_in_which_they_differ() {
        let flags = |last: &str| format!("{}{last}{}", "-fsame ".repeat(40), " -fmore".repeat(40));
        let [was, now] = ["-O2", "-O3"].map(flags);
        let told = key(&[("variable CFLAGS", &now)]).difference(&key(&[("variable CFLAGS", &was)]));
        let told = told.expect("they differ");
        assert!(told.contains("-fsame -O2 -fmore") && told.contains("-fsame -O3 -fmore"), "{told}");
        assert!(told.chars().count() < 300, "{told}");
    }
}
