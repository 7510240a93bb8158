//! The base: the oldest retained state of each volume, with a checksum per 4 KiB beside it.
//!
//! A volume is a sparse file of blocks, `NNNNN.data`, and a file of sums, `NNNNN.sums` (its format:
//! [`sums`]), eight bytes for each block of 4096 ([`sum`]).
//!
//! Blocks and sums change only while segments are folded in, and until their log is deleted the
//! segments are read before the base; so a block torn by a crash in the middle of it is never seen.
//!
//! Nothing is told by absence. The catalogue knows which volumes have a base, how long its files
//! are at least and which generation they are of ([`BaseRow`]); a fold makes the files durable
//! first, their header with the next generation last, and then commits the row. So a volume without
//! a row was never written and reads as zeros, and one with a row whose files are missing, of
//! another volume, or of a generation other than the row's or the next (a fold that was cut short,
//! and is done again) is **lost**: it is damage to read it, until a fold makes it anew with all of
//! it unknown but what is folded in.

pub mod apply;
pub mod check;
pub mod fold;
pub mod sum;
pub mod sums;
pub mod volume;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tidemark_journal::{GroupId, SECTOR_BYTES, VolumeId};

use super::{Damage, ReadError, Where};
use crate::{
    bounds::{COUNT_MAX, SECTORS_MAX, at_most},
    machine::Machine,
};
use apply::Redo;
use sum::Unknown;
use sums::{Rest, Seal};
use volume::BaseVolume;

/// Bytes in a block of the base.
pub const BLOCK_BYTES: u64 = 4096;
const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;
/// Blocks of the largest volume.
const BLOCKS_MAX: u64 = SECTORS_MAX / BLOCK_SECTORS;
/// The most places of damage that are named at once.
const DAMAGE_NAMED_MAX: usize = 10;

/// What the catalogue knows of a volume's base. A volume that has none was never written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct BaseRow {
    /// Counts the folds that changed this volume.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub generation: u64,
    /// Blocks of 4096 bytes that its files have room for.
    #[serde(deserialize_with = "at_most::<BLOCKS_MAX, _>")]
    pub blocks: u64,
}

/// The oldest retained state of a group's volumes.
pub struct Base {
    machine: Machine,
    dir: PathBuf,
    group: GroupId,
    volumes: Mutex<BTreeMap<VolumeId, Place>>,
}

/// What there is of a volume.
#[derive(Clone)]
enum Place {
    Here(Arc<BaseVolume>),
    /// The catalogue knows of it, and it is not here.
    Lost {
        row: BaseRow,
        why: Arc<str>,
    },
}

/// A stretch of a volume by what the base has of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    /// First sector.
    pub start: u64,
    /// The sector after the last.
    pub end: u64,
    /// Whether it reads as zeros.
    pub zeros: bool,
}

impl Base {
    /// The base in this directory, which is created, with the volumes that the catalogue knows.
    /// What an interrupted fold left to redo is applied. Also says what is damaged, a sentence each.
    ///
    /// # Errors
    /// When the directory cannot be created, or files cannot be read though they are there.
    pub fn open(
        machine: &Machine,
        dir: &Path,
        group: GroupId,
        rows: &BTreeMap<VolumeId, BaseRow>,
    ) -> Result<(Base, Vec<String>), ReadError> {
        let io = |error| ReadError::io(dir.display().to_string(), error);
        machine.create_dir_all(dir).map_err(io)?;
        let mut volumes = BTreeMap::new();
        let mut damage = Vec::new();
        for (id, row) in rows {
            let place = match BaseVolume::open(machine, dir, Seal { group, volume: *id }, *row) {
                Ok((volume, found)) => {
                    let mended =
                        |found| format!("{found}; 'tidemark verify' at the source mends it");
                    damage.extend(found.into_iter().map(mended));
                    Place::Here(Arc::new(volume))
                }
                Err(ReadError::Damaged(why)) => {
                    let why = format!(
                        "the base of volume {id} is lost ({why}): what only it held is unknown; \
                         'tidemark verify' at the source sends it again"
                    );
                    damage.push(why.clone());
                    Place::Lost { row: *row, why: why.into() }
                }
                Err(error) => return Err(error),
            };
            volumes.insert(*id, place);
        }
        let machine = machine.clone();
        let base = Base { machine, dir: dir.to_owned(), group, volumes: Mutex::new(volumes) };
        Redo::replay(&base).map_err(io)?;
        Ok((base, damage))
    }

    /// Reads sectors `start..end` into `out`, which comes zeroed, checking every block it touches.
    ///
    /// # Errors
    /// When a block cannot be read, does not match its sum, is unknown, or has been lost.
    pub fn read(
        &self,
        id: VolumeId,
        start: u64,
        end: u64,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        self.volume(id)?.map_or(Ok(()), |volume| volume.read(start, end, out))
    }

    /// One block as it is, and which of its sectors are unknown: zeros.
    ///
    /// # Errors
    /// When it cannot be read, does not match its sum, or has been lost.
    pub fn block(&self, id: VolumeId, number: u64) -> Result<(Vec<u8>, Unknown), ReadError> {
        let mut block = vec![0; BLOCK_BYTES as usize];
        let unknown = match self.volume(id)? {
            Some(volume) => volume.block(number, &mut block)?,
            None => Unknown::NONE,
        };
        Ok((block, unknown))
    }

    /// The stretches of `start..end` by allocation; the list may end early, never empty.
    ///
    /// # Errors
    /// When the sums cannot be read, are damaged, or have been lost.
    pub fn stretches(&self, id: VolumeId, start: u64, end: u64) -> Result<Vec<Stretch>, ReadError> {
        self.volume(id)?.map_or_else(
            || Ok(vec![Stretch { start, end, zeros: true }]),
            |volume| volume.stretches(start, end),
        )
    }

    /// Bytes of disk that the base takes.
    pub fn allocated_bytes(&self) -> u64 {
        self.machine.allocated_bytes(&self.dir)
    }

    /// Makes all changes durable and gives what the catalogue is to know of the volumes changed.
    ///
    /// # Errors
    /// When a file cannot be written or synced.
    pub fn finish(&self) -> io::Result<BTreeMap<VolumeId, BaseRow>> {
        let mut rows = BTreeMap::new();
        for (id, volume) in self.here() {
            rows.extend(volume.finish()?.map(|row| (id, row)));
        }
        Ok(rows)
    }

    /// The catalogue has taken in what [`finish`](Self::finish) gave.
    pub fn committed(&self, rows: &BTreeMap<VolumeId, BaseRow>) {
        for (id, volume) in self.here() {
            if let Some(row) = rows.get(&id) {
                volume.committed(*row);
            }
        }
    }

    /// A volume's files; none when it was never written.
    fn volume(&self, id: VolumeId) -> Result<Option<Arc<BaseVolume>>, ReadError> {
        match self.volumes().get(&id) {
            None => Ok(None),
            Some(Place::Here(volume)) => Ok(Some(Arc::clone(volume))),
            Some(Place::Lost { why, .. }) => {
                let place = Where::Base { volume: id, first: 0, blocks: u64::MAX };
                Err(ReadError::Damaged(Damage::at(place, why.as_ref())))
            }
        }
    }

    /// A volume's files, made if it has none or they are lost.
    fn volume_or_create(&self, id: VolumeId) -> io::Result<Arc<BaseVolume>> {
        let mut volumes = self.volumes();
        let (row, rest) = match volumes.get(&id) {
            Some(Place::Here(volume)) => return Ok(Arc::clone(volume)),
            Some(Place::Lost { row, .. }) => (*row, Rest::Unknown),
            None => (BaseRow::default(), Rest::Zeros),
        };
        let seal = Seal { group: self.group, volume: id };
        let volume = Arc::new(BaseVolume::create(&self.machine, &self.dir, seal, row, rest)?);
        volumes.insert(id, Place::Here(Arc::clone(&volume)));
        Ok(volume)
    }

    fn here(&self) -> Vec<(VolumeId, Arc<BaseVolume>)> {
        let volumes = self.volumes();
        let here = volumes.iter().filter_map(|(id, place)| match place {
            Place::Here(volume) => Some((*id, Arc::clone(volume))),
            Place::Lost { .. } => None,
        });
        here.collect()
    }

    fn volumes(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Place>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
