//! A target that is played: the real code on a simulated disk, on one thread, with a clock that moves
//! only when it is told to.
//!
//! What a daemon has around the code is left out: sockets, TLS, NBD and the local interface. Sessions,
//! the owners of logs, branches, housekeeping and recovery are the real ones. The same calls with the
//! same seeds give the same decisions; reads of the disk may still come in another order.
//!
//! Nothing happens but in [`SimTarget::advance`] and the calls that say so. When the disk's power has
//! gone ([`SimDisk::is_off`]), [`SimTarget::crash`] is what is left to do.

mod branches;

use std::{ops::Range, path::Path, rc::Rc, sync::Arc, time::Duration};

use anyhow::Context;
use tidemark_control::{
    config::{Bytes, Seconds},
    target::ZeroLoss,
};
use tidemark_journal::{Position, SECTOR_BYTES, Seq};
use tidemark_link::{
    NodeName,
    conn::{LinkError, Timeouts},
    message::{Hello, Message},
};
use tidemark_simdisk::{Rng, SimDisk};
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
    task::LocalSet,
};

use crate::{
    branch::registry::Branches,
    catalogue::Catalogue,
    config::{GroupConfig, ScrubConfig, StoreConfig},
    groups::Groups,
    lease,
    machine::{Machine, simulated::Simulated},
    points::{
        Refusal, Spec,
        resolve::{Scope, resolve},
    },
    receiver::{
        admit,
        driver::{Incoming, Outgoing, Sessions},
    },
    replica::Replica,
    reserve::Reserve,
    retention,
    scrub::Scrubs,
    store::{
        ReadError,
        journal::{Journal, Progress},
        log::Owner,
    },
    target::housekeeping,
};

/// Where everything is on the simulated disk.
pub const DATA_DIR: &str = "/target";
/// How long a temporary branch stays that nobody has open.
const TEMPORARY_LINGER: Duration = Duration::from_secs(60);
/// The longest that a call waits for an answer, in played time.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// What a played target is configured with.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// The groups it takes.
    pub groups: Vec<GroupConfig>,
    /// How logs are kept.
    pub store: StoreConfig,
}

/// Why there is no content to be had.
#[derive(Debug, thiserror::Error)]
pub enum NoContent {
    /// There is no replica of this group.
    #[error("{0}")]
    Absent(String),
    /// The point is not offered.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// It is offered, and cannot be read.
    #[error("{0}")]
    Read(#[from] ReadError),
}

/// A played target. Dropping it is the end of its process.
pub struct SimTarget {
    // Dropped in this order: tasks first, then what they run on.
    session: Option<Session>,
    branches: Arc<Branches>,
    groups: Arc<Groups>,
    sessions: Rc<Sessions>,
    end: watch::Sender<bool>,
    local: LocalSet,
    runtime: Runtime,
    machine: Arc<Simulated>,
}

/// A source's connection.
struct Session {
    inbox: mpsc::UnboundedSender<Message>,
    outbox: mpsc::UnboundedReceiver<Message>,
    task: tokio::task::JoinHandle<()>,
}

struct In(mpsc::UnboundedReceiver<Message>);
struct Out(mpsc::UnboundedSender<Message>);

impl Incoming for In {
    async fn recv(&mut self) -> Result<Option<Message>, LinkError> {
        Ok(self.0.recv().await)
    }
}

impl Outgoing for Out {
    async fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.0.send(message.clone()).map_err(|_| LinkError::Ended)
    }

    async fn flush(&mut self) -> Result<(), LinkError> {
        Ok(())
    }
}

impl SimTarget {
    /// Recovers what is on the disk and begins; the wall clock shows `wall_ns`.
    ///
    /// # Errors
    /// What [`Target::start`](crate::Target::start) would say, such as that the catalogue cannot be
    /// opened. A group that cannot be opened is no error: see [`failure`](Self::failure).
    pub fn start(
        config: &SimConfig,
        disk: &SimDisk,
        seed: u64,
        wall_ns: i64,
    ) -> anyhow::Result<SimTarget> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()?;
        let local = LocalSet::new();
        let inside = runtime.enter();
        let machine = Simulated::new(disk.clone(), Rng::new(seed).next_u64(), wall_ns);
        let here = Machine::Simulated(Arc::clone(&machine));
        let dir = Path::new(DATA_DIR);
        let groups_dir = dir.join("groups");
        here.create_dir_all(&groups_dir).context("cannot create the data directory")?;
        let reserve = Arc::new(Reserve::new(&here, &groups_dir, config.store.segment.0));
        let catalogue = Arc::new(Catalogue::open(&here, &dir.join("catalogue.redb"), &reserve)?);
        reserve.refill();
        let (owners, new_owners) = mpsc::unbounded_channel();
        let groups = Groups::open(&config.groups, config.store, &groups_dir, &catalogue, owners);
        let groups = Arc::new(groups);
        let branches = Branches::open(&groups, runtime.handle().clone());
        let (end, ending) = watch::channel(false);
        let own_branches = Arc::clone(&branches);
        let every_tick = move || own_branches.look_after(TEMPORARY_LINGER);
        runtime.spawn(housekeeping(Arc::clone(&groups), every_tick, ending));
        local.spawn_local(run_owners(new_owners));
        let sessions = Sessions::new(Arc::clone(&groups), Timeouts::default());
        drop(inside);
        Ok(SimTarget { session: None, branches, groups, sessions, end, local, runtime, machine })
    }

    /// Lets time pass, with all that happens in it.
    pub fn advance(&self, by: Duration) {
        // A timer is made inside the runtime whose time it is of.
        self.local.block_on(&self.runtime, async { tokio::time::sleep(by).await });
    }

    /// Begins a session, in place of the one before; what comes of it is among the
    /// [`replies`](Self::replies).
    pub fn connect(&mut self, peer: &NodeName, hello: Hello) {
        self.disconnect();
        let (inbox, incoming) = mpsc::unbounded_channel();
        let (outgoing, outbox) = mpsc::unbounded_channel();
        let (sessions, groups) = (Rc::clone(&self.sessions), Arc::clone(&self.groups));
        let peer = peer.clone();
        let task = self.local.spawn_local(async move {
            let mut outgoing = Out(outgoing);
            let row = |name: &str| groups.row(name).ok().flatten();
            let refusal = match admit(&hello, &peer, groups.configs(), row) {
                Err(refusal) => Some(refusal),
                Ok((config, protocol)) => {
                    let name = config.name.as_str();
                    let mut incoming = In(incoming);
                    let ended = sessions
                        .session(name, protocol, &hello, &mut outgoing, &mut incoming)
                        .await;
                    groups.disconnected(name);
                    ended.ok().flatten()
                }
            };
            if let Some(refusal) = refusal {
                // Nobody may be there to hear it.
                let _ = outgoing.send(&Message::Refuse(refusal)).await;
            }
        });
        self.session = Some(Session { inbox, outbox, task });
    }

    /// Begins a session and waits for the answer: a welcome or a refusal; nothing if the power goes.
    pub fn greet(&mut self, peer: &NodeName, hello: Hello) -> Option<Message> {
        self.connect(peer, hello);
        let mut waited = Duration::ZERO;
        while waited < ANSWER_MAX && !self.machine.disk.is_off() {
            const STEP: Duration = Duration::from_millis(1);
            self.advance(STEP);
            waited += STEP;
            if let Ok(answer) = self.session.as_mut()?.outbox.try_recv() {
                return Some(answer).filter(|_| !self.machine.disk.is_off());
            }
        }
        None
    }

    /// The connection is cut.
    pub fn disconnect(&mut self) {
        if let Some(session) = self.session.take() {
            session.task.abort();
            for config in self.groups.configs() {
                self.groups.disconnected(config.name.as_str());
            }
        }
    }

    /// Whether a session is going on.
    pub fn is_connected(&self) -> bool {
        self.session.as_ref().is_some_and(|session| !session.task.is_finished())
    }

    /// Hands a message of the source over. It is taken in as time passes.
    pub fn feed(&self, message: Message) {
        if let Some(session) = &self.session {
            // A session that has ended hears nothing any more.
            let _ = session.inbox.send(message);
        }
    }

    /// What has been said to the source since the last call; nothing after the power has gone.
    pub fn replies(&mut self) -> Vec<Message> {
        let Some(session) = &mut self.session else { return Vec::new() };
        let all: Vec<Message> = std::iter::from_fn(|| session.outbox.try_recv().ok()).collect();
        if self.machine.disk.is_off() { Vec::new() } else { all }
    }

    /// How far a group's log has come.
    pub fn progress(&self, group: &str) -> Progress {
        self.groups.replica(group).map(|r| r.journal().progress()).unwrap_or_default()
    }

    /// The end of what is durable of a group.
    pub fn position(&self, group: &str) -> Position {
        self.progress(group).durable
    }

    /// A group's log as its readers see it.
    pub fn journal(&self, group: &str) -> Option<Arc<Journal>> {
        self.groups.replica(group).map(|replica| Arc::clone(replica.journal()))
    }

    /// What is said of the writes that a group's source has answered.
    pub fn zero_loss(&self, group: &str) -> Option<ZeroLoss> {
        // The clock is that of the runtime.
        let _inside = self.runtime.enter();
        self.groups.replica(group).and_then(|replica| lease::look(&replica))
    }

    /// The oldest sequence offered.
    pub fn oldest(&self, group: &str) -> Seq {
        self.groups
            .replica(group)
            .map(|r| r.ledger().history(|history| history.oldest))
            .unwrap_or_default()
    }

    /// Why a group could not be opened.
    pub fn failure(&self, group: &str) -> Option<Arc<str>> {
        self.groups.failure(group)
    }

    /// What people are told of a group.
    pub fn notices(&self, group: &str) -> Vec<String> {
        self.groups.replica(group).map(|replica| replica.notices()).unwrap_or_default()
    }

    /// The stretches of sequences that can be recovered: of a volume, or of the group as a whole.
    pub fn points(&self, group: &str, volume: Option<&str>) -> Vec<(Seq, Seq)> {
        let Some(replica) = self.groups.replica(group) else { return Vec::new() };
        let end = replica.journal().progress().durable.seq;
        replica.ledger().history(|history| {
            Scope::of(history, group, volume)
                .map(|scope| scope.good_ranges(history, end, usize::MAX))
                .unwrap_or_default()
        })
    }

    /// A volume's content at a point, as an export would give it.
    ///
    /// # Errors
    /// [`NoContent`].
    pub fn content(&self, group: &str, volume: &str, spec: &Spec) -> Result<Vec<u8>, NoContent> {
        self.sectors(group, volume, spec, 0..u64::MAX)
    }

    /// The same of some sectors, as far as the volume has them.
    ///
    /// # Errors
    /// [`NoContent`].
    pub fn sectors(
        &self,
        group: &str,
        volume: &str,
        spec: &Spec,
        range: Range<u64>,
    ) -> Result<Vec<u8>, NoContent> {
        let _inside = self.runtime.enter();
        let replica = self.replica(group)?;
        let seq = resolve(&replica, Some(volume), spec)?.seq;
        let found = replica.ledger().history(|history| {
            history.volume(volume).map(|volume| (volume.id, volume.sectors_at(seq)))
        });
        let (id, sectors) = found.ok_or_else(|| Refusal(format!("no volume '{volume}'")))?;
        let (start, end) = (range.start.min(sectors), range.end.min(sectors));
        let mut content = vec![0; ((end - start) * SECTOR_BYTES) as usize];
        replica.read(id, seq, start, end, &mut content).inspect_err(|error| replica.met(error))?;
        Ok(content)
    }

    /// Folds the oldest segment into the base if it is sealed and not pinned, whatever its age. Says
    /// whether it was.
    ///
    /// # Errors
    /// When it cannot be folded.
    pub fn fold(&self, group: &str) -> anyhow::Result<bool> {
        let _inside = self.runtime.enter();
        let replica = self.groups.replica(group).context("no replica")?;
        retention::fold_oldest(&replica)
    }

    /// Reads all of a group again, as a pass of the scrub does, and says whether its newest content is
    /// whole. Nothing may be under way.
    ///
    /// # Errors
    /// When it cannot be read through.
    pub fn scrub(&self, group: &str) -> anyhow::Result<bool> {
        let _inside = self.runtime.enter();
        let replica = self.groups.replica(group).context("no replica")?;
        let config = ScrubConfig { interval: Seconds(0), bytes_per_s: Bytes(u64::MAX) };
        let scrubs = Scrubs::new(config, Arc::clone(&self.groups), Arc::clone(&self.branches));
        scrubs.whole_pass(&replica)?;
        Ok(replica.damages().regions().is_empty())
    }

    /// Whether a group's oldest segment is sealed, and there is more than it.
    pub fn can_fold(&self, group: &str) -> bool {
        let segments = self.groups.replica(group).map(|replica| replica.journal().segments());
        segments.is_some_and(|all| all.len() > 1 && all.first().is_some_and(|s| s.is_sealed()))
    }

    /// The disk it is on.
    pub fn disk(&self) -> &SimDisk {
        &self.machine.disk
    }

    /// Sets the wall clock forward or back.
    pub fn step_wall(&self, by_ns: i64) {
        self.machine.step_wall(by_ns);
    }

    /// The groups, for what has no method here.
    pub fn groups(&self) -> &Arc<Groups> {
        &self.groups
    }

    /// Ends everything in order, as a stop of the service does.
    pub fn stop(mut self) {
        self.disconnect();
        self.end.send_replace(true);
        self.groups.end_logs();
        self.branches.end();
        // Owners need no longer to store what they have, or to give up.
        self.advance(Duration::from_secs(5));
        let inside = self.runtime.enter();
        for replica in self.groups.replicas() {
            let kept =
                replica.ledger().keep_vitals().and_then(|()| replica.ledger().keep_history());
            if let Err(error) = kept {
                tracing::error!(group = replica.name(), "{error:#}");
            }
        }
        drop(inside);
        let disk = self.machine.disk.clone();
        drop(self);
        disk.kill();
    }

    /// The process is killed: the machine goes on, nothing that was written is lost.
    pub fn kill(self) {
        self.machine.disk.kill();
    }

    /// The power is cut, and comes back.
    pub fn crash(self) {
        self.machine.disk.crash();
    }

    fn replica(&self, group: &str) -> Result<Arc<Replica>, NoContent> {
        self.groups.replica(group).ok_or_else(|| NoContent::Absent(self.groups.absence(group)))
    }
}

/// Has the owners of logs run, as their thread does.
async fn run_owners(mut new_owners: mpsc::UnboundedReceiver<Owner>) {
    while let Some(owner) = new_owners.recv().await {
        tokio::task::spawn_local(owner.run());
    }
}

#[cfg(test)]
mod tests;
