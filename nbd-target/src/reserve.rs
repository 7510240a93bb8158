//! Room that is set aside for what gives room back.
//!
//! Folding ends with the removal of a segment, and before that it takes room: in the base, for the
//! blocks that it had not, in the redo file and in the catalogue. On a disk that others, or the log
//! itself, have filled up it could never begin, and history would never leave. So a file beside the
//! groups holds the room of four segments, or a sixteenth of the file system where that is less. When the disk is full it is removed, for a fold or a transaction of
//! the catalogue; from then on no log begins another segment, until the file is whole again.
//!
//! A fold takes at most a block of the redo file for each entry of a segment, 1 GiB for the largest
//! index there is, and the content that it unpacks, as far as the base has no blocks for it yet. What
//! is more than the reserve has to be found on the disk.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tidemark_control::config::Bytes;

use crate::{
    machine::{How, Machine},
    store::{ReadError, log::no_room},
};

/// Segments whose room is set aside.
const SEGMENTS: u64 = 4;
/// The part of the file system that is set aside at most.
const DISK_PART: u64 = 16;
/// It is taken in so many parts, so that what there is of room is held as far as it goes.
const PARTS: u64 = 16;

/// The reserve of a target's disk.
pub struct Reserve {
    machine: Machine,
    path: PathBuf,
    bytes: u64,
    whole: AtomicBool,
    /// Held while the file changes.
    changing: Mutex<()>,
}

impl Reserve {
    /// A reserve in this directory, which is there, for segments of that size. Nothing is held before the first
    /// [`refill`](Self::refill).
    pub fn new(machine: &Machine, dir: &Path, segment_bytes: u64) -> Reserve {
        Reserve {
            machine: machine.clone(),
            // No group is called so.
            path: dir.join(".reserve"),
            bytes: (segment_bytes * SEGMENTS).min(machine.disk_bytes(dir) / DISK_PART),
            whole: AtomicBool::new(false),
            changing: Mutex::new(()),
        }
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether all of it is held.
    pub fn is_whole(&self) -> bool {
        self.whole.load(Ordering::Acquire)
    }

    /// Whether logs may grow.
    ///
    /// # Errors
    /// That the disk is full, while not all of it is held.
    pub fn check(&self) -> io::Result<()> {
        if self.is_whole() {
            return Ok(());
        }
        let text = format!("{} cannot be kept in reserve for folding", Bytes(self.bytes));
        Err(io::Error::new(io::ErrorKind::StorageFull, text))
    }

    /// Takes the room that is missing, or as much of it as there is.
    pub fn refill(&self) {
        if self.is_whole() {
            return;
        }
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        match self.take() {
            Err(error) if no_room(&error) => return,
            // A file system that cannot set room aside, say: it cannot be helped.
            Err(error) => tracing::warn!("no room is kept in reserve: {error}"),
            Ok(()) => tracing::debug!(bytes = self.bytes, "the reserve is whole"),
        }
        self.whole.store(true, Ordering::Release);
    }

    /// Runs `work`; when the disk is full, the reserve is given up and `work` runs once more.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn with_room<T>(&self, work: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<T> {
        match work() {
            Err(error) if is_no_room(&error) && self.give_up() => {
                tracing::warn!("the disk is full, so the reserve is given up: {error:#}");
                work()
            }
            done => done,
        }
    }

    fn take(&self) -> io::Result<()> {
        let how = if self.machine.exists(&self.path) { How::Write } else { How::Truncate };
        let file = self.machine.open(&self.path, how)?;
        if file.length()? > self.bytes {
            file.set_len(self.bytes)?;
        }
        // Also what a power cut has left of an earlier one.
        match file.preallocate(self.bytes) {
            Err(error) if no_room(&error) => {
                (1..=PARTS).try_for_each(|part| file.preallocate(self.bytes / PARTS * part))
            }
            done => done,
        }
    }

    /// Gives it up. Says whether there was something to give.
    fn give_up(&self) -> bool {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.whole.store(false, Ordering::Release);
        let given = self.machine.remove_file(&self.path).is_ok();
        // Until then a file system may keep the room to itself. If it fails, others will meet it.
        let _ = self.machine.sync_parent(&self.path);
        given
    }
}

/// Whether an error comes of a full file system.
fn is_no_room(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| io_error(cause).is_some_and(no_room))
}

/// What the file system said, also in errors that say it in their own words and so name no source.
fn io_error<'e>(cause: &'e (dyn std::error::Error + 'static)) -> Option<&'e io::Error> {
    if let Some(redb::Error::Io(error)) = cause.downcast_ref() {
        return Some(error);
    }
    if let Some(ReadError::Io { error, .. }) = cause.downcast_ref() {
        return Some(error);
    }
    cause.downcast_ref()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use anyhow::Context;
    use tidemark_journal::{GroupId, VolumeId};
    use tidemark_simdisk::{Op, SimDisk, errno};

    use super::*;
    use crate::{
        machine::simulated::Simulated,
        store::base::{
            BLOCK_BYTES, Base,
            apply::{Change, NewContent, Redo},
            sum::Unknown,
        },
    };

    /// Which takes room: blocks that the base had not, after the start has put all there was into the
    /// reserve.
    #[test]
    fn a_fold_that_was_cut_short_is_redone_on_a_full_disk() {
        let disk = SimDisk::new(1);
        let machine = Machine::Simulated(Simulated::new(disk.clone(), 1, 0));
        let (dir, volume) = (Path::new("/base"), VolumeId(0));
        let open = |rows: &BTreeMap<_, _>| Base::open(&machine, dir, GroupId([2; 16]), rows);
        let block = |byte| vec![byte; BLOCK_BYTES as usize];
        let (base, _) = open(&BTreeMap::new()).expect("opened");
        let change = Change { volume, first: 0, content: NewContent::Data(block(1)) };
        base.apply(&change, &mut Vec::new()).expect("applied");
        let rows = base.finish().expect("durable");
        base.committed(&rows);
        let mut redo = Redo::create(&base).expect("made");
        redo.push(volume, 100, &block(2), Unknown::NONE).expect("added");
        redo.sync().expect("durable");
        drop((base, redo));

        machine.create_dir_all(Path::new("/groups")).expect("made");
        let reserve = Reserve::new(&machine, Path::new("/groups"), 64 << 10);
        reserve.refill();
        assert!(reserve.is_whole());
        disk.fail(Op::Write, "/base/00000.data", 0, errno::ENOSPC);
        let opened = reserve.with_room(|| open(&rows).context("cannot open the base"));
        let (base, damage) = opened.expect("with the room of the reserve");
        assert!(!reserve.is_whole() && !machine.exists(Path::new("/groups/.reserve")));
        assert_eq!(damage, Vec::<String>::new());
        for (number, byte) in [(0, 1), (100, 2)] {
            assert_eq!(base.block(volume, number).expect("read"), (block(byte), Unknown::NONE));
        }
    }
}
