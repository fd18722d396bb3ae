//! Whether two globs can name the same path: `*` and `?` within a component, `**` over components.
//!
//! Classes and alternatives (`[…]`, `{…}`) are taken to meet nothing they cannot be seen to meet: what slips through is
//! found when two steps put out the same path.

/// Whether a path, or a folder above it, can be matched by both `one` and `other`: a glob that matches a folder takes
/// all that is in it.
pub fn globs_meet(one: &str, other: &str) -> bool {
    let parts = |glob: &str| -> Vec<String> {
        let glob = glob.strip_prefix("./").unwrap_or(glob).trim_end_matches('/');
        glob.split('/').map(str::to_owned).collect()
    };
    paths_meet(&parts(one), &parts(other))
}

fn paths_meet(one: &[String], other: &[String]) -> bool {
    match (one, other) {
        // One of them names a folder that the other reaches into, or the same path.
        ([], _) | (_, []) => true,
        ([head, rest @ ..], _) if head == "**" => {
            (rest.is_empty() || paths_meet(rest, other))
                || other.len() > 1 && paths_meet(one, &other[1..])
                || other.len() == 1 && rest.is_empty()
        }
        (_, [head, ..]) if head == "**" => paths_meet(other, one),
        ([a, rest @ ..], [b, others @ ..]) => {
            let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
            names_meet(&a, &b) && paths_meet(rest, others)
        }
    }
}

fn names_meet(one: &[char], other: &[char]) -> bool {
    match (one, other) {
        ([], []) => true,
        (['*', rest @ ..], _) => names_meet(rest, other) || !other.is_empty() && names_meet(one, &other[1..]),
        (_, ['*', ..]) => names_meet(other, one),
        ([a, rest @ ..], [b, others @ ..]) => (a == b || *a == '?' || *b == '?') && names_meet(rest, others),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_meet_where_some_path_is_of_both() {
        for (one, other) in [
            ("bin/lua", "bin/lua"),
            ("bin", "bin/lua"),
            ("bin/", "./bin/lua/x"),
            ("bin/*", "bin/lua"),
            ("bin/l*", "bin/*a"),
            ("**/*.so", "lib/x/a.so"),
            ("lib/**", "lib/x"),
            ("**", "x"),
            ("a/?", "a/b"),
            ("*", "x/y"),
            ("a/**/b", "a/b"),
        ] {
            assert!(globs_meet(one, other) && globs_meet(other, one), "{one} {other}");
        }
        for (one, other) in
            [("bin/a*", "bin/b*"), ("bin", "binary"), ("lib/*.so", "lib/*.a"), ("a/?", "a/bc"), ("x", "y/x")]
        {
            assert!(!globs_meet(one, other) && !globs_meet(other, one), "{one} {other}");
        }
    }
}
