//! A script carried out on a machine: what it prints and does comes in over one channel, and each statement in turn is
//! met, or is not and ends the trial. No process is started here, and no clock is read but through what comes in.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use regex::bytes::Regex;

use super::console::Console;
use super::script::{DEFAULT_PATIENCE, Statement, Step};
use crate::machine::qemu::firmware::GuestEvent;

/// What comes in.
#[derive(Debug)]
pub enum Input {
    /// Printed on the serial console.
    Printed(Vec<u8>),
    /// The serial console ended.
    Silent,
    /// What the machine did.
    Event(GuestEvent),
}

/// What the machine can be asked for.
pub trait Rig {
    /// Types at the serial console.
    ///
    /// # Errors
    /// Why that cannot be done, in words.
    fn type_in(&mut self, bytes: &[u8]) -> Result<(), String>;

    /// Runs a command over ssh until `deadline`.
    ///
    /// # Errors
    /// Why it did not succeed, in words.
    fn ssh(&mut self, command: &str, deadline: Instant) -> Result<(), String>;

    /// Something happened; a verdict is the moment for a picture.
    fn told(&mut self, moment: &Moment);
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A line ended on the serial console. A guest's bytes.
    Line(Vec<u8>),
    /// The guest restarted its machine.
    Reset,
    /// The guest switched it off.
    PowerOff,
    /// A statement was met, or not: why, in words in which a guest's are harmless.
    Verdict {
        /// Its index in the script.
        index: usize,
        /// None: met.
        failure: Option<String>,
        /// Since the statement before it.
        took: Duration,
    },
}

/// What happened and when, since the machine was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// When.
    pub at: Duration,
    /// What.
    pub what: What,
}

/// How a trial went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// As the script wants it.
    Met,
    /// Statement `index` was not met.
    NotMet {
        /// Its index in the script.
        index: usize,
        /// Why, in words.
        why: String,
    },
    /// There is no script, and the machine ended by itself.
    Over,
}

/// Ends the current statement.
type Failed = (usize, String);

struct Trial<'a> {
    script: &'a [Statement],
    rig: &'a mut dyn Rig,
    inputs: &'a Receiver<Input>,
    started: Instant,
    console: Console,
    rejected: Vec<(usize, Regex)>,
    resets: usize,
    is_off: bool,
    is_silent: bool,
    is_gone: bool,
}

/// Carries out `script`; without statements, waits for the machine's end.
pub fn carry_out(
    script: &[Statement],
    rig: &mut dyn Rig,
    inputs: &Receiver<Input>,
    started: Instant,
) -> Outcome {
    let mut trial = Trial {
        script,
        rig,
        inputs,
        started,
        console: Console::default(),
        rejected: Vec::new(),
        resets: 0,
        is_off: false,
        is_silent: false,
        is_gone: false,
    };
    let mut patience = DEFAULT_PATIENCE;
    for index in 0..script.len() {
        let before = Instant::now();
        if let Step::Within(time) = script[index].step {
            patience = time;
            continue;
        }
        let result = trial.meet(index, patience);
        let (index, failure) = match result {
            Ok(()) => (index, None),
            Err((index, why)) => (index, Some(why)),
        };
        // That something did not come is known at the end.
        if failure.is_some() || !matches!(script[index].step, Step::Reject(_)) {
            trial.note(What::Verdict { index, failure: failure.clone(), took: before.elapsed() });
        }
        if let Some(why) = failure {
            return Outcome::NotMet { index, why };
        }
    }
    if script.is_empty() {
        while !trial.is_over() {
            if trial.take(None, 0).is_err() {
                break;
            }
        }
        return Outcome::Over;
    }
    for index in trial.rejected.iter().map(|(index, _)| *index).collect::<Vec<_>>() {
        trial.note(What::Verdict { index, failure: None, took: Duration::ZERO });
    }
    Outcome::Met
}

impl Trial<'_> {
    fn note(&mut self, what: What) {
        self.rig.told(&Moment { at: self.started.elapsed(), what });
    }

    /// Whether nothing will come any more.
    fn is_over(&self) -> bool {
        self.is_silent && self.is_gone
    }

    fn meet(&mut self, index: usize, patience: Duration) -> Result<(), Failed> {
        let deadline = Instant::now() + patience;
        match &self.script[index].step {
            Step::Within(_) => Ok(()),
            Step::Send(bytes) => self.rig.type_in(bytes).map_err(|why| (index, why)),
            Step::Reject(regex) => {
                self.rejected.push((index, regex.clone()));
                let found = self.console.unseen().find(|line| regex.is_match(line)).map(<[u8]>::to_vec);
                found.map_or(Ok(()), |line| Err((index, rejected(&line))))
            }
            Step::Expect(regex) => self.wait(index, deadline, patience, |trial| trial.console.find(regex)),
            Step::Reboot => self.wait(index, deadline, patience, |trial| {
                let has = trial.resets > 0;
                trial.resets -= usize::from(has);
                has
            }),
            Step::PowerOff => self.wait(index, deadline, patience, |trial| trial.is_off && trial.is_over()),
            Step::Ssh(command) => {
                let result = self.rig.ssh(command, deadline).map_err(|why| (index, why));
                // What was printed meanwhile may have been rejected.
                while let Ok(input) = self.inputs.try_recv() {
                    self.receive(input)?;
                }
                result
            }
        }
    }

    fn wait(
        &mut self,
        index: usize,
        deadline: Instant,
        patience: Duration,
        mut is_met: impl FnMut(&mut Self) -> bool,
    ) -> Result<(), Failed> {
        loop {
            if is_met(self) {
                return Ok(());
            }
            let may_reset =
                self.script[index..].iter().any(|statement| matches!(statement.step, Step::Reboot));
            if self.resets > 0 && !may_reset {
                return Err((index, "the guest restarted its machine".to_owned()));
            }
            if self.is_over() {
                let how =
                    if self.is_off { "the guest switched its machine off" } else { "the machine is gone" };
                return Err((index, how.to_owned()));
            }
            if !self.take(Some(deadline), index)? {
                let mut why = format!("not within {}", crate::plan::show_duration(patience));
                if self.console.is_empty_so_far() {
                    why.push_str("; nothing was printed at all");
                }
                return Err((index, why));
            }
        }
    }

    /// Takes what comes in next; false where nothing did until `deadline`.
    fn take(&mut self, deadline: Option<Instant>, index: usize) -> Result<bool, Failed> {
        let input = match deadline {
            Some(deadline) => {
                match self.inputs.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(input) => input,
                    Err(RecvTimeoutError::Timeout) => return Ok(false),
                    Err(RecvTimeoutError::Disconnected) => {
                        return Err((index, "the machine is gone".to_owned()));
                    }
                }
            }
            None => self.inputs.recv().map_err(|_| (index, "the machine is gone".to_owned()))?,
        };
        self.receive(input)?;
        // A guest that never stops printing must not hold off the end of the statement's time.
        Ok(deadline.is_none_or(|deadline| Instant::now() < deadline))
    }

    fn receive(&mut self, input: Input) -> Result<(), Failed> {
        match input {
            Input::Printed(bytes) => {
                for line in self.console.feed(&bytes) {
                    self.note(What::Line(line.clone()));
                    self.refuse(&line)?;
                }
                let current = self.console.current().to_vec();
                self.refuse(&current)
            }
            Input::Silent => {
                self.is_silent = true;
                Ok(())
            }
            Input::Event(GuestEvent::Ended) => {
                self.is_gone = true;
                Ok(())
            }
            Input::Event(GuestEvent::Reset) => {
                self.resets += 1;
                self.note(What::Reset);
                Ok(())
            }
            Input::Event(GuestEvent::PowerOff) => {
                self.is_off = true;
                self.note(What::PowerOff);
                Ok(())
            }
        }
    }

    fn refuse(&self, line: &[u8]) -> Result<(), Failed> {
        match self.rejected.iter().find(|(_, regex)| regex.is_match(line)) {
            Some((index, _)) => Err((*index, rejected(line))),
            None => Ok(()),
        }
    }
}

fn rejected(line: &[u8]) -> String {
    format!("the guest printed: {}", crate::plan::harmless(line))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::boot::script::parse;

    #[derive(Default)]
    struct Played {
        typed: Vec<u8>,
        verdicts: Vec<(usize, bool)>,
    }

    impl Rig for Played {
        fn type_in(&mut self, bytes: &[u8]) -> Result<(), String> {
            self.typed.extend(bytes);
            Ok(())
        }

        fn ssh(&mut self, command: &str, _: Instant) -> Result<(), String> {
            if command == "true" { Ok(()) } else { Err("exited with status 1".to_owned()) }
        }

        fn told(&mut self, moment: &Moment) {
            if let What::Verdict { index, failure, .. } = &moment.what {
                self.verdicts.push((*index, failure.is_none()));
            }
        }
    }

    fn printed(text: &str) -> Input {
        Input::Printed(text.as_bytes().to_vec())
    }

    /// A script against inputs that are all there. The machine then stays as it is.
    fn play(script: &str, inputs: Vec<Input>) -> (Outcome, Played) {
        let statements = parse("script", script).expect("a good script");
        let (sender, receiver) = mpsc::channel();
        for input in inputs {
            sender.send(input).expect("it is held below");
        }
        let mut rig = Played::default();
        let outcome = carry_out(&statements, &mut rig, &receiver, Instant::now());
        drop(sender);
        (outcome, rig)
    }

    fn not_met(script: &str, inputs: Vec<Input>) -> (usize, String) {
        match play(script, inputs).0 {
            Outcome::NotMet { index, why } => (index, why),
            outcome => (usize::MAX, format!("{outcome:?}")),
        }
    }

    #[test]
    fn a_script_that_is_met_types_and_judges_in_order() {
        let script = "expect login:\nsend root\nreboot\nexpect login:\nssh true\npoweroff";
        let inputs = vec![
            printed("hello\nlogin: "),
            Input::Event(GuestEvent::Reset),
            printed("\nlogin: "),
            Input::Event(GuestEvent::PowerOff),
            Input::Event(GuestEvent::Ended),
            Input::Silent,
        ];
        let (outcome, rig) = play(script, inputs);
        assert_eq!(outcome, Outcome::Met);
        assert_eq!(rig.typed, b"root\r");
        assert_eq!(rig.verdicts, (0..6).map(|index| (index, true)).collect::<Vec<_>>());
    }

    #[test]
    fn a_rejected_text_fails_the_statement_that_rejects_it() {
        let (index, why) = not_met("reject panic\nexpect login:", vec![printed("Kernel panic\nlogin: ")]);
        assert_eq!((index, why.as_str()), (0, "the guest printed: Kernel panic"));
        // Also where it is there before, and where its line has no end.
        assert_eq!(not_met("expect a\nreject b", vec![printed("a b")]).0, 1);
        let (outcome, rig) = play("reject c\nexpect a", vec![printed("a")]);
        assert_eq!((outcome, rig.verdicts), (Outcome::Met, vec![(1, true), (0, true)]));
    }

    #[test]
    fn what_never_comes_ends_with_its_time_and_says_so() {
        let (index, why) = not_met("within 10ms\nexpect login:", vec![]);
        assert_eq!(index, 1);
        assert!(why.contains("not within") && why.contains("nothing was printed at all"), "{why}");
        let (_, why) = not_met("within 10ms\nexpect login:", vec![printed("x")]);
        assert!(!why.contains("nothing"), "{why}");
    }

    #[test]
    fn a_machine_that_ends_or_restarts_when_it_should_not_is_named() {
        let gone =
            || vec![Input::Event(GuestEvent::PowerOff), Input::Event(GuestEvent::Ended), Input::Silent];
        assert!(not_met("expect login:", gone()).1.contains("switched its machine off"));
        let killed = vec![Input::Event(GuestEvent::Ended), Input::Silent];
        assert!(not_met("expect login:", killed).1.contains("the machine is gone"));
        assert!(not_met("expect login:", vec![Input::Event(GuestEvent::Reset)]).1.contains("restarted"));
        let reset_first = vec![Input::Event(GuestEvent::Reset), printed("bye\n")];
        assert_eq!(
            play("expect bye\nreboot", reset_first).0,
            Outcome::Met,
            "it was printed before it was read"
        );
    }

    #[test]
    fn what_was_printed_before_the_end_still_counts() {
        let inputs = vec![
            Input::Event(GuestEvent::PowerOff),
            Input::Event(GuestEvent::Ended),
            printed("the last words\n"),
            Input::Silent,
        ];
        assert_eq!(play("expect last words\npoweroff", inputs).0, Outcome::Met);
    }

    #[test]
    fn a_command_that_fails_over_ssh_says_how() {
        assert_eq!(not_met("ssh false", vec![]), (0, "exited with status 1".to_owned()));
    }
}
