//! A protected group: everything that runs for it, from the claimed disks to the link.

use std::{path::PathBuf, sync::Arc, thread::JoinHandle, time::Duration};

use anyhow::Context;
use rustls::ClientConfig;
use tidemark_control::agent::{
    FrontKind, GroupStatus, LinkState, LinkStatus, Progress, Rung, SyncStatus, VolumeStatus,
};
use tidemark_journal::{GapReason, GroupId, Position, Seq, VolumeId};
use tidemark_link::message::{GroupHello, VolumeHello};
use tokio::sync::oneshot;

use crate::{
    capture::ring::Layout,
    carriers::Carriers,
    clock::JournalClock,
    config::{GroupConfig, NodeConfig, SyncTimeout, VolumeConfig},
    dirty::active,
    disks, encoder,
    engine::{self, Command, Engine, EngineVolume, Parts},
    front::Front,
    kernel::blockdev::Backing,
    ladder::Watched,
    link::{self, Link, LinkParts, TermTeller},
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

use opening::{Opened, Opening};

/// How long a claim waits for the last write of a dead agent to end.
const CLAIM_PATIENCE: Duration = Duration::from_secs(30);
/// How long a start that fails waits for what it went on with to reach the target.
const FAILED_START_PATIENCE: Duration = Duration::from_secs(3);
/// The reason of a comparison that an earlier process had begun.
const DOUBTED_BEFORE: &str = "a doubt arose before the last start";

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
    threads: Vec<JoinHandle<()>>,
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
    /// connects to the target. It is called on a tokio runtime.
    ///
    /// # Errors
    /// A sentence that says what is in the way. Nothing is left behind.
    pub async fn start(
        node: &NodeConfig,
        config: &GroupConfig,
        tls: Arc<ClientConfig>,
        rings: &Rings,
    ) -> anyhow::Result<Group> {
        own_disk::check(node, [config])?;
        let volumes = claim(config).await?;
        let backings: Vec<Arc<Backing>> =
            volumes.iter().map(|volume| volume.backing.clone()).collect();
        let sectors: Vec<u64> = volumes.iter().map(|volume| volume.sectors).collect();
        let mut group = Group::run(node, config, volumes, tls, rings)?;
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
            active_max: active::SLOTS,
            rings: rings.take(config.id),
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
        let doubts: Vec<&str> = doubt.as_deref().into_iter().chain(doubts).collect();
        let doubt = (!doubts.is_empty()).then(|| doubts.join("; "));
        if let Some(reason) = &doubt {
            tracing::warn!(group = %config.name, reason, "everything is compared with the target");
        }
        checked.record(disks_place)?;
        if keep_ring {
            rings.keep(config.id, core.ring_memory());
        }
        if let Err(error) = core.ring_region().lock_in_memory() {
            tracing::warn!(group = %config.name, %error, "the ring cannot be kept in memory");
        }
        let carriers = Arc::new(Carriers::default());
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
        let (sender, kept) = std::sync::mpsc::channel::<(Keeper, JoinHandle<()>)>();
        let (engine, engine_thread) = engine::start(parts, move |answer| {
            let (keeper, thread) = keeper::start(files, state, clock, answer)?;
            // The group is waiting for it just below.
            let _ = sender.send((keeper.clone(), thread));
            Ok(keeper)
        })?;
        let (keeper, keeper_thread) = kept.recv().context("the state keeper")?;
        let mut threads = vec![engine_thread, encoder_thread, keeper_thread];
        if let Some(store) = spool {
            let engine = engine.clone();
            threads.push(spool::start(store, outbox.clone(), move |told| {
                engine.tell(match told {
                    Told::Spooled(position, epoch) => Command::Spooled(position, epoch),
                    Told::Settle => Command::Settle,
                });
            })?);
        }
        let link = Link::start(
            LinkParts {
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
                engine: engine.clone(),
                keeper,
                generation_found: state.generation,
                clock,
                sync: config.sync_timeout.is_some(),
                throttle: config.throttle.clone(),
            },
            teller,
        )?;
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
            threads,
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

    /// Takes the devices away, so that nothing is protected any more.
    ///
    /// # Errors
    /// A device cannot be taken away, for example because it is in use. Those before it are gone.
    pub async fn remove_devices(&mut self) -> anyhow::Result<()> {
        for volume in &mut self.volumes {
            if let Some(front) = volume.front.take() {
                front.stop().await.with_context(|| format!("volume {}", volume.config.name))?;
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
        self.link.stop();
        self.outbox.close();
        self.encoder.stop();
        for thread in self.threads.drain(..) {
            // A panic there has been reported already; there is nothing left to save.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
        self.engine.release();
        if clean && let Err(error) = self.record_rest() {
            tracing::warn!(group = %self.config.name, %error, "writes while no agent runs would not be \
                noticed");
        }
        clean
    }

    fn record_rest(&self) -> Result<(), disks::DiskError> {
        let (dir, name) = (&*self.state_dir, self.config.name.as_str());
        let place = disks::Place { dir, group: self.config.id, name };
        let backings: Vec<_> =
            self.volumes.iter().map(|volume| (volume.config.id, &*volume.backing)).collect();
        disks::record_rest(place, &backings)
    }

    /// Whether the capture thread still takes its turns.
    pub async fn is_alive(&self) -> bool {
        self.engine.report().await.is_some()
    }

    /// How it stands.
    pub async fn status(&self) -> GroupStatus {
        let snapshot = self.engine.report().await.unwrap_or_else(|| self.engine.snapshot());
        let link = self.link.status();
        let backlog = self.outbox.backlog();
        let encoded = self.encoder.counters();
        let in_doubt = snapshot.volumes.iter().any(|volume| volume.gap == Some(GapReason::Doubt));
        let now_ns = self.clock.now_ns();
        let mut problems = Vec::new();
        if let Some(lost) = &snapshot.tracking_lost {
            problems.push(format!(
                "the state disk failed, so changes are no longer tracked and everything will be \
                 compared after the next start: {lost}"
            ));
        }
        problems.extend(self.volumes.iter().filter_map(|volume| unreadable(volume, &snapshot)));
        problems.extend(self.no_spool.clone());
        problems.extend(self.outbox.spool().problem);
        problems.extend(link.is_full().then(|| link::FULL.to_owned()));
        problems.extend(link.notice.as_ref().map(|notice| notice.sentence.clone()));
        let (rung, ladder) = self.ladder.status(snapshot.overflow, &self.outbox);
        let spooled = if rung == Rung::Ring { 0 } else { ladder.spool_bytes };
        GroupStatus {
            name: self.config.name.as_str().to_owned(),
            id: self.config.id,
            target: self.config.target.address.to_string(),
            target_name: self.config.target.name.to_string(),
            position: self.position(snapshot.last_seq),
            durable_seq: snapshot.durable,
            rpo_target_s: self.config.rpo_target_s.map(|target| target.0),
            lag_ns: backlog.oldest_ns.map_or(0, |oldest| now_ns.saturating_sub(oldest)),
            lag_bytes: backlog.bytes + spooled,
            ring_fill_permille: snapshot.ring_fill_permille.max(backlog.fill_permille) as u32,
            rung,
            ladder,
            sent_bytes_total: link.sent_bytes,
            raw_bytes_total: encoded.raw_bytes,
            frames_total: encoded.frames,
            gaps_total: snapshot.counters.overflows,
            compared_bytes_total: snapshot.counters.catch_up_read_bytes,
            sync: self.config.sync_timeout.map(|_| SyncStatus {
                stage: snapshot.sync.stage,
                reason: snapshot.sync.why.map(|why| why.describe().to_owned()),
                answers_waiting: snapshot.answers_waiting,
                left_total: snapshot.sync.left_total,
            }),
            problems,
            verified: self.verifies.report(),
            doubt: in_doubt.then(|| {
                let why = snapshot.doubted.as_ref().or(self.doubt.as_ref());
                why.map_or(DOUBTED_BEFORE, String::as_str).to_owned()
            }),
            volumes: self
                .volumes
                .iter()
                .map(|volume| self.volume_status(volume, &snapshot))
                .collect(),
            link: link_status(link),
        }
    }

    /// The lag of records so far: from their time to the acknowledgement that they are
    /// final-durable.
    pub fn lag(&self) -> crate::lag::LagHistogram {
        self.link.status().lag
    }

    fn volume_status(&self, served: &Served, snapshot: &engine::Snapshot) -> VolumeStatus {
        let id = served.config.id;
        let now = snapshot.volumes.iter().find(|volume| volume.id == id);
        let uncaptured = now.map_or(0, |volume| u64::from(volume.uncaptured_regions));
        let rate = self.pace.bytes_per_s(snapshot.counters.catch_up_read_bytes);
        let progress = |done: u64, total: u64| Progress {
            done_regions: done,
            total_regions: total,
            bytes_per_s: rate,
            eta_s: ((total - done) * crate::dirty::REGION_BYTES).checked_div(rate),
        };
        VolumeStatus {
            name: served.config.name.as_str().to_owned(),
            id,
            backing: served.config.backing.clone(),
            device: served.front.as_ref().map(Front::device).unwrap_or_default(),
            front: served.front.as_ref().map_or(FrontKind::NbdSocket, Front::kind),
            sectors: served.sectors,
            gap: now.and_then(|volume| volume.gap).map(|gap| gap.describe().to_owned()),
            catch_up: now.filter(|volume| volume.uncaptured_regions > 0).map(|volume| {
                let total = self.pace.total(id, uncaptured);
                progress(
                    total.saturating_sub(uncaptured),
                    total.max(u64::from(volume.uncaptured_regions)),
                )
            }),
            verify: now
                .and_then(|volume| volume.verify)
                .map(|(done, total)| progress(u64::from(done), u64::from(total))),
            active_regions: snapshot.active_regions as u32,
            dirty_regions: snapshot.dirty_regions,
            uncaptured_regions: uncaptured,
        }
    }
}

/// Claims the disks of a group, in the order of its volumes.
pub(crate) async fn claim(config: &GroupConfig) -> anyhow::Result<Vec<EngineVolume>> {
    let mut volumes = Vec::new();
    for volume in &config.volumes {
        let path = volume.backing.clone();
        let backing = tokio::task::spawn_blocking(move || Backing::claim(&path, CLAIM_PATIENCE))
            .await
            .context("the thread that claims the disk")?
            .with_context(|| format!("volume {}", volume.name))?;
        let sectors = backing.geometry().size_bytes / 512;
        volumes.push(EngineVolume { id: volume.id, backing: Arc::new(backing), sectors });
    }
    Ok(volumes)
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

/// What is to be said of sectors that a volume's disk does not give.
fn unreadable(served: &Served, snapshot: &engine::Snapshot) -> Option<String> {
    let volume = snapshot.volumes.iter().find(|volume| volume.id == served.config.id)?;
    let (sectors, first) = volume.unreadable?;
    Some(format!(
        "the disk of volume {} has failed to give {sectors} sectors that were to be compared or sent, the first \
         of them sector {}: points taken since then answer reads of them with an error, until they are \
         written anew or can be read again",
        served.config.name, first.0
    ))
}

fn link_status(link: link::LinkStatus) -> LinkStatus {
    let state = match link.state {
        link::LinkState::Up => LinkState::Up,
        link::LinkState::Down => LinkState::Connecting,
        link::LinkState::Refused(_) => LinkState::Refused,
    };
    LinkStatus { state, since_wall_ns: link.since_ns, sentence: link.sentence }
}
