//! A segment in memory: header, trailer and the scan of its frames after a crash, with what the
//! target keeps of each frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark_fuzz::{seal, seal_frames, walk};
use tidemark_journal::segment::{BLOCK_BYTES, SegmentEnd, SegmentStart, frames};
use tidemark_journal::{FrameView, Seq};
use tidemark_target::history::History;
use tidemark_target::store::index::{MemoryIndex, sealed};

fuzz_target!(|bytes: &[u8]| {
    let mut header = bytes.to_vec();
    seal(&mut header, 0..152, 152);
    if let Ok(start) = SegmentStart::decode(&header) {
        assert_eq!(SegmentStart::decode(&start.encode()), Ok(start));
    }
    let mut trailer = bytes.to_vec();
    seal(&mut trailer, 0..184, 184);
    if let Ok(end) = SegmentEnd::decode(&trailer) {
        assert_eq!(SegmentEnd::decode(&end.encode()), Ok(end));
    }
    // The rest lies behind a header block.
    let mut segment = vec![0; BLOCK_BYTES as usize];
    segment.extend_from_slice(bytes);
    let found: Vec<_> = frames(&segment).filter_map(|(_, frame)| frame.ok()).collect();
    take(&found);
    drop(found);
    seal_frames(&mut segment);
    let found: Vec<_> = frames(&segment).filter_map(|(_, frame)| frame.ok()).collect();
    found.iter().for_each(walk);
    take(&found);
});

/// What the log does with the frames of a segment.
fn take(frames: &[FrameView<'_>]) {
    let (mut history, mut index) = (History::default(), MemoryIndex::default());
    for frame in frames {
        history.extend(frame);
        index.insert(frame, BLOCK_BYTES);
    }
    for volume in &history.volumes {
        let _ = (volume.sectors(), volume.open_gap(), volume.present_at(Seq(1)));
    }
    let pages = sealed::build(&index, 1, Seq::ZERO);
    let rows = (index.entries().len(), index.chunks().len(), index.frames().len());
    assert!(pages.len() as u64 <= sealed::bytes_max(rows.0, rows.1, rows.2));
}
