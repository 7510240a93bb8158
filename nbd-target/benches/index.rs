//! The index of a segment: taking a frame in, and finding what a range reads as.

use std::{hint::black_box, io::Write};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, FrameView, GroupId, Kind, Position, Record, Sector, Seq,
    TermId, VolumeId,
};
use tidemark_target::{
    machine,
    store::index::{
        MemoryIndex, SealedIndex,
        lookup::Query,
        page::{PageCache, PageReader},
        sealed,
    },
};

const WRITES: u64 = 64;
const FRAMES: u64 = 4096;
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
    let frame = builder.finish(&about).to_vec();
    builder.clear();
    frame
}

/// Of 262,144 writes.
fn full(builder: &mut FrameBuilder) -> MemoryIndex {
    let mut full = MemoryIndex::default();
    let mut at = 4096;
    for number in 0..FRAMES {
        let frame = frame(builder, number);
        full.insert(&FrameView::parse(&frame).expect("a frame"), at);
        at += (frame.len() as u64).next_multiple_of(4096);
    }
    full
}

/// Asks for ranges all over the volume.
struct Queries {
    sectors: u64,
    place: u64,
}

impl Queries {
    /// Names of sizes, and queries of them.
    fn of_sizes() -> [(&'static str, Queries); 2] {
        [("4 KiB", 8), ("1 MiB", 2048)].map(|(name, sectors)| (name, Queries { sectors, place: 0 }))
    }

    fn next(&mut self) -> Query {
        self.place = self.place.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let start = (self.place >> 43) * 8;
        Query { volume: VOLUME, start, end: start + self.sectors, at: Seq(FRAMES * WRITES) }
    }
}

fn in_memory(criterion: &mut Criterion) {
    let mut builder = FrameBuilder::new(Compression::Off);
    let full = full(&mut builder);
    let one = frame(&mut builder, FRAMES);
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
    for (name, mut queries) in Queries::of_sizes() {
        group.bench_function(format!("lookup of {name} at the newest point"), |bench| {
            bench.iter(|| {
                let mut found = 0;
                full.find(black_box(&queries.next()), |_, _| found += 1);
                found
            });
        });
    }
}

/// Pages come from the target's cache of them, or from the file, which is in memory, and are checked.
fn sealed(criterion: &mut Criterion) {
    let index = full(&mut FrameBuilder::new(Compression::Off));
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&sealed::build(&index, 1, Seq::ZERO)).expect("written");
    let file = machine::File::Real(file);
    let mut group = criterion.benchmark_group("sealed index, 262,144 writes in it");
    for (pages, cached) in [("in the cache", 1 << 16), ("read", 1)] {
        let cache = PageCache::new(cached);
        let reader = PageReader { file: &file, file_id: 1, segment: 1, index_at: 0, cache: &cache };
        let index = SealedIndex::open(reader).expect("an index");
        for (name, mut queries) in Queries::of_sizes() {
            group.bench_function(format!("lookup of {name}, its pages {pages}"), |bench| {
                bench.iter(|| {
                    let mut found = 0;
                    let query = queries.next();
                    index.find(reader, black_box(&query), |_, _| found += 1).expect("good pages");
                    found
                });
            });
        }
    }
}

criterion_group!(all, in_memory, sealed);
criterion_main!(all);
