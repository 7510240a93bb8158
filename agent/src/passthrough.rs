//! Serving a group's devices without capturing anything: for when the agent cannot start, and the file systems
//! on its devices wait.
//!
//! It needs the disks and the configuration alone: no target, no certificates, no ring and no dirty map. Before
//! it serves anything, the group's record of its disks says durably that they are written without capture
//! ([`disks::distrust`]); the next start then drops whatever ring there is and compares everything with the
//! target. It is the ordinary engine, whose core has no sequence to draw and a dirty map in memory in which
//! everything is uncaptured; so each write finds that it cannot be recorded, and goes on. A zero-loss lease that
//! an agent before it may have granted is waited for before anything is answered.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use tidemark_journal::{Ancestry, Seq, TermId, VolumeId};
use tokio::sync::oneshot;

use crate::{
    capture::{
        core::{Core, VolumeStart},
        ring::{About, Layout, RingMemory, RingReader, RingWriter},
    },
    carriers::Carriers,
    clock::JournalClock,
    config::{GroupConfig, NodeConfig},
    dirty::{
        bitmap::{Bits, pages_in},
        map::{self, DirtyMap},
        regions_in,
    },
    disks::{self, DiskError, Place},
    encoder,
    engine::{Command, Engine, EngineVolume, Parts},
    front::Front,
    group::{claim, threads::Threads},
    kernel::blockdev::Backing,
    lease::SyncMode,
    outbox::Outbox,
    state::{keeper, leases, recovery::opening},
};

/// Never used: the smallest that there is.
const RING_BYTES: u64 = 16 << 20;
/// How long a stop waits for requests under way.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
const WHY: &str = "the devices were served without capture";

/// A group whose devices are served without capture.
pub struct Passthrough {
    name: String,
    engine: Engine,
    fronts: Vec<Front>,
    threads: Threads,
}

impl Passthrough {
    /// Takes over a group's devices, or makes them. `tracking_lost`: even if nothing can remember that they are
    /// written without capture. It is called on a tokio runtime.
    ///
    /// # Errors
    /// A sentence that says what is in the way.
    pub async fn start(
        node: &NodeConfig,
        config: &GroupConfig,
        tracking_lost: bool,
    ) -> anyhow::Result<Passthrough> {
        let volumes = claim(config).await?;
        let backings: Vec<Arc<Backing>> =
            volumes.iter().map(|volume| volume.backing.clone()).collect();
        declare(node, config, &volumes, tracking_lost)?;
        let left = leases::left_in(&node.state_of(&config.name), config.id);
        let mut passthrough = Passthrough::run(config, volumes, left)?;
        if let Err(error) = passthrough.present(node, config, &backings).await {
            passthrough.stop().await;
            return Err(error);
        }
        Ok(passthrough)
    }

    async fn present(
        &mut self,
        node: &NodeConfig,
        config: &GroupConfig,
        backings: &[Arc<Backing>],
    ) -> anyhow::Result<()> {
        for (volume, backing) in config.volumes.iter().zip(backings) {
            let front = Front::start(&self.engine, node, config, volume, backing).await?;
            tracing::warn!(
                group = %config.name,
                volume = %volume.name,
                device = %front.device().display(),
                "the volume is served WITHOUT CAPTURE"
            );
            self.fronts.push(front);
        }
        Ok(())
    }

    fn run(
        config: &GroupConfig,
        volumes: Vec<EngineVolume>,
        left: Option<Duration>,
    ) -> anyhow::Result<Passthrough> {
        let about = About {
            group: config.id,
            id: 0,
            clock: JournalClock::after(0),
            volumes: volumes.iter().map(|volume| (volume.id, volume.sectors)).collect(),
        };
        let ring = RingMemory::create(&about, Layout::of(RING_BYTES)).context("memory")?;
        let outbox = Outbox::new(ring.clone());
        let ancestry = Ancestry::root(TermId::random()?);
        let carriers = Arc::new(Carriers::new(Arc::default()));
        let (encoder, encoder_thread) = encoder::start(
            config.id,
            opening(&ancestry),
            RingReader::new(ring.clone()),
            outbox.clone(),
            about.clock,
            config.compression.0,
            carriers.clone(),
        )?;
        let starts: Vec<VolumeStart> = volumes
            .iter()
            .map(|volume| VolumeStart { id: volume.id, sectors: volume.sectors, gap: None })
            .collect();
        let map = all_uncaptured(&volumes);
        let mut core = Core::new(&starts, map, RingWriter::new(ring), Seq::ZERO, Seq::ZERO);
        core.set_now(about.clock.now_ns());
        core.begin_sync(SyncMode::new(None, left, about.clock.now_ns()));
        let parts = Parts {
            core,
            volumes,
            clock: about.clock,
            encoder: encoder.clone(),
            carriers,
            outbox: outbox.clone(),
            ancestry,
            catch_up_bytes_per_s: None,
            on_term: Box::new(|_, _| {}),
        };
        let mut threads = Threads::new(encoder, encoder_thread, outbox);
        match threads.start_engine(parts, keeper::without_disk) {
            Ok((engine, _)) => {
                let name = config.name.to_string();
                Ok(Passthrough { name, engine, fronts: Vec::new(), threads })
            }
            Err(error) => {
                threads.give_up();
                Err(error)
            }
        }
    }

    /// Whether its thread still takes its turns.
    pub async fn is_alive(&self) -> bool {
        self.engine.report().await.is_some()
    }

    /// Leaves the devices to the next agent.
    pub async fn stop(mut self) {
        for front in self.fronts.drain(..) {
            front.leave().await;
        }
        for at_once in [false, true] {
            let (done, ended) = oneshot::channel();
            self.engine.tell(Command::Stop { at_once, done });
            if tokio::time::timeout(STOP_PATIENCE, ended).await.is_ok() {
                break;
            }
        }
        // It fails with a panic, which has been reported already.
        let _ = tokio::task::spawn_blocking(move || self.threads.end()).await;
        tracing::info!(group = self.name, "its devices are no longer served without capture");
    }
}

/// Makes sure that these are the right disks, and that the next start will compare everything.
fn declare(
    node: &NodeConfig,
    config: &GroupConfig,
    volumes: &[EngineVolume],
    tracking_lost: bool,
) -> anyhow::Result<()> {
    let dir = node.state_of(&config.name);
    let place = Place { dir: &dir, group: config.id, name: config.name.as_str() };
    let disks: Vec<(VolumeId, &Backing)> =
        volumes.iter().map(|volume| (volume.id, &*volume.backing)).collect();
    let declared = disks::check(place, &disks).and_then(|_| disks::distrust(place, WHY));
    match declared {
        Err(error @ DiskError::Io { .. }) if tracking_lost => {
            let group = place.name;
            tracing::error!(
                group,
                %error,
                "NOTHING REMEMBERS that the disks are written without capture: before the agent is started \
                 again, run 'tidemark accept-disk {group}'"
            );
            Ok(())
        }
        Err(error @ DiskError::Io { .. }) => Err(error).context(
            "nothing would remember that the disks were written without capture; make room on the state \
             disk or mend it, or say --tracking-lost",
        ),
        declared => Ok(declared?),
    }
}

/// A map in memory in which nothing has to be marked any more.
fn all_uncaptured(volumes: &[EngineVolume]) -> DirtyMap {
    let starts = volumes.iter().map(|volume| {
        let regions = regions_in(volume.sectors);
        let (dirty, mut uncaptured) = (Bits::new(regions), Bits::new(regions));
        uncaptured.fill();
        let written = vec![0; pages_in(regions) as usize];
        map::VolumeStart { id: volume.id, regions, written, uncaptured, dirty }
    });
    let mut map = DirtyMap::new([0; 16], 0, 0, starts.collect());
    // As if it had been written; the disks' record says as much.
    while map.begin_commit(Seq::ZERO).is_some() {
        map.commit_written();
    }
    map
}
