//! Foresight: which of the guest's processes ask for the metadata of all that they list, as `find -newer`, `tar` and
//! `git status` do. For these, one answer can bring a directory's entries with their metadata, where it would take a
//! question for each.
//!
//! What comes along is recorded as asked about, so it must not come to a process that only wants names. And once it has
//! come the guest's kernel asks no more, so nothing would show that a process has changed its ways. So in each directory
//! two entries are left out, the probes, and the next directory's come along only after both were asked about.

use std::collections::VecDeque;

use super::index::{Index, NodeId};
use super::record::Kind;

/// How many processes are followed at a time, the latest.
const MOST_WALKS: usize = 16;

/// What a process listed last.
#[derive(Debug)]
struct Walk {
    process: u32,
    directory: NodeId,
    /// Entries it is not told about, and whether it has asked.
    probes: [Option<(NodeId, bool)>; 2],
    /// Whether it asked about the probes of the directory before.
    asks_for_all: bool,
}

/// The processes that list directories.
#[derive(Debug, Default)]
pub struct Walks(VecDeque<Walk>);

impl Walks {
    /// Notes that `process` begins to list `directory`, which is filled.
    pub fn enters(&mut self, process: u32, directory: NodeId, index: &Index) {
        let before = self.0.iter().position(|walk| walk.process == process);
        let before = before.and_then(|at| self.0.remove(at));
        let asks_for_all = before.is_some_and(|walk| {
            let mut probes = walk.probes.iter().flatten().peekable();
            // Where there was nothing to ask about, nothing has changed.
            if probes.peek().is_some() { probes.all(|(_, asked)| *asked) } else { walk.asks_for_all }
        });
        // Whoever goes down a tree asks about directories for that alone; and about what the guest's kernel knows it
        // need not ask.
        let tells = |child: &NodeId| index.kind(*child) != Kind::Directory && !index.is_held(*child);
        let first = index.children(directory, 0).find(tells);
        let last = index.children(directory, 0).rev().find(tells).filter(|last| Some(*last) != first);
        let probes = [first, last].map(|probe| probe.map(|node| (node, false)));
        self.0.push_back(Walk { process, directory, probes, asks_for_all });
        if self.0.len() > MOST_WALKS {
            self.0.pop_front();
        }
    }

    /// Notes that `process` asked about `node` by name.
    pub fn asked(&mut self, process: u32, node: NodeId) {
        let walk = self.0.iter_mut().find(|walk| walk.process == process);
        for (probe, asked) in walk.into_iter().flat_map(|walk| walk.probes.iter_mut().flatten()) {
            *asked |= *probe == node;
        }
    }

    /// Whether `process`, which lists `directory`, is likely to ask about `child`, and may be told unasked.
    pub fn foresees(&self, process: u32, directory: NodeId, child: NodeId) -> bool {
        self.0.iter().any(|walk| {
            let is_probe = || walk.probes.iter().flatten().any(|(probe, _)| *probe == child);
            (walk.process, walk.directory) == (process, directory) && walk.asks_for_all && !is_probe()
        })
    }
}
