//! The command line that does a failed step again, so that it can be pasted anywhere.

use std::os::unix::ffi::OsStrExt;

use crate::plan::quote;
use crate::settings;

/// This kiln's own command line: from its directory, with the settings that its environment makes.
pub(super) fn command() -> String {
    let mut line = String::new();
    if let Ok(directory) = std::env::current_dir() {
        line.push_str(&format!("cd {} &&", quote(directory.as_os_str().as_bytes())));
    }
    for (name, value) in settings::from_environment() {
        line.push_str(&format!(" {name}={}", quote(value.as_bytes())));
    }
    let words = std::env::args_os().enumerate().filter(|(index, word)| {
        // A kiln that can stay was started with one word more.
        *index != 1 || word != crate::keeper::background::SUBCOMMAND
    });
    for (_, word) in words {
        line.push(' ');
        line.push_str(&quote(word.as_bytes()));
    }
    line.trim_start().to_owned()
}
