//! Connections over TCP on the loopback device and over socket pairs.

use std::{
    future::Future,
    io::{IoSlice, Write},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ClientConfig, ServerConfig};
use tidemark_journal::{Seq, TermId};

use super::*;
use crate::{
    message::{Ack, AckFlags, Echo, MessageKind, Need, Notice, Severity},
    pki::{Authority, Identity, Trust, client_config, server_config},
    seam::{self, Listener},
    throttle::{Minute, Schedule, Throttle},
};

/// Long enough for a slow machine, short enough for a test that fails.
const QUICK: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    handshake: Duration::from_secs(5),
    idle: Duration::from_secs(5),
    stall: Duration::from_secs(5),
};
/// For tests that wait for a timeout to strike.
const SHORT: Duration = Duration::from_millis(300);

struct Nodes {
    authority: Authority,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn identity(authority: &Authority, node: &str) -> Identity {
    let pem = authority.issue(&name(node)).unwrap();
    Identity::from_pem(pem.certificate_pem.as_bytes(), pem.key_pem.as_bytes()).unwrap()
}

fn trust(authority: &Authority) -> Trust {
    Trust::from_pem(authority.pem().certificate_pem.as_bytes()).unwrap()
}

fn nodes() -> Nodes {
    let authority = Authority::create("test").unwrap();
    let trust = trust(&authority);
    let client = client_config(&identity(&authority, "source-1"), &trust).unwrap();
    let server = server_config(&identity(&authority, "target-1"), &trust).unwrap();
    Nodes { authority, client, server }
}

fn listen() -> (Listener, SocketAddr) {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Both ends of a connection over TCP.
async fn connected(timeouts: &Timeouts) -> (Connection, Connection) {
    let nodes = nodes();
    let (mut listener, address) = listen();
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        Connection::accept(stream, &nodes.server, timeouts).await.unwrap()
    };
    let address = address.to_string();
    let expected = name("target-1");
    let connect = Connection::connect(&address, &nodes.client, &expected, timeouts);
    let (source, target) = tokio::join!(connect, accept);
    (source.unwrap(), target)
}

/// What both ends say when they try to connect over a socket pair. The server answers one message.
async fn attempt(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
) -> (Result<Message, LinkError>, Result<NodeName, LinkError>) {
    let (one, other) = Stream::pair().unwrap();
    let accept = async {
        let mut connection = Connection::accept(other, server, &QUICK).await?;
        if let Some(message) = connection.receiver.recv().await? {
            connection.sender.send(&message).await?;
        }
        Ok(connection.peer().clone())
    };
    let connect = async {
        let expected = name("target-1");
        let mut connection = Connection::client(one, client, &expected, &QUICK).await?;
        connection.ask(&Message::Bye).await
    };
    tokio::join!(connect, accept)
}

/// A future that must end soon.
async fn soon<F: Future>(future: F) -> F::Output {
    timeout(Duration::from_secs(20), future).await.expect("it must not hang")
}

#[test]
fn both_ends_know_each_other_and_exchange_every_kind() {
    let messages = [
        Message::Ack(Ack {
            term: TermId([7; 16]),
            hop_received: Seq(9),
            hop_durable: Seq(8),
            final_durable: Seq(7),
            flags: AckFlags { full: true },
        }),
        Message::Frame((0..3_000_000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect()),
        Message::Echo(Echo { number: 1, received_wall_ns: -1 }),
        Message::Need(Need::nothing(Seq(3))),
        Message::Frame(vec![1]),
        Message::Notice(Notice::new(Severity::Warning, "look")),
        Message::Bye,
    ];
    seam::run(async {
        let (source, target) = connected(&QUICK).await;
        assert_eq!((source.peer(), target.peer()), (&name("target-1"), &name("source-1")));
        let (mut sender, mut source_receiver) = source.split();
        let (mut answers, mut receiver) = target.split();
        let send = async {
            for message in &messages {
                sender.send(message).await.unwrap();
            }
            sender.finish().await.unwrap();
        };
        let receive = async {
            let mut got = Vec::new();
            while let Some(message) = receiver.recv().await.unwrap() {
                got.push(message);
            }
            answers.send(&Message::Bye).await.unwrap();
            got
        };
        let ((), got) = soon(async { tokio::join!(send, receive) }).await;
        assert_eq!(got, messages);
        // The other direction is open until it is finished too.
        assert_eq!(source_receiver.recv().await.unwrap(), Some(Message::Bye));
        answers.finish().await.unwrap();
        assert_eq!(source_receiver.recv().await.unwrap(), None);
    })
    .unwrap();
}

#[test]
fn frames_sent_in_parts_arrive_whole_and_both_ways_at_once() {
    seam::run(async {
        let (source, target) = connected(&QUICK).await;
        let exchange = |connection: Connection, seed: u8| async move {
            let (mut sender, mut receiver) = connection.split();
            let frame = |n: u32| -> Vec<u8> {
                (0..n * 131_071 % 2_000_000 + 1).map(|i| (i >> 9) as u8 ^ seed).collect()
            };
            let send = async {
                for n in 0..40 {
                    let frame = frame(n);
                    let (head, tail) = frame.split_at(frame.len() / 3);
                    sender.send_frame(&[head, &[], tail]).await.unwrap();
                }
                sender.flush().await.unwrap();
                sender
            };
            let receive = async {
                let mut frames = Vec::new();
                while frames.len() < 40 {
                    match receiver.recv().await.unwrap() {
                        Some(Message::Frame(frame)) => frames.push(frame),
                        other => panic!("{other:?}"),
                    }
                }
                frames
            };
            let (_sender, frames) = tokio::join!(send, receive);
            (frames, (0..40).map(frame).collect::<Vec<_>>())
        };
        // Both send far more than the sockets hold, each in a task of its own: neither blocks.
        let one = seam::spawn(exchange(source, 0));
        let other = seam::spawn(exchange(target, 0xff));
        let (one, other) = soon(async { (one.await.unwrap(), other.await.unwrap()) }).await;
        assert!(one.0 == other.1 && other.0 == one.1, "frames differ from what was sent");
    })
    .unwrap();
}

#[test]
fn a_stranger_is_refused_by_both_ends() {
    seam::run(async {
        let ours = nodes();
        let theirs = nodes();
        assert!(matches!(attempt(&ours.client, &ours.server).await, (Ok(Message::Bye), Ok(_))));

        // The server is of another authority: the client notices, and tells it.
        let (client, server) = soon(attempt(&ours.client, &theirs.server)).await;
        let client = client.unwrap_err().to_string();
        assert!(client.contains("its certificate is not of the authority"), "{client}");
        let server = server.unwrap_err().to_string();
        assert!(server.contains("does not accept this node's certificate"), "{server}");

        // The client alone is: it trusts the server, and is refused with a reason.
        let stranger =
            client_config(&identity(&theirs.authority, "source-1"), &trust(&ours.authority));
        let (client, server) = soon(attempt(&stranger.unwrap(), &ours.server)).await;
        let client = client.unwrap_err();
        assert!(matches!(client, LinkError::Tls(rustls::Error::AlertReceived(_))), "{client}");
        let server = server.unwrap_err().to_string();
        assert!(server.contains("its certificate is not of the authority"), "{server}");
    })
    .unwrap();
}

#[test]
fn the_server_must_have_the_expected_name() {
    seam::run(async {
        let nodes = nodes();
        let other =
            server_config(&identity(&nodes.authority, "target-2"), &trust(&nodes.authority));
        let (client, server) = soon(attempt(&nodes.client, &other.unwrap())).await;
        let client = client.unwrap_err().to_string();
        assert!(client.contains("target-1"), "the name wanted is named: {client}");
        assert!(server.is_err());
    })
    .unwrap();
}

#[test]
fn a_client_must_show_a_certificate_and_speak_tls_1_3_and_the_link() {
    use rustls::crypto::aws_lc_rs::default_provider;
    seam::run(async {
        let nodes = nodes();
        let roots = trust(&nodes.authority).roots().clone();
        let builder = |version| {
            ClientConfig::builder_with_provider(Arc::new(default_provider()))
                .with_protocol_versions(&[version])
                .unwrap()
                .with_root_certificates(roots.clone())
        };
        let mut anonymous = builder(&rustls::version::TLS13).with_no_client_auth();
        anonymous.alpn_protocols = vec![pki::ALPN.to_vec()];
        let (client, server) = soon(attempt(&Arc::new(anonymous), &nodes.server)).await;
        let client = client.unwrap_err().to_string();
        assert!(client.to_lowercase().contains("certificaterequired"), "{client}");
        assert!(server.unwrap_err().to_string().contains("certificate"));

        let with_identity = |version| {
            let me = identity(&nodes.authority, "source-1");
            builder(version)
                .with_client_auth_cert(me.chain().to_vec(), me.key().clone_key())
                .unwrap()
        };
        let mut old = with_identity(&rustls::version::TLS12);
        old.alpn_protocols = vec![pki::ALPN.to_vec()];
        let (client, server) = soon(attempt(&Arc::new(old), &nodes.server)).await;
        assert!(client.is_err());
        let server = server.unwrap_err().to_string();
        assert!(server.contains("Tls12NotOffered"), "{server}");

        let mut another_service = with_identity(&rustls::version::TLS13);
        another_service.alpn_protocols = vec![b"h2".to_vec()];
        let (_, server) = soon(attempt(&Arc::new(another_service), &nodes.server)).await;
        assert!(server.is_err());
        let unnamed_service = with_identity(&rustls::version::TLS13);
        let (_, server) = soon(attempt(&Arc::new(unnamed_service), &nodes.server)).await;
        assert!(matches!(server, Err(LinkError::NotALink)), "{server:?}");
    })
    .unwrap();
}

#[test]
fn a_client_that_says_nothing_or_no_tls_is_dropped() {
    seam::run(async {
        let nodes = nodes();
        let timeouts = Timeouts { handshake: SHORT, ..QUICK };
        let (silent, stream) = Stream::pair().unwrap();
        let refused = soon(Connection::accept(stream, &nodes.server, &timeouts)).await;
        assert!(matches!(refused, Err(LinkError::Timeout { .. })));
        drop(silent);

        let (plain, stream) = Stream::pair().unwrap();
        plain.write_now(&[IoSlice::new(b"NBDMAGIC, or anything else")]).unwrap();
        let refused = soon(Connection::accept(stream, &nodes.server, &timeouts)).await;
        assert!(matches!(refused, Err(LinkError::Tls(_))));

        let (gone, stream) = Stream::pair().unwrap();
        drop(gone);
        let refused = soon(Connection::accept(stream, &nodes.server, &timeouts)).await;
        assert!(matches!(refused, Err(LinkError::Cut)));
    })
    .unwrap();
}

#[test]
fn nobody_listening_is_an_error_with_the_address() {
    seam::run(async {
        let nodes = nodes();
        let (listener, address) = listen();
        drop(listener);
        let expected = name("target-1");
        let address = address.to_string();
        let refused = Connection::connect(&address, &nodes.client, &expected, &QUICK).await;
        let refused = refused.err().unwrap().to_string();
        assert!(refused.contains(&address) && refused.contains("refused"), "{refused}");
    })
    .unwrap();
}

#[test]
fn a_peer_that_stops_reading_ends_the_connection() {
    seam::run(async {
        let (source, target) = connected(&Timeouts { stall: SHORT, ..QUICK }).await;
        let (mut sender, _receiver) = source.split();
        let frame = vec![5; 1 << 20];
        let stalled = soon(async {
            loop {
                if let Err(error) = sender.send_frame(&[&frame]).await {
                    return error;
                }
            }
        })
        .await;
        assert!(matches!(stalled, LinkError::Timeout { .. }), "{stalled}");
        assert!(matches!(sender.flush().await, Err(LinkError::Ended)));
        drop(target);
    })
    .unwrap();
}

#[test]
fn a_silent_peer_ends_the_connection_even_if_recv_is_dropped_again_and_again() {
    seam::run(async {
        let (source, target) = connected(&Timeouts { idle: SHORT, ..QUICK }).await;
        let (_sender, mut receiver) = source.split();
        let silence = soon(async {
            loop {
                // As a select! in a loop does.
                match timeout(SHORT / 10, receiver.recv()).await {
                    Err(_) => continue,
                    Ok(result) => return result,
                }
            }
        })
        .await;
        assert!(matches!(silence, Err(LinkError::Timeout { .. })), "{silence:?}");
        assert!(matches!(receiver.recv().await, Err(LinkError::Ended)));
        drop(target);
    })
    .unwrap();
}

#[test]
fn a_dropped_recv_loses_nothing() {
    seam::run(async {
        let (source, target) = connected(&QUICK).await;
        let (mut sender, _keep) = source.split();
        let (_keep_too, mut receiver) = target.split();
        let send = seam::spawn(async move {
            for number in 0..50 {
                let echo = Echo { number, received_wall_ns: 0 };
                sender.send(&Message::Echo(echo)).await.unwrap();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            sender
        });
        let mut numbers = Vec::new();
        while numbers.len() < 50 {
            let recv = timeout(Duration::from_micros(300), receiver.recv());
            if let Ok(message) = recv.await {
                let Some(Message::Echo(echo)) = message.unwrap() else { panic!("no echo") };
                numbers.push(echo.number);
            }
        }
        assert_eq!(numbers, (0..50).collect::<Vec<_>>());
        send.await.unwrap();
    })
    .unwrap();
}

#[test]
fn shutdown_ends_a_pending_recv() {
    seam::run(async {
        let (source, target) = connected(&QUICK).await;
        let (sender, mut receiver) = source.split();
        let closer = sender.closer();
        let pending = seam::spawn(async move { receiver.recv().await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!pending.is_finished());
        closer.close();
        let ended = soon(pending).await.unwrap();
        assert!(matches!(ended, Err(LinkError::Cut)), "{ended:?}");
        drop(target);
    })
    .unwrap();
}

#[test]
fn a_send_given_up_in_the_middle_ends_the_connection() {
    seam::run(async {
        let (source, target) = connected(&QUICK).await;
        let (mut sender, _receiver) = source.split();
        let (_sender, mut receiver) = target.split();
        let frame = vec![5; 20 << 20];
        assert!(timeout(Duration::from_millis(50), sender.send_frame(&[&frame])).await.is_err());
        assert!(matches!(sender.send(&Message::Bye).await, Err(LinkError::Ended)));
        let cut = soon(receiver.recv()).await;
        assert!(matches!(cut, Err(LinkError::Cut)), "half a frame is none: {cut:?}");
    })
    .unwrap();
}

#[test]
fn an_end_without_notice_is_a_cut() {
    seam::run(async {
        let (source, target) = connected(&QUICK).await;
        let (mut sender, receiver) = source.split();
        let (_sender, mut at_target) = target.split();
        sender.send(&Message::Bye).await.unwrap();
        drop((sender, receiver));
        assert_eq!(soon(at_target.recv()).await.unwrap(), Some(Message::Bye));
        assert!(matches!(soon(at_target.recv()).await, Err(LinkError::Cut)));
    })
    .unwrap();
}

/// Sends bytes as they are inside a good connection, and says what the receiver makes of them.
async fn raw(bytes: &[u8], finish: bool) -> Result<Option<Message>, LinkError> {
    let (source, target) = connected(&QUICK).await;
    let (mut sender, _keep) = source.split();
    let (_keep_too, mut receiver) = target.split();
    sender.shared.tls.borrow_mut().writer().write_all(bytes).unwrap();
    if finish {
        sender.finish().await.unwrap();
    } else {
        sender.flush().await.unwrap();
    }
    soon(receiver.recv()).await
}

#[test]
fn what_is_no_message_ends_the_connection_with_a_reason() {
    seam::run(async {
        let unknown = raw(&[77, 0, 1, 0, 0, 0, 0, 0], false).await;
        assert!(matches!(unknown, Err(LinkError::Decode(DecodeError::Kind(77)))), "{unknown:?}");
        let oversized = raw(&[4, 0, 1, 0, 0, 0, 0, 0xff], false).await;
        let Err(LinkError::Decode(DecodeError::Length { kind, .. })) = oversized else {
            panic!("{oversized:?}")
        };
        assert_eq!(kind, MessageKind::Frame);
        let no_json = raw(&[1, 0, 1, 0, 2, 0, 0, 0, b'{', b'!'], false).await;
        assert!(matches!(no_json, Err(LinkError::Decode(DecodeError::Body { .. }))));
        let truncated = raw(&[4, 0, 1, 0, 100, 0, 0, 0, 1, 2, 3], true).await;
        assert!(matches!(truncated, Err(LinkError::Cut)), "{truncated:?}");
        let truncated = raw(&[4, 0, 1], true).await;
        assert!(matches!(truncated, Err(LinkError::Cut)), "{truncated:?}");
    })
    .unwrap();
}

#[test]
fn a_changed_byte_on_the_network_ends_the_connection() {
    seam::run(async {
        let nodes = nodes();
        let (source, mut near) = Stream::pair().unwrap();
        let (mut far, target) = Stream::pair().unwrap();
        // A network that changes one bit of the first large read towards the target.
        let towards = seam::spawn(async move {
            let mut spoiled = false;
            loop {
                let (read, mut bytes) = near.read(Vec::with_capacity(64 << 10)).await;
                if read.unwrap_or(0) == 0 {
                    return;
                }
                if bytes.len() > 10_000 && !spoiled {
                    bytes[5000] ^= 1;
                    spoiled = true;
                }
                if write_all(&far, &bytes).await.is_err() {
                    return;
                }
                (near, far) = reply(near, far).await;
            }
        });
        let accept = async {
            let connection = Connection::accept(target, &nodes.server, &QUICK).await?;
            let (_keep, mut receiver) = connection.split();
            receiver.recv().await
        };
        let connect = async {
            let expected = name("target-1");
            let connection =
                Connection::client(source, &nodes.client, &expected, &QUICK).await.unwrap();
            let (mut sender, keep) = connection.split();
            // The sender may or may not notice; the receiver must.
            let _ = sender.send(&Message::Frame(vec![9; 20_000])).await;
            (sender, keep)
        };
        let (_keep, received) = soon(async { tokio::join!(connect, accept) }).await;
        assert!(matches!(received, Err(LinkError::Tls(_))), "{received:?}");
        towards.abort();
    })
    .unwrap();
}

async fn write_all(stream: &Stream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write_now(&[IoSlice::new(bytes)]) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Carries what comes back within a moment.
async fn reply(near: Stream, far: Stream) -> (Stream, Stream) {
    let reading = far.read(Vec::with_capacity(64 << 10));
    if let Ok((Ok(1..), bytes)) = timeout(Duration::from_millis(200), reading).await {
        let _ = write_all(&near, &bytes).await;
    }
    (near, far)
}

#[test]
fn a_throttle_holds_frames_back_and_not_messages() {
    seam::run(async {
        let (source, target) = connected(&QUICK).await;
        let (mut sender, _keep) = source.split();
        let (_keep_too, mut receiver) = target.split();
        let rate = std::num::NonZeroU64::new(1 << 20);
        let schedule = Schedule { bytes_per_second: rate, windows: Vec::new() };
        sender.set_throttle(Throttle::new(schedule), || Minute::of_second(0));
        let receive = seam::spawn(async move {
            let mut kinds = Vec::new();
            while let Ok(Some(message)) = receiver.recv().await {
                kinds.push(message.kind());
            }
            kinds
        });
        let started = std::time::Instant::now();
        sender.send(&Message::Bye).await.unwrap();
        sender.send(&Message::Frame(vec![1; 512 << 10])).await.unwrap();
        // Half a second's worth, of which a tenth of a second's and one piece are free.
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(300), "{took:?} for 512 KiB at 1 MiB/s");
        sender.finish().await.unwrap();
        assert_eq!(soon(receive).await.unwrap(), [MessageKind::Bye, MessageKind::Frame]);
    })
    .unwrap();
}

#[test]
fn a_sender_that_never_waits_lets_others_go_on() {
    const FRAMES: usize = 6;
    seam::run(async {
        let nodes = nodes();
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        // Room for all of it, as root: nobody reads it.
        setsockopt(&one, sockopt::SndBufForce, &(64 << 20)).unwrap();
        let expected = name("target-1");
        let (source, target) = tokio::join!(
            Connection::client(Stream::from_unix(one), &nodes.client, &expected, &QUICK),
            Connection::accept(Stream::from_unix(other), &nodes.server, &QUICK),
        );
        let (source, _target) = (source.unwrap(), target.unwrap());
        let (mut sender, _keep) = source.split();
        let turns = Rc::new(std::cell::Cell::new(0));
        let counted = turns.clone();
        let other_task = seam::spawn(async move {
            loop {
                seam::submit().await.unwrap();
                counted.set(counted.get() + 1);
            }
        });
        let frame = vec![7; 1 << 20];
        for _ in 0..FRAMES {
            soon(sender.send_frame(&[&frame])).await.unwrap();
            soon(sender.flush()).await.unwrap();
        }
        other_task.abort();
        assert!(turns.get() >= FRAMES - 1, "{} turns of another task", turns.get());
    })
    .unwrap();
}
