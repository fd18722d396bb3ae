//! Whether two globs can name the same path, as the globs of outputs are read (`super::output`).
//!
//! Each is an automaton over characters, as long as its text; they meet where both can come to their ends over the same
//! characters. Which pairs of places are reached is found by visiting each once.

use std::collections::BTreeSet;
use std::iter::Peekable;
use std::str::Chars;

/// What a step from one place to the next takes.
#[derive(Debug, Clone)]
enum Label {
    /// Nothing.
    Empty,
    /// Any character, `/` too.
    Any,
    /// A character of one of these ranges.
    Of(Vec<(char, char)>),
    /// Any but `/` and those of these ranges.
    Not(Vec<(char, char)>),
}

impl Label {
    /// Whether both take some character.
    fn meets(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Empty, _) | (_, Self::Empty) => false,
            (Self::Any, _) | (_, Self::Any) | (Self::Not(_), Self::Not(_)) => true,
            (Self::Of(some), Self::Of(others)) => {
                some.iter().any(|(from, to)| others.iter().any(|(start, end)| from <= end && start <= to))
            }
            (Self::Of(some), Self::Not(none)) | (Self::Not(none), Self::Of(some)) => {
                let is_left_out = |(from, to): &(char, char)| {
                    (*from, *to) == ('/', '/') || none.iter().any(|(start, end)| start <= from && to <= end)
                };
                !some.iter().all(is_left_out)
            }
        }
    }
}

/// A glob: from each place, what leads where. It begins at 0.
#[derive(Debug, Default)]
struct Automaton {
    steps: Vec<Vec<(Label, usize)>>,
    end: usize,
}

impl Automaton {
    /// Of all paths that `glob` matches, and all beneath them: who names a folder names all that is in it.
    fn of(glob: &str) -> Self {
        let glob = glob.strip_prefix("./").unwrap_or(glob).trim_end_matches('/');
        let mut automaton = Self::default();
        let start = automaton.place();
        let mut rest = glob.chars().peekable();
        let end = automaton.read(&mut rest, start, false);
        let below = automaton.place();
        automaton.step(end, Label::Of(vec![('/', '/')]), below);
        automaton.step(below, Label::Any, below);
        automaton.step(below, Label::Empty, end);
        automaton.end = end;
        automaton
    }

    fn place(&mut self) -> usize {
        self.steps.push(Vec::new());
        self.steps.len() - 1
    }

    fn step(&mut self, from: usize, label: Label, to: usize) {
        self.steps[from].push((label, to));
    }

    fn then(&mut self, from: usize, label: Label) -> usize {
        let to = self.place();
        self.step(from, label, to);
        to
    }

    /// Reads on from the place `at`, to the end of the text or, where it `is_inner`, of the alternative; where that leads.
    fn read(&mut self, rest: &mut Peekable<Chars<'_>>, mut at: usize, is_inner: bool) -> usize {
        // Whether a component begins here.
        let mut begins = true;
        while let Some(next) = rest.next_if(|next| !(is_inner && matches!(next, ',' | '}'))) {
            let began = std::mem::replace(&mut begins, next == '/');
            at = match next {
                '*' if rest.next_if_eq(&'*').is_some() => {
                    let loops = self.then(at, Label::Empty);
                    match (began, rest.peek()) {
                        // Whole components, or none.
                        (true, Some('/')) => {
                            rest.next();
                            begins = true;
                            let inside = self.then(loops, Label::Any);
                            self.step(inside, Label::Any, inside);
                            let after = self.then(inside, Label::Of(vec![('/', '/')]));
                            self.step(loops, Label::Empty, after);
                            after
                        }
                        (true, _) => {
                            self.step(loops, Label::Any, loops);
                            loops
                        }
                        (false, _) => {
                            self.step(loops, Label::Not(Vec::new()), loops);
                            loops
                        }
                    }
                }
                '*' => {
                    let loops = self.then(at, Label::Empty);
                    self.step(loops, Label::Not(Vec::new()), loops);
                    loops
                }
                '?' => self.then(at, Label::Not(Vec::new())),
                '[' => {
                    let class = class(rest);
                    self.then(at, class)
                }
                '{' => {
                    let after = self.place();
                    loop {
                        let end = self.read(rest, at, true);
                        self.step(end, Label::Empty, after);
                        if rest.next() != Some(',') {
                            break;
                        }
                    }
                    after
                }
                next => {
                    let next = if next == '\\' { rest.next().unwrap_or(next) } else { next };
                    self.then(at, Label::Of(vec![(next, next)]))
                }
            };
        }
        at
    }
}

/// A class, whose bracket was read.
fn class(rest: &mut Peekable<Chars<'_>>) -> Label {
    let is_negated = rest.next_if(|next| matches!(next, '!' | '^')).is_some();
    let mut ranges = Vec::new();
    while let Some(from) = rest.next() {
        if from == ']' && !ranges.is_empty() {
            break;
        }
        let mut ahead = rest.clone();
        let to = match (ahead.next(), ahead.next()) {
            (Some('-'), Some(to)) if to != ']' => {
                *rest = ahead;
                to
            }
            _ => from,
        };
        ranges.push((from, to));
    }
    if is_negated { Label::Not(ranges) } else { Label::Of(ranges) }
}

/// Whether a path, or a folder above it, can be matched by both `one` and `other`: a glob that matches a folder takes
/// all that is in it.
pub fn globs_meet(one: &str, other: &str) -> bool {
    let (one, other) = (Automaton::of(one), Automaton::of(other));
    let mut seen = BTreeSet::from([(0, 0)]);
    let mut open = vec![(0, 0)];
    while let Some((here, there)) = open.pop() {
        if (here, there) == (one.end, other.end) {
            return true;
        }
        let mut reach = |place| {
            if seen.insert(place) {
                open.push(place);
            }
        };
        for (label, to) in &one.steps[here] {
            match label {
                Label::Empty => reach((*to, there)),
                _ => {
                    let both = other.steps[there].iter().filter(|(others, _)| label.meets(others));
                    both.for_each(|(_, other)| reach((*to, *other)));
                }
            }
        }
        for (_, to) in other.steps[there].iter().filter(|(label, _)| matches!(label, Label::Empty)) {
            reach((here, *to));
        }
    }
    false
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
            ("a/**/b", "a/c/d/b/x"),
            ("{a,b}", "{b,c}"),
            ("bin/{lua,luac}", "bin/luac"),
            ("x.{tar,tar.gz}", "*.gz"),
            ("{a/b,c}/d", "a/*/d"),
            ("{a,b{c,d}}", "bd"),
            ("a[0-9]", "a[5-7]"),
            ("a[!x]", "ay"),
            ("a[]x]", "a]"),
            ("a[x-]", "a-"),
            ("a\\*", "a*"),
            ("a**b", "axb"),
            // In the folder that the other takes.
            ("**/a", "b"),
        ] {
            assert!(globs_meet(one, other) && globs_meet(other, one), "{one} {other}");
        }
        for (one, other) in [
            ("bin/a*", "bin/b*"),
            ("bin", "binary"),
            ("lib/*.so", "lib/*.a"),
            ("a/?", "a/bc"),
            ("x", "y/x"),
            ("{a,b}", "{c,d}"),
            ("bin/{lua,luac}", "bin/luad"),
            ("a[0-4]", "a[5-7]"),
            ("a[!x]", "ax"),
            ("a\\*", "ab"),
            ("a?b", "a/b"),
            ("a**b", "a/b"),
        ] {
            assert!(!globs_meet(one, other) && !globs_meet(other, one), "{one} {other}");
        }
    }

    #[test]
    fn many_stars_and_alternatives_take_no_longer_than_their_length_asks() {
        let stars = "*a".repeat(40);
        assert!(!globs_meet(&format!("{stars}b"), &format!("{stars}c")));
        let folders = "**/a/".repeat(40);
        assert!(globs_meet(&format!("{folders}b"), &format!("{folders}c")));
        assert!(!globs_meet(&format!("x/{folders}b"), &format!("[a-w]/{folders}c")));
        let choices = "{a,b}".repeat(40);
        assert!(!globs_meet(&format!("{choices}c"), &format!("{choices}d")));
    }
}
