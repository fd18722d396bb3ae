//! kmod's binary index: a radix trie of text keys (`shared/index.c` of kmod, version 2.1 of the format).
//!
//! modprobe reads `modules.*.bin` and no text, so a folder of modules without them is of no use in a guest.

use std::collections::BTreeMap;

const MAGIC: u32 = 0xB007_F457;
const VERSION: u32 = 0x0002_0001;
const HAS_PREFIX: u32 = 0x8000_0000;
const HAS_VALUES: u32 = 0x4000_0000;
const HAS_CHILDREN: u32 = 0x2000_0000;
const OFFSET_MASK: u32 = 0x0FFF_FFFF;

/// Values by key; of one key the lowest priority comes first.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: BTreeMap<String, Vec<(u32, String)>>,
}

impl Index {
    /// Adds a value. A key that is not ASCII, which the format cannot hold, or either with a NUL is left out.
    pub(super) fn insert(&mut self, key: &str, value: &str, priority: u32) {
        if key.is_ascii() && !key.contains('\0') && !value.contains('\0') {
            self.entries.entry(key.to_owned()).or_default().push((priority, value.to_owned()));
        }
    }

    /// The index as bytes; empty where it would be larger than the format allows (256 MiB).
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = [MAGIC.to_be_bytes(), VERSION.to_be_bytes(), [0; 4]].concat();
        let entries: Vec<_> =
            self.entries.iter().map(|(key, values)| (key.as_bytes(), values.as_slice())).collect();
        let root = if entries.is_empty() { Some(0) } else { write_node(&entries, 0, &mut bytes) };
        match root {
            Some(root) => {
                bytes[8..12].copy_from_slice(&root.to_be_bytes());
                bytes
            }
            None => Vec::new(),
        }
    }
}

type Entry<'a> = (&'a [u8], &'a [(u32, String)]);

/// Writes the node of all `entries`, which are sorted and agree in their first `depth` bytes, after its children.
/// Its offset with its flags.
fn write_node(entries: &[Entry<'_>], depth: usize, bytes: &mut Vec<u8>) -> Option<u32> {
    let (first, last) = (entries.first()?.0, entries.last()?.0);
    // Sorted: what the first and the last share, all share.
    let shared = first[depth..].iter().zip(&last[depth..]).take_while(|(a, b)| a == b).count();
    let branch = depth + shared;
    let (own, below) = entries.split_at(usize::from(first.len() == branch));
    let mut children = BTreeMap::new();
    for group in below.chunk_by(|(a, _), (b, _)| a[branch] == b[branch]) {
        children.insert(group[0].0[branch], write_node(group, branch + 1, bytes)?);
    }
    let mut offset = u32::try_from(bytes.len()).ok().filter(|&offset| offset <= OFFSET_MASK)?;
    if shared > 0 {
        bytes.extend_from_slice(&first[depth..branch]);
        bytes.push(0);
        offset |= HAS_PREFIX;
    }
    if let (Some((&low, _)), Some((&high, _))) = (children.first_key_value(), children.last_key_value()) {
        bytes.extend([low, high]);
        for letter in low..=high {
            bytes.extend(children.get(&letter).copied().unwrap_or(0).to_be_bytes());
        }
        offset |= HAS_CHILDREN;
    }
    if let Some((_, values)) = own.first() {
        let mut values = values.to_vec();
        values.sort();
        bytes.extend(u32::try_from(values.len()).ok()?.to_be_bytes());
        for (priority, value) in values {
            bytes.extend(priority.to_be_bytes());
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        }
        offset |= HAS_VALUES;
    }
    Some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_u32(bytes: &[u8], at: usize) -> u32 {
        u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    }

    fn text(bytes: &[u8], at: &mut usize) -> String {
        let end =
            at.checked_add(bytes[*at..].iter().position(|&byte| byte == 0).expect("a NUL")).expect("small");
        let text = String::from_utf8(bytes[*at..end].to_vec()).expect("text");
        *at = end + 1;
        text
    }

    /// As kmod looks a key up.
    fn look_up(bytes: &[u8], key: &str) -> Vec<String> {
        let mut node = read_u32(bytes, 8);
        let mut rest = key;
        loop {
            if node & OFFSET_MASK == 0 {
                return vec![];
            }
            let mut at = usize::try_from(node & OFFSET_MASK).expect("small");
            if node & HAS_PREFIX != 0 {
                let prefix = text(bytes, &mut at);
                let Some(after) = rest.strip_prefix(&prefix) else { return vec![] };
                rest = after;
            }
            let mut next = 0;
            if node & HAS_CHILDREN != 0 {
                let (low, high) = (bytes[at], bytes[at + 1]);
                if let Some(&letter) = rest.as_bytes().first()
                    && (low..=high).contains(&letter)
                {
                    next = read_u32(bytes, at + 2 + 4 * usize::from(letter - low));
                }
                at += 2 + 4 * (usize::from(high - low) + 1);
            }
            if rest.is_empty() {
                if node & HAS_VALUES == 0 {
                    return vec![];
                }
                let count = read_u32(bytes, at);
                at += 4;
                return (0..count)
                    .map(|_| {
                        at += 4;
                        text(bytes, &mut at)
                    })
                    .collect();
            }
            rest = &rest[1..];
            node = next;
        }
    }

    #[test]
    fn every_key_is_found_again_with_its_values_by_priority() {
        let mut index = Index::default();
        let keys = ["virtio", "virtio_blk", "virtio_net", "vfat", "v", "a", "fs-*", "virtio_b"];
        for (number, key) in (0..).zip(keys) {
            index.insert(key, &format!("second {key}"), 100 + number);
            index.insert(key, &format!("first {key}"), number);
        }
        let bytes = index.to_bytes();
        for key in keys {
            assert_eq!(look_up(&bytes, key), [format!("first {key}"), format!("second {key}")], "{key}");
        }
        for key in ["", "vi", "virtio_", "virtio_blkx", "z"] {
            assert!(look_up(&bytes, key).is_empty(), "{key}");
        }
        assert_eq!(Index::default().to_bytes().len(), 12);
    }
}
