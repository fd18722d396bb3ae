//! What others see of a guest's output: a terminal (`shows BYTES -> BYTES`), and a CI system that reads a log line
//! (`logs BYTES -> BYTES`).

use kiln::plan::{harmless, without_commands};

use super::script::{Step, Target};
use super::value::Value;

/// Nothing but two functions.
pub struct TerminalTarget;

impl Target for TerminalTarget {
    fn act(&mut self, step: &mut Step) -> Result<(), String> {
        let text = harmless(&step.bytes_at(0)?);
        let shown = match step.verb.as_str() {
            "shows" => text.into_bytes(),
            "logs" => without_commands(&text).into_bytes(),
            other => return Err(format!("`{other}` is not known here")),
        };
        let expected = step.expected().first().ok_or("what is shown?")?.1.value.clone()?;
        if shown == expected.bytes("shows")? { Ok(()) } else { Err(step.unlike(Value::Bytes(shown))) }
    }

    fn name(&self, _name: &str) -> Option<Value> {
        None
    }

    fn serve(&mut self) -> Result<(), String> {
        if harmless(b"good\n") == "good\n" { Ok(()) } else { Err("good text is changed".to_owned()) }
    }
}
