//! Credit: how many bytes of one command's input or output may still be sent before the other side has to take some.
//!
//! A stream of bytes has the same account on both sides. The sender spends from its own and never overdraws; the
//! receiver keeps one to hold the sender to it, which bounds what it must hold for a stream that nobody reads.

/// What each account begins with, and the most it ever has: enough for a burst of output, little enough to hold for a
/// command that nobody reads.
pub const CREDIT_BYTES: u32 = 1 << 20;

/// One side's account of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credit {
    left: u32,
}

impl Default for Credit {
    fn default() -> Self {
        Self { left: CREDIT_BYTES }
    }
}

impl Credit {
    /// How many bytes may be sent now.
    pub fn left(&self) -> usize {
        usize::try_from(self.left).unwrap_or(usize::MAX)
    }

    /// How many bytes were sent that the receiver has not taken.
    pub fn spent(&self) -> u32 {
        CREDIT_BYTES.saturating_sub(self.left)
    }

    /// Takes note of bytes that were sent. Returns false, and does nothing, where they are more than were left.
    #[must_use]
    pub fn spend(&mut self, bytes: usize) -> bool {
        match u32::try_from(bytes).ok().and_then(|bytes| self.left.checked_sub(bytes)) {
            Some(left) => self.left = left,
            None => return false,
        }
        true
    }

    /// Takes note of bytes that the receiver has taken. Returns false, and does nothing, where they are more than were
    /// sent.
    #[must_use]
    pub fn regain(&mut self, bytes: u32) -> bool {
        match self.left.checked_add(bytes).filter(|left| *left <= CREDIT_BYTES) {
            Some(left) => self.left = left,
            None => return false,
        }
        true
    }
}

/// What a receiver has taken and not said yet: it says so in lumps, so that small pieces do not cost an answer each.
#[derive(Debug, Clone, Copy, Default)]
pub struct Taken {
    bytes: u32,
}

impl Taken {
    /// Takes note of bytes taken, and gives what is to be said now, if anything.
    pub fn add(&mut self, bytes: usize) -> Option<u32> {
        self.bytes = self.bytes.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        (self.bytes >= CREDIT_BYTES / 4).then(|| std::mem::take(&mut self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_spent_than_there_is_and_no_more_regained_than_was_spent() {
        let mut credit = Credit::default();
        assert!(!credit.regain(1) && !credit.spend(credit.left() + 1) && !credit.spend(usize::MAX));
        assert!(credit.spend(100) && credit.regain(60) && !credit.regain(41) && credit.regain(40));
        assert!(credit.spend(credit.left()) && !credit.spend(1) && credit.left() == 0);
        assert!(!credit.regain(u32::MAX) && credit.regain(CREDIT_BYTES));
    }

    #[test]
    fn a_stream_never_stands_still_while_it_is_read() {
        // Whatever the pieces, a sender that waits for credit gets some.
        for piece in [1, 7, 4096, 256 << 10] {
            let (mut credit, mut taken, mut sent) = (Credit::default(), Taken::default(), 0);
            while sent < 3 << 20 {
                let bytes = credit.left().min(piece);
                assert!(bytes > 0, "stuck after {sent} bytes in pieces of {piece}");
                assert!(credit.spend(bytes));
                sent += bytes;
                if let Some(bytes) = taken.add(bytes) {
                    assert!(credit.regain(bytes));
                }
            }
        }
    }
}
