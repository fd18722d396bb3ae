//! A build as it is seen on a terminal while it runs: a few lines that are drawn over and over, and plain ones that scroll away above
//! them.
//!
//! `board` is what is known, `lines` what is seen of it, `paint` what the terminal is sent; all of that is plain data and
//! functions. Here is the thread that owns the terminal meanwhile: others send it what changed.

mod board;
mod columns;
mod lines;
mod paint;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::SIGCONT;

pub(super) use board::{Change, Doing};
pub(super) use columns::cut;

use super::terminal;
use board::Board;
use lines::{Room, lines};
use paint::Drawn;

/// How often the screen is drawn at most, and how often it is looked whether its size is another.
const FRAME: Duration = Duration::from_millis(100);
/// A build that is over sooner leaves no trace of this.
const FIRST_FRAME: Duration = Duration::from_millis(300);
/// Most messages under way: whoever tells more than is shown waits.
const MESSAGES: usize = 256;
/// How long is waited for a terminal that takes nothing, before its screen is left as it is.
const PATIENCE: Duration = Duration::from_millis(500);

/// What the thread is sent.
enum Said {
    Changed(Change),
    /// Lines that stay, each with its end.
    Above(String),
    /// The end: whoever waits is told when the screen is clean.
    Leave(SyncSender<()>),
}

/// The way to the thread. A copy is the same screen: whoever ends a build from outside leaves it first.
#[derive(Clone)]
pub(super) struct Screen {
    thread: SyncSender<Said>,
}

impl Screen {
    /// Takes this process's terminal for a build of so many steps; none where there is no terminal on standard error that can be
    /// drawn on.
    pub fn take(steps: usize) -> Option<Self> {
        if !terminal::is_drawn_on() {
            return None;
        }
        let (thread, said) = sync_channel(MESSAGES);
        // Where somebody stopped kiln and let it go on, there is a shell's prompt below what was drawn.
        let is_continued = Arc::<AtomicBool>::default();
        let _ = signal_hook::flag::register(SIGCONT, Arc::clone(&is_continued));
        let painter = Painter {
            began: Instant::now(),
            board: Board::new(steps),
            above: String::new(),
            drawn: Drawn::default(),
            with_colours: terminal::has_colours(),
            is_continued,
        };
        let started = thread::Builder::new().name("screen".to_owned()).spawn(move || painter.paint(&said));
        started.is_ok().then_some(Self { thread })
    }

    /// Something changed.
    pub fn change(&self, change: Change) {
        let _ = self.thread.send(Said::Changed(change));
    }

    /// Text that stays, without the end of its last line. Nothing in it may be obeyed by a terminal.
    pub fn above(&self, text: &str) {
        let _ = self.thread.send(Said::Above(format!("{text}\n")));
    }

    /// Leaves what stays, and nothing else. What is sent later is not shown.
    pub fn leave(&self) {
        let by = Instant::now() + PATIENCE;
        let (done, clean) = sync_channel(1);
        let mut message = Said::Leave(done);
        while let Err(TrySendError::Full(back)) = self.thread.try_send(message) {
            if Instant::now() >= by {
                return;
            }
            message = back;
            thread::sleep(FRAME / 10);
        }
        let _ = clean.recv_timeout(by.saturating_duration_since(Instant::now()));
    }
}

/// What the thread owns.
struct Painter {
    began: Instant,
    board: Board,
    /// What was said since the screen was drawn.
    above: String,
    drawn: Drawn,
    with_colours: bool,
    is_continued: Arc<AtomicBool>,
}

impl Painter {
    fn paint(mut self, said: &Receiver<Said>) {
        let mut next = self.began + FIRST_FRAME;
        loop {
            match said.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Said::Changed(change)) => self.board.change(change, self.began.elapsed()),
                Ok(Said::Above(text)) => self.above += &text,
                Ok(Said::Leave(done)) => {
                    self.draw(false);
                    let _ = done.send(());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.draw(false),
            }
            // However much is said meanwhile.
            if Instant::now() >= next {
                self.draw(true);
                next = Instant::now() + FRAME;
            }
        }
    }

    /// Draws what there is to say, and the board where it is wanted.
    fn draw(&mut self, with_board: bool) {
        let size = terminal::size_of(io::stderr());
        let room = Room { columns: size.columns.into(), rows: size.rows.into() };
        if self.is_continued.swap(false, Ordering::SeqCst) {
            self.drawn.forget();
        }
        let seen = match with_board {
            true => lines(&self.board, self.began.elapsed(), room),
            false => Vec::new(),
        };
        let above = std::mem::take(&mut self.above);
        let Some(text) = self.drawn.replace(&above, seen, room, self.with_colours) else { return };
        // Whoever has closed the terminal does not look at it.
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }
}
