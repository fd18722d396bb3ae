//! `kiln schema`: the JSON schemas of what kiln writes for programs, made of the types that are written.

use std::process::ExitCode;

use clap::Args;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};

use super::choice::Choice;
use super::show::line;
use super::{FAILED, Failure, USAGE, ask, events, lock, root, store};
use crate::keeper::Entry;

/// What has a schema: by what name, and which.
type Named = (&'static str, fn() -> Schema);

const SCHEMAS: [Named; 8] = [
    ("events", of::<events::Line<'static>>),
    ("inputs", of::<ask::Input<'static>>),
    ("lock-show", of::<Vec<lock::Row<'static>>>),
    ("ps", of::<Entry>),
    ("root-diff", of::<root::Differing>),
    ("root-ls", of::<Vec<root::Listed<'static>>>),
    ("root-show", of::<root::Shown<'static>>),
    ("store-du", of::<store::Usage>),
];

/// Arguments of `kiln schema`.
#[derive(Debug, Args)]
#[command(after_help = "\
  events      a line of `kiln build --json` and of `kiln run --json`; docs/events.md tells of them
  inputs      a line of `kiln inputs --json`
  ps          a line of `kiln ps --json`
  root-diff   a line of `kiln root diff --json`
  root-ls, root-show, lock-show, store-du
              what `kiln root ls --json` and its like write

The schema of recipes is `kiln recipe schema`. Programs must pass over members and events that they do not know: a later
kiln may write more. What is there stays as it is, or its version is another.

Examples:
  kiln schema events > events.schema.json")]
pub(super) struct SchemaArguments {
    /// Of what
    #[arg(value_name = "WHAT", value_parser = Choice(&[
        "events", "inputs", "lock-show", "ps", "root-diff", "root-ls", "root-show", "store-du",
    ]))]
    what: String,
}

/// As it is written: what is always there is required.
pub(super) fn of<T: JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<T>()
}

/// `kiln schema`.
pub(super) fn schema(arguments: &SchemaArguments) -> Result<ExitCode, Failure> {
    let what = arguments.what.as_str();
    let Some((_, schema)) = SCHEMAS.iter().find(|(name, _)| *name == what) else {
        let names = SCHEMAS.map(|(name, _)| name).join(", ");
        let hint = (what == "recipe").then(|| "`kiln recipe schema` prints that of recipes".to_owned());
        return Err(Failure {
            text: format!("there are schemas of {names}, not of `{what}`"),
            hint,
            code: USAGE,
        });
    };
    let text = serde_json::to_string_pretty(&schema());
    line(&text.map_err(|error| Failure::new(&error, None, FAILED))?);
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_schema_can_be_asked_for() {
        let mut command = super::super::Cli::command();
        let what = command.find_subcommand_mut("schema").expect("a verb").get_arguments().next();
        let words: Vec<String> = what
            .expect("an argument")
            .get_possible_values()
            .iter()
            .map(|value| value.get_name().to_owned())
            .collect();
        assert_eq!(words, SCHEMAS.map(|(name, _)| name));
    }
}
