//! Every write once, in an order that its users could have seen, and the disks as of any of them.

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use tidemark_journal::Seq;
use tidemark_tests::journal;
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::history::History;
use tidemark_tests::workload::order::{self, Part};
use tidemark_tests::workload::rng::Rng;
use tidemark_tests::workload::{self, Action, Operation, Shape};

const MIB: u64 = 1 << 20;
const SIZES_BYTES: [u64; 2] = [256 * MIB, 256 * MIB];
const DEPTH: usize = 32;
const POSITIONS: usize = 500;
/// Of the positions, how many are read from the first byte to the last.
const WHOLE_POSITIONS: usize = 4;

#[test]
fn the_journal_is_the_users_order_and_every_position_is_its_model() -> Result<()> {
    let mut plan = Plan::new(&SIZES_BYTES);
    // All of the load fits, so that a slow machine finds no gap.
    plan.ring_bytes = 768 * MIB;
    plan.target_tables = "[store]\nsegment = \"32 MiB\"\n".to_owned();
    let site = Site::started(plan)?;
    site.wait_in_sync()?;
    let disks = [site.disk(0, 2)?, site.disk(1, 2)?];
    let start = site.mark("the start")?;

    let block_bytes = site.open_front(0)?.info().block_sizes.minimum;
    let shape = Shape {
        seed: 20_261_123,
        operations: 20_000,
        sizes_bytes: SIZES_BYTES.to_vec(),
        block_bytes: u64::from(block_bytes),
        blocks_max: 64 * 1024 / u64::from(block_bytes),
        zeroes_percent: 8,
        discards_percent: 8,
        flushes_percent: 4,
        hot_bytes: 4 * MIB,
    };
    let mut operations = shape.operations()?;
    widen_clears(&mut operations);
    let never = AtomicBool::new(false);
    let log = workload::run(&[&disks[0], &disks[1]], &operations, DEPTH, &never);
    ensure!(log.error().is_none(), "{:?}", log.error());
    ensure!(log.entries.len() == operations.len(), "a part of the load was left out");
    site.wait_in_sync()?;
    let status = site.status()?;
    ensure!(status.gaps_total == 0, "the load was to fit the ring: {status:#?}");

    // The order is the users'.
    let logged = journal::of_load(&site.log_dir(), Seq(start))?;
    let records: Vec<order::Record> = logged.iter().map(|(_, record)| *record).collect();
    let parts = order::of_journal(&log, &records)?;
    ensure!(in_parts(&operations, &parts) > 100, "hardly any operation was split");
    let overlaps = overlaps_in_flight(&log);
    ensure!(overlaps > 500, "only {overlaps} operations overlapped another in flight");

    // So it is the model.
    let model = History::of_parts(&SIZES_BYTES, &operations, &parts);
    let newest = status.position.seq.0;
    let mut rng = Rng::new(500);
    for number in 0..POSITIONS {
        let seq = start + rng.below(newest - start + 1);
        let step = logged.partition_point(|(of, _)| of.0 <= seq);
        let disk = usize::try_from(rng.below(2))?;
        let size = SIZES_BYTES[disk];
        let (offset, length) = if number < WHOLE_POSITIONS {
            (0, size)
        } else {
            let length = (1 + rng.below(4 * MIB / 512)) * 512;
            // Half where most is written.
            let within = if rng.below(2) == 0 { 16 * MIB } else { size };
            (rng.below((within - length) / 512 + 1) * 512, length)
        };
        let name = format!("/v{disk}@seq:{seq}");
        let export = site.open_export(&name).with_context(|| name.clone())?;
        ensure!(export.info().size == size);
        let content = site.read(&export, offset, length).with_context(|| name.clone())?;
        let difference = model.difference(disk, step, offset, &content);
        ensure!(difference.is_none(), "{name} from byte {offset} on: {}", difference.unwrap());
    }

    // And at its end it is both disks.
    site.check_end(&model)
}

/// Makes one zero or discard in fifty tens of megabytes long.
fn widen_clears(operations: &mut [Operation]) {
    let mut rng = Rng::new(50);
    let mut taken = HashSet::new();
    for Operation { disk, action } in operations {
        let (Action::Zero { offset_bytes, length_bytes }
        | Action::Discard { offset_bytes, length_bytes }) = action
        else {
            continue;
        };
        if rng.below(50) != 0 {
            continue;
        }
        // At offsets that no other of them has, nor (being beyond the longest) any of the shape's parts.
        let length = 40 * MIB + rng.below(60 * MIB / 512) * 512;
        let offset = rng.below((SIZES_BYTES[*disk] - length) / 512) * 512;
        let ranges = order::clear_ranges((offset, length));
        if ranges.iter().all(|(_, length)| *length > 64 << 10)
            && ranges.iter().all(|range| !taken.contains(&(*disk, *range)))
        {
            taken.extend(ranges.into_iter().map(|range| (*disk, range)));
            (*offset_bytes, *length_bytes) = (offset, length);
        }
    }
}

fn in_parts(operations: &[Operation], parts: &[Part]) -> usize {
    parts
        .iter()
        .filter(|part| part.action.range() != operations[part.number].action.range())
        .count()
}

/// Operations whose range overlaps that of one that was under way at their submission.
fn overlaps_in_flight(log: &workload::Log) -> usize {
    let mut under_way: Vec<&workload::Entry> = Vec::new();
    let mut by_submission: Vec<&workload::Entry> = log.entries.iter().collect();
    by_submission.sort_by_key(|entry| entry.submitted.event);
    let mut count = 0;
    for entry in by_submission {
        let now = entry.submitted.event;
        under_way.retain(|other| other.acknowledged.is_some_and(|moment| moment.event > now));
        let overlaps = |other: &&workload::Entry| {
            let (Some((a, a_length)), Some((b, b_length))) =
                (entry.operation.action.range(), other.operation.action.range())
            else {
                return false;
            };
            let same = entry.operation.disk == other.operation.disk;
            same && a < b + b_length && b < a + a_length
        };
        count += usize::from(under_way.iter().any(overlaps));
        under_way.push(entry);
    }
    count
}
