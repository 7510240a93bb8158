//! Random writes of 4 KiB through an NBD socket, 32 at a time, until all are safe: on the local disk, and for a
//! protected volume at the target too. Agent, target and whoever writes share this machine's processors. Beside it is what
//! bounds it: our own socket without capture, a server that keeps nothing, and a file without any server.

use std::{path::PathBuf, time::Instant};

use anyhow::Result;
use tidemark_tests::site::{Plan, Site};

use super::{
    load::{self, Area, BLOCK_BYTES, Load},
    node,
    peers::{self, Server},
};
use crate::figures::{Bar, Bound, Comparison, in_turn};

const DEPTH: usize = 32;
const NAMES: [&str; 6] = [
    "protected",
    "nbdkit file",
    "qemu-nbd io_uring",
    "own socket without capture",
    "nbdkit null",
    "fio io_uring on a file",
];

/// Megabytes per second, the last flush included on both sides.
///
/// # Errors
/// A server that cannot be started, a write that fails.
pub fn measure(rounds: usize, short: bool) -> Result<Comparison> {
    // The size of each disk, and how much is written to it in one measurement.
    let (size_bytes, written_bytes): (u64, u64) =
        if short { (1 << 30, 64 << 20) } else { (4 << 30, 4 << 30) };
    let mut plan = Plan::new(&[size_bytes]);
    plan.ring_bytes = 256 << 20;
    plan.through_network = false;
    // A quarter of those that are written to.
    plan.group_lines = "active_regions = 1024".to_owned();
    let (mut site, mut plain) = (Site::new(plan.clone())?, Site::new(plan)?);
    let (program, area) = (node()?, Area::whole(size_bytes));
    area.fill(&site.image(0))?;
    site.spawn_target(&program)?;
    site.spawn_agent(&program)?;
    site.wait_in_sync()?;
    area.fill(&plain.image(0))?;
    plain.spawn_passthrough(&program)?;
    let peer = |name: &str| -> Result<(PathBuf, PathBuf)> {
        let file = site.dir().join(format!("{name}.img"));
        area.fill(&file)?;
        Ok((file, site.dir().join(format!("{name}.sock"))))
    };
    let (file, nbdkit) = peer("nbdkit")?;
    let _nbdkit = Server::nbdkit(&file, &nbdkit)?;
    let (file, qemu) = peer("qemu-nbd")?;
    let _qemu = Server::qemu_nbd(&file, &qemu)?;
    let null = site.dir().join("null.sock");
    let _null = Server::nbdkit_null(size_bytes, &null)?;
    let (bare, _) = peer("bare")?;
    let sockets = [site.front(0), nbdkit, qemu, plain.front(0), null];
    let mut seed = 0;
    let rounds = in_turn(NAMES.len(), rounds, |which| {
        let Some(socket) = sockets.get(which) else {
            return peers::fio(&bare, written_bytes, DEPTH);
        };
        seed += 1;
        let start = Instant::now();
        let to = [(socket.clone(), area)];
        load::write(site.runtime(), &to, Load::blocks(written_bytes / BLOCK_BYTES, DEPTH), seed)?;
        if which == 0 {
            site.wait_in_sync()?;
        }
        Ok(written_bytes as f64 / 1e6 / start.elapsed().as_secs_f64())
    })?;
    plain.stop_agent()?;
    Ok(Comparison {
        what: format!("random writes of 4 KiB, {DEPTH} at a time, over an NBD socket"),
        unit: "MB/s",
        names: NAMES.map(str::to_owned).to_vec(),
        rounds,
        bars: vec![
            Bar::ratio(0, 1, Bound::AtLeast(0.6)),
            Bar::ratio(0, 2, Bound::AtLeast(2.0)),
            Bar::printed(0, 3),
            Bar::printed(3, 2),
            Bar::printed(4, 2),
            Bar::printed(5, 2),
        ],
    })
}
