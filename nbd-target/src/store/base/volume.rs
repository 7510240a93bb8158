//! One volume's files: their making, opening, reading and changing.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use tidemark_journal::SECTOR_BYTES;

use super::{
    BLOCK_BYTES, BLOCK_SECTORS, BaseRow, Stretch,
    apply::NewContent,
    sum::{SUM_UNREADABLE, SUM_ZEROS, Sums, Unknown, sum_of, unknown_by},
    sums::{self, CONTENT, Header, MAP_UNITS, Rest, SECTOR, Seal, UNIT_BLOCKS},
};
use crate::{
    machine::{File, How, Machine},
    store::{Damage, ReadError, Where},
};

/// The most units that one look at the allocation reads.
const LOOK_UNITS_MAX: u64 = 1024;

/// One volume's files.
pub struct BaseVolume {
    data_path: PathBuf,
    sums_path: PathBuf,
    pub(super) seal: Seal,
    pub(super) data: File,
    pub(super) sums: File,
    /// Held for writing while blocks and their sums change together.
    state: RwLock<State>,
}

pub(super) struct State {
    pub(super) rest: Rest,
    /// The maps, a bit for each unit that has been written.
    pub(super) maps: Vec<[u8; CONTENT]>,
    /// Maps that the file does not have yet.
    pub(super) unwritten: BTreeSet<usize>,
    /// Blocks that the files have room for.
    pub(super) blocks: u64,
    /// What the catalogue has.
    pub(super) row: BaseRow,
    /// It has changed since.
    pub(super) changed: bool,
}

/// The sums of a unit's blocks.
pub(super) type Unit = [u64; UNIT_BLOCKS as usize];

impl BaseVolume {
    /// Opens the files that the catalogue knows of. Also says what is damaged of them, a sentence
    /// each.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] when they are missing or not the ones that the catalogue means.
    pub fn open(
        machine: &Machine,
        dir: &Path,
        seal: Seal,
        row: BaseRow,
    ) -> Result<(BaseVolume, Vec<String>), ReadError> {
        let [data_path, sums_path] = paths(dir, seal);
        let (data, sums) = (open(machine, &data_path)?, open(machine, &sums_path)?);
        let lost =
            |why: String| ReadError::Damaged(format!("{}: {why}", sums_path.display()).into());
        let io = |error| ReadError::io(sums_path.display().to_string(), error);
        let mut sector = [0; SECTOR];
        sums.read_up_to(&mut sector, 0).map_err(io)?;
        let header = Header::decode(&sector).map_err(lost)?;
        if (header.group, header.volume) != (seal.group, seal.volume) {
            return Err(lost(format!(
                "it belongs to volume {} of the group {}",
                header.volume, header.group
            )));
        }
        // A fold that was cut short has written the next generation, and is done again.
        if header.generation != row.generation && header.generation != row.generation + 1 {
            return Err(lost(format!(
                "it is another copy, of generation {}; generation {} belongs here",
                header.generation, row.generation
            )));
        }
        let mut damage = Vec::new();
        for (path, file, bytes) in [
            (&data_path, &data, row.blocks * BLOCK_BYTES),
            (&sums_path, &sums, sums::file_bytes(row.blocks)),
        ] {
            let have = file.length().map_err(io)?;
            if have < bytes {
                let path = path.display();
                damage.push(format!("{path} is cut short: it has {have} of {bytes} bytes"));
            }
        }
        let mut maps = Vec::new();
        for stretch in 0..sums::stretches(row.blocks) {
            let number = sums::map_sector(stretch);
            sums.read_up_to(&mut sector, number * SECTOR as u64).map_err(io)?;
            maps.push(seal.open(&sector, number).unwrap_or_else(|| {
                if damage.len() < super::DAMAGE_NAMED_MAX {
                    damage.push(format!("{}, map {stretch} is damaged", sums_path.display()));
                }
                // Each unit then has to prove itself.
                [u8::MAX; CONTENT]
            }));
        }
        let state = State {
            rest: header.rest,
            maps,
            unwritten: BTreeSet::new(),
            blocks: row.blocks,
            row,
            changed: false,
        };
        if state.rest == Rest::Unknown && !state.is_full() {
            let path = data_path.display();
            damage.push(format!("{path}: parts are unknown, since an earlier copy was lost"));
        }
        let state = RwLock::new(state);
        Ok((BaseVolume { data_path, sums_path, seal, data, sums, state }, damage))
    }

    /// Makes the files anew, with room for the blocks that the catalogue knows of; what is there
    /// instead is kept as `*.damaged`. They are there durably when this returns, whole or not at
    /// all.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn create(
        machine: &Machine,
        dir: &Path,
        seal: Seal,
        row: BaseRow,
        rest: Rest,
    ) -> io::Result<BaseVolume> {
        let paths = paths(dir, seal);
        let new = paths.each_ref().map(|path| path.with_added_extension("new"));
        let make = |path| machine.open(path, How::Truncate);
        let [data_path, sums_path] = &new;
        let (data, sums) = (make(data_path)?, make(sums_path)?);
        data.set_len(row.blocks * BLOCK_BYTES)?;
        sums.set_len(sums::file_bytes(row.blocks))?;
        let stretches = sums::stretches(row.blocks);
        let empty = [0; CONTENT];
        for number in (0..stretches).map(sums::map_sector) {
            sums.write_all_at(&seal.seal(&empty, number), number * SECTOR as u64)?;
        }
        let Seal { group, volume } = seal;
        let header = Header { group, volume, generation: row.generation + 1, rest };
        sums.write_all_at(&header.encode(), 0)?;
        data.sync_all()?;
        sums.sync_all()?;
        for (path, new) in paths.iter().zip(&new) {
            if rest == Rest::Unknown && machine.exists(path) {
                machine.rename(path, &path.with_added_extension("damaged"))?;
            }
            machine.rename(new, path)?;
        }
        machine.sync_dir(dir)?;
        let state = State {
            rest,
            maps: vec![empty; stretches as usize],
            unwritten: BTreeSet::new(),
            blocks: row.blocks,
            row,
            changed: true,
        };
        let [data_path, sums_path] = paths;
        Ok(BaseVolume { data_path, sums_path, seal, data, sums, state: RwLock::new(state) })
    }

    /// Reads sectors `start..end` into `out`, which comes zeroed, checking every block it touches.
    ///
    /// # Errors
    /// When a block cannot be read, does not match its sum, or is unknown.
    pub fn read(&self, start: u64, end: u64, out: &mut [u8]) -> Result<(), ReadError> {
        let (first, last) = (start / BLOCK_SECTORS, end.div_ceil(BLOCK_SECTORS));
        let state = self.state();
        let mut block = vec![0; BLOCK_BYTES as usize];
        for unit in first / UNIT_BLOCKS..last.div_ceil(UNIT_BLOCKS) {
            let sums = self.sums(&state, unit)?;
            for (number, sum) in (unit * UNIT_BLOCKS..).zip(sums) {
                if sum == SUM_ZEROS || !(first..last).contains(&number) {
                    continue;
                }
                let from = (number * BLOCK_SECTORS).max(start);
                let to = ((number + 1) * BLOCK_SECTORS).min(end);
                let begin = number * BLOCK_SECTORS;
                let unknown = self.content(number, sum, &mut block)?;
                if let Some(unknown) = unknown.first_in(from - begin..to - begin) {
                    let (start, end) = (begin + unknown.start, begin + unknown.end);
                    return Err(ReadError::Unreadable { start, end });
                }
                let at = ((from - start) * SECTOR_BYTES) as usize;
                let skip = ((from - begin) * SECTOR_BYTES) as usize;
                let bytes = ((to - from) * SECTOR_BYTES) as usize;
                out[at..at + bytes].copy_from_slice(&block[skip..skip + bytes]);
            }
        }
        Ok(())
    }

    /// Reads one block into `out`, which comes zeroed, and says which of its sectors are unknown.
    ///
    /// # Errors
    /// When it cannot be read, or does not match its sum.
    pub fn block(&self, number: u64, out: &mut [u8]) -> Result<Unknown, ReadError> {
        let state = self.state();
        let sums = self.sums(&state, number / UNIT_BLOCKS)?;
        match sums[(number % UNIT_BLOCKS) as usize] {
            SUM_ZEROS => Ok(Unknown::NONE),
            sum => self.content(number, sum, out),
        }
    }

    /// Reads a block's content by its sum, which is not that of zeros, and says which of its sectors
    /// are unknown.
    pub(super) fn content(
        &self,
        number: u64,
        sum: u64,
        out: &mut [u8],
    ) -> Result<Unknown, ReadError> {
        if sum == SUM_UNREADABLE {
            return Ok(Unknown::ALL);
        }
        let name = || self.data_path.display().to_string();
        let at = number * BLOCK_BYTES;
        self.data.read_exact_at(out, at).map_err(|error| ReadError::io(name(), error))?;
        unknown_by(out, sum).ok_or_else(|| {
            let what = "the content does not match its checksum";
            let text = format!("{}, block {number} at byte {at}: {what}", name());
            ReadError::Damaged(Damage::at(self.place(number, 1), text))
        })
    }

    /// The stretches of `start..end` by allocation; the list may end early, never empty.
    ///
    /// # Errors
    /// When the sums cannot be read or are damaged.
    pub fn stretches(&self, start: u64, end: u64) -> Result<Vec<Stretch>, ReadError> {
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut push = |start: u64, end: u64, zeros| match stretches.last_mut() {
            Some(last) if last.zeros == zeros => last.end = end,
            _ => stretches.push(Stretch { start, end, zeros }),
        };
        let state = self.state();
        let mut looked = 0;
        let mut at = start;
        while at < end && looked < LOOK_UNITS_MAX {
            let unit = at / BLOCK_SECTORS / UNIT_BLOCKS;
            let unit_end = ((unit + 1) * UNIT_BLOCKS * BLOCK_SECTORS).min(end);
            if !state.has(unit) {
                push(at, unit_end, state.rest == Rest::Zeros);
                at = unit_end;
                continue;
            }
            looked += 1;
            for (block, sum) in (unit * UNIT_BLOCKS..).zip(self.sums(&state, unit)?) {
                let stop = ((block + 1) * BLOCK_SECTORS).min(unit_end);
                if at < stop {
                    push(at, stop, sum == SUM_ZEROS);
                    at = stop;
                }
            }
        }
        Ok(stretches)
    }

    /// Gives blocks from `first` on new content; durable after [`finish`](Self::finish). Sums that
    /// are found to be damaged are unknown from then on, and named in `damage`.
    ///
    /// # Errors
    /// When the files cannot be read or written.
    pub fn apply(
        &self,
        first: u64,
        content: &NewContent,
        damage: &mut Vec<String>,
    ) -> io::Result<()> {
        let mut state = self.state_mut();
        state.changed = true;
        self.reach(&mut state, first + content.blocks())?;
        match content {
            NewContent::Data(bytes) => {
                let blocks = bytes.chunks(BLOCK_BYTES as usize);
                let new: Vec<u64> = blocks.map(|block| sum_of(block, Unknown::NONE)).collect();
                self.data.write_all_at(bytes, first * BLOCK_BYTES)?;
                self.set_sums(&mut state, first, &Sums::Each(&new), damage)
            }
            NewContent::Parts(bytes, unknown) => {
                self.data.write_all_at(bytes, first * BLOCK_BYTES)?;
                self.set_sums(&mut state, first, &Sums::All(sum_of(bytes, *unknown), 1), damage)
            }
            NewContent::Zeros(blocks) => {
                // Sums first: a block without one is not looked at.
                self.set_sums(&mut state, first, &Sums::All(SUM_ZEROS, *blocks), damage)?;
                self.data.punch(first * BLOCK_BYTES, blocks * BLOCK_BYTES)
            }
            NewContent::Unreadable(blocks) => {
                self.set_sums(&mut state, first, &Sums::All(SUM_UNREADABLE, *blocks), damage)
            }
        }
    }

    /// Makes blocks and sums durable, without the maps that make new units count.
    ///
    /// # Errors
    /// When a file cannot be synced.
    pub fn sync_content(&self) -> io::Result<()> {
        self.data.sync_data()?;
        self.sums.sync_data()
    }

    /// Makes all changes durable and gives what the catalogue is to know of it; nothing if it has
    /// not changed. One caller at a time, which changes nothing meanwhile.
    ///
    /// # Errors
    /// When a file cannot be written or synced.
    pub fn finish(&self) -> io::Result<Option<BaseRow>> {
        if !self.state().changed {
            return Ok(None);
        }
        self.sync_content()?;
        let row = {
            let state = self.state();
            for stretch in &state.unwritten {
                let number = sums::map_sector(*stretch as u64);
                let sector = self.seal.seal(&state.maps[*stretch], number);
                self.sums.write_all_at(&sector, number * SECTOR as u64)?;
            }
            let Seal { group, volume } = self.seal;
            let generation = state.row.generation + 1;
            let header = Header { group, volume, generation, rest: state.rest };
            self.sums.write_all_at(&header.encode(), 0)?;
            BaseRow { generation, blocks: state.blocks }
        };
        self.sums.sync_data()?;
        self.state_mut().unwritten.clear();
        Ok(Some(row))
    }

    /// The catalogue has taken in what [`finish`](Self::finish) gave.
    pub fn committed(&self, row: BaseRow) {
        let mut state = self.state_mut();
        state.row = row;
        state.changed = false;
    }

    /// Makes room for so many blocks.
    fn reach(&self, state: &mut State, blocks: u64) -> io::Result<()> {
        if blocks <= state.blocks {
            return Ok(());
        }
        let sizes = [blocks * BLOCK_BYTES, sums::file_bytes(blocks)];
        for (file, bytes) in [&self.data, &self.sums].into_iter().zip(sizes) {
            if file.length()? < bytes {
                file.set_len(bytes)?;
            }
        }
        let (before, after) = (state.maps.len(), sums::stretches(blocks) as usize);
        state.maps.resize(after, [0; CONTENT]);
        state.unwritten.extend(before..after);
        state.blocks = blocks;
        Ok(())
    }

    fn set_sums(
        &self,
        state: &mut State,
        first: u64,
        new: &Sums<'_>,
        damage: &mut Vec<String>,
    ) -> io::Result<()> {
        let last = first + new.blocks();
        for unit in first / UNIT_BLOCKS..last.div_ceil(UNIT_BLOCKS) {
            let begin = unit * UNIT_BLOCKS;
            if !state.has(unit) && new.are_zeros() && state.rest == Rest::Zeros {
                continue;
            }
            let mut sums = self.unit(state, unit)?.unwrap_or_else(|| {
                if begin < first || last < begin + UNIT_BLOCKS {
                    damage.push(self.damaged(unit));
                }
                [SUM_UNREADABLE; UNIT_BLOCKS as usize]
            });
            for (block, sum) in (begin..).zip(&mut sums) {
                if (first..last).contains(&block) {
                    *sum = new.of(block - first);
                }
            }
            let mut content = [0; CONTENT];
            for (bytes, sum) in content.chunks_exact_mut(8).zip(sums) {
                bytes.copy_from_slice(&sum.to_le_bytes());
            }
            let number = sums::unit_sector(unit);
            self.sums.write_all_at(&self.seal.seal(&content, number), number * SECTOR as u64)?;
            state.insert(unit);
        }
        Ok(())
    }

    /// The sums of a unit's blocks.
    fn sums(&self, state: &State, unit: u64) -> Result<Unit, ReadError> {
        let io = |error| ReadError::io(self.sums_path.display().to_string(), error);
        let found = self.unit(state, unit).map_err(io)?;
        found.ok_or_else(|| {
            let place = self.place(unit * UNIT_BLOCKS, UNIT_BLOCKS);
            ReadError::Damaged(Damage::at(place, self.damaged(unit)))
        })
    }

    /// The sums of a unit's blocks; none when they are damaged.
    pub(super) fn unit(&self, state: &State, unit: u64) -> io::Result<Option<Unit>> {
        if !state.has(unit) {
            return Ok(Some([state.rest.sum(); UNIT_BLOCKS as usize]));
        }
        let number = sums::unit_sector(unit);
        let mut sector = [0; SECTOR];
        self.sums.read_up_to(&mut sector, number * SECTOR as u64)?;
        Ok(self.seal.open(&sector, number).map(|content| {
            let mut sums = [0; UNIT_BLOCKS as usize];
            for (sum, bytes) in sums.iter_mut().zip(content.chunks_exact(8)) {
                *sum = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            }
            sums
        }))
    }

    pub(super) fn place(&self, first: u64, blocks: u64) -> Where {
        Where::Base { volume: self.seal.volume, first, blocks }
    }

    pub(super) fn data_path(&self) -> &Path {
        &self.data_path
    }

    pub(super) fn sums_path(&self) -> &Path {
        &self.sums_path
    }

    pub(super) fn damaged(&self, unit: u64) -> String {
        format!(
            "{}: the sums of blocks {}..{} are damaged",
            self.sums_path.display(),
            unit * UNIT_BLOCKS,
            (unit + 1) * UNIT_BLOCKS
        )
    }

    pub(super) fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether a unit has been written.
    pub(super) fn has(&self, unit: u64) -> bool {
        let (stretch, byte, bit) = bit(unit);
        self.maps.get(stretch).is_some_and(|map| map[byte] & bit != 0)
    }

    fn insert(&mut self, unit: u64) {
        let (stretch, byte, bit) = bit(unit);
        if let Some(map) = self.maps.get_mut(stretch)
            && map[byte] & bit == 0
        {
            map[byte] |= bit;
            self.unwritten.insert(stretch);
        }
    }

    /// Whether all units have been written.
    fn is_full(&self) -> bool {
        (0..self.blocks.div_ceil(UNIT_BLOCKS)).all(|unit| self.has(unit))
    }
}

/// Where a unit's bit is: in which map, byte, and which bit of it.
fn bit(unit: u64) -> (usize, usize, u8) {
    let place = unit % MAP_UNITS;
    ((unit / MAP_UNITS) as usize, (place / 8) as usize, 1 << (place % 8))
}

impl Rest {
    fn sum(self) -> u64 {
        match self {
            Rest::Zeros => SUM_ZEROS,
            Rest::Unknown => SUM_UNREADABLE,
        }
    }
}

fn paths(dir: &Path, seal: Seal) -> [PathBuf; 2] {
    ["data", "sums"].map(|suffix| dir.join(format!("{:05}.{suffix}", seal.volume.0)))
}

fn open(machine: &Machine, path: &Path) -> Result<File, ReadError> {
    machine.open(path, How::Write).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            ReadError::Damaged(format!("{} is missing", path.display()).into())
        }
        _ => ReadError::io(path.display().to_string(), error),
    })
}
