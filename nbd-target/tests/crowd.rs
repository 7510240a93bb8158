//! Clients that behave badly, of every kind and at the same time, while a source sends and well-behaved
//! clients read: nobody waits for them, and they do not use the memory up.
//!
//! The bad ones have a good certificate, of the node `db2` with a group of its own, or none at all. They
//! come from 127.0.0.2 as far as they say nothing, for those are told apart by their address.

mod common;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut, BytesMut};
use common::{Lab, model::Random, run, source::Source};
use rustls::{ClientConnection, StreamOwned, pki_types::ServerName};
use tidemark_journal::{GapReason, GroupId};
use tidemark_link::{
    message::{Envelope, Message, MessageKind},
    pki,
};
use tidemark_nbd::{
    client::{Client, Options},
    proto::{
        options::{InfoRequest, OptionHeader, OptionReplyHeader, ReplyType, option},
        transmission::{Command, Request},
    },
};
use zerocopy::IntoBytes;

const MIB: u32 = 1 << 20;
/// The longest that a single step of a well-behaved one may take: far less than the times after which
/// the others are cut, and far more than it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(25);

/// A client that says what it likes over TLS, and reads what it likes.
struct Bad(StreamOwned<ClientConnection, TcpStream>);

impl Bad {
    /// Connects, starts TLS and enters an export; none if it is not let in.
    fn enter(address: SocketAddr, options: &Options, export: &str) -> Option<Bad> {
        let mut bad = Bad::encrypted(address, options);
        let mut data = BytesMut::new();
        InfoRequest { name: export.into(), wanted: vec![] }.encode(&mut data);
        bad.option(option::GO, &data).ok()?;
        loop {
            let kind = bad.reply()?;
            if kind != ReplyType::Info as u32 {
                return (kind == ReplyType::Ack as u32).then_some(bad);
            }
        }
    }

    fn encrypted(address: SocketAddr, options: &Options) -> Bad {
        let mut stream = TcpStream::connect(address).expect("a connection");
        stream.read_exact(&mut [0; 18]).expect("a greeting");
        let mut out = BytesMut::new();
        out.put_u32(3);
        OptionHeader { option: option::STARTTLS, length: 0 }.encode(&mut out);
        stream.write_all(&out).expect("sent");
        stream.read_exact(&mut [0; 20]).expect("an answer");
        let (config, name) = options.tls.clone().expect("with TLS");
        Bad::over(stream, config, name)
    }

    fn over(
        stream: TcpStream,
        config: Arc<rustls::ClientConfig>,
        name: ServerName<'static>,
    ) -> Bad {
        let connection = ClientConnection::new(config, name).expect("a configuration");
        Bad(StreamOwned::new(connection, stream))
    }

    fn option(&mut self, number: u32, data: &[u8]) -> std::io::Result<()> {
        let mut out = BytesMut::new();
        OptionHeader { option: number, length: data.len() as u32 }.encode(&mut out);
        out.put_slice(data);
        self.0.write_all(&out)
    }

    fn reply(&mut self) -> Option<u32> {
        let mut raw = [0; 20];
        self.0.read_exact(&mut raw).ok()?;
        let header = OptionReplyHeader::parse(&raw)?;
        self.0.read_exact(&mut vec![0; header.length as usize]).ok()?;
        Some(header.kind)
    }

    fn request(&mut self, command: Command, cookie: u64, offset: u64, length: u32) {
        let mut out = BytesMut::new();
        Request { flags: 0, command, cookie, offset, length }.encode(&mut out);
        self.0.write_all(&out).expect("sent");
    }
}

/// What the process has in memory, MiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("it is there");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    kib >> 10
}

/// Connects from another address and says nothing, again and again.
fn flood(address: SocketAddr, over: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let mut silent = std::collections::VecDeque::new();
        while !over.load(Ordering::Relaxed) {
            let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
            socket.bind((Ipv4Addr::new(127, 0, 0, 2), 0).into()).expect("an address");
            if let Ok(stream) = socket.connect(address).await {
                silent.push_back(stream);
            }
            if silent.len() > 100 {
                silent.pop_front();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

/// Options that are too long, of absurd length, or without end.
fn haggle(address: SocketAddr, options: &Options, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let mut bad = Bad::encrypted(address, options);
        for length in [60_000, 70_000, 1 << 20] {
            if bad.option(option::GO, &vec![0x41; length]).is_err() || bad.reply().is_none() {
                break;
            }
        }
        for _ in 0..100 {
            if bad.option(option::LIST, b"").is_err() || bad.reply().is_none() {
                break;
            }
        }
        let mut out = BytesMut::new();
        OptionHeader { option: option::LIST, length: u32::MAX }.encode(&mut out);
        let _ = bad.0.write_all(&out);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Connections that ask for more than anybody could keep, and take nothing of it; as many as are let in.
fn take_nothing(address: SocketAddr, options: &Options, export: &str) -> Vec<Bad> {
    let mut taken = Vec::new();
    while let Some(mut bad) = Bad::enter(address, options, export) {
        for cookie in 0..250 {
            bad.request(Command::Read, cookie, 0, 16 * MIB);
        }
        taken.push(bad);
        assert!(taken.len() < 300, "one client has all places");
    }
    taken
}

/// A greeting that comes byte by byte.
fn trickle(stream: TcpStream, tls: Arc<rustls::ClientConfig>, hello: &Message) -> Duration {
    let name = "dr1.tidemark.internal".try_into().expect("a name");
    let mut bad = Bad::over(stream, tls, name);
    let mut greeting = Vec::new();
    hello.encode(&mut greeting).expect("it is short");
    let began = std::time::Instant::now();
    for byte in greeting {
        let sent = bad.0.write_all(&[byte]).and_then(|()| bad.0.flush());
        // The cut is seen by the second write after it.
        if sent.is_err() || began.elapsed() > Duration::from_secs(120) {
            break;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    began.elapsed()
}

async fn grow(source: &mut Source, content: &[u8], pieces: u64) {
    source.gap_begin(0, GapReason::FirstSync);
    source.gap_end(0);
    for piece in 0..pieces {
        source.write(0, piece * 2048, content);
        source.send().await;
    }
    source.acknowledged().await;
}

#[test]
fn bad_clients_of_every_kind_stall_nobody() {
    run(async || {
        let mut lab = Lab::new("", "");
        lab.config.nbd.listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        let mut till = lab.config.groups[0].clone();
        (till.name, till.node) = ("till".parse().expect("a name"), "db2".parse().expect("a name"));
        lab.config.groups.push(till);
        lab.restart();
        let mut content = vec![0; MIB as usize];
        let mut random = Random(7);
        content.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
        let mut bystander = Source::new(&[32 << 20]);
        bystander.plain = true;
        bystander.connect(&lab).await;
        grow(&mut bystander, &content, 1).await;
        let mut victim = Source::new(&[32 << 20]);
        (victim.plain, victim.group) = (true, GroupId([8; 16]));
        (victim.name, victim.node) = ("till".into(), "db2".into());
        victim.connect(&lab).await;
        grow(&mut victim, &content, 32).await;
        victim.disconnect();

        let nbd = lab.target().nbd_addr().expect("configured");
        let link = lab.link_addr();
        let (bad, good) = (lab.nbd_options(Some("db2")), lab.nbd_options(Some("db1")));
        let before = resident();
        let (over, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut busy = Vec::new();
        for address in [nbd, link] {
            let over = Arc::clone(&over);
            busy.push(std::thread::spawn(move || flood(address, &over)));
        }
        let (own, options) = (Arc::clone(&over), bad.clone());
        busy.push(std::thread::spawn(move || haggle(nbd, &options, &own)));
        let (identity, trust) = lab.identity("db2");
        let tls = pki::client_config(&identity, &trust).expect("good certificates");
        // A source of `till` whose frame never ends, and one that greets byte by byte.
        let hello = Message::Hello(victim.hello());
        let mut greeting = Vec::new();
        hello.encode(&mut greeting).expect("it is short");
        let name = "dr1.tidemark.internal".try_into().expect("a name");
        let stream = TcpStream::connect(link).expect("a connection");
        let mut half = Bad::over(stream, Arc::clone(&tls), name);
        half.0.write_all(&greeting).expect("sent");
        half.0.read_exact(&mut [0; 8]).expect("a welcome");
        let envelope = Envelope::new(MessageKind::Frame, 8 << 20).expect("not too long");
        half.0.write_all(envelope.as_bytes()).expect("sent");
        half.0.write_all(&content).expect("sent");
        let stream = TcpStream::connect(link).expect("a connection");
        let slow = std::thread::spawn(move || trickle(stream, tls, &hello));
        // Half a request, half a payload, and then all that it may have without taking any of it.
        let export = "till/disk0@latest";
        let mut halves: Vec<Bad> = (0..2).filter_map(|_| Bad::enter(nbd, &bad, export)).collect();
        halves[0].0.write_all(&[0x25, 0x60]).expect("sent");
        halves[1].request(Command::Write, 1, 0, 32 * MIB);
        let (options, count) = (bad.clone(), Arc::clone(&most));
        let greedy = std::thread::spawn(move || {
            let taken = take_nothing(nbd, &options, export);
            count.store(taken.len(), Ordering::SeqCst);
            taken
        });

        // The others: a source that writes, and clients that come, look, read and go.
        let kept = Client::connect(nbd, "shop/disk0@latest", &good).await.expect("open");
        let mut peak = 0;
        for round in 0..1000 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            bystander.write(0, 2048 + round % 20 * 2048, &content[..64 << 10]);
            bystander.send().await;
            let acknowledged = tokio::time::timeout(PATIENCE, bystander.acknowledged()).await;
            acknowledged.unwrap_or_else(|_| panic!("no acknowledgement in round {round}"));
            let reads = async {
                let read = kept.read(0, MIB).await.expect("read");
                assert!(read[..] == content[..]);
                let entries = Client::list(nbd, &good).await.expect("a listing");
                assert!(entries.iter().all(|entry| entry.name.starts_with("shop/")));
                let client = Client::connect(nbd, "shop/disk0@latest", &good).await.expect("open");
                assert!(client.read(0, MIB).await.expect("read")[..] == content[..]);
                client.disconnect().await;
                let local = lab.open("till/disk0@latest").await.expect("open");
                local.read(0, MIB).await.expect("read");
                local.disconnect().await;
            };
            let read = tokio::time::timeout(PATIENCE, reads).await;
            read.unwrap_or_else(|_| panic!("no read in round {round}"));
            peak = peak.max(resident() - before.min(resident()));
            if most.load(Ordering::SeqCst) > 0 && round >= 20 && slow.is_finished() {
                break;
            }
        }
        over.store(true, Ordering::Relaxed);
        assert_eq!(most.load(Ordering::SeqCst), 64 - 2, "connections of one client");
        // 256 MiB of replies, what eight reads of 16 MiB are put together in, and all else.
        assert!(peak < 768, "{peak} MiB more than before");
        let tried = slow.join().expect("no panic");
        assert!(tried < Duration::from_secs(60), "a greeting may take {tried:?}");
        drop(greedy.join().expect("no panic"));
        busy.into_iter().for_each(|thread| thread.join().expect("no panic"));
        drop((half, halves));
        // Nothing has come of any of it.
        let mut again = Source::new(&[32 << 20]);
        (again.plain, again.group, again.name, again.node) =
            (true, victim.group, "till".into(), "db2".into());
        again.ancestry = victim.ancestry.clone();
        (again.acked, again.ceiling) = (victim.acked, victim.ceiling);
        let welcome = again.connect(&lab).await;
        assert_eq!(welcome.position, Some(victim.acked));
    });
}
