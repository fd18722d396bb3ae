//! What a host may be short of: how errors say it, in numbers here and in words of programs that were started, and what
//! to do about it. Whoever shows an error asks here first: what the host lacks is the matter, whatever it was lacking for.

use std::error::Error;
use std::io;

use rustix::io::Errno;

use crate::threads::{self, Refused};

/// What there is not enough of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shortage {
    /// Processes and threads.
    Processes,
    /// Descriptors.
    OpenFiles,
    /// Memory.
    Memory,
    /// Room on a file system.
    Room,
}

/// In these words the C library says what is lacking.
const WORDS: [(&str, Shortage); 7] = [
    (threads::REFUSAL, Shortage::Processes),
    ("Too many open files", Shortage::OpenFiles),
    // And in these a jail that is not even entered.
    ("files may be open at once", Shortage::OpenFiles),
    ("Cannot allocate memory", Shortage::Memory),
    ("failed to map segment", Shortage::Memory),
    ("No space left on device", Shortage::Room),
    ("Disk quota exceeded", Shortage::Room),
];

impl Shortage {
    /// What `error` comes of, by the numbers that the system gave.
    pub fn behind(error: &(dyn Error + 'static)) -> Option<Self> {
        if Refused::is_behind(error) {
            return Some(Self::Processes);
        }
        let mut next = Some(error);
        while let Some(error) = next {
            let of_system = error.downcast_ref::<io::Error>();
            let errno = of_system.and_then(Errno::from_io_error).or(error.downcast_ref::<Errno>().copied());
            match (errno, of_system) {
                (Some(Errno::MFILE | Errno::NFILE), _) => return Some(Self::OpenFiles),
                (Some(Errno::NOMEM), _) => return Some(Self::Memory),
                (Some(Errno::NOSPC | Errno::DQUOT), _) => return Some(Self::Room),
                // With a path, or of what another process said: the number is lost.
                (None, Some(worded)) if worded.get_ref().is_some() => {
                    if let Some(shortage) = Self::in_words(&worded.to_string()) {
                        return Some(shortage);
                    }
                }
                _ => {}
            }
            next = error.source();
        }
        None
    }

    /// What a program that was started lacked, by what it `said`.
    pub fn in_words(said: &str) -> Option<Self> {
        WORDS.iter().find(|(words, _)| said.contains(words)).map(|(_, shortage)| *shortage)
    }

    /// What the user can do about it.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Processes => threads::HINT,
            Self::OpenFiles => {
                "raise the limit of open files (`ulimit -n 1024`), or that of the container or service"
            }
            Self::Memory => {
                "end something that takes memory, or raise the limit (`ulimit -v`) or that of the container or service; \
                 --memory gives a machine less"
            }
            Self::Room => {
                "make room there (`kiln store gc` removes from the store what may go), or name a place on a larger disk with \
                 --store or --work"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot keep it")]
    struct Outer(#[source] io::Error);

    #[test]
    fn a_shortage_is_seen_behind_an_error_and_in_what_a_program_said() {
        for (errno, shortage) in [
            (Errno::MFILE, Some(Shortage::OpenFiles)),
            (Errno::NOMEM, Some(Shortage::Memory)),
            (Errno::NOSPC, Some(Shortage::Room)),
            (Errno::ACCESS, None),
            // Also what a time-out of a socket says.
            (Errno::AGAIN, None),
        ] {
            assert_eq!(Shortage::behind(&Outer(errno.into())), shortage, "{errno}");
            let said = io::Error::from(errno).to_string();
            assert!(shortage.is_none() || Shortage::in_words(&said) == shortage, "{said}");
        }
        let worded = io::Error::other(format!("{} at path `/store/tmp`", io::Error::from(Errno::MFILE)));
        assert_eq!(Shortage::behind(&Outer(worded)), Some(Shortage::OpenFiles));
        let refused = Outer(Refused::told("process")(Errno::AGAIN.into()));
        assert_eq!(Shortage::behind(&refused), Some(Shortage::Processes));
        assert_eq!(Shortage::in_words("qemu: cannot open display"), None);
    }
}
