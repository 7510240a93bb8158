//! First sync, catch-up and verify: content read off the disk, put in order without blocking writes.
//!
//! A range is read while no write to it is in flight. If none was admitted by the time the content
//! is at hand, a sequence is drawn and the content recorded: so the record says what the disk held
//! at exactly that sequence. Otherwise the read is lost and repeated, and after some that were lost,
//! or when the range is never found without a write under way, the range is locked for it. While a
//! range is waited for, others are read.
//! Against a target that has content already, a region is *offered* by its hashes first and only
//! the blocks that the target asks for are read afresh and sent.
//!
//! The regions to catch up are the dirty map's uncaptured ones. A gap ends when none of its volume
//! is left; a verify is the same walk over all regions, without a gap.

mod repair;

use std::collections::{BTreeMap, VecDeque};

use tidemark_journal::{
    Kind, Sector, Seq, VolumeId,
    record::{OFFER_BLOCK_BYTES, flag},
};

use super::{
    Effect, LocalIo, OpId,
    core::{Core, Op},
    range_lock::LockId,
};
use crate::dirty::{REGION_SECTORS, RegionId, regions_in};

/// Reads under way at once.
pub const READS_MAX: usize = 4;
/// Offers that may wait for an answer.
const OFFERS_MAX: usize = 256;
/// Reads of a range that are lost to a write before the range is locked for one.
const LOST_READS_MAX: u32 = 4;
/// How long a range is waited for that is never found free, before it is locked: as long as many
/// reads take, for whoever writes there then has to wait for one.
const BUSY_NS_MAX: u64 = 100_000_000;
/// Parts waiting to be read from which on no further region is begun.
const WAITING_MAX: usize = 64;
/// The ring's fill, in thousandths, above which catch-up leaves the room to the application.
const YIELD_ABOVE_PERMILLE: u64 = 300;
/// Ranges of a volume that are remembered as unreadable.
const UNREADABLE_KEPT_MAX: usize = 4096;
/// Sectors in the smallest range that is declared unreadable.
const UNREADABLE_SECTORS: u64 = 8;
const OFFER_SECTORS: u64 = OFFER_BLOCK_BYTES / 512;

/// How content reaches the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Hashes first: the target has content.
    Offer,
    /// All of it: the target has none.
    Send,
}

/// Content read for an [`LocalIo::Read`].
#[derive(Clone, Copy, Debug)]
pub struct ReadBack<'a> {
    /// The bytes of the range; they may be left out if all are zero.
    pub data: &'a [u8],
    /// Whether all of them are zero.
    pub zeros: bool,
    /// The hash of each block of 4 KiB, if they were asked for.
    pub hashes: &'a [u8],
}

#[derive(Clone, Copy, Debug)]
struct Part {
    volume: usize,
    start: Sector,
    sectors: u64,
    offer: bool,
    /// Reads that were of no use, since a write came in meanwhile.
    lost_reads: u32,
    /// Since when every look has found a write under way, in journal time.
    busy_since_ns: Option<u64>,
    /// The region whose work waits for it.
    region: RegionId,
    /// The link under which that work was begun; over the next one it is begun again.
    link: u32,
}

pub(super) struct ReadOp {
    part: Part,
    holds_lock: bool,
}

struct Reading {
    op: OpId,
    volume: usize,
    start: u64,
    end: u64,
    tainted: bool,
}

#[derive(Default)]
struct Work {
    /// Parts and offers that are not through.
    left: u32,
    /// A write without a record came in meanwhile.
    redo: bool,
    verify: bool,
}

struct Verify {
    next: u32,
    regions: u32,
    again: Vec<u32>,
    /// The target lacked something.
    differs: bool,
}

/// The state of catch-up for all volumes of a group.
pub struct CatchUp {
    mode: Option<Mode>,
    /// Counts [`Core::link`].
    link: u32,
    /// What may still be read; below zero, what was read ahead of it.
    budget_bytes: i64,
    /// Enough waits for the link already.
    held: bool,
    cursors: Vec<u32>,
    verify: Vec<Option<Verify>>,
    parts: VecDeque<Part>,
    reading: Vec<Reading>,
    /// Reads under way and those that wait for their range.
    reads: usize,
    working: BTreeMap<RegionId, Work>,
    offers: BTreeMap<Seq, Part>,
}

impl CatchUp {
    pub(super) fn new(volumes: usize) -> CatchUp {
        CatchUp {
            mode: None,
            link: 0,
            budget_bytes: 0,
            held: false,
            cursors: vec![0; volumes],
            verify: (0..volumes).map(|_| None).collect(),
            parts: VecDeque::new(),
            reading: Vec::with_capacity(READS_MAX),
            reads: 0,
            working: BTreeMap::new(),
            offers: BTreeMap::new(),
        }
    }
}

impl CatchUp {
    /// Whether a verify under way has found that the target lacks something: what else it lacks is
    /// known at its end.
    pub(super) fn has_found_differences(&self) -> bool {
        self.verify.iter().flatten().any(|verify| verify.differs)
    }

    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }
}

impl Core {
    /// The link is up (and how content goes over it) or down. Offers without an answer are made
    /// again over the next one.
    pub fn link(&mut self, mode: Option<Mode>) {
        let state = &mut self.catch_up;
        state.mode = mode;
        state.link += 1;
        state.offers.clear();
        state.parts.clear();
        for (region, work) in std::mem::take(&mut state.working) {
            let index = self.volumes.iter().position(|volume| volume.id == region.volume);
            if work.verify
                && let Some(verify) = index.and_then(|index| state.verify[index].as_mut())
            {
                verify.again.push(region.index);
            }
        }
    }

    /// Lets catch-up and verify read so many bytes more. What is left over from before is dropped; what was read
    /// ahead of it, since a region is read as a whole, is made up for first.
    pub fn allow_catch_up(&mut self, bytes: u64) {
        let budget = &mut self.catch_up.budget_bytes;
        *budget = match i64::try_from(bytes) {
            Ok(bytes) => (*budget).min(0).saturating_add(bytes),
            Err(_) => i64::MAX,
        };
    }

    /// Begins to compare all of a volume with the target. What differs is sent.
    pub fn verify(&mut self, volume: VolumeId) {
        self.verify_from(volume, 0);
    }

    /// Goes on with a comparison of a volume that had reached this region.
    pub fn verify_from(&mut self, volume: VolumeId, region: u32) {
        let index = self.volume_index(volume);
        let regions = regions_in(self.volumes[index].sectors);
        let next = region.min(regions);
        let slot = &mut self.catch_up.verify[index];
        let differs = slot.as_ref().is_some_and(|before| before.differs);
        *slot = Some(Verify { next, regions, again: Vec::new(), differs });
    }

    /// The first region of a volume that its verify may not have compared. None if there is none.
    pub fn verify_reached(&self, volume: VolumeId) -> Option<u32> {
        let verify = self.catch_up.verify[self.volume_index(volume)].as_ref()?;
        let open = self.catch_up.working.iter().filter(|(r, w)| w.verify && r.volume == volume);
        let left = open.map(|(region, _)| region.index).chain(verify.again.iter().copied());
        left.chain([verify.next]).min()
    }

    /// How far a volume's verify is: regions compared and regions in all. None if there is none.
    pub fn verify_progress(&self, volume: VolumeId) -> Option<(u32, u32)> {
        let verify = self.catch_up.verify[self.volume_index(volume)].as_ref()?;
        let open = self.catch_up.working.iter().filter(|(r, w)| w.verify && r.volume == volume);
        let left = (open.count() + verify.again.len()) as u32;
        Some((verify.next.saturating_sub(left), verify.regions))
    }

    /// The target's answer to the offer at `seq`: the blocks of 4 KiB that it wants.
    pub fn needed(&mut self, seq: Seq, mut wants: impl FnMut(u64) -> bool) {
        let Some(part) = self.catch_up.offers.remove(&seq) else { return };
        let region = part.region;
        let blocks = part.sectors.div_ceil(OFFER_SECTORS);
        let mut runs: Vec<Part> = Vec::new();
        let mut differing = 0;
        for block in (0..blocks).filter(|block| wants(*block)) {
            differing += 1;
            let start = Sector(part.start.0 + block * OFFER_SECTORS);
            let end = (start.0 + OFFER_SECTORS).min(part.start.0 + part.sectors);
            match runs.last_mut() {
                Some(run) if run.start.0 + run.sectors == start.0 => {
                    run.sectors = end - run.start.0
                }
                _ => runs.push(Part {
                    start,
                    sectors: end - start.0,
                    offer: false,
                    lost_reads: 0,
                    busy_since_ns: None,
                    ..part
                }),
            }
        }
        let Some(work) = self.catch_up.working.get_mut(&region) else { return };
        if work.verify {
            self.counters.verify_differing_blocks += differing;
            if let Some(verify) = &mut self.catch_up.verify[part.volume] {
                verify.differs |= differing > 0;
            }
        }
        work.left += runs.len() as u32;
        self.catch_up.parts.extend(runs);
        self.work_through(region);
    }

    /// A write without a record is admitted: a catch-up under way there has to be done again.
    pub(super) fn redo_catch_up(&mut self, volume: usize, start: Sector, sectors: u64) {
        let id = self.volumes[volume].id;
        let last = RegionId::of(id, Sector(start.0 + sectors - 1)).index;
        for index in RegionId::of(id, start).index..=last {
            if let Some(work) = self.catch_up.working.get_mut(&RegionId { volume: id, index }) {
                work.redo = true;
            }
        }
    }

    /// A write takes its range: reads under way there are of no use any more.
    pub(super) fn taint(&mut self, volume: usize, start: Sector, sectors: u64) {
        let end = start.0 + sectors;
        for reading in &mut self.catch_up.reading {
            reading.tainted |=
                reading.volume == volume && reading.start < end && start.0 < reading.end;
        }
    }

    /// A failed write left unknown content behind: its regions are read back and sent.
    pub(super) fn reread(&mut self, volume: usize, start: Sector, sectors: u64) {
        let id = self.volumes[volume].id;
        let last = RegionId::of(id, Sector(start.0 + sectors - 1)).index;
        for index in RegionId::of(id, start).index..=last {
            self.map.mark_uncaptured(RegionId { volume: id, index });
        }
        self.redo_catch_up(volume, start, sectors);
    }

    /// A flush failed: what the disk was to keep of a volume may not be there, and a later flush that succeeds
    /// does not bring it back (invariant 7). What was written since the last good one is read back and sent.
    pub(super) fn reread_unflushed(&mut self, volume: usize) {
        let id = self.volumes[volume].id;
        self.map.flush_failed(id);
        for (_, work) in self.catch_up.working.iter_mut().filter(|(at, _)| at.volume == id) {
            work.redo = true;
        }
    }

    pub(super) fn poll_catch_up(&mut self) {
        if self.overflow {
            return;
        }
        while self.catch_up.reads < READS_MAX
            && self.catch_up.budget_bytes > 0
            && !self.catch_up.held
            && self.ring.fill_permille() < YIELD_ABOVE_PERMILLE
        {
            let Some((part, with_lock)) = self.next_part_to_read() else { break };
            self.begin_read(part, with_lock);
        }
        self.end_gaps();
    }

    /// The next part that may be read, and whether its range is to be locked. Those that have to
    /// wait let the others go first.
    fn next_part_to_read(&mut self) -> Option<(Part, bool)> {
        for _ in 0..self.catch_up.parts.len() {
            let part = self.catch_up.parts.pop_front()?;
            if let Some(ready) = self.ready_or_wait(part) {
                return Some(ready);
            }
        }
        while self.catch_up.parts.len() < WAITING_MAX {
            let part = self.begin_region()?;
            if let Some(ready) = self.ready_or_wait(part) {
                return Some(ready);
            }
        }
        None
    }

    fn ready_or_wait(&mut self, mut part: Part) -> Option<(Part, bool)> {
        let now_ns = self.now_ns;
        let busy = self.volumes[part.volume].lock.is_busy(part.start, part.sectors);
        part.busy_since_ns = busy.then(|| part.busy_since_ns.unwrap_or(now_ns));
        let with_lock = part.lost_reads >= LOST_READS_MAX
            || part.busy_since_ns.is_some_and(|since_ns| now_ns - since_ns >= BUSY_NS_MAX);
        if busy && !with_lock {
            self.catch_up.parts.push_back(part);
            return None;
        }
        Some((part, with_lock))
    }

    /// Begins work on a region that has none.
    fn begin_region(&mut self) -> Option<Part> {
        let mode = self.catch_up.mode?;
        if self.catch_up.offers.len() >= OFFERS_MAX {
            return None;
        }
        for volume in 0..self.volumes.len() {
            let (region, verify) = match self.next_uncaptured(volume) {
                Some(region) => (region, false),
                None => match self.next_to_verify(volume) {
                    Some(region) => (region, true),
                    None => continue,
                },
            };
            let start = region.start();
            let sectors = REGION_SECTORS.min(self.volumes[volume].sectors - start.0);
            self.catch_up.working.insert(region, Work { left: 1, redo: false, verify });
            return Some(Part {
                volume,
                start,
                sectors,
                offer: verify || mode == Mode::Offer,
                lost_reads: 0,
                busy_since_ns: None,
                region,
                link: self.catch_up.link,
            });
        }
        None
    }

    fn next_uncaptured(&mut self, volume: usize) -> Option<RegionId> {
        let id = self.volumes[volume].id;
        let bits = self.map.uncaptured(id);
        let from = self.catch_up.cursors[volume];
        let free = |index: &u32| {
            !self.catch_up.working.contains_key(&RegionId { volume: id, index: *index })
        };
        let after = |from: u32| {
            std::iter::successors(bits.next(from), |index| bits.next(index + 1)).find(free)
        };
        let index = after(from).or_else(|| after(0))?;
        self.catch_up.cursors[volume] = index + 1;
        Some(RegionId { volume: id, index })
    }

    fn next_to_verify(&mut self, volume: usize) -> Option<RegionId> {
        let id = self.volumes[volume].id;
        let CatchUp { verify, working, .. } = &mut self.catch_up;
        let state = verify[volume].as_mut()?;
        let is_free = |index: &u32| !working.contains_key(&RegionId { volume: id, index: *index });
        if let Some(at) = state.again.iter().position(is_free) {
            return Some(RegionId { volume: id, index: state.again.swap_remove(at) });
        }
        while state.next < state.regions {
            let index = state.next;
            state.next += 1;
            if is_free(&index) {
                return Some(RegionId { volume: id, index });
            }
            // It is being caught up: it is compared after that.
            state.again.push(index);
        }
        let under_way = |(region, work): (&RegionId, &Work)| region.volume == id && work.verify;
        if state.again.is_empty() && !working.iter().any(under_way) {
            verify[volume] = None;
        }
        None
    }

    fn begin_read(&mut self, part: Part, with_lock: bool) {
        self.catch_up.reads += 1;
        let op = self.ops.insert(Op::Read(ReadOp { part, holds_lock: with_lock }));
        if !with_lock {
            return self.submit_read(OpId(op));
        }
        if self.volumes[part.volume].lock.acquire(LockId(op), part.start, part.sectors) {
            self.submit_read(OpId(op));
        }
    }

    /// The range of a read that insisted on it is granted.
    pub(super) fn read_locked(&mut self, id: OpId) {
        self.submit_read(id);
    }

    fn submit_read(&mut self, id: OpId) {
        let Op::Read(read) = self.ops.get(id.0) else { unreachable!("a read") };
        let part = read.part;
        let bytes = part.sectors * 512;
        self.catch_up.budget_bytes -= bytes as i64;
        self.counters.catch_up_read_bytes += bytes;
        self.catch_up.reading.push(Reading {
            op: id,
            volume: part.volume,
            start: part.start.0,
            end: part.start.0 + part.sectors,
            tainted: false,
        });
        let io = LocalIo::Read { hash: part.offer };
        let volume = self.volumes[part.volume].id;
        let (start, sectors) = (part.start, part.sectors);
        self.effects.push_back(Effect::Local { op: id, volume, io, start, sectors });
    }

    /// The read of an [`LocalIo::Read`] has ended.
    pub fn read_ended(&mut self, id: OpId, result: Result<ReadBack<'_>, i32>) {
        let Op::Read(ReadOp { part, holds_lock }) = self.ops.remove(id.0) else {
            unreachable!("only reads end here")
        };
        self.catch_up.reads -= 1;
        let at = self.catch_up.reading.iter().position(|reading| reading.op == id);
        let tainted = self.catch_up.reading.swap_remove(at.expect("a read under way")).tainted;
        if part.link == self.catch_up.link {
            match result {
                _ if tainted => self.read_later(Part { lost_reads: part.lost_reads + 1, ..part }),
                Ok(content) => {
                    self.readable_again(part.volume, part.start, part.sectors);
                    self.record_content(part, content);
                }
                Err(_) => self.read_failed(part),
            }
        }
        if holds_lock {
            let mut granted = Vec::new();
            self.volumes[part.volume].lock.release(LockId(id.0), &mut granted);
            for lock in granted {
                self.locked(OpId(lock.0));
            }
        }
    }

    fn read_later(&mut self, part: Part) {
        self.catch_up.parts.push_back(part);
    }

    fn record_content(&mut self, part: Part, content: ReadBack<'_>) {
        let work = self.catch_up.working.get(&part.region);
        // Zeros are sent as such, for no more than it takes to offer them; unless somebody wants to know
        // whether the target has them.
        let compare = part.offer && work.is_some_and(|work| work.verify);
        let (kind, flags, payload) = if content.zeros && !compare {
            (Kind::Sync, flag::ZEROS, &[][..])
        } else if part.offer {
            (Kind::Offer, 0, content.hashes)
        } else {
            (Kind::Sync, 0, content.data)
        };
        let Some(seq) = self.draw(payload.len() as u64, false) else {
            return self.read_later(part);
        };
        let volume = self.volumes[part.volume].id;
        let slot = self.reserve(kind, flags, volume, seq, part.start, part.sectors as u32);
        if !payload.is_empty() {
            let region = self.ring.memory().region();
            region.copy_in(slot.payload_at, payload).expect("the slot has room for its payload");
        }
        self.ring.commit(slot);
        self.ring.local_done(slot);
        if kind == Kind::Offer {
            self.catch_up.offers.insert(seq, part);
        } else {
            self.work_through(part.region);
        }
    }

    /// The disk does not give the range: halves are tried until what cannot be read is known.
    fn read_failed(&mut self, part: Part) {
        let part = Part { lost_reads: 0, ..part };
        if part.sectors > UNREADABLE_SECTORS {
            let half = (part.sectors / 2).next_multiple_of(UNREADABLE_SECTORS);
            let first = Part { sectors: half, ..part };
            let rest = part.sectors - half;
            let second = Part { start: Sector(part.start.0 + half), sectors: rest, ..first };
            self.catch_up.parts.extend([first, second]);
            if let Some(work) = self.catch_up.working.get_mut(&part.region) {
                work.left += 1;
            }
            return;
        }
        let Some(seq) = self.draw(0, false) else { return self.read_later(part) };
        let volume = self.volumes[part.volume].id;
        let unreadable = &mut self.volumes[part.volume].unreadable;
        if unreadable.len() < UNREADABLE_KEPT_MAX {
            unreadable.insert(part.start.0, part.sectors);
        }
        self.record(Kind::Unreadable, 0, volume, seq, part.start, part.sectors as u32);
        self.work_through(part.region);
    }

    /// The disk has given these sectors, or has been given them.
    pub(super) fn readable_again(&mut self, volume: usize, start: Sector, sectors: u64) {
        let unreadable = &mut self.volumes[volume].unreadable;
        if unreadable.is_empty() {
            return;
        }
        let end = start.0 + sectors;
        let whole = unreadable.range(start.0..end).filter(|(at, sectors)| **at + **sectors <= end);
        for at in whole.map(|(at, _)| *at).collect::<Vec<_>>() {
            unreadable.remove(&at);
        }
    }

    /// The sectors of a volume that the disk last did not give, since the agent started; and the first of
    /// them.
    pub fn unreadable(&self, volume: VolumeId) -> Option<(u64, Sector)> {
        let unreadable = &self.volumes[self.volume_index(volume)].unreadable;
        let (first, _) = unreadable.first_key_value()?;
        Some((unreadable.values().sum(), Sector(*first)))
    }

    /// One part or offer of a region's work is through.
    fn work_through(&mut self, region: RegionId) {
        let Some(work) = self.catch_up.working.get_mut(&region) else { return };
        work.left -= 1;
        if work.left > 0 {
            return;
        }
        let Some(work) = self.catch_up.working.remove(&region) else { return };
        if !work.redo && !work.verify {
            self.map.caught_up(region);
        }
    }

    fn end_gaps(&mut self) {
        for volume in 0..self.volumes.len() {
            let id = self.volumes[volume].id;
            let open = self.volumes[volume].gap.is_some_and(|gap| gap.begun);
            if open && self.map.uncaptured(id).count() == 0 {
                self.end_gap(volume);
            }
        }
    }
}
