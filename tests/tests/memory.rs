//! What both sides take in memory while a vast volume is synced and written all over. By default it is a
//! smaller volume; `TIDEMARK_MEMORY_FULL=1` makes it 4 TiB and two million writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::content;
use tidemark_tests::workload::rng::Rng;

const NODE: &str = env!("CARGO_BIN_EXE_node");
const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;
const RING_BYTES: u64 = 64 * MIB;
const DEPTH: usize = 32;

#[test]
fn memory_is_bounded_whatever_the_volume() -> Result<()> {
    let full = std::env::var_os("TIDEMARK_MEMORY_FULL").is_some();
    let (size, writes) = if full { (4 << 40, 2_000_000) } else { (8 << 30, 20_000) };
    let mut plan = Plan::new(&[size]);
    plan.ring_bytes = RING_BYTES;
    let mut site = Site::new(plan)?;
    site.spawn_target(NODE)?;
    site.spawn_agent(NODE)?;
    let (Some(agent), Some(target)) = site.process_ids() else {
        unreachable!("both run elsewhere")
    };
    let (agent, target) = (Peak::watch(agent), Peak::watch(target));
    let start = Instant::now();
    // The first sync of so much takes longer than a test waits otherwise.
    while site.wait_in_sync().is_err() {
        let status = site.status()?;
        let left: u64 = status.volumes.iter().map(|volume| volume.uncaptured_regions).sum();
        println!("{:.0} s: {left} regions to sync", start.elapsed().as_secs_f64());
        ensure!(start.elapsed() < Duration::from_secs(2 * 3600), "{status:#?}");
    }
    let synced = start.elapsed();
    let (agent_sync, target_sync) = (agent.now(), target.now());
    let front = site.open_front(0)?;
    site.runtime().block_on(async {
        let (mut rng, mut under_way) = (Rng::new(4), tokio::task::JoinSet::new());
        for number in 0..writes {
            let offset = rng.below(size / BLOCK_BYTES) * BLOCK_BYTES;
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            content::fill(number, offset, &mut bytes);
            let front = front.clone();
            under_way.spawn(async move { front.write(offset, Bytes::from(bytes), false).await });
            if under_way.len() >= DEPTH {
                under_way.join_next().await.context("a write under way")???;
            }
        }
        while let Some(done) = under_way.join_next().await {
            done??;
        }
        anyhow::Ok(())
    })?;
    let written = start.elapsed() - synced;
    while site.wait_in_sync().is_err() {
        ensure!(start.elapsed() < Duration::from_secs(3 * 3600), "{:#?}", site.status()?);
    }
    let gaps = site.status()?.gaps_total;
    let (agent, target) = (agent.end()?, target.end()?);
    let mib = |bytes: u64| bytes / MIB;
    println!(
        "{} GiB, synced in {:.0} s, {writes} writes in {:.0} s ({gaps} gaps): peaks of anonymous and shared \
         memory: agent {} MiB ({} over its ring; {} after the sync), target {} MiB ({} after the sync)",
        size >> 30,
        synced.as_secs_f64(),
        written.as_secs_f64(),
        mib(agent),
        mib(agent.saturating_sub(RING_BYTES)),
        mib(agent_sync),
        mib(target),
        mib(target_sync),
    );
    ensure!(agent > RING_BYTES, "the ring is in memory: it was not measured");
    ensure!(agent <= RING_BYTES + 64 * MIB, "the agent took {} MiB", mib(agent));
    ensure!(target <= 256 * MIB, "the target took {} MiB", mib(target));
    Ok(())
}

/// The most memory that a process has been seen to have: anonymous, and shared as memfd is.
struct Peak {
    bytes: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    watching: JoinHandle<Result<()>>,
}

impl Peak {
    fn watch(process: u32) -> Peak {
        let (bytes, end) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let watching = std::thread::spawn({
            let (bytes, end) = (Arc::clone(&bytes), Arc::clone(&end));
            move || {
                while !end.load(Ordering::Relaxed) {
                    bytes.fetch_max(memory_of(process)?, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(())
            }
        });
        Peak { bytes, end, watching }
    }

    fn now(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn end(self) -> Result<u64> {
        self.end.store(true, Ordering::Relaxed);
        let ended = self.watching.join().map_err(|_| anyhow::anyhow!("the watch panicked"))?;
        ended.context("the process ended meanwhile")?;
        Ok(self.bytes.load(Ordering::Relaxed))
    }
}

fn memory_of(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let kilobytes = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.with_context(|| format!("no {field}"))?.parse::<u64>().context("a number")
    };
    Ok((kilobytes("RssAnon:")? + kilobytes("RssShmem:")?) * 1024)
}
