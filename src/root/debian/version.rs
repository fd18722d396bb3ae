//! Version numbers and their order (deb-version(7)).

use std::cmp::Ordering;

/// Whether `version` is one that dpkg takes: `[EPOCH:]UPSTREAM[-REVISION]`.
pub fn is_valid(version: &str) -> bool {
    let (epoch, upstream, revision) = parts(version);
    let has_epoch = version.contains(':');
    let word = |text: &str, extra: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c));
    (!has_epoch || (epoch.len() <= 10 && epoch.parse::<u32>().is_ok_and(|n| i32::try_from(n).is_ok())))
        && upstream.starts_with(|c: char| c.is_ascii_digit())
        && word(upstream, ".+~-:")
        && word(revision, ".+~")
        && !version.ends_with('-')
}

/// Epoch, upstream version and revision. An absent epoch is `0`; an absent revision is empty.
fn parts(version: &str) -> (&str, &str, &str) {
    let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, ""));
    (epoch, upstream, revision)
}

/// The order of two versions.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (epoch_a, upstream_a, revision_a) = parts(a);
    let (epoch_b, upstream_b, revision_b) = parts(b);
    compare_numbers(epoch_a.as_bytes(), epoch_b.as_bytes())
        .then_with(|| compare_parts(upstream_a.as_bytes(), upstream_b.as_bytes()))
        .then_with(|| compare_parts(revision_a.as_bytes(), revision_b.as_bytes()))
}

fn compare_numbers(a: &[u8], b: &[u8]) -> Ordering {
    let significant = |digits: &[u8]| digits.iter().position(|&digit| digit != b'0').unwrap_or(digits.len());
    let (a, b) = (&a[significant(a)..], &b[significant(b)..]);
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

/// Where a character that is no digit sorts: `~` before the end, the end before letters, letters before the rest.
fn weight(byte: Option<u8>) -> i32 {
    match byte {
        Some(b'~') => -1,
        None => 0,
        Some(byte) if byte.is_ascii_digit() => 0,
        Some(byte) if byte.is_ascii_alphabetic() => i32::from(byte),
        Some(byte) => i32::from(byte) + 256,
    }
}

fn compare_parts(mut a: &[u8], mut b: &[u8]) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let is_text = |part: &[u8]| part.first().is_some_and(|byte| !byte.is_ascii_digit());
        while is_text(a) || is_text(b) {
            let order = weight(a.first().copied()).cmp(&weight(b.first().copied()));
            if order.is_ne() {
                return order;
            }
            a = a.get(1..).unwrap_or_default();
            b = b.get(1..).unwrap_or_default();
        }
        let digits = |part: &[u8]| part.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(part.len());
        let (number_a, rest_a) = a.split_at(digits(a));
        let (number_b, rest_b) = b.split_at(digits(b));
        let order = compare_numbers(number_a, number_b);
        if order.is_ne() {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
    Ordering::Equal
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn versions_sort_as_the_manual_says() {
        let sorted = [
            "1.0~~",
            "1.0~~a",
            "1.0~",
            "1.0",
            "1.0-0+b1",
            "1.0-1",
            "1.0-1+b1",
            "1.0+git1-1",
            "1.0.1-1",
            "1.2-1",
            "1.10-1",
            "1:0.1-1",
            "2:0",
        ];
        for pair in sorted.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        for (a, b) in [("1.0", "0:1.0"), ("1.0", "1.0-0"), ("1.01", "1.1"), ("1.0", "1.00"), ("1.", "1.0")] {
            assert_eq!(compare(a, b), Ordering::Equal, "{a} {b}");
        }
    }

    #[test]
    fn what_dpkg_refuses_is_invalid() {
        for good in ["1", "1:2.3-4+b1", "2.36-9+deb12u10", "1~rc1", "0:1:2-3", "1-2-3"] {
            assert!(is_valid(good), "{good}");
        }
        for bad in ["", "a1", "1 2", ":1", "x:1", "1:", "1-", "1_2", "-1", "1/2", "9999999999:1"] {
            assert!(!is_valid(bad), "{bad}");
        }
    }

    /// What dpkg says: whether `a` is less than `b`.
    fn dpkg(a: &str, relation: &str, b: &str) -> Option<bool> {
        let status = Command::new("dpkg").args(["--compare-versions", a, relation, b]).status().ok()?;
        Some(status.success())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        /// The judge is dpkg itself; without it (not a Debian host) there is nothing to compare with.
        #[test]
        fn the_order_is_dpkgs(
            a in "([0-9]:)?[0-9][0-9a-c.+~]{0,6}(-[0-9a-b.+~]{1,4})?",
            b in "([0-9]:)?[0-9][0-9a-c.+~]{0,6}(-[0-9a-b.+~]{1,4})?",
        ) {
            let order = compare(&a, &b);
            if let Some(less) = dpkg(&a, "lt", &b) {
                prop_assert_eq!(order == Ordering::Less, less, "{} lt {}", a, b);
            }
            if let Some(equal) = dpkg(&a, "eq", &b) {
                prop_assert_eq!(order == Ordering::Equal, equal, "{} eq {}", a, b);
            }
            prop_assert_eq!(compare(&b, &a), order.reverse());
        }
    }
}
