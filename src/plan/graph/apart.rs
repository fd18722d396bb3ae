//! Steps that would get in each other's way: two that put out the same path, and one that takes as input what another
//! puts out that it does not need.

use std::collections::BTreeMap;

use super::reader::Reader;
use super::{Plan, StepId};
use crate::plan::globs_meet;
use crate::plan::recipe::{Expanded, Fault, Text};

impl Reader<'_> {
    /// Refuses two steps that put out the same path, and a step that takes as input what one puts out that it does
    /// not need.
    pub fn outputs_apart(&self, plan: &Plan, expanded: &[Expanded<'_>]) -> Result<(), Fault> {
        let mut all = Globs::default();
        for (index, step) in expanded.iter().enumerate() {
            let outputs = &plan.step(StepId(index)).outputs;
            for (number, glob) in outputs.globs().enumerate() {
                if let Some((other, earlier)) = all.meeting(glob).find(|(other, _)| *other != index) {
                    let message = format!(
                        "steps `{}` and `{}` both put out what `{}` and `{}` match",
                        expanded[other].name, step.name, earlier, glob
                    );
                    let hint = "give them names or folders of their own";
                    let span = step.table.outputs.get(number).map_or(step.span.clone(), Text::span);
                    return Err(self.fault(span, message).hint(hint));
                }
                all.insert(index, glob);
            }
        }
        for (index, step) in expanded.iter().enumerate().filter(|(_, step)| !step.table.inputs.is_empty()) {
            let needs = &plan.step(StepId(index)).needs;
            for input in &step.table.inputs {
                let mut meeting = all.meeting(input.get_ref());
                let Some((other, output)) = meeting.find(|(other, _)| !needs.contains(&StepId(*other)))
                else {
                    continue;
                };
                let (name, other) = (&step.name, &expanded[other].name);
                let fault = |message| self.fault(input.span(), message);
                return Err(if other == name {
                    fault(format!("step `{name}` puts out `{output}`, which is its own input"))
                } else {
                    let input = input.get_ref();
                    fault(format!(
                        "step `{name}` takes `{input}`, which step `{other}` puts out, and does not need that step"
                    ))
                    .hint(format!("needs = [\"{other}\"]"))
                });
            }
        }
        Ok(())
    }
}

/// Output globs by what they begin with: two can meet only where one begins as the other does.
#[derive(Default)]
struct Globs<'a>(BTreeMap<Vec<&'a str>, Vec<(usize, &'a str)>>);

impl<'a> Globs<'a> {
    /// The components before the first with a wildcard.
    fn beginning(glob: &str) -> Vec<&str> {
        let glob = glob.strip_prefix("./").unwrap_or(glob).trim_end_matches('/');
        glob.split('/').take_while(|part| !part.contains(['*', '?', '[', '{', '\\'])).collect()
    }

    fn insert(&mut self, index: usize, glob: &'a str) {
        self.0.entry(Self::beginning(glob)).or_default().push((index, glob));
    }

    /// The globs that meet `glob`, each with the number it was inserted with.
    fn meeting<'b>(&'b self, glob: &'b str) -> impl Iterator<Item = (usize, &'a str)> + 'b {
        let beginning = Self::beginning(glob);
        let above = (0..beginning.len()).filter_map(|length| self.0.get(&beginning[..length])).flatten();
        let above: Vec<_> = above.collect();
        let from = beginning.clone();
        let below = self.0.range(from..).take_while(move |(key, _)| key.starts_with(&beginning));
        let candidates = above.into_iter().chain(below.flat_map(|(_, globs)| globs));
        candidates.filter(move |(_, other)| globs_meet(glob, other)).copied()
    }
}
