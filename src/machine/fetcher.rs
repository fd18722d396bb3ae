//! A program of the host's that fetches for kiln: `git`, which speaks to servers nobody vouches for.
//!
//! It is no part of a machine, and keeps the network. What it may reach else is its own place, which it writes in, the
//! system's programs and configuration, and what it is told to read (`jail::enter_fetcher`). It dies with kiln, and is
//! killed with all that it started when its time is over.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::launch::Become;
use super::spawn;
use crate::threads;

/// Most bytes of standard output that are taken.
const MOST_OUTPUT_BYTES: u64 = 1 << 20;

/// How long its streams may take to end when it has ended: what it left running may hold them.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What is run, and what it may reach.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fetcher {
    /// The program.
    pub program: PathBuf,
    /// Its arguments, the program's name left out.
    pub arguments: Vec<String>,
    /// Its whole environment.
    pub environment: Vec<(String, String)>,
    /// Where it is started, and the only place in which it writes.
    pub place: PathBuf,
    /// What else it may read, beside the system's programs and configuration.
    pub reads: Vec<PathBuf>,
    /// Most bytes of one file that it writes.
    pub most_file_bytes: u64,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// Whether it succeeded.
    pub success: bool,
    /// What it printed.
    pub output: Vec<u8>,
    /// The end of what it said on standard error, on one line.
    pub said: String,
}

impl Fetcher {
    /// Runs it, for at most `patience`.
    ///
    /// # Errors
    /// What starting it says; [`io::ErrorKind::TimedOut`].
    pub fn run(self, patience: Duration) -> io::Result<Ended> {
        let mut process = spawn::spawn(Become::Fetcher(self), &[])?;
        let (sender, output) = mpsc::channel();
        if let Some(stdout) = process.take_stdout() {
            let reading = threads::start("output", move || {
                let mut bytes = Vec::new();
                let read = stdout.take(MOST_OUTPUT_BYTES).read_to_end(&mut bytes);
                let _ = sender.send(read.map(|_| bytes));
            });
            if let Err(error) = reading {
                process.stop_group();
                return Err(error);
            }
        }
        let Some(status) = process.wait(patience) else {
            process.stop_group();
            return Err(io::ErrorKind::TimedOut.into());
        };
        // Until what it said is all there.
        let (ours, theirs) = UnixStream::pair()?;
        process.hang_up_at_end(theirs);
        ours.set_read_timeout(Some(LAST_WORDS))?;
        let _ = (&ours).read(&mut [0]);
        let output = output.recv_timeout(LAST_WORDS).unwrap_or_else(|_| Ok(Vec::new()))?;
        Ok(Ended { success: status.success(), output, said: process.said() })
    }
}
