//! Power cuts: two machines whose data is on disks with a volatile cache, a load on the source, and the power of
//! the source, of the target or of both cut at random moments. What was not flushed is lost by sectors.
//!
//! After each cut the source's file system is clean and has every transaction that was acknowledged; the replica
//! becomes equal to the disk, and the two sides' memories agree, so that no more is compared than what may differ;
//! the points and branches made before are there, and points still have their content.
//!
//! `TIDEMARK_CUTS` says how many rounds there are (else 3), `TIDEMARK_SEED` which. With
//! `TIDEMARK_IGNORE_FLUSH=data|state|map|spool|log|catalogue` the drive of that kind ignores flushes, and the test has
//! to fail: so it shows that those flushes are needed.

use std::collections::BTreeSet;
use std::env;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tidemark_control::agent::Rung;
use tidemark_control::target::{Branches, Points};
use tidemark_journal::{GapReason, Kind, Seq};
use tidemark_tests::journal;
use tidemark_tests::pair::{GROUP, MKFS, Pair, Plan, tidemark};
use tidemark_tests::vm::Lab;
use tidemark_tests::workload::rng::Rng;

const MIB: u64 = 1 << 20;
const ROUNDS: u64 = 3;
const SEED: u64 = 20_261_123;
/// Transactions that have to be acknowledged before a cut.
const TRANSACTIONS_MIN: u64 = 10;
/// How long the load may take for those.
const LOAD_TIMEOUT: Duration = Duration::from_secs(180);
/// Points that are looked at after each cut; at the end it is all of them.
const POINTS_LOOKED_AT: usize = 3;

const LEDGER: &[u8] = include_bytes!("guest_filesystem/ledger.py");

#[test]
fn whatever_power_is_cut_nothing_that_was_promised_is_lost() -> Result<()> {
    let rounds = number("TIDEMARK_CUTS")?.unwrap_or(ROUNDS);
    let seed = number("TIDEMARK_SEED")?.unwrap_or(SEED);
    let ignored = env::var("TIDEMARK_IGNORE_FLUSH").ok();
    Lab::run("power_cut", 2, |lab| {
        let mut plan = Plan::new(&[("data", 512 * MIB)]);
        plan.volatile_seed = Some(seed);
        // It is made anew and locked in memory at each start.
        plan.ring = "64 MiB";
        // Several segments a round.
        plan.target_tables = "[store]\nsegment = \"4 MiB\"".into();
        Pair::run(lab, plan, |pair| {
            prepare(pair)?;
            if let Some(drive) = &ignored {
                pair.disks()?.ignore_flushes(drive)?;
            }
            let mut rng = Rng::new(seed);
            let mut points = Vec::new();
            for (round, cut) in (0..rounds).zip(CUTS.into_iter().cycle()) {
                one_round(pair, round, cut, &mut rng, &mut points)
                    .with_context(|| format!("round {round} of seed {seed}: {cut:?}"))?;
            }
            points.iter().try_for_each(|point| check(pair, point))
        })
    })
}

/// Whose power is cut in a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cut {
    /// The target's, and the source's when what it alone knows of lies in the spool.
    BothSpooled,
    /// The target's, and soon after that the source's, which then has changes that it alone knows of.
    Both,
    Target,
    Source,
    /// The source's, and once more while it catches up.
    SourceTwice,
}

/// The rounds, again and again. Before those of both, the source starts: it has no active regions yet.
const CUTS: [Cut; 6] =
    [Cut::BothSpooled, Cut::Target, Cut::Source, Cut::Both, Cut::Target, Cut::SourceTwice];

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

/// A file system with files for the load; all of the installation is durable. Nothing is discarded, which would leave
/// every region active.
fn prepare(pair: &Pair) -> Result<()> {
    let device = pair.device("data");
    pair.source.write("/root/ledger.py", 0o644, LEDGER)?;
    pair.source.write("/root/load", 0o755, LOAD.as_bytes())?;
    pair.source.write("/root/walk", 0o755, WALK.as_bytes())?;
    pair.source.sh(&format!(
        "{MKFS} -E nodiscard {device} && mkdir -p /srv/data && mount {device} /srv/data && \
         fallocate -l 40M /srv/data/scatter && fallocate -l 300M /srv/data/walk && \
         umount /srv/data && sync"
    ))?;
    pair.target.sh("sync")?;
    pair.wait_in_sync()?;
    pair.disks()?.settle()
}

/// A ledger of its own for each round, whose acknowledgements go to the console, and scattered writes.
const LOAD: &str = r#"#!/bin/sh
mkdir /srv/data/$1
fio --name=scatter --filename=/srv/data/scatter --filesize=40m --rw=randwrite --bs=4k --direct=1 \
  --fsync=8 --rate_iops=40 --time_based --runtime=1800 --output=/run/fio &
python3 /root/ledger.py load /srv/data/$1/ledger.db /dev/ttyS0 /run/stop WAL
kill -INT $!
wait
"#;

/// One write to each mebibyte, from one to the next: so at each moment some regions have just become active.
const WALK: &str = r#"#!/bin/sh
exec fio --name=walk --filename=/srv/data/walk --filesize=300m --rw=write:1020k --bs=4k --direct=1 --fsync=4 \
  --rate_iops=10 --output=/run/walk
"#;

fn one_round(
    pair: &mut Pair,
    round: u64,
    cut: Cut,
    rng: &mut Rng,
    points: &mut Vec<Point>,
) -> Result<()> {
    let begun = Instant::now();
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
    points.push(point(pair, round)?);
    pair.source.sh("systemd-run --quiet --collect --unit=walk /root/walk")?;
    let promised = promise(pair, round)?;

    thread::sleep(Duration::from_millis(rng.below(1500)));
    let ready = begun.elapsed();
    let kept = cut.of(pair, rng)?;
    let due = acknowledged(pair)?;
    cut.power_on(pair, rng)?;
    pair.check_protected()?;
    pair.source.sh(&format!("udevadm wait --timeout=60 --settle {device}"))?;
    let back = begun.elapsed();
    promised.check(pair)?;
    if cut == Cut::Target {
        pair.source.sh("touch /run/stop; systemctl stop walk; \
             while systemctl is-active --quiet load; do sleep 0.2; done; umount /srv/data")?;
    }
    judge(pair, round, due)?;
    let judged = begun.elapsed();
    pair.compare_latest("data")?;
    let equal = begun.elapsed();
    agree(pair)?;
    pair.check_daemons()?;
    let last = points.len().saturating_sub(1);
    check(pair, &points[last])?;
    for _ in 1..POINTS_LOOKED_AT.min(points.len()) {
        check(pair, &points[rng.below(last as u64) as usize])?;
    }
    println!(
        "round {round}: {cut:?} after transaction {due}; {kept}; cut after {} s, back after {} s, \
         judged after {} s, equal after {} s, all seen after {} s",
        ready.as_secs(),
        back.as_secs(),
        judged.as_secs(),
        equal.as_secs(),
        begun.elapsed().as_secs()
    );
    Ok(())
}

impl Cut {
    /// Cuts the power; what the drives have kept.
    fn of(self, pair: &mut Pair, rng: &mut Rng) -> Result<String> {
        let mut said = Vec::new();
        if !matches!(self, Cut::Source | Cut::SourceTwice) {
            said.push(pair.cut_target()?);
        }
        if self == Cut::BothSpooled {
            pair.wait("frames to go to the spool", |status| status.rung == Rung::Spool)?;
            // In two of these the state says that the dirty map relies on them.
            thread::sleep(Duration::from_secs(4));
        }
        if self != Cut::Target {
            thread::sleep(Duration::from_millis(rng.below(4000)));
            said.push(pair.cut_source()?);
        }
        Ok(said.join(", "))
    }

    fn power_on(self, pair: &mut Pair, rng: &mut Rng) -> Result<()> {
        if self == Cut::SourceTwice {
            pair.source.power_on()?;
            thread::sleep(Duration::from_millis(rng.below(2000)));
            pair.cut_source()?;
        }
        let Pair { source, target, .. } = pair;
        thread::scope(|scope| {
            let target = matches!(self, Cut::BothSpooled | Cut::Both | Cut::Target)
                .then(move || scope.spawn(move || target.power_on()));
            if self != Cut::Target {
                source.power_on()?;
            }
            match target.map(|target| target.join()) {
                None => Ok(()),
                Some(Ok(on)) => on,
                Some(Err(_)) => bail!("the thread that boots the target panicked"),
            }
        })
    }
}

/// A point of this round, and its content.
fn point(pair: &Pair, round: u64) -> Result<Point> {
    let name = durable_mark(pair, &format!("p{round}"))?;
    Ok(Point { checksum: pair.checksum_of("data", &name)?, name })
}

/// Sets a mark that is durable at the target when this returns; its name as a point.
fn durable_mark(pair: &Pair, name: &str) -> Result<String> {
    let seq = pair.mark(name)?;
    pair.wait("the mark to be durable", |status| status.durable_seq.0 >= seq)?;
    Ok(format!("mark:{name}"))
}

/// What the target has said yes to just before its power goes.
struct Promised {
    mark: String,
    branch: String,
}

fn promise(pair: &Pair, round: u64) -> Result<Promised> {
    let mark = durable_mark(pair, &format!("q{round}"))?;
    let branch = format!("b{round}");
    pair.target.sh(&format!("tidemark branch create {branch} {GROUP}@{mark}"))?;
    Ok(Promised { mark, branch })
}

impl Promised {
    /// It is all there.
    fn check(&self, pair: &Pair) -> Result<()> {
        let points: Points = tidemark(&pair.target, &format!("points {GROUP}"))?;
        let found = points.marks.iter().find(|mark| format!("mark:{}", mark.name) == self.mark);
        let found =
            found.with_context(|| format!("@{} was durable and is not there", self.mark))?;
        ensure!(found.refused.is_none(), "@{} is not served any more: {found:?}", self.mark);
        let Branches { branches, .. } = tidemark(&pair.target, "branch list")?;
        let found = branches.iter().find(|branch| branch.name == self.branch);
        let found = found
            .with_context(|| format!("the branch {} was made and is not there", self.branch))?;
        let well = found.problem.is_none() && found.damage.is_none();
        ensure!(well, "the branch is not served any more: {found:?}");
        pair.target.sh(&format!("tidemark branch drop {}", self.branch))?;
        Ok(())
    }
}

/// The two sides' memories have agreed so far: nowhere was everything compared.
fn agree(pair: &Pair) -> Result<()> {
    let mut doubts = BTreeSet::new();
    journal::walk(&pair.fetch_log()?, |logged| {
        let record = logged.record;
        let doubt = GapReason::from_u8(record.flags) == Some(GapReason::Doubt);
        if record.kind == Kind::GapBegin && doubt {
            doubts.insert(record.seq);
        }
        Ok(())
    })?;
    let Some(Seq(first)) = doubts.first() else { return Ok(()) };
    bail!("from sequence {first} on {}, though all was flushed", GapReason::Doubt.describe())
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
