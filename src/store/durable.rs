//! Which blobs survive a power failure: each is synced once by a process, and those that several threads want at one time
//! together.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_digest::Digest;

use crate::writes;

/// What one process knows of that.
#[derive(Debug, Default)]
pub(super) struct Durable {
    // Held while blobs are synced; who waits for it may find its own among them.
    turn: Mutex<()>,
    // Protects the sets; held only to look at them and change them.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    synced: BTreeSet<Digest>,
    wanted: BTreeSet<Digest>,
    under_way: BTreeSet<Digest>,
}

impl Durable {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Syncs what of `digests` is not yet, and what others want meanwhile. `path` says where each lies.
    pub fn sync(
        &self,
        digests: &[Digest],
        path: impl Fn(&Digest) -> PathBuf,
    ) -> Result<(), (PathBuf, io::Error)> {
        let is_done = |state: &State| digests.iter().all(|digest| state.synced.contains(digest));
        {
            let mut state = self.state();
            if is_done(&state) {
                return Ok(());
            }
            let State { synced, wanted, .. } = &mut *state;
            wanted.extend(digests.iter().filter(|digest| !synced.contains(digest)));
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let batch: Vec<Digest> = {
            let mut state = self.state();
            if is_done(&state) {
                return Ok(());
            }
            let mut batch = std::mem::take(&mut state.wanted);
            // Where others failed with them, they are wanted by us alone.
            batch.extend(digests);
            let State { synced, under_way, .. } = &mut *state;
            batch.retain(|digest| !synced.contains(digest));
            under_way.clone_from(&batch);
            batch.into_iter().collect()
        };
        let mut folders = BTreeSet::new();
        for digest in &batch {
            let path = path(digest);
            // What another thread wants is its own affair where it fails: it tries again.
            match sync(&path) {
                Err(error) if digests.contains(digest) => return Err((path, error)),
                Err(_) => drop(self.state().under_way.remove(digest)),
                // The folder of blobs too: the one in it may be new.
                Ok(()) => folders.extend(path.ancestors().skip(1).take(2).map(Path::to_owned)),
            }
        }
        for folder in folders {
            sync(&folder).map_err(|error| (folder, error))?;
        }
        let mut state = self.state();
        let done = std::mem::take(&mut state.under_way);
        state.synced.extend(done);
        Ok(())
    }

    /// Says that the blob is another file than before.
    pub fn forget(&self, digest: &Digest) {
        let mut state = self.state();
        state.synced.remove(digest);
        state.under_way.remove(digest);
    }
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|file| writes::sync(&file, path))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fs;
    use std::thread;

    use super::*;

    #[test]
    fn a_blob_is_synced_once_unless_it_is_another_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let digests = [&b"a"[..], b"b", b"c"].map(Digest::of);
        for digest in &digests {
            fs::write(folder.path().join(digest.to_string()), "x").expect("room");
        }
        let durable = Durable::default();
        let looked_at = RefCell::new(Vec::new());
        let path = |digest: &Digest| {
            looked_at.borrow_mut().push(*digest);
            folder.path().join(digest.to_string())
        };
        durable.sync(&digests[..2], path).expect("they are there");
        durable.sync(&digests[..2], path).expect("nothing to do");
        assert_eq!(looked_at.borrow().len(), 2);
        durable.forget(&digests[0]);
        durable.sync(&digests, path).expect("they are there");
        assert_eq!(looked_at.take()[2..].iter().collect::<BTreeSet<_>>(), [&digests[0], &digests[2]].into());
        let lost = Digest::of(b"lost");
        assert!(durable.sync(&[lost], path).is_err() && durable.sync(&[lost], path).is_err());
    }

    #[test]
    fn what_others_want_meanwhile_is_synced_together_and_their_failure_is_theirs() {
        let folder = tempfile::tempdir().expect("a folder");
        let [ours, theirs, lost] = [&b"ours"[..], b"theirs", b"lost"].map(Digest::of);
        for digest in [&ours, &theirs] {
            fs::write(folder.path().join(digest.to_string()), "x").expect("room");
        }
        let path = |digest: &Digest| folder.path().join(digest.to_string());
        let durable = Durable::default();
        let turn = durable.turn.lock().expect("no panic");
        thread::scope(|scope| {
            let threads = [ours, theirs, lost].map(|digest| {
                let durable = &durable;
                scope.spawn(move || durable.sync(&[digest], path).is_ok())
            });
            while durable.state().wanted.len() < 3 {
                thread::yield_now();
            }
            drop(turn);
            assert_eq!(threads.map(|thread| thread.join().expect("no panic")), [true, true, false]);
        });
        assert_eq!(durable.state().synced, [ours, theirs].into());
    }

    #[test]
    fn a_blob_that_is_replaced_while_it_is_synced_is_not_taken_for_synced() {
        let folder = tempfile::tempdir().expect("a folder");
        let digest = Digest::of(b"a");
        fs::write(folder.path().join(digest.to_string()), "x").expect("room");
        let durable = Durable::default();
        let replaced = |digest: &Digest| {
            durable.forget(digest);
            folder.path().join(digest.to_string())
        };
        durable.sync(&[digest], replaced).expect("it is there");
        assert!(durable.state().synced.is_empty());
    }
}
