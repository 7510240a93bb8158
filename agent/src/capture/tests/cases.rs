//! Single cases that chance rarely brings about.

use tidemark_journal::{GapReason, Sector, Seq, VolumeId};

use super::super::{
    Effect, LocalIo, OpId,
    catchup::{Mode, ReadBack},
    core::{Core, VolumeStart},
    gap::Gap,
    ring::{Layout, RingMemory, RingWriter},
};
use crate::dirty::{
    bitmap::Bits,
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

/// Carries out commits at once and returns what is to be done on the disk.
fn local(core: &mut Core) -> Vec<(OpId, LocalIo)> {
    let mut local = Vec::new();
    core.poll();
    while let Some(effect) = core.effect() {
        match effect {
            Effect::CommitMap(_) => core.map_committed(),
            Effect::Local { op, io, start, .. } => {
                assert_eq!(start, Sector(0));
                local.push((op, io));
            }
            other => panic!("{other:?}"),
        }
    }
    local
}

#[test]
fn dirty_bits_outlast_a_flush_that_failed() {
    let mut core = core();
    core.link(Some(Mode::Send));
    core.allow_catch_up(u64::MAX);
    let read = local(&mut core);
    let [(read, LocalIo::Read { hash: false })] = read[..] else { panic!("{read:?}") };
    core.read_ended(read, Ok(ReadBack { data: &[0; 1 << 20], zeros: true, hashes: &[] }));
    assert!(local(&mut core).is_empty());
    assert_eq!(core.gap(VOLUME), None);
    core.final_durable(core.last_seq());
    assert_eq!(core.map().counts(), (0, 1));

    core.maintain();
    for _ in 0..3 {
        let flush = local(&mut core);
        let [(flush, LocalIo::Flush)] = flush[..] else { panic!("{flush:?}") };
        core.local_ended(flush, Err(5));
        // It is not asked again at once, and the bit stays.
        assert!(local(&mut core).is_empty());
        assert_eq!(core.map().counts(), (0, 1));
        core.maintain();
    }
    let flush = local(&mut core);
    let [(flush, LocalIo::Flush)] = flush[..] else { panic!("{flush:?}") };
    core.local_ended(flush, Ok(()));
    assert!(local(&mut core).is_empty());
    assert_eq!(core.map().counts(), (0, 0));
    core.maintain();
    assert!(local(&mut core).is_empty() && core.map().is_settled());
}
