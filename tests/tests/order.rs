//! Write A to one disk, after its acknowledgement B to another: no point has B without A.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::disk::{Buffer, Disk};
use tidemark_tests::workload::rng::Rng;
use tidemark_tests::workload::{self, Shape};

const MIB: u64 = 1 << 20;
/// What the other load uses of each disk; the tags lie behind it.
const LOAD_BYTES: u64 = 48 * MIB;
const PAIRS: u64 = 5000;
const POSITIONS: u64 = 1000;
/// A tag is written to each of these blocks in turn.
const BLOCKS: u64 = 32;
const BLOCK_BYTES: u64 = 4096;

#[test]
fn no_point_has_an_effect_without_its_cause() -> Result<()> {
    let mut plan = Plan::new(&[64 * MIB, 64 * MIB]);
    plan.ring_bytes = 768 * MIB;
    let site = Site::started(plan)?;
    site.wait_in_sync()?;
    let start = site.mark("the start")?;
    let disks = [site.disk(0, 1)?, site.disk(1, 1)?];
    let load_disks = [site.disk(0, 1)?, site.disk(1, 1)?];

    let shape = Shape {
        seed: 3,
        operations: 40_000,
        sizes_bytes: vec![LOAD_BYTES, LOAD_BYTES],
        block_bytes: 4096,
        blocks_max: 4,
        zeroes_percent: 10,
        discards_percent: 5,
        flushes_percent: 5,
        hot_bytes: MIB,
    };
    let operations = shape.operations()?;
    let stop = AtomicBool::new(false);
    let log = std::thread::scope(|scope| {
        let load = scope
            .spawn(|| workload::run(&[&load_disks[0], &load_disks[1]], &operations, 16, &stop));
        let paired = write_pairs(&disks);
        stop.store(true, Ordering::Relaxed);
        let log = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        paired.map(|()| log)
    })?;
    ensure!(log.error().is_none(), "{:?}", log.error());
    ensure!(log.entries.len() > 1000, "there was hardly any other load: {}", log.entries.len());
    site.wait_in_sync()?;
    let status = site.status()?;
    ensure!(status.gaps_total == 0, "the load was to fit the ring: {status:#?}");

    let newest = status.position.seq.0;
    let mut rng = Rng::new(4);
    let mut between = 0;
    for _ in 0..POSITIONS {
        let seq = start + rng.below(newest - start + 1);
        let mut counts = [0; 2];
        for (disk, count) in counts.iter_mut().enumerate() {
            let name = format!("/v{disk}@seq:{seq}");
            let export = site.open_export(&name).with_context(|| name.clone())?;
            let tags = site.read(&export, LOAD_BYTES, BLOCKS * BLOCK_BYTES)?;
            *count = pairs_in(&tags).with_context(|| name)?;
        }
        let [causes, effects] = counts;
        ensure!(
            causes == effects || causes == effects + 1,
            "@seq:{seq} has {causes} causes and {effects} effects"
        );
        between += u64::from(causes != effects);
    }
    // So the positions were fine enough to see it.
    ensure!(
        between > POSITIONS / 50,
        "only {between} positions lay between a cause and its effect"
    );
    ensure!(pairs_at(&site, newest)? == [PAIRS, PAIRS]);
    Ok(())
}

fn pairs_at(site: &Site, seq: u64) -> Result<[u64; 2]> {
    let mut counts = [0; 2];
    for (disk, count) in counts.iter_mut().enumerate() {
        let export = site.open_export(&format!("/v{disk}@seq:{seq}"))?;
        *count = pairs_in(&site.read(&export, LOAD_BYTES, BLOCKS * BLOCK_BYTES)?)?;
    }
    Ok(counts)
}

fn write_pairs(disks: &[impl Disk; 2]) -> Result<()> {
    let mut buffer = Buffer::default();
    for pair in 0..PAIRS {
        let at = LOAD_BYTES + pair % BLOCKS * BLOCK_BYTES;
        let block = buffer.bytes(BLOCK_BYTES);
        for word in block.chunks_mut(8) {
            word.copy_from_slice(&(pair + 1).to_le_bytes());
        }
        disks[0].write(at, block)?;
        disks[1].write(at, block)?;
    }
    Ok(())
}

/// How many pairs have written their tags, which are whole and without a hole.
fn pairs_in(tags: &[u8]) -> Result<u64> {
    let mut found = Vec::new();
    for block in tags.chunks(usize::try_from(BLOCK_BYTES)?) {
        let (first, rest) = block.split_at(8);
        ensure!(rest.chunks(8).all(|word| word == first), "a tag is torn");
        found.push(u64::from_le_bytes(first.try_into()?));
    }
    let count = found.iter().copied().max().unwrap_or_default();
    for (block, tag) in (0..).zip(found) {
        // The last of the tags up to `count` that went to this block.
        let ago = (count + BLOCKS - 1 - block) % BLOCKS;
        let expected = count.saturating_sub(ago);
        ensure!(tag == expected, "block {block} has tag {tag}, not {expected}, of {count}");
    }
    Ok(count)
}
