//! The demo, told as it happens.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tidemark_agent::agent::STOP_PATIENCE;
use tidemark_agent::api::Control;
use tidemark_control::agent::GroupStatus;
use tidemark_nbd::client::Client;
use tokio::runtime::Runtime;

use super::Request;
use super::interrupt::Interrupt;
use super::ledger::{LEDGER_BYTES, Ledger, judge};
use super::site::{GROUP, Image, Site, VOLUME, make_disk};
use crate::output::{Output, print};

/// How long the bank works before the mark, until the unmarked moment, and until the ruin.
const WORK: [Duration; 3] =
    [Duration::from_secs(3), Duration::from_secs(2), Duration::from_secs(3)];
/// The mark's name.
const MARK: &str = "before-the-upgrade";
/// How long the replica may take to have everything.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the demo found, for programs.
#[derive(Serialize)]
struct Report {
    transfers: u64,
    sync_ms: u64,
    lag_p50_us: Option<u64>,
    lag_p99_us: Option<u64>,
    raw_bytes: u64,
    sent_bytes: u64,
    recoveries: Vec<Recovery>,
}

#[derive(Serialize)]
struct Recovery {
    point: String,
    transfers: u64,
    acknowledged_by_then: u64,
    open_ms: u64,
    proof_ms: u64,
}

struct Story {
    output: Output,
}

impl Story {
    /// A line of the story; nothing when the answer is for programs.
    fn say(&self, line: &str) -> Result<()> {
        if !self.output.is_json() {
            print(&format!("{line}\n"))?;
        }
        Ok(())
    }
}

/// Makes the site, lets the bank work, ruins the disk and recovers two moments of it. Whatever
/// happens on the way, an interrupt included, the site is stopped and its directory removed.
pub fn tell(runtime: &Runtime, request: &Request, output: Output) -> Result<()> {
    let story = Story { output };
    let image = request.image.as_deref().map(Image::open).transpose()?;
    let ended = Interrupt::watch(runtime)?;
    let dir = tempfile::Builder::new()
        .prefix("tidemark-demo-")
        .tempdir()
        .context("make a directory for the demo (set TMPDIR to a place with room)")?;
    let disk = dir.path().join("disk.img");
    story.say("A disk, protected while an application works on it, is about to be ruined.\n")?;
    let made = make_disk(&disk, image.as_ref(), LEDGER_BYTES, ended.flag());
    let offset = made.map_err(|error| if ended.is_set() { interrupted() } else { error })?;
    match &request.image {
        Some(image) => {
            story.say(&format!("1. {} was copied; the copy is the disk.", image.display()))?;
        }
        None => story.say("1. A new disk of 1 GiB was made.")?,
    }
    let site = Site::start(runtime, dir.path())?;
    let told = runtime.block_on(async {
        tokio::select! {
            told = play(&story, &site, offset, &disk) => told,
            () = ended.wait() => Err(interrupted()),
        }
    });
    let shown = told.and_then(|report| {
        output.answer(&report, String::new)?;
        if request.keep { keep(&story, runtime, &site, &ended) } else { Ok(()) }
    });
    // After a failure nobody wants what is still on its way.
    site.stop(runtime, if shown.is_ok() { STOP_PATIENCE } else { Duration::ZERO });
    let place = dir.path().display().to_string();
    dir.close().with_context(|| format!("remove {place}"))?;
    shown
}

fn interrupted() -> anyhow::Error {
    anyhow!("interrupted; the demo's directory has been removed")
}

async fn play(story: &Story, site: &Site, offset: u64, image: &Path) -> Result<Report> {
    story.say(
        "2. It is protected: the application opens it through an NBD socket, and every write",
    )?;
    story.say("   goes to the disk below and, in order, to the target.")?;
    let started = Instant::now();
    sync(site, story.output.is_json()).await?;
    let sync_ms = millis(started);
    let before = hash_of(&site.open_disk().await?, offset).await?;
    story.say(&format!("   First sync: {:.1} s.", sync_ms as f64 / 1000.0))?;

    let mut bank = Ledger::open(site.open_disk().await?, offset).await?;
    work(&mut bank, WORK[0]).await?;
    let marked = site.agent.mark(GROUP, MARK).await;
    marked.map_err(|error| anyhow::anyhow!("{error}"))?;
    let mark_done = bank.done();
    story.say(&format!(
        "3. A bank works on it: {mark_done} transfers so far. Here the mark '{MARK}' is set."
    ))?;
    work(&mut bank, WORK[1]).await?;
    let moment = SystemTime::now();
    let moment_done = bank.done();
    work(&mut bank, WORK[2]).await?;
    let lag = site.agent.lag(GROUP).await.unwrap_or_default();
    let at = jiff::Timestamp::try_from(moment)?;
    story.say(&format!(
        "4. The bank goes on: {moment_done} transfers at {at:.6}, a moment that nobody marks,\n   \
         {} three seconds later.",
        bank.done()
    ))?;

    ruin(&site.open_disk().await?, offset).await?;
    let harm = judge(&site.open_disk().await?, offset).await;
    let Err(harm) = harm else { bail!("the ruin did no harm") };
    story
        .say(&format!("5. Then somebody overwrites the disk. The bank's rules now say: {harm}."))?;
    ensure!(std::fs::metadata(image).is_ok(), "the disk is gone");

    settle(site).await?;
    let status = status(site).await?;
    let wanted = [
        (format!("mark:{MARK}"), mark_done, Some(mark_done)),
        (format!("{at:.6}"), bank.acknowledged_by(moment), None),
    ];
    let mut recoveries = Vec::new();
    for (point, acknowledged, exactly) in wanted {
        let recovery = recover(site, offset, &point, acknowledged, exactly, before).await?;
        story.say(&format!(
            "6. Recovered {GROUP}/{VOLUME}@{point}: open after {} ms. All rules hold: {} transfers\n   \
             without a gap, no money lost, and all {acknowledged} acknowledged by then are there.",
            recovery.open_ms, recovery.transfers
        ))?;
        recoveries.push(recovery);
    }
    let report = Report {
        transfers: bank.done(),
        sync_ms,
        lag_p50_us: lag.quantile_ns(500).map(|ns| ns / 1000),
        lag_p99_us: lag.quantile_ns(990).map(|ns| ns / 1000),
        raw_bytes: status.raw_bytes_total,
        sent_bytes: status.sent_bytes_total,
        recoveries,
    };
    story.say(&figures(&report))?;
    Ok(report)
}

fn figures(report: &Report) -> String {
    let mut text = String::from("\nBoth moments are proven. On the way:\n");
    if let (Some(p50), Some(p99)) = (report.lag_p50_us, report.lag_p99_us) {
        let _ = writeln!(
            text,
            "   lag, from a write to the target having it durably: half within {:.1} ms, 99 % within {:.1} ms",
            p50 as f64 / 1000.0,
            p99 as f64 / 1000.0
        );
    }
    let _ = write!(
        text,
        "   {:.1} MiB of changes went over the link as {:.1} MiB ({:.1} to 1)",
        report.raw_bytes as f64 / 1048576.0,
        report.sent_bytes as f64 / 1048576.0,
        report.raw_bytes as f64 / report.sent_bytes.max(1) as f64
    );
    text
}

/// Opens a point and proves it by the bank's rules.
async fn recover(
    site: &Site,
    offset: u64,
    point: &str,
    acknowledged: u64,
    exactly: Option<u64>,
    before: blake3::Hash,
) -> Result<Recovery> {
    let started = Instant::now();
    let disk = site.open_point(point).await?;
    let open_ms = millis(started);
    let judged = judge(&disk, offset).await.with_context(|| format!("@{point} breaks a rule"))?;
    ensure!(
        judged.transfers >= acknowledged,
        "@{point} has {} transfers, but {acknowledged} had been acknowledged",
        judged.transfers
    );
    if let Some(exactly) = exactly {
        ensure!(judged.transfers == exactly, "@{point} has transfers from after it");
    }
    ensure!(hash_of(&disk, offset).await? == before, "@{point} has lost the disk's other content");
    disk.disconnect().await;
    Ok(Recovery {
        point: point.to_owned(),
        transfers: judged.transfers,
        acknowledged_by_then: acknowledged,
        open_ms,
        proof_ms: millis(started) - open_ms,
    })
}

async fn work(bank: &mut Ledger, time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        bank.work().await?;
    }
    Ok(())
}

/// Overwrites the beginning of the disk, the tables and the transfers.
async fn ruin(disk: &Client, offset: u64) -> Result<()> {
    for at in (offset..offset + (16 << 20)).step_by(1 << 20).chain((offset > 0).then_some(0)) {
        disk.write(at, Bytes::from(vec![0x5a; 1 << 20]), false).await?;
    }
    Ok(disk.flush().await?)
}

/// The hash of what is in front of the bank.
async fn hash_of(disk: &Client, end: u64) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    for at in (0..end).step_by(4 << 20) {
        let bytes = u32::try_from((end - at).min(4 << 20))?;
        hasher.update(&disk.read(at, bytes).await?);
    }
    Ok(hasher.finalize())
}

/// Waits for the first sync, showing how far it is.
async fn sync(site: &Site, quiet: bool) -> Result<()> {
    let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let style = "   {bar:40} {pos}/{len} MiB, {eta} left";
    bar.set_style(ProgressStyle::with_template(style)?);
    let done = wait(site, "the first sync", |status| {
        if let Some(progress) = status.volumes.first().and_then(|volume| volume.catch_up) {
            bar.set_length(progress.total_regions);
            bar.set_position(progress.done_regions);
        }
        status.is_in_sync()
    });
    done.await?;
    bar.finish_and_clear();
    Ok(())
}

/// Waits until the target has everything.
async fn settle(site: &Site) -> Result<()> {
    wait(site, "the target to have everything", GroupStatus::is_in_sync).await
}

async fn wait(site: &Site, what: &str, mut done: impl FnMut(&GroupStatus) -> bool) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let status = status(site).await?;
        if done(&status) {
            return Ok(());
        }
        if Instant::now() > until {
            let why = status.link.sentence.unwrap_or_else(|| "it is still under way".to_owned());
            bail!("waited too long for {what}: {why}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn status(site: &Site) -> Result<GroupStatus> {
    site.agent.status().await.groups.into_iter().next().context("the group has ended")
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Leaves everything running until it is interrupted.
fn keep(story: &Story, runtime: &Runtime, site: &Site, ended: &Interrupt) -> Result<()> {
    let place = site.dir.display();
    let lines = [
        "\nEverything is still running. From another terminal:".to_owned(),
        format!("   nbdinfo --list 'nbd+unix:///?socket={place}/points.sock'"),
        format!(
            "   nbdcopy 'nbd+unix:///{GROUP}/{VOLUME}@mark:{MARK}?socket={place}/points.sock' recovered.img"
        ),
        format!(
            "   qemu-io -f raw 'nbd+unix:///{VOLUME}?socket={place}/disk.sock'     # the protected disk"
        ),
        format!("   tidemark journal dump {place}/target/groups/{GROUP}/log/*"),
        "Ctrl-C ends it and removes its directory.".to_owned(),
    ];
    for line in lines {
        story.say(&line)?;
    }
    runtime.block_on(ended.wait());
    Ok(())
}
