//! First figures of the ublk front in a guest: a protected disk with live replication to a second guest, against
//! `rublk`'s plain loop on a disk of the same kind and such a disk itself. All is emulated: only the ratios
//! mean anything. Run by hand, on a machine that is idle otherwise:
//!
//! ```text
//! cargo install rublk --locked        # needs libclang-dev
//! cargo run --release -p tidemark-tests --bin guest-speed -- [ROUNDS [SECONDS]]
//! ```

use std::path::PathBuf;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tidemark_tests::pair::{Pair, Plan};
use tidemark_tests::vm::Lab;

const SIZE_BYTES: u64 = 512 << 20;

/// What is measured: a name and fio's options. Figures are requests per second.
const LOADS: [(&str, &str); 4] = [
    ("4k writes, depth 16", "--rw=randwrite --bs=4k --iodepth=16"),
    ("4k writes, depth 1", "--rw=randwrite --bs=4k --iodepth=1"),
    ("1M writes, depth 4", "--rw=write --bs=1M --iodepth=4"),
    ("4k reads, depth 16", "--rw=randread --bs=4k --iodepth=16"),
];

const NAMES: [&str; 3] = ["protected", "rublk", "bare"];

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let mut number = |usual: u64| arguments.next().map_or(Ok(usual), |text| text.parse());
    let rounds = usize::try_from(number(11)?)?;
    let seconds = number(3)?;
    ensure!(rounds > 0 && seconds > 0, "at least one round of one second");
    Lab::run("speed", 2, |lab| {
        let mut plan = Plan::new(&[("data", SIZE_BYTES)]);
        plan.spare_disks = vec![("loop", SIZE_BYTES), ("bare", SIZE_BYTES)];
        plan.ring = "768 MiB";
        plan.group_lines = "compression = \"off\"".to_owned();
        plan.memory_mib = 2048;
        plan.store_bytes = 64 << 30;
        Pair::run(lab, plan, |pair| measure(pair, rounds, seconds))
    })
}

fn measure(pair: &Pair, rounds: usize, seconds: u64) -> Result<()> {
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
        source
            .spawn_for(
                &format!("dd if=/dev/urandom of={device} bs=1M oflag=direct count=512 status=none"),
                Duration::from_secs(600),
            )?
            .wait()?;
    }
    pair.wait_in_sync()?;

    let mut figures = vec![vec![Vec::new(); NAMES.len()]; LOADS.len()];
    for round in 0..rounds {
        for (load, (_, options)) in LOADS.iter().enumerate() {
            for turn in 0..NAMES.len() {
                let which = (round + load + turn) % NAMES.len();
                let rate = run(pair, &devices[which], options, seconds)?;
                figures[load][which].push(rate);
                // What is still on its way must not cost the next one.
                pair.wait_in_sync()?;
            }
        }
        eprintln!("round {} of {rounds}", round + 1);
    }
    let status = pair.status()?;
    println!("{rounds} rounds of {seconds} s; gaps begun: {}", status.gaps_total);
    for ((name, _), figures) in LOADS.iter().zip(&figures) {
        let medians: Vec<String> = NAMES
            .iter()
            .zip(figures)
            .map(|(name, rates)| format!("{name} {:.0}/s", interval(rates).1))
            .collect();
        println!("{name}: {}", medians.join(", "));
        for other in 1..NAMES.len() {
            let ratios: Vec<f64> =
                figures[0].iter().zip(&figures[other]).map(|(one, other)| one / other).collect();
            let (low, median, high) = interval(&ratios);
            println!(
                "  protected / {}: median {median:.2}, 95 % interval {low:.2} to {high:.2}",
                NAMES[other]
            );
        }
    }
    Ok(())
}

fn run(pair: &Pair, device: &str, options: &str, seconds: u64) -> Result<f64> {
    let text = pair.source.sh(&format!(
        "fio --name=load --filename={device} --direct=1 --ioengine=libaio {options} --norandommap \
         --randrepeat=0 --time_based --ramp_time=1 --runtime={seconds} --output-format=json"
    ))?;
    let start = text.find('{').context("fio printed no JSON")?;
    let report: Value = serde_json::from_str(&text[start..])?;
    let rate = |kind: &str| report["jobs"][0][kind]["iops"].as_f64().unwrap_or(0.0);
    let rate = rate("write") + rate("read");
    ensure!(rate > 0.0, "fio did nothing on {device}: {text}");
    Ok(rate)
}

fn rublk() -> Result<PathBuf> {
    let named = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo/bin/rublk"));
    let path = named.context("HOME is not set")?;
    ensure!(fs::exists(&path)?, "no {}: run 'cargo install rublk --locked'", path.display());
    Ok(path)
}

/// The median and the order statistics around it that hold the true one with 95 % confidence, as far as there
/// are enough values for that.
fn interval(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    let median = if count % 2 == 1 {
        sorted[count / 2]
    } else {
        (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0
    };
    // The chance that at most `rank` of the values lie below the true median.
    let (mut rank, mut chance, mut term) =
        (0, 0.0, 0.5f64.powi(i32::try_from(count).unwrap_or(i32::MAX)));
    for below in 0..count / 2 {
        chance += term;
        if chance > 0.025 {
            break;
        }
        rank = below + 1;
        term *= (count - below) as f64 / (below + 1) as f64;
    }
    let low = rank.saturating_sub(1);
    (sorted[low], median, sorted[count - 1 - low])
}
