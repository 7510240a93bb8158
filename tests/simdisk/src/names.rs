//! Directories: the names that are there, and those that would be after a power cut.

use std::{collections::BTreeMap, path::PathBuf};

use crate::rng::Rng;

/// What a name stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Node {
    File(u64),
    Dir,
}

/// A change of names that is not durable yet.
#[derive(Clone)]
pub(crate) enum Change {
    Put(String, Node),
    Remove(String),
    /// Inside one directory, and so one change.
    Rename(String, String, Node),
}

#[derive(Clone, Default)]
pub(crate) struct Dir {
    pub now: BTreeMap<String, Node>,
    disk: BTreeMap<String, Node>,
    pending: Vec<Change>,
}

pub(crate) type Tree = BTreeMap<PathBuf, Dir>;

impl Dir {
    pub fn change(&mut self, change: Change) {
        apply(&mut self.now, &change);
        self.pending.push(change);
    }

    pub fn synced(&mut self) {
        for change in std::mem::take(&mut self.pending) {
            apply(&mut self.disk, &change);
        }
    }

    /// Decides what of the changes the disk has kept.
    pub fn lose(&mut self, rng: &mut Rng) {
        for change in std::mem::take(&mut self.pending) {
            if rng.chance(500_000) {
                apply(&mut self.disk, &change);
            }
        }
    }

    /// Files that a name stands for, or may stand for after a power cut: of the changes that are not durable any
    /// may be lost, so a name may also go back to a file that it stood for in between.
    pub fn names(&self) -> Vec<u64> {
        let file = |node: &Node| match node {
            Node::File(number) => Some(*number),
            Node::Dir => None,
        };
        let between = self.pending.iter().filter_map(|change| match change {
            Change::Put(_, node) | Change::Rename(_, _, node) => Some(node),
            Change::Remove(_) => None,
        });
        self.now.values().chain(self.disk.values()).chain(between).filter_map(file).collect()
    }

    /// The power is back: there is what the disk has.
    pub fn restarted(&mut self) {
        self.now.clone_from(&self.disk);
    }
}

fn apply(names: &mut BTreeMap<String, Node>, change: &Change) {
    match change {
        Change::Put(name, node) => {
            names.insert(name.clone(), *node);
        }
        Change::Remove(name) => {
            names.remove(name);
        }
        Change::Rename(from, to, node) => {
            names.remove(from);
            names.insert(to.clone(), *node);
        }
    }
}
