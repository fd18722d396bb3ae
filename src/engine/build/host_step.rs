//! Steps that need no machine: what is made and what is signed, on a worker's thread.

use std::io::Read;
use std::time::{Duration, Instant, UNIX_EPOCH};

use kiln_artifact::tree::{Kind, Meta, Node, Timestamp, Tree, TreePath};
use kiln_digest::Digest;
use kiln_wire::{Outcome, Usage};

use super::BuildError;
use super::runner::{Ran, Runner};
use super::worker::{Kept, Message, Passed, Told, Worker};
use crate::clock::now_nanos;
use crate::engine::make::MakeError;
use crate::engine::merge::{Merge, MergeError, Merged};
use crate::engine::run::Ended;
use crate::plan::StepId;
use crate::plan::make::Make;
use crate::sign::images::Source;
use crate::sign::keys::{KeyError, Keys};
use crate::sign::local::Local;
use crate::sign::work::Work;
use crate::sign::{SignError, close_process};

/// What did it, in words.
pub(super) const HERE: &str = "kiln, without a machine";

impl<R: Runner> Worker<'_, '_, R> {
    pub(super) fn tell(&self, id: StepId, text: &str) {
        let _ = self.messages.send(Message::Event(id, Told::Progress(text.to_owned())));
    }

    /// Makes what the step `id` makes, and merges it into WORK.
    pub(super) fn make(
        &self,
        id: StepId,
        makes: &[Make],
        needs: &[(StepId, Digest)],
        why: &str,
    ) -> Result<Kept, BuildError> {
        let (build, started, stamped_nanos) = (self.checker.build, Instant::now(), now_nanos());
        let step = build.plan.step(id);
        let made =
            self.checker.at_bench(step, needs, |bench| bench.make(makes, &mut |text| self.tell(id, text)))?;
        for text in build.store.take_damage() {
            let _ = self.messages.send(Message::Event(id, Told::Warning(text)));
        }
        let manifest = self.manifest(&made)?;
        let _passed = Passed::enter(self.gate, id);
        let ran = ran(Some(manifest), self.merge(id, &made), started.elapsed());
        self.keep(id, ran, None, why, stamped_nanos)
    }

    /// Merges what the step `id` puts out into WORK, for somebody who is inside the gate.
    pub(super) fn merge(&self, id: StepId, outputs: &Tree) -> Result<Option<Merged>, MergeError> {
        let build = self.checker.build;
        let step = build.plan.step(id);
        if step.outputs.is_empty() {
            return Ok(None);
        }
        let merge = Merge {
            store: build.store,
            work: &build.settings.work.value,
            step: &step.name,
            overwrite: build.options.overwrite,
        };
        merge.run(outputs).map(Some)
    }

    /// Signs what the build's record names, where there are keys.
    pub(super) fn sign(&self, id: StepId) -> Result<Kept, BuildError> {
        // This process reads private keys.
        close_process();
        let (build, started) = (self.checker.build, Instant::now());
        let (work, secrets) = (&build.settings.work.value, &build.settings.secrets.value);
        let now = crate::clock::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let opened = Work::open(work, secrets, None)?;
        let keys = match Keys::open(secrets, now) {
            Ok(keys) => Some(keys),
            Err(KeyError::None(_)) => None,
            Err(error) => return Err(SignError::from(error).into()),
        };
        let local = Local::read(secrets, None, None, keys.as_ref()).map_err(SignError::from)?;
        let roots = opened.verify()?;
        let mut signed = Tree::new();
        let not_kept = match &keys {
            Some(keys) => {
                // Outside the gate: nobody may hear it.
                keys.warnings.iter().for_each(|warning| self.tell(id, &format!("warning: {warning}")));
                let _passed = Passed::enter(self.gate, id);
                opened.sign(&roots, &local, keys, Source::Keys)?;
                for (path, file) in opened.written(keys)? {
                    self.put_out(&mut signed, &path, file)?;
                }
                "signatures are made anew each time".to_owned()
            }
            None => {
                opened.check(&roots, &local)?;
                for kernel in &opened.record.kernels {
                    let to = kernel.signed.join(", ");
                    self.tell(id, &format!("to be signed: kernel {} as {to}", kernel.release));
                }
                let mut said = format!(
                    "nothing was signed: SECRETS ({}) has no keys; `kiln sign` makes them and signs",
                    secrets.display()
                );
                // WORK has the new images all the same.
                let left = opened.left();
                if !left.is_empty() {
                    said.push_str("; of an earlier signing, which starts nothing that changed since: ");
                    said.push_str(&left.join(", "));
                }
                said
            }
        };
        // Whoever needs it sees what was signed, and nothing where there are no keys.
        let outputs = self.manifest(&signed)?;
        Ok(Kept {
            ran: Box::new(ran(Some(outputs), Ok(None), started.elapsed())),
            not_kept: Some(not_kept),
            same: true,
        })
    }

    /// Puts a file into `tree`, at a path in WORK, with the folders above it; its content is in the store then.
    pub(super) fn put_out(&self, tree: &mut Tree, path: &str, content: impl Read) -> Result<(), BuildError> {
        let path = TreePath::new(path.as_bytes()).map_err(MakeError::from)?;
        let put = self.checker.build.store.blobs().put(content);
        let (digest, size) = put.map_err(MakeError::io("keep what was put out"))?;
        let mtime = Timestamp { seconds: self.checker.epoch(), nanoseconds: 0 };
        let meta = |mode| Meta { mode, mtime, ..Meta::default() };
        let mut above = path.parent();
        while let Some(folder) = above.filter(|folder| tree.get(folder).is_none()) {
            above = folder.parent();
            tree.insert(folder, Node { kind: Kind::Directory, meta: meta(0o755) });
        }
        tree.insert(path, Node { kind: Kind::File { digest, size }, meta: meta(0o644) });
        Ok(())
    }

    /// The manifest of `tree` in the store.
    pub(super) fn manifest(&self, tree: &Tree) -> Result<Digest, BuildError> {
        let put = self.checker.build.store.blobs().put(&tree.manifest()[..]);
        let (manifest, _) = put.map_err(MakeError::io("keep what was put out"))?;
        Ok(manifest)
    }
}

/// What came of a step that ran here and succeeded, and of its outputs in WORK.
pub(super) fn ran(
    outputs: Option<Digest>,
    merged: Result<Option<Merged>, MergeError>,
    command: Duration,
) -> Ran {
    let (merged, unmerged) = merged.map_or_else(|error| (None, Some(error)), |merged| (merged, None));
    let changed = merged.as_ref().map_or(0, |merged| merged.placed.len());
    Ran {
        ended: Ended::Ran(Outcome::Exit(0), Usage::default()),
        outputs,
        unmerged,
        looks: merged.map(|merged| merged.looks),
        log: None,
        shares: Vec::new(),
        spoiled: None,
        undeclared: Vec::new(),
        changed,
        command,
        held_bytes: None,
        machine: HERE.to_owned(),
    }
}
