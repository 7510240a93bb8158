//! A sequence above the last there can be is refused, wherever it comes from.
//!
//! A frame whose last record had the highest sequence of 64 bits was taken in: in a release build the place
//! after it was 0, so that a volume which was announced next began its gap there, before everything.

use tidemark_journal::{
    Compression, FrameBuilder, FrameError, FrameMeta, FrameView, GroupId, Kind, Position, Record,
    Sector, Seq, TermId, VolumeId,
    segment::{SegmentEnd, SegmentError, SegmentStart},
};

fn frame_of(seq: Seq) -> Vec<u8> {
    let mut builder = FrameBuilder::new(Compression::Off);
    let (kind, volume, start) = (Kind::Flush, VolumeId(1), Sector(0));
    builder.push(&Record { kind, flags: 0, volume, seq, time_ns: 0, start, sectors: 0 }, []);
    let before = Position { term: TermId([2; 16]), seq: Seq(1) };
    let about = FrameMeta { group: GroupId([1; 16]), term: before.term, before, wall_ns: 0 };
    builder.finish(&about).to_vec()
}

#[test]
fn a_frame_goes_up_to_the_last_sequence() {
    FrameView::parse(&frame_of(Seq::MAX)).expect("the last there can be");
    for above in [Seq::MAX.next(), Seq(u64::MAX)] {
        let refused = FrameView::parse(&frame_of(above)).err();
        assert_eq!(refused, Some(FrameError::Bounds("last sequence")));
    }
}

#[test]
fn a_segment_speaks_of_no_other() {
    let term = TermId([2; 16]);
    let start = |seq| SegmentStart {
        number: 0,
        group: GroupId([1; 16]),
        before: Position { term, seq },
        created_ns: 0,
        chain_before: [0; 32],
    };
    let end = |seq| SegmentEnd {
        number: 0,
        index_at: 4096,
        index_bytes: 4096,
        last: Position { term, seq },
        data_hash: [0; 32],
        chain: [0; 32],
        index_crc: 0,
    };
    let (last, above) = (Seq::MAX, Seq::MAX.next());
    assert_eq!(SegmentStart::decode(&start(last).encode()), Ok(start(last)));
    assert_eq!(SegmentEnd::decode(&end(last).encode()), Ok(end(last)));
    let refused = SegmentStart::decode(&start(above).encode());
    assert_eq!(refused, Err(SegmentError::Sequence("header")));
    let refused = SegmentEnd::decode(&end(above).encode());
    assert_eq!(refused, Err(SegmentError::Sequence("trailer")));
}
