use tidemark_journal::{Compression, FrameBuilder, FrameMeta, GroupId, Sector};

use super::*;

const VOLUME: VolumeId = VolumeId(0);

/// A frame of records of one term, after a position.
fn frame(term: u8, before: Position, kinds: &[Kind]) -> Vec<u8> {
    let mut builder = FrameBuilder::new(Compression::Off);
    // A new term begins above what was reserved.
    let first = if before.term == TermId([term; 16]) { before.seq.0 } else { before.seq.0 + 100 };
    for (seq, kind) in (first + 1..).zip(kinds) {
        let record = Record {
            kind: *kind,
            flags: if *kind == Kind::GapBegin { GapReason::Crash as u8 } else { 0 },
            volume: VOLUME,
            seq: Seq(seq),
            time_ns: seq,
            start: Sector(0),
            sectors: if *kind == Kind::Zero { 8 } else { 0 },
        };
        builder.push(&record, [&[][..]]);
    }
    let term = TermId([term; 16]);
    let meta = FrameMeta { group: GroupId([7; 16]), term, before, wall_ns: 0 };
    builder.finish(&meta).to_vec()
}

fn extend(history: &mut History, frame: &[u8]) -> Position {
    history.extend(&FrameView::parse(frame).expect("a frame"));
    history.end
}

fn history() -> History {
    let mut history = History::default();
    let hello = VolumeHello {
        id: VOLUME,
        name: "disk".to_owned(),
        sectors: 64,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
    };
    history.announce(&[hello]);
    let root = Position { term: TermId([1; 16]), seq: Seq::ZERO };
    extend(&mut history, &frame(1, root, &[Kind::GapEnd, Kind::Zero, Kind::Zero, Kind::Zero]));
    history
}

/// The last two records were lost to damage; the source compares everything in a new term. Names of
/// the lost positions, and of what was reserved and never came, once gave the state before them.
#[test]
fn what_is_skipped_is_in_the_gap_that_follows() {
    let mut history = history();
    let whole = history.end;
    let kept = Position { seq: Seq(2), ..whole };
    history.truncate(kept, 0);
    // The begin comes alone, and the rest of the term after it.
    let begun = extend(&mut history, &frame(2, whole, &[Kind::GapBegin]));
    let end = extend(&mut history, &frame(2, begun, &[Kind::Zero, Kind::GapEnd]));
    let volume = &history.volumes[0];
    assert!(volume.gap_at(kept.seq).is_none(), "what was kept is good");
    assert!((3..end.seq.0).all(|seq| volume.gap_at(Seq(seq)).is_some()), "what was lost is not");
    assert!(volume.gap_at(end.seq).is_none());
}

#[test]
fn what_goes_on_exactly_skips_nothing() {
    let mut history = history();
    let end = history.end;
    extend(&mut history, &frame(1, end, &[Kind::Zero, Kind::GapBegin]));
    let volume = &history.volumes[0];
    assert!(volume.gap_at(Seq(5)).is_none() && volume.gap_at(Seq(6)).is_some());
    // A gap that begins later, in a term that skipped something, begins where it says.
    let end = history.end;
    let skipping = [Kind::GapEnd, Kind::Zero, Kind::GapBegin];
    let last = extend(&mut history, &frame(2, end, &skipping));
    let volume = &history.volumes[0];
    assert!(volume.gap_at(Seq(last.seq.0 - 1)).is_none() && volume.gap_at(last.seq).is_some());
}
