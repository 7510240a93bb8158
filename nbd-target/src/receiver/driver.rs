//! Sessions on the link: accepting sources and carrying out what their sessions decide.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    pin::pin,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tidemark_link::{
    conn::{Closer, Connection, LinkError, Receiver, Sender, Timeouts},
    hello::TargetMemory,
    lease::{self as link_lease, Moment},
    message::{Echo, Hello, Message, MessageKind, Notice, Refuse, RefuseCode, Severity},
    seam::{self, Listener, Stream},
};
use tokio::sync::{Notify, Semaphore, mpsc};

use super::{
    Session, Step, admit,
    offers::Offer,
    pending::{Newcomer, Pending},
    sizes,
};
use crate::{groups::Groups, lease, machine::Machine, replica::Replica};

/// Messages waiting to be sent to a source.
const OUT_MAX: usize = 1024;
/// Offers waiting to be compared.
const OFFERS_MAX: usize = 256;
/// Connections at once.
const CONNECTIONS_MAX: usize = 256;
/// Those of them that have not greeted yet. One that is too many costs one of them its place, so
/// strangers keep no source out.
const PENDING_MAX: usize = 64;
/// How often a stalled target says that it is.
const STALLED_EVERY: Duration = Duration::from_secs(5);
/// How often the list of damage is looked at while it does not change and nothing is to be said.
const ASK_EVERY: Duration = Duration::from_secs(60);
/// How long a new session waits for what the last one left to become durable.
const SETTLE: Duration = Duration::from_secs(30);

/// What a source says, in order.
pub(crate) trait Incoming {
    /// The next message; none when the source has ended in order.
    async fn recv(&mut self) -> Result<Option<Message>, LinkError>;
}

/// What is said to a source.
pub(crate) trait Outgoing {
    /// Hands a message over.
    async fn send(&mut self, message: &Message) -> Result<(), LinkError>;
    /// Sees to it that what was handed over is on its way.
    async fn flush(&mut self) -> Result<(), LinkError>;
}

impl Incoming for Receiver {
    async fn recv(&mut self) -> Result<Option<Message>, LinkError> {
        Receiver::recv(self).await
    }
}

impl Outgoing for Sender {
    async fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        Sender::send(self, message).await
    }

    async fn flush(&mut self) -> Result<(), LinkError> {
        Sender::flush(self).await
    }
}

/// The sessions of a target; lives on the link's thread.
pub struct Sessions {
    groups: Arc<Groups>,
    timeouts: Timeouts,
    live: RefCell<HashMap<String, Live>>,
    next: Cell<u64>,
}

struct Live {
    number: u64,
    closer: Closer,
    /// Ends the session also where it waits for the log.
    cancel: Rc<Notify>,
    ended: Rc<Notify>,
}

impl Live {
    async fn end(self) {
        self.closer.close();
        self.cancel.notify_one();
        self.ended.notified().await;
    }
}

/// What a session has been given by the table.
struct Place {
    number: u64,
    cancel: Rc<Notify>,
    ended: Rc<Notify>,
}

impl Sessions {
    /// No sessions yet.
    pub fn new(groups: Arc<Groups>, timeouts: Timeouts) -> Rc<Sessions> {
        Rc::new(Sessions { groups, timeouts, live: RefCell::default(), next: Cell::new(0) })
    }

    /// The groups they are of.
    pub fn groups(&self) -> &Arc<Groups> {
        &self.groups
    }

    /// Takes sources on until it is dropped. When all places are taken by sources, others wait.
    pub async fn accept(self: Rc<Self>, mut listener: Listener, tls: Arc<rustls::ServerConfig>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let pending = Rc::new(Pending::default());
        loop {
            match listener.accept().await {
                Ok((stream, address)) => {
                    if places.available_permits() == 0 {
                        pending.close_one();
                    }
                    // They are never closed.
                    let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                    let newcomer = pending.admit(&stream, address, PENDING_MAX);
                    let (sessions, tls) = (Rc::clone(&self), Arc::clone(&tls));
                    seam::spawn(async move {
                        let _place = place;
                        match sessions.serve(stream, &tls, newcomer).await {
                            // Ended by this side, which has said why.
                            Ok(()) | Err(LinkError::Ended) => {}
                            Err(error) => {
                                tracing::warn!(%address, "a source's connection ends: {error}")
                            }
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!("cannot take a connection: {error}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    /// Ends all sessions and waits until they have.
    pub async fn end(&self) {
        let live: Vec<Live> = self.live.borrow_mut().drain().map(|(_, live)| live).collect();
        for live in live {
            live.end().await;
        }
    }

    async fn serve(
        self: Rc<Self>,
        stream: Stream,
        tls: &Arc<rustls::ServerConfig>,
        newcomer: Newcomer,
    ) -> Result<(), LinkError> {
        let connection = Connection::accept(stream, tls, &self.timeouts).await?;
        let peer = connection.peer().clone();
        let (mut sender, mut receiver) = connection.split();
        let after = self.timeouts.handshake;
        receiver.set_body_bytes_max(MessageKind::Hello.body_bytes().1);
        let greeting = tokio::time::timeout(after, receiver.recv()).await;
        let greeting =
            greeting.unwrap_or(Err(LinkError::Timeout { did: "has not greeted", after }));
        receiver.set_body_bytes_max(usize::MAX);
        let hello = match greeting? {
            Some(Message::Hello(hello)) => hello,
            Some(_) => {
                let refusal = Refuse::new(RefuseCode::Other, "a source greets first");
                return send_last(sender, Message::Refuse(refusal)).await;
            }
            None => return Ok(()),
        };
        // A row that cannot be read is met again where the replica is taken on, which says so.
        let row = |name: &str| self.groups.row(name).ok().flatten();
        let admitted = admit(&hello, &peer, self.groups.configs(), row);
        let (name, protocol) = match admitted {
            Ok((config, protocol)) => (config.name.to_string(), protocol),
            Err(refusal) => {
                tracing::warn!(%peer, group = %hello.group.name, "refused: {refusal}");
                return send_last(sender, Message::Refuse(refusal)).await;
            }
        };
        drop(newcomer);
        let place = self.take_over(&name, receiver.closer()).await;
        let outcome = tokio::select! {
            biased;
            () = place.cancel.notified() => Err(LinkError::Ended),
            outcome = self.session(&name, protocol, &hello, &mut sender, &mut receiver) => outcome,
        };
        self.groups.disconnected(&name);
        let outcome = match outcome {
            Ok(Some(refusal)) => {
                tracing::warn!(%peer, group = %name, "refused: {refusal}");
                send_last(sender, Message::Refuse(refusal)).await
            }
            Ok(None) => sender.finish().await,
            Err(error) => Err(error),
        };
        self.live.borrow_mut().retain(|_, live| live.number != place.number);
        place.ended.notify_one();
        outcome
    }

    /// Makes this connection the group's only one: an older one is closed and waited for.
    async fn take_over(&self, name: &str, closer: Closer) -> Place {
        let (cancel, ended) = (Rc::new(Notify::new()), Rc::new(Notify::new()));
        let number = self.next.get();
        self.next.set(number + 1);
        let live = Live { number, closer, cancel: Rc::clone(&cancel), ended: Rc::clone(&ended) };
        let older = self.live.borrow_mut().insert(name.to_owned(), live);
        if let Some(older) = older {
            tracing::info!(group = name, "a new connection takes the place of the one before");
            older.end().await;
        }
        Place { number, cancel, ended }
    }

    /// A session of a source that was admitted, from the answer to its greeting to its end.
    pub(crate) async fn session(
        &self,
        name: &str,
        protocol: u16,
        hello: &Hello,
        sender: &mut impl Outgoing,
        receiver: &mut impl Incoming,
    ) -> Result<Option<Refuse>, LinkError> {
        let replica = match self.groups.take_on(name, hello).await {
            Ok(replica) => replica,
            Err(error) => {
                tracing::error!(group = name, "{error:#}");
                return Ok(Some(Refuse::new(RefuseCode::Other, format!("{error:#}"))));
            }
        };
        if let Err(refusal) = settle(&replica).await {
            if refusal.code == RefuseCode::Full {
                replica.ledger().waited();
            }
            return Ok(Some(refusal));
        }
        let position = replica.journal().progress().durable;
        let vitals = replica.ledger().vitals();
        let memory = TargetMemory {
            position: (!position.term.is_nil()).then_some(position),
            path: replica.path_to(position),
            map_generation: vitals.map_generation,
            volumes: replica.ledger().history(sizes),
        };
        let (session, welcome) = match Session::greet(hello, protocol, memory) {
            Ok(greeted) => greeted,
            Err(refusal) => return Ok(Some(refusal)),
        };
        let (copy, greeting) = (Arc::clone(&replica), hello.clone());
        let announced = blocking(self.groups.machine(), move || {
            copy.ledger().keep_vitals()?;
            copy.announce(&greeting)
        });
        if let Err(error) = announced.await {
            tracing::error!(group = name, "{error:#}");
            return Ok(Some(Refuse::new(RefuseCode::Other, format!("{error:#}"))));
        }
        replica.lease().greeted(session.has_leases());
        sender.send(&Message::Welcome(welcome)).await?;
        sender.flush().await?;
        tracing::info!(group = name, node = %replica.config().node, %position, "receiving");
        self.groups.connected(name);
        self.stream(&replica, session, sender, receiver).await
    }

    /// Receives until either side ends it.
    async fn stream(
        &self,
        replica: &Arc<Replica>,
        session: Session,
        sender: &mut impl Outgoing,
        receiver: &mut impl Incoming,
    ) -> Result<Option<Refuse>, LinkError> {
        let session = RefCell::new(session);
        let (out, outbox) = mpsc::channel(OUT_MAX);
        let (offers, offered) = mpsc::channel(OFFERS_MAX);
        let stop = Notify::new();
        let mut read = pin!(self.read(replica, &session, receiver, out.clone(), offers));
        let mut write = pin!(write(replica, &session, sender, outbox, &stop));
        let mut compare = pin!(compare(replica, offered, out));
        let mut comparing = true;
        let ended = loop {
            tokio::select! {
                biased;
                ended = &mut read => break ended,
                written = &mut write => return written.map(|()| None),
                () = &mut compare, if comparing => comparing = false,
            }
        };
        stop.notify_one();
        let written = write.await;
        ended.and_then(|refusal| written.map(|()| refusal))
    }

    async fn read(
        &self,
        replica: &Arc<Replica>,
        session: &RefCell<Session>,
        receiver: &mut impl Incoming,
        out: mpsc::Sender<Message>,
        offers: mpsc::Sender<Offer>,
    ) -> Result<Option<Refuse>, LinkError> {
        while let Some(message) = receiver.recv().await? {
            let step = session.borrow_mut().receive(message);
            match step {
                Ok(Step::Append { frame, offers: found }) => {
                    self.groups.received(replica.name(), frame.len() as u64);
                    if let Err(closed) = replica.writer().append(frame).await {
                        return Ok(Some(Refuse::new(RefuseCode::Other, closed.to_string())));
                    }
                    for offer in found {
                        if offers.send(offer).await.is_err() {
                            return Ok(None);
                        }
                    }
                }
                Ok(Step::Heartbeat(heartbeat)) => {
                    let received_wall_ns = self.groups.machine().wall_ns();
                    replica.ledger().heard(&heartbeat);
                    self.groups.heard(replica.name(), &heartbeat, received_wall_ns);
                    let echo = Echo { number: heartbeat.number, received_wall_ns };
                    if out.send(Message::Echo(echo)).await.is_err() {
                        return Ok(None);
                    }
                }
                Ok(Step::Lease(until)) => {
                    until.into_iter().for_each(|until| replica.lease().hold(until));
                    lease::look(replica);
                }
                Ok(Step::End) => return Ok(None),
                Err(refusal) => return Ok(Some(refusal)),
            }
        }
        Ok(None)
    }
}

/// Sends what there is to say, and acknowledges as the log moves on.
async fn write(
    replica: &Replica,
    session: &RefCell<Session>,
    sender: &mut impl Outgoing,
    mut outbox: mpsc::Receiver<Message>,
    stop: &Notify,
) -> Result<(), LinkError> {
    let mut progress = replica.journal().watch();
    let mut stalled: Option<Arc<str>> = None;
    progress.mark_changed();
    let mut damage = replica.damages().watch();
    // All of these go on whatever else happens in between; the first asks at once.
    let mut asks = tokio::time::interval(ASK_EVERY);
    asks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut repeats = tokio::time::interval(STALLED_EVERY);
    repeats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut leases = tokio::time::interval(link_lease::ASK_EVERY);
    leases.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let with_leases = session.borrow().has_leases();
    loop {
        let mut last = false;
        tokio::select! {
            biased;
            () = stop.notified() => last = true,
            _ = leases.tick(), if with_leases => {
                lease::look(replica);
                let now = Moment(replica.catalogue().machine().boot_ns());
                let ask = session.borrow_mut().ask_lease(now);
                if let Some(ask) = ask {
                    sender.send(&Message::LeaseAsk(ask)).await?;
                }
            }
            changed = progress.changed() => last = changed.is_err(),
            _ = damage.changed() => loop {
                let asked = session.borrow_mut().ask(&replica.damages().regions());
                let Some(repair) = asked else { break };
                sender.send(&Message::Repair(repair)).await?;
            },
            // Asks again for what has not come.
            _ = asks.tick() => damage.mark_changed(),
            message = outbox.recv() => match message {
                Some(message) => sender.send(&message).await?,
                None => last = true,
            },
            // The source should hear something also while nothing moves.
            _ = repeats.tick(), if stalled.is_some() => session.borrow_mut().repeat(),
        }
        while let Ok(message) = outbox.try_recv() {
            sender.send(&message).await?;
        }
        let now = progress.borrow_and_update().clone();
        let ack = session.borrow_mut().acknowledge(&now);
        if let Some(ack) = ack {
            sender.send(&Message::Ack(ack)).await?;
        }
        if now.stalled != stalled {
            let notice = match &now.stalled {
                Some(why) => Notice::new(Severity::Error, format!("not accepting: {why}")),
                None => Notice::new(Severity::Info, "accepting again"),
            };
            sender.send(&Message::Notice(notice)).await?;
            stalled = now.stalled;
            repeats.reset();
        }
        sender.flush().await?;
        if last {
            return Ok(());
        }
    }
}

/// Answers offers, each once the replica holds everything before it.
async fn compare(
    replica: &Arc<Replica>,
    mut offers: mpsc::Receiver<Offer>,
    out: mpsc::Sender<Message>,
) {
    let mut progress = replica.journal().watch();
    while let Some(offer) = offers.recv().await {
        if progress.wait_for(|progress| progress.written.seq >= offer.seq).await.is_err() {
            return;
        }
        let replica = Arc::clone(replica);
        let machine = replica.catalogue().machine().clone();
        let compared = machine.spawn_blocking(move || offer.compare(&replica)).await;
        let Ok(need) = compared else { return };
        if out.send(Message::Need(need)).await.is_err() {
            return;
        }
    }
}

/// Waits until what an earlier session left is durable.
async fn settle(replica: &Replica) -> Result<(), Refuse> {
    let full = |why: &str| Refuse::new(RefuseCode::Full, format!("not accepting: {why}"));
    let mut progress = replica.journal().watch();
    let stalled = async {
        let stalled = progress.wait_for(|progress| progress.stalled.is_some()).await;
        stalled.ok().and_then(|progress| progress.stalled.clone())
    };
    tokio::select! {
        biased;
        synced = replica.writer().sync() => {
            synced.map_err(|closed| Refuse::new(RefuseCode::Other, closed.to_string()))
        }
        why = stalled => Err(full(why.as_deref().unwrap_or("the log is being closed"))),
        () = tokio::time::sleep(SETTLE) => {
            Err(Refuse::new(RefuseCode::Busy, "the log is still busy with an earlier session"))
        }
    }
}

async fn send_last(mut sender: Sender, message: Message) -> Result<(), LinkError> {
    sender.send(&message).await?;
    sender.finish().await
}

/// Runs what blocks on a thread of its own.
pub async fn blocking<T: Send + 'static>(
    machine: &Machine,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    machine.spawn_blocking(work).await?
}
