//! What the registry says of a machine.

use std::time::Duration;

use kiln_digest::Digest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::machine::{Accelerator, Identity, Spec};

/// How much of a command is kept for showing.
const SHOWN_BYTES: usize = 1000;
/// The version of this kiln.
pub(super) const VERSION_OF_KILN: &str = env!("CARGO_PKG_VERSION");
/// What machines that wait for a step are called, and no other.
const READY: &str = "ready";
/// How much of a program's name goes into its machine's.
const NAME_BYTES: usize = 20;

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its step runs.
    Running,
    /// Its step is over, and it can be entered.
    Kept,
    /// It waits for a step.
    Ready,
    /// Something that a later kiln knows.
    #[serde(other)]
    Other,
}

impl State {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Kept => "kept",
            Self::Ready => "ready",
            Self::Other => "other",
        }
    }
}

/// A machine as the registry has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Entry {
    /// Its name; empty until it is registered.
    #[serde(default)]
    pub name: String,
    /// What its name begins with; its program's name where this is empty. Known only until it is registered.
    #[serde(skip)]
    pub called: String,
    /// What it is doing.
    pub state: State,
    /// The step.
    pub step: String,
    /// The step's command, for showing: words that may be cut, whatever bytes they had.
    pub command: Vec<String>,
    /// The process that holds it.
    pub pid: i32,
    /// When it was started, in seconds since 1970-01-01 UTC.
    pub started: u64,
    /// How long it stays with nobody in it, once it is kept.
    #[serde(default)]
    pub idle_seconds: Option<u64>,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Processors.
    pub cpus: u16,
    /// For which steps it is ready, where it waits for one.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub key: Option<Digest>,
    /// The version of the kiln that holds it; empty in an older one's.
    #[serde(default)]
    pub kiln: String,
    /// The processes that hold its memory, or that started those; none in an older one's.
    #[serde(default)]
    pub processes: Vec<i32>,
    /// Backend and its version.
    pub backend: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
}

impl Entry {
    /// A machine of this process that begins to run `command` of `step` now.
    pub fn running(
        step: &str,
        command: &[Vec<u8>],
        memory_bytes: u64,
        cpus: u16,
        identity: &Identity,
    ) -> Self {
        let since = crate::clock::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let mut room = SHOWN_BYTES;
        let mut shown = Vec::new();
        for word in command {
            let mut word = String::from_utf8_lossy(word).into_owned();
            word.truncate(word.floor_char_boundary(room));
            room -= word.len();
            shown.push(word);
            if room == 0 {
                break;
            }
        }
        Self {
            name: String::new(),
            called: String::new(),
            state: State::Running,
            step: step.to_owned(),
            command: shown,
            pid: rustix::process::getpid().as_raw_pid(),
            started: since.as_secs(),
            idle_seconds: None,
            memory_bytes,
            cpus,
            key: None,
            kiln: VERSION_OF_KILN.to_owned(),
            processes: Vec::new(),
            backend: identity.backend.clone(),
            accelerator: match identity.accelerator {
                Accelerator::Kvm => "kvm",
                Accelerator::Tcg => "tcg",
            }
            .to_owned(),
        }
    }

    /// A machine of this process that waits for a step of this key, for so long.
    pub fn ready(spec: &Spec, identity: &Identity, key: &Digest, idle: Duration) -> Self {
        let running = Self::running("", &[], spec.memory_bytes, spec.cpus, identity);
        Self { state: State::Ready, key: Some(*key), idle_seconds: Some(idle.as_secs()), ..running }
    }

    /// A name for the machine: what it or its program is called, and something that tells it from others.
    pub(super) fn suggest_name(&self, salt: &[u8]) -> String {
        let program = self.command.first().map_or("", String::as_str);
        let program = program.rsplit('/').next().unwrap_or_default();
        let called = if self.called.is_empty() { program } else { &self.called };
        let mut name: String = called
            .chars()
            .map(|c| c.to_ascii_lowercase())
            .filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-')
            .skip_while(|c| *c == '-')
            .take(NAME_BYTES)
            .collect();
        if self.state == State::Ready {
            READY.clone_into(&mut name);
        } else if name.is_empty() || name == READY {
            "machine".clone_into(&mut name);
        }
        let digest = Digest::of(salt).to_string();
        format!("{name}-{}", &digest[..4])
    }
}

/// Whether a machine of this name waits for a step.
pub(super) fn is_name_of_ready(name: &str) -> bool {
    name.rsplit_once('-').is_some_and(|(program, _)| program == READY)
}

/// Whether some text can be a machine's name. None leads out of the registry's folder.
pub(super) fn is_name(text: &str) -> bool {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=64).contains(&text.len()) && text.chars().all(good) && !text.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Origin;
    use crate::machine::jail::Held;

    fn entry(command: &[&[u8]]) -> Entry {
        let identity = Identity {
            backend: "x".into(),
            accelerator: Accelerator::Tcg,
            jail: Held::default(),
            origin: Origin::Boot,
        };
        let command: Vec<Vec<u8>> = command.iter().map(|word| word.to_vec()).collect();
        Entry::running("run", &command, 1 << 30, 1, &identity)
    }

    #[test]
    fn a_machine_is_named_after_its_program() {
        for (program, start) in [
            (&b"/usr/bin/make"[..], "make-"),
            (b"./Build.SH", "buildsh-"),
            (b"../..", "machine-"),
            (b"--x", "x-"),
            (b"\xff\x1b[31m", "31m-"),
            (b"", "machine-"),
            (b"ready-made", "ready-made-"),
            (b"/bin/ready", "machine-"),
            (&[b'a'; 300], "aaaaaaaaaaaaaaaaaaaa-"),
        ] {
            let name = entry(&[program]).suggest_name(b"salt");
            assert!(name.starts_with(start) && name.len() == start.len() + 4, "{name}");
            assert!(is_name(&name) && !is_name_of_ready(&name), "{name}");
        }
    }

    #[test]
    fn the_machine_of_a_recipe_s_step_is_named_after_the_step() {
        let entry = Entry { called: "Link.x86-64".into(), ..entry(&[b"/bin/sh"]) };
        let name = entry.suggest_name(b"salt");
        assert!(name.starts_with("linkx86-64-") && is_name(&name), "{name}");
    }

    #[test]
    fn a_machine_that_waits_for_a_step_is_told_by_its_name() {
        let entry = Entry { state: State::Ready, ..entry(&[b"make"]) };
        let name = entry.suggest_name(b"salt");
        assert!(is_name(&name) && is_name_of_ready(&name), "{name}");
    }

    #[test]
    fn what_leads_elsewhere_is_no_name() {
        for text in ["", ".", "..", "a/b", "/etc", ".new", "A", "a b", "-x", "a\0", &"a".repeat(65)] {
            assert!(!is_name(text), "{text:?}");
        }
    }

    #[test]
    fn a_long_command_is_cut_for_showing() {
        let long = "ä".repeat(2000);
        let entry = entry(&[b"sh", long.as_bytes(), b"never"]);
        assert_eq!(entry.command.len(), 2);
        assert!(entry.command[1].len() < SHOWN_BYTES);
    }

    #[test]
    fn a_state_that_a_later_kiln_knows_is_still_a_machine() {
        let mut json = serde_json::to_value(entry(&[b"sh"])).expect("JSON");
        json["state"] = "new".into();
        json["more"] = 1.into();
        let read: Entry = serde_json::from_value(json).expect("an entry");
        assert_eq!(read.state, State::Other);
    }
}
