use std::{collections::BTreeSet, io};

use proptest::prelude::*;
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, FrameView, GroupId, Kind, Position, Record, SECTOR_BYTES,
    Sector, Seq, TermId,
};

use super::*;
use crate::{
    machine::Machine,
    store::{
        index::MemoryIndex,
        segment::{Caches, Summary},
    },
};

const SECTORS: u64 = 512;

#[derive(Clone, Debug)]
struct Op {
    kind: Kind,
    start: u64,
    sectors: u64,
    byte: u8,
}

fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    let kind = prop_oneof![
        6 => Just(Kind::Write),
        2 => Just(Kind::Zero),
        1 => Just(Kind::Discard),
        1 => Just(Kind::Unreadable)
    ];
    let length = prop_oneof![1u64..=3, Just(8), 8u64..=40, 200u64..=500];
    let op = (kind, 0..SECTORS, length, 1u8..=255).prop_map(|(kind, start, sectors, byte)| {
        let aligned = sectors % 8 == 0;
        let start = if aligned { start / 8 * 8 } else { start };
        Op { kind, start, sectors: sectors.min(SECTORS - start), byte }
    });
    prop::collection::vec(op, 1..most)
}

/// What a segment says of each sector: nothing, unknown, or a byte.
type Said = Vec<Option<Option<u8>>>;
/// What the base holds of each sector: a byte, or nothing if it is unknown.
type Held = Vec<Option<u8>>;

fn said(ops: &[Op]) -> Said {
    let mut said = vec![None; SECTORS as usize];
    for op in ops {
        let value = match op.kind {
            Kind::Write => Some(op.byte),
            Kind::Unreadable => None,
            _ => Some(0),
        };
        said[op.start as usize..(op.start + op.sectors) as usize].fill(Some(value));
    }
    said
}

/// A sector is known or not by itself, whatever becomes of the others in its block.
fn folded(held: &Held, said: &Said) -> Held {
    held.iter().zip(said).map(|(held, said)| said.unwrap_or(*held)).collect()
}

/// A segment in a file, with these records.
fn segment(dir: &std::path::Path, number: u64, before: Seq, ops: &[Op]) -> Arc<Segment> {
    let mut builder = FrameBuilder::new(Compression::Off);
    let term = TermId([1; 16]);
    for (n, op) in ops.iter().enumerate() {
        let record = Record {
            kind: op.kind,
            flags: 0,
            volume: VolumeId(0),
            seq: Seq(before.0 + 1 + n as u64),
            time_ns: n as u64,
            start: Sector(op.start),
            sectors: op.sectors as u32,
        };
        builder.push(&record, [vec![op.byte; record.payload_bytes() as usize].as_slice()]);
    }
    let before = Position { term, seq: before };
    let frame =
        builder.finish(&FrameMeta { group: GroupId([2; 16]), term, before, wall_ns: 0 }).to_vec();
    let path = dir.join(format!("{number}.seg"));
    std::fs::write(&path, &frame).expect("written");
    let view = FrameView::parse(&frame).expect("a frame");
    let caches = Caches::new(16, 16);
    let segment =
        Segment::open(path, number, Summary::empty(before), MemoryIndex::default(), &caches);
    segment.publish(&view, 0, frame.len() as u64, 0);
    Arc::new(segment)
}

type Rows = BTreeMap<VolumeId, BaseRow>;

/// A base without damage.
fn open(dir: &std::path::Path, rows: &Rows) -> Base {
    let (base, damage) = Base::open(&Machine::Real, dir, GroupId([2; 16]), rows).expect("opened");
    assert_eq!(damage, Vec::<String>::new());
    base
}

/// A whole fold, with what its caller does after it. Gives the damage.
fn fold_whole(base: &Base, segment: &Arc<Segment>, rows: &mut Rows) -> Vec<String> {
    let folded = fold(base, segment, |_| Ok(())).expect("folded");
    rows.extend(&folded.rows);
    base.committed(&folded.rows);
    folded.damage
}

/// Reads sector by sector: a byte, or nothing where it is unknown.
fn reads(base: &Base, above: Option<&Arc<Segment>>) -> Held {
    let sector = |sector| {
        let query =
            Query { volume: VolumeId(0), start: sector, end: sector + 1, at: Seq(u64::MAX) };
        let mut plan = Plan::new(query);
        plan.ask(above, Seq(u64::MAX)).expect("asked");
        let (pieces, rest) = plan.into_pieces();
        let mut out = vec![0; SECTOR_BYTES as usize];
        let mut read = read::fill(&pieces, sector, &mut out);
        if read.is_ok() && !rest.is_empty() {
            read = base.read(VolumeId(0), sector, sector + 1, &mut out);
        }
        match read {
            Ok(()) => {
                assert_eq!(out, vec![out[0]; 512], "sector {sector} is torn");
                Some(out[0])
            }
            Err(crate::store::ReadError::Unreadable { .. }) => None,
            Err(error) => panic!("sector {sector}: {error}"),
        }
    };
    (0..SECTORS).map(sector).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A crash at any step, with blocks torn where they were being written: what is above the base
    /// hides it, and folding again gives the right state.
    #[test]
    fn a_fold_can_be_cut_at_any_step(first in ops(30), second in ops(30), tear in 0u64..64) {
        let dir = tempfile::TempDir::new().expect("a directory");
        let one = segment(dir.path(), 0, Seq(0), &first);
        let two = segment(dir.path(), 1, Seq(first.len() as u64), &second);
        let old = folded(&vec![Some(0); SECTORS as usize], &said(&first));
        let above = said(&second);
        let new = folded(&old, &above);

        let mut steps = 0;
        let mut rows = Rows::new();
        let whole = open(&dir.path().join("whole"), &rows);
        fold_whole(&whole, &one, &mut rows);
        prop_assert_eq!(&reads(&whole, None), &old);
        fold(&whole, &two, |_| { steps += 1; Ok(()) }).expect("folded");
        prop_assert_eq!(&reads(&whole, None), &new);

        let mut seen = BTreeSet::new();
        for cut in 0..steps {
            let name = format!("cut-{cut}");
            let mut rows = Rows::new();
            let base = open(&dir.path().join(&name), &rows);
            fold_whole(&base, &one, &mut rows);
            let mut step = 0;
            let mut applying = false;
            let result = fold(&base, &two, |at| {
                step += 1;
                applying |= at == Step::RedoSynced;
                seen.insert(format!("{at:?}"));
                if step > cut { Err(io::Error::other("cut")) } else { Ok(()) }
            });
            prop_assert!(result.is_err());
            // The power went while a block that the second segment changes was being written.
            if applying {
                tear_block(&base, &two, &above, tear);
            }
            drop(base);
            let base = open(&dir.path().join(&name), &rows);
            let seen = reads(&base, Some(&two));
            for (n, seen) in seen.iter().enumerate() {
                match above[n] {
                    Some(said) => prop_assert_eq!(*seen, said),
                    None => prop_assert_eq!(*seen, old[n]),
                }
            }
            prop_assert_eq!(fold_whole(&base, &two, &mut rows), Vec::<String>::new());
            drop(base);
            prop_assert_eq!(&reads(&open(&dir.path().join(&name), &rows), None), &new);
        }
        prop_assert!(seen.contains("Begun") && seen.contains("Synced"));
    }
}

/// A reader that took the segments down before a fold finds in them what it looked for, also where
/// it had not opened them yet.
#[test]
fn who_holds_a_removed_segment_reads_it() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let ops = [Op { kind: Kind::Write, start: 0, sectors: 8, byte: 7 }];
    let held = segment(dir.path(), 0, Seq(0), &ops);
    held.remove().expect("removed");
    assert!(!held.path().exists());
    assert_eq!(held.chunk(0).expect("still there")[..512], [7; 512]);
}

/// The segment after the one that leaves was just begun: it ends where that one ends.
#[test]
fn a_segment_that_was_just_begun_stays() {
    use crate::store::journal::Journal;
    let dir = tempfile::TempDir::new().expect("a directory");
    let ops = [Op { kind: Kind::Write, start: 0, sectors: 8, byte: 7 }];
    let (one, caches) = (segment(dir.path(), 0, Seq(0), &ops), Caches::new(1, 1));
    let end = one.summary().last;
    let begun = Segment::open(
        dir.path().join("1.seg"),
        1,
        Summary::empty(end),
        MemoryIndex::default(),
        &caches,
    );
    let journal = Journal::new(GroupId([2; 16]), dir.path(), &caches, vec![one], end);
    journal.push(Arc::new(begun));
    let removed: Vec<u64> = journal.remove_through(0).iter().map(|s| s.number()).collect();
    let left: Vec<u64> = journal.segments().iter().map(|s| s.number()).collect();
    assert_eq!((removed, left), (vec![0], vec![1]));
    assert_eq!(journal.bytes(), journal.segments()[0].summary().data_bytes);
}

/// What is damaged in the log becomes unknown in the base, and nothing else does; the fold goes on.
#[test]
fn what_is_damaged_is_folded_as_unknown() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::TempDir::new().expect("a directory");
    let op = |start, sectors, byte| Op { kind: Kind::Write, start, sectors, byte };
    let first = [op(0, 16, 1), op(64, 16, 1)];
    // 128 KiB, so the next two are in a chunk of their own: a whole block and a part of one.
    let second = [op(128, 256, 2), op(0, 8, 3), op(65, 2, 3)];
    let one = segment(dir.path(), 0, Seq(0), &first);
    let two = segment(dir.path(), 1, Seq(2), &second);
    let file = std::fs::OpenOptions::new().write(true).open(two.path()).expect("opened");
    let end = file.metadata().expect("there").len();
    file.write_all_at(&[0xee; 16], end - 600).expect("damaged");
    let mut rows = Rows::new();
    let base = open(&dir.path().join("base"), &rows);
    fold_whole(&base, &one, &mut rows);
    let damage = fold_whole(&base, &two, &mut rows);
    assert!(damage.iter().any(|text| text.contains("checksum")), "{damage:?}");
    let read = reads(&base, None);
    for (n, read) in read.iter().enumerate() {
        let expected = match n {
            0..8 | 65..67 => None,
            8..16 | 64..80 => Some(1),
            128..384 => Some(2),
            _ => Some(0),
        };
        assert_eq!(*read, expected, "sector {n}");
    }
}

/// The redo file's removal is not durable by itself, so after a power cut it may be there again, as its fold
/// left it. That is of no harm: it holds nothing of an earlier fold, which would be redone over what
/// has changed since.
#[test]
fn what_an_earlier_fold_redid_is_not_redone_over_a_later_one() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let op = |start, sectors, byte| Op { kind: Kind::Write, start, sectors, byte };
    let segments = [
        segment(dir.path(), 0, Seq(0), &[op(0, 16, 1)]),
        // A part of a block, which is put together in the redo file.
        segment(dir.path(), 1, Seq(1), &[op(1, 2, 2)]),
        // All of that block, which needs no redo.
        segment(dir.path(), 2, Seq(2), &[op(0, 8, 3)]),
    ];
    let (base_dir, mut rows, mut redone) = (dir.path().join("base"), Rows::new(), Vec::new());
    for segment in &segments {
        let base = open(&base_dir, &rows);
        let (path, mut left) = (base.dir.join("fold.redo"), Vec::new());
        let folded = fold(&base, segment, |at| {
            if at == Step::Synced {
                left = std::fs::read(&path)?;
            }
            Ok(())
        })
        .expect("folded");
        rows.extend(&folded.rows);
        base.committed(&folded.rows);
        redone.push(!left.is_empty());
        std::fs::write(&path, left).expect("there again");
    }
    assert_eq!(redone, [false, true, false]);
    let read = reads(&open(&base_dir, &rows), None);
    for (n, read) in read.iter().enumerate() {
        let expected = match n {
            0..8 => 3,
            8..16 => 1,
            _ => 0,
        };
        assert_eq!(*read, Some(expected), "sector {n}");
    }
}

/// Damages a block that the second segment changes, as if it had been on its way to the disk. All
/// changes are one batch here, so from the moment its redo is durable that can be any of them.
fn tear_block(base: &Base, segment: &Arc<Segment>, above: &Said, tear: u64) {
    use std::os::unix::fs::FileExt;
    let Some(ranges) = touched(segment).expect("read").remove(&VolumeId(0)) else { return };
    let data = std::fs::OpenOptions::new().write(true).open(base.dir.join("00000.data"));
    let Ok(data) = data else { return };
    // Where all of a block becomes unknown, its sum says so and its bytes are not written.
    let known = |block: &u64| above[*block as usize * 8..][..8] != [Some(None); 8];
    let blocks: Vec<u64> = ranges.iter().flat_map(|(s, e)| s / 8..e / 8).filter(known).collect();
    let Some(block) = blocks.get(tear as usize % blocks.len().max(1)) else { return };
    data.write_all_at(&[0xee; 1000], block * BLOCK_BYTES).expect("torn");
}
