//! A spool as a start finds it: the last segment behind a good one. What is found is read back in order.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use tidemark_agent::spool::{Limits, Reader, recover};
use tidemark_fuzz::{files::Files, seal, seal_frames};
use tidemark_journal::segment::BLOCK_BYTES;
use tidemark_journal::{GroupId, Position};

const GROUP: GroupId = GroupId([1; 16]);

fuzz_target!(|bytes: &[u8]| {
    let mut segment = bytes.to_vec();
    read(&segment);
    seal(&mut segment, 0..152, 152);
    seal_frames(&mut segment);
    read(&segment);
});

fn read(segment: &[u8]) {
    let files = Files::default();
    let mut segment = segment.to_vec();
    segment.resize(segment.len().next_multiple_of(BLOCK_BYTES as usize), 0);
    files.put("000000000001.seg", segment);
    let store =
        recover(Arc::new(files), GROUP, Limits::of(1 << 30)).expect("a disk without errors");
    let index = Arc::clone(store.index());
    let Some((before, end)) = index.ends() else { return };
    let (mut reader, mut frame) = (Reader::new(Arc::clone(&index)), Vec::new());
    let mut at = before;
    while at.seq < end.seq {
        let found =
            reader.next(at.seq, &mut frame).expect("it was found when the spool was opened");
        assert!(at == Position::default() || found.before.seq >= at.seq, "in order");
        assert!(found.last.seq > at.seq);
        at = found.last;
    }
    assert_eq!(at, end);
    assert!(reader.next(end.seq, &mut frame).is_err(), "nothing follows its end");
}
