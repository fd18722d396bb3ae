//! `--trace-out`: the file that a build's timeline is written to, however the build ends.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::{FAILED, Failure, USAGE};
use crate::engine::build::Timeline;

/// The file, and what goes into it. A copy is the same: whoever ends the build from outside writes it.
#[derive(Clone, Default)]
pub(super) struct TraceOut {
    timeline: Timeline,
    // Protects the file, so that one writes it, and only once: taken by whoever does.
    file: Arc<Mutex<Option<(PathBuf, File)>>>,
}

impl TraceOut {
    /// Makes the file, where one is asked for: that it cannot be made is said before anything is done.
    pub fn create(path: Option<&Path>, timeline: &Timeline) -> Result<Self, Failure> {
        let file = path.map(|path| File::create(path).map(|file| (path.to_owned(), file))).transpose();
        let file = file.map_err(|error| Failure {
            text: format!("cannot write the timeline: {error}"),
            hint: None,
            code: USAGE,
        })?;
        Ok(Self { timeline: timeline.clone(), file: Arc::new(Mutex::new(file)) })
    }

    /// Writes what there is of the timeline.
    pub fn write(&self) -> Result<(), Failure> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((path, file)) = file.take() else { return Ok(()) };
        let mut out = BufWriter::new(file);
        let written = self.timeline.write(&mut out).and_then(|()| out.flush());
        written.map_err(|error| Failure {
            text: format!("cannot write the timeline to `{}`: {error}", path.display()),
            hint: None,
            code: FAILED,
        })
    }
}
