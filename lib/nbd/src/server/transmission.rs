//! Drives the transmission phase of one connection, in one task.
//!
//! Each pass takes finished requests, parses what has arrived and hands it to the export in order
//! of arrival, and sends all replies there are in one write. Memory is bounded: a request holds
//! its place and its bytes from its header to the last byte of its reply.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::runtime::Handle;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};

use super::Limits;
use super::clients::{Account, Budget};
use super::inflight::InFlight;
use super::out::OutQueue;
use super::request::{Ended, Running, charge, check};
use crate::buffer::Buffer;
use crate::export::{BoxFuture, Error, Export, ExportInfo};
use crate::proto::Errno;
use crate::proto::transmission::{Command, REQUEST_BYTES, Request};

/// Bytes read ahead: at least what a client with 32 requests of 4 KiB has under way.
const READ_BYTES: usize = 256 * 1024;
/// A payload of which at least this much is missing is read straight into its buffer.
const DIRECT_BYTES: usize = 16 * 1024;
/// A refused write's payload is skipped up to this length; beyond it the session ends.
const SKIP_BYTES_MAX: u32 = 64 << 20;

/// What the handshake agreed on.
pub(crate) struct Session {
    pub(crate) name: String,
    pub(crate) opened: Opened,
    pub(crate) info: ExportInfo,
    pub(crate) structured: bool,
    /// Whether `base:allocation` is selected.
    pub(crate) allocation: bool,
    /// Whether the client sends again over its next connection what this one leaves unanswered: then a
    /// shutdown refuses nothing.
    pub(crate) resends: bool,
    pub(crate) account: Account,
}

/// An open export; it is closed exactly once, also when the connection's task is dropped.
pub(crate) struct Opened {
    pub(crate) export: Arc<dyn Export>,
    closed: bool,
}

impl Opened {
    pub(crate) fn new(export: Arc<dyn Export>) -> Self {
        Self { export, closed: false }
    }

    pub(crate) async fn close(mut self) {
        self.closed = true;
        close(Arc::clone(&self.export)).await;
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if !self.closed
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(close(Arc::clone(&self.export)));
        }
    }
}

async fn close(export: Arc<dyn Export>) {
    if let Err(error) = export.close().await {
        tracing::warn!(%error, "closing an export failed");
    }
}

/// Serves requests until the client leaves or `shutdown` resolves; every request that reached the
/// export has ended when this returns. `Err` says why the connection was cut.
pub(crate) async fn serve<S>(
    stream: &mut S,
    session: &Session,
    limits: &Limits,
    shutdown: BoxFuture<'_, ()>,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let tick = limits.stall_timeout / 2;
    let mut ticks = interval_at(Instant::now() + tick, tick);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection = Connection {
        stream,
        session,
        limits,
        shutdown: Some(shutdown),
        ticks,
        moved: true,
        idle_ticks: 0,
        input: Input::new(),
        phase: Phase::Header,
        running: InFlight::new(),
        ended: Vec::new(),
        out: OutQueue::default(),
        requests: 0,
        bytes: 0,
        budget: Budget::new(&session.account, limits.client_bytes),
        fault: None,
    };
    std::future::poll_fn(|cx| connection.poll(cx)).await;
    if let Some(fault) = connection.fault {
        return Err(fault);
    }
    // Ends TLS in order; a client that is gone already is no fault.
    let _ = timeout(limits.option_timeout, connection.stream.shutdown()).await;
    Ok(())
}

struct Connection<'a, S> {
    stream: &'a mut S,
    session: &'a Session,
    limits: &'a Limits,
    /// Gone once it has resolved.
    shutdown: Option<BoxFuture<'a, ()>>,
    ticks: Interval,
    /// Whether bytes moved since the last tick.
    moved: bool,
    idle_ticks: u32,
    input: Input,
    phase: Phase,
    running: InFlight<Running>,
    /// Kept for its allocation; empty between passes.
    ended: Vec<Ended>,
    out: OutQueue,
    /// Requests that hold a place, and the bytes they are charged with.
    requests: usize,
    bytes: usize,
    /// The same bytes among those of its client.
    budget: Budget,
    fault: Option<String>,
}

/// Where in the client's stream we are.
enum Phase {
    Header,
    /// A header is parsed and waits for room within the limits.
    Admission(Request),
    Payload(Request, Buffer),
    /// Skipping the payload of a write that is refused.
    Skip {
        request: Request,
        left: u32,
        error: Error,
    },
    /// Nothing more is read.
    Over,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut ended = std::mem::take(&mut self.ended);
            self.running.poll_ended(cx, &mut ended);
            ended.drain(..).for_each(|ended| self.answer(ended));
            self.ended = ended;
            self.poll_shutdown(cx);
            let received = self.receive(cx);
            let sent = self.send(cx);
            self.moved |= received || sent;
            if matches!(self.phase, Phase::Over) && self.running.is_empty() && self.out.is_empty() {
                return Poll::Ready(());
            }
            if !received && !sent && !self.stalled(cx) {
                return Poll::Pending;
            }
        }
    }

    /// Takes in what there is; true when bytes were read.
    fn receive(&mut self, cx: &mut Context<'_>) -> bool {
        self.parse(cx);
        if matches!(self.phase, Phase::Over | Phase::Admission(_)) {
            return false;
        }
        let read = match &mut self.phase {
            Phase::Payload(_, buffer) if buffer.capacity() - buffer.len() >= DIRECT_BYTES => {
                buffer.poll_fill(Pin::new(&mut *self.stream), cx)
            }
            _ => self.input.poll_fill(Pin::new(&mut *self.stream), cx),
        };
        match read {
            Poll::Pending => false,
            Poll::Ready(Ok(0)) => {
                if !self.at_rest() {
                    self.fail("the client left in the middle of a request");
                }
                self.phase = Phase::Over;
                false
            }
            Poll::Ready(Ok(_)) => {
                self.parse(cx);
                true
            }
            Poll::Ready(Err(error)) => {
                self.fail(format!("reading from the client failed: {error}"));
                false
            }
        }
    }

    /// Parses and starts requests until input or room runs out.
    fn parse(&mut self, cx: &mut Context<'_>) {
        loop {
            self.phase = match std::mem::replace(&mut self.phase, Phase::Over) {
                Phase::Header => match self.input.take_header() {
                    None => {
                        self.phase = Phase::Header;
                        return;
                    }
                    Some(raw) => match Request::parse(&raw) {
                        None => {
                            self.fail("a request with a wrong magic");
                            return;
                        }
                        Some(request) if request.command == Command::Disconnect => return,
                        Some(request) => Phase::Admission(request),
                    },
                },
                Phase::Admission(request) => {
                    let checked = self.check(&request);
                    let charge = if checked.is_ok() { charge(&request) } else { 0 };
                    if !self.has_room(charge, cx) {
                        self.phase = Phase::Admission(request);
                        return;
                    }
                    self.admit(request, checked, charge)
                }
                Phase::Payload(request, mut buffer) => {
                    let taken = buffer.extend(self.input.waiting());
                    self.input.consume(taken);
                    if !buffer.is_full() {
                        self.phase = Phase::Payload(request, buffer);
                        return;
                    }
                    self.start(request, buffer);
                    Phase::Header
                }
                Phase::Skip { request, left, error } => {
                    let count = self.input.waiting().len().min(left as usize);
                    self.input.consume(count);
                    let left = left - u32::try_from(count).unwrap_or(left);
                    if left > 0 {
                        self.phase = Phase::Skip { request, left, error };
                        return;
                    }
                    self.answer(Ended { request, charge: 0, result: Err(error) });
                    Phase::Header
                }
                Phase::Over => return,
            };
        }
    }

    fn check(&self, request: &Request) -> Result<(), Error> {
        if self.shutdown.is_none() {
            return Err(Error::new(Errno::Shutdown, "the server is being shut down"));
        }
        check(request, self.session)
    }

    /// Whether a request may start: bounded in number and bytes, but one is always let in as far as
    /// its client has bytes left. If so, its bytes are taken from those of the client.
    fn has_room(&mut self, charge: usize, cx: &mut Context<'_>) -> bool {
        let fits = self.bytes.saturating_add(charge) <= self.limits.in_flight_bytes;
        let room = self.requests == 0 || (self.requests < self.limits.in_flight_requests && fits);
        room && self.budget.poll_take(charge, cx).is_ready()
    }

    fn admit(&mut self, request: Request, checked: Result<(), Error>, charge: usize) -> Phase {
        self.requests += 1;
        let is_write = request.command == Command::Write;
        match checked {
            Ok(()) => {
                self.bytes += charge;
                if is_write {
                    let buffer = self.session.opened.export.buffer(request.length);
                    if buffer.is_empty() && buffer.capacity() == request.length as usize {
                        return Phase::Payload(request, buffer);
                    }
                    tracing::error!(?request, "the export gave a buffer of the wrong size");
                    return Phase::Payload(request, Buffer::with_capacity(request.length as usize));
                }
                self.start(request, Buffer::with_capacity(0));
            }
            Err(error) if is_write => {
                if request.length > SKIP_BYTES_MAX {
                    self.requests -= 1;
                    self.fail("a write of absurd length");
                    return Phase::Over;
                }
                return Phase::Skip { request, left: request.length, error };
            }
            Err(error) => self.answer(Ended { request, charge: 0, result: Err(error) }),
        }
        Phase::Header
    }

    fn start(&mut self, request: Request, payload: Buffer) {
        let charge = charge(&request);
        let running = Running::call(request, charge, payload, self.session);
        if let Some(ended) = self.running.start(running) {
            self.answer(ended);
        }
    }

    fn answer(&mut self, ended: Ended) {
        ended.encode(self.session.structured, &mut self.out);
        if self.fault.is_some() {
            self.out.discard();
            self.release();
        }
    }

    /// Sends what there is; true when bytes were sent.
    fn send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut any = false;
        while !self.out.is_empty() {
            match self.out.poll_write(Pin::new(&mut *self.stream), cx) {
                Poll::Pending => break,
                Poll::Ready(Ok(_)) => any = true,
                Poll::Ready(Err(error)) => {
                    self.fail(format!("writing to the client failed: {error}"));
                }
            }
        }
        self.release();
        if self.out.is_empty()
            && let Poll::Ready(Err(error)) = Pin::new(&mut *self.stream).poll_flush(cx)
        {
            self.fail(format!("writing to the client failed: {error}"));
        }
        any
    }

    fn release(&mut self) {
        let (requests, bytes) = self.out.released();
        self.requests -= requests;
        self.bytes -= bytes;
        self.budget.give(bytes);
    }

    /// Cuts the connection: nothing more is read or sent, but what runs is seen to its end.
    fn fail(&mut self, fault: impl Into<String>) {
        self.fault.get_or_insert_with(|| fault.into());
        self.phase = Phase::Over;
        self.out.discard();
        self.release();
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) {
        if let Some(shutdown) = &mut self.shutdown
            && shutdown.as_mut().poll(cx).is_ready()
        {
            self.shutdown = None;
            if !self.session.resends {
                self.parse(cx); // whole requests that are here already are refused in so many words
            }
            self.phase = Phase::Over;
        }
    }

    /// Whether the client is between requests.
    fn at_rest(&self) -> bool {
        matches!(self.phase, Phase::Header | Phase::Over) && self.input.waiting().is_empty()
    }

    /// Cuts a client that leaves a message half sent or its replies unread for too long.
    fn stalled(&mut self, cx: &mut Context<'_>) -> bool {
        let mut cut = false;
        while self.ticks.poll_tick(cx).is_ready() {
            let half_sent = !self.at_rest() && !matches!(self.phase, Phase::Admission(_));
            let waiting = half_sent || !self.out.is_empty();
            self.idle_ticks = if waiting && !self.moved { self.idle_ticks + 1 } else { 0 };
            self.moved = false;
            if self.idle_ticks >= 2 && self.fault.is_none() {
                self.fail("the client stopped in the middle of a message");
                cut = true;
            }
        }
        cut
    }
}

/// Bytes read ahead of the parser.
struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    fn new() -> Self {
        Self { bytes: vec![0; READ_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    fn waiting(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start >= self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    fn take_header(&mut self) -> Option<[u8; REQUEST_BYTES]> {
        let header = *self.waiting().first_chunk()?;
        self.consume(REQUEST_BYTES);
        Some(header)
    }

    fn poll_fill<S: AsyncRead>(
        &mut self,
        stream: Pin<&mut S>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut free = ReadBuf::new(self.bytes.get_mut(self.end..).unwrap_or_default());
        std::task::ready!(stream.poll_read(cx, &mut free))?;
        let count = free.filled().len();
        self.end += count;
        Poll::Ready(Ok(count))
    }
}
