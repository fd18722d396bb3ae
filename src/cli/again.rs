//! The command lines that do a failed step again, and that enter it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::build::ScopeFlags;
use crate::plan::quote;
use crate::settings::{self, Flags};

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

/// The flags of a build, for commands about one of its steps that are given where the build was.
pub(super) struct StepCommands {
    /// Those that name other settings than there are without them.
    settings: String,
    /// Those of them that every verb about a step has.
    common: String,
    /// Those that only `kiln build` has.
    build: String,
}

impl StepCommands {
    /// Those of a build with these flags.
    pub fn new(flags: &Flags, scopes: &ScopeFlags, overwrite: bool) -> Self {
        let mut common = String::new();
        let add = |to: &mut String, name: &str, value: &OsStr| {
            to.push_str(&format!(" --{name} {}", quote(value.as_bytes())));
        };
        flags.variables.iter().for_each(|given| add(&mut common, "set", given.as_ref()));
        let texts = [
            ("project", &flags.project),
            ("store-limit", &flags.store_limit),
            ("backend", &flags.backend),
            ("debian-mirror", &flags.debian_mirror),
            ("debian-security-mirror", &flags.debian_security_mirror),
            ("debian-snapshot", &flags.debian_snapshot),
        ];
        let paths = [
            ("store", &flags.store),
            ("lock", &flags.lock),
            ("debian-keyring", &flags.debian_keyring),
            ("vendor", &flags.vendor),
            ("ca-file", &flags.ca_file),
            ("work", &flags.work),
        ];
        let texts = texts.into_iter().filter_map(|(name, text)| Some((name, text.as_ref()?.as_ref())));
        let paths = paths.into_iter().filter_map(|(name, path)| Some((name, path.as_ref()?.as_os_str())));
        texts.chain(paths).for_each(|(name, value)| add(&mut common, name, value));
        let mut settings = common.clone();
        if scopes.scope != ScopeFlags::trusted().scope {
            add(&mut settings, "scope", scopes.scope.as_ref());
        }
        scopes.read_scope.iter().for_each(|scope| add(&mut settings, "read-scope", scope.as_ref()));
        let switches = [
            ("debian-allow-expired", flags.debian_allow_expired),
            ("locked", flags.locked),
            ("offline", flags.offline),
        ];
        let words = |switches: &[(&str, bool)]| -> String {
            switches.iter().filter(|(_, is_on)| *is_on).map(|(name, _)| format!(" --{name}")).collect()
        };
        settings.push_str(&words(&switches));
        // A shell in such a step's machine has it too.
        if flags.network {
            settings.push_str(" --net full");
        }
        Self {
            settings,
            common,
            build: words(&[("overwrite", overwrite), ("no-template", flags.no_template)]),
        }
    }

    /// What does the step again.
    pub fn build(&self, step: &str) -> String {
        format!("kiln build{}{} {}", self.settings, self.build, quote(step.as_bytes()))
    }

    /// What prints all that the step said.
    pub fn log(&self, step: &str) -> String {
        format!("kiln log{} {}", self.common, quote(step.as_bytes()))
    }

    /// What opens a shell in a machine as the step gets it.
    pub fn shell(&self, step: &str) -> String {
        format!("kiln shell{} {}", self.settings, quote(step.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_about_a_step_have_the_flags_that_decide_what_it_is() {
        let flags = Flags {
            work: Some("my work".into()),
            store: Some("s".into()),
            variables: vec!["layout=single".to_owned()],
            offline: true,
            network: true,
            no_template: true,
            ..Flags::default()
        };
        let scopes = ScopeFlags { scope: "ci".to_owned(), read_scope: vec!["trusted".to_owned()] };
        let commands = StepCommands::new(&flags, &scopes, true);
        let settings = "--set layout=single --store s --work 'my work' --scope ci --read-scope trusted --offline --net full";
        assert_eq!(commands.build("a"), format!("kiln build {settings} --overwrite --no-template a"));
        assert_eq!(commands.shell("a"), format!("kiln shell {settings} a"));
        assert_eq!(commands.log("a"), "kiln log --set layout=single --store s --work 'my work' a");
        let plain = StepCommands::new(&Flags::default(), &ScopeFlags::trusted(), false);
        assert_eq!((&*plain.build("a"), &*plain.shell("a")), ("kiln build a", "kiln shell a"));
    }
}
