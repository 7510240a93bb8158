//! Sync mode: whatever happens to the source and the link, a target that says *zero loss* has every write that
//! was answered; and no write waits for longer than was stated.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tidemark_control::agent::{GroupStatus, SyncStage};
use tidemark_control::target::{ReplicaStatus, TargetClient, ZeroLoss};
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::{Disk, nbd::NbdDisk};

const NODE: &str = env!("CARGO_BIN_EXE_node");
const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 256 * MIB;
/// How long an answer may wait, and what is left of a lease by then at most.
const SYNC_TIMEOUT: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_millis(2100);
/// What a busy machine may add to that.
const SLACK: Duration = Duration::from_millis(1500);

fn plan() -> Plan {
    let mut plan = Plan::new(&[SIZE_BYTES]);
    plan.group_lines = "sync = true\nsync_timeout = \"1 s\"".to_owned();
    plan
}

/// Writes that go on in several threads, each to a place of its own, and when they were answered.
struct Load {
    block_bytes: u64,
    pause: Duration,
    next: AtomicU64,
    stop: AtomicBool,
    answered: Mutex<Vec<(u64, Instant)>>,
}

impl Load {
    fn new(block_bytes: u64, pause: Duration) -> Load {
        Load {
            block_bytes,
            pause,
            next: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            answered: Mutex::default(),
        }
    }

    /// Ends when it is told to, when the disk refuses a write, or when there is no place left.
    fn write(&self, disk: &NbdDisk) {
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let at = number * self.block_bytes;
            if at + self.block_bytes > SIZE_BYTES
                || disk.write(at, &content(number, self.block_bytes)).is_err()
            {
                return;
            }
            self.answered().push((number, Instant::now()));
            std::thread::sleep(self.pause);
        }
    }

    fn answered(&self) -> std::sync::MutexGuard<'_, Vec<(u64, Instant)>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest time between two answers after `from`.
    fn longest_stall(&self, from: Instant) -> Duration {
        let mut times: Vec<Instant> = self.answered().iter().map(|(_, at)| *at).collect();
        times.retain(|at| *at >= from);
        times.sort_unstable();
        let first = times.first().map_or(Duration::MAX, |first| *first - from);
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default().max(first)
    }

    fn answered_since(&self, from: Instant) -> usize {
        self.answered().iter().filter(|(_, at)| *at >= from).count()
    }
}

fn content(number: u64, bytes: u64) -> Vec<u8> {
    (number + 1).to_le_bytes().repeat(bytes as usize / 8)
}

/// What the target says, looked at all the time.
struct Watch {
    client: TargetClient,
    runtime: tokio::runtime::Handle,
    stop: AtomicBool,
    /// When it last said *zero loss*: the look began then.
    held: Mutex<Option<Instant>>,
}

impl Watch {
    fn new(site: &Site) -> Watch {
        Watch {
            client: TargetClient::new(&site.dir().join("target.sock")),
            runtime: site.runtime().handle().clone(),
            stop: AtomicBool::new(false),
            held: Mutex::default(),
        }
    }

    fn look(&self) -> Result<ReplicaStatus> {
        let began = Instant::now();
        let status = self.runtime.block_on(self.client.status())?;
        let replica = status.groups.into_iter().next().context("the target has no group")?;
        if replica.zero_loss == Some(ZeroLoss::Held) {
            let gap = replica.volumes.iter().any(|volume| volume.gap.is_some());
            ensure!(!gap, "zero loss is claimed inside a gap: {replica:#?}");
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            *held = (*held).max(Some(began));
        }
        Ok(replica)
    }

    fn run(&self) -> Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            self.look()?;
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn last_held(&self) -> Option<Instant> {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it says what is wanted.
    fn wait(&self, what: &str, until: impl Fn(Option<ZeroLoss>) -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let claim = self.look()?.zero_loss;
            if until(claim) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "waited in vain for {what}: {claim:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Proves that the target has every write that was answered before it last said *zero loss*. The link
    /// is cut: what it has does not change.
    fn check(&self, site: &Site, load: &Load) -> Result<usize> {
        let held = self.last_held().context("it never said zero loss")?;
        let seq = self.look()?.position.seq;
        let there = site.read_export(&format!("/v0@seq:{seq}"))?;
        let answered = load.answered();
        let claimed = answered.iter().filter(|(_, at)| *at < held);
        let mut count = 0;
        for (number, at) in claimed {
            let (from, bytes) = ((number * load.block_bytes) as usize, load.block_bytes as usize);
            ensure!(
                there[from..from + bytes] == content(*number, load.block_bytes),
                "write {number} was answered {:?} before zero loss was claimed, and is missing",
                held - *at
            );
            count += 1;
        }
        Ok(count)
    }
}

/// Puts a load on so many connections and looks at the target, while `story` goes on; it says when the load
/// is to end, if it does not by itself.
fn meanwhile(
    site: &mut Site,
    load: &Load,
    connections: usize,
    watch: &Watch,
    story: impl FnOnce(&mut Site) -> Result<()>,
) -> Result<()> {
    let disks = (0..connections).map(|_| site.disk(0, 1)).collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let writers: Vec<_> =
            disks.iter().map(|disk| scope.spawn(move || load.write(disk))).collect();
        let watching = scope.spawn(|| watch.run());
        let told = story(site);
        load.stop.store(true, Ordering::Relaxed);
        // Whoever still waits for an answer gets one, or an error.
        site.network().stall(false);
        site.network().dead(false);
        for writer in writers {
            let _ = writer.join();
        }
        watch.stop.store(true, Ordering::Relaxed);
        let watched = watching.join().map_err(|_| anyhow::anyhow!("the watch panicked"))?;
        told.and(watched)
    })
}

fn stage(status: &GroupStatus) -> Option<SyncStage> {
    status.sync.as_ref().map(|sync| sync.stage)
}

fn wait_for_zero_loss(site: &Site, watch: &Watch) -> Result<()> {
    site.wait("sync", |status| stage(status) == Some(SyncStage::Sync))?;
    watch.wait("zero loss", |claim| claim == Some(ZeroLoss::Held))
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

#[test]
fn a_source_that_dies_under_a_lease_has_lost_nothing() -> Result<()> {
    let mut site = Site::new(plan())?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    let (load, watch) = (Load::new(4096, Duration::ZERO), Watch::new(&site));
    wait_for_zero_loss(&site, &watch)?;
    meanwhile(&mut site, &load, 8, &watch, |site| {
        pause(1000);
        site.network().dead(true);
        // What is answered from now on is not at the target.
        pause(300);
        site.kill_agent()?;
        let said = watch.look()?.zero_loss;
        ensure!(said == Some(ZeroLoss::Held), "the lease is not held any more: {said:?}");
        let checked = watch.check(site, &load)?;
        ensure!(checked > 100, "only {checked} writes were answered");
        ensure!(checked == load.answered().len(), "an answer came after the cut");
        watch.wait("the end", |claim| matches!(claim, Some(ZeroLoss::Until { .. })))
    })?;
    site.spawn_agent(NODE)?;
    wait_for_zero_loss(&site, &watch)
}

#[test]
fn a_new_agent_outlasts_what_the_one_before_has_granted() -> Result<()> {
    let (site, watch) = outlasted(|site| site.spawn_agent(NODE))?;
    wait_for_zero_loss(&site, &watch)
}

#[test]
fn an_agent_without_capture_outlasts_it_too() -> Result<()> {
    outlasted(|site| site.spawn_passthrough(NODE)).map(drop)
}

/// The agent is killed under a lease, and another serves its devices while the target still holds it.
fn outlasted(start: impl Fn(&mut Site) -> Result<()>) -> Result<(Site, Watch)> {
    let mut site = Site::new(plan())?;
    site.start_target()?;
    site.spawn_agent(NODE)?;
    site.wait_in_sync()?;
    let watch = Watch::new(&site);
    wait_for_zero_loss(&site, &watch)?;
    // The newest lease is as long as it can be.
    site.network().dead(true);
    site.kill_agent()?;
    start(&mut site)?;
    let (load, began) = (Load::new(4096, Duration::from_millis(2)), Instant::now());
    meanwhile(&mut site, &load, 2, &watch, |site| {
        let deadline = began + LEASE + SLACK;
        while load.answered().is_empty() && Instant::now() < deadline {
            pause(10);
        }
        ensure!(load.answered_since(began) > 0, "it goes on without the target after the lease");
        pause(500);
        watch.check(site, &load)?;
        Ok(())
    })?;
    // As long as the application waited is the claim that it waited for.
    let held = watch.last_held().context("it never said zero loss")?;
    ensure!(held > began, "the lease was over before the new agent ran");
    Ok((site, watch))
}

/// The link is cut, or hangs, while writes go on.
fn cut(trouble: impl Fn(&Site, bool)) -> Result<()> {
    let mut site = Site::started(plan())?;
    site.wait_in_sync()?;
    let (load, watch) = (Load::new(4096, Duration::from_millis(2)), Watch::new(&site));
    wait_for_zero_loss(&site, &watch)?;
    meanwhile(&mut site, &load, 4, &watch, |site| {
        pause(500);
        let cut = Instant::now();
        trouble(site, true);
        site.wait("async", |status| stage(status) == Some(SyncStage::Async))?;
        let asynchronous = Instant::now();
        pause(500);
        let stall = load.longest_stall(cut);
        ensure!(stall <= SYNC_TIMEOUT + LEASE + SLACK, "writes waited for {stall:?}");
        ensure!(stall >= SYNC_TIMEOUT / 2, "writes did not wait: {stall:?}");
        ensure!(load.answered_since(asynchronous) > 50, "the application goes on");
        let said = watch.look()?.zero_loss;
        ensure!(matches!(said, Some(ZeroLoss::Until { .. })), "{said:?}");
        watch.check(site, &load)?;
        let sync = site.status()?.sync.context("it is to be in sync")?;
        ensure!(sync.reason.is_some() && sync.left_total == 1, "{sync:?}");
        trouble(site, false);
        wait_for_zero_loss(site, &watch)
    })?;
    site.wait_in_sync()?;
    let last = load.answered().len();
    ensure!(watch.check(&site, &load)? > last / 2, "nothing of the load was judged");
    Ok(())
}

#[test]
fn a_cut_link_costs_a_stated_time_and_the_claim_has_ended_by_then() -> Result<()> {
    cut(|site, cut| site.network().dead(cut))
}

#[test]
fn a_link_that_hangs_costs_a_stated_time_and_the_claim_has_ended_by_then() -> Result<()> {
    cut(|site, cut| site.network().stall(cut))
}

#[test]
fn a_full_ring_ends_the_claim_before_a_write_without_a_record_is_answered() -> Result<()> {
    let mut plan = plan();
    plan.ring_bytes = 16 * MIB;
    plan.compression = "off";
    let mut site = Site::started(plan)?;
    site.wait_in_sync()?;
    // More at once than the ring can hold.
    let (load, watch) = (Load::new(MIB, Duration::ZERO), Watch::new(&site));
    wait_for_zero_loss(&site, &watch)?;
    site.network().stall(true);
    pause(50);
    let began = Instant::now();
    meanwhile(&mut site, &load, 40, &watch, |site| {
        site.wait("a gap", |status| status.gaps_total > 0)?;
        ensure!(began.elapsed() < Duration::from_secs(1), "the lease is over already");
        let stages = [SyncStage::Leaving, SyncStage::Async];
        site.wait("no sync", |status| stage(status).is_some_and(|stage| stages.contains(&stage)))?;
        while load.answered().len() < 60 && began.elapsed() < LEASE + SYNC_TIMEOUT + SLACK {
            pause(5);
        }
        ensure!(load.answered().len() >= 60, "the application goes on after the lease");
        watch.check(site, &load)?;
        let said = watch.look()?.zero_loss;
        ensure!(matches!(said, Some(ZeroLoss::Until { .. })), "{said:?}");
        Ok(())
    })?;
    // The gap has come to the target; nothing is claimed in it, which each look checks.
    wait_for_zero_loss(&site, &watch)?;
    site.wait_in_sync()?;
    let newest = site.read_export("/v0@latest")?;
    ensure!(newest == std::fs::read(site.image(0))?, "the replica is not the disk");
    Ok(())
}
