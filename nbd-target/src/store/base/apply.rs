//! Changing blocks of the base, with their sums.

use std::{io, path::PathBuf};

use tidemark_journal::{VolumeId, checksum::crc64};

use super::{BLOCK_BYTES, BLOCKS_MAX, Base, Place, sum::Unknown};
use crate::machine::{File, How, Machine};

/// A run of blocks of one volume that get new content.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// The volume.
    pub volume: VolumeId,
    /// The first block.
    pub first: u64,
    /// What they get.
    pub content: NewContent,
}

/// What blocks get.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NewContent {
    /// Whole blocks of bytes.
    Data(Vec<u8>),
    /// One block of which some sectors are unknown, and zeros.
    Parts(Vec<u8>, Unknown),
    /// So many blocks of zeros.
    Zeros(u64),
    /// So many blocks whose content is unknown.
    Unreadable(u64),
}

impl NewContent {
    /// How many blocks it is.
    pub fn blocks(&self) -> u64 {
        match self {
            NewContent::Data(bytes) | NewContent::Parts(bytes, _) => {
                bytes.len() as u64 / BLOCK_BYTES
            }
            NewContent::Zeros(blocks) | NewContent::Unreadable(blocks) => *blocks,
        }
    }
}

impl Base {
    /// Applies a change; it is durable after [`finish`](Self::finish). Sums that are found to be
    /// damaged are unknown from then on, and named in `damage`.
    ///
    /// # Errors
    /// When the files cannot be read or written.
    pub fn apply(&self, change: &Change, damage: &mut Vec<String>) -> io::Result<()> {
        let never_written = !self.volumes().contains_key(&change.volume);
        if never_written && matches!(change.content, NewContent::Zeros(_)) {
            return Ok(());
        }
        self.volume_or_create(change.volume)?.apply(change.first, &change.content, damage)
    }

    fn redo_path(&self) -> PathBuf {
        self.dir.join("fold.redo")
    }
}

/// Blocks that were put together from old and new content, kept until the base is synced: a block
/// torn by a crash could not be put together again from itself.
///
/// A file of entries: volume (2 bytes), the sectors that are unknown (1, a bit for each, lowest
/// first), zeros (5), block (8), content (4096), CRC-64/NVME of the entry so far (8).
pub struct Redo {
    machine: Machine,
    path: PathBuf,
    file: File,
    bytes: u64,
    unsynced: bool,
}

const REDO_BYTES: usize = 16 + BLOCK_BYTES as usize + 8;

impl Redo {
    /// Begins an empty file.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(base: &Base) -> io::Result<Redo> {
        let path = base.redo_path();
        let machine = base.machine.clone();
        let file = machine.open(&path, How::Truncate)?;
        file.sync_all()?;
        machine.sync_dir(&base.dir)?;
        Ok(Redo { machine, path, file, bytes: 0, unsynced: false })
    }

    /// Adds a block.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn push(
        &mut self,
        volume: VolumeId,
        block: u64,
        content: &[u8],
        unknown: Unknown,
    ) -> io::Result<()> {
        let mut entry = Vec::with_capacity(REDO_BYTES);
        entry.extend_from_slice(&volume.0.to_le_bytes());
        entry.extend_from_slice(&[unknown.0, 0, 0, 0, 0, 0]);
        entry.extend_from_slice(&block.to_le_bytes());
        entry.extend_from_slice(content);
        entry.extend_from_slice(&crc64(&entry).to_le_bytes());
        self.unsynced = true;
        self.file.write_all_at(&entry, self.bytes)?;
        self.bytes += REDO_BYTES as u64;
        Ok(())
    }

    /// Makes the blocks added durable, before any of them is changed in place.
    ///
    /// # Errors
    /// When it cannot be synced.
    pub fn sync(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.unsynced) {
            self.file.sync_data()?;
        }
        Ok(())
    }

    /// Removes the file: everything in it is durable in its place.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(self) -> io::Result<()> {
        self.machine.remove_file(&self.path)
    }

    /// Applies what an interrupted fold left, if it left anything. A volume that was never written
    /// before that fold, or is lost, is left alone: such a block is put together anew from what the
    /// segment has.
    ///
    /// # Errors
    /// When it cannot be read or applied.
    pub fn replay(base: &Base) -> io::Result<()> {
        let file = match base.machine.open(&base.redo_path(), How::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut entry = vec![0; REDO_BYTES];
        let mut at = 0;
        // What was not synced whole was not applied either.
        while file.read_up_to(&mut entry, at)? == REDO_BYTES {
            at += REDO_BYTES as u64;
            let (body, crc) = entry.split_at(REDO_BYTES - 8);
            let volume = VolumeId(u16::from_le_bytes([body[0], body[1]]));
            let first = u64::from_le_bytes(body[8..16].try_into().unwrap_or_default());
            if crc64(body).to_le_bytes() != *crc || first >= BLOCKS_MAX {
                break;
            }
            let content = NewContent::Parts(body[16..].to_vec(), Unknown(body[2]));
            if matches!(base.volumes().get(&volume), Some(Place::Here(_))) {
                // Damage that is met here is met again by the fold, which names it.
                base.apply(&Change { volume, first, content }, &mut Vec::new())?;
            }
        }
        base.here().iter().try_for_each(|(_, volume)| volume.sync_content())
    }
}
