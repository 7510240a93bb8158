//! What becomes of the rate of random writes when something is much larger: a volume, the number of groups, the number of
//! points at the target, the writes. Until all is safe at the target, as [`super::writes`] measures it.
//!
//! **A vast volume**, 8 TiB against 16 GiB. What a write may cost more there is its place in the dirty map and in the
//! index, and both go by regions; so the same number of regions is written to in both: in one place, and spread evenly
//! over the whole volume. The bar is about the latter, which is the harder one, since neighbours on a page of the bitmap
//! are no help there. Images are sparse, with all blocks of these regions there: what writes all over a sparse file
//! cost is mostly what the file system takes to find blocks, on either volume. The first sync of the vast volume reads
//! all of it, and takes most of the time of this measurement.
//!
//! **Many groups**, 64 against one, which write the same in sum, to areas that are as large in sum, through rings that are
//! as large in sum. All groups are one agent's. They are each as busy as the one, and then only as busy in sum. Beside
//! the latter is the same without capture: what many sockets with few requests each cost by themselves, where one
//! socket's requests share wake-ups and system calls.
//!
//! **Many points**, 100,000 marks against none.
//!
//! **Loads**: more writes at a time, and larger ones. There is no bar; what the same socket gives without capture is
//! beside each.

use std::{path::PathBuf, sync::Arc, time::Instant};

use anyhow::{Result, ensure};
use tidemark_control::agent::AgentClient;
use tidemark_tests::site::{GROUP, Plan, Site};
use tokio::task::JoinSet;

use super::{
    load::{self, Area, BLOCK_BYTES, Load},
    node, wait_in_sync,
};
use crate::figures::{Bar, Bound, Comparison, in_turn};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
/// Writes at a time.
const DEPTH: usize = 128;
const GROUPS: usize = 64;
/// Writes at a time to each of the groups that are compared.
const GROUP_DEPTH: usize = 32;
/// Writes at a time that are compared, and sizes of writes, so many at a time.
const DEPTHS: [usize; 4] = [1, 4, 32, 128];
const SIZES_BYTES: [u64; 4] = [16 << 10, 64 << 10, 256 << 10, 1 << 20];
const SIZES_DEPTH: usize = 16;
/// Marks that are asked for at a time.
const MARKS_AT_ONCE: usize = 32;

/// Agent and target in processes of their own, or what serves without capture, and where load goes.
struct Measured {
    site: Site,
    captures: bool,
    seed: u64,
}

impl Measured {
    /// Both sides, in sync; before they are started, images have all blocks of these areas.
    fn start(what: &str, plan: Plan, areas: &[Area]) -> Result<Measured> {
        let mut site = filled(plan, areas)?;
        site.spawn_target(&node()?)?;
        let start = Instant::now();
        site.spawn_agent(&node()?)?;
        wait_in_sync(&site)?;
        eprintln!("{what}: first sync in {:.1} s", start.elapsed().as_secs_f64());
        Ok(Measured { site, captures: true, seed: 0 })
    }

    /// The same without capture, and so without a target.
    fn start_plain(plan: Plan, areas: &[Area]) -> Result<Measured> {
        let mut site = filled(plan, areas)?;
        site.spawn_passthrough(&node()?)?;
        Ok(Measured { site, captures: false, seed: 0 })
    }

    /// The rate at which a load is put on this area of each group, in sum.
    fn rate(&mut self, area: Area, load: Load) -> Result<f64> {
        self.seed += 1;
        let groups = 0..self.site.plan().groups;
        let to: Vec<(PathBuf, Area)> =
            groups.map(|group| (self.site.front_of(group, 0), area)).collect();
        let start = Instant::now();
        load::write(self.site.runtime(), &to, load, self.seed)?;
        if self.captures {
            wait_in_sync(&self.site)?;
        }
        Ok((load.writes * load.bytes) as f64 / 1e6 / start.elapsed().as_secs_f64())
    }

    fn stop(mut self) -> Result<()> {
        if self.captures {
            for status in self.site.statuses()? {
                if status.gaps_total > 0 {
                    println!("{}: {} gaps began", status.name, status.gaps_total);
                }
            }
        }
        ensure!(self.site.stop_agent()?, "the agent did not end cleanly");
        if self.captures { self.site.stop_target() } else { Ok(()) }
    }
}

/// A site whose images have all blocks of these areas.
fn filled(plan: Plan, areas: &[Area]) -> Result<Site> {
    let site = Site::new(plan)?;
    for group in 0..site.plan().groups {
        for area in areas {
            area.fill(&site.image_of(group, 0))?;
        }
    }
    Ok(site)
}

fn plan(size_bytes: u64, groups: usize) -> Plan {
    let mut plan = Plan::new(&[size_bytes]);
    plan.groups = groups;
    plan.ring_bytes = GIB / groups as u64;
    plan.through_network = false;
    plan
}

/// Megabytes per second to a small and a vast volume.
///
/// # Errors
/// A side that cannot be started, a write that fails.
pub fn volumes(rounds: usize, short: bool) -> Result<Comparison> {
    let (small, vast, area, written) = if short {
        (GIB, 8 * GIB, 256 * MIB, 8 * MIB)
    } else {
        (16 * GIB, 8192 * GIB, 4 * GIB, 512 * MIB)
    };
    let plan = |size| {
        let mut plan = plan(size, 1);
        // A quarter of those that are written to.
        plan.group_lines = "active_regions = 1024".to_owned();
        plan
    };
    let areas = |size| [Area::spread(area, size), Area::at((size - area) / 2, area)];
    let mut sites = [
        Measured::start("small", plan(small), &areas(small))?,
        Measured::start("vast", plan(vast), &areas(vast))?,
    ];
    let rounds = in_turn(4, rounds, |which| {
        let (site, place) = (which % 2, which / 2);
        sites[site]
            .rate(areas([small, vast][site])[place], Load::blocks(written / BLOCK_BYTES, DEPTH))
    })?;
    sites.into_iter().try_for_each(Measured::stop)?;
    let name = |size: u64, place: &str| format!("{} GiB, {place}", size / GIB);
    let names = ["spread", "in one place"].map(|place| [name(small, place), name(vast, place)]);
    Ok(Comparison {
        what: format!("the size of a volume, of which {} MiB are written to", area / MIB),
        unit: "MB/s",
        names: names.into_iter().flatten().collect(),
        rounds,
        bars: vec![Bar::ratio(1, 0, Bound::AtLeast(0.9)), Bar::printed(3, 2)],
    })
}

/// Megabytes per second to one group and to many, in sum.
///
/// # Errors
/// A side that cannot be started, a write that fails.
pub fn groups(rounds: usize, short: bool) -> Result<Comparison> {
    let (size, written) = if short { (GIB, 64 * MIB) } else { (4 * GIB, 512 * MIB) };
    let many = GROUPS as u64;
    let (one, each) = (Area::whole(size), Area::whole(size / many));
    let plans = [plan(size, 1), plan(size / many, GROUPS)];
    let sites = [
        (Measured::start("1 group", plans[0].clone(), &[one])?, one),
        (Measured::start("many groups", plans[1].clone(), &[each])?, each),
        (Measured::start_plain(plans[0].clone(), &[one])?, one),
        (Measured::start_plain(plans[1].clone(), &[each])?, each),
    ];
    let things = [
        (0, GROUP_DEPTH),
        (1, GROUPS * GROUP_DEPTH),
        (0, DEPTH),
        (1, DEPTH),
        (2, DEPTH),
        (3, DEPTH),
    ]
    .map(|(site, depth)| (site, Load::blocks(written / BLOCK_BYTES, depth)));
    let names = things.map(|(site, load)| {
        let groups = if site % 2 == 0 { 1 } else { GROUPS };
        let plain = if site < 2 { "" } else { ", no capture" };
        format!("{groups} with {} at a time{plain}", load.depth / groups)
    });
    Ok(Comparison {
        what: "the number of groups on one target, in sum".to_owned(),
        unit: "MB/s",
        names: names.to_vec(),
        rounds: rates(sites, &things, rounds)?,
        bars: vec![
            Bar::ratio(1, 0, Bound::AtLeast(0.8)),
            Bar::ratio(3, 2, Bound::AtLeast(0.8)),
            Bar::printed(5, 4),
        ],
    })
}

/// Megabytes per second by the number of writes at a time, and by their size, with and without capture.
///
/// # Errors
/// A side that cannot be started, a write that fails.
pub fn loads(rounds: usize, short: bool) -> Result<Comparison> {
    let (size, written) = if short { (GIB, 16 * MIB) } else { (4 * GIB, 256 * MIB) };
    let area = Area::whole(size);
    let sites = [
        (Measured::start("protected", plan(size, 1), &[area])?, area),
        (Measured::start_plain(plan(size, 1), &[area])?, area),
    ];
    let depths = DEPTHS.map(|depth| (BLOCK_BYTES, depth));
    let sizes = SIZES_BYTES.map(|bytes| (bytes, SIZES_DEPTH));
    let mut comparison = Comparison {
        what: "the number of writes at a time, and their size".to_owned(),
        unit: "MB/s",
        names: Vec::new(),
        rounds: Vec::new(),
        bars: Vec::new(),
    };
    let mut things = Vec::new();
    for (bytes, depth) in depths.into_iter().chain(sizes) {
        // What is written one at a time takes long enough with less.
        let writes = if depth < SIZES_DEPTH { written / 8 } else { written } / bytes;
        for (site, what) in [(0, ""), (1, ", no capture")] {
            things.push((site, Load { writes, bytes, depth }));
            comparison.names.push(format!("{} KiB, {depth} at a time{what}", bytes >> 10));
        }
        comparison.bars.push(Bar::printed(things.len() - 2, things.len() - 1));
    }
    comparison.rounds = rates(sites, &things, rounds)?;
    Ok(comparison)
}

/// Megabytes per second with few and many points.
///
/// # Errors
/// A side that cannot be started, a write that fails.
pub fn points(rounds: usize, short: bool) -> Result<Comparison> {
    let (size, written, marks) =
        if short { (256 * MIB, 8 * MIB, 1000) } else { (4 * GIB, 512 * MIB, 100_000) };
    let area = Area::whole(size);
    let sites = [
        (Measured::start("no mark", plan(size, 1), &[area])?, area),
        (Measured::start("marks", plan(size, 1), &[area])?, area),
    ];
    let start = Instant::now();
    mark(&sites[1].0.site, marks)?;
    println!("{marks} marks in {:.1} s", start.elapsed().as_secs_f64());
    Ok(Comparison {
        what: "the number of points at the target".to_owned(),
        unit: "MB/s",
        names: vec!["no mark".to_owned(), format!("{marks} marks")],
        rounds: rates(
            sites,
            &[0, 1].map(|site| (site, Load::blocks(written / BLOCK_BYTES, DEPTH))),
            rounds,
        )?,
        bars: vec![Bar::ratio(1, 0, Bound::AtLeast(0.9))],
    })
}

/// The rates of each thing in turn, which is a site's number and the load that is put on it. After that all sites are
/// stopped.
fn rates<const SITES: usize>(
    mut sites: [(Measured, Area); SITES],
    things: &[(usize, Load)],
    rounds: usize,
) -> Result<Vec<Vec<f64>>> {
    let rates = in_turn(things.len(), rounds, |which| {
        let (site, load) = things[which];
        let (site, area) = &mut sites[site];
        site.rate(*area, load)
    })?;
    sites.into_iter().try_for_each(|(site, _)| site.stop())?;
    Ok(rates)
}

/// Sets so many marks, and waits until the target has them.
fn mark(site: &Site, count: usize) -> Result<()> {
    let client: Arc<AgentClient> = Arc::new(site.agent_client());
    site.runtime().block_on(async {
        let mut marking = JoinSet::new();
        for first in 0..MARKS_AT_ONCE {
            let client = client.clone();
            marking.spawn(async move {
                for number in (first..count).step_by(MARKS_AT_ONCE) {
                    client.mark(GROUP, &format!("mark {number}")).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = marking.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    })?;
    wait_in_sync(site)
}
