//! A step of a plan made ready to be run, or to be entered: lowered, with its sources and its view of WORK.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use kiln_artifact::tree::{Kind as NodeKind, Tree, TreePath};
use kiln_digest::Digest;
use kiln_virtio::fs::record::Kind;
use kiln_virtio::fs::{Open, list_directory, open_beneath};

use super::check::{Checker, Standing};
use super::runner::Runner;
use super::{Build, BuildError, lower, sources};
use crate::cache::{Hidden, Trace};
use crate::engine::step::{Keep, Step, View};
use crate::machine::PathBytes;
use crate::plan::StepId;

impl<R: Runner> Build<'_, R> {
    /// The step `id` for somebody who enters its machine, which has the toolbox and lasts as long as they stay.
    /// `outputs` are those of the steps it needs, as [`super::Summary::outputs`] has them.
    ///
    /// # Errors
    /// [`BuildError`] where it cannot be given its view or its sources.
    pub fn stage(&self, id: StepId, outputs: &BTreeMap<StepId, Digest>) -> Result<Step, BuildError> {
        let checker = Checker::new(self, lower::hidden(self.settings, &self.plan.ignore)?);
        let needs = self.plan.step(id).needs.iter();
        let needs: Vec<_> = needs.filter_map(|need| Some((*need, *outputs.get(need)?))).collect();
        let staged = checker.stage(id, &needs, &OnceLock::new());
        let mut step = staged.inspect_err(|error| {
            checker.forget(error, &needs, |need| {
                let planned = self.plan.step(need);
                if !planned.follows_outputs() {
                    return Some(self.lower(need, &mut |_| {}).ok()?.key.digest());
                }
                let own =
                    planned.needs.iter().filter_map(|id| Some((*id, *outputs.get(id)?))).collect::<Vec<_>>();
                Some(checker.late_key(need, &own).ok()?.digest())
            });
        })?;
        step.keep = Keep::Always;
        Ok(step)
    }

    /// The trace by which the step `id` need not run; none where it must. `outputs` are those of the steps it needs, as
    /// [`super::Summary::outputs`] has them.
    ///
    /// # Errors
    /// [`BuildError`] where its key cannot be had.
    pub fn trace(&self, id: StepId, outputs: &BTreeMap<StepId, Digest>) -> Result<Option<Trace>, BuildError> {
        let planned = self.plan.step(id);
        let needs = planned.needs.iter().map(|need| Some((*need, *outputs.get(need)?)));
        let Some(needs) = needs.collect::<Option<Vec<_>>>() else { return Ok(None) };
        let checker = Checker::new(self, lower::hidden(self.settings, &self.plan.ignore)?);
        let key = match planned.follows_outputs() {
            true => checker.late_key(id, &needs)?,
            false => self.lower(id, &mut |_| {})?.key,
        };
        Ok(match checker.check(planned, &key, &needs, &|| ())? {
            Standing::Holds { trace, .. } => Some(*trace),
            Standing::Must(_) => None,
        })
    }
}

impl<R: Runner> Checker<'_, R> {
    /// The step `id`, where `needs` are the steps it needs with their outputs. `hidden` is what of SRCDIR no step is
    /// shown, found by whoever needs it first.
    pub fn stage(
        &self,
        id: StepId,
        needs: &[(StepId, Digest)],
        hidden: &OnceLock<Vec<PathBytes>>,
    ) -> Result<Step, BuildError> {
        let build = self.build;
        let planned = build.plan.step(id);
        let names = planned.sources.iter().map(|source| source.name.as_str());
        let (all, client) = (&build.sources, &build.permission.client);
        sources::fetch(names, all, build.settings, build.store, client, || self.leaks())?;
        let work = self.directory(&*self.view(planned, needs)?, |path| self.owner(needs, path))?;
        let sources = match planned.sources.is_empty() {
            true => None,
            false => Some(self.directory(&self.sources(planned), TreePath::to_string)?),
        };
        let hidden = hidden
            .get_or_init(|| self.source().map_or_else(Vec::new, |source| walk(source, &self.hidden)))
            .clone();
        let mut step = match planned.follows_outputs() {
            true => self.late(planned, needs)?.step,
            false => {
                let (settings, overwrite) = (build.settings, build.options.overwrite);
                lower::lower(planned, settings, &build.folder, overwrite, &lower::Found::default())
            }
        };
        step.view = Some(View { work, sources, hidden });
        Ok(step)
    }

    /// The name of the one of the steps `needs` that put out `path`.
    pub fn owner(&self, needs: &[(StepId, Digest)], path: &TreePath) -> String {
        let puts_out = |(_, manifest): &&(StepId, Digest)| {
            self.tree(manifest).is_some_and(|tree| tree.get(path).is_some())
        };
        let need = needs.iter().find(puts_out);
        need.map_or_else(String::new, |(need, _)| self.build.plan.step(*need).name.clone())
    }

    /// The first of what the steps `needs` put out that the store does not have as it was: all of it is read.
    pub fn lost_of(&self, needs: &[(StepId, Digest)]) -> Option<BuildError> {
        needs.iter().find_map(|(need, manifest)| {
            let step = || self.build.plan.step(*need).name.clone();
            let Some(tree) = self.tree(manifest) else {
                let path = "the manifest of its outputs".to_owned();
                return Some(BuildError::Lost { step: step(), path, digest: *manifest });
            };
            let (path, digest) = self.lost_in(&tree)?;
            Some(BuildError::Lost { step: step(), path, digest })
        })
    }

    /// The first file of `tree` whose content the store does not have as it was.
    pub fn lost_in(&self, tree: &Tree) -> Option<(String, Digest)> {
        tree.iter().find_map(|(path, node)| match &node.kind {
            NodeKind::File { digest, .. } if !self.build.store.blobs().is_sound(digest) => {
                Some((path.to_string(), *digest))
            }
            _ => None,
        })
    }

    /// Where outputs of a needed step are lost, that step, whose key `key` gives, runs again next time, and puts them
    /// back.
    pub fn forget(
        &self,
        error: &BuildError,
        needs: &[(StepId, Digest)],
        key: impl Fn(StepId) -> Option<Digest>,
    ) {
        let BuildError::Lost { step, digest, .. } = error else { return };
        self.build.store.blobs().discard_damaged(digest);
        // Its outputs are looked for in the store again before it counts as up to date, whoever's its trace is.
        let _ = self.index.forget_placed(&self.work, step);
        for (need, manifest) in needs.iter().filter(|(need, _)| self.build.plan.step(*need).name == *step) {
            if let Some(key) = key(*need) {
                let _ = self.index.forget(&key, manifest);
            }
        }
    }
}

/// The paths beneath `source` that are hidden, each without what is in it. What cannot be listed a step cannot list either.
fn walk(source: &OwnedFd, hidden: &Hidden) -> Vec<PathBytes> {
    let mut found: Vec<PathBytes> = hidden.paths.iter().cloned().map(PathBytes).collect();
    if hidden.ignore.globs().is_empty() {
        return found;
    }
    let mut open = vec![Vec::new()];
    while let Some(folder) = open.pop() {
        let Ok(directory) = open_beneath(source, &folder, Open::Directory) else { continue };
        let _ = list_directory(directory.as_fd(), |name, kind, _| {
            let path = if folder.is_empty() { name.to_vec() } else { [&folder, &b"/"[..], name].concat() };
            if hidden.hides(&path) {
                found.push(PathBytes(path));
            } else if kind == Kind::Directory {
                open.push(path);
            }
            Ok(())
        });
    }
    found
}
