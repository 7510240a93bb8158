//! The link to the target: greets, sends frames in order, takes acknowledgements.
//!
//! It runs on a thread of its own (lib/link's seam) and comes back by itself: a cut, slow or
//! half-open network costs time, never data. What is sent comes out of the
//! [outbox](crate::outbox), which keeps it until the target has it durably; after a reconnect the
//! stream goes on exactly where the replica ends.

mod grants;
mod sending;
pub mod session;
mod spooled;

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use rustls::ClientConfig;
use tidemark_journal::{Ancestry, Position, Seq};
use tidemark_link::{
    conn::{Connection, Receiver, Timeouts},
    message::{GroupHello, Hello, LeaseGrant, Message, Notice, RefuseCode, Severity, VolumeHello},
    pki::NodeName,
    seam,
    throttle::Schedule,
};
use tokio::sync::{Notify, oneshot};

use self::{
    grants::Grants,
    sending::SendLoop,
    session::{Greeter, Start, acknowledged, peer},
    spooled::SpoolEnd,
};
use crate::{
    carriers::Carriers,
    clock::JournalClock,
    encoder,
    engine::{Command, Engine},
    lag::LagHistogram,
    lease::Peer,
    outbox::Outbox,
    state::keeper::{Job, Keeper},
};

/// How often the source says that it is alive.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Waits between attempts to connect: the first and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// The shortest wait between two doubts.
const DOUBT_WAIT: Duration = Duration::from_secs(2);
/// The wait after the target has refused: people have to do something.
const REFUSED_WAIT: Duration = Duration::from_secs(5);

/// What people are told of a full target.
pub const FULL: &str =
    "the target's disk is full, or its log may not grow: nothing is sent until it has room";

/// What a link is made of.
pub struct LinkParts {
    /// The target's address, `host:port`.
    pub address: String,
    /// The target's node name.
    pub target: NodeName,
    /// This side's certificate and the authority.
    pub tls: Arc<ClientConfig>,
    /// The group, as the target knows it.
    pub group: GroupHello,
    /// Its volumes.
    pub volumes: Vec<VolumeHello>,
    /// The path of terms.
    pub ancestry: Ancestry,
    /// What is known to be final-durable from an earlier life.
    pub acked: Position,
    /// The frames.
    pub outbox: Arc<Outbox>,
    /// The link's thread becomes one of them.
    pub carriers: Arc<Carriers>,
    /// Woken when a frame is taken.
    pub encoder: encoder::Waker,
    /// Told of acknowledgements and answers.
    pub engine: Engine,
    /// Knows the generation of the state.
    pub keeper: Keeper,
    /// The generation of the state when it was opened.
    pub generation_found: u64,
    /// Journal time.
    pub clock: JournalClock,
    /// The group is to be in sync.
    pub sync: bool,
    /// Bounds the rate.
    pub throttle: Schedule,
}

/// How a link stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LinkState {
    /// Not connected; a new attempt follows.
    #[default]
    Down,
    /// Frames go over it.
    Up,
    /// The target has refused; a new attempt follows all the same.
    Refused(RefuseCode),
}

/// What there is to know of a link.
#[derive(Clone, Debug, Default)]
pub struct LinkStatus {
    /// How it stands.
    pub state: LinkState,
    /// Since when, on the wall clock, nanoseconds since 1970.
    pub since_ns: i64,
    /// Why it is not up; for people.
    pub sentence: Option<String>,
    /// What the target last complained of, over this link and since its last good news.
    pub notice: Option<Notice>,
    /// The target takes nothing until it has room again, so no frames are sent.
    pub target_full: bool,
    /// Bytes of frames sent.
    pub sent_bytes: u64,
    /// Connections made.
    pub connections: u64,
    /// The last heartbeat's way there and back.
    pub round_trip_ns: Option<u64>,
    /// The highest position known to be final-durable.
    pub durable: Position,
    /// From a record's time to the acknowledgement that it is final-durable.
    pub lag: LagHistogram,
}

impl LinkStatus {
    /// Whether the target takes nothing for want of room, by what was last heard of it.
    pub fn is_full(&self) -> bool {
        self.target_full || self.state == LinkState::Refused(RefuseCode::Full)
    }
}

struct Shared {
    ancestry: Mutex<Ancestry>,
    /// Sequences reserved with the newest term: what a snapshot says may be older.
    ceiling: std::sync::atomic::AtomicU64,
    status: Mutex<LinkStatus>,
    /// Woken when the path of terms has changed, and at the end.
    changed: Notify,
    stop: std::sync::atomic::AtomicBool,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, LinkStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_state(&self, state: LinkState, sentence: Option<String>) {
        let mut status = self.status();
        if status.state != state {
            status.since_ns = crate::clock::wall_ns();
        }
        (status.state, status.sentence) = (state, sentence);
    }

    fn ancestry(&self) -> Ancestry {
        self.ancestry.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn stopping(&self) -> bool {
        self.stop.load(std::sync::atomic::Ordering::Acquire)
    }
}

/// A running link.
pub struct Link {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Tells a link that a new term has begun.
#[derive(Clone)]
pub struct TermTeller(Arc<Shared>);

impl TermTeller {
    /// For a link that is started later with this teller.
    pub fn new(ancestry: Ancestry) -> TermTeller {
        TermTeller(Arc::new(Shared {
            ancestry: Mutex::new(ancestry),
            ceiling: 0.into(),
            status: Mutex::default(),
            changed: Notify::new(),
            stop: false.into(),
        }))
    }

    /// The link greets anew with this path, whose sequences are reserved up to `ceiling`. What was
    /// acknowledged on the path before says nothing about a replica that is compared as a whole.
    pub fn tell(&self, ancestry: Ancestry, ceiling: Seq) {
        self.0.ceiling.store(ceiling.0, std::sync::atomic::Ordering::Release);
        self.0.status().durable = Position::default();
        *self.0.ancestry.lock().unwrap_or_else(PoisonError::into_inner) = ancestry;
        self.0.changed.notify_one();
    }
}

impl Link {
    /// Starts the link's thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(parts: LinkParts, teller: TermTeller) -> std::io::Result<Link> {
        let shared = teller.0;
        let worker = shared.clone();
        let thread = std::thread::Builder::new().name("tm-link".into()).spawn(move || {
            parts.carriers.join();
            let greeter = Greeter {
                group: parts.group.clone(),
                volumes: parts.volumes.clone(),
                acked: parts.acked,
                generation_found: parts.generation_found,
                greeted: false,
                doubted: None,
                sync: parts.sync,
            };
            let work =
                Worker { parts, shared: worker.clone(), greeter, welcomed: false, doubts: 0 };
            if let Err(error) = seam::run(work.run()) {
                tracing::error!(%error, "the link cannot run");
                worker.set_state(LinkState::Down, Some(error.to_string()));
            }
        })?;
        Ok(Link { shared, thread: Some(thread) })
    }

    /// How it stands.
    pub fn status(&self) -> LinkStatus {
        self.shared.status().clone()
    }

    /// Tells it to end. What was not acknowledged stays in the outbox. The thread is there once, to be
    /// joined.
    pub fn end(&mut self) -> Option<JoinHandle<()>> {
        self.shared.stop.store(true, std::sync::atomic::Ordering::Release);
        self.shared.changed.notify_one();
        self.thread.take()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end();
    }
}

struct Worker {
    parts: LinkParts,
    shared: Arc<Shared>,
    greeter: Greeter,
    /// The state was written since this life of the source was first welcomed.
    welcomed: bool,
    /// Doubts one after the other.
    doubts: u32,
}

/// How a session ended.
enum End {
    /// The path of terms has changed, or people want an end.
    Changed,
    /// The target said no.
    Refused(RefuseCode, String),
    /// The two sides' memories disagree: the engine prepares a new term.
    Doubt(String),
}

impl Worker {
    async fn run(mut self) {
        let mut backoff = BACKOFF.0;
        while !self.shared.stopping() {
            let started = Instant::now();
            let ended = self.session().await;
            self.parts.outbox.link_ended();
            self.parts.engine.tell(Command::Link(None));
            self.parts.engine.tell(Command::Peer(Peer::Away));
            if self.shared.stopping() {
                break;
            }
            if started.elapsed() > Duration::from_secs(10) {
                backoff = BACKOFF.0;
            }
            let wait = match ended {
                Ok(End::Changed) => Duration::ZERO,
                Ok(End::Refused(code, sentence)) => {
                    tracing::warn!(group = %self.parts.group.name, %sentence, "the target refuses");
                    self.shared.set_state(LinkState::Refused(code), Some(sentence));
                    REFUSED_WAIT
                }
                Ok(End::Doubt(sentence)) => {
                    tracing::warn!(group = %self.parts.group.name, %sentence, "comparing everything");
                    self.shared.set_state(LinkState::Down, Some(sentence));
                    // The new term settles it. If it does not, terms must not be made in a hurry.
                    self.doubts += 1;
                    if self.doubts > 1 {
                        tokio::time::sleep(DOUBT_WAIT * (1 << self.doubts.min(5))).await;
                    }
                    Duration::from_secs(60)
                }
                Err(error) => {
                    let sentence = format!("{error:#}");
                    tracing::info!(group = %self.parts.group.name, %sentence, "the link is down");
                    self.shared.set_state(LinkState::Down, Some(sentence));
                    backoff
                }
            };
            backoff = (backoff * 2).min(BACKOFF.1);
            // A change of terms or a stop ends the wait.
            let _ = tokio::time::timeout(wait, self.shared.changed.notified()).await;
        }
        self.shared.set_state(LinkState::Down, None);
    }

    fn hello(&self) -> Hello {
        let snapshot = self.parts.engine.snapshot();
        let durable = self.shared.status().durable;
        let told = Seq(self.shared.ceiling.load(std::sync::atomic::Ordering::Acquire));
        self.greeter.hello(
            self.shared.ancestry(),
            durable,
            snapshot.ceiling.max(told),
            self.parts.keeper.generation(),
        )
    }

    async fn session(&mut self) -> anyhow::Result<End> {
        let timeouts = Timeouts { idle: Duration::from_secs(10), ..Timeouts::default() };
        let parts = &self.parts;
        let mut connection =
            Connection::connect(&parts.address, &parts.tls, &parts.target, &timeouts)
                .await
                .with_context(|| format!("target {} at {}", parts.target, parts.address))?;
        let hello = self.hello();
        let welcome = match connection.ask(&Message::Hello(hello.clone())).await? {
            Message::Welcome(welcome) => welcome,
            Message::Refuse(refuse) => return Ok(End::Refused(refuse.code, refuse.sentence)),
            other => {
                return Err(anyhow!("the target answered the greeting with {:?}", other.kind()));
            }
        };
        let (from, mode) = match self.greeter.welcomed(&hello, &welcome, &parts.outbox) {
            Start::Stream { from, mode } => (from, mode),
            Start::Doubt { after } => {
                let why = after.why.clone();
                parts.engine.tell(Command::Doubt(after));
                return Ok(End::Doubt(why));
            }
            Start::Refused(refuse) => return Ok(End::Refused(refuse.code, refuse.sentence)),
        };
        if !self.welcomed {
            let (written, durable) = oneshot::channel();
            parts.keeper.ask(Job::Welcomed(Box::new(move || {
                // If the session has ended, nobody is told.
                let _ = written.send(());
            })));
            tokio::select! {
                // Else the keeper has come to its end, as the agent does.
                done = durable => done.context("the agent stops")?,
                () = self.changed() => return Ok(End::Changed),
            }
            self.welcomed = true;
        }
        parts.engine.tell(Command::Durable(from.seq));
        parts.engine.tell(Command::Link(Some(mode)));
        parts.engine.tell(Command::Peer(peer(&welcome)));
        self.doubts = 0;
        {
            let mut status = self.shared.status();
            status.connections += 1;
            status.durable = from;
            status.target_full = false;
            // What is still so will be said again.
            status.notice = None;
        }
        self.shared.set_state(LinkState::Up, None);
        tracing::info!(group = %self.parts.group.name, position = %from, "the link is up");
        self.stream(connection, &hello.ancestry, from).await
    }

    async fn stream(
        &self,
        connection: Connection,
        ancestry: &Ancestry,
        from: Position,
    ) -> anyhow::Result<End> {
        let (sender, receiver) = connection.split();
        let closer = sender.closer();
        let beats = Rc::new(RefCell::new(None));
        let grants = Grants::default();
        let sending = SendLoop {
            sender,
            from,
            ancestry: ancestry.clone(),
            outbox: self.parts.outbox.clone(),
            encoder: self.parts.encoder.clone(),
            engine: self.parts.engine.clone(),
            keeper: self.parts.keeper.clone(),
            shared: self.shared.clone(),
            beats: beats.clone(),
            grants: grants.clone(),
            throttle: self.parts.throttle.clone(),
            spool: SpoolEnd::default(),
        };
        // Sending must not be dropped in the middle of a message, so it is a task of its own.
        let sending = seam::spawn(sending.run());
        let received = tokio::select! {
            received = self.receive(receiver, ancestry, &beats, &grants) => received,
            () = self.changed() => Ok(End::Changed),
        };
        closer.close();
        let sent = sending.await.map_err(|error| anyhow!("the sending task ended: {error}"))?;
        match (received, sent) {
            (Ok(end), _) => Ok(end),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(other)) => Err(error.context(other)),
        }
    }

    async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    async fn receive(
        &self,
        mut receiver: Receiver,
        ancestry: &Ancestry,
        beats: &RefCell<Option<(u64, Instant)>>,
        grants: &Grants,
    ) -> anyhow::Result<End> {
        while let Some(message) = receiver.recv().await? {
            match message {
                Message::Ack(ack) => {
                    let now_ns = self.parts.clock.now_ns();
                    let outbox = &self.parts.outbox;
                    let mut status = self.shared.status();
                    if ack.term == ancestry.current().id {
                        status.target_full = ack.flags.full;
                    }
                    if let Some(durable) = acknowledged(&ack, ancestry, status.durable, outbox) {
                        status.durable = durable;
                        for time_ns in outbox.times_through(durable.seq) {
                            status.lag.add(now_ns.saturating_sub(time_ns));
                        }
                        drop(status);
                        outbox.release(durable.seq);
                        self.parts.engine.tell(Command::Durable(durable.seq));
                    }
                }
                Message::Need(need) => {
                    let mut bits = [0; 32];
                    for block in need.wanted() {
                        bits[block / 8] |= 1 << (block % 8);
                    }
                    self.parts.engine.tell(Command::Needed(need.seq, bits));
                }
                Message::Repair(repair) => {
                    let regions: u64 = repair.runs.iter().map(|run| u64::from(run.regions)).sum();
                    let group = &self.parts.group.name;
                    tracing::warn!(%group, regions, "the target has damage: compared afresh");
                    self.parts.engine.tell(Command::Repair(repair.runs));
                }
                Message::Echo(echo) => {
                    if let Some((number, at)) = *beats.borrow()
                        && number == echo.number
                    {
                        self.shared.status().round_trip_ns = Some(at.elapsed().as_nanos() as u64);
                    }
                }
                Message::LeaseAsk(ask) => {
                    let (grants, outbox) = (grants.clone(), self.parts.outbox.clone());
                    let granted = move |lease| {
                        grants.put(LeaseGrant { number: ask.number, lease });
                        outbox.filled.notify_one();
                    };
                    self.parts.engine.tell(Command::LeaseAsk(Box::new(granted)));
                }
                Message::Notice(notice) => {
                    tracing::warn!(sentence = %notice.sentence, "the target says");
                    // Good news ends the trouble that was told before.
                    self.shared.status().notice =
                        Some(notice).filter(|notice| notice.severity != Severity::Info);
                }
                Message::Refuse(refuse) => return Ok(End::Refused(refuse.code, refuse.sentence)),
                Message::Bye => return Err(anyhow!("the target is ending")),
                other => return Err(anyhow!("the target sent a {:?}", other.kind())),
            }
        }
        Err(anyhow!("the target has ended the connection"))
    }
}
