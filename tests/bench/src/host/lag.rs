//! How far a target lags behind half of what can be sustained.
//!
//! A round first finds out what can be sustained: how fast a fixed number of random writes of 4 KiB gets to the target
//! when each is made as soon as another is answered. Then writes are made at half that rate by the clock, however long
//! each takes, and what the agent has counted as its lag meanwhile is the round's figures. The agent runs in the process
//! that makes the load, the target in one of its own.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tidemark_agent::lag::LagHistogram;
use tidemark_tests::site::{GROUP, Plan, Site};

use super::{
    load::{self, Area, BLOCK_BYTES, Load},
    node, wait_in_sync,
};
use crate::figures::{Bar, Bound, Comparison, in_rounds};

const DEPTH: usize = 32;

/// Milliseconds; and the rates.
///
/// # Errors
/// A side that cannot be started, a write that fails.
pub fn measure(rounds: usize, short: bool) -> Result<Vec<Comparison>> {
    let (size_bytes, blocks, seconds) =
        if short { (1 << 30, 8 << 10, 3) } else { (4 << 30, 256 << 10, 20) };
    let mut plan = Plan::new(&[size_bytes]);
    plan.ring_bytes = 256 << 20;
    plan.through_network = false;
    let mut site = Site::new(plan)?;
    let to = (site.front(0), Area::whole(size_bytes));
    to.1.fill(&site.image(0))?;
    site.spawn_target(&node()?)?;
    site.start_agent()?;
    wait_in_sync(&site)?;

    let mut rates = Vec::new();
    let lags = in_rounds(rounds, |round| {
        let seed = 2 * round as u64;
        let sustained = sustained(&site, &to, blocks, seed)?;
        // What is counted begins anew with each life of an agent.
        ensure!(site.stop_agent()?, "the agent did not end cleanly");
        site.start_agent()?;
        wait_in_sync(&site)?;
        let lasting = Duration::from_secs(seconds);
        load::write_at_rate(site.runtime(), &to, sustained / 2.0, lasting, seed + 1)?;
        wait_in_sync(&site)?;
        ensure!(site.status()?.gaps_total == 0, "half of what can be sustained is too much");
        let lag = lag(&site)?;
        let ms = |permille| lag.quantile_ns(permille).map(|ns| ns as f64 / 1e6);
        let rate = |blocks_per_s: f64| blocks_per_s * BLOCK_BYTES as f64 / 1e6;
        rates.push(vec![rate(sustained), rate(sustained / 2.0)]);
        [500, 990, 1000]
            .map(ms)
            .into_iter()
            .collect::<Option<Vec<_>>>()
            .context("no lag was counted")
    })?;
    Ok(vec![
        Comparison {
            what: "lag at half of the sustained rate".to_owned(),
            unit: "ms",
            names: ["p50", "p99", "longest"].map(str::to_owned).to_vec(),
            rounds: lags,
            bars: vec![Bar::figure(0, Bound::AtMost(20.0)), Bar::figure(1, Bound::AtMost(200.0))],
        },
        Comparison {
            what: "the rates of random writes of 4 KiB in this".to_owned(),
            unit: "MB/s",
            names: ["sustained", "while the lag was counted"].map(str::to_owned).to_vec(),
            rounds: rates,
            bars: Vec::new(),
        },
    ])
}

/// Writes per second, until the last is safe on both sides.
fn sustained(site: &Site, to: &(PathBuf, Area), blocks: u64, seed: u64) -> Result<f64> {
    let start = Instant::now();
    load::write(site.runtime(), std::slice::from_ref(to), Load::blocks(blocks, DEPTH), seed)?;
    wait_in_sync(site)?;
    Ok(blocks as f64 / start.elapsed().as_secs_f64())
}

fn lag(site: &Site) -> Result<LagHistogram> {
    site.runtime().block_on(site.agent()?.lag(GROUP)).context("the group is not there")
}
