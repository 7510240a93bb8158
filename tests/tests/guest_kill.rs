//! The agent killed again and again under a load that reads back what it writes: no error, no gap, and a pause that
//! is printed. Afterwards its devices are served without capture, and taken back.
//!
//! `TIDEMARK_KILLS` is how often it is killed, 3 times unless told otherwise.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tidemark_tests::pair::{Pair, Plan};
use tidemark_tests::vm::{Job, Lab};

const MIB: u64 = 1 << 20;
const STRETCH: Duration = Duration::from_secs(3);
/// What a first sync did in this time may be compared again after a kill.
const REMEMBERED: Duration = Duration::from_secs(10);
/// How often the devices change hands while they are served without capture.
const CHANGES: u32 = 12;

/// Kills the agent, and says how long a read that was begun then has waited, and how much of that was after the start of
/// the next agent, in milliseconds.
const KILL: &str = "pid=$(systemctl show --property=MainPID --value tidemark-agent); kill -9 $pid; \
                    while [ -e /proc/$pid/fd/0 ]; do :; done; begun=$(date +%s%N); \
                    dd if=$DEVICE of=/dev/null bs=4096 count=1 iflag=direct status=none; \
                    ended=$(date +%s%N); read up rest </proc/uptime; \
                    started_us=$(systemctl show --property=ExecMainStartTimestampMonotonic --value tidemark-agent); \
                    echo $(((ended - begun) / 1000000)) $((${up%.*}${up#*.}0 - started_us / 1000))";

#[test]
fn a_killed_agent_behind_ublk_costs_a_pause_and_no_gap() -> Result<()> {
    killed_under_load("kill-ublk", "ublk")
}

#[test]
fn a_killed_agent_behind_the_kernels_nbd_client_costs_a_pause_and_no_gap() -> Result<()> {
    killed_under_load("kill-nbd", "nbd-kernel")
}

fn killed_under_load(name: &str, front: &'static str) -> Result<()> {
    let kills = match std::env::var("TIDEMARK_KILLS") {
        Ok(text) => text.parse().with_context(|| format!("TIDEMARK_KILLS={text} is no number"))?,
        Err(_) => 3,
    };
    Lab::run(name, 2, |lab| {
        let mut plan = Plan::new(&[("data", 128 * MIB)]);
        plan.front = front;
        Pair::run(lab, plan, |pair| {
            pair.wait_in_sync()?;
            thread::sleep(REMEMBERED);
            let before = pair.mark("before")?;
            let load = start_load(pair)?;
            let (mut pauses_ms, mut after_start_ms) = (Vec::new(), Vec::new());
            for _ in 0..kills {
                thread::sleep(STRETCH);
                let command = KILL.replace("$DEVICE", &pair.device("data"));
                let said = pair.source.sh(&command)?;
                let (pause, after_start) = said.trim().split_once(' ').context("two numbers")?;
                pauses_ms.push(pause.parse::<u64>()?);
                after_start_ms.push(after_start.parse::<u64>()?);
                pair.wait("the agent", |_| true)?;
            }
            let longest_ms = end_load(pair, load)?;
            pauses_ms.sort_unstable();
            after_start_ms.sort_unstable();
            println!(
                "{front}: killed {kills} times; a read begun then waited {pauses_ms:?} ms, of which after the start of the \
                 next agent {after_start_ms:?} ms; the load waited {longest_ms} ms at most"
            );
            let restarts =
                pair.source.sh("systemctl show --property=NRestarts --value tidemark-agent")?;
            ensure!(restarts.trim() == kills.to_string(), "restarted {} times", restarts.trim());
            pair.wait_in_sync()?;
            pair.check_unbroken(before)?;
            pair.compare_latest("data")?;
            without_capture(pair)?;
            pair.compare_latest("data")
        })
    })
}

/// Random writes past the page cache, each soon read back and compared, until interrupted.
fn start_load(pair: &Pair) -> Result<Job<'_>> {
    let device = pair.device("data");
    pair.source.spawn_for(
        &format!(
            "fio --name=load --filename={device} --size=32m --rw=randwrite --bs=4k --direct=1 \
             --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_backlog=32 \
             --rate_iops=150 --fsync=64 --time_based --runtime=1800 --output-format=json \
             --output=/run/fio.json"
        ),
        Duration::from_secs(1900),
    )
}

/// Interrupts the load, which must have gone well; the longest that a write has waited, in milliseconds.
fn end_load(pair: &Pair, load: Job<'_>) -> Result<u64> {
    thread::sleep(STRETCH);
    load.signal(nix::sys::signal::Signal::SIGINT)?;
    load.wait()?;
    let report = pair.source.sh("cat /run/fio.json")?;
    let begin = report.find('{').with_context(|| report.clone())?;
    let parsed: serde_json::Value = serde_json::from_str(&report[begin..])?;
    let job = parsed.pointer("/jobs/0").context("fio reports no job")?;
    let error = job.get("error").and_then(serde_json::Value::as_u64);
    ensure!(error == Some(0), "the load saw an error: {report}");
    let complaints = pair.source.run("dmesg --notime | grep -E 'I/O error'")?;
    ensure!(!complaints.success(), "the source's kernel says {}", complaints.text());
    let longest_ns = job.pointer("/write/clat_ns/max").and_then(serde_json::Value::as_u64);
    Ok(longest_ns.context("fio reports no latency")? / 1_000_000)
}

/// The devices of an agent that is gone are served without capture under load, and then by an agent again.
fn without_capture(pair: &Pair) -> Result<()> {
    let mark = pair.mark("without-capture")?;
    let load = start_load(pair)?;
    thread::sleep(STRETCH);
    pair.source.sh("systemctl stop tidemark-agent")?;
    for _ in 0..CHANGES {
        pair.source.sh(
            "systemd-run --quiet --unit=tidemark-passthrough --property=Type=notify \
                        /usr/bin/tidemark-agent --passthrough shop && \
                        sleep 0.2 && systemctl stop tidemark-passthrough",
        )?;
    }
    pair.source.sh("systemctl start tidemark-agent")?;
    end_load(pair, load)?;
    pair.wait_in_sync()?;
    ensure!(pair.check_unbroken(mark).is_err(), "nothing was compared afterwards");
    Ok(())
}
