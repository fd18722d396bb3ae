//! What is known of a build that runs: how many steps are over, and what each of the others does. Plain data; `lines` makes of it
//! what is seen.

use std::collections::VecDeque;
use std::time::Duration;

use crate::engine::build::Outcome;

/// How many lines of a step's output are remembered.
pub(super) const TAIL: usize = 3;

/// Something that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) enum Change {
    /// Something is done before, or beside, all steps.
    Note(String),
    /// A step is in that state.
    Is(String, Doing),
    /// It is checked, and waits for its turn or is about to end.
    Waits(String),
    /// It does something slow, or wrote a line.
    Says(String, String),
    /// It is over.
    Ends(String, End),
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::cli) enum Doing {
    /// Its inputs are looked at.
    Checking,
    /// Its machine is made ready.
    Preparing,
    /// Its command runs.
    Running,
    /// Its outputs are fetched.
    Collecting,
    /// They are merged into WORK.
    Merging,
}

impl Doing {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Checking => "checking",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Collecting => "collecting",
            Self::Merging => "merging",
        }
    }
}

/// How a step ended, as far as it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum End {
    UpToDate,
    CutOff,
    Ran,
    WouldRun,
    Failed,
    Skipped,
}

impl From<&Outcome> for End {
    fn from(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::UpToDate { cut_off: false, .. } => Self::UpToDate,
            Outcome::UpToDate { cut_off: true, .. } => Self::CutOff,
            Outcome::Ran { .. } => Self::Ran,
            Outcome::WouldRun => Self::WouldRun,
            Outcome::CommandFailed(_) | Outcome::Failed(_) => Self::Failed,
            Outcome::Skipped => Self::Skipped,
        }
    }
}

/// A step that does something.
#[derive(Debug, Clone)]
pub(super) struct Busy {
    pub step: String,
    pub doing: Doing,
    /// Since when it is checked, or has run; time since the build began.
    pub since: Duration,
    /// The last that it said.
    pub tail: VecDeque<String>,
}

/// All of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Board {
    /// How many steps the build is about.
    pub steps: usize,
    pub up_to_date: usize,
    pub cut_off: usize,
    pub ran: usize,
    pub would_run: usize,
    pub failed: usize,
    pub skipped: usize,
    /// In the order in which they began.
    pub busy: Vec<Busy>,
    pub note: Option<String>,
}

impl Board {
    /// That of a build of so many steps.
    pub fn new(steps: usize) -> Self {
        Self { steps, ..Self::default() }
    }

    /// How many steps are over.
    pub fn ended(&self) -> usize {
        self.up_to_date + self.cut_off + self.ran + self.would_run + self.failed + self.skipped
    }

    /// How many run.
    pub fn running(&self) -> usize {
        self.busy.iter().filter(|busy| busy.doing != Doing::Checking).count()
    }

    /// How many nothing is done for yet.
    pub fn waiting(&self) -> usize {
        self.steps.saturating_sub(self.ended() + self.busy.len())
    }

    /// Takes a change in that happened `now` after the build began.
    pub fn change(&mut self, change: Change, now: Duration) {
        match change {
            Change::Note(text) => self.note = Some(text),
            Change::Is(step, doing) => {
                if doing != Doing::Checking {
                    self.note = None;
                }
                match self.find(&step) {
                    Some(busy) => {
                        busy.doing = doing;
                        if doing == Doing::Running {
                            // What was said before is not its output.
                            busy.tail.clear();
                        }
                    }
                    None => self.busy.push(Busy { step, doing, since: now, tail: VecDeque::new() }),
                }
            }
            Change::Waits(step) => self.busy.retain(|busy| busy.step != step),
            Change::Says(step, line) => match self.find(&step) {
                Some(busy) => {
                    if busy.tail.len() == TAIL {
                        busy.tail.pop_front();
                    }
                    busy.tail.push_back(line);
                }
                None => self.note = Some(format!("{step}: {line}")),
            },
            Change::Ends(step, end) => {
                self.busy.retain(|busy| busy.step != step);
                *match end {
                    End::UpToDate => &mut self.up_to_date,
                    End::CutOff => &mut self.cut_off,
                    End::Ran => &mut self.ran,
                    End::WouldRun => &mut self.would_run,
                    End::Failed => &mut self.failed,
                    End::Skipped => &mut self.skipped,
                } += 1;
            }
        }
    }

    fn find(&mut self, step: &str) -> Option<&mut Busy> {
        self.busy.iter_mut().find(|busy| busy.step == step)
    }
}
