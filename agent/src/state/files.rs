//! The files of a group's state directory.
//!
//! Every block is written twice, and the path of terms is kept in two files. A block whose checksum is
//! wrong could be one that a power cut has torn, which nothing relied on, or one that has rotted, on
//! which much may rest; the newer of two places that are written in turn may be either. With a copy
//! of each, the first is torn in both and the second sound in one.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use tidemark_journal::{Ancestry, GroupId, VolumeId};

use super::{
    StateError,
    block::{GroupState, STATE_BLOCK_BYTES},
    disk::{StateDir, StateDisk},
    leases, terms,
};
use crate::dirty::{
    active, bitmap,
    map::{BlockWrite, Commit},
};

const STATE: &str = "state";
const STATE_BYTES: u64 = 2 * STATE_BLOCK_BYTES as u64;
/// Written in this order, so the first is never the older one.
const TERMS: [&str; 2] = ["terms.json", "terms.copy.json"];
const LOG: &str = "active.log";

/// The open files of one group.
pub struct StateFiles {
    dir: PathBuf,
    disk: Box<dyn StateDisk>,
    /// The files of blocks, and where in them the second copy begins.
    copies: BTreeMap<String, u64>,
    counter: u64,
}

/// What was found in a directory.
pub struct Found {
    /// The state block, unless the group is new here.
    pub state: Option<GroupState>,
    /// The terms, unless the group is new here.
    pub ancestry: Option<Ancestry>,
    /// The whole log of active regions.
    pub log: Vec<u8>,
    /// The whole bitmap files, in the order of the volumes asked for.
    pub maps: Vec<Vec<u8>>,
    /// The longest lease that may have been granted; none if none was.
    pub lease: Option<Duration>,
    /// The disks may have been written without the agent: what all this says of them is worth nothing.
    pub doubted: bool,
}

impl StateFiles {
    /// Opens (or makes) the directory of a group, takes it for this process alone, and reads it.
    /// `volumes` are the volumes' ids and numbers of regions.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(
        dir: &Path,
        group: GroupId,
        volumes: &[(VolumeId, u32)],
    ) -> Result<(StateFiles, Found), StateError> {
        fs::create_dir_all(dir).map_err(|e| fail("make", dir, e))?;
        let mut disk = StateDir::new(dir);
        let state = dir.join(STATE);
        disk.open(STATE, STATE_BYTES).map_err(|e| fail("open", &state, e))?;
        disk.lock(STATE).map_err(|_| StateError::Locked(dir.to_owned()))?;
        StateFiles::on(Box::new(disk), dir, group, volumes)
    }

    /// The same on any disk, which nobody else uses. `dir` is what errors call it.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn on(
        mut disk: Box<dyn StateDisk>,
        dir: &Path,
        group: GroupId,
        volumes: &[(VolumeId, u32)],
    ) -> Result<(StateFiles, Found), StateError> {
        let mut copies = BTreeMap::new();
        let mut file = |name: &str, bytes: u64| {
            disk.open(name, 2 * bytes).map_err(|e| fail("open", &dir.join(name), e))?;
            copies.insert(name.to_owned(), bytes);
            let read = disk.read(name).map_err(|e| fail("read", &dir.join(name), e))?;
            Ok::<_, StateError>(read.unwrap_or_default())
        };
        let bytes = file(STATE, STATE_BYTES)?;
        let newest =
            bytes.chunks(STATE_BLOCK_BYTES).filter_map(GroupState::decode).max_by_key(|b| b.0);
        let log = file(LOG, active::LOG_BYTES)?;
        let mut maps = Vec::new();
        for (volume, regions) in volumes {
            maps.push(file(&map_name(*volume), bitmap::file_bytes(*regions))?);
        }
        let mut written = Vec::new();
        for name in TERMS {
            written.extend(disk.read(name).map_err(|e| fail("read", &dir.join(name), e))?);
        }
        let ancestry = written.iter().find_map(|bytes| terms::decode(bytes));
        if ancestry.is_none() && !written.is_empty() {
            return Err(StateError::Damaged(dir.to_owned()));
        }
        // The terms are written first of all: without them the group is new, with them a state
        // block must be there.
        if newest.is_some() != ancestry.is_some() && bytes.iter().any(|byte| *byte != 0) {
            return Err(StateError::Damaged(dir.to_owned()));
        }
        let found = newest.map(|(_, state)| state);
        if let Some(state) = &found
            && state.group != group
        {
            let (path, found) = (dir.to_owned(), state.group);
            return Err(StateError::OtherGroup { path, expected: group, found });
        }
        let lease =
            disk.read(leases::FILE).map_err(|e| fail("read", &dir.join(leases::FILE), e))?;
        let lease = lease.and_then(|bytes| leases::decode(&bytes, group));
        disk.sync_names().map_err(|e| fail("sync", dir, e))?;
        let counter = newest.map_or(0, |(counter, _)| counter);
        let ancestry = if found.is_some() { ancestry } else { None };
        let files = StateFiles { dir: dir.to_owned(), disk, copies, counter };
        Ok((files, Found { state: found, ancestry, log, maps, lease, doubted: false }))
    }

    /// Writes the state block durably.
    ///
    /// # Errors
    /// The disk's error.
    pub fn write_state(&mut self, state: &GroupState) -> Result<(), StateError> {
        self.counter += 1;
        let at = self.counter % 2 * STATE_BLOCK_BYTES as u64;
        let written = self.write_twice(STATE, &state.encode(self.counter), at);
        let written = written.and_then(|()| self.disk.sync(STATE));
        written.map_err(|e| fail("write", &self.dir.join(STATE), e))
    }

    /// Replaces the terms durably.
    ///
    /// # Errors
    /// The disk's error.
    pub fn write_terms(&mut self, ancestry: &Ancestry) -> Result<(), StateError> {
        let content = terms::encode(ancestry);
        let content = content.map_err(|e| fail("encode", &self.dir.join(TERMS[0]), e.into()))?;
        TERMS.iter().try_for_each(|name| self.replace(name, &content))
    }

    /// Notes durably that leases of up to so long are granted, or with zero that none are.
    ///
    /// # Errors
    /// The disk's error.
    pub fn write_lease(&mut self, group: GroupId, lease: Duration) -> Result<(), StateError> {
        self.replace(leases::FILE, &leases::encode(group, lease))
    }

    fn replace(&mut self, name: &str, content: &[u8]) -> Result<(), StateError> {
        let (new, disk) = (format!("{name}.new"), &mut self.disk);
        let written = disk
            .create(&new, content)
            .and_then(|()| disk.rename(&new, name))
            .and_then(|()| disk.sync_names());
        written.map_err(|e| fail("write", &self.dir.join(name), e))
    }

    /// Writes a commit of the dirty map: the pages, made durable, then the log's block.
    ///
    /// # Errors
    /// The disk's error.
    pub fn write_commit(&mut self, commit: &Commit) -> Result<(), StateError> {
        self.write_blocks(&commit.pages)?;
        commit.log.as_ref().map_or(Ok(()), |log| self.write_blocks(std::slice::from_ref(log)))
    }

    fn write_blocks(&mut self, blocks: &[BlockWrite]) -> Result<(), StateError> {
        let mut touched: Vec<String> = Vec::new();
        let dir = self.dir.clone();
        let failed = |e| fail("write the dirty map in", &dir, e);
        for write in blocks {
            let name = write.volume.map_or_else(|| LOG.to_owned(), map_name);
            self.write_twice(&name, &write.block, write.offset).map_err(failed)?;
            if !touched.contains(&name) {
                touched.push(name);
            }
        }
        touched.iter().try_for_each(|name| self.disk.sync(name)).map_err(failed)
    }

    fn write_twice(&mut self, name: &str, block: &[u8], at: u64) -> io::Result<()> {
        let copy =
            *self.copies.get(name).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        self.disk.write_at(name, block, at)?;
        self.disk.write_at(name, block, copy + at)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

fn map_name(volume: VolumeId) -> String {
    format!("{volume}.map")
}

fn fail(what: &'static str, path: &Path, source: io::Error) -> StateError {
    StateError::Io { what, path: path.to_owned(), source }
}
