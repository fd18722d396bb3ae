//! Variables of a recipe that get their value from outside it: `--set NAME=VALUE`.

use std::collections::BTreeSet;

use toml::Spanned;

use super::{Recipe, nearest};

/// Why a value is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GivenError {
    /// Not `NAME=VALUE`.
    #[error("`{0}` is not NAME=VALUE")]
    Form(String),
    /// The recipe has no such variable.
    #[error("the recipe has no variable `{name}`")]
    Unknown {
        /// What was named.
        name: String,
        /// What most likely was meant.
        meant: Option<String>,
        /// The recipe's variables.
        known: Vec<String>,
    },
    /// A value that no step is for, of a variable that steps ask for: all of these would be left out.
    #[error("no step of the recipe is for `{name}` = `{value}`")]
    Value {
        /// The variable.
        name: String,
        /// Its value.
        value: String,
        /// Those that steps ask for, and the recipe's own.
        known: Vec<String>,
    },
}

impl GivenError {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Form(_) => None,
            Self::Unknown { meant: Some(meant), .. } => Some(format!("did you mean `{meant}`?")),
            Self::Unknown { known, .. } if known.is_empty() => {
                Some("`[variables]` of kiln.toml names what can be set".to_owned())
            }
            Self::Unknown { known, .. } => Some(format!("its variables are {}", known.join(", "))),
            Self::Value { name, known, .. } => Some(format!("steps are for `{name}` = {}", known.join(", "))),
        }
    }
}

impl Recipe {
    /// Gives a variable of the recipe another value: `text` is `NAME=VALUE`.
    ///
    /// # Errors
    /// [`GivenError`]; the recipe stays as it was.
    pub fn set(&mut self, text: &str) -> Result<(), GivenError> {
        let (name, value) = text.split_once('=').ok_or_else(|| GivenError::Form(text.to_owned()))?;
        let mut asked: BTreeSet<&str> = BTreeSet::new();
        for (variable, value) in self.steps.values().flat_map(|step| &step.when) {
            if variable.get_ref() == name {
                asked.insert(value.get_ref());
            }
        }
        let Some(own) = self.variables.get(name) else {
            let known: Vec<String> = self.variables.keys().map(|name| name.get_ref().clone()).collect();
            let meant = nearest(name, known.iter().map(String::as_str)).map(str::to_owned);
            return Err(GivenError::Unknown { name: name.to_owned(), meant, known });
        };
        if !asked.is_empty() && !asked.contains(value) && own.get_ref() != value {
            asked.insert(own.get_ref());
            let known = asked.into_iter().map(str::to_owned).collect();
            return Err(GivenError::Value { name: name.to_owned(), value: value.to_owned(), known });
        }
        // Errors show the recipe's own place.
        let given = Spanned::new(own.span(), value.to_owned());
        if let Some(own) = self.variables.get_mut(name) {
            *own = given;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_taken_for_a_variable_that_there_is_and_where_steps_ask_for_it() {
        let text = "variables = { layout = \"one\", note = \"x\" }\n[steps.a]\nrun = \"%{layout} %{note}\"\n\
                    when = { layout = \"two\" }\n";
        let mut recipe = Recipe::parse(text, "kiln.toml").expect("good");
        let mut hint = |text: &str| recipe.set(text).expect_err("refused").hint();
        assert_eq!(hint("layuot=two").as_deref(), Some("did you mean `layout`?"));
        assert_eq!(hint("colour=red").as_deref(), Some("its variables are layout, note"));
        assert_eq!(hint("layout=tow").as_deref(), Some("steps are for `layout` = one, two"));
        assert_eq!(hint("layout"), None);
        recipe.set("layout=one").expect("what the recipe has");
        recipe.set("layout=two").expect("there is such a step");
        recipe.set("note=a=b").expect("nobody asks for it");
        let steps = super::super::expand(&recipe, text, "kiln.toml").expect("good").all;
        assert_eq!(steps[0].table.run.as_ref().expect("set").get_ref(), "two a=b");
        let none = Recipe::default().set("a=b").expect_err("there is none");
        assert!(none.hint().is_some_and(|hint| hint.contains("[variables]")));
    }
}
