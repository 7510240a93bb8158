//! Power cuts: two machines whose data is on disks with a volatile cache, a load on the source, and the power of
//! the source, of the target or of both cut at random moments. What was not flushed is lost by sectors.
//!
//! After each cut the source's file system is clean and has every transaction that was acknowledged, the replica
//! becomes equal to the disk, and the points made before still have their content.
//!
//! `TIDEMARK_CUTS` says how many cuts there are (else 3), `TIDEMARK_SEED` which. With
//! `TIDEMARK_IGNORE_FLUSH=data|state|map|log|catalogue` the drive of that kind ignores flushes, and the test has to
//! fail: so it shows that those flushes are needed.

use std::env;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tidemark_tests::pair::{Pair, Plan};
use tidemark_tests::vm::Lab;
use tidemark_tests::volatile::VolatileDisks;
use tidemark_tests::workload::rng::Rng;

const MIB: u64 = 1 << 20;
const CUTS: u64 = 3;
const SEED: u64 = 20_261_123;
/// Transactions that have to be acknowledged before a cut.
const TRANSACTIONS_MIN: u64 = 10;
/// How long the load may take for those.
const LOAD_TIMEOUT: Duration = Duration::from_secs(180);
/// Points that are looked at after each cut; at the end it is all of them.
const POINTS_LOOKED_AT: usize = 3;

const LEDGER: &[u8] = include_bytes!("guest_filesystem/ledger.py");
/// The machines' drives.
const SOURCE_DRIVES: [&str; 3] = ["data", "state", "map"];
const TARGET_DRIVES: [&str; 2] = ["catalogue", "log"];

#[test]
fn whatever_power_is_cut_nothing_that_was_promised_is_lost() -> Result<()> {
    let cuts = number("TIDEMARK_CUTS")?.unwrap_or(CUTS);
    let seed = number("TIDEMARK_SEED")?.unwrap_or(SEED);
    let ignored = env::var("TIDEMARK_IGNORE_FLUSH").ok();
    Lab::run("power_cut", 2, |lab| {
        let mut plan = Plan::new(&[("data", 512 * MIB)]);
        plan.volatile_seed = Some(seed);
        plan.store_bytes = 2 << 30;
        Pair::run(lab, plan, |pair| {
            prepare(pair)?;
            if let Some(drive) = &ignored {
                disks(pair)?.ignore_flushes(drive)?;
            }
            let mut rng = Rng::new(seed);
            let mut points = Vec::new();
            for round in 0..cuts {
                one_round(pair, round, &mut rng, &mut points)
                    .with_context(|| format!("round {round} of seed {seed}"))?;
            }
            points.iter().try_for_each(|point| check(pair, point))
        })
    })
}

/// A point and the checksum that its content had when it was made.
struct Point {
    name: String,
    checksum: u64,
}

fn number(variable: &str) -> Result<Option<u64>> {
    let Ok(text) = env::var(variable) else { return Ok(None) };
    let number = text.parse().with_context(|| format!("{variable} is to be a number"))?;
    Ok(Some(number))
}

fn disks(pair: &Pair) -> Result<&VolatileDisks> {
    pair.disks.as_ref().context("the pair's disks are volatile ones")
}

/// A file system with a file for the scattered writes; all of the installation is durable.
fn prepare(pair: &Pair) -> Result<()> {
    let device = pair.device("data");
    pair.source.write("/root/ledger.py", 0o644, LEDGER)?;
    pair.source.write("/root/load", 0o755, LOAD.as_bytes())?;
    pair.source.sh(&format!(
        "mkfs.ext4 -q {device} && mkdir -p /srv/data && mount {device} /srv/data && \
         fallocate -l 350M /srv/data/scatter && umount /srv/data && sync"
    ))?;
    pair.target.sh("sync")?;
    pair.wait_in_sync()?;
    disks(pair)?.settle()
}

/// A ledger of its own for each round, whose acknowledgements go to the console, and writes all over the disk.
const LOAD: &str = r#"#!/bin/sh
mkdir /srv/data/$1
fio --name=scatter --filename=/srv/data/scatter --filesize=350m --rw=randwrite --bs=4k --direct=1 \
  --fsync=8 --rate_iops=40 --time_based --runtime=1800 --output=/run/fio &
python3 /root/ledger.py load /srv/data/$1/ledger.db /dev/ttyS0 /run/stop WAL
kill -INT $!
wait
"#;

/// Whose power is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    Source,
    Target,
    /// The target first, so that the source has changes which it alone knows of.
    Both,
}

fn one_round(pair: &mut Pair, round: u64, rng: &mut Rng, points: &mut Vec<Point>) -> Result<()> {
    let victim = [Victim::Both, Victim::Source, Victim::Target][(round % 3) as usize];
    let device = pair.device("data");
    let console_before = pair.source.console()?.len();
    let acknowledged = |pair: &Pair| -> Result<u64> {
        Ok(last_transaction(pair.source.console()?.get(console_before..).unwrap_or_default()))
    };
    pair.source.sh(&format!(
        "mount {device} /srv/data && rm -rf /srv/data/r* /run/stop && \
         systemd-run --quiet --collect --unit=load /root/load r{round}"
    ))?;
    let start = Instant::now();
    while acknowledged(pair)? < TRANSACTIONS_MIN {
        ensure!(start.elapsed() < LOAD_TIMEOUT, "the load acknowledges no transactions");
        thread::sleep(Duration::from_millis(200));
    }
    let name = format!("p{round}");
    let seq = pair.mark(&name)?;
    pair.wait("the mark to be durable", |status| status.durable_seq.0 >= seq)?;
    let name = format!("mark:{name}");
    points.push(Point { checksum: pair.checksum_of("data", &name)?, name });

    thread::sleep(Duration::from_millis(rng.below(3000)));
    let said = cut(pair, victim, rng)?;
    let due = acknowledged(pair)?;
    println!("round {round}: {victim:?} after transaction {due}; {said}");
    power_on(pair, victim)?;
    if victim == Victim::Target {
        pair.source
            .sh("touch /run/stop; while systemctl is-active --quiet load; do sleep 0.2; done; \
             umount /srv/data")?;
    }
    judge(pair, round, due)?;
    pair.compare_latest("data")?;
    let last = points.len().saturating_sub(1);
    check(pair, &points[last])?;
    for _ in 1..POINTS_LOOKED_AT.min(points.len()) {
        check(pair, &points[rng.below(last as u64) as usize])?;
    }
    Ok(())
}

/// The last number in the ledger's lines.
fn last_transaction(console: &str) -> u64 {
    let mut numbers = console.lines().filter_map(|line| {
        let words: Vec<&str> = line.trim().split(' ').collect();
        let [number, started_ns, acknowledged_ns] = words[..] else { return None };
        let whole = started_ns.len() == 19 && acknowledged_ns.len() == 19;
        number.parse().ok().filter(|_| whole)
    });
    numbers.next_back().unwrap_or(0)
}

fn cut(pair: &mut Pair, victim: Victim, rng: &mut Rng) -> Result<String> {
    let mut said = Vec::new();
    if victim != Victim::Source {
        pair.target.power_cut()?;
        said.push(disks(pair)?.cut(&TARGET_DRIVES)?);
    }
    if victim == Victim::Both {
        thread::sleep(Duration::from_millis(rng.below(4000)));
    }
    if victim != Victim::Target {
        pair.source.power_cut()?;
        said.push(disks(pair)?.cut(&SOURCE_DRIVES)?);
    }
    Ok(said.join(", "))
}

fn power_on(pair: &mut Pair, victim: Victim) -> Result<()> {
    let device = pair.device("data");
    let Pair { source, target, .. } = pair;
    thread::scope(|scope| {
        let target =
            (victim != Victim::Source).then(move || scope.spawn(move || target.power_on()));
        if victim != Victim::Target {
            source.power_on()?;
            source.sh(&format!("udevadm wait --timeout=60 --settle {device}"))?;
        }
        match target.map(|target| target.join()) {
            None => Ok(()),
            Some(Ok(on)) => on,
            Some(Err(_)) => bail!("the thread that boots the target panicked"),
        }
    })
}

/// What the ledger says of its database.
#[derive(Deserialize, Debug)]
struct Judgement {
    integrity: String,
    last: u64,
    whole: bool,
}

/// The source's file system is clean after its journal's replay, and the database has what it acknowledged.
fn judge(pair: &Pair, round: u64, due: u64) -> Result<()> {
    let device = pair.device("data");
    let text = pair.source.sh(&format!(
        "set -e; mount {device} /srv/data; python3 /root/ledger.py judge /srv/data/r{round}/ledger.db; \
         umount /srv/data; e2fsck -fn {device} >&2"
    ))?;
    let judgement: Judgement = serde_json::from_str(&text)?;
    ensure!(judgement.integrity == "ok" && judgement.whole, "the ledger: {judgement:?}");
    let last = judgement.last;
    ensure!(last >= due, "transaction {due} had been acknowledged, {last} is the last");
    Ok(())
}

/// A point still has the content that it had.
fn check(pair: &Pair, point: &Point) -> Result<()> {
    let checksum = pair.checksum_of("data", &point.name)?;
    ensure!(checksum == point.checksum, "the content of @{} is another now", point.name);
    Ok(())
}
