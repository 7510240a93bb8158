//! Sequential writes of 1 MiB on two processors, faster than any link: with the target stopped, they go up the whole
//! ladder, from the ring to the spool to the gap, and are measured on each rung.

use std::time::Duration;

use anyhow::{Context, Result};
use tidemark_control::agent::Ladder;
use tidemark_tests::pair::Pair;

use super::{
    SIZE_BYTES,
    devices::{Devices, Thing},
};
use crate::figures::{Bar, Bound, Comparison, in_rounds};

const OPTIONS: &str = "--rw=write --bs=1M --iodepth=4 --direct=1 --ioengine=libaio --time_based";
const SPOOL_AT: &str = "/srv/spool";
/// How long `rublk` is measured.
const PLAIN_S: u64 = 8;
/// The longest that the load takes to be on the last rung for as long as is asked for.
const CLIMB_S_MAX: u64 = 120;
/// The least time on each rung; the second in which one begins or ends does not count.
const RUNG_S_MIN: u64 = 5;
/// How often a round is tried. What waits for five seconds goes to the spool, so the ring is held for hardly longer than
/// is asked for, and by whole seconds it may be one less.
const ATTEMPTS: usize = 3;

/// Megabytes per second on each rung, and of `rublk`'s loop.
///
/// # Errors
/// There is no rublk; a guest that fails; a rung that is left too soon in each of [`ATTEMPTS`].
pub fn measure(rounds: usize, short: bool) -> Result<Comparison> {
    let figures = in_rounds(rounds, |round| {
        let held = (0..ATTEMPTS).find_map(|_| one_round(round, short).transpose());
        held.with_context(|| format!("a rung was left too soon in each of {ATTEMPTS} attempts"))?
    })?;
    let bar = |of| Bar::ratio(of, 3, Bound::AtLeast(0.7));
    Ok(Comparison {
        what: "sequential writes of 1 MiB on two processors, faster than the link".to_owned(),
        unit: "MB/s",
        names: ["on the ring", "in the spool", "in a gap", "rublk loop"]
            .map(str::to_owned)
            .to_vec(),
        rounds: figures,
        bars: vec![bar(0), Bar::printed(1, 3), bar(2)],
    })
}

/// Nothing if a rung was left too soon. With guests of its own: they start in less time than what has piled up takes to
/// the target.
fn one_round(round: usize, short: bool) -> Result<Option<Vec<f64>>> {
    let mut figures = None;
    super::run(
        "bench-sequential",
        |plan| {
            plan.processors = 2;
            // Half of it, above which frames go to the spool, takes five seconds at 850 MB/s.
            plan.ring = if short { "1 GiB" } else { "8 GiB" };
            plan.memory_mib = if short { 3072 } else { 10240 };
            plan.spare_disks.push(("spool", 10 << 30));
        },
        |pair| {
            give_spool(pair)?;
            let devices = Devices::start(pair, false)?;
            let rublk = || {
                run(pair, &devices.path(pair, Thing::Rublk), PLAIN_S)
                    .map(|log| log.mean(1, PLAIN_S - 1))
            };
            // Each goes first in half of the rounds.
            let before = round.is_multiple_of(2).then(rublk).transpose()?;
            if let Some([ring, spool, gap]) = climb(pair, &devices, short)? {
                figures = Some(vec![ring, spool, gap, before.map_or_else(rublk, Ok)?]);
            }
            signal_target(pair, "CONT")
        },
    )?;
    Ok(figures)
}

/// A disk for the agent's spool.
fn give_spool(pair: &Pair) -> Result<()> {
    let disk = pair.raw_disk("spool");
    pair.source.sh(&format!(
        "mkfs.ext4 -q -E nodiscard {disk} && mkdir -p {SPOOL_AT} && mount {disk} {SPOOL_AT} && \
         printf '[spool]\\ndirectory = \"{SPOOL_AT}\"\\nbytes_max = \"5 GiB\"\\n' >>/etc/tidemark/agent.toml && \
         tidemark config check && systemctl restart tidemark-agent"
    ))?;
    pair.wait_in_sync()?;
    Ok(())
}

fn signal_target(pair: &Pair, signal: &str) -> Result<()> {
    pair.target.sh(&format!("systemctl kill --signal={signal} tidemark-target"))?;
    Ok(())
}

/// One climb: what was written on the ring, in the spool and in the gap, if each was held for long enough. The target
/// stays stopped, so that nothing of it goes on beside what is measured next.
fn climb(pair: &Pair, devices: &Devices, short: bool) -> Result<Option<[f64; 3]>> {
    let least = if short { 1 } else { RUNG_S_MIN };
    let before = pair.status()?.ladder;
    signal_target(pair, "STOP")?;
    let device = devices.path(pair, Thing::Protected);
    let load =
        pair.source.spawn_for(&fio(&device, CLIMB_S_MAX), Duration::from_secs(CLIMB_S_MAX + 60))?;
    pair.wait("the last rung of the ladder", |status| {
        status.ladder.gap_s_total - before.gap_s_total > least + 2
    })?;
    pair.source.sh("pkill -INT -x fio")?;
    load.wait()?;
    let after = pair.status()?.ladder;
    let log = Log::read(pair)?;
    let spent = |of: fn(&Ladder) -> u64| of(&after) - of(&before);
    let (ring, spool) = (spent(|l| l.ring_s_total), spent(|l| l.spool_s_total));
    if ring < least || spool < least {
        eprintln!("does not count: only {ring} s on the ring and {spool} s in the spool");
        return Ok(None);
    }
    Ok(Some([
        log.mean(1, ring - 1),
        log.mean(ring + 1, ring + spool - 1),
        log.mean(ring + spool + 1, log.seconds() - 1),
    ]))
}

fn run(pair: &Pair, device: &str, seconds: u64) -> Result<Log> {
    pair.source.spawn_for(&fio(device, seconds), Duration::from_secs(seconds + 60))?.wait()?;
    Log::read(pair)
}

fn fio(device: &str, seconds: u64) -> String {
    format!(
        "cd /run && rm -f load_bw.1.log && fio --name=load --filename={device} {OPTIONS} --size={SIZE_BYTES} \
         --runtime={seconds} --write_bw_log=load --log_avg_msec=1000 --output=/run/load.txt"
    )
}

/// What fio wrote in each second.
struct Log(Vec<f64>);

impl Log {
    fn read(pair: &Pair) -> Result<Log> {
        let text = pair.source.sh("cat /run/load_bw.1.log")?;
        // Time, KiB/s, direction, and more.
        let rate = |line: &str| -> Option<f64> { line.split(',').nth(1)?.trim().parse().ok() };
        let rates: Option<Vec<f64>> =
            text.lines().map(|line| Some(rate(line)? * 1024.0 / 1e6)).collect();
        Ok(Log(rates.with_context(|| format!("a log of another form: {text}"))?))
    }

    fn seconds(&self) -> u64 {
        self.0.len() as u64
    }

    /// From one second to before another, one at least.
    fn mean(&self, from: u64, to: u64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        let from = (from as usize).min(last);
        let part = &self.0[from..(to as usize).clamp(from + 1, last + 1)];
        part.iter().sum::<f64>() / part.len() as f64
    }
}
