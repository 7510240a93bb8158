//! The client's transmission phase: a task that sends, a task that reads replies.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::Stream;
use crate::export::{Error, Extent};
use crate::proto::transmission::{Command, ReplyHeader, Request, chunk};
use crate::proto::{Cursor, Errno};

/// Requests waiting to be sent, beyond which callers wait.
const QUEUE: usize = 256;
/// Longest payload of a chunk that is taken, besides the data that was asked for.
const CHUNK_BYTES_MAX: u32 = 1 << 20;

pub(super) enum Answer {
    Data(Bytes),
    Extents(Vec<Extent>),
    Done,
}

pub(super) struct Session {
    requests: mpsc::Sender<Outgoing>,
    shared: Arc<Shared>,
}

struct Outgoing {
    request: Request,
    payload: Bytes,
}

/// Requests without a final reply, and why there will be none once the connection is lost.
#[derive(Default)]
struct Shared(Mutex<SharedState>);

#[derive(Default)]
struct SharedState {
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
    lost: Option<String>,
}

struct Pending {
    request: Request,
    data: BytesMut,
    /// Bytes of a read that have come.
    covered: usize,
    extents: Vec<Extent>,
    error: Option<Error>,
    reply: oneshot::Sender<Result<Answer, Error>>,
}

impl Session {
    pub(super) fn start(stream: Box<dyn Stream>, structured: bool) -> Self {
        let (read, write) = tokio::io::split(stream);
        let (requests, queue) = mpsc::channel(QUEUE);
        let shared = Arc::<Shared>::default();
        tokio::spawn(send(write, queue, Arc::clone(&shared)));
        tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                let reason = receive(read, structured, &shared).await;
                shared.fail(&reason);
            }
        });
        Self { requests, shared }
    }

    pub(super) async fn call(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        length: u32,
        payload: Bytes,
    ) -> Result<Answer, Error> {
        let (reply, answer) = oneshot::channel();
        let request = {
            let mut shared = self.shared.lock();
            if let Some(reason) = &shared.lost {
                return Err(lost(reason));
            }
            let cookie = shared.next_cookie;
            shared.next_cookie += 1;
            let request = Request { flags, command, cookie, offset, length };
            let (data, extents) = (BytesMut::new(), Vec::new());
            let pending = Pending { request, data, covered: 0, extents, error: None, reply };
            shared.pending.insert(cookie, pending);
            request
        };
        // A closed queue is answered through `answer`, by `Shared::fail`.
        let _ = self.requests.send(Outgoing { request, payload }).await;
        answer.await.unwrap_or_else(|_| Err(lost("the connection has ended")))
    }

    pub(super) async fn disconnect(&self) {
        let command = Command::Disconnect;
        let request = Request { flags: 0, command, cookie: 0, offset: 0, length: 0 };
        let _ = self.requests.send(Outgoing { request, payload: Bytes::new() }).await;
        self.requests.closed().await;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, SharedState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, reason: &str) {
        let mut shared = self.lock();
        let reason = shared.lost.get_or_insert_with(|| reason.to_owned()).clone();
        for (_, pending) in shared.pending.drain() {
            let _ = pending.reply.send(Err(lost(&reason)));
        }
    }

    fn request(&self, cookie: u64) -> Result<Request, String> {
        let shared = self.lock();
        let pending = shared.pending.get(&cookie);
        pending.map(|pending| pending.request).ok_or_else(|| "an unknown cookie".to_owned())
    }

    fn update(&self, cookie: u64, change: impl FnOnce(&mut Pending)) {
        if let Some(pending) = self.lock().pending.get_mut(&cookie) {
            change(pending);
        }
    }

    /// Gives the answer to the caller, who may have left.
    fn complete(&self, cookie: u64) {
        let Some(pending) = self.lock().pending.remove(&cookie) else { return };
        let answer = match (pending.error, pending.request.command) {
            (Some(error), _) => Err(error),
            (None, Command::Read) if pending.covered != pending.request.length as usize => {
                Err(lost("the server left out a part of the read"))
            }
            (None, Command::Read) => Ok(Answer::Data(pending.data.freeze())),
            (None, Command::BlockStatus) => Ok(Answer::Extents(pending.extents)),
            (None, _) => Ok(Answer::Done),
        };
        let _ = pending.reply.send(answer);
    }
}

pub(super) fn lost(reason: &str) -> Error {
    Error::new(Errno::Io, reason)
}

async fn send(
    mut stream: WriteHalf<Box<dyn Stream>>,
    mut queue: mpsc::Receiver<Outgoing>,
    shared: Arc<Shared>,
) {
    let mut batch = Vec::new();
    let mut out = BytesMut::new();
    while queue.recv_many(&mut batch, 64).await > 0 {
        let mut leaving = false;
        for Outgoing { request, payload } in batch.drain(..) {
            request.encode(&mut out);
            out.extend_from_slice(&payload);
            leaving |= request.command == Command::Disconnect;
        }
        let sent = async {
            stream.write_all_buf(&mut out).await?;
            stream.flush().await
        };
        if let Err(error) = sent.await {
            shared.fail(&format!("sending to the server failed: {error}"));
            return;
        }
        if leaving {
            break;
        }
    }
    // The last handle is gone, or said good-bye: end TLS and the stream.
    let _ = stream.shutdown().await;
}

/// Reads replies until the connection ends; returns why it did.
async fn receive(
    mut stream: ReadHalf<Box<dyn Stream>>,
    structured: bool,
    shared: &Shared,
) -> String {
    let mut input = BytesMut::with_capacity(256 * 1024);
    loop {
        match take_reply(&mut input, structured, shared) {
            Ok(true) => continue,
            Ok(false) => {}
            Err(reason) => return format!("the server broke the protocol: {reason}"),
        }
        match stream.read_buf(&mut input).await {
            Ok(0) => return "the server closed the connection".to_owned(),
            Ok(_) => {}
            Err(error) => return format!("reading from the server failed: {error}"),
        }
    }
}

/// Takes one whole message off `input`; false when more bytes are needed.
fn take_reply(input: &mut BytesMut, structured: bool, shared: &Shared) -> Result<bool, String> {
    let parsed = ReplyHeader::parse(input).map_err(|error| error.to_string())?;
    let Some((header, head)) = parsed else { return Ok(false) };
    match header {
        ReplyHeader::Simple { cookie, error } => {
            let request = shared.request(cookie)?;
            let is_read = request.command == Command::Read;
            if is_read && structured {
                return Err("a simple reply to a read".to_owned());
            }
            let length = if is_read && error.is_none() { request.length as usize } else { 0 };
            if input.len() < head + length {
                return Ok(false);
            }
            let mut message = input.split_to(head + length);
            let data = message.split_off(head);
            shared.update(cookie, |pending| {
                pending.covered = data.len();
                pending.data = data;
                pending.error = error.map(|errno| Error::new(errno, ""));
            });
            shared.complete(cookie);
        }
        ReplyHeader::Chunk { cookie, done, kind, length } => {
            let request = shared.request(cookie)?;
            let asked = if request.command == Command::Read { request.length } else { 0 };
            if length > asked.saturating_add(CHUNK_BYTES_MAX) {
                return Err("a chunk of absurd length".to_owned());
            }
            if input.len() < head + length as usize {
                return Ok(false);
            }
            let mut message = input.split_to(head + length as usize);
            let payload = message.split_off(head);
            take_chunk(&request, kind, &payload, shared)?;
            if done {
                shared.complete(cookie);
            }
        }
    }
    Ok(true)
}

fn take_chunk(request: &Request, kind: u16, payload: &[u8], shared: &Shared) -> Result<(), String> {
    let short = || "a truncated chunk".to_owned();
    let mut cursor = Cursor(payload);
    match kind {
        chunk::NONE => {}
        chunk::OFFSET_DATA => {
            let offset = cursor.u64().ok_or_else(short)?;
            place(request, offset, cursor.0.len(), shared, |into| into.copy_from_slice(cursor.0))?;
        }
        chunk::OFFSET_HOLE => {
            let (offset, length) = cursor.u64().zip(cursor.u32()).ok_or_else(short)?;
            place(request, offset, length as usize, shared, |into| into.fill(0))?;
        }
        chunk::BLOCK_STATUS => {
            cursor.u32().ok_or_else(short)?;
            let mut extents = Vec::new();
            while let Some((length, flags)) = cursor.u32().zip(cursor.u32()) {
                let (hole, zero) = (flags & 1 != 0, flags & 2 != 0);
                extents.push(Extent { length: u64::from(length), hole, zero });
            }
            shared.update(request.cookie, |pending| pending.extents = extents);
        }
        chunk::ERROR | chunk::ERROR_OFFSET => {
            let (errno, length) = cursor.u32().zip(cursor.u16()).ok_or_else(short)?;
            let message = cursor.bytes(usize::from(length)).ok_or_else(short)?;
            let message = String::from_utf8_lossy(message);
            let error = Error::new(Errno::from_wire(errno), message);
            shared.update(request.cookie, |pending| pending.error = Some(error));
        }
        other => return Err(format!("an unknown chunk type {other}")),
    }
    Ok(())
}

/// Puts a piece of a read where it belongs.
fn place(
    request: &Request,
    offset: u64,
    length: usize,
    shared: &Shared,
    fill: impl FnOnce(&mut [u8]),
) -> Result<(), String> {
    let start = offset.checked_sub(request.offset).and_then(|start| usize::try_from(start).ok());
    let range = start.and_then(|start| Some(start..start.checked_add(length)?));
    let range = range
        .filter(|range| range.end <= request.length as usize && request.command == Command::Read)
        .ok_or_else(|| "a chunk outside the request".to_owned())?;
    shared.update(request.cookie, |pending| {
        pending.covered += length;
        pending.data.resize(request.length as usize, 0);
        if let Some(into) = pending.data.get_mut(range) {
            fill(into);
        }
    });
    Ok(())
}
