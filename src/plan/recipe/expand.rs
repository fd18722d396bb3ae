//! From a step with a matrix to one plain step for each combination of its values.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;

use super::{Fault, Recipe, StepTable, Text};

/// Most steps that one matrix may make.
const MOST: usize = 1000;

/// What names of steps are like.
pub const NAMES: &str = "names are letters, digits and `.`, `_`, `-`, `+`, and start with a letter or digit";

/// A plain step.
#[derive(Debug, Clone)]
pub struct Expanded {
    /// Its name: the step's own and, of a matrix, the values.
    pub name: String,
    /// The step it comes from.
    pub family: String,
    /// Where that stands.
    pub span: Range<usize>,
    /// What it is, its placeholders filled in.
    pub table: StepTable,
}

/// Whether `text` is good for a step's name: one word that is no path and no option.
pub fn is_name(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    text.len() <= 100 && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(good)
}

/// The plain steps of `recipe`, whose text is `text`, in the order of their names.
///
/// # Errors
/// [`Fault`] where a name is none, two steps get one name, or a matrix is empty or too large.
pub fn expand(recipe: &Recipe, text: &str, file: &str) -> Result<Vec<Expanded>, Fault> {
    let mut steps: BTreeMap<String, Expanded> = BTreeMap::new();
    for (name, table) in &recipe.steps {
        let fault = |span: Range<usize>, message: String| Fault::at(text, file, span, message);
        if !is_name(name.get_ref()) {
            let message = format!("`{}` is no name for a step", name.get_ref().escape_debug());
            return Err(fault(name.span(), message).hint(NAMES));
        }
        let mut count: usize = 1;
        for (key, values) in &table.matrix {
            count = count.saturating_mul(values.len());
            if values.is_empty() {
                let message = format!("`{}` of the matrix has no values", key.get_ref());
                return Err(fault(key.span(), message));
            }
            if let Some(value) = values.iter().find(|value| !is_name(value)) {
                let message = format!("`{}` is no good in a step's name", value.escape_debug());
                return Err(fault(key.span(), message).hint(NAMES));
            }
        }
        if count > MOST {
            let message = format!("the matrix of step `{}` makes {count} steps", name.get_ref());
            return Err(fault(name.span(), message).hint(format!("{MOST} are the most")));
        }
        let mut chosen: Vec<Vec<(&str, &str)>> = vec![Vec::new()];
        for (key, values) in &table.matrix {
            let mut longer = Vec::with_capacity(count);
            for head in &chosen {
                let ends = values.iter().map(|value| (key.get_ref().as_str(), value.as_str()));
                longer.extend(ends.map(|end| [&head[..], &[end]].concat()));
            }
            chosen = longer;
        }
        for values in chosen {
            let full =
                values.iter().fold(name.get_ref().clone(), |full, (_, value)| format!("{full}-{value}"));
            let step = Expanded {
                name: full.clone(),
                family: name.get_ref().clone(),
                span: name.span(),
                table: filled(table, &values),
            };
            if let Some(other) = steps.insert(full.clone(), step) {
                let message =
                    format!("steps `{}` and `{}` both make a step `{full}`", other.family, name.get_ref());
                return Err(fault(name.span(), message).hint("give one of them another name"));
            }
        }
    }
    Ok(steps.into_values().collect())
}

fn filled(table: &StepTable, values: &[(&str, &str)]) -> StepTable {
    let mut table = table.clone();
    if values.is_empty() {
        return table;
    }
    let fill = |text: &str| {
        values.iter().fold(text.to_owned(), |text, (key, value)| text.replace(&format!("%{{{key}}}"), value))
    };
    let fill_text = |text: &mut Text| *text = Spanned::new(text.span(), fill(text.get_ref()));
    let texts = [&mut table.run, &mut table.script, &mut table.root, &mut table.kernel, &mut table.modules];
    for text in texts.into_iter().flatten() {
        fill_text(text);
    }
    table.boot.iter_mut().flat_map(|boot| boot.texts()).for_each(fill_text);
    table.make.0.iter_mut().flat_map(|make| make.texts()).for_each(fill_text);
    for list in [&mut table.needs, &mut table.inputs, &mut table.outputs] {
        list.iter_mut().for_each(fill_text);
    }
    table.env.values_mut().for_each(|value| *value = fill(value));
    table
}
