//! What every captured write pays besides its copies and its I/O: the range lock and the dirty map.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use tidemark_agent::{
    capture::range_lock::{LockId, RangeLock},
    dirty::{
        RegionId,
        bitmap::{self, Bits},
        map::{DirtyMap, VolumeStart},
    },
};
use tidemark_journal::{Sector, Seq, VolumeId};

const VOLUME: VolumeId = VolumeId(1);

/// One more request beside so many that are under way.
fn range_lock(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("range lock, one write beside");
    for others in [0, 16, 128] {
        let mut lock = RangeLock::default();
        for id in 0..others {
            assert!(lock.acquire(LockId(id), Sector(u64::from(id) * 64), 8));
        }
        let mut granted = Vec::new();
        group.bench_function(others.to_string(), |bench| {
            bench.iter(|| {
                lock.acquire(LockId(u32::MAX), black_box(Sector(1 << 30)), 8);
                lock.release(LockId(u32::MAX), &mut granted);
            });
        });
    }
}

fn map(regions: u32) -> DirtyMap {
    let written = vec![0; bitmap::pages_in(regions) as usize];
    let (uncaptured, dirty) = (Bits::new(regions), Bits::new(regions));
    DirtyMap::new(
        [9; 16],
        0,
        0,
        vec![VolumeStart { id: VOLUME, regions, written, uncaptured, dirty }],
    )
}

/// A write into a region that is active, and one into a region that takes another's place.
fn dirty_map(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dirty map, one write");
    for (name, regions) in [("64 GiB", 1 << 16), ("8 TiB", 1 << 23)] {
        let mut map = map(regions);
        let mut seq = 0;
        let mut write = |map: &mut DirtyMap, index: u32| {
            let region = RegionId { volume: VOLUME, index };
            while !map.ready(region, region.start()) {
                let commit = map.begin_commit(Seq(seq)).expect("somebody waits");
                black_box(commit);
                map.commit_written();
            }
            seq += 1;
            map.hold(region);
            map.drawn(region, Seq(seq));
            map.release(region);
        };
        write(&mut map, 0);
        group.bench_function(format!("hot region of {name}"), |bench| {
            bench.iter(|| write(&mut map, 0));
        });
        let mut index = 0u32;
        group.bench_function(format!("cold region of {name}, a commit of its own"), |bench| {
            bench.iter(|| {
                index = (index + 7919) % regions;
                write(&mut map, index);
            });
        });
    }
}

criterion_group!(all, range_lock, dirty_map);
criterion_main!(all);
