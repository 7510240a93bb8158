//! Buffers for requests that do not go through the ring: reads, and writes without a record.

use std::sync::Arc;

use crate::kernel::memfd::{Region, RegionError};

/// The classes of buffers: bytes of one, and how many.
const CLASSES: [(u64, usize); 3] = [(4 << 10, 1024), (64 << 10, 96), (1 << 20, 10)];

/// A buffer on loan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Buffer {
    /// Its first byte in the pool's region.
    pub offset: u64,
    class: usize,
}

/// A fixed pool of buffers of three sizes in one region.
pub struct Pool {
    region: Arc<Region>,
    free: [Vec<u64>; CLASSES.len()],
}

impl Pool {
    /// All buffers free.
    ///
    /// # Errors
    /// The kernel refuses the memory.
    pub fn new() -> Result<Pool, RegionError> {
        let bytes = CLASSES.iter().map(|(bytes, count)| bytes * *count as u64).sum();
        let region = Arc::new(Region::anonymous(bytes)?);
        let mut at = 0;
        let free = CLASSES.map(|(bytes, count)| {
            let offsets = (0..count as u64).map(|index| at + index * bytes).collect();
            at += bytes * count as u64;
            offsets
        });
        Ok(Pool { region, free })
    }

    /// The memory behind the buffers.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// The most bytes a buffer can have.
    pub const fn bytes_max() -> u64 {
        CLASSES[CLASSES.len() - 1].0
    }

    /// A buffer of at least so many bytes; none if those large enough are all on loan.
    pub fn take(&mut self, bytes: u64) -> Option<Buffer> {
        (0..CLASSES.len())
            .filter(|class| CLASSES[*class].0 >= bytes)
            .find_map(|class| Some(Buffer { offset: self.free[class].pop()?, class }))
    }

    /// Ends a loan.
    pub fn give(&mut self, buffer: Buffer) {
        self.free[buffer.class].push(buffer.offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_never_overlap_and_all_come_back() {
        let mut pool = Pool::new().unwrap();
        let mut taken = Vec::new();
        for bytes in [1, 4096, 4097, 65536, 65537, 1 << 20].into_iter().cycle() {
            match pool.take(bytes) {
                Some(buffer) => taken.push(buffer),
                None => break,
            }
        }
        let mut ranges: Vec<(u64, u64)> =
            taken.iter().map(|b| (b.offset, b.offset + CLASSES[b.class].0)).collect();
        ranges.sort();
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        assert!(ranges.last().unwrap().1 <= pool.region().len());
        assert_eq!(pool.take((1 << 20) + 1), None);
        taken.drain(..).for_each(|buffer| pool.give(buffer));
        let counts = pool.free.each_ref().map(Vec::len);
        assert_eq!(counts, CLASSES.map(|(_, count)| count));
    }
}
