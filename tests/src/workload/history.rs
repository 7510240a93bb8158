//! The content of disks after any number of operations of one order.

use super::content::{SECTOR_BYTES, fill};
use super::order::Part;
use super::{Action, Operation};

/// What the disks hold after each step of an order. All was zero before the first step.
pub struct History {
    disks: Vec<Vec<Versions>>,
    steps: usize,
}

/// A sector's contents over time: since the given step (from 1), that of a write, by number, or zeroes.
type Versions = Vec<(u32, Option<u32>)>;

impl History {
    /// Applies the operations whose numbers `order` gives, whole and in that order, to disks of these sizes.
    /// An operation outside its disk, or a number outside the list, is a mistake of the caller and panics.
    pub fn new(sizes_bytes: &[u64], operations: &[Operation], order: &[usize]) -> History {
        let whole = |number: &usize| Part { number: *number, action: operations[*number].action };
        let parts: Vec<Part> = order.iter().map(whole).collect();
        History::of_parts(sizes_bytes, operations, &parts)
    }

    /// Like [`History::new`], for operations that a journal may hold in parts: each is a step of its own.
    pub fn of_parts(sizes_bytes: &[u64], operations: &[Operation], parts: &[Part]) -> History {
        let sectors =
            |bytes: u64| usize::try_from(bytes / SECTOR_BYTES).expect("a disk fits memory");
        let mut disks: Vec<Vec<Versions>> =
            sizes_bytes.iter().map(|size| vec![Versions::new(); sectors(*size)]).collect();
        for (step, part) in (1u32..).zip(parts) {
            let Some((offset_bytes, length_bytes)) = part.action.range() else { continue };
            let written = matches!(part.action, Action::Write { .. })
                .then(|| u32::try_from(part.number).expect("fewer than 2^32 operations"));
            let range = sectors(offset_bytes)..sectors(offset_bytes + length_bytes);
            for versions in &mut disks[operations[part.number].disk][range] {
                versions.push((step, written));
            }
        }
        History { disks, steps: parts.len() }
    }

    /// How many steps there are. After step 0 all is zero.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Writes into `bytes` what the disk holds from `offset_bytes` on after `step` steps. Offset and length
    /// are whole sectors within the disk.
    pub fn read(&self, disk: usize, step: usize, offset_bytes: u64, bytes: &mut [u8]) {
        let sectors = offset_bytes / SECTOR_BYTES..;
        for (sector, bytes) in sectors.zip(bytes.chunks_mut(SECTOR_BYTES as usize)) {
            match self.version(disk, step, sector) {
                Some(number) => fill(number, sector * SECTOR_BYTES, bytes),
                None => bytes.fill(0),
            }
        }
    }

    /// The first byte at which `bytes`, read from `offset_bytes` of a disk, differ from what it holds after
    /// `step` steps, and what is known about it, in words.
    pub fn difference(
        &self,
        disk: usize,
        step: usize,
        offset_bytes: u64,
        bytes: &[u8],
    ) -> Option<String> {
        let mut expected = [0; SECTOR_BYTES as usize];
        let sectors = offset_bytes / SECTOR_BYTES..;
        for (sector, bytes) in sectors.zip(bytes.chunks(SECTOR_BYTES as usize)) {
            let expected = &mut expected[..bytes.len()];
            self.read(disk, step, sector * SECTOR_BYTES, expected);
            if bytes != expected {
                let found = super::content::number(bytes);
                let wanted = self.version(disk, step, sector);
                return Some(format!(
                    "disk {disk} sector {sector} after step {step}: it is of write {found:?}, not of {wanted:?}; \
                     its versions (step, write) are {:?}",
                    self.versions(disk, sector)
                ));
            }
        }
        None
    }

    /// The number of the write that a sector's content is of after `step` steps; none for zeroes.
    pub fn version(&self, disk: usize, step: usize, sector: u64) -> Option<usize> {
        let versions = self.versions(disk, sector);
        let count = versions.partition_point(|(since, _)| *since as usize <= step);
        let (_, number) = versions.get(count.checked_sub(1)?)?;
        number.map(|number| number as usize)
    }

    fn versions(&self, disk: usize, sector: u64) -> &Versions {
        &self.disks[disk][usize::try_from(sector).expect("a sector within the disk")]
    }
}
