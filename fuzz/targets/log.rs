//! A target's log after a restart: one segment that was being written, or was sealed, of any content. The
//! first byte says how much of it had been acknowledged. What is found is read.
#![no_main]

use std::collections::BTreeMap;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tidemark_fuzz::{seal, seal_frames};
use tidemark_journal::segment::{BLOCK_BYTES, SegmentEnd};
use tidemark_journal::{FrameView, GroupId, Position, Seq, TermId, VolumeId};
use tidemark_simdisk::{How, SimDisk};
use tidemark_target::machine::{Machine, simulated::Simulated};
use tidemark_target::store::index::Query;
use tidemark_target::store::journal::Follower;
use tidemark_target::store::log::LogOptions;
use tidemark_target::store::read::{Plan, fill};
use tidemark_target::store::rebuild::stand_in;
use tidemark_target::store::recover::{Expected, recover};
use tidemark_target::store::segment::{Caches, Segment, file_name};

const GROUP: GroupId = GroupId([1; 16]);
const BEFORE: Position = Position { term: TermId([7; 16]), seq: Seq(100) };

fuzz_target!(|bytes: &[u8]| {
    let Some((acked, bytes)) = bytes.split_first() else { return };
    let mut segment = bytes.to_vec();
    let length = segment.len().next_multiple_of(BLOCK_BYTES as usize);
    segment.resize(length, 0);
    seal(&mut segment, 0..152, 152);
    seal_frames(&mut segment);
    let trailer = length.saturating_sub(BLOCK_BYTES as usize);
    seal(&mut segment[trailer..], 0..184, 184);
    let disk = SimDisk::new(1);
    let dir = Path::new("/log");
    disk.create_dir_all(dir).expect("a directory");
    let file = disk.open(&dir.join(file_name(1)), How::Create).expect("a file");
    file.write_at(&segment, 0).expect("room");
    let machine = Machine::Simulated(Simulated::new(disk, 1, 0));
    let caches = Caches::on(&machine, 16, 16);
    let options = LogOptions {
        segment_bytes: 1 << 20,
        entries_max: 1 << 16,
        sync_batches: true,
        bytes_max: None,
    };
    let acked = Seq(BEFORE.seq.0 + u64::from(*acked));
    let find = || {
        let known = &BTreeMap::new();
        let expected =
            Expected { group: GROUP, first: 1, known, before: BEFORE, acked, received_ns: 0 };
        recover(dir, &caches, &options, &expected, &Nobody).expect("a disk without errors")
    };
    let found = find();
    assert!(found.end.seq >= acked || !found.damage.is_empty(), "a loss is told");
    found.segments.iter().for_each(read);
    // What was found once is found again.
    let again = find();
    assert_eq!(again.end, found.end);
});

fn read(segment: &std::sync::Arc<Segment>) {
    let query = Query { volume: VolumeId(1), start: 0, end: 4096, at: Seq(u64::MAX) };
    let mut plan = Plan::new(query);
    if plan.ask([segment], Seq(u64::MAX)).is_ok() {
        let (pieces, _) = plan.into_pieces();
        let _ = fill(&pieces, 0, &mut vec![0; 4096 * 512]);
    }
    let _ = stand_in(segment, GROUP);
}

/// Keeps no history.
struct Nobody;

impl Follower for Nobody {
    fn stored(&self, _: &FrameView<'_>) {}

    fn sealed(&self, _: &Segment, _: &SegmentEnd) -> anyhow::Result<()> {
        Ok(())
    }
}
