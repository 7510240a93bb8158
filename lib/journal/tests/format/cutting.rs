//! A frame cut for a resume reads as the end of the whole one.

use proptest::prelude::*;
use tidemark_journal::{FrameView, Position, Seq, cut};

use crate::{
    random::{Content, TERM, content},
    reading::assert_reads_as,
};

/// Cuts at every record, and between records where sequences are left out.
fn assert_cuts_everywhere(content: &Content) {
    let bytes = content.encode();
    let view = FrameView::parse(&bytes).unwrap();
    let seen: Vec<_> = view.records().collect();
    assert_eq!(cut::tail(&view, content.before.seq).unwrap(), bytes, "nothing to cut");
    assert_eq!(cut::tail(&view, content.last_seq()), None, "nothing left");
    assert_eq!(cut::tail(&view, Seq(u64::MAX)), None, "nothing left");
    for keep_from in 1..seen.len() {
        let (last_gone, first_kept) = (seen[keep_from - 1].seq, seen[keep_from].seq);
        for after in [last_gone, Seq(first_kept.0 - 1)] {
            let tail = cut::tail(&view, after).unwrap();
            let first = seen[keep_from];
            // Times are as a reader of the whole frame sees them.
            let items = (keep_from..seen.len())
                .map(|index| (seen[index], content.items[index].1.clone()))
                .collect();
            let before = Position { term: TERM, seq: after };
            let rest = Content { items, before, wall_ns: view.wall_ns(&first), ..content.clone() };
            assert_tail(&tail, &rest, &bytes);
        }
    }
}

fn assert_tail(tail: &[u8], rest: &Content, whole: &[u8]) {
    let (view, whole) = (FrameView::parse(tail).unwrap(), FrameView::parse(whole).unwrap());
    // The chunks are the whole frame's last ones, byte by byte.
    let skipped = whole.table().len() - view.table().len();
    for index in 0..view.table().len() {
        assert_eq!(
            view.stored_chunk(index).unwrap().1,
            whole.stored_chunk(skipped + index).unwrap().1
        );
    }
    // Its first chunk may begin with bytes of records that are gone, so the raw bytes are not
    // compared.
    view.verify_chunks().unwrap();
    assert_eq!(view.header().before(), rest.before);
    assert_eq!(view.header().last(), whole.header().last());
    assert_eq!(view.header().group(), whole.header().group());
    assert_eq!(view.records().len(), rest.items.len());
    for (index, (record, (wanted, payload))) in view.records().zip(&rest.items).enumerate() {
        assert_eq!(record, *wanted);
        assert_eq!(view.wall_ns(&record), whole.wall_ns(&record));
        assert_eq!(&view.payload(index).unwrap(), payload);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn frames_of_small_records(content in content(40, 16)) {
        assert_cuts_everywhere(&content);
    }

    #[test]
    fn frames_of_large_records(content in content(6, 2048)) {
        assert_cuts_everywhere(&content);
    }

    #[test]
    fn a_tail_is_cut_again(content in content(20, 600), one in 0usize..20, two in 0usize..20) {
        let bytes = content.encode();
        let view = FrameView::parse(&bytes).unwrap();
        let seqs: Vec<_> = view.records().map(|record| record.seq).collect();
        let (one, two) = (one % seqs.len(), two % seqs.len());
        let (early, late) = (seqs[one.min(two)], seqs[one.max(two)]);
        let direct = cut::tail(&view, late);
        let by_steps = cut::tail(&view, early).and_then(|tail| {
            cut::tail(&FrameView::parse(&tail).unwrap(), late)
        });
        prop_assert_eq!(direct, by_steps);
    }
}

#[test]
fn the_whole_frame_reads_as_its_content() {
    // The helper that the tests above rest on fails when a payload differs.
    let content = Content {
        items: vec![(
            tidemark_journal::Record {
                kind: tidemark_journal::Kind::Write,
                flags: 0,
                volume: tidemark_journal::VolumeId(0),
                seq: Seq(9),
                time_ns: 5,
                start: tidemark_journal::Sector(0),
                sectors: 1,
            },
            vec![3; 512],
        )],
        before: Position { term: TERM, seq: Seq(8) },
        wall_ns: 0,
        compression: tidemark_journal::Compression::Off,
    };
    let mut other = content.clone();
    assert_reads_as(&content.encode(), &other);
    other.items[0].1[511] = 4;
    let reads = std::panic::catch_unwind(|| assert_reads_as(&content.encode(), &other));
    assert!(reads.is_err());
}
