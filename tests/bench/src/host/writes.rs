//! Random writes of 4 KiB through an NBD socket, 32 at a time, until all are safe: on the local disk, and for a
//! protected volume at the target too. Agent, target and whoever writes share this machine's processors.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::Result;
use bytes::Bytes;
use tidemark_nbd::client::{Client, Options};
use tidemark_tests::{
    site::{Plan, Site},
    workload::{content, rng::Rng},
};
use tokio::runtime::Runtime;

use super::{node, peers::Server};
use crate::figures::{Bar, Comparison, in_turn};

const BLOCK_BYTES: u64 = 4096;
const DEPTH: u64 = 32;

/// The size of each disk, and how much is written to it in one measurement.
struct Load {
    size_bytes: u64,
    written_bytes: u64,
}

/// Megabytes per second, the last flush included on both sides.
///
/// # Errors
/// A server that cannot be started, a write that fails.
pub fn measure(rounds: usize, short: bool) -> Result<Comparison> {
    let load = if short {
        Load { size_bytes: 1 << 30, written_bytes: 64 << 20 }
    } else {
        Load { size_bytes: 16 << 30, written_bytes: 4 << 30 }
    };
    let mut plan = Plan::new(&[load.size_bytes]);
    plan.ring_bytes = 256 << 20;
    plan.through_network = false;
    let mut site = Site::new(plan)?;
    let program = node()?;
    fill(&site.image(0), load.size_bytes)?;
    site.spawn_target(&program)?;
    site.spawn_agent(&program)?;
    site.wait_in_sync()?;
    let peer = |name: &str| -> Result<(PathBuf, PathBuf)> {
        let file = site.dir().join(format!("{name}.img"));
        fill(&file, load.size_bytes)?;
        Ok((file, site.dir().join(format!("{name}.sock"))))
    };
    let (file, socket) = peer("nbdkit")?;
    let nbdkit = Server::nbdkit(&file, &socket)?;
    let (file, socket) = peer("qemu-nbd")?;
    let qemu = Server::qemu_nbd(&file, &socket)?;
    let sockets = [site.front(0), nbdkit.socket.clone(), qemu.socket.clone()];
    let mut seed = 0;
    let rounds = in_turn(sockets.len(), rounds, |which| {
        seed += 1;
        let start = Instant::now();
        write(site.runtime(), &sockets[which], &load, seed)?;
        if which == 0 {
            site.wait_in_sync()?;
        }
        Ok(load.written_bytes as f64 / 1e6 / start.elapsed().as_secs_f64())
    })?;
    Ok(Comparison {
        what: format!("random writes of 4 KiB, {DEPTH} at a time, over an NBD socket"),
        unit: "MB/s",
        names: ["protected", "nbdkit file", "qemu-nbd io_uring"].map(str::to_owned).to_vec(),
        rounds,
        bars: vec![
            Bar { of: 0, to: 1, at_least: Some(0.6) },
            Bar { of: 0, to: 2, at_least: Some(2.0) },
        ],
    })
}

/// Gives a file all its blocks, as a disk has them.
fn fill(path: &Path, size_bytes: u64) -> Result<()> {
    use std::{fs::File, io::Write};
    let mut file = File::create(path)?;
    let block = vec![0x5a; 4 << 20];
    for _ in 0..size_bytes / block.len() as u64 {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(())
}

fn write(runtime: &Runtime, socket: &Path, load: &Load, seed: u64) -> Result<()> {
    let (size_bytes, count) = (load.size_bytes, load.written_bytes / BLOCK_BYTES);
    runtime.block_on(async {
        let client = Client::connect(socket, "", &Options::default()).await?;
        let next = Arc::new(AtomicU64::new(0));
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..DEPTH {
            let (client, next) = (client.clone(), next.clone());
            writers.spawn(async move {
                let mut rng = Rng::new(seed * DEPTH + writer);
                while next.fetch_add(1, Ordering::Relaxed) < count {
                    let offset = rng.below(size_bytes / BLOCK_BYTES) * BLOCK_BYTES;
                    let mut bytes = vec![0; BLOCK_BYTES as usize];
                    content::fill(seed as usize, offset, &mut bytes);
                    client.write(offset, Bytes::from(bytes), false).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = writers.join_next().await {
            ended??;
        }
        client.flush().await?;
        client.disconnect().await;
        Ok(())
    })
}
