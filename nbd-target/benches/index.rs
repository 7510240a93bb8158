//! The index of a segment: taking a frame in, and finding what a range reads as.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, FrameView, GroupId, Kind, Position, Record, Sector, Seq,
    TermId, VolumeId,
};
use tidemark_target::store::index::{MemoryIndex, lookup::Query};

const WRITES: u64 = 64;
const TERM: TermId = TermId([7; 16]);
const VOLUME: VolumeId = VolumeId(1);

/// A frame of 64 writes of 4 KiB at random places of 8 GiB.
fn frame(builder: &mut FrameBuilder, number: u64) -> Vec<u8> {
    let first = number * WRITES + 1;
    for seq in first..first + WRITES {
        let block = seq.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 43;
        let (start, sectors) = (Sector(block * 8), 8);
        let time_ns = seq * 1000;
        let record = Record {
            kind: Kind::Write,
            flags: 0,
            volume: VOLUME,
            seq: Seq(seq),
            time_ns,
            start,
            sectors,
        };
        builder.push(&record, [&[seq as u8; 4096][..]]);
    }
    let before = Position { term: TERM, seq: Seq(first - 1) };
    let about = FrameMeta { group: GroupId([1; 16]), term: TERM, before, wall_ns: 1_800_000_000 };
    builder.finish(&about).to_vec()
}

fn index(criterion: &mut Criterion) {
    let mut builder = FrameBuilder::new(Compression::Off);
    let mut full = MemoryIndex::default();
    let frames = 4096;
    let mut at = 4096;
    for number in 0..frames {
        let frame = frame(&mut builder, number);
        full.insert(&FrameView::parse(&frame).expect("a frame"), at);
        at += (frame.len() as u64).next_multiple_of(4096);
    }
    let one = frame(&mut builder, frames);
    let mut group = criterion.benchmark_group("index in memory, 262,144 writes in it");
    group.throughput(Throughput::Elements(WRITES));
    group.bench_function("a frame of 64 writes goes into an empty one", |bench| {
        let view = FrameView::parse(&one).expect("a frame");
        bench.iter_batched_ref(
            MemoryIndex::default,
            |index| index.insert(black_box(&view), 4096),
            BatchSize::SmallInput,
        );
    });
    group.throughput(Throughput::Elements(1));
    for (name, sectors) in [("4 KiB", 8), ("1 MiB", 2048)] {
        let mut place = 0u64;
        group.bench_function(format!("lookup of {name} at the newest point"), |bench| {
            bench.iter(|| {
                place = place.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let start = (place >> 43) * 8;
                let query =
                    Query { volume: VOLUME, start, end: start + sectors, at: Seq(frames * WRITES) };
                let mut found = 0;
                full.find(black_box(&query), |_, _| found += 1);
                found
            });
        });
    }
}

criterion_group!(all, index);
criterion_main!(all);
