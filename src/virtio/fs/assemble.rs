//! Puts a record together from its parts, which may come from a process that is not trusted.

use super::record::{PathBytes, Record, RecordPart, ShareRecord};

/// Why the parts do not make up a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    /// A part before the first share or after the end, or a path that is not behind the one before it.
    #[error("record parts out of order")]
    Order,
    /// More than [`MOST_PATHS`] or [`MOST_PATH_BYTES`].
    #[error("the record has more than {MOST_PATHS} paths or {} MiB of them", MOST_PATH_BYTES >> 20)]
    TooLarge,
}

/// Puts a record together from its parts.
#[derive(Debug, Default)]
pub struct Assembler {
    record: Record,
    paths: usize,
    bytes: usize,
    ended: bool,
}

/// Most paths an [`Assembler`] takes: packed, they need some 50 bytes each.
pub const MOST_PATHS: usize = 4_000_000;
/// Most bytes of paths an [`Assembler`] takes.
pub const MOST_PATH_BYTES: usize = 256 << 20;

impl Assembler {
    /// Takes the next part, and gives the record when that was the last.
    ///
    /// # Errors
    /// See [`AssembleError`].
    pub fn push(&mut self, part: RecordPart) -> Result<Option<Record>, AssembleError> {
        if self.ended {
            return Err(AssembleError::Order);
        }
        match part {
            RecordPart::Share(name) => {
                self.count(&name)?;
                self.record.shares.push(ShareRecord { name, ..ShareRecord::default() });
            }
            RecordPart::Entries(list) => {
                for entry in list {
                    self.count(&entry.path)?;
                    in_order(self.share()?.entries.push(&entry))?;
                }
            }
            RecordPart::Missed(list) => {
                for path in list {
                    self.count(&path)?;
                    in_order(self.share()?.missed.push(&path))?;
                }
            }
            RecordPart::Changed(list) => {
                for change in list {
                    self.count(&change.path)?;
                    let changed = &mut self.share()?.changed;
                    in_order(
                        changed.last().is_none_or(|last| last.path.cmp_as_walked(&change.path).is_lt()),
                    )?;
                    changed.push(change);
                }
            }
            RecordPart::End { full } => {
                self.ended = true;
                let mut record = std::mem::take(&mut self.record);
                record.full = full;
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    fn count(&mut self, path: &PathBytes) -> Result<(), AssembleError> {
        self.paths += 1;
        self.bytes = self.bytes.saturating_add(path.0.len());
        let fits = self.paths <= MOST_PATHS && self.bytes <= MOST_PATH_BYTES;
        if fits { Ok(()) } else { Err(AssembleError::TooLarge) }
    }

    fn share(&mut self) -> Result<&mut ShareRecord, AssembleError> {
        self.record.shares.last_mut().ok_or(AssembleError::Order)
    }
}

fn in_order(is: bool) -> Result<(), AssembleError> {
    if is { Ok(()) } else { Err(AssembleError::Order) }
}
