//! ext4 and XFS under load on protected disks of one group: at any position, what the target shows is what a
//! power cut at that moment would have left. File systems come up clean after their log's replay, databases
//! are whole, and every transaction that had been acknowledged is there.

use std::env;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use tidemark_tests::pair::{GROUP, Pair, Plan, tidemark};
use tidemark_tests::vm::{Guest, Lab};
use tidemark_tests::workload::rng::Rng;

const MIB: u64 = 1 << 20;
/// How many positions are tried, unless `TIDEMARK_POSITIONS` says otherwise.
const POSITIONS: u64 = 20;
/// The load ends by itself when nobody ends it, after this long for each position.
const LOAD_SECONDS: u64 = 90;
/// How late a record may look by the source's wall clock.
const LATE_NS_MAX: i64 = 2_000_000_000;

/// A file system, the journal mode of the database on it, and how it is made and judged.
struct Disk {
    volume: &'static str,
    make: &'static str,
    judge: &'static str,
    journal_mode: &'static str,
}

const DISKS: [Disk; 2] = [
    Disk { volume: "ext", make: "mkfs.ext4 -q", judge: "e2fsck -fn", journal_mode: "WAL" },
    Disk { volume: "xfs", make: "mkfs.xfs -q", judge: "xfs_repair -n", journal_mode: "DELETE" },
];

#[test]
fn any_moment_mounts_clean_with_every_acknowledged_transaction() -> Result<()> {
    let positions = match env::var("TIDEMARK_POSITIONS") {
        Ok(text) => text.parse().context("TIDEMARK_POSITIONS is to be a number")?,
        Err(_) => POSITIONS,
    };
    Lab::run("filesystem", 2, |lab| {
        let plan = Plan::new(&[("ext", 128 * MIB), ("xfs", 320 * MIB)]);
        Pair::run(lab, plan, |pair| {
            for disk in &DISKS {
                prepare(pair, disk)?;
            }
            pair.target.write("/run/ledger.py", 0o644, LEDGER)?;
            pair.wait_in_sync()?;
            let seconds = LOAD_SECONDS * positions;
            let limit = Duration::from_secs(seconds);
            let load = pair.source.spawn_for(&load(seconds), limit)?;
            wait_for_transactions(pair)?;
            let start = pair.mark("start")?;
            let mut rng = Rng::new(20);
            let mut seen = Vec::new();
            for number in 0..positions {
                let point = if number % 2 == 0 {
                    let acknowledged = acknowledged(&pair.source)?;
                    pair.mark(&format!("p{number}"))?;
                    Point { name: format!("mark:p{number}"), acknowledged: Some(acknowledged) }
                } else {
                    let newest = pair.status()?.durable_seq.0;
                    let seq = start + 1 + rng.below(newest - start);
                    Point { name: format!("seq:{seq}"), acknowledged: None }
                };
                let last = judge(pair, &point).with_context(|| format!("at @{}", point.name))?;
                println!("@{}: transactions {last:?}", point.name);
                seen.push(last);
            }
            pair.source.sh("touch /run/stop")?;
            let ended = load.wait()?;
            ensure!(ended.success(), "the load: {}{}", ended.text(), ended.error_text());
            seen.sort();
            seen.dedup();
            ensure!(seen.len() as u64 > positions / 2, "the positions hardly differ: {seen:?}");
            let status = pair.wait_in_sync()?;
            ensure!(status.gaps_total == 0, "the load was to fit the ring: {status:#?}");
            for disk in &DISKS {
                pair.source.sh(&format!("umount /srv/{}", disk.volume))?;
                pair.compare_latest(disk.volume)?;
            }
            Ok(())
        })
    })
}

const LEDGER: &[u8] = include_bytes!("guest_filesystem/ledger.py");

fn prepare(pair: &Pair, disk: &Disk) -> Result<()> {
    let Disk { volume, make, .. } = disk;
    let device = pair.device(volume);
    pair.source.write("/run/ledger.py", 0o644, LEDGER)?;
    pair.source.sh(&format!(
        "{make} {device} && mkdir -p /srv/{volume} && mount {device} /srv/{volume}"
    ))?;
    Ok(())
}

/// fio and the ledger on every disk, until told to stop.
fn load(seconds: u64) -> String {
    let mut script = String::new();
    for Disk { volume, journal_mode, .. } in &DISKS {
        let _ = writeln!(
            script,
            "python3 /run/ledger.py load /srv/{volume}/ledger.db /run/acks.{volume} /run/stop \
             {journal_mode} & ledgers=\"$ledgers $!\"\n\
             fio --name=fill --directory=/srv/{volume} --filesize=24m --rw=randwrite \
             --bsrange=512-32k --fsync=16 --rate_iops=25 --time_based --runtime={seconds} \
             --output=/run/fio.{volume} & fios=\"$fios $!\""
        );
    }
    // A ledger ends by itself; fio ends in order when it is interrupted.
    script
        + "failed=0; for job in $ledgers; do wait $job || failed=1; done\n\
              kill -INT $fios; for job in $fios; do wait $job; done\n\
              grep -L 'err= 0' /run/fio.* | grep . && failed=1; exit $failed"
}

/// The number of the last acknowledged transaction on each disk.
fn acknowledged(source: &Guest) -> Result<[u64; 2]> {
    let mut last = [0; 2];
    for (last, disk) in last.iter_mut().zip(&DISKS) {
        *last = transactions(source, disk)?.last().map_or(0, |transaction| transaction.number);
    }
    Ok(last)
}

/// A line of a ledger's log.
struct Transaction {
    number: u64,
    started_ns: i64,
    acknowledged_ns: i64,
}

fn transactions(source: &Guest, disk: &Disk) -> Result<Vec<Transaction>> {
    let text = String::from_utf8(source.read(&format!("/run/acks.{}", disk.volume))?)?;
    text.lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let [number, started_ns, acknowledged_ns] = words[..] else {
                anyhow::bail!("an odd line in the ledger's log: {line}");
            };
            Ok(Transaction {
                number: number.parse()?,
                started_ns: started_ns.parse()?,
                acknowledged_ns: acknowledged_ns.parse()?,
            })
        })
        .collect()
}

fn wait_for_transactions(pair: &Pair) -> Result<()> {
    pair.source.sh(
        "for try in $(seq 240); do [ $(cat /run/acks.* 2>/dev/null | wc -l) -gt 40 ] && exit; \
         sleep 0.5; done; exit 1",
    )?;
    Ok(())
}

/// What to recover.
struct Point {
    name: String,
    /// Transactions that had been acknowledged before the point was made, where that is known without a clock.
    acknowledged: Option<[u64; 2]>,
}

/// What `tidemark attach --json` says, as far as it is wanted.
#[derive(Deserialize)]
struct Attached {
    wall_ns: i64,
    temporary_branch: Option<String>,
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    volume: String,
    device: String,
}

/// What the ledger says of a database.
#[derive(Deserialize, Debug)]
struct Judgement {
    integrity: String,
    last: u64,
    whole: bool,
}

/// Attaches a branch of the point at the target, mounts and judges every disk; the last transactions.
fn judge(pair: &Pair, point: &Point) -> Result<[u64; 2]> {
    let target = &pair.target;
    let attached: Attached = tidemark(target, &format!("attach {GROUP}@{}", point.name))?;
    ensure!(attached.temporary_branch.is_some() && attached.devices.len() == DISKS.len());
    target.sh("dmesg --clear && mkdir -p /mnt")?;
    let mut last = [0; 2];
    for (index, disk) in DISKS.iter().enumerate() {
        let found = attached.devices.iter().find(|device| device.volume == disk.volume);
        let device = &found.with_context(|| format!("no {}", disk.volume))?.device;
        let text = target.sh(&format!(
            "set -e; mount {device} /mnt; python3 /run/ledger.py judge /mnt/ledger.db; \
             umount /mnt; {} {device} >&2",
            disk.judge
        ))?;
        let judgement: Judgement = serde_json::from_str(&text)?;
        ensure!(judgement.integrity == "ok" && judgement.whole, "{}: {judgement:?}", disk.volume);
        last[index] = judgement.last;

        let log = transactions(&pair.source, disk)?;
        let mut due = log.iter().filter(|transaction| match point.acknowledged {
            Some(numbers) => transaction.number <= numbers[index],
            None => transaction.acknowledged_ns < attached.wall_ns,
        });
        let due = due.next_back().map_or(0, |transaction| transaction.number);
        ensure!(
            judgement.last >= due,
            "{}: transaction {due} had been acknowledged, {} is the last",
            disk.volume,
            judgement.last
        );
        let early = log.iter().find(|transaction| {
            transaction.number <= judgement.last
                && transaction.started_ns > attached.wall_ns + LATE_NS_MAX
        });
        if let Some(early) = early {
            anyhow::bail!("{}: transaction {} came later", disk.volume, early.number);
        }
    }
    let complaints = target
        .run("dmesg --notime | grep -E 'EXT4-fs (error|warning)|XFS.*(orrupt|rror)|I/O error'")?;
    ensure!(!complaints.success(), "the target's kernel says {}", complaints.text());
    target.sh(&format!("tidemark detach {GROUP}"))?;
    Ok(last)
}
