//! A frame of 64 writes of 4 KiB: how long it takes to make and to check one, of data that shrinks and of noise.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, FrameView, GroupId, Kind, Position, Record, Sector, Seq,
    TermId, VolumeId,
};

const WRITES: u64 = 64;
const BLOCK_BYTES: usize = 4096;

/// Blocks of which so many bytes are noise: half of them, as data often is, or all.
fn blocks(noise_bytes: usize) -> Vec<Vec<u8>> {
    let mut state = 1u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let block = |_| {
        let mut block = vec![0; BLOCK_BYTES];
        block[..noise_bytes].chunks_mut(8).for_each(|part| {
            part.copy_from_slice(&next().to_le_bytes());
        });
        block
    };
    (0..WRITES).map(block).collect()
}

fn encode(builder: &mut FrameBuilder, blocks: &[Vec<u8>]) -> Vec<u8> {
    for (seq, block) in (1..).zip(blocks) {
        let record = Record {
            kind: Kind::Write,
            flags: 0,
            volume: VolumeId(1),
            seq: Seq(seq),
            time_ns: seq * 1000,
            start: Sector(seq * 7919 % (1 << 21) * 8),
            sectors: 8,
        };
        builder.push(&record, [&block[..]]);
    }
    let term = TermId([7; 16]);
    let before = Position { term, seq: Seq(0) };
    let about = FrameMeta { group: GroupId([1; 16]), term, before, wall_ns: 1_800_000_000 };
    let frame = builder.finish(&about).to_vec();
    builder.clear();
    frame
}

fn frames(criterion: &mut Criterion) {
    let (half, noise) = (blocks(BLOCK_BYTES / 2), blocks(BLOCK_BYTES));
    for (name, compression, blocks) in [
        ("raw", Compression::Off, &half),
        ("zstd 1", Compression::Zstd(1), &half),
        ("zstd 1, noise", Compression::Zstd(1), &noise),
    ] {
        let mut group = criterion.benchmark_group(format!("frame of 64 writes, {name}"));
        group.throughput(Throughput::Elements(WRITES));
        let mut builder = FrameBuilder::new(compression);
        group.bench_function("encode", |bench| {
            bench.iter(|| encode(&mut builder, black_box(blocks)));
        });
        let frame = encode(&mut builder, blocks);
        group.bench_function("check", |bench| {
            bench.iter(|| FrameView::parse(black_box(&frame)).expect("a frame").records().len());
        });
        group.bench_function("check and unpack", |bench| {
            bench.iter(|| {
                let view = FrameView::parse(black_box(&frame)).expect("a frame");
                (0..view.records().len())
                    .map(|at| view.payload(at).expect("whole").len())
                    .sum::<usize>()
            });
        });
    }
}

criterion_group!(all, frames);
criterion_main!(all);
