//! A script carried out on a machine: what it prints and does comes in over one channel, and each statement in turn is
//! met, or is not and ends the trial. No process is started here, and no clock is read but through what comes in.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use regex::bytes::Regex;

use super::console::Console;
use crate::machine::qemu::firmware::GuestEvent;
use crate::plan::script::{Statement, Step};

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
    /// Why it did not end, in words.
    fn ssh(&mut self, command: &str, deadline: Instant) -> Result<Answer, String>;

    /// The guest's host key, where a connection has just shown it for the first time.
    fn host_key(&mut self) -> Option<String>;

    /// Keeps what is on the screen under a name.
    ///
    /// # Errors
    /// Why that cannot be done, in words.
    fn screenshot(&mut self, name: &str) -> Result<(), String>;

    /// Something happened; a verdict is the moment for a picture.
    fn told(&mut self, moment: &Moment);
}

/// What a command over ssh came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its status; else how it ended, in words.
    pub ended: Result<u32, String>,
    /// What it printed, up to a limit. A guest's bytes.
    pub output: Vec<u8>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A line ended on the serial console. A guest's bytes.
    Line(Vec<u8>),
    /// A line that a command over ssh printed. A guest's bytes.
    Output(Vec<u8>),
    /// The guest's host key, at the first connection over ssh: its kind and fingerprint.
    HostKey(String),
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
    /// There is no script, and nothing came of the image at all: why that is all, in words.
    Mute(String),
    /// There is no script, and the machine ended without its guest's doing: what is known of it, in words.
    Died(String),
}

/// What the firmware's boot manager begins a line with where it hands over to what it boots; where it tells anything
/// else; and its shell, which it starts where there is nothing to boot.
const HANDED_OVER: &[u8] = b"BdsDxe: starting ";
const FIRMWARE: [&[u8]; 2] = [b"BdsDxe: ", b"Shell>"];
/// How long the rest of a line with a rejected text may take.
const REST_OF_LINE: Duration = Duration::from_millis(300);

/// What of a command's output is shown where it is not as it should be.
const SHOWN_BYTES: usize = 4096;

/// Ends the current statement.
type Failed = (usize, String);

/// A text that may not come.
struct Rejected {
    index: usize,
    regex: Regex,
    // From where on, in bytes of all text of the console.
    from: usize,
}

struct Trial<'a> {
    script: &'a [Statement],
    rig: &'a mut dyn Rig,
    inputs: &'a Receiver<Input>,
    started: Instant,
    console: Console,
    // The last line that ended with something in it.
    last_line: Vec<u8>,
    // What the last command over ssh printed.
    output: Vec<u8>,
    rejected: Vec<Rejected>,
    resets: usize,
    is_off: bool,
    is_silent: bool,
    is_gone: bool,
}

/// Carries out `script`, in which a statement waits for `patience` until `within` says otherwise. Without statements,
/// waits for the machine's end. A `reject` that nothing which waits follows is watched for as long as it may wait, or until
/// the guest switches its machine off.
pub fn carry_out(
    script: &[Statement],
    rig: &mut dyn Rig,
    inputs: &Receiver<Input>,
    started: Instant,
    patience: Duration,
) -> Outcome {
    let mut trial = Trial {
        script,
        rig,
        inputs,
        started,
        console: Console::default(),
        last_line: Vec::new(),
        output: Vec::new(),
        rejected: Vec::new(),
        resets: 0,
        is_off: false,
        is_silent: false,
        is_gone: false,
    };
    let outcome = trial.play(patience);
    // What was met may stand in a line that nothing ends any more, such as a prompt: the report has it too.
    let rest = trial.console.current().to_vec();
    if !rest.trim_ascii().is_empty() {
        trial.note(What::Line(rest));
    }
    outcome
}

impl Trial<'_> {
    fn play(&mut self, mut patience: Duration) -> Outcome {
        // Until when a `reject` is watched that nothing which waits follows, and its index.
        let mut watched: Option<(Instant, usize)> = None;
        for index in 0..self.script.len() {
            let before = Instant::now();
            if let Step::Within(time) = self.script[index].step {
                patience = time;
                continue;
            }
            let result = self.meet(index, patience);
            let (index, failure) = match result {
                Ok(()) => (index, None),
                Err((index, why)) => (index, Some(why)),
            };
            // That something did not come is known at the end.
            if failure.is_some() || !matches!(self.script[index].step, Step::Reject(_)) {
                self.note(What::Verdict { index, failure: failure.clone(), took: before.elapsed() });
            }
            if let Some(why) = failure {
                return Outcome::NotMet { index, why };
            }
            let is_reject = matches!(self.script[index].step, Step::Reject(_));
            if is_reject && !self.script[index..].iter().any(Statement::waits) {
                watched = watched.max(Some((before + patience, index)));
            }
        }
        if self.script.is_empty() {
            return self.watch(patience);
        }
        let before = Instant::now();
        if let Some((until, index)) = watched
            && let Err((index, why)) = self.wait_until(index, until, |trial| trial.is_off && trial.is_over())
        {
            self.note(What::Verdict { index, failure: Some(why.clone()), took: before.elapsed() });
            return Outcome::NotMet { index, why };
        }
        let waited = before.elapsed();
        for index in self.rejected.iter().map(|rejected| rejected.index).collect::<Vec<_>>() {
            let is_last = watched.is_some_and(|(_, last)| last == index);
            let took = if is_last { waited } else { Duration::ZERO };
            self.note(What::Verdict { index, failure: None, took });
        }
        Outcome::Met
    }

    fn note(&mut self, what: What) {
        self.rig.told(&Moment { at: self.started.elapsed(), what });
    }

    /// Waits for the machine's end. One of which nothing came but what firmware prints is not waited for forever.
    fn watch(&mut self, patience: Duration) -> Outcome {
        while !self.is_over() {
            let deadline = Instant::now() + patience;
            match self.take(self.is_mute().then_some(deadline), 0) {
                Err(_) => break,
                Ok(false) if self.is_mute() && Instant::now() >= deadline => {
                    let time = crate::plan::show_duration(patience);
                    return Outcome::Mute(format!("nothing came for {time}{}", self.last_words()));
                }
                Ok(_) => {}
            }
        }
        Outcome::Over
    }

    /// The last line with something in it, whether it has ended or not.
    fn last(&self) -> &[u8] {
        let current = self.console.current().trim_ascii();
        if current.is_empty() { &self.last_line } else { current }
    }

    /// Whether nothing came, or the firmware has the last word.
    fn is_mute(&self) -> bool {
        self.last().is_empty() || FIRMWARE.iter().any(|word| self.last().starts_with(word))
    }

    /// Where the console stands, for somebody who waited for more.
    fn last_words(&self) -> String {
        let last = self.last();
        if last.is_empty() {
            return "; nothing was printed at all".to_owned();
        }
        let shown = crate::plan::harmless(last);
        if last.starts_with(HANDED_OVER) {
            format!("; the firmware handed over, and the image printed nothing: {shown}")
        } else if self.is_mute() {
            format!("; the firmware does not boot the image: {shown}")
        } else {
            format!("; the last line was: {shown}")
        }
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
                let from = self.console.position();
                self.rejected.push(Rejected { index, regex: regex.clone(), from });
                self.console.unseen().try_for_each(|(start, text)| self.refuse(start, text))
            }
            Step::Expect(regex) => self.wait(index, deadline, patience, |trial| trial.console.find(regex)),
            Step::Reboot => self.wait(index, deadline, patience, |trial| {
                let has = trial.resets > 0;
                trial.resets -= usize::from(has);
                has
            }),
            Step::PowerOff => self.wait(index, deadline, patience, |trial| trial.is_off && trial.is_over()),
            Step::Ssh { command, status } => {
                let result = self.rig.ssh(command, deadline);
                if let Some(key) = self.rig.host_key() {
                    self.note(What::HostKey(key));
                }
                // What was printed meanwhile may have been rejected.
                while let Ok(input) = self.inputs.try_recv() {
                    self.receive(input)?;
                }
                let Answer { ended, output } = result.map_err(|why| {
                    (index, if self.is_gone { self.how_it_ended().to_owned() } else { why })
                })?;
                for line in lines(&output) {
                    self.note(What::Output(line.to_vec()));
                }
                self.output = output;
                match ended {
                    Ok(ended) if ended == *status => Ok(()),
                    Ok(ended) => Err(format!("exited with status {ended}")),
                    Err(how) => Err(how),
                }
                .map_err(|how| {
                    let said = crate::plan::harmless(&self.output[..self.output.len().min(SHOWN_BYTES)]);
                    (index, format!("`{command}` {how}: {}", said.trim()))
                })
            }
            Step::Output(regex) => match lines(&self.output).any(|line| regex.is_match(line)) {
                true => Ok(()),
                false => {
                    let said = crate::plan::harmless(&self.output[..self.output.len().min(SHOWN_BYTES)]);
                    Err((index, format!("the command printed: {}", said.trim())))
                }
            },
            Step::Screenshot(name) => self.rig.screenshot(name).map_err(|why| (index, why)),
        }
    }

    fn wait(
        &mut self,
        index: usize,
        deadline: Instant,
        patience: Duration,
        is_met: impl FnMut(&mut Self) -> bool,
    ) -> Result<(), Failed> {
        if self.wait_until(index, deadline, is_met)? {
            return Ok(());
        }
        let time = crate::plan::show_duration(patience);
        Err((index, format!("not within {time}{}", self.last_words())))
    }

    /// Waits until something is so; false where it is not by `deadline`.
    fn wait_until(
        &mut self,
        index: usize,
        deadline: Instant,
        mut is_met: impl FnMut(&mut Self) -> bool,
    ) -> Result<bool, Failed> {
        loop {
            if is_met(self) {
                return Ok(true);
            }
            let may_reset =
                self.script[index..].iter().any(|statement| matches!(statement.step, Step::Reboot));
            if self.resets > 0 && !may_reset {
                return Err((index, "the guest restarted its machine".to_owned()));
            }
            if self.is_over() {
                return Err((index, self.how_it_ended().to_owned()));
            }
            if !self.take(Some(deadline), index)? {
                return Ok(false);
            }
        }
    }

    /// Why nothing will come any more.
    fn how_it_ended(&self) -> &'static str {
        if self.is_off { "the guest switched its machine off" } else { "the machine is gone" }
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
                    self.note(What::Line(line.text.clone()));
                    let refused = self.refuse(line.start, &line.text);
                    self.last_line = line.text;
                    refused?;
                }
                match self.refuse(self.console.current_start(), self.console.current()) {
                    Ok(()) => Ok(()),
                    Err((index, _)) => Err((index, rejected(&self.rest_of_line()))),
                }
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

    /// The line that has not ended, with what else comes of it soon: a rejected text is told with what follows it.
    fn rest_of_line(&mut self) -> Vec<u8> {
        let give_up = Instant::now() + REST_OF_LINE;
        while let Ok(input) = self.inputs.recv_timeout(give_up.saturating_duration_since(Instant::now())) {
            let Input::Printed(bytes) = input else { continue };
            let ended = self.console.feed(&bytes);
            for line in &ended {
                self.note(What::Line(line.text.clone()));
            }
            if let Some(line) = ended.into_iter().next() {
                return line.text;
            }
        }
        self.console.current().to_vec()
    }

    /// Fails where the line that begins at `start` has what is rejected, behind where that began.
    fn refuse(&self, start: usize, line: &[u8]) -> Result<(), Failed> {
        for one in &self.rejected {
            if one.regex.is_match_at(line, one.from.saturating_sub(start).min(line.len())) {
                return Err((one.index, rejected(line)));
            }
        }
        Ok(())
    }
}

/// The lines of what a command printed.
fn lines(output: &[u8]) -> impl Iterator<Item = &[u8]> {
    output.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end)
}

fn rejected(line: &[u8]) -> String {
    format!("the guest printed: {}", crate::plan::harmless(line))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::plan::script::parse;

    #[derive(Default)]
    struct Played {
        typed: Vec<u8>,
        lines: Vec<String>,
        verdicts: Vec<(usize, bool)>,
    }

    impl Rig for Played {
        fn type_in(&mut self, bytes: &[u8]) -> Result<(), String> {
            self.typed.extend(bytes);
            Ok(())
        }

        fn ssh(&mut self, command: &str, _: Instant) -> Result<Answer, String> {
            let ended = match command {
                "true" => Ok(0),
                "false" => Ok(1),
                "unanswered" => return Err("no ssh: nobody is there".to_owned()),
                _ => Err("was killed by SIGKILL".to_owned()),
            };
            Ok(Answer { ended, output: format!("this is\r\n{command}\n").into_bytes() })
        }

        fn host_key(&mut self) -> Option<String> {
            None
        }

        fn screenshot(&mut self, name: &str) -> Result<(), String> {
            if name == "dark" { Err("QEMU has no pictures".to_owned()) } else { Ok(()) }
        }

        fn told(&mut self, moment: &Moment) {
            match &moment.what {
                What::Verdict { index, failure, .. } => self.verdicts.push((*index, failure.is_none())),
                What::Line(line) => self.lines.push(String::from_utf8_lossy(line).into_owned()),
                _ => {}
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
        let outcome = carry_out(&statements, &mut rig, &receiver, Instant::now(), Duration::from_millis(20));
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
    fn a_line_that_was_met_is_told_though_it_has_not_ended() {
        for (script, met) in [("expect FAILED", true), ("reject FAILED\nexpect never", false)] {
            let (outcome, rig) = play(script, vec![printed("first\nINITOS: FAILED")]);
            assert_eq!(outcome == Outcome::Met, met);
            assert_eq!(rig.lines, ["first", "INITOS: FAILED"]);
        }
    }

    #[test]
    fn a_rejected_text_fails_the_statement_that_rejects_it() {
        let (index, why) = not_met("reject panic\nexpect login:", vec![printed("Kernel panic\nlogin: ")]);
        assert_eq!((index, why.as_str()), (0, "the guest printed: Kernel panic"));
        let pieces = ["Kernel pan", "ic: no", "t syncing\nmore\n"].map(printed).into_iter().collect();
        assert_eq!(
            not_met("reject panic\nexpect login:", pieces).1,
            "the guest printed: Kernel panic: not syncing"
        );
        // Also where it is there before, and where its line has no end.
        assert_eq!(not_met("expect a\nreject b", vec![printed("a b")]).0, 1);
        let (outcome, rig) = play("reject c\nexpect a", vec![printed("a")]);
        assert_eq!((outcome, rig.verdicts), (Outcome::Met, vec![(1, true), (0, true)]));
    }

    #[test]
    fn a_reject_that_nothing_waits_after_is_watched_for_its_time() {
        for (script, rejecting) in [("reject panic", 0), ("expect up\nreject panic\nsend x\nscreenshot y", 1)]
        {
            let inputs = vec![printed("up\n"), printed("Kernel panic\n")];
            assert_eq!(not_met(script, inputs), (rejecting, "the guest printed: Kernel panic".to_owned()));
        }
        let before = Instant::now();
        let (outcome, rig) =
            play("within 60ms\nreject panic\nwithin 1ms\nreject oops", vec![printed("up\n")]);
        assert_eq!((outcome, rig.verdicts), (Outcome::Met, vec![(1, true), (3, true)]));
        assert!(before.elapsed() >= Duration::from_millis(60), "the longest time counts");
    }

    #[test]
    fn a_reject_that_nothing_waits_after_ends_with_the_machine() {
        let script = "within 1h\nreject panic";
        let off = |text| {
            vec![
                Input::Event(GuestEvent::PowerOff),
                Input::Event(GuestEvent::Ended),
                printed(text),
                Input::Silent,
            ]
        };
        assert_eq!(play(script, off("bye\n")).0, Outcome::Met);
        assert_eq!(not_met(script, off("panic\n")), (1, "the guest printed: panic".to_owned()));
        // What ended without its guest's doing, or began anew, has not shown that it says nothing.
        let killed = vec![Input::Event(GuestEvent::Ended), Input::Silent];
        assert_eq!(not_met(script, killed), (1, "the machine is gone".to_owned()));
        assert!(not_met(script, vec![Input::Event(GuestEvent::Reset)]).1.contains("restarted"));
    }

    #[test]
    fn a_reject_judges_nothing_that_was_matched_before_it() {
        let script = "expect login:\nsend root\nreject login:";
        let prompt = |then| vec![printed("host login: "), printed("root\r\n"), printed(then)];
        assert_eq!(play(script, prompt("Welcome\n")).0, Outcome::Met);
        assert_eq!(
            not_met(script, prompt("host login: \n")),
            (2, "the guest printed: host login: ".to_owned())
        );
        // The rest of the line is behind it, whether it is there already or not.
        let whole = vec![printed("login: login: \n")];
        let pieces = ["login: ", "log", "in: \n"].map(printed).into_iter().collect();
        for inputs in [whole, pieces] {
            assert_eq!(not_met(script, inputs), (2, "the guest printed: login: login: ".to_owned()));
        }
    }

    #[test]
    fn what_never_comes_ends_with_its_time_and_says_so() {
        let (index, why) = not_met("within 10ms\nexpect login:", vec![]);
        assert_eq!(index, 1);
        assert!(why.contains("not within") && why.contains("nothing was printed at all"), "{why}");
        let waited = |text| not_met("within 10ms\nexpect login:", vec![printed(text)]).1;
        let why = waited("first\nx");
        assert!(!why.contains("nothing") && why.ends_with("the last line was: x"), "{why}");
        let why = waited("BdsDxe: starting Boot0001 \"x\"\r\n");
        assert!(
            why.contains("handed over, and the image printed nothing: BdsDxe: starting Boot0001"),
            "{why}"
        );
        assert!(waited("Press ESC\nShell> ").contains("does not boot the image: Shell>"));
        let why = waited("BdsDxe: starting Boot0001\nBdsDxe: No bootable option or device was found.\n");
        assert!(why.contains("does not boot the image: BdsDxe: No bootable"), "{why}");
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
    fn an_image_that_prints_nothing_is_not_watched_forever() {
        for printed_by_firmware in [vec![], vec![printed("BdsDxe: starting Boot0001\n")]] {
            let outcome = play("", printed_by_firmware).0;
            assert!(
                matches!(&outcome, Outcome::Mute(why) if why.contains("printed nothing") || why.contains("nothing was printed")),
                "{outcome:?}"
            );
        }
        let end = || vec![Input::Event(GuestEvent::Ended), Input::Silent];
        assert_eq!(play("", end()).0, Outcome::Over);
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
        let (index, why) = not_met("ssh true\nssh false", vec![]);
        assert_eq!((index, why.as_str()), (1, "`false` exited with status 1: this is\nfalse"));
        assert!(not_met("ssh other", vec![]).1.starts_with("`other` was killed by SIGKILL"));
        assert_eq!(not_met("ssh=1 true", vec![]).0, 0);
        assert_eq!(play("ssh=1 false", vec![]).0, Outcome::Met);
        let off = vec![Input::Event(GuestEvent::PowerOff), Input::Event(GuestEvent::Ended)];
        assert_eq!(not_met("ssh unanswered", off).1, "the guest switched its machine off");
        assert_eq!(not_met("ssh unanswered", vec![]).1, "no ssh: nobody is there");
    }

    #[test]
    fn what_a_command_over_ssh_printed_is_judged_line_by_line() {
        assert_eq!(play("ssh true\noutput /^this is$/\noutput true", vec![]).0, Outcome::Met);
        let (index, why) = not_met("ssh true\nssh=1 false\noutput true", vec![]);
        assert_eq!(index, 2);
        assert!(why.starts_with("the command printed: this is"), "{why}");
    }

    #[test]
    fn a_picture_that_cannot_be_taken_fails_its_statement() {
        assert_eq!(play("screenshot bright", vec![]).0, Outcome::Met);
        assert_eq!(not_met("screenshot dark", vec![]), (0, "QEMU has no pictures".to_owned()));
    }
}
