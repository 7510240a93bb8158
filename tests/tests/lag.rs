//! How far a target lags behind 20 MB/s of random writes of 4 KiB. The figures are printed, for people to
//! judge; `TIDEMARK_LAG_SECONDS` makes it last longer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use tidemark_tests::site::{GROUP, Plan, Site};
use tidemark_tests::workload::content;
use tidemark_tests::workload::rng::Rng;

const SIZE_BYTES: u64 = 256 << 20;
const BLOCK_BYTES: u64 = 4096;
const BYTES_PER_S: u64 = 20_000_000;

#[test]
fn the_target_lags_little_behind_random_writes() -> Result<()> {
    let seconds = std::env::var("TIDEMARK_LAG_SECONDS").ok().map_or(Ok(5), |text| text.parse())?;
    let mut site = Site::new(Plan::new(&[SIZE_BYTES]))?;
    // The image has all its blocks, as a disk has: no write waits for the file system to find one.
    std::fs::write(site.image(0), vec![0; usize::try_from(SIZE_BYTES)?])?;
    site.start_target()?;
    site.start_agent()?;
    site.wait_in_sync()?;
    let front = site.open_front(0)?;
    let before = lag(&site)?.total();
    let mut rng = Rng::new(20);
    let took = site.runtime().block_on(async {
        let start = Instant::now();
        let mut tick = tokio::time::interval(Duration::from_millis(2));
        let (mut sent, mut under_way) = (0u64, tokio::task::JoinSet::new());
        let total = BYTES_PER_S * seconds / BLOCK_BYTES;
        while sent < total {
            tick.tick().await;
            let due = (start.elapsed().as_secs_f64() * BYTES_PER_S as f64) as u64 / BLOCK_BYTES;
            while sent < due.min(total) {
                let offset = rng.below(SIZE_BYTES / BLOCK_BYTES) * BLOCK_BYTES;
                let mut bytes = vec![0; BLOCK_BYTES as usize];
                content::fill(sent as usize, offset, &mut bytes);
                let front = front.clone();
                under_way
                    .spawn(async move { front.write(offset, Bytes::from(bytes), false).await });
                sent += 1;
                while let Some(done) = under_way.try_join_next() {
                    done??;
                }
            }
        }
        while let Some(done) = under_way.join_next().await {
            done??;
        }
        anyhow::Ok(start.elapsed())
    })?;
    site.wait_in_sync()?;
    let (lag, status) = (lag(&site)?, site.status()?);
    let ms = |permille| lag.quantile_ns(permille).map(|ns| ns as f64 / 1e6).unwrap_or_default();
    println!(
        "{} MB/s of random 4 KiB writes for {:.1} s: lag p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms \
         ({} frames, {} gaps)",
        BYTES_PER_S / 1_000_000,
        took.as_secs_f64(),
        ms(500),
        ms(990),
        ms(1000),
        lag.total() - before,
        status.gaps_total,
    );
    ensure!(lag.total() > before, "no lag was measured");
    ensure!(ms(500) > 0.0 && ms(500) <= ms(990) && ms(990) <= ms(1000), "these are no quantiles");
    ensure!(status.gaps_total == 0, "{status:#?}");
    ensure!(
        site.read_export("/v0@latest")? == std::fs::read(site.image(0))?,
        "the replica differs"
    );
    Ok(())
}

fn lag(site: &Site) -> Result<tidemark_agent::lag::LagHistogram> {
    site.runtime().block_on(site.agent()?.lag(GROUP)).context("the group is not there")
}
