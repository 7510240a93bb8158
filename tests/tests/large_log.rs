//! A target with a large log serves points soon after its start.

use std::env;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::workload::{self, Shape};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The volume's size: what is written goes over it again and again.
const SIZE_BYTES: u64 = 512 * MIB;
/// How large the log is to be, unless `TIDEMARK_LOG_GIB` says otherwise.
const LOG_GIB: u64 = 1;
/// What is promised of any size: only the part that is not sealed is read.
const SERVED_WITHIN: Duration = Duration::from_secs(10);
/// Operations between two looks at the log's size.
const OPERATIONS: usize = 4_000;

#[test]
fn a_target_with_a_large_log_serves_points_soon_after_its_start() -> Result<()> {
    let wanted = match env::var("TIDEMARK_LOG_GIB") {
        Ok(text) => text.parse().context("TIDEMARK_LOG_GIB is to be a number")?,
        Err(_) => LOG_GIB,
    };
    let mut plan = Plan::new(&[SIZE_BYTES]);
    plan.compression = "off";
    let mut site = Site::started(plan)?;
    site.wait_in_sync()?;
    let early = site.mark("early")?;
    let disk = site.disk(0, 2)?;
    let never = AtomicBool::new(false);
    let mut seed = 0;
    while log_bytes(&site)? < wanted * GIB {
        seed += 1;
        let shape = Shape {
            seed,
            operations: OPERATIONS,
            sizes_bytes: vec![SIZE_BYTES],
            block_bytes: 4096,
            blocks_max: 32,
            zeroes_percent: 2,
            discards_percent: 2,
            flushes_percent: 1,
            hot_bytes: 16 * MIB,
        };
        let log = workload::run(&[&disk], &shape.operations()?, 16, &never);
        ensure!(log.error().is_none(), "{:?}", log.error());
        // The ring is not to overflow: a gap would take the points.
        site.wait_in_sync()?;
    }
    let log_bytes = log_bytes(&site)?;
    drop(disk);
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    site.stop_target()?;

    let start = Instant::now();
    site.start_target()?;
    let export = site.open_export("/v0@latest")?;
    let head = site.read(&export, 0, MIB)?;
    let served = start.elapsed();
    println!("a log of {} MiB: served after {} ms", log_bytes / MIB, served.as_millis());
    ensure!(served < SERVED_WITHIN, "the first read took {served:?}");
    let image = std::fs::read(site.image(0))?;
    ensure!(image.starts_with(&head), "the newest point is not the disk");
    let old = site.open_export(&format!("/v0@seq:{early}"))?;
    ensure!(site.read(&old, 0, MIB)?.iter().all(|byte| *byte == 0), "the early point has changed");
    Ok(())
}

fn log_bytes(site: &Site) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(site.log_dir())? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}
