//! A protected ublk device with live replication to a second guest, against `rublk`'s plain loop on a disk of the same
//! kind, and such a disk itself.

use std::{env, fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tidemark_tests::{
    pair::{Pair, Plan},
    vm::Lab,
};

use crate::figures::{Bar, Bound, Comparison, in_turn};

const SIZE_BYTES: u64 = 512 << 20;
/// How long one measurement takes, after a second of warming up.
const SECONDS: u64 = 3;
const NAMES: [&str; 3] = ["protected", "rublk loop", "bare disk"];

/// What is measured: a name, fio's options, and the least ratio to rublk's loop.
const LOADS: [(&str, &str, f64); 4] = [
    ("4k random writes, depth 16", "--rw=randwrite --bs=4k --iodepth=16", 0.6),
    ("4k random writes, depth 1", "--rw=randwrite --bs=4k --iodepth=1", 0.7),
    ("1M sequential writes, depth 4", "--rw=write --bs=1M --iodepth=4", 0.7),
    ("4k random reads, depth 16", "--rw=randread --bs=4k --iodepth=16", 0.95),
];

/// Requests per second.
///
/// # Errors
/// There is no rublk; a guest that fails.
pub fn measure(rounds: usize, short: bool) -> Result<Vec<Comparison>> {
    let mut comparisons = Vec::new();
    Lab::run("speed", 2, |lab| {
        let mut plan = Plan::new(&[("data", SIZE_BYTES)]);
        plan.spare_disks = vec![("loop", SIZE_BYTES), ("bare", SIZE_BYTES)];
        plan.ring = "768 MiB";
        plan.group_lines = "compression = \"off\"".to_owned();
        plan.memory_mib = 2048;
        plan.store_bytes = 64 << 30;
        let rounds = if short { 1 } else { rounds };
        Pair::run(lab, plan, |pair| {
            comparisons = run(pair, rounds)?;
            Ok(())
        })
    })?;
    Ok(comparisons)
}

fn run(pair: &Pair, rounds: usize) -> Result<Vec<Comparison>> {
    let source = &pair.source;
    source.copy_in(&rublk()?, "/usr/bin/rublk")?;
    let raw = pair.raw_disk("loop");
    let before = source.sh("ls /dev | grep ublkb")?;
    source.sh(&format!("rublk add loop -f {raw} -q 1 -d 64"))?;
    source.sh("udevadm settle")?;
    let after = source.sh("ls /dev | grep ublkb")?;
    let device = after.lines().find(|name| !before.lines().any(|other| other == *name));
    let rublk = format!("/dev/{}", device.context("rublk made no device")?);
    let devices = [pair.device("data"), rublk, pair.raw_disk("bare")];
    // All content there, on both sides: from then on nothing is allocated anew.
    for device in &devices {
        let fill =
            format!("dd if=/dev/urandom of={device} bs=1M oflag=direct count=512 status=none");
        source.spawn_for(&fill, Duration::from_secs(600))?.wait()?;
    }
    pair.wait_in_sync()?;

    let mut comparisons = Vec::new();
    for (what, options, at_least) in LOADS {
        let rounds = in_turn(devices.len(), rounds, |which| {
            let rate = fio(pair, &devices[which], options)?;
            // What is still on its way must not cost the next one.
            pair.wait_in_sync()?;
            Ok(rate)
        })?;
        comparisons.push(Comparison {
            what: format!("{what}, with live replication"),
            unit: "1/s",
            names: NAMES.map(str::to_owned).to_vec(),
            rounds,
            bars: vec![Bar::ratio(0, 1, Bound::AtLeast(at_least)), Bar::printed(0, 2)],
        });
    }
    println!("gaps begun: {}", pair.status()?.gaps_total);
    Ok(comparisons)
}

fn fio(pair: &Pair, device: &str, options: &str) -> Result<f64> {
    let text = pair.source.sh(&format!(
        "fio --name=load --filename={device} --direct=1 --ioengine=libaio {options} --norandommap \
         --randrepeat=0 --time_based --ramp_time=1 --runtime={SECONDS} --output-format=json"
    ))?;
    let start = text.find('{').context("fio printed no JSON")?;
    let report: Value = serde_json::from_str(&text[start..])?;
    let rate = |kind: &str| report["jobs"][0][kind]["iops"].as_f64().unwrap_or(0.0);
    Ok(rate("write") + rate("read"))
}

fn rublk() -> Result<PathBuf> {
    let named = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo/bin/rublk"));
    let path = named.context("HOME is not set")?;
    ensure!(fs::exists(&path)?, "no {}: run 'cargo install rublk --locked'", path.display());
    Ok(path)
}
