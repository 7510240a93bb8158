//! Random writes, as many at a time as asked for, over NBD sockets.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use bytes::Bytes;
use tidemark_nbd::client::{Client, Options};
use tidemark_tests::workload::{content, rng::Rng};
use tokio::{
    runtime::Runtime,
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

/// What one write has, unless another size is asked for.
pub const BLOCK_BYTES: u64 = 4096;
/// The unit in which the agent notes what was written.
pub const REGION_BYTES: u64 = 1 << 20;
/// How often what is due by the clock is written.
const TICK: Duration = Duration::from_millis(2);

/// Where writes go: to regions at equal distances.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// Where the first begins.
    pub start_bytes: u64,
    /// How many there are.
    pub regions: u64,
    /// From the start of one to the start of the next.
    pub stride_bytes: u64,
}

impl Area {
    /// A whole disk.
    pub fn whole(size_bytes: u64) -> Area {
        Area::at(0, size_bytes)
    }

    /// So much in one place.
    pub fn at(start_bytes: u64, size_bytes: u64) -> Area {
        Area { start_bytes, regions: size_bytes / REGION_BYTES, stride_bytes: REGION_BYTES }
    }

    /// So much, spread evenly over a disk.
    pub fn spread(size_bytes: u64, over_bytes: u64) -> Area {
        let regions = size_bytes / REGION_BYTES;
        Area { start_bytes: 0, regions, stride_bytes: over_bytes / regions }
    }

    fn place(&self, rng: &mut Rng, bytes: u64) -> u64 {
        let region = self.start_bytes + rng.below(self.regions) * self.stride_bytes;
        region + rng.below(REGION_BYTES / bytes) * bytes
    }

    /// Makes the file if there is none, and gives it all blocks of this area, as a disk has them: no write waits for
    /// the file system to find one.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn fill(&self, path: &Path) -> Result<()> {
        let file = File::options().create(true).truncate(false).write(true).open(path);
        let file = file.with_context(|| format!("cannot make {}", path.display()))?;
        let region = vec![0x5a; usize::try_from(REGION_BYTES)?];
        for number in 0..self.regions {
            file.write_all_at(&region, self.start_bytes + number * self.stride_bytes)?;
        }
        file.sync_all()?;
        Ok(())
    }
}

/// Writes to be made.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// How many.
    pub writes: u64,
    /// What each has: a part of a region.
    pub bytes: u64,
    /// How many at a time.
    pub depth: usize,
}

impl Load {
    /// So many of the usual blocks.
    pub fn blocks(writes: u64, depth: usize) -> Load {
        Load { writes, bytes: BLOCK_BYTES, depth }
    }
}

/// Makes the writes of a load to the areas of these sockets in equal parts, and flushes.
///
/// # Errors
/// A connection that cannot be made, a write that fails.
pub fn write(
    runtime: &Runtime,
    to: &[(PathBuf, Area)],
    Load { writes, bytes, depth }: Load,
    seed: u64,
) -> Result<()> {
    runtime.block_on(async {
        let left = Arc::new(AtomicU64::new(writes));
        let mut clients = Vec::new();
        for (socket, area) in to {
            clients
                .push((Client::connect(socket.as_path(), "", &Options::default()).await?, *area));
        }
        let mut writers = JoinSet::new();
        for writer in 0..depth {
            let ((client, area), left) = (clients[writer % clients.len()].clone(), left.clone());
            writers.spawn(async move {
                let mut rng = Rng::new(seed * depth as u64 + writer as u64);
                let one_less = |left: u64| left.checked_sub(1);
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
                    let offset = area.place(&mut rng, bytes);
                    client.write(offset, block(seed, offset, bytes), false).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = writers.join_next().await {
            ended??;
        }
        for (client, _) in clients {
            client.flush().await?;
            client.disconnect().await;
        }
        Ok(())
    })
}

/// Writes at a rate, for so long, however long each write takes.
///
/// # Errors
/// A connection that cannot be made, a write that fails.
pub fn write_at_rate(
    runtime: &Runtime,
    (socket, area): &(PathBuf, Area),
    blocks_per_s: f64,
    duration: Duration,
    seed: u64,
) -> Result<()> {
    runtime.block_on(async {
        let client = Client::connect(socket.as_path(), "", &Options::default()).await?;
        let (mut rng, mut under_way) = (Rng::new(seed), JoinSet::new());
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (start, mut sent) = (Instant::now(), 0);
        let total = (duration.as_secs_f64() * blocks_per_s) as u64;
        while sent < total {
            tick.tick().await;
            let due = ((start.elapsed().as_secs_f64() * blocks_per_s) as u64).min(total);
            while sent < due {
                let (client, offset) = (client.clone(), area.place(&mut rng, BLOCK_BYTES));
                let block = block(seed, offset, BLOCK_BYTES);
                under_way.spawn(async move { client.write(offset, block, false).await });
                sent += 1;
            }
            while let Some(done) = under_way.try_join_next() {
                done??;
            }
        }
        while let Some(done) = under_way.join_next().await {
            done??;
        }
        client.disconnect().await;
        Ok(())
    })
}

fn block(seed: u64, offset: u64, bytes: u64) -> Bytes {
    let mut bytes = vec![0; bytes as usize];
    content::fill(seed as usize, offset, &mut bytes);
    Bytes::from(bytes)
}
