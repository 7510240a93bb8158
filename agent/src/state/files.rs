//! The files of a group's state directory.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use tidemark_journal::{Ancestry, GroupId, VolumeId};

use super::{
    StateError,
    block::{GroupState, STATE_BLOCK_BYTES},
};
use crate::dirty::{
    active, bitmap,
    map::{BlockWrite, Commit},
};

/// The open files of one group.
pub struct StateFiles {
    dir: PathBuf,
    state: File,
    log: File,
    maps: Vec<(VolumeId, File)>,
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
        let state_path = dir.join("state");
        let state = open(&state_path, 2 * STATE_BLOCK_BYTES as u64)?;
        lock(&state).map_err(|_| StateError::Locked(dir.to_owned()))?;
        let bytes = read(&state, &state_path)?;
        let newest =
            bytes.chunks(STATE_BLOCK_BYTES).filter_map(GroupState::decode).max_by_key(|b| b.0);
        let terms_path = dir.join("terms.json");
        let ancestry = match fs::read(&terms_path) {
            Ok(json) => Some(
                serde_json::from_slice::<Ancestry>(&json)
                    .map_err(|_| StateError::Damaged(dir.to_owned()))?,
            ),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(fail("read", &terms_path, e)),
        };
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
        let log_path = dir.join("active.log");
        let log_file = open(&log_path, active::LOG_BYTES)?;
        let log = read(&log_file, &log_path)?;
        let (mut maps, mut map_bytes) = (Vec::new(), Vec::new());
        for (volume, regions) in volumes {
            let path = dir.join(format!("{volume}.map"));
            let file = open(&path, bitmap::file_bytes(*regions))?;
            map_bytes.push(read(&file, &path)?);
            maps.push((*volume, file));
        }
        sync_dir(dir)?;
        let counter = newest.map_or(0, |(counter, _)| counter);
        let ancestry = if found.is_some() { ancestry } else { None };
        let files = StateFiles { dir: dir.to_owned(), state, log: log_file, maps, counter };
        Ok((files, Found { state: found, ancestry, log, maps: map_bytes, doubted: false }))
    }

    /// Writes the state block durably.
    ///
    /// # Errors
    /// The disk's error.
    pub fn write_state(&mut self, state: &GroupState) -> Result<(), StateError> {
        self.counter += 1;
        let at = self.counter % 2 * STATE_BLOCK_BYTES as u64;
        let path = self.dir.join("state");
        self.state
            .write_all_at(&state.encode(self.counter), at)
            .and_then(|()| self.state.sync_data())
            .map_err(|e| fail("write", &path, e))
    }

    /// Replaces the terms durably.
    ///
    /// # Errors
    /// The disk's error.
    pub fn write_terms(&mut self, ancestry: &Ancestry) -> Result<(), StateError> {
        let (path, new) = (self.dir.join("terms.json"), self.dir.join("terms.json.new"));
        let json =
            serde_json::to_vec(ancestry).map_err(|e| fail("encode", &path, io::Error::other(e)))?;
        let written = File::create(&new).and_then(|file| {
            file.write_all_at(&json, 0)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        });
        written.map_err(|e| fail("write", &path, e))?;
        sync_dir(&self.dir)
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
        let mut touched: Vec<&File> = Vec::new();
        for write in blocks {
            let file = match write.volume {
                None => &self.log,
                Some(volume) => {
                    let map = self.maps.iter().find(|(id, _)| *id == volume);
                    &map.expect("a volume of this group").1
                }
            };
            file.write_all_at(&write.block, write.offset)
                .map_err(|e| fail("write the dirty map in", &self.dir, e))?;
            if !touched.iter().any(|other| std::ptr::eq(*other, file)) {
                touched.push(file);
            }
        }
        let sync = |file: &&File| file.sync_data();
        touched.iter().try_for_each(sync).map_err(|e| fail("write the dirty map in", &self.dir, e))
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Opens a file for blocks that are written in place. All of it is written once, so that later
/// writes change no metadata of the file system and cannot fail for want of room.
fn open(path: &Path, bytes: u64) -> Result<File, StateError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| fail("open", path, e))?;
    let grow = || {
        let mut at = file.metadata()?.len();
        let zeros = vec![0; 1 << 20];
        while at < bytes {
            let piece = zeros.len().min((bytes - at) as usize);
            file.write_all_at(&zeros[..piece], at)?;
            at += piece as u64;
        }
        file.sync_all()
    };
    grow().map_err(|e| fail("write", path, e))?;
    Ok(file)
}

fn read(file: &File, path: &Path) -> Result<Vec<u8>, StateError> {
    let read = || {
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    read().map_err(|e| fail("read", path, e))
}

fn lock(file: &File) -> io::Result<()> {
    file.try_lock().map_err(io::Error::from)
}

fn sync_dir(dir: &Path) -> Result<(), StateError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| fail("sync", dir, e))
}

fn fail(what: &'static str, path: &Path, source: io::Error) -> StateError {
    StateError::Io { what, path: path.to_owned(), source }
}
