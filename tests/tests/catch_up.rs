//! The ring full again and again while writes go on: the application does not wait, the replica catches up by
//! itself, and every point outside the gaps is what it says.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tidemark_control::agent::Rung;
use tidemark_journal::{GapReason, Seq};
use tidemark_tests::journal::{Gap, Replay};
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::nbd::NbdDisk;
use tidemark_tests::workload::rng::Rng;
use tidemark_tests::workload::{self, Disk, Log, Shape};

const MIB: u64 = 1 << 20;
const SIZES_BYTES: [u64; 2] = [48 * MIB, 48 * MIB];
const ROUNDS: u64 = 4;

/// A point at a quiet moment, and the images as they were then.
struct Quiet {
    seq: u64,
    images: Vec<PathBuf>,
}

#[test]
fn a_ring_that_is_full_costs_a_gap_and_nothing_else() -> Result<()> {
    let mut plan = Plan::new(&SIZES_BYTES);
    plan.ring_bytes = 16 * MIB;
    plan.target_tables = "[store]\nsegment = \"16 MiB\"\n".to_owned();
    let mut site = Site::started(plan)?;
    site.wait_in_sync()?;
    let disks = [site.disk(0, 1)?, site.disk(1, 1)?];
    let mut quiet = vec![quiet_moment(&site, 0)?];
    for round in 1..=ROUNDS {
        overflow(&site, &disks, round)?;
        // More bursts while it catches up, and while the link is slow now and then.
        let stop = AtomicBool::new(false);
        let log = std::thread::scope(|scope| {
            let load = scope.spawn(|| bursts(&disks, 100 + round, &stop));
            for _ in 0..4 {
                std::thread::sleep(Duration::from_millis(300));
                site.network().stall(true);
                std::thread::sleep(Duration::from_millis(200));
                site.network().stall(false);
            }
            stop.store(true, Ordering::Relaxed);
            load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?
        })?;
        ensure!(!log.entries.is_empty() && log.error().is_none(), "{:?}", log.error());
        site.wait_in_sync()?;
        quiet.push(quiet_moment(&site, round)?);
    }
    let newest = site.status()?.position.seq;
    // Nothing moves any more; points are served without the source.
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    judge(&site, &quiet, newest)
}

/// Writes more than the ring holds while nothing at all gets through. All of it is acknowledged meanwhile.
fn overflow(site: &Site, disks: &[NbdDisk; 2], round: u64) -> Result<()> {
    site.network().stall(true);
    // What was read before the stall may still be passed on.
    std::thread::sleep(Duration::from_millis(50));
    let (forwarded, gaps) = (site.network().forwarded_bytes(), site.status()?.gaps_total);
    let log = workload::run(
        &[&disks[0], &disks[1]],
        &shape(round, 1500).operations()?,
        16,
        &AtomicBool::new(false),
    );
    ensure!(log.entries.len() == 1500 && log.error().is_none(), "{:?}", log.error());
    let status = site.status()?;
    ensure!(site.network().forwarded_bytes() == forwarded, "the link was not stalled");
    ensure!(status.rung == Rung::Gap, "the ring took all of it: {status:#?}");
    ensure!(status.gaps_total > gaps, "no gap was counted: {status:#?}");
    site.network().stall(false);
    Ok(())
}

fn shape(seed: u64, operations: usize) -> Shape {
    Shape {
        seed,
        operations,
        sizes_bytes: SIZES_BYTES.to_vec(),
        block_bytes: 4096,
        blocks_max: 48,
        zeroes_percent: 5,
        discards_percent: 5,
        flushes_percent: 3,
        hot_bytes: 8 * MIB,
    }
}

/// Short loads with pauses, until told to stop.
fn bursts(disks: &[NbdDisk; 2], seed: u64, stop: &AtomicBool) -> Result<Log> {
    let mut all = Log::default();
    for burst in 0.. {
        let operations = shape(seed * 1000 + burst, 200).operations()?;
        let log = workload::run(&[&disks[0] as &dyn Disk, &disks[1]], &operations, 8, stop);
        all.entries.extend(log.entries);
        if stop.load(Ordering::Relaxed) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(all)
}

/// Sets a mark and copies the images, while nothing is written and nothing on its way.
fn quiet_moment(site: &Site, round: u64) -> Result<Quiet> {
    let seq = site.mark(&format!("round {round}"))?;
    let mut images = Vec::new();
    for volume in 0..SIZES_BYTES.len() {
        let copy = site.dir().join(format!("v{volume}.round-{round}"));
        std::fs::copy(site.image(volume), &copy)?;
        images.push(copy);
    }
    site.wait_in_sync()?;
    Ok(Quiet { seq, images })
}

fn judge(site: &Site, quiet: &[Quiet], newest: Seq) -> Result<()> {
    let mut replay = Replay::read(&site.log_dir(), &SIZES_BYTES)?;
    let mut overflows = 0;
    let mut positions: Vec<u64> = quiet.iter().map(|quiet| quiet.seq).collect();
    for volume in 0..SIZES_BYTES.len() {
        let gaps = replay.gaps(volume);
        ensure!(gaps.iter().all(|gap| gap.end.is_some()), "a gap never ended: {gaps:?}");
        ensure!(gaps[0].reason == GapReason::FirstSync, "{gaps:?}");
        ensure!(gaps[1..].iter().all(|gap| gap.reason == GapReason::Overflow), "{gaps:?}");
        overflows += gaps.len() - 1;
        for Gap { begin, end, .. } in &gaps[1..] {
            // Their edges, from both sides.
            let end = end.map_or(begin.0, |end| end.0);
            positions.extend([begin.0 - 1, begin.0, end - 1, end]);
        }
    }
    ensure!(overflows as u64 >= ROUNDS, "only {overflows} gaps");
    let mut rng = Rng::new(9);
    positions.extend((0..200).map(|_| 1 + rng.below(newest.0)));
    positions.push(newest.0);
    positions.sort_unstable();
    positions.dedup();

    let (mut good, mut refused) = (0, 0);
    for seq in positions {
        let in_gap: Vec<bool> =
            (0..SIZES_BYTES.len()).map(|volume| replay.in_gap(volume, Seq(seq))).collect();
        let contents = replay.advance(Seq(seq))?;
        let quiet = quiet.iter().find(|quiet| quiet.seq == seq);
        for (volume, content) in contents.iter().enumerate() {
            let name = format!("/v{volume}@seq:{seq}");
            let opened = site.open_export(&name);
            if in_gap[volume] {
                let sentence = match opened {
                    Ok(_) => anyhow::bail!("{name} is inside a gap and was served"),
                    Err(error) => format!("{error:#}"),
                };
                let says = |word: &str| sentence.contains(word);
                ensure!(says("gap") && says("nearest good points"), "{name}: {sentence}");
                let reasons = [GapReason::FirstSync, GapReason::Overflow].map(GapReason::describe);
                ensure!(reasons.into_iter().any(says), "{name}: {sentence}");
                refused += 1;
                continue;
            }
            let export = opened.with_context(|| name.clone())?;
            let (offset, length) = if quiet.is_some() || seq == newest.0 {
                (0, SIZES_BYTES[volume])
            } else {
                let length = (1 + rng.below(1024)) * 4096;
                (rng.below((SIZES_BYTES[volume] - length) / 4096 + 1) * 4096, length)
            };
            let served = site.read(&export, offset, length).with_context(|| name.clone())?;
            let range = usize::try_from(offset)?..usize::try_from(offset + length)?;
            ensure!(served == content[range], "{name} is not what its journal makes of it");
            if let Some(quiet) = quiet {
                let image = std::fs::read(&quiet.images[volume])?;
                ensure!(served == image, "{name} is not the disk as it was");
            }
            if seq == newest.0 {
                ensure!(served == std::fs::read(site.image(volume))?, "{name} is not the disk");
            }
            good += 1;
        }
    }
    println!("{overflows} gaps; {good} points good, {refused} refused");
    ensure!(good > 20 && refused > 20, "{good} points were good and {refused} refused");
    Ok(())
}
