//! The two sets together: what must be on stable storage before a write may go on.
//!
//! The map is asked before every write ([`DirtyMap::ready`]). What it cannot answer "yes" to is
//! collected, and [`DirtyMap::begin_commit`] says what to write: first all bitmap pages, then the
//! block of the log. When both are on stable storage, [`DirtyMap::commit_written`] lets the waiting
//! writes through. One commit is under way at a time, so many waiting writes share the next one.
//!
//! Invariant 2 (no lost change) rests on two orders kept here: a region's dirty bit is durable
//! before the log gives its slot away, and nothing in memory says "marked" before the commit is
//! written. Invariant 6 rests on epochs: the dirty bits of an epoch are dropped only when every
//! sequence drawn in it is final-durable and a flush of the local disk begun after it has ended.

use std::collections::{BTreeSet, HashSet, VecDeque};

use super::{
    RegionId,
    active::{ActiveSet, CHANGES_MAX, Slot},
    bitmap::{self, Bits, PAGE_REGIONS},
    streams::Streams,
};
use tidemark_journal::{Sector, Seq, VolumeId};

/// One block to be written at an offset of one of the map's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockWrite {
    /// The volume whose bitmap file is meant; none for the log.
    pub volume: Option<VolumeId>,
    /// Byte in the file, a multiple of 4096.
    pub offset: u64,
    /// 4096 bytes.
    pub block: Vec<u8>,
}

/// What a commit writes: the pages first, all of them durable, then the log's block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commit {
    /// Bitmap pages, in any order.
    pub pages: Vec<BlockWrite>,
    /// The log's transaction, if a slot changes.
    pub log: Option<BlockWrite>,
}

/// Pages that a commit writes of a volume besides those that somebody waits for.
const DUE_PAGES_MAX: usize = 64;

/// Slots whose regions are marked before they are given up, where a page is written anyway.
const AHEAD: usize = 256;

/// Of so many slots one may be given to a region that is only foreseen.
const FORESEEN_OF_SLOTS: u32 = 16;

/// Of [`Page::sound_with`]: no commit has been begun with it.
const NOT_YET: u64 = u64::MAX;

struct VolumeMap {
    id: VolumeId,
    /// Dirty since the last rotation, and in the epoch before it.
    current: Bits,
    previous: Bits,
    uncaptured: Bits,
    pages: Vec<Page>,
    /// Pages that the next commits write, some with each.
    due: VecDeque<u32>,
    flushed_tick: u64,
}

/// A page of a volume's bitmap.
#[derive(Clone, Copy)]
struct Page {
    /// Which place to write next.
    written: u64,
    /// Its content in memory is not on storage. Writing it can wait.
    stale: bool,
    /// It is among those that are due.
    due: bool,
    /// The commit since which a set bit in memory says something about storage: before, many were set at
    /// once.
    sound_with: u64,
}

/// What the map's files said about one volume, to start from.
pub struct VolumeStart {
    /// The volume.
    pub id: VolumeId,
    /// Regions in it.
    pub regions: u32,
    /// For each page, which place to write next.
    pub written: Vec<u64>,
    /// Regions known to need catch-up.
    pub uncaptured: Bits,
    /// Regions of which something may not be durable yet, though all of it is captured.
    pub dirty: Bits,
}

/// The dirty map of a group.
pub struct DirtyMap {
    map_id: [u8; 16],
    volumes: Vec<VolumeMap>,
    active: ActiveSet,
    wanted: VecDeque<RegionId>,
    wanted_set: HashSet<RegionId>,
    streams: Streams,
    /// What is likely to be wanted soon: it joins the next transaction, if there is room.
    foreseen: Vec<RegionId>,
    /// Uncaptured bits set in memory and not yet durable: for the next commit, and in this one.
    marking: HashSet<RegionId>,
    marking_now: HashSet<RegionId>,
    changed: Vec<u16>,
    committing: bool,
    /// The newest commit that was begun, and the newest on stable storage.
    generation: u64,
    durable_generation: u64,
    tick: u64,
    /// The epoch being settled: its last sequence.
    boundary: Option<Seq>,
}

impl DirtyMap {
    /// Starts with an empty active set. `generation` is the highest that the files have seen, and
    /// `transaction` the log's newest. The first commit writes every page and then a
    /// transaction: so the regions that the log of an earlier life called active are marked before
    /// it no longer speaks of them.
    pub fn new(
        map_id: [u8; 16],
        generation: u64,
        transaction: u64,
        volumes: Vec<VolumeStart>,
    ) -> DirtyMap {
        let volumes = volumes
            .into_iter()
            .map(|start| VolumeMap {
                id: start.id,
                previous: Bits::new_like(&start.dirty),
                current: start.dirty,
                uncaptured: start.uncaptured,
                pages: start.written.into_iter().map(Page::unwritten).collect(),
                due: VecDeque::new(),
                flushed_tick: 0,
            })
            .collect();
        DirtyMap {
            map_id,
            volumes,
            active: ActiveSet::new(map_id, transaction),
            wanted: VecDeque::new(),
            wanted_set: HashSet::new(),
            streams: Streams::default(),
            foreseen: Vec::new(),
            marking: HashSet::new(),
            marking_now: HashSet::new(),
            changed: Vec::with_capacity(CHANGES_MAX),
            committing: false,
            generation,
            durable_generation: generation,
            tick: 0,
            boundary: None,
        }
    }

    /// Keeps at most so many regions active; see [`ActiveSet::limit`].
    pub fn limit_active(&mut self, regions: usize) {
        self.active.limit(regions);
    }

    /// Whether a captured write into the region, which begins at `from` there or before, may go on. If not, the next
    /// commit will let it.
    pub fn ready(&mut self, region: RegionId, from: Sector) -> bool {
        if self.active.durable_slot(region).is_some() {
            return true;
        }
        if !self.active.contains(region) && self.wanted_set.insert(region) {
            self.wanted.push_back(region);
            if from <= region.start() {
                self.foresee(region);
            }
        }
        false
    }

    fn foresee(&mut self, region: RegionId) {
        let most = self.active.slots() as u32 / FORESEEN_OF_SLOTS;
        let next = self.streams.missed(region, most);
        let regions = self.volume(region.volume).uncaptured.regions();
        let next = next.take_while(|index| *index < regions);
        self.foreseen.extend(next.map(|index| RegionId { index, ..region }));
    }

    /// Whether a captured write into the region may go on though it need not be active: its mark as dirty is on
    /// stable storage already. It then stays until what is drawn from now on is final-durable and flushed,
    /// so the write's sequence has to be drawn before the map is asked anything else.
    pub fn mark_again(&mut self, region: RegionId) -> bool {
        if self.is_marking(region) {
            return false;
        }
        let map = self.volume(region.volume);
        let marked = map.current.get(region.index) || map.previous.get(region.index);
        if marked {
            map.current.set(region.index);
        }
        marked
    }

    /// Whether a write into the region that will have no record may go on. If not, the next commit
    /// will let it.
    pub fn ready_uncaptured(&mut self, region: RegionId) -> bool {
        let map = self.volume(region.volume);
        let new = map.uncaptured.set(region.index);
        if new || map.page(region).sound_with == NOT_YET {
            self.marking.insert(region);
        }
        !self.is_marking(region)
    }

    /// A write into an active region begins to need it.
    ///
    /// # Panics
    /// When the region is not durably active: that would be a write before its mark.
    pub fn hold(&mut self, region: RegionId) {
        let slot = self.active.durable_slot(region).expect("a write before its mark is durable");
        self.active.slot_mut(slot).users += 1;
    }

    /// The sequence of a write into a held region has been drawn.
    pub fn drawn(&mut self, region: RegionId, seq: Seq) {
        if let Some(slot) = self.active.durable_slot(region) {
            let slot = self.active.slot_mut(slot);
            slot.last_seq = slot.last_seq.max(seq);
        }
    }

    /// A write into a held region has ended, on the local disk or in an error.
    pub fn release(&mut self, region: RegionId) {
        self.tick += 1;
        let tick = self.tick;
        if let Some(slot) = self.active.durable_slot(region) {
            let slot = self.active.slot_mut(slot);
            slot.users -= 1;
            slot.last_tick = tick;
        }
    }

    /// A flush of a volume's disk begins now; hand the result to [`Self::flush_ended`].
    pub fn flush_begun(&self) -> u64 {
        self.tick
    }

    /// A flush begun at `tick` has ended well: what had completed by then is on stable storage.
    pub fn flush_ended(&mut self, volume: VolumeId, tick: u64) {
        let map = self.volume(volume);
        map.flushed_tick = map.flushed_tick.max(tick);
    }

    /// A flush of a volume's disk has failed: the regions in which something was written that no flush has made
    /// safe are marked as needing catch-up, durably with the next commit.
    pub fn flush_failed(&mut self, volume: VolumeId) {
        let map = self.volume(volume);
        let flushed_tick = map.flushed_tick;
        let pages: Vec<u32> = map.current.pages().chain(map.previous.pages()).collect();
        map.uncaptured.include(&map.current);
        map.uncaptured.include(&map.previous);
        map.set_many(pages);
        // A write under way may be in the cache already.
        let unflushed = |slot: &&Slot| slot.users > 0 || slot.last_tick > flushed_tick;
        let unflushed = self.active.taken().filter(unflushed);
        let unflushed = unflushed.filter_map(|slot| slot.region);
        let unflushed = unflushed.filter(|region| region.volume == volume);
        for region in unflushed.collect::<Vec<_>>() {
            self.mark_uncaptured(region);
        }
    }

    /// Marks every region of a volume as needing catch-up. Durable after the next commit, so
    /// whoever relies on it waits for [`Self::is_settled`].
    pub fn doubt(&mut self, volume: VolumeId) {
        let map = self.volume(volume);
        map.uncaptured.fill();
        map.set_many(0..map.pages.len() as u32);
    }

    /// Marks a region as needing catch-up, durably with the next commit.
    pub fn mark_uncaptured(&mut self, region: RegionId) {
        if self.volume(region.volume).uncaptured.set(region.index) {
            self.marking.insert(region);
        }
    }

    /// Whether a mark of the region as uncaptured is still on its way to storage.
    pub fn is_marking(&self, region: RegionId) -> bool {
        let map = self.volumes.iter().find(|map| map.id == region.volume);
        map.is_some_and(|map| map.page(region).sound_with > self.durable_generation)
            || self.marking.contains(&region)
            || self.marking_now.contains(&region)
    }

    /// Whether a mark of any of the volume's regions as uncaptured is still on its way to storage.
    pub fn is_marking_any(&self, volume: VolumeId) -> bool {
        let map = self.volumes.iter().find(|map| map.id == volume);
        let sound = |page: &Page| page.sound_with <= self.durable_generation;
        map.is_some_and(|map| !map.pages.iter().all(sound))
            || self.marking.iter().chain(&self.marking_now).any(|region| region.volume == volume)
    }

    /// Catch-up has committed records for all of the region. It stays dirty until they are durable.
    pub fn caught_up(&mut self, region: RegionId) {
        let map = self.volume(region.volume);
        if map.uncaptured.clear(region.index) {
            map.current.set(region.index);
            map.pages[(region.index / PAGE_REGIONS) as usize].stale = true;
        }
    }

    /// Closes the epoch of dirty bits, if there are any and the one before has settled. `last` is
    /// the last sequence drawn. The caller then lets the writes under way end, flushes every volume
    /// and calls [`Self::settle`] once `last` is final-durable.
    pub fn rotate(&mut self, last: Seq) -> bool {
        if self.boundary.is_some() || self.volumes.iter().all(|map| map.current.count() == 0) {
            return false;
        }
        for map in &mut self.volumes {
            debug_assert_eq!(map.previous.count(), 0, "an epoch that has not settled");
            std::mem::swap(&mut map.previous, &mut map.current);
        }
        self.boundary = Some(last);
        true
    }

    /// The last sequence of the epoch that is being settled.
    pub fn boundary(&self) -> Option<Seq> {
        self.boundary
    }

    /// The epoch's records are final-durable and its writes flushed: its bits are dropped.
    pub fn settle(&mut self) {
        self.boundary = None;
        for map in &mut self.volumes {
            for page in map.previous.pages() {
                map.pages[page as usize].stale = true;
            }
            map.previous.empty();
        }
    }

    /// Has the pages written whose bits were dropped in memory, some with each of the next commits.
    pub fn write_back(&mut self) {
        for map in &mut self.volumes {
            for (number, page) in (0..).zip(&mut map.pages).filter(|(_, page)| page.stale) {
                if !std::mem::replace(&mut page.due, true) {
                    map.due.push_back(number);
                }
            }
        }
    }

    /// Gives up the slots whose last write is final-durable and flushed and which nobody uses, so
    /// that a quiet source keeps no region active. Durable with the next commit.
    pub fn drop_clean(&mut self, durable: Seq) -> bool {
        if self.committing {
            return false;
        }
        let room = CHANGES_MAX - self.changed.len();
        let clean: Vec<u16> = (0..super::active::SLOTS as u16)
            .filter(|slot| self.is_clean(*slot, durable))
            .take(room)
            .collect();
        for slot in &clean {
            self.active.replace(*slot, None);
        }
        self.changed.extend_from_slice(&clean);
        !clean.is_empty()
    }

    fn is_clean(&mut self, slot: u16, durable: Seq) -> bool {
        let slot = *self.active.peek(slot);
        let Some(region) = slot.region else { return false };
        slot.users == 0
            && slot.last_seq <= durable
            && slot.last_tick <= self.volume(region.volume).flushed_tick
    }

    /// Whether something waits for a commit.
    pub fn wants_commit(&self) -> bool {
        !self.committing
            && (!self.wanted.is_empty()
                || !self.marking.is_empty()
                || !self.changed.is_empty()
                || self.active.is_unwritten()
                || self.volumes.iter().any(|map| !map.due.is_empty()))
    }

    /// Begins the next commit; nothing if nothing waits for one or no slot can be given away now.
    pub fn begin_commit(&mut self, durable: Seq) -> Option<Commit> {
        if !self.wants_commit() {
            return None;
        }
        let mut urgent: BTreeSet<(VolumeId, u32)> = BTreeSet::new();
        while self.changed.len() < CHANGES_MAX
            && let Some(region) = self.wanted.front().copied()
        {
            let Some(slot) = self.active.victim() else { break };
            self.wanted.pop_front();
            self.wanted_set.remove(&region);
            self.activate(slot, region, durable, &mut urgent);
        }
        // Only along with what is waited for, and when all of that has found a slot.
        for region in std::mem::take(&mut self.foreseen) {
            if !self.wanted.is_empty() || self.changed.len() == CHANGES_MAX {
                break;
            }
            if self.active.contains(region) {
                continue;
            }
            let Some(slot) = self.active.victim() else { break };
            self.activate(slot, region, durable, &mut urgent);
        }
        for region in &self.marking {
            urgent.insert((region.volume, region.index / PAGE_REGIONS));
        }
        self.mark_ahead(&urgent, durable);
        let whole = self.active.is_unwritten();
        let due = self.volumes.iter().any(|map| !map.due.is_empty());
        if self.changed.is_empty() && urgent.is_empty() && !whole && !due {
            return None;
        }
        // One that is written anyway takes along what would be due soon.
        self.write_back();
        self.marking_now = std::mem::take(&mut self.marking);
        self.generation += 1;
        self.committing = true;
        let mut commit = Commit::default();
        for map in &mut self.volumes {
            let waited_for: Vec<u32> = if whole {
                (0..map.pages.len() as u32).collect()
            } else {
                urgent.range((map.id, 0)..=(map.id, u32::MAX)).map(|(_, number)| *number).collect()
            };
            let mut write = |map: &mut VolumeMap, number| {
                commit.pages.push(map.write(self.map_id, number, self.generation));
            };
            waited_for.into_iter().for_each(|number| write(map, number));
            for _ in 0..DUE_PAGES_MAX {
                let Some(number) = map.next_due() else { break };
                write(map, number);
            }
        }
        if !self.changed.is_empty() || self.active.is_unwritten() {
            let (offset, block) = self.active.transaction(&self.changed);
            commit.log = Some(BlockWrite { volume: None, offset, block });
        }
        Some(commit)
    }

    /// Gives a slot to a region, with the next transaction. A page on which what had it is to be marked first becomes
    /// urgent.
    fn activate(
        &mut self,
        slot: u16,
        region: RegionId,
        durable: Seq,
        urgent: &mut BTreeSet<(VolumeId, u32)>,
    ) {
        let clean = self.is_clean(slot, durable);
        let old = self.active.replace(slot, Some(region));
        if let Some(old) = old.region
            && !clean
            && !self.mark_again(old)
        {
            self.volume(old.volume).current.set(old.index);
            urgent.insert((old.volume, old.index / PAGE_REGIONS));
        }
        self.changed.push(slot);
    }

    /// Marks the regions that will be given up next, on pages that are written anyway: then giving them up
    /// takes the log's block alone. As long as they are active, the marks cost nothing.
    fn mark_ahead(&mut self, pages: &BTreeSet<(VolumeId, u32)>, durable: Seq) {
        if pages.is_empty() {
            return;
        }
        for slot in self.active.next_in_turn(AHEAD) {
            let Slot { region: Some(region), .. } = *self.active.peek(slot) else { continue };
            if pages.contains(&(region.volume, region.index / PAGE_REGIONS))
                && !self.is_clean(slot, durable)
            {
                self.volume(region.volume).current.set(region.index);
            }
        }
    }

    /// The commit is on stable storage.
    pub fn commit_written(&mut self) {
        assert!(self.committing, "a commit that was not begun");
        self.committing = false;
        self.active.written(&self.changed);
        self.changed.clear();
        self.marking_now.clear();
        self.durable_generation = self.generation;
    }

    /// Whether a commit is under way.
    pub fn committing(&self) -> bool {
        self.committing
    }

    /// Whether the commit under way makes a region active of which nothing else is marked: should the power go
    /// before the log's block is durable, nobody would compare it.
    pub fn rests_on_log(&self) -> bool {
        let marked = |region: RegionId| {
            let map = self.volumes.iter().find(|map| map.id == region.volume);
            map.is_some_and(|map| {
                [&map.current, &map.previous, &map.uncaptured]
                    .iter()
                    .any(|bits| bits.get(region.index))
            })
        };
        let mut changed = self.changed.iter().filter_map(|slot| self.active.peek(*slot).region);
        self.committing && changed.any(|region| !marked(region))
    }

    /// Whether everything in memory is on stable storage.
    pub fn is_settled(&self) -> bool {
        !self.committing
            && !self.wants_commit()
            && !self.volumes.iter().flat_map(|map| &map.pages).any(|page| page.stale)
    }

    /// Whether nothing at all is active, dirty or uncaptured.
    pub fn is_clean_throughout(&self) -> bool {
        self.is_captured_throughout() && !self.has_uncaptured()
    }

    /// Whether nothing is active or dirty: what is not uncaptured is the same on both sides.
    pub fn is_captured_throughout(&self) -> bool {
        let clean = |map: &VolumeMap| map.current.count() + map.previous.count() == 0;
        self.active.taken().next().is_none() && self.volumes.iter().all(clean)
    }

    /// Whether any region is uncaptured.
    pub fn has_uncaptured(&self) -> bool {
        self.volumes.iter().any(|map| map.uncaptured.count() > 0)
    }

    /// The uncaptured regions of a volume.
    pub fn uncaptured(&self, volume: VolumeId) -> &Bits {
        let map = self.volumes.iter().find(|map| map.id == volume);
        &map.expect("a volume of this group").uncaptured
    }

    /// Active and dirty regions of all volumes, for people.
    pub fn counts(&self) -> (usize, u64) {
        let dirty = |map: &VolumeMap| u64::from(map.current.count() + map.previous.count());
        (self.active.taken().count(), self.volumes.iter().map(dirty).sum())
    }

    fn volume(&mut self, id: VolumeId) -> &mut VolumeMap {
        let map = self.volumes.iter_mut().find(|map| map.id == id);
        map.expect("a volume of this group")
    }
}

impl VolumeMap {
    fn page(&self, region: RegionId) -> &Page {
        &self.pages[(region.index / PAGE_REGIONS) as usize]
    }

    /// Many bits of these pages were set at once: each page is written with one of the next commits.
    fn set_many(&mut self, pages: impl IntoIterator<Item = u32>) {
        for number in pages {
            let page = &mut self.pages[number as usize];
            (page.stale, page.sound_with) = (true, NOT_YET);
            if !std::mem::replace(&mut page.due, true) {
                self.due.push_back(number);
            }
        }
    }

    fn next_due(&mut self) -> Option<u32> {
        loop {
            let number = self.due.pop_front()?;
            let page = &mut self.pages[number as usize];
            page.due = false;
            // Somebody may have waited for it since.
            if page.stale {
                return Some(number);
            }
        }
    }

    fn write(&mut self, map_id: [u8; 16], number: u32, generation: u64) -> BlockWrite {
        let page = &mut self.pages[number as usize];
        let (written, dirty) = (page.written, [&self.current, &self.previous]);
        let (offset, block) =
            bitmap::encode(map_id, number, generation, written, dirty, &self.uncaptured);
        page.written += 1;
        page.stale = false;
        page.sound_with = page.sound_with.min(generation);
        BlockWrite { volume: Some(self.id), offset, block }
    }
}

impl Page {
    fn unwritten(written: u64) -> Page {
        Page { written, stale: true, due: false, sound_with: NOT_YET }
    }
}
