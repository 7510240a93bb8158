//! A protected group: everything that runs for it, from the claimed disks to the link.

use std::{
    path::PathBuf,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rustls::ClientConfig;
use tidemark_journal::{GroupId, Position, Seq, VolumeId};
use tidemark_link::message::{GroupHello, VolumeHello};
use tokio::sync::oneshot;

use crate::{
    capture::ring::Layout,
    carriers::Carriers,
    clock::JournalClock,
    config::{GroupConfig, NodeConfig, SyncTimeout, VolumeConfig},
    disks, encoder,
    engine::{Command, Engine, EngineVolume, Parts},
    front::{Front, Reserved},
    kernel::blockdev::{Backing, BackingError},
    ladder::Watched,
    link::{Link, LinkParts, TermTeller},
    outbox::Outbox,
    progress::Pace,
    rings::Rings,
    spool::{self, Limits, Store, Told, media::Directory, own_disk},
    state::{
        files::StateFiles,
        keeper::{self, Keeper},
        recovery::LeftSpool,
    },
    verify::Verifies,
};

mod handover;
pub mod opening;
mod status;
pub(crate) mod threads;

use opening::{Opened, Opening};
use threads::Threads;

/// How long a claim waits for the last write of a dead agent to end.
const CLAIM_PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks whether it has.
const CLAIM_AGAIN: Duration = Duration::from_millis(20);
/// How long a start that fails waits for what it went on with to reach the target.
const FAILED_START_PATIENCE: Duration = Duration::from_secs(3);

/// A running group.
pub struct Group {
    config: GroupConfig,
    engine: Engine,
    encoder: encoder::Waker,
    outbox: Arc<Outbox>,
    link: Link,
    clock: JournalClock,
    term: Arc<std::sync::Mutex<tidemark_journal::TermId>>,
    volumes: Vec<Served>,
    /// None when they have ended.
    threads: Option<Threads>,
    pace: Pace,
    verifies: Verifies,
    state_dir: PathBuf,
    /// Why the disks are not taken for what they were, if so.
    doubt: Option<String>,
    ladder: Watched,
    /// Why there is no spool though one is configured.
    no_spool: Option<String>,
}

struct Served {
    config: VolumeConfig,
    backing: Arc<Backing>,
    sectors: u64,
    front: Option<Front>,
}

impl Group {
    /// Starts a group: claims its disks, goes on where its state says, presents its devices and
    /// connects to the target. It is called on a tokio runtime. Once `give_up` is ready, no disk is
    /// waited for any more; what has begun by then comes to its end.
    ///
    /// # Errors
    /// A sentence that says what is in the way. Nothing is left behind but the ring.
    pub async fn start(
        node: &NodeConfig,
        config: &GroupConfig,
        tls: Arc<ClientConfig>,
        rings: &Arc<Rings>,
        pace: &Arc<encoder::Pace>,
        give_up: impl Future<Output = ()>,
    ) -> anyhow::Result<Group> {
        own_disk::check(node, [config])?;
        let volumes = tokio::select! {
            biased;
            () = give_up => bail!("its disks are not waited for any more"),
            claimed = claim(config) => claimed?,
        };
        let backings: Vec<Arc<Backing>> =
            volumes.iter().map(|volume| volume.backing.clone()).collect();
        let sectors: Vec<u64> = volumes.iter().map(|volume| volume.sectors).collect();
        let run = {
            let (node, config) = (node.clone(), config.clone());
            let (rings, pace) = (rings.clone(), pace.clone());
            move || Group::run(&node, &config, volumes, tls, &rings, pace)
        };
        let mut group = tokio::task::spawn_blocking(run)
            .await
            .context("the thread that starts the group")??;
        // Nobody may see the disks before they are what the journal says.
        while group.engine.report().await.is_some_and(|now| now.redone_writes_left > 0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if let Err(error) = group.present(node, &backings, &sectors).await {
            // The next attempt finds the disks free.
            group.stop(FAILED_START_PATIENCE).await;
            return Err(error);
        }
        Ok(group)
    }

    async fn present(
        &mut self,
        node: &NodeConfig,
        backings: &[Arc<Backing>],
        sectors: &[u64],
    ) -> anyhow::Result<()> {
        let config = &self.config;
        for ((volume, backing), sectors) in config.volumes.iter().zip(backings).zip(sectors) {
            let front = Front::start(&self.engine, node, config, volume, backing).await?;
            tracing::info!(
                group = %config.name,
                volume = %volume.name,
                device = %front.device().display(),
                "the volume is protected"
            );
            self.volumes.push(Served {
                config: volume.clone(),
                backing: backing.clone(),
                sectors: *sectors,
                front: Some(front),
            });
        }
        Ok(())
    }

    fn run(
        node: &NodeConfig,
        config: &GroupConfig,
        volumes: Vec<EngineVolume>,
        tls: Arc<ClientConfig>,
        rings: &Rings,
        pace: Arc<encoder::Pace>,
    ) -> anyhow::Result<Group> {
        let sizes: Vec<(VolumeId, u64)> =
            volumes.iter().map(|volume| (volume.id, volume.sectors)).collect();
        let dir = node.state_of(&config.name);
        let disks_place = disks::Place { dir: &dir, group: config.id, name: config.name.as_str() };
        let backings: Vec<(VolumeId, &Backing)> =
            volumes.iter().map(|volume| (volume.id, &*volume.backing)).collect();
        let checked = disks::check(disks_place, &backings)?;
        let (files, mut found) = StateFiles::open(&dir, config.id, &opening::regions(&sizes))?;
        let clean = found.state.is_some_and(|state| state.clean.is_some());
        let doubt = checked.doubt(clean).map(str::to_owned).filter(|_| found.state.is_some());
        found.doubted = doubt.is_some();
        let mut fresh = [[0; 16]; 3];
        for id in &mut fresh {
            *id = GroupId::random()?.0;
        }
        let opening = Opening {
            group: config.id,
            name: config.name.as_str(),
            volumes: &sizes,
            layout: Layout::of(config.ring_bytes.get()),
            active_max: config.active_regions.get(),
            rings: rings.left(config.id).context("take over the ring")?,
            sync_timeout: config.sync_timeout.map(SyncTimeout::get),
            fresh,
        };
        let (spool, no_spool) = spool_of(node, config);
        let ends = spool.as_ref().and_then(|spool| spool.index().ends());
        let left_spool = ends.map(|(before, end)| LeftSpool { before, end });
        let Opened {
            files,
            state,
            ancestry,
            clock,
            place,
            reader,
            outbox,
            core,
            keep_ring,
            with_spool,
            doubts,
            ..
        } = opening.open(&dir, files, &found, left_spool)?;
        // The state names it, so from here on it is the one for the next attempt.
        if keep_ring {
            rings.keep(config.id, core.ring_memory());
        }
        let doubts: Vec<&str> = doubt.as_deref().into_iter().chain(doubts).collect();
        let doubt = (!doubts.is_empty()).then(|| doubts.join("; "));
        if let Some(reason) = &doubt {
            tracing::warn!(group = %config.name, reason, "everything is compared with the target");
        }
        checked.record(disks_place)?;
        if let Err(error) = core.ring_region().lock_in_memory() {
            tracing::warn!(group = %config.name, %error, "the ring cannot be kept in memory");
        }
        let carriers = Arc::new(Carriers::new(pace));
        if let Some(spool) = &spool {
            outbox.use_spool(spool.index().clone(), with_spool);
        }
        let (encoder, encoder_thread) = encoder::start(
            config.id,
            place,
            reader,
            outbox.clone(),
            clock,
            config.compression.0,
            carriers.clone(),
        )?;
        let hello_volumes = volumes
            .iter()
            .zip(&config.volumes)
            .map(|(volume, named)| VolumeHello {
                id: volume.id,
                name: named.name.as_str().to_owned(),
                sectors: volume.sectors,
                logical_block_bytes: volume.backing.geometry().logical_block_bytes,
                physical_block_bytes: volume.backing.geometry().physical_block_bytes,
            })
            .collect();
        let teller = TermTeller::new(ancestry.clone());
        let term = Arc::new(std::sync::Mutex::new(ancestry.current().id));
        let on_term = {
            let (teller, term) = (teller.clone(), term.clone());
            move |ancestry: tidemark_journal::Ancestry, ceiling: Seq| {
                *term.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                    ancestry.current().id;
                teller.tell(ancestry, ceiling);
            }
        };
        let parts = Parts {
            core,
            volumes,
            clock,
            encoder: encoder.clone(),
            carriers: carriers.clone(),
            outbox: outbox.clone(),
            ancestry: ancestry.clone(),
            catch_up_bytes_per_s: config.catch_up_bytes_per_s.map(std::num::NonZeroU64::get),
            on_term: Box::new(on_term),
        };
        let link_parts = |engine: Engine, keeper: Keeper| LinkParts {
            address: config.target.address.to_string(),
            target: config.target.name.clone(),
            tls,
            group: GroupHello { id: config.id, name: config.name.as_str().to_owned() },
            volumes: hello_volumes,
            ancestry,
            acked: state.acked,
            outbox: outbox.clone(),
            carriers,
            encoder: encoder.clone(),
            engine,
            keeper,
            generation_found: state.generation,
            clock,
            sync: config.sync_timeout.is_some(),
            throttle: config.throttle.clone(),
        };
        let mut threads = Threads::new(encoder.clone(), encoder_thread, outbox.clone());
        let begun = threads
            .start_engine(parts, move |answer| keeper::start(files, state, clock, answer))
            .and_then(|(engine, keeper)| {
                if let Some(store) = spool {
                    threads.add(start_spool(store, &outbox, engine.clone())?);
                }
                let link = Link::start(link_parts(engine.clone(), keeper), teller)?;
                Ok((engine, link))
            });
        let (engine, link) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                // The next attempt goes on with the ring, so nobody may use it any more.
                threads.give_up();
                return Err(error);
            }
        };
        let every_s = config.verify_every_s.map(|every| every.0);
        let ladder = Watched::start(engine.clone(), outbox.clone());
        Ok(Group {
            config: config.clone(),
            verifies: Verifies::start(config.name.as_str(), &dir, engine.clone(), every_s),
            engine,
            encoder,
            outbox,
            link,
            clock,
            term,
            volumes: Vec::new(),
            threads: Some(threads),
            pace: Pace::default(),
            state_dir: dir,
            doubt,
            ladder,
            no_spool,
        })
    }

    /// What it was started with.
    pub fn config(&self) -> &GroupConfig {
        &self.config
    }

    /// The position a sequence has now.
    pub fn position(&self, seq: Seq) -> Position {
        let term = *self.term.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Position { term, seq }
    }

    /// Sets a mark.
    ///
    /// # Errors
    /// The sentence that says why none can be set now.
    pub async fn mark(&self, name: &str) -> Result<Position, String> {
        let (answer, marked) = oneshot::channel();
        self.engine.tell(Command::Mark(name.to_owned(), answer));
        let seq = marked.await.map_err(|_| "the group is stopping".to_owned())??;
        Ok(self.position(seq))
    }

    /// The newest sequence that is durable at the final target, as far as is known.
    pub fn durable(&self) -> Seq {
        self.engine.snapshot().durable
    }

    /// Begins to compare a volume, or all, with the target.
    pub fn verify(&self, volume: Option<VolumeId>) {
        self.verifies.begin(volume);
    }

    /// Finds out whether anybody uses the devices, and keeps new users away from those that can be
    /// mounted for as long as the answer is kept: one for each volume.
    ///
    /// # Errors
    /// The sentence that says who uses what.
    pub fn reserve(&self) -> impl Future<Output = anyhow::Result<Vec<Reserved>>> + Send + use<> {
        let volumes = self.volumes.iter();
        let asked: Vec<_> = volumes
            .map(|volume| (volume.config.name.clone(), volume.front.as_ref().map(Front::reserve)))
            .collect();
        let ask = move || {
            let (mut reserved, mut refused) = (Vec::new(), Vec::new());
            for (name, ask) in asked {
                match ask.map_or_else(|| Ok(Reserved::default()), |ask| ask()) {
                    Ok(free) => reserved.push(free),
                    Err(error) => refused.push(format!("volume {name}: {error:#}")),
                }
            }
            ensure!(refused.is_empty(), "{}", refused.join("; "));
            Ok(reserved)
        };
        async { tokio::task::spawn_blocking(ask).await.context("the thread that looks for users")? }
    }

    /// Takes the devices away, so that nothing is protected any more.
    ///
    /// # Errors
    /// A device cannot be taken away. Those before it are gone; the others are there, and what is left
    /// of this one, for another attempt.
    pub async fn remove_devices(&mut self, reserved: Vec<Reserved>) -> anyhow::Result<()> {
        for (volume, reserved) in self.volumes.iter_mut().zip(reserved) {
            if let Some(front) = &mut volume.front {
                let stopped = front.stop(reserved).await;
                stopped.with_context(|| format!("volume {}", volume.config.name))?;
                volume.front = None;
            }
        }
        Ok(())
    }

    /// Ends the group: leaves its devices to the next agent, waits up to `patience` for the target
    /// to have everything, and keeps what follows from that. Returns whether the end was clean, so
    /// that the next start needs no comparison.
    pub async fn stop(&mut self, patience: Duration) -> bool {
        for volume in &mut self.volumes {
            if let Some(front) = volume.front.take() {
                front.leave().await;
            }
        }
        self.verifies.stop().await;
        let (done, clean) = oneshot::channel();
        self.engine.tell(Command::Stop { at_once: false, done });
        let clean = match tokio::time::timeout(patience, clean).await {
            Ok(clean) => clean.unwrap_or(false),
            Err(_) => {
                let (done, clean) = oneshot::channel();
                self.engine.tell(Command::Stop { at_once: true, done });
                clean.await.unwrap_or(false)
            }
        };
        let (link, threads) = (self.link.end(), self.threads.take());
        let join = move || {
            // A panic there has been reported already; there is nothing left to save.
            let _ = link.map(JoinHandle::join);
            threads.into_iter().for_each(Threads::end);
        };
        // It fails with a panic, of which the same is true.
        let _ = tokio::task::spawn_blocking(join).await;
        if clean && let Err(error) = self.record_rest().await {
            tracing::warn!(group = %self.config.name, %error, "writes while no agent runs would not be \
                noticed");
        }
        clean
    }

    async fn record_rest(&self) -> anyhow::Result<()> {
        let (dir, config) = (self.state_dir.clone(), self.config.clone());
        let volumes = self.volumes.iter();
        let backings: Vec<_> =
            volumes.map(|volume| (volume.config.id, volume.backing.clone())).collect();
        let record = move || {
            let place = disks::Place { dir: &dir, group: config.id, name: config.name.as_str() };
            let backings: Vec<_> = backings.iter().map(|(id, backing)| (*id, &**backing)).collect();
            disks::record_rest(place, &backings)
        };
        Ok(tokio::task::spawn_blocking(record).await??)
    }

    /// Whether the capture thread still takes its turns.
    pub async fn is_alive(&self) -> bool {
        self.engine.report().await.is_some()
    }

    /// The lag of records so far: from their time to the acknowledgement that they are
    /// final-durable.
    pub fn lag(&self) -> crate::lag::LagHistogram {
        self.link.status().lag
    }
}

/// Claims the disks of a group, in the order of its volumes. It waits for one that is in use without
/// holding a thread, and can be given up at any time.
pub(crate) async fn claim(config: &GroupConfig) -> anyhow::Result<Vec<EngineVolume>> {
    let mut volumes = Vec::new();
    for volume in &config.volumes {
        let deadline = Instant::now() + CLAIM_PATIENCE;
        let claimed = loop {
            let path = volume.backing.clone();
            let last = Instant::now() >= deadline;
            let claim = move || match Backing::claim(&path) {
                Err(error) if last => Err(error.with_users()),
                claimed => claimed,
            };
            let claimed = tokio::task::spawn_blocking(claim).await;
            match claimed.context("the thread that claims the disk")? {
                Err(BackingError::InUse { .. }) if !last => tokio::time::sleep(CLAIM_AGAIN).await,
                claimed => break claimed,
            }
        };
        let backing = claimed.with_context(|| format!("volume {}", volume.name))?;
        let sectors = backing.geometry().size_bytes / 512;
        volumes.push(EngineVolume { id: volume.id, backing: Arc::new(backing), sectors });
    }
    Ok(volumes)
}

/// Starts the spool's thread, which tells the engine.
fn start_spool(
    store: Store,
    outbox: &Arc<Outbox>,
    engine: Engine,
) -> std::io::Result<JoinHandle<()>> {
    spool::start(store, outbox.clone(), move |told| {
        engine.tell(match told {
            Told::Spooled(position, epoch) => Command::Spooled(position, epoch),
            Told::Settle => Command::Settle,
        });
    })
}

/// The spool of a group, as it was left; else why there is none though one is configured.
fn spool_of(node: &NodeConfig, config: &GroupConfig) -> (Option<Store>, Option<String>) {
    let Some((directory, bytes_max)) = node.spool_of(&config.name) else { return (None, None) };
    let opened = Directory::open(&directory)
        .and_then(|media| spool::recover(Arc::new(media), config.id, Limits::of(bytes_max)));
    match opened {
        Ok(store) => (Some(store), None),
        Err(error) => {
            let directory = directory.display();
            let sentence = format!(
                "the spool {directory} cannot be used: {error}; when the ring is full, writes are not \
                 captured; restart the agent when it can"
            );
            tracing::error!(group = %config.name, "{sentence}");
            (None, Some(sentence))
        }
    }
}
