//! Sizes and durations as people write them.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Memory that a machine may have, in bytes: Linux does not come up in less, nor does KVM take more.
pub const MEMORY_BYTES: RangeInclusive<u64> = 128 << 20..=1 << 43;
/// How large a scratch disk may be, in bytes: files of more than twice the most are beyond ext4.
pub const SCRATCH_BYTES: RangeInclusive<u64> = 1 << 20..=1 << 43;

/// Text that is no size or duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseQuantityError {
    /// Not a size.
    #[error("`{0}` is not a size: write bytes, or a number with K, M, G or T (powers of 1,024), such as 2G")]
    Bytes(String),
    /// Not a duration.
    #[error("`{0}` is not a duration: write seconds, or numbers with h, m, s or ms, such as 90s or 1m30s")]
    Duration(String),
}

fn split(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, &text[end..]))
}

/// Bytes from `4096`, `512M`, `2G`, `2GiB`, `2GB`: units are powers of 1,024.
///
/// # Errors
/// [`ParseQuantityError::Bytes`] for anything else, and for what does not fit in 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, ParseQuantityError> {
    let parse = || {
        let (number, unit) = split(text.trim())?;
        let unit = unit.to_ascii_lowercase();
        let shift = match unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit) {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return None,
        };
        number.checked_mul(1 << shift)
    };
    parse().ok_or_else(|| ParseQuantityError::Bytes(text.to_owned()))
}

/// A duration from `90`, `90s`, `250ms`, `10m`, `1m30s`: a bare number counts seconds, of several with units each is
/// smaller than the one before.
///
/// # Errors
/// [`ParseQuantityError::Duration`] for anything else, and for what does not fit in 64 bits of milliseconds.
pub fn parse_duration(text: &str) -> Result<Duration, ParseQuantityError> {
    let parse = || {
        let (mut total, mut smallest, mut rest) = (0_u64, u64::MAX, text.trim());
        loop {
            let (number, after) = split(rest)?;
            let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
            let milliseconds = match &after[..end] {
                "ms" => 1,
                // Alone only: what `1m30` means is anybody's guess.
                "" if smallest == u64::MAX => 1_000,
                "s" => 1_000,
                "m" | "min" => 60_000,
                "h" => 3_600_000,
                _ => return None,
            };
            if milliseconds >= smallest {
                return None;
            }
            total = total.checked_add(number.checked_mul(milliseconds)?)?;
            (smallest, rest) = (milliseconds, &after[end..]);
            if rest.is_empty() {
                return Some(Duration::from_millis(total));
            }
        }
    };
    parse().ok_or_else(|| ParseQuantityError::Duration(text.to_owned()))
}

/// A size for people: three digits and a unit.
pub fn show_bytes(bytes: u64) -> String {
    let (mut whole, mut rest, mut unit) = (bytes, 0, 0);
    while whole >= 1024 {
        rest = whole % 1024;
        whole /= 1024;
        unit += 1;
    }
    let name = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][unit];
    if unit == 0 || whole >= 100 {
        format!("{whole} {name}")
    } else {
        format!("{whole}.{} {name}", rest * 10 / 1024)
    }
}

/// A duration for people: two digits after the point below a minute.
pub fn show_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 {
        format!("{:.2} s", duration.as_secs_f64())
    } else {
        format!("{} m {} s", seconds / 60, seconds % 60)
    }
}

/// How long ago something was, for people: a number and its largest unit.
pub fn show_age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("2G"), Ok(2 << 30));
        assert_eq!(parse_bytes("512MiB"), Ok(512 << 20));
        assert_eq!(parse_bytes("1kb"), Ok(1024));
        for bad in ["", "G", "-1", "1.5G", "16777216T", "2 furlongs"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_read_with_and_without_units() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse_duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("1h2min3s4ms"), Ok(Duration::from_millis(3_723_004)));
        for bad in [
            "",
            "s",
            "1d",
            "-5",
            "1m30",
            "30s1m",
            "1m2m",
            "1m 30s",
            "1m30d",
            "1ss",
            "1h18446744073709551615ms",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ages_are_shown_by_their_largest_unit() {
        let shown = |seconds| show_age(Duration::from_secs(seconds));
        assert_eq!([0, 59, 60, 3599].map(shown), ["0 s", "59 s", "1 min", "59 min"]);
        assert_eq!([3600, 47 * 3600, 48 * 3600, 100 * 86_400].map(shown), ["1 h", "47 h", "2 d", "100 d"]);
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        assert_eq!(show_bytes(0), "0 B");
        assert_eq!(show_bytes(1536), "1.5 KiB");
        assert_eq!(show_bytes(200 << 20), "200 MiB");
        assert_eq!(show_bytes(u64::MAX), "15.9 EiB");
    }
}
