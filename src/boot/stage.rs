//! The machine as a trial sees it, and the report that is left of it: the console, a timeline, and pictures.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::ssh::Ssh;
use super::trial::{Answer, Moment, Rig, What};
use super::{Told, report};
use crate::machine::qemu::firmware::FirmwareMachine;
use crate::plan::harmless;
use crate::plan::script::{Statement, Step};

/// The folder of a report.
pub(super) struct Report {
    folder: PathBuf,
    console: File,
    timeline: File,
    pictures: usize,
}

impl Report {
    /// In `folder`, which is made where it is not there.
    pub fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self {
            console: File::create(folder.join("console.txt"))?,
            timeline: File::create(folder.join("timeline.jsonl"))?,
            folder: folder.to_owned(),
            pictures: 0,
        })
    }

    fn note(&mut self, moment: &Moment, script: &[Statement]) -> io::Result<()> {
        if let What::Line(line) = &moment.what {
            writeln!(self.console, "[{:9.3}] {}", moment.at.as_secs_f64(), harmless(line))?;
        }
        writeln!(self.timeline, "{}", report::timeline(moment, script))
    }

    fn picture(&mut self, index: usize, failed: bool, png: &[u8]) -> io::Result<()> {
        self.pictures += 1;
        let verdict = if failed { "failed" } else { "met" };
        fs::write(
            self.folder.join(format!("{:02}-statement-{}-{verdict}.png", self.pictures, index + 1)),
            png,
        )
    }
}

/// A machine as a trial sees it.
pub(super) struct Stage<'a> {
    pub machine: FirmwareMachine,
    /// Whether QEMU is gone.
    pub is_gone: Arc<AtomicBool>,
    pub typing: UnixStream,
    /// The way in, and the host's port that leads there.
    pub ssh: Option<(Ssh, u16)>,
    pub script: &'a [Statement],
    pub report: Option<Report>,
    pub moments: Vec<Moment>,
    pub told: &'a mut dyn FnMut(Told<'_>),
}

impl Stage<'_> {
    /// A picture at a verdict, but where the statement took one itself.
    fn picture(&mut self, moment: &Moment) -> io::Result<()> {
        let What::Verdict { index, failure, .. } = &moment.what else { return Ok(()) };
        let took_one = self.script.get(*index).is_some_and(|s| matches!(s.step, Step::Screenshot(_)));
        if let (false, Some(report)) = (took_one, &mut self.report)
            && let Ok(png) = self.machine.screenshot()
        {
            report.picture(*index, failure.is_some(), &png)?;
        }
        Ok(())
    }
}

impl Rig for Stage<'_> {
    fn type_in(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.typing.write_all(bytes).map_err(|error| format!("cannot type: {error}"))
    }

    fn ssh(&mut self, command: &str, deadline: Instant) -> Result<Answer, String> {
        let (ssh, port) = self.ssh.as_ref().ok_or("there is no key to get in with")?;
        ssh.run(*port, command, deadline, &|| self.is_gone.load(Ordering::Acquire))
    }

    fn host_key(&mut self) -> Option<String> {
        self.ssh.as_ref().and_then(|(ssh, _)| ssh.host_key())
    }

    fn screenshot(&mut self, name: &str) -> Result<(), String> {
        let report = self.report.as_ref().ok_or("there is no report to put it in")?;
        let png = self.machine.screenshot().map_err(|error| format!("there is no picture: {error}"))?;
        fs::write(report.folder.join(format!("{name}.png")), png)
            .map_err(|error| format!("cannot write it: {error}"))
    }

    fn told(&mut self, moment: &Moment) {
        (self.told)(Told::Moment(moment));
        if let Some(report) = &mut self.report {
            let written = report.note(moment, self.script);
            if let Err(error) = written.and_then(|()| self.picture(moment)) {
                (self.told)(Told::Warning(format!("the report cannot be written any more: {error}")));
                self.report = None;
            }
        }
        if !matches!(moment.what, What::Line(_) | What::Output(_)) {
            self.moments.push(moment.clone());
        }
    }
}
