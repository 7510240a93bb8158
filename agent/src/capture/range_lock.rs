//! The range lock of a volume: overlapping writes run one after the other, first in, first out.
//!
//! A request takes all of its range or none of it. It is granted when no earlier request, held or
//! waiting, overlaps it; so nobody overtakes and nobody starves. The number of requests at once is
//! bounded by the fronts' queue depths (hundreds), so a scan of a dense list is the fastest form.

use tidemark_journal::Sector;

/// Names a request inside the lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct LockId(pub u32);

#[derive(Clone, Copy)]
struct Entry {
    start: u64,
    end: u64,
    id: LockId,
    /// Earlier overlapping requests that are still here.
    before: u32,
}

/// The requests of one volume, in their order of arrival.
#[derive(Default)]
pub struct RangeLock {
    entries: Vec<Entry>,
}

impl RangeLock {
    /// Asks for a range. True: it is held. False: it will be among those that a later
    /// [`release`](Self::release) grants.
    pub fn acquire(&mut self, id: LockId, start: Sector, sectors: u64) -> bool {
        let (start, end) = (start.0, start.0 + sectors);
        let before = self.overlapping(start, end).count() as u32;
        self.entries.push(Entry { start, end, id, before });
        before == 0
    }

    /// Gives a held range back and pushes those granted thereby, in their order, to `granted`.
    ///
    /// # Panics
    /// When `id` does not hold its range.
    pub fn release(&mut self, id: LockId, granted: &mut Vec<LockId>) {
        let at = self.entries.iter().position(|entry| entry.id == id);
        let entry = self.entries.remove(at.expect("a range that was never taken"));
        assert_eq!(entry.before, 0, "a range that was not held");
        // Whoever overlaps a held range and is still here came after it.
        for other in &mut self.entries {
            if other.start < entry.end && entry.start < other.end {
                other.before -= 1;
                if other.before == 0 {
                    granted.push(other.id);
                }
            }
        }
    }

    /// Whether a request, held or waiting, overlaps the range.
    pub fn is_busy(&self, start: Sector, sectors: u64) -> bool {
        self.overlapping(start.0, start.0 + sectors).next().is_some()
    }

    /// Whether nobody holds or waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| start < entry.end && entry.start < end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nobody_overtakes() {
        let mut lock = RangeLock::default();
        assert!(lock.acquire(LockId(1), Sector(0), 8));
        assert!(!lock.acquire(LockId(2), Sector(4), 8), "overlaps 1");
        assert!(!lock.acquire(LockId(3), Sector(8), 8), "overlaps only 2, which waits");
        assert!(lock.acquire(LockId(4), Sector(16), 8));
        let mut granted = Vec::new();
        lock.release(LockId(1), &mut granted);
        assert_eq!(granted, [LockId(2)]);
        lock.release(LockId(2), &mut granted);
        assert_eq!(granted, [LockId(2), LockId(3)]);
        assert!(lock.is_busy(Sector(15), 1) && !lock.is_busy(Sector(24), 100));
    }

    proptest! {
        /// Against the plain rule: held ranges never overlap, each request is granted once, and of
        /// two that overlap the first to come is the first to be granted.
        #[test]
        fn grants_follow_the_rule(ranges in prop::collection::vec((0u64..64, 1u64..16), 1..80),
                                  picks in prop::collection::vec(any::<prop::sample::Index>(), 200)) {
            let mut lock = RangeLock::default();
            let (mut held, mut order) = (Vec::<usize>::new(), Vec::<usize>::new());
            let mut next = 0;
            for pick in picks {
                let mut granted = Vec::new();
                if pick.index(3) < 2 && next < ranges.len() {
                    let (start, sectors) = ranges[next];
                    if lock.acquire(LockId(next as u32), Sector(start), sectors) {
                        granted.push(LockId(next as u32));
                    }
                    next += 1;
                } else if !held.is_empty() {
                    let done = held.remove(pick.index(held.len()));
                    lock.release(LockId(done as u32), &mut granted);
                }
                for id in granted {
                    let (start, sectors) = ranges[id.0 as usize];
                    for other in &held {
                        let (s, n) = ranges[*other];
                        prop_assert!(start >= s + n || s >= start + sectors, "both held");
                    }
                    for later in &order {
                        let (s, n) = ranges[*later];
                        prop_assert!(*later < id.0 as usize || start >= s + n || s >= start + sectors);
                    }
                    held.push(id.0 as usize);
                    order.push(id.0 as usize);
                }
            }
            while !held.is_empty() {
                let mut granted = Vec::new();
                lock.release(LockId(held.remove(0) as u32), &mut granted);
                held.extend(granted.iter().map(|id| id.0 as usize));
                order.extend(granted.iter().map(|id| id.0 as usize));
            }
            prop_assert!(lock.is_empty());
            order.sort();
            prop_assert_eq!(order, (0..next).collect::<Vec<_>>());
        }
    }
}
