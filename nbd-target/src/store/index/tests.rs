//! Both forms of an index against a model of bytes, read as a plan does.

use std::sync::Arc;

use proptest::prelude::*;
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, FrameView, GroupId, Kind, Position, Record, Sector, Seq,
    TermId, VolumeId,
};

use super::*;
use crate::store::{
    read::{Plan, fill},
    segment::{Caches, Segment, Summary},
};

const SECTORS: u64 = 6000;

#[derive(Clone, Debug)]
struct Op {
    volume: u16,
    zeros: bool,
    start: u64,
    sectors: u64,
    byte: u8,
}

fn op() -> impl Strategy<Value = Op> {
    let length =
        prop_oneof![4 => Just(8u64), 2 => 1u64..=17, 1 => 100u64..=2048, 1 => 2049u64..6000];
    let place = prop_oneof![1 => 0..SECTORS, 3 => 0u64..64, 1 => 2000u64..2060];
    (0u16..2, prop::bool::weighted(0.3), place, length, 1u8..=255).prop_map(
        |(volume, zeros, start, sectors, byte)| {
            let room = if zeros { SECTORS - start } else { 2048 - start % 2048 };
            let sectors = sectors.min(room).min(SECTORS - start);
            Op { volume, zeros, start, sectors, byte }
        },
    )
}

fn segment(dir: &std::path::Path, number: u64, before: u64, ops: &[Op]) -> Segment {
    let mut builder = FrameBuilder::new(Compression::Zstd(1));
    let term = TermId([1; 16]);
    let path = dir.join(format!("{number}.seg"));
    let caches = Caches::new(8, 8);
    let start = Position { term, seq: Seq(before) };
    let open = Segment::open(path, number, Summary::empty(start), MemoryIndex::default(), &caches);
    let mut file = Vec::new();
    let mut last = before;
    for some in ops.chunks(7) {
        let about = FrameMeta {
            group: GroupId([2; 16]),
            term,
            before: Position { term, seq: Seq(last) },
            wall_ns: 0,
        };
        for op in some {
            last += 1;
            let record = Record {
                kind: if op.zeros { Kind::Zero } else { Kind::Write },
                flags: 0,
                volume: VolumeId(op.volume),
                seq: Seq(last),
                time_ns: last,
                start: Sector(op.start),
                sectors: op.sectors as u32,
            };
            builder.push(&record, [vec![op.byte; record.payload_bytes() as usize].as_slice()]);
        }
        let frame = builder.finish(&about).to_vec();
        builder.clear();
        let view = FrameView::parse(&frame).expect("a frame");
        open.publish(&view, file.len() as u64, (file.len() + frame.len()) as u64, 0);
        file.extend_from_slice(&frame);
    }
    file.resize(file.len().next_multiple_of(4096), 0);
    std::fs::write(open.path(), &file).expect("written");
    open
}

/// The same segment with its index on disk.
fn sealed(open: &Segment) -> Segment {
    let summary = open.summary();
    let at = std::fs::metadata(open.path()).expect("there").len();
    let mut file = std::fs::read(open.path()).expect("read");
    let pages = open.with_memory(|index| sealed::build(index, open.number(), summary.before.seq));
    file.extend_from_slice(&pages.expect("in memory"));
    let path = open.path().with_extension("sealed");
    std::fs::write(&path, &file).expect("written");
    Segment::sealed(path, open.number(), summary, at, &Caches::new(8, 8))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_form_reads_like_the_model(
        ops in prop::collection::vec(op(), 1..400),
        cut in 0.0f64..1.0,
        reads in prop::collection::vec((0u16..2, 0..SECTORS, 1u64..3000, 0.0f64..1.1), 1..12),
    ) {
        let dir = tempfile::TempDir::new().expect("a directory");
        let cut = (ops.len() as f64 * cut) as usize;
        let older = segment(dir.path(), 0, 0, &ops[..cut]);
        let newer = segment(dir.path(), 1, cut as u64, &ops[cut..]);
        let on_disk = [sealed(&newer), sealed(&older)].map(Arc::new);
        let in_memory = [newer, older].map(Arc::new);
        for (volume, start, length, at) in reads {
            let at = (ops.len() as f64 * at) as u64;
            let end = (start + length).min(SECTORS);
            let mut model = vec![0u8; SECTORS as usize];
            let mut known = vec![false; SECTORS as usize];
            for op in ops.iter().take(at as usize).filter(|op| op.volume == volume) {
                let range = op.start as usize..(op.start + op.sectors) as usize;
                model[range.clone()].fill(if op.zeros { 0 } else { op.byte });
                known[range].fill(true);
            }
            for sources in [&in_memory, &on_disk] {
                let query = Query { volume: VolumeId(volume), start, end, at: Seq(at) };
                let mut plan = Plan::new(query);
                plan.ask(sources, Seq(at)).expect("asked");
                let (pieces, rest) = plan.into_pieces();
                let mut out = vec![0; ((end - start) * 512) as usize];
                fill(&pieces, start, &mut out).expect("filled");
                let unknown = |s: u64| rest.iter().any(|(from, to)| (*from..*to).contains(&s));
                for sector in start..end {
                    prop_assert_eq!(unknown(sector), !known[sector as usize], "sector {}", sector);
                    let bytes = &out[((sector - start) * 512) as usize..][..512];
                    prop_assert!(bytes.iter().all(|b| *b == model[sector as usize]), "sector {}", sector);
                }
            }
        }
    }
}

/// Many versions of one block are skipped by one seek: an index of two levels of fences.
#[test]
fn a_hot_block_among_many_entries() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let hot = |n: u64| Op { volume: 0, zeros: false, start: 40, sectors: 1, byte: n as u8 };
    let cold = |n: u64| Op { volume: 0, zeros: true, start: n % SECTORS, sectors: 1, byte: 0 };
    let ops: Vec<Op> = (0..40_000).map(|n| if n % 2 == 0 { hot(n / 2) } else { cold(n) }).collect();
    let segment = Arc::new(sealed(&segment(dir.path(), 3, 100, &ops)));
    for n in [0u64, 1, 777, 19_999] {
        let at = Seq(101 + 2 * n);
        let mut plan = Plan::new(Query { volume: VolumeId(0), start: 40, end: 41, at });
        plan.ask([&segment], at).expect("asked");
        let (pieces, rest) = plan.into_pieces();
        let mut out = [0; 512];
        fill(&pieces, 40, &mut out).expect("filled");
        assert_eq!((out, rest), ([n as u8; 512], Vec::new()), "version {n}");
    }
}

/// A plan of the beginning says of it what one of everything says, and ends where there is too much left
/// to look for.
#[test]
fn a_plan_of_the_beginning_is_the_first_part_of_one_of_everything() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let ops = |first: u64, step: u64, byte| -> Vec<Op> {
        let starts = (first..SECTORS - 8).step_by(step as usize);
        starts.map(|start| Op { volume: 0, zeros: false, start, sectors: 8, byte }).collect()
    };
    let older = segment(dir.path(), 0, 0, &ops(8, 32, 1));
    let newer = segment(dir.path(), 1, 1000, &ops(0, 16, 2));
    let sources = [newer, older].map(Arc::new);
    let ranges = |mut plan: Plan| {
        plan.ask(&sources, Seq(5000)).expect("asked");
        let (pieces, rest) = plan.into_pieces();
        let mut all: Vec<(u64, u64, bool)> =
            pieces.iter().map(|piece| (piece.start, piece.end, true)).collect();
        all.extend(rest.iter().map(|(start, end)| (*start, *end, false)));
        all.sort_unstable();
        all
    };
    let query = Query { volume: VolumeId(0), start: 0, end: SECTORS, at: Seq(5000) };
    let (all, beginning) = (ranges(Plan::new(query)), ranges(Plan::of_beginning(query)));
    assert_eq!(beginning, all[..beginning.len()]);
    // 64 of the parts that the newer segment leaves, of which the older one has every other.
    assert_eq!(beginning.last().map(|(_, end, _)| *end), Some(64 * 16 + 8));
    assert_eq!(all.last().map(|(_, end, _)| *end), Some(SECTORS));
}

#[test]
fn the_index_of_4_kib_writes_is_below_one_hundredth() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let write =
        |n: u64| Op { volume: 0, zeros: false, start: n * 8 % SECTORS, sectors: 8, byte: 1 };
    let ops: Vec<Op> = (0..7_000).map(write).collect();
    let open = segment(dir.path(), 0, 0, &ops);
    let pages = open.with_memory(|index| sealed::build(index, 0, Seq(0))).expect("in memory");
    assert!(pages.len() * 100 < ops.len() * 4096, "{} bytes", pages.len());
    let (entries, chunks, frames) = open
        .with_memory(|i| (i.entries().len(), i.chunks().len(), i.frames().len()))
        .expect("in memory");
    assert!(pages.len() as u64 <= sealed::bytes_max(entries, chunks, frames));
}

/// A sealed index in a file.
fn sealed_file(pages: &[u8]) -> crate::machine::File {
    let mut file = tempfile::tempfile().expect("a file");
    std::io::Write::write_all(&mut file, pages).expect("written");
    crate::machine::File::Real(file)
}

/// An index of which every page bears its checksum and little else is right: the sum of its pages was beyond 32
/// bits, so was that of a chunk's page, whose number the index does not have, and a search never came past an entry
/// at the base, which no sequence is. All are errors.
#[test]
fn an_index_that_contradicts_itself_is_an_error() {
    let mut builder = FrameBuilder::new(Compression::Off);
    for seq in 1..=3 {
        let record = Record {
            kind: Kind::Zero,
            flags: 0,
            volume: VolumeId(1),
            seq: Seq(seq),
            time_ns: seq,
            start: Sector(seq * 100),
            sectors: 8,
        };
        builder.push(&record, []);
    }
    let about = FrameMeta {
        group: GroupId([2; 16]),
        term: TermId([1; 16]),
        before: Position::default(),
        wall_ns: 0,
    };
    let frame = builder.finish(&about).to_vec();
    let mut memory = MemoryIndex::default();
    memory.insert(&FrameView::parse(&frame).expect("a frame"), 4096);
    let good = sealed::build(&memory, 1, Seq::ZERO);
    let seal = |pages: &mut [u8]| {
        for page in pages.chunks_exact_mut(page::PAGE_BYTES) {
            let crc = tidemark_journal::checksum::crc64(&page[8..]);
            page[..8].copy_from_slice(&crc.to_le_bytes());
        }
    };
    let read = |pages: &[u8]| {
        let (file, cache) = (sealed_file(pages), page::PageCache::new(8));
        let reader =
            page::PageReader { file: &file, file_id: 1, segment: 1, index_at: 0, cache: &cache };
        let index = SealedIndex::open(reader)?;
        let query = Query { volume: VolumeId(1), start: 0, end: 1000, at: Seq(9) };
        index.chunk(reader, u32::MAX).expect_err("there is no such chunk");
        let mut found = 0;
        index.find(reader, &query, |_, _| found += 1)?;
        index.for_each(reader, |_, _| {}).map(|()| found)
    };
    assert_eq!(read(&good).expect("a good index"), 3);

    let mut pages = good.clone();
    let entry_pages_at = size_of::<page::PageHeader>() + 32;
    pages[entry_pages_at..entry_pages_at + 4].fill(0xff);
    seal(&mut pages);
    read(&pages).expect_err("more pages than can be numbered");

    pages[entry_pages_at..entry_pages_at + 4].copy_from_slice(&(u32::MAX - 4).to_le_bytes());
    seal(&mut pages);
    read(&pages).expect_err("pages that are not there");

    let mut pages = good;
    let rows_at = page::PAGE_BYTES + size_of::<page::PageHeader>();
    pages[rows_at + 8..rows_at + 14].fill(0);
    seal(&mut pages);
    read(&pages).expect_err("an entry at the base");
}
