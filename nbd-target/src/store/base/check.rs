//! Checking the base against its sums.

use std::{io, sync::Arc};

use tidemark_journal::VolumeId;

use super::{
    BLOCK_BYTES, BLOCK_SECTORS, Base, Place,
    sum::{SUM_UNREADABLE, SUM_ZEROS, Unknown, unknown_by},
    sums::{self, Header, SECTOR, Seal, UNIT_BLOCKS},
    volume::BaseVolume,
};
use crate::store::ReadError;

/// Blocks of a volume's base that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BadBlocks {
    /// The first.
    pub first: u64,
    /// How many.
    pub blocks: u64,
    /// Why, as a sentence.
    pub text: String,
}

/// What a look at some units has found.
#[derive(Default, Debug)]
pub struct Looked {
    /// Bytes that were read.
    pub bytes: u64,
    /// The unit to go on with; none at the end.
    pub next: Option<u64>,
    /// What cannot be read.
    pub bad: Vec<BadBlocks>,
}

/// Units that are looked at together: about 1 MiB of content.
const UNITS: u64 = 4;
/// The most units that are gone through at once, most of which were never written.
const UNITS_LOOKED_MAX: u64 = 64 << 10;

impl Base {
    /// Checks a few units of a volume from one on, against its sums. A header or a map that is
    /// damaged on the disk and known in memory is written again.
    ///
    /// # Errors
    /// When the files cannot be read or written.
    pub fn check(&self, id: VolumeId, from: u64) -> Result<Looked, ReadError> {
        let volume = match self.volumes().get(&id).cloned() {
            None => return Ok(Looked::default()),
            Some(Place::Here(volume)) => volume,
            Some(Place::Lost { row, why }) => {
                let bad = BadBlocks { first: 0, blocks: row.blocks, text: why.to_string() };
                return Ok(Looked { bad: vec![bad], ..Looked::default() });
            }
        };
        volume.check(from).map_err(|error| ReadError::io(format!("the base of volume {id}"), error))
    }

    /// The parts of sectors `start..end` that [`read`](Base::read) does not give.
    pub fn bad(&self, id: VolumeId, start: u64, end: u64) -> Vec<(u64, u64)> {
        match self.volumes().get(&id).cloned() {
            None => Vec::new(),
            Some(Place::Here(volume)) => volume.bad(start, end),
            Some(Place::Lost { .. }) => vec![(start, end)],
        }
    }

    /// The volumes that have a base.
    pub fn volume_ids(&self) -> Vec<VolumeId> {
        self.volumes().keys().copied().collect()
    }

    /// The volumes whose files are lost: the blocks that they had room for, and why.
    pub fn lost(&self) -> Vec<(VolumeId, u64, String)> {
        let volumes = self.volumes();
        let lost = volumes.iter().filter_map(|(id, place)| match place {
            Place::Lost { row, why } => Some((*id, row.blocks, why.to_string())),
            Place::Here(_) => None,
        });
        lost.collect()
    }

    /// Has all of the volumes unknown from now on, durably once [`finish`](Self::finish) has made
    /// them so: something that is lost may have changed any block of them. What is there is kept as
    /// `*.damaged`.
    ///
    /// # Errors
    /// When the files cannot be made anew.
    pub fn lose(&self, ids: impl IntoIterator<Item = VolumeId>) -> io::Result<()> {
        let mut volumes = self.volumes();
        for id in ids {
            let row = match volumes.get(&id) {
                Some(Place::Here(volume)) => volume.state().row,
                Some(Place::Lost { row, .. }) => *row,
                None => super::BaseRow::default(),
            };
            let seal = Seal { group: self.group, volume: id };
            let volume =
                BaseVolume::create(&self.machine, &self.dir, seal, row, sums::Rest::Unknown)?;
            volumes.insert(id, Place::Here(Arc::new(volume)));
        }
        Ok(())
    }
}

impl BaseVolume {
    fn bad(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut bad: Vec<(u64, u64)> = Vec::new();
        let mut push = |from, to| match bad.last_mut() {
            Some((_, last)) if *last == from => *last = to,
            _ => bad.push((from, to)),
        };
        let within = |from: u64, to: u64| (from.max(start), to.min(end));
        let sectors = |block: u64| block * BLOCK_SECTORS;
        let mut content = vec![0; BLOCK_BYTES as usize];
        let units = start / sectors(UNIT_BLOCKS)..end.div_ceil(sectors(UNIT_BLOCKS));
        for unit in units {
            // Given back after each, for whoever folds.
            let state = self.state();
            let first = unit * UNIT_BLOCKS;
            let (from, to) = within(sectors(first), sectors(first + UNIT_BLOCKS));
            if !state.has(unit) {
                if state.rest == sums::Rest::Unknown {
                    push(from, to);
                }
                continue;
            }
            let Ok(Some(sums)) = self.unit(&state, unit) else {
                push(from, to);
                continue;
            };
            for (block, sum) in (first..).zip(sums).filter(|(_, sum)| *sum != SUM_ZEROS) {
                let (from, to) = within(sectors(block), sectors(block + 1));
                if from >= to {
                    continue;
                }
                let asked = from - sectors(block)..to - sectors(block);
                let unknown = self.content(block, sum, &mut content);
                if unknown.map_or(true, |unknown| unknown.first_in(asked).is_some()) {
                    push(from, to);
                }
            }
        }
        bad
    }

    fn check(&self, from: u64) -> io::Result<Looked> {
        let mut looked = Looked::default();
        if from == 0 {
            self.check_header()?;
        }
        let state = self.state();
        let units = state.blocks.div_ceil(UNIT_BLOCKS);
        let mut unit = from;
        // Units that were never written take no time.
        let last = from.saturating_add(UNITS_LOOKED_MAX).min(units);
        while unit < last && looked.bytes < UNITS * UNIT_BLOCKS * BLOCK_BYTES {
            if unit.is_multiple_of(sums::MAP_UNITS) {
                self.check_map(&state, unit / sums::MAP_UNITS)?;
            }
            if state.has(unit) || state.rest == sums::Rest::Unknown {
                self.check_unit(&state, unit, &mut looked)?;
            }
            unit += 1;
        }
        looked.next = (unit < units).then_some(unit);
        Ok(looked)
    }

    fn check_unit(
        &self,
        state: &super::volume::State,
        unit: u64,
        looked: &mut Looked,
    ) -> io::Result<()> {
        let first = unit * UNIT_BLOCKS;
        let sector = sums::unit_sector(unit) * SECTOR as u64;
        self.sums.drop_cached(sector, SECTOR as u64);
        let Some(sums) = self.unit(state, unit)? else {
            looked.find(first, UNIT_BLOCKS, self.damaged(unit));
            return Ok(());
        };
        let at = first * BLOCK_BYTES;
        self.data.drop_cached(at, UNIT_BLOCKS * BLOCK_BYTES);
        let mut content = vec![0; BLOCK_BYTES as usize];
        for (block, sum) in (first..).zip(sums) {
            match sum {
                SUM_ZEROS => continue,
                SUM_UNREADABLE => {
                    let name = self.data_path().display();
                    looked.find(block, 1, format!("{name}, block {block} is unknown"));
                    continue;
                }
                _ => {}
            }
            looked.bytes += BLOCK_BYTES;
            let read = self.data.read_exact_at(&mut content, block * BLOCK_BYTES);
            let what = match read.map(|()| unknown_by(&content, sum)) {
                Ok(Some(Unknown::NONE)) => continue,
                Ok(Some(_)) => "some of its sectors are unknown",
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
                _ => "the content does not match its checksum",
            };
            let (name, at) = (self.data_path().display(), block * BLOCK_BYTES);
            looked.find(block, 1, format!("{name}, block {block} at byte {at}: {what}"));
        }
        self.data.drop_cached(at, UNIT_BLOCKS * BLOCK_BYTES);
        Ok(())
    }

    /// Writes the header again if it is damaged. A fold that is under way writes it in any case.
    fn check_header(&self) -> io::Result<()> {
        let state = self.state_mut();
        let mut sector = [0; SECTOR];
        self.sums.drop_cached(0, SECTOR as u64);
        self.sums.read_up_to(&mut sector, 0)?;
        if state.changed || Header::decode(&sector).is_ok() {
            return Ok(());
        }
        let Seal { group, volume } = self.seal;
        let header = Header { group, volume, generation: state.row.generation, rest: state.rest };
        self.sums.write_all_at(&header.encode(), 0)?;
        self.sums.sync_data()?;
        tracing::warn!(
            "{}: its header was damaged, and is written again",
            self.sums_path().display()
        );
        Ok(())
    }

    /// Writes a map again if it is damaged on the disk and known in memory.
    fn check_map(&self, state: &super::volume::State, stretch: u64) -> io::Result<()> {
        let number = sums::map_sector(stretch);
        let mut sector = [0; SECTOR];
        self.sums.drop_cached(number * SECTOR as u64, SECTOR as u64);
        self.sums.read_up_to(&mut sector, number * SECTOR as u64)?;
        let Some(map) = state.maps.get(stretch as usize) else { return Ok(()) };
        // One that was damaged when it was opened names every unit.
        let known = map.iter().any(|byte| *byte != u8::MAX);
        let pending = state.unwritten.contains(&(stretch as usize));
        if !known || pending || self.seal.open(&sector, number).is_some() {
            return Ok(());
        }
        self.sums.write_all_at(&self.seal.seal(map, number), number * SECTOR as u64)?;
        self.sums.sync_data()?;
        let path = self.sums_path().display();
        tracing::warn!("{path}: map {stretch} was damaged, and is written again");
        Ok(())
    }
}

impl Looked {
    fn find(&mut self, first: u64, blocks: u64, text: String) {
        match self.bad.last_mut() {
            Some(bad) if bad.first + bad.blocks == first => bad.blocks += blocks,
            _ => self.bad.push(BadBlocks { first, blocks, text }),
        }
    }
}
