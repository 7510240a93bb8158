//! Clients that break the protocol, stop half-way or take too much.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use support::{Certificates, OnUnix, One, PATIENCE, Scripted, everything};
use tidemark_nbd::client::{Client, Options};
use tidemark_nbd::proto::options::{
    InfoRequest, OptionHeader, OptionReplyHeader, ReplyType, option,
};
use tidemark_nbd::proto::transmission::{Command, Request};
use tidemark_nbd::{Chunk, Errno, Limits, Listener, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

fn impatient() -> Limits {
    let short = Duration::from_millis(300);
    Limits { option_timeout: short, stall_timeout: short, ..Limits::default() }
}

/// A client that sends what it likes.
struct Raw(UnixStream);

impl Raw {
    /// Connects and sends client flags after the greeting.
    async fn connect(server: &OnUnix, flags: u32) -> Self {
        let mut stream = UnixStream::connect(&server.path).await.unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.unwrap();
        stream.write_u32(flags).await.unwrap();
        Self(stream)
    }

    /// Connects and enters `disk`, without structured replies.
    async fn enter(server: &OnUnix) -> Self {
        let mut raw = Self::connect(server, 3).await;
        let mut data = BytesMut::new();
        InfoRequest { name: "disk".into(), wanted: vec![] }.encode(&mut data);
        raw.option(option::GO, &data).await;
        while raw.reply().await.0 != ReplyType::Ack as u32 {}
        raw
    }

    async fn option(&mut self, option: u32, data: &[u8]) {
        let mut out = BytesMut::new();
        OptionHeader { option, length: data.len() as u32 }.encode(&mut out);
        out.put_slice(data);
        self.0.write_all(&out).await.unwrap();
    }

    /// An option reply: type and data.
    async fn reply(&mut self) -> (u32, Vec<u8>) {
        let mut raw = [0; 20];
        self.0.read_exact(&mut raw).await.unwrap();
        let header = OptionReplyHeader::parse(&raw).unwrap();
        let mut data = vec![0; header.length as usize];
        self.0.read_exact(&mut data).await.unwrap();
        (header.kind, data)
    }

    async fn request(&mut self, command: Command, cookie: u64, offset: u64, length: u32) {
        let mut out = BytesMut::new();
        Request { flags: 0, command, cookie, offset, length }.encode(&mut out);
        self.0.write_all(&out).await.unwrap();
    }

    /// Error value and cookie of the next simple reply.
    async fn simple_reply(&mut self) -> (u32, u64) {
        assert_eq!(self.0.read_u32().await.unwrap(), 0x6744_6698);
        (self.0.read_u32().await.unwrap(), self.0.read_u64().await.unwrap())
    }

    /// Waits for the server to cut the connection.
    async fn expect_cut(mut self, why: &str) {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(PATIENCE, self.0.read_to_end(&mut rest)).await;
        read.unwrap_or_else(|_| panic!("not cut: {why}")).ok();
    }
}

async fn start(export: &Arc<Scripted>, limits: Limits) -> OnUnix {
    OnUnix::start(One(Arc::clone(export)), limits).await
}

/// The server still serves others.
async fn is_well(server: &OnUnix) {
    let client = Client::connect(server.address(), "disk", &Options::default()).await.unwrap();
    client.flush().await.unwrap();
    client.disconnect().await;
}

#[tokio::test]
async fn handshakes_that_break_the_rules_are_cut() {
    let export = Scripted::new(everything());
    let server = start(&export, Limits::default()).await;
    Raw::connect(&server, 4).await.expect_cut("unknown client flags").await;

    let mut raw = Raw::connect(&server, 3).await;
    raw.0.write_all(&[0x55; 16]).await.unwrap();
    raw.expect_cut("a wrong option magic").await;

    let mut raw = Raw::connect(&server, 3).await;
    let mut out = BytesMut::new();
    OptionHeader { option: option::LIST, length: u32::MAX }.encode(&mut out);
    raw.0.write_all(&out).await.unwrap();
    raw.expect_cut("an option of 4 GiB").await;

    let mut raw = Raw::connect(&server, 3).await;
    raw.option(option::EXPORT_NAME, b"nowhere").await;
    raw.expect_cut("EXPORT_NAME of what is not there").await;
    is_well(&server).await;
}

#[tokio::test]
async fn a_long_option_is_skipped_and_refused() {
    let export = Scripted::new(everything());
    let server = start(&export, Limits::default()).await;
    let mut raw = Raw::connect(&server, 3).await;
    raw.option(option::GO, &vec![0; 100_000]).await;
    assert_eq!(raw.reply().await.0, ReplyType::ErrTooBig as u32);
    raw.option(option::LIST, b"").await;
    assert_eq!(raw.reply().await, (ReplyType::Server as u32, b"\0\0\0\x04diskfor tests".to_vec()));
    assert_eq!(raw.reply().await.0, ReplyType::Ack as u32);
}

#[tokio::test]
async fn export_name_enters_with_and_without_zeroes() {
    let export = Scripted::new(everything());
    let server = start(&export, Limits::default()).await;
    for (flags, length) in [(3, 10), (1, 134), (0, 134)] {
        let mut raw = Raw::connect(&server, flags).await;
        raw.option(option::EXPORT_NAME, b"disk").await;
        let mut reply = vec![0; length];
        raw.0.read_exact(&mut reply).await.unwrap();
        assert_eq!(reply[..8], (4u64 << 30).to_be_bytes());
        raw.request(Command::Flush, 7, 0, 0).await;
        assert_eq!(raw.simple_reply().await, (0, 7));
    }
}

#[tokio::test]
async fn silence_in_the_handshake_is_cut() {
    let export = Scripted::new(everything());
    let server = start(&export, impatient()).await;
    let stream = UnixStream::connect(&server.path).await.unwrap();
    Raw(stream).expect_cut("no client flags").await;
    Raw::connect(&server, 3).await.expect_cut("no option").await;
    let mut raw = Raw::connect(&server, 3).await;
    let mut out = BytesMut::new();
    OptionHeader { option: option::GO, length: 100 }.encode(&mut out);
    raw.0.write_all(&out).await.unwrap();
    raw.expect_cut("half an option").await;
}

#[tokio::test]
async fn a_haggler_without_end_is_cut() {
    let export = Scripted::new(everything());
    let limits = Limits { handshake_timeout: Duration::from_millis(400), ..Limits::default() };
    let server = start(&export, limits).await;
    let mut raw = Raw::connect(&server, 3).await;
    let haggling = async {
        loop {
            let mut out = BytesMut::new();
            OptionHeader { option: 99, length: 0 }.encode(&mut out);
            let mut reply = [0; 20];
            if raw.0.write_all(&out).await.is_err() || raw.0.read_exact(&mut reply).await.is_err() {
                return;
            }
            let mut message = vec![0; OptionReplyHeader::parse(&reply).unwrap().length as usize];
            raw.0.read_exact(&mut message).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, haggling).await.expect("cut in the end");
}

#[tokio::test]
async fn half_a_request_is_cut_but_an_idle_client_stays() {
    let export = Scripted::new(everything());
    let server = start(&export, impatient()).await;
    let idle = Client::connect(server.address(), "disk", &Options::default()).await.unwrap();

    let mut raw = Raw::enter(&server).await;
    raw.0.write_all(&[0x25, 0x60]).await.unwrap();
    raw.expect_cut("half a header").await;
    let mut raw = Raw::enter(&server).await;
    raw.request(Command::Write, 1, 0, 100_000).await;
    raw.0.write_all(&[0; 50_000]).await.unwrap();
    raw.expect_cut("half a payload").await;

    idle.read(0, 512).await.expect("idle for longer than the others had");
    assert_eq!(export.calls(), ["read 0+512"], "half a write is no write");
}

#[tokio::test]
async fn a_client_that_reads_no_replies_is_held_back_and_cut() {
    let chunks = vec![Chunk::Data(Bytes::from(vec![7; 1 << 20]))];
    let export =
        Arc::new(Scripted { info: everything(), read: Some(chunks), ..Scripted::default() });
    let limits = Limits { in_flight_bytes: 4 << 20, ..impatient() };
    let server = start(&export, limits).await;
    let mut raw = Raw::enter(&server).await;
    for cookie in 0..50 {
        raw.request(Command::Read, cookie, 0, 1 << 20).await;
    }
    export.until("the cut", |export| export.closed.load(SeqCst) == 1).await;
    let calls = export.calls().len();
    assert!(calls <= 5, "{calls} reads of 1 MiB for a client that takes none");
    is_well(&server).await;
}

#[tokio::test]
async fn a_wrong_magic_is_cut_after_what_runs_has_ended() {
    let export = Scripted::holding(everything());
    let server = start(&export, Limits::default()).await;
    let mut raw = Raw::enter(&server).await;
    raw.request(Command::Write, 1, 0, 512).await;
    raw.0.write_all(&[0; 512]).await.unwrap();
    export.until("the write", |export| export.calls().len() == 1).await;
    raw.0.write_all(&[0x66; 28]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(export.closed.load(SeqCst), 0, "not closed under a write");
    export.release();
    raw.expect_cut("a wrong magic").await;
    export.until("the close", |export| export.closed.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn a_write_too_long_is_skipped_and_an_absurd_one_cut() {
    let export = Scripted::new(everything());
    let server = start(&export, Limits::default()).await;
    let mut raw = Raw::enter(&server).await;
    let length = (32 << 20) + 4096;
    raw.request(Command::Write, 1, 0, length).await;
    raw.0.write_all(&vec![0x25; length as usize]).await.unwrap();
    assert_eq!(raw.simple_reply().await, (Errno::Inval as u32, 1));
    raw.request(Command::Flush, 2, 0, 0).await;
    assert_eq!(raw.simple_reply().await, (0, 2));
    raw.request(Command::Write, 3, 0, u32::MAX).await;
    raw.expect_cut("a write of 4 GiB").await;
    assert_eq!(export.calls(), ["flush"]);
}

#[tokio::test]
async fn replies_still_reach_a_client_that_has_closed_its_sending_side() {
    let export = Scripted::holding(everything());
    let server = start(&export, Limits::default()).await;
    let mut raw = Raw::enter(&server).await;
    for cookie in 1..=3 {
        raw.request(Command::Flush, cookie, 0, 0).await;
    }
    raw.0.shutdown().await.unwrap();
    export.until("all calls", |export| export.calls().len() == 3).await;
    export.release();
    for _ in 1..=3 {
        assert_eq!(raw.simple_reply().await.0, 0);
    }
    raw.expect_cut("all answered").await;
}

#[tokio::test]
async fn clients_beyond_the_limit_wait_for_a_place() {
    let export = Scripted::new(everything());
    let server = start(&export, Limits { connections: 2, ..Limits::default() }).await;
    let first = Raw::enter(&server).await;
    let _second = Raw::enter(&server).await;
    let mut third = UnixStream::connect(&server.path).await.unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(200), third.read(&mut byte)).await;
    assert!(early.is_err(), "a third client is served beyond the limit of two");
    drop(first);
    let served = tokio::time::timeout(PATIENCE, third.read_exact(&mut byte)).await;
    served.expect("a place is free").unwrap();
}

/// 256 strangers who connected and said nothing kept everybody else out for half a minute: they held
/// all places until their time for the handshake was over. Now whoever comes later takes the place of
/// the oldest of them, and who has entered keeps its own.
#[tokio::test]
async fn silent_strangers_keep_nobody_out() {
    let export = Scripted::new(everything());
    let limits = Limits { connections: 16, pending_connections: 8, ..Limits::default() };
    let server = start(&export, limits).await;
    let mut inside = Raw::enter(&server).await;
    let mut strangers = Vec::new();
    for _ in 0..100 {
        strangers.push(UnixStream::connect(&server.path).await.unwrap());
    }
    tokio::time::timeout(PATIENCE, is_well(&server)).await.expect("a place at once");
    inside.request(Command::Flush, 1, 0, 0).await;
    assert_eq!(inside.simple_reply().await, (0, 1), "those inside are left alone");
    Raw(strangers.swap_remove(0)).expect_cut("the oldest stranger").await;

    // All places but one are taken by clients: strangers share the last.
    let mut clients = Vec::new();
    for _ in 0..14 {
        clients.push(Raw::enter(&server).await);
    }
    for _ in 0..20 {
        strangers.push(UnixStream::connect(&server.path).await.unwrap());
    }
    tokio::time::timeout(PATIENCE, is_well(&server)).await.expect("the last place");
}

/// The classic injection: what is sent in the clear behind STARTTLS must never be taken for what
/// came through TLS.
#[tokio::test]
async fn options_in_the_clear_behind_starttls_are_not_obeyed() {
    let certificates = Certificates::make();
    let export = Scripted::new(everything());
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("nbd.sock");
    let listener = Listener::unix(&path, 0o600).await.unwrap();
    let listener = listener.with_tls(certificates.required(false));
    let server = Server::new(Arc::new(One(Arc::clone(&export))), Limits::default());
    tokio::spawn(async move { server.serve(listener).await });
    let mut stream = UnixStream::connect(&path).await.unwrap();
    let mut out = BytesMut::new();
    out.put_u32(3);
    OptionHeader { option: option::STARTTLS, length: 0 }.encode(&mut out);
    OptionHeader { option: option::EXPORT_NAME, length: 4 }.encode(&mut out);
    out.put_slice(b"disk");
    stream.write_all(&out).await.unwrap();
    stream.read_exact(&mut [0; 18]).await.unwrap();
    let mut raw = Raw(stream);
    assert_eq!(raw.reply().await.0, ReplyType::Ack as u32);
    raw.expect_cut("no TLS record").await;
    assert_eq!(export.opened.load(SeqCst), 0);
}
