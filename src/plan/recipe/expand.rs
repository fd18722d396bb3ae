//! From a step with a matrix to one plain step for each combination of its values, with the recipe's variables filled in; and
//! without the steps that these leave out.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, Range};

use toml::Spanned;

use super::{Fault, Recipe, StepTable, Text, nearest};

/// Most steps that one matrix may make.
const MOST: usize = 1000;
/// Most that all of a recipe may: each is held in memory, and held against all others.
const MOST_IN_ALL: usize = 20_000;

/// What names of steps are like.
pub const NAMES: &str = "names are letters, digits and `.`, `_`, `-`, `+`, and start with a letter or digit";

/// A plain step.
#[derive(Debug, Clone)]
pub struct Expanded<'a> {
    /// Its name: the step's own and, of a matrix, the values.
    pub name: String,
    /// The step it comes from.
    pub family: &'a str,
    /// Where that stands.
    pub span: Range<usize>,
    /// What it is, its placeholders filled in.
    pub table: Table<'a>,
}

/// What a plain step is. Of ten thousand steps most are as they were written, and a copy of each would take longer than all
/// that is done with them.
#[derive(Debug, Clone)]
pub enum Table<'a> {
    /// As it was written.
    Written(&'a StepTable),
    /// Another than that.
    Filled(Box<StepTable>),
}

impl Deref for Table<'_> {
    type Target = StepTable;

    fn deref(&self) -> &StepTable {
        match self {
            Self::Written(table) => table,
            Self::Filled(table) => table,
        }
    }
}

impl Table<'_> {
    fn retain_needs(&mut self, stays: impl Fn(&Text) -> bool) {
        if self.needs.iter().all(&stays) {
            return;
        }
        let mut table = (**self).clone();
        table.needs.retain(stays);
        *self = Self::Filled(Box::new(table));
    }
}

/// The plain steps of a recipe.
#[derive(Debug, Default)]
pub struct Steps<'a> {
    /// Those that there are, in the order of their names.
    pub all: Vec<Expanded<'a>>,
    /// Names of those that variables leave out.
    pub left_out: BTreeSet<String>,
}

/// Whether `text` is good for a step's name: one word that is no path and no option.
pub fn is_name(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    text.len() <= 100 && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(good)
}

/// The plain steps of `recipe`, whose text is `text`. None needs one that is left out.
///
/// # Errors
/// [`Fault`] where a name is none, two steps get one name, a matrix is empty or too large, or a variable is not there.
pub fn expand<'a>(recipe: &'a Recipe, text: &str, file: &str) -> Result<Steps<'a>, Fault> {
    let mut steps: BTreeMap<String, Expanded> = BTreeMap::new();
    let mut left_out = BTreeSet::new();
    if let Some(name) = recipe.variables.keys().find(|name| !is_name(name.get_ref())) {
        let message = format!("`{}` is no name for a variable", name.get_ref().escape_debug());
        return Err(Fault::at(text, file, name.span(), message).hint(NAMES));
    }
    let variables: Vec<(&str, &str)> = recipe
        .variables
        .iter()
        .map(|(name, value)| (name.get_ref().as_str(), value.get_ref().as_str()))
        .collect();
    for (name, table) in &recipe.steps {
        let fault = |span: Range<usize>, message: String| Fault::at(text, file, span, message);
        if !is_name(name.get_ref()) {
            let message = format!("`{}` is no name for a step", name.get_ref().escape_debug());
            return Err(fault(name.span(), message).hint(NAMES));
        }
        let mut count: usize = 1;
        for (key, values) in &table.matrix {
            if recipe.variables.contains_key(key.get_ref().as_str()) {
                let message = format!("`{}` is a variable of the recipe already", key.get_ref());
                return Err(fault(key.span(), message));
            }
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
        if steps.len() + left_out.len() + count > MOST_IN_ALL {
            let message =
                format!("with step `{}` the recipe has more than {MOST_IN_ALL} steps", name.get_ref());
            return Err(fault(name.span(), message).hint("build a part of them by a recipe of its own"));
        }
        let mut is_wanted = true;
        for (variable, value) in &table.when {
            match recipe.variables.get(variable.get_ref().as_str()) {
                Some(given) => is_wanted &= given.get_ref() == value.get_ref(),
                None => {
                    let message = format!("there is no variable `{}`", variable.get_ref());
                    let known = variables.iter().map(|(name, _)| *name);
                    let fault = fault(variable.span(), message);
                    return Err(match nearest(variable.get_ref(), known) {
                        Some(meant) => fault.hint(format!("did you mean `{meant}`?")),
                        None => fault.hint("[variables] has them"),
                    });
                }
            }
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
            if !is_wanted {
                left_out.extend([name.get_ref().clone(), full]);
                continue;
            }
            let step = Expanded {
                name: full.clone(),
                family: name.get_ref(),
                span: name.span(),
                table: filled(table, &[&variables[..], &values].concat()),
            };
            if let Some(other) = steps.insert(full.clone(), step) {
                let message =
                    format!("steps `{}` and `{}` both make a step `{full}`", other.family, name.get_ref());
                return Err(fault(name.span(), message).hint("give one of them another name"));
            }
        }
    }
    let mut all: Vec<Expanded> = steps.into_values().collect();
    for step in &mut all {
        step.table.retain_needs(|need| !left_out.contains(need.get_ref()));
    }
    Ok(Steps { all, left_out })
}

fn filled<'a>(table: &'a StepTable, values: &[(&str, &str)]) -> Table<'a> {
    if values.is_empty() {
        return Table::Written(table);
    }
    let mut table = table.clone();
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
    Table::Filled(Box::new(table))
}
