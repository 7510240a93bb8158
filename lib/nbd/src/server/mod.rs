//! The server: accepts connections, negotiates, serves, and ends in order.

mod clients;
mod handshake;
mod inflight;
mod listen;
mod negotiation;
mod out;
mod pending;
mod request;
mod transmission;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::export::{ClientInfo, Export, Exports, Origin};
use crate::tls::{self, Tls};
use clients::{Account, Clients};
use handshake::{Outcome, greet, haggle, within};
use listen::Accepted;
use negotiation::{Negotiation, TlsState};
use pending::{Newcomer, Pending};
use transmission::{Opened, Session};

pub use listen::Listener;

/// Bounds on what clients can use up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once, over all listeners; further ones wait until one of those ends.
    pub connections: usize,
    /// Those of them that are in an export and of one client, which is told apart by its certificate,
    /// else by its address (of IPv6 the first 64 bits). Clients of Unix sockets are not counted.
    pub client_connections: usize,
    /// Payload bytes of one such client under way at once, over all its connections.
    pub client_bytes: usize,
    /// Those of them that have not entered an export yet. One that is too many costs one of them its
    /// place, the oldest of the network with the most, and so does one for which `connections` leaves
    /// none: strangers who say nothing keep nobody out.
    pub pending_connections: usize,
    /// Requests of one connection under way at once, replies being sent included.
    pub in_flight_requests: usize,
    /// Payload bytes of one connection under way at once. One request is let in whatever its
    /// size, so the true bound is the larger of this and an export's maximum payload.
    pub in_flight_bytes: usize,
    /// Time for each exchange of the handshake: the greeting, TLS in one go, the arrival of an
    /// option, the sending of its reply. It runs on the wall clock, so it must leave room for a
    /// machine that is busy with other work: a TLS handshake costs both sides some computing. What
    /// a stranger who says nothing gains by a longer time is a place until another wants it.
    pub option_timeout: Duration,
    /// Time for all options together; anew after TLS has been started.
    pub handshake_timeout: Duration,
    /// How long a client may stop in the middle of a message, or leave replies unread. Between
    /// requests it may be idle for ever; on TCP, keep-alive finds out whether it is still there.
    pub stall_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            client_connections: 64,
            client_bytes: 256 << 20,
            pending_connections: 64,
            in_flight_requests: 256,
            in_flight_bytes: 64 << 20,
            option_timeout: Duration::from_secs(30),
            handshake_timeout: Duration::from_secs(120),
            stall_timeout: Duration::from_secs(120),
        }
    }
}

/// An NBD server over a set of exports. Clones are handles to the same server.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    exports: Arc<dyn Exports>,
    limits: Limits,
    clients: Clients,
    /// A permit for each connection; all of them back means no connection is left.
    places: Arc<Semaphore>,
    pending: Arc<Pending>,
    stage: watch::Sender<Stage>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Stage {
    Running,
    /// No new connections or requests; those under way are answered.
    Draining,
    /// Connections are dropped.
    Aborting,
}

impl Server {
    /// A server; nothing is listened on yet.
    pub fn new(exports: Arc<dyn Exports>, limits: Limits) -> Self {
        let places = limits.connections.clamp(1, u32::MAX as usize >> 4);
        Self(Arc::new(Inner {
            exports,
            limits: Limits { connections: places, ..limits },
            clients: Clients::default(),
            places: Arc::new(Semaphore::new(places)),
            pending: Arc::default(),
            stage: watch::Sender::new(Stage::Running),
        }))
    }

    /// Accepts connections until [`shutdown`](Self::shutdown). May be called for several
    /// listeners. Fails at once on a TCP listener without required TLS, unless that was allowed.
    pub async fn serve(&self, listener: Listener) -> io::Result<()> {
        listener.check_policy()?;
        let draining = self.0.reached(Stage::Draining);
        tokio::pin!(draining);
        loop {
            let accepted = async {
                let accepted = listener.accept().await;
                (accepted, self.0.place().await)
            };
            let (accepted, place) = tokio::select! {
                biased;
                () = &mut draining => return Ok(()),
                accepted = accepted => accepted,
            };
            let Some(place) = place else { return Ok(()) };
            // Here, not in its task: the next one may want its place before that has run.
            let newcomer = self.0.admit(accepted.origin());
            self.spawn(accepted, listener.tls().clone(), place, newcomer);
        }
    }

    /// Serves one connection over any stream, to its end. The error says why it was cut.
    pub async fn serve_stream<S>(&self, stream: S, origin: Origin, tls: &Tls) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let Some(_place) = self.0.place().await else { return Ok(()) };
        self.0.connection(stream, origin, tls, self.0.admit(origin)).await
    }

    /// Serves one connection that is in the transmission phase from its first byte, as that of a
    /// kernel client is that was configured without a handshake. Replies are simple ones. A
    /// [`shutdown`](Self::shutdown) leaves unanswered what has not been taken up: a kernel client
    /// sends that again over its next connection, and hands an error to the application.
    pub async fn serve_entered<S>(
        &self,
        mut stream: S,
        name: &str,
        export: Arc<dyn Export>,
    ) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let info = export.info();
        let session = Session {
            name: name.to_owned(),
            opened: Opened::new(export),
            structured: false,
            allocation: false,
            resends: true,
            info,
            account: Account::default(),
        };
        handshake::check(&session.info)?;
        let Ok(_place) = self.0.places.acquire().await else { return Ok(()) };
        let client = ClientInfo::default();
        let newcomer = self.0.admit(client.origin);
        let outcome = Outcome::Transmission(session);
        let served = self.0.proceed(&mut stream, outcome, &client, &newcomer);
        self.0.until_aborted(served).await
    }

    /// Connections that are served now.
    pub fn connections(&self) -> usize {
        self.0.limits.connections - self.0.places.available_permits()
    }

    /// Stops accepting connections and requests, waits up to `grace` for those under way to be
    /// answered, then drops the rest. Returns whether all ended in order.
    pub async fn shutdown(&self, grace: Duration) -> bool {
        self.0.advance(Stage::Draining);
        let all = u32::try_from(self.0.limits.connections).unwrap_or(u32::MAX);
        let orderly = timeout(grace, self.0.places.acquire_many(all)).await.is_ok();
        self.0.advance(Stage::Aborting);
        orderly
    }

    fn spawn(&self, accepted: Accepted, tls: Tls, place: OwnedSemaphorePermit, newcomer: Newcomer) {
        let inner = Arc::clone(&self.0);
        tokio::spawn(async move {
            let origin = accepted.origin();
            let serve = async {
                match accepted {
                    Accepted::Unix(s, _) => inner.connection(s, origin, &tls, newcomer).await,
                    Accepted::Tcp(s, _) => inner.connection(s, origin, &tls, newcomer).await,
                }
            };
            if let Err(reason) = serve.await {
                tracing::warn!(client = %origin, reason, "connection cut");
            }
            drop(place);
        });
    }
}

impl Inner {
    /// A place for one more connection, if need be that of the oldest in its handshake. None if
    /// there are no places any more.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        let places = || Arc::clone(&self.places);
        if let Ok(place) = places().try_acquire_owned() {
            return Some(place);
        }
        self.pending.cut_one();
        places().acquire_owned().await.ok()
    }

    fn admit(&self, origin: Origin) -> Newcomer {
        self.pending.admit(self.limits.pending_connections, origin.network())
    }

    async fn connection<S>(
        &self,
        stream: S,
        origin: Origin,
        tls: &Tls,
        newcomer: Newcomer,
    ) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        tokio::select! {
            served = self.until_aborted(self.converse(stream, origin, tls, &newcomer)) => served,
            () = newcomer.unwanted() => Err("its place was wanted before it had entered".to_owned()),
        }
    }

    async fn converse<S>(
        &self,
        mut stream: S,
        origin: Origin,
        tls: &Tls,
        newcomer: &Newcomer,
    ) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let step = self.limits.option_timeout;
        let mut client = ClientInfo { origin, ..ClientInfo::default() };
        let state = match tls {
            Tls::Off => TlsState::Off,
            Tls::Allowed(_) => TlsState::Offered,
            Tls::Required(_) => TlsState::Required,
        };
        let flags = greet(&mut stream, step).await.map_err(|error| error.to_string())?;
        let flags = flags.ok_or("the client sent unknown handshake flags")?;
        let mut negotiation = Negotiation::new(flags, state);
        let outcome = self.negotiate(&mut stream, &mut negotiation, &client).await?;
        let Outcome::StartTls = outcome else {
            return self.proceed(&mut stream, outcome, &client, newcomer).await;
        };
        let (Tls::Allowed(config) | Tls::Required(config)) = tls else {
            return Err("TLS was started though it is off".to_owned());
        };
        let accept = TlsAcceptor::from(Arc::clone(config)).accept(stream);
        let mut stream =
            within(step, accept).await.map_err(|error| format!("TLS handshake failed: {error}"))?;
        client.tls = true;
        client.certificate = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first())
            .map(|certificate| certificate.clone().into_owned());
        client.peer_name = client.certificate.as_ref().and_then(tls::peer_name);
        let mut negotiation = negotiation.after_tls();
        let outcome = self.negotiate(&mut stream, &mut negotiation, &client).await?;
        self.proceed(&mut stream, outcome, &client, newcomer).await
    }

    async fn negotiate<S>(
        &self,
        stream: &mut S,
        negotiation: &mut Negotiation,
        client: &ClientInfo,
    ) -> Result<Outcome, String>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let limits = &self.limits;
        let enter = || self.clients.enter(client, limits.client_connections, limits.client_bytes);
        let whole =
            haggle(stream, negotiation, &self.exports, client, enter, limits.option_timeout);
        let bounded = within(self.limits.handshake_timeout, whole);
        tokio::select! {
            outcome = bounded => outcome.or_else(|error| match error.kind() {
                // Clients that only looked leave this way.
                io::ErrorKind::UnexpectedEof => Ok(Outcome::Ended("the client left")),
                _ => Err(error.to_string()),
            }),
            () = self.reached(Stage::Draining) => Ok(Outcome::Ended("the server is shut down")),
        }
    }

    async fn proceed<S>(
        &self,
        stream: &mut S,
        outcome: Outcome,
        client: &ClientInfo,
        newcomer: &Newcomer,
    ) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let session = match outcome {
            Outcome::Transmission(session) => session,
            Outcome::Ended(reason) => {
                tracing::debug!(client = %client.origin, reason, "handshake ended");
                let closed = tokio::io::AsyncWriteExt::shutdown(stream);
                let _ = timeout(self.limits.option_timeout, closed).await;
                return Ok(());
            }
            Outcome::StartTls => return Err("TLS was started twice".to_owned()),
        };
        newcomer.entered();
        tracing::info!(
            export = session.name,
            client = %client.origin,
            peer = client.peer_name,
            "client connected"
        );
        let shutdown = Box::pin(self.reached(Stage::Draining));
        let served = transmission::serve(stream, &session, &self.limits, shutdown).await;
        tracing::info!(export = session.name, client = %client.origin, "client gone");
        session.opened.close().await;
        served
    }

    /// Drops a connection once the server's grace is over.
    async fn until_aborted(
        &self,
        serve: impl Future<Output = Result<(), String>>,
    ) -> Result<(), String> {
        tokio::select! {
            served = serve => served,
            () = self.reached(Stage::Aborting) => Err("the server was shut down".to_owned()),
        }
    }

    /// Resolves once the server is at this stage of its end.
    async fn reached(&self, stage: Stage) {
        let mut watched = self.stage.subscribe();
        // Cannot fail: the sender lives in `self`.
        let _ = watched.wait_for(|now| *now >= stage).await;
    }

    fn advance(&self, stage: Stage) {
        self.stage.send_if_modified(|now| {
            let ahead = *now < stage;
            if ahead {
                *now = stage;
            }
            ahead
        });
    }
}
