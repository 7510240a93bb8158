//! Single cases that chance rarely brings about.

use tidemark_journal::{GapReason, Sector, Seq, VolumeId};

use super::super::{
    Ask, Effect, LocalIo, OpId, Request, RequestId,
    catchup::{Mode, ReadBack},
    core::{Core, VolumeStart},
    gap::Gap,
    ring::{Layout, RingMemory, RingWriter},
};
use crate::dirty::{
    RegionId,
    bitmap::{self, Bits},
    map::{self, DirtyMap},
};

const VOLUME: VolumeId = VolumeId(1);

/// A core with one volume of one region, which is sent for the first time.
fn core() -> Core {
    let mut uncaptured = Bits::new(1);
    uncaptured.fill();
    let start = map::VolumeStart {
        id: VOLUME,
        regions: 1,
        written: vec![0],
        uncaptured,
        dirty: Bits::new(1),
    };
    let map = DirtyMap::new([9; 16], 0, 0, vec![start]);
    let layout = Layout { slots: 128, data_bytes: 4 << 20, frame_bytes: 4096 };
    let memory = RingMemory::plain(layout, &[]);
    let volume =
        VolumeStart { id: VOLUME, sectors: 2048, gap: Some(Gap::owed(GapReason::FirstSync)) };
    Core::new(&[volume], map, RingWriter::new(memory), Seq(0), Seq(1 << 40))
}

/// A core with one volume of two regions, of which these are dirty.
fn core_of_two(dirty: &[u32]) -> Core {
    let mut bits = Bits::new(2);
    for region in dirty {
        bits.set(*region);
    }
    let (written, uncaptured) = (vec![0], Bits::new(2));
    let start = map::VolumeStart { id: VOLUME, regions: 2, written, uncaptured, dirty: bits };
    let map = DirtyMap::new([9; 16], 0, 0, vec![start]);
    let layout = Layout { slots: 128, data_bytes: 4 << 20, frame_bytes: 4096 };
    let ring = RingWriter::new(RingMemory::plain(layout, &[]));
    let volume = VolumeStart { id: VOLUME, sectors: 4096, gap: None };
    Core::new(&[volume], map, ring, Seq(0), Seq(1 << 40))
}

/// Eight sectors of a region are made zeros; what is to be done on the disk for that.
fn zero(core: &mut Core, id: u64, region: u64, fua: bool) -> OpId {
    let (ask, start) = (Ask::Zero { unmap: false, fua }, Sector(region * 2048));
    core.submit(Request { id: RequestId(id), volume: VOLUME, ask, start, sectors: 8 });
    let zero = local(core);
    let [(zero, LocalIo::Zero { .. })] = zero[..] else { panic!("{zero:?}") };
    zero
}

/// A disk without a way through its cache is sent a flush behind a write with FUA, and that write alone is told
/// that it failed: so nothing is believed to be safe that another region has had since the last good flush. A disk that
/// has no room was sent none.
#[test]
fn a_write_through_the_cache_that_fails_may_have_lost_others() {
    for (fua, errno, lost) in [(false, 5, false), (true, 5, true), (true, 28, false)] {
        let mut core = core_of_two(&[1]);
        let zero = zero(&mut core, 1, 0, fua);
        core.local_ended(zero, Err(errno));
        assert_eq!(core.map().uncaptured(VOLUME).get(1), lost, "{fua} {errno}");
    }
}

/// While it is under way no later flush is believed: the disk may tell its failure to either of the two.
#[test]
fn a_flush_vouches_for_nothing_that_a_write_through_the_cache_may_yet_lose() {
    let mut core = core_of_two(&[]);
    let earlier = zero(&mut core, 1, 1, false);
    core.local_ended(earlier, Ok(()));
    assert!(matches!(core.effect(), Some(Effect::Complete { result: Ok(()), .. })));
    final_durable(&mut core);
    let through = zero(&mut core, 2, 0, true);
    let (start, sectors) = (Sector(0), 0);
    core.submit(Request { id: RequestId(3), volume: VOLUME, ask: Ask::Flush, start, sectors });
    let flush = only_flush(&mut core);
    core.local_ended(flush, Ok(()));
    let last = core.last_seq();
    core.map_mut().drop_clean(last);
    assert_eq!(core.map().counts().0, 2, "given up on the word of the flush");
    core.local_ended(through, Err(5));
    assert_eq!(core.map().uncaptured(VOLUME).count(), 2);
}

/// What a flush has lost may be of a write that has not been answered yet.
#[test]
fn a_failed_flush_is_one_of_the_writes_under_way_too() {
    let mut core = core_of_two(&[]);
    let under_way = zero(&mut core, 1, 1, false);
    let (start, sectors) = (Sector(0), 0);
    core.submit(Request { id: RequestId(2), volume: VOLUME, ask: Ask::Flush, start, sectors });
    let flush = only_flush(&mut core);
    core.local_ended(flush, Err(5));
    core.local_ended(under_way, Ok(()));
    assert!(core.map().uncaptured(VOLUME).get(1));
}

/// People are told of sectors that the disk does not give, until it has been given them anew.
#[test]
fn sectors_that_cannot_be_read_are_known_until_they_are_written() {
    let mut core = core();
    core.link(Some(Mode::Send));
    core.allow_catch_up(u64::MAX);
    // Of the region's halves and theirs one is bad, down to the smallest part.
    let mut bad = Vec::new();
    core.poll();
    while let Some(effect) = core.effect() {
        match effect {
            Effect::CommitMap(_) => core.map_committed(),
            Effect::Local { op, io: LocalIo::Read { .. }, start, sectors, .. } => {
                if start.0 <= 800 && 800 < start.0 + sectors {
                    bad.push((start, sectors));
                    core.read_ended(op, Err(5));
                } else {
                    let data = vec![0; sectors as usize * 512];
                    core.read_ended(op, Ok(ReadBack { data: &data, zeros: true, hashes: &[] }));
                }
            }
            other => panic!("{other:?}"),
        }
        core.poll();
    }
    assert_eq!(bad.last(), Some(&(Sector(800), 8)));
    assert_eq!(core.unreadable(VOLUME), Some((8, Sector(800))));
    for (id, start, left) in [(1, 796, true), (2, 800, false)] {
        let ask = Ask::Zero { unmap: false, fua: false };
        core.submit(Request {
            id: RequestId(id),
            volume: VOLUME,
            ask,
            start: Sector(start),
            sectors: 8,
        });
        core.poll();
        while let Some(effect) = core.effect() {
            match effect {
                Effect::CommitMap(_) => core.map_committed(),
                Effect::Local { op, .. } => core.local_ended(op, Ok(())),
                _ => {}
            }
            core.poll();
        }
        assert_eq!(core.unreadable(VOLUME).is_some(), left, "{start}");
    }
}

/// Carries out commits at once and returns what is to be done on the disk.
fn local(core: &mut Core) -> Vec<(OpId, LocalIo)> {
    let mut local = Vec::new();
    core.poll();
    while let Some(effect) = core.effect() {
        match effect {
            Effect::CommitMap(_) => core.map_committed(),
            Effect::Local { op, io, .. } => local.push((op, io)),
            other => panic!("{other:?}"),
        }
    }
    local
}

/// The region is sent, and is dirty until the disk has been flushed.
fn sent() -> Core {
    let mut core = core();
    core.link(Some(Mode::Send));
    core.allow_catch_up(u64::MAX);
    send(&mut core);
    assert_eq!(core.gap(VOLUME), None);
    core
}

fn send(core: &mut Core) {
    let read = local(core);
    let [(read, LocalIo::Read { hash: false })] = read[..] else { panic!("{read:?}") };
    core.read_ended(read, Ok(ReadBack { data: &[0; 1 << 20], zeros: true, hashes: &[] }));
    assert!(local(core).is_empty());
    final_durable(core);
    assert_eq!(core.map().uncaptured(VOLUME).count(), 0);
    assert!(core.map().counts().1 > 0);
}

fn final_durable(core: &mut Core) {
    core.final_durable(core.last_seq());
    core.noted(core.last_seq(), Seq::ZERO);
}

fn only_flush(core: &mut Core) -> OpId {
    let flush = local(core);
    let [(flush, LocalIo::Flush)] = flush[..] else { panic!("{flush:?}") };
    flush
}

/// Once the disk has said that a flush failed, it is not believed to have kept what was written before, even if it
/// says so the next time: it is read back.
#[test]
fn what_a_failed_flush_may_have_lost_is_read_back() {
    let mut core = sent();
    core.maintain();
    for _ in 0..3 {
        let flush = only_flush(&mut core);
        core.local_ended(flush, Err(5));
        assert_eq!(core.map().uncaptured(VOLUME).count(), 1);
        send(&mut core);
        core.maintain();
    }
    let flush = only_flush(&mut core);
    core.local_ended(flush, Ok(()));
    assert!(local(&mut core).is_empty());
    // What was read back is another epoch's.
    core.maintain();
    let flush = only_flush(&mut core);
    core.local_ended(flush, Ok(()));
    assert!(local(&mut core).is_empty());
    assert_eq!(core.map().counts(), (0, 0));
    core.maintain();
    assert!(local(&mut core).is_empty() && core.map().is_settled());
}

/// What was sent and is final-durable is not sent again by an agent without the ring, as soon as its epoch has settled:
/// the page goes to the disk then, and not only with the next look or whatever else needs a commit.
#[test]
fn what_an_epoch_settles_goes_to_the_disk_at_once() {
    let mut core = sent();
    core.maintain();
    let flush = only_flush(&mut core);
    assert!(!core.map().wants_commit());
    core.local_ended(flush, Ok(()));
    core.poll();
    let Some(Effect::CommitMap(commit)) = core.effect() else { panic!("nothing is written") };
    let found = |place: usize, page: &[u8]| {
        let mut file = vec![0; bitmap::file_bytes(1) as usize];
        file[place..][..page.len()].copy_from_slice(page);
        bitmap::recover(&file, [9; 16], 1)
    };
    let [page] = &commit.pages[..] else { panic!("{commit:?}") };
    let found = found(page.offset as usize, &page.block);
    assert_eq!((found.dirty.count(), found.uncaptured.count()), (0, 0));
    core.map_committed();
    assert!(core.map().is_settled());
}

/// A target that loses what it has acknowledged is noticed by what the state says it has. Until that is durable, what
/// it has may have to be sent again, and has its mark.
#[test]
fn what_is_acknowledged_is_dirty_until_the_state_says_so() {
    let mut core = core();
    core.link(Some(Mode::Send));
    core.allow_catch_up(u64::MAX);
    let read = local(&mut core);
    let [(read, _)] = read[..] else { panic!("{read:?}") };
    core.read_ended(read, Ok(ReadBack { data: &[0; 1 << 20], zeros: true, hashes: &[] }));
    assert!(local(&mut core).is_empty());
    core.final_durable(core.last_seq());
    core.maintain();
    let flush = only_flush(&mut core);
    core.local_ended(flush, Ok(()));
    assert!(local(&mut core).is_empty() && core.awaits_note());
    assert_eq!(core.map().counts().1, 1);
    core.noted(core.last_seq(), Seq::ZERO);
    assert!(local(&mut core).is_empty() && !core.awaits_note());
    assert_eq!(core.map().counts().1, 0);
}

/// A stop in the middle of a first sync leaves to the next agent what was not sent, and no more.
#[test]
fn a_stop_settles_what_has_been_caught_up() {
    let mut core = sent();
    core.link(None);
    let settled = (0..8).find_map(|_| {
        let settled = core.settle_for_stop();
        for (flush, io) in local(&mut core) {
            assert_eq!(io, LocalIo::Flush);
            core.local_ended(flush, Ok(()));
        }
        settled
    });
    assert_eq!((settled, core.map().counts()), (Some(true), (0, 0)));
    core.map_mut().mark_uncaptured(RegionId { volume: VOLUME, index: 0 });
    assert_eq!(core.settle_for_stop(), None, "the mark is not durable");
    assert!(local(&mut core).is_empty());
    assert_eq!(
        core.settle_for_stop(),
        Some(false),
        "it is not clean, and there is nothing to wait for"
    );
}

/// A disk that refuses to be flushed does not hold up a stop.
#[test]
fn a_stop_does_not_wait_for_a_disk_that_cannot_be_flushed() {
    let mut core = sent();
    core.link(None);
    for _ in 0..8 {
        if let Some(clean) = core.settle_for_stop() {
            assert!(!clean);
            assert_eq!(core.map().uncaptured(VOLUME).count(), 1);
            return;
        }
        for (flush, _) in local(&mut core) {
            core.local_ended(flush, Err(5));
        }
        assert!(local(&mut core).iter().all(|(_, io)| *io == LocalIo::Flush));
    }
    panic!("it waits for ever");
}

/// Of two flushes under way at once, the second succeeds although the first, which fails after it, has lost what both
/// were to keep.
#[test]
fn a_flush_vouches_for_nothing_that_an_earlier_one_may_yet_lose() {
    let mut core = sent();
    core.maintain();
    let settling = only_flush(&mut core);
    core.local_ended(settling, Ok(()));
    assert!(local(&mut core).is_empty());
    let write = |id| Request {
        id: RequestId(id),
        volume: VOLUME,
        ask: Ask::Discard,
        start: Sector(0),
        sectors: 8,
    };
    core.submit(write(1));
    let discard = local(&mut core);
    let [(discard, LocalIo::Zero { .. })] = discard[..] else { panic!("{discard:?}") };
    core.local_ended(discard, Ok(()));
    let flush = |id| Request { ask: Ask::Flush, sectors: 0, ..write(id) };
    core.submit(flush(2));
    core.submit(flush(3));
    let mut flushes = Vec::new();
    let mut answers = Vec::new();
    while let Some(effect) = core.effect() {
        match effect {
            Effect::Local { op, io: LocalIo::Flush, .. } => flushes.push(op),
            Effect::Complete { request, result } => answers.push((request.0, result)),
            other => panic!("{other:?}"),
        }
    }
    final_durable(&mut core);
    core.local_ended(flushes[1], Ok(()));
    let last = core.last_seq();
    core.map_mut().drop_clean(last);
    assert_eq!(core.map().counts().0, 1, "given up on the word of the second flush");
    core.local_ended(flushes[0], Err(5));
    assert_eq!(core.map().uncaptured(VOLUME).count(), 1);
    assert_eq!(answers, [(1, Ok(()))]);
}

/// The same for the dirty bits of an epoch, which its own flush does not clear while an earlier one is under way.
#[test]
fn an_epoch_does_not_settle_while_an_earlier_flush_may_fail() {
    let mut core = sent();
    let (start, sectors) = (Sector(0), 0);
    core.submit(Request { id: RequestId(1), volume: VOLUME, ask: Ask::Flush, start, sectors });
    let earlier = only_flush(&mut core);
    final_durable(&mut core);
    core.maintain();
    let settling = only_flush(&mut core);
    core.local_ended(settling, Ok(()));
    assert!(local(&mut core).is_empty());
    assert_eq!(core.map().counts(), (0, 1), "settled on the word of the second flush");
    core.local_ended(earlier, Err(5));
    assert_eq!(core.map().uncaptured(VOLUME).count(), 1);
}
