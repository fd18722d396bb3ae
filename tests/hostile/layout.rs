//! Bytes of a message from the names, widths and defaults of its fields, any of which a case may override.
//!
//! A layout is a row of `field:TYPE` or `field:TYPE=DEFAULT`. TYPE is a width in bytes (1, 2, 4, 8, little-endian), `z`
//! for bytes and a final zero byte, `c` for bytes behind their length as four bytes, `b` for bytes as they are. The
//! length of a `c` is overridden as `FIELD.len`.

use super::script::Step;
use super::value::{Value, little_endian};

/// The bytes of `layout` with what `step` says of its fields.
pub fn encode(layout: &str, step: &mut Step) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    for field in layout.split_whitespace() {
        let (name, rest) = field.split_once(':').ok_or_else(|| format!("`{field}` has no type"))?;
        let (kind, default) = rest.split_once('=').unwrap_or((rest, ""));
        let given = step.key(name);
        if let Ok(width) = kind.parse::<usize>() {
            let number = match given {
                Some(value) => value.number(name)?,
                None if default.is_empty() => 0,
                None => default.parse().map_err(|_| format!("`{default}` is no number"))?,
            };
            bytes.extend(little_endian(number, width, name)?);
            continue;
        }
        let given = given.unwrap_or_else(|| Value::Bytes(default.as_bytes().to_vec()));
        let given = given.bytes(name)?;
        match kind {
            "z" => bytes.extend(given.iter().chain([&0])),
            "c" => {
                let length = i128::try_from(given.len()).unwrap_or(i128::MAX);
                let length = step.number(&format!("{name}.len"), length)?;
                bytes.extend(little_endian(length, 4, name)?);
                bytes.extend(given);
            }
            _ => bytes.extend(given),
        }
    }
    Ok(bytes)
}

/// The number that a field of `layout` has in `bytes`; none where there is no such field or too few bytes.
pub fn number(layout: &str, bytes: &[u8], wanted: &str) -> Option<i128> {
    let mut at = 0;
    for field in layout.split_whitespace() {
        let (name, rest) = field.split_once(':')?;
        let width: usize = rest.split('=').next()?.parse().ok()?;
        if name == wanted {
            let part = bytes.get(at..at + width)?;
            return Some(part.iter().rev().fold(0, |number, byte| number << 8 | i128::from(*byte)));
        }
        at += width;
    }
    None
}
