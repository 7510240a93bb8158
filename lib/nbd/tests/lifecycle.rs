//! Opening, closing, shutting down, TLS and listeners.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use bytes::Bytes;
use rustls_pki_types::ServerName;
use support::{Certificates, OnUnix, One, PATIENCE, Scripted, everything};
use tempfile::TempDir;
use tidemark_nbd::client::{Client, ConnectError, Options};
use tidemark_nbd::proto::options::ReplyType;
use tidemark_nbd::proto::transmission::{Command, Request};
use tidemark_nbd::{Errno, Limits, Listener, Origin, Server, Tls, tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn each_open_is_closed_once() {
    let export = Scripted::new(everything());
    let server = OnUnix::start(One(Arc::clone(&export)), Limits::default()).await;
    let options = Options::default();
    let ended = |count| move |export: &Scripted| export.closed.load(SeqCst) == count;

    Client::info_of(server.address(), "disk", &options).await.unwrap();
    export.until("INFO closes at once", ended(1)).await;
    let client = Client::connect(server.address(), "disk", &options).await.unwrap();
    client.disconnect().await;
    export.until("after DISC", ended(2)).await;
    drop(Client::connect(server.address(), "disk", &options).await.unwrap());
    export.until("after a hang-up", ended(3)).await;
    assert_eq!(export.opened.load(SeqCst), 3);
}

#[tokio::test]
async fn a_refusal_carries_its_sentence() {
    let export = Scripted::new(everything());
    let server = OnUnix::start(One(export), Limits::default()).await;
    let options = Options::default();
    for (name, kind, sentence) in [
        ("disk@seq:9", ReplyType::ErrUnknown, "disk@seq:9 lies inside a gap"),
        ("secret", ReplyType::ErrPolicy, "only the operator may open this export"),
    ] {
        for opened in [
            Client::connect(server.address(), name, &options).await.map(drop),
            Client::info_of(server.address(), name, &options).await.map(drop),
        ] {
            let error = opened.unwrap_err();
            assert!(error.is(kind), "{error}");
            assert!(error.to_string().contains(sentence), "{error}");
        }
    }
    let list = Client::list(server.address(), &options).await.unwrap();
    assert_eq!((list[0].name.as_str(), list[0].description.as_str()), ("disk", "for tests"));
}

#[tokio::test]
async fn shutdown_answers_what_runs_and_takes_nothing_more() {
    let export = Scripted::holding(everything());
    let server = OnUnix::start(One(Arc::clone(&export)), Limits::default()).await;
    let client = Client::connect(server.address(), "disk", &Options::default()).await.unwrap();
    let write = tokio::spawn({
        let client = client.clone();
        async move { client.write(0, Bytes::from_static(&[1; 512]), true).await }
    });
    export.until("the write", |export| export.calls().len() == 1).await;
    let down = tokio::spawn({
        let server = server.server.clone();
        async move { server.shutdown(PATIENCE).await }
    });
    server.serving.await.unwrap().unwrap();
    assert!(Client::connect(&*server.path, "disk", &Options::default()).await.is_err());
    assert!(!write.is_finished() && !down.is_finished());
    export.release();
    write.await.unwrap().expect("answered, not cut");
    assert!(down.await.unwrap(), "in order");
    assert_eq!(client.read(0, 512).await.unwrap_err().errno, Errno::Io);
    export.until("the close", |export| export.closed.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn shutdown_does_not_wait_beyond_its_grace() {
    let export = Scripted::holding(everything());
    let server = OnUnix::start(One(Arc::clone(&export)), Limits::default()).await;
    let client = Client::connect(server.address(), "disk", &Options::default()).await.unwrap();
    let hung = tokio::spawn(async move { client.flush().await });
    export.until("the flush", |export| export.calls().len() == 1).await;
    assert!(!server.server.shutdown(Duration::from_millis(50)).await);
    assert_eq!(hung.await.unwrap().unwrap_err().errno, Errno::Io);
    export.until("the close", |export| export.closed.load(SeqCst) == 1).await;
}

/// A server on TCP that requires TLS; its address.
async fn start_tcp(export: &Arc<Scripted>, tls: Tls) -> (Server, std::net::SocketAddr) {
    let server = Server::new(Arc::new(One(Arc::clone(export))), Limits::default());
    let listener = Listener::tcp("127.0.0.1:0").await.unwrap().with_tls(tls);
    let address = listener.tcp_address().unwrap();
    let serving = server.clone();
    tokio::spawn(async move { serving.serve(listener).await.unwrap() });
    (server, address)
}

fn options(certificates: &Certificates, own: bool) -> Options {
    let (certificate, key) =
        (certificates.file("client-cert.pem"), certificates.file("client-key.pem"));
    let own = own.then_some((&*certificate, &*key));
    let config = tls::client_config(&certificates.file("ca-cert.pem"), own).unwrap();
    Options { tls: Some((config, ServerName::try_from("localhost").unwrap())), ..<_>::default() }
}

#[tokio::test]
async fn tls_is_forced_and_the_peer_is_named() {
    let certificates = Certificates::make();
    let export = Scripted::new(everything());
    let (_server, address) = start_tcp(&export, certificates.required(true)).await;

    let plain = Client::connect(address, "disk", &Options::default()).await;
    assert!(plain.err().is_some_and(|error| error.is(ReplyType::ErrTlsReqd)));
    let plain = Client::list(address, &Options::default()).await;
    assert!(plain.err().is_some_and(|error| error.is(ReplyType::ErrTlsReqd)));
    let nameless = Client::connect(address, "disk", &options(&certificates, false)).await;
    assert!(matches!(nameless.err(), Some(ConnectError::Io(_))), "a certificate is required");
    let stranger = Client::connect(address, "disk", &options(&Certificates::make(), true)).await;
    assert!(stranger.is_err(), "another authority");
    assert_eq!(export.opened.load(SeqCst), 0);

    let client = Client::connect(address, "disk", &options(&certificates, true)).await.unwrap();
    client.write(0, Bytes::from(vec![1; 3 << 20]), false).await.unwrap();
    assert_eq!(client.read(0, 1 << 20).await.unwrap().len(), 1 << 20);
    client.disconnect().await;
    let seen = export.clients.lock().unwrap();
    assert!(seen[0].tls && matches!(seen[0].origin, Origin::Tcp(_)));
    assert_eq!(seen[0].peer_name.as_deref(), Some("client.example"));
    assert!(seen[0].certificate.is_some());
}

#[tokio::test]
async fn allowed_tls_serves_both_and_names_nobody_without_a_certificate() {
    let certificates = Certificates::make();
    let export = Scripted::new(everything());
    let Tls::Required(config) = certificates.required(false) else { unreachable!() };
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("nbd.sock");
    let listener = Listener::unix(&path, 0o600).await.unwrap().with_tls(Tls::Allowed(config));
    let server = Server::new(Arc::new(One(Arc::clone(&export))), Limits::default());
    tokio::spawn(async move { server.serve(listener).await });
    Client::connect(&*path, "disk", &Options::default()).await.unwrap().disconnect().await;
    let encrypted = options(&certificates, false);
    Client::connect(&*path, "disk", &encrypted).await.unwrap().disconnect().await;
    let seen = export.clients.lock().unwrap();
    assert_eq!([seen[0].tls, seen[1].tls], [false, true]);
    assert!(seen.iter().all(|client| client.peer_name.is_none()));
}

#[tokio::test]
async fn tcp_without_required_tls_must_be_asked_for() {
    let server = Server::new(Arc::new(One(Scripted::new(everything()))), Limits::default());
    let listener = Listener::tcp("127.0.0.1:0").await.unwrap();
    let served = tokio::time::timeout(PATIENCE, server.serve(listener)).await;
    let error = served.expect("refused at once").unwrap_err();
    assert_eq!(error.to_string(), "TLS is required on TCP: give the listener a certificate");
}

#[tokio::test]
async fn a_unix_socket_has_its_mode_replaces_a_dead_one_and_spares_a_live_one() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("nbd.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap()); // leaves a dead socket
    let listener = Listener::unix(&path, 0o660).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    assert!(Listener::unix(&path, 0o660).await.is_err(), "a live one");
    drop(listener);
    assert!(!path.exists());
    std::fs::write(&path, "a file").unwrap();
    assert!(Listener::unix(&path, 0o660).await.is_err(), "a file");
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
}

#[tokio::test]
async fn any_stream_can_be_served() {
    let export = Scripted::new(everything());
    let server = Server::new(Arc::new(One(export)), Limits::default());
    let (mut near, far) = tokio::io::duplex(64);
    let serving =
        tokio::spawn(async move { server.serve_stream(far, Origin::Other, &Tls::Off).await });
    let mut greeting = [0; 18];
    near.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    drop(near);
    assert!(serving.await.unwrap().is_err());
}

#[tokio::test]
async fn a_stream_without_a_handshake_can_be_served() {
    let export = Scripted::new(everything());
    let server = Server::new(Arc::new(One(Arc::clone(&export))), Limits::default());
    let (mut near, far) = tokio::io::duplex(64);
    let entered = Arc::clone(&export);
    let serving = tokio::spawn(async move { server.serve_entered(far, "disk", entered).await });
    let mut out = bytes::BytesMut::new();
    for (command, length) in [(Command::Flush, 0), (Command::Read, 8), (Command::Disconnect, 0)] {
        Request { flags: 0, command, cookie: 5, offset: 0, length }.encode(&mut out);
    }
    near.write_all(&out).await.unwrap();
    let mut replies = Vec::new();
    near.read_to_end(&mut replies).await.unwrap();
    let success = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
    assert_eq!(replies, [&success[..], &success, &[0; 8]].concat());
    serving.await.unwrap().unwrap();
    assert_eq!(export.closed.load(SeqCst), 1);
}

/// A kernel client hands an error to the application, and sends again what has no answer.
#[tokio::test]
async fn a_shutdown_refuses_nothing_to_who_entered_without_a_handshake() {
    let export = Scripted::holding(everything());
    let limits = Limits { in_flight_bytes: 512, ..Limits::default() };
    let server = Server::new(Arc::new(One(Arc::clone(&export))), limits);
    let (mut near, far) = tokio::io::duplex(64 << 10);
    let serving = tokio::spawn({
        let (server, export) = (server.clone(), Arc::clone(&export));
        async move { server.serve_entered(far, "disk", export).await }
    });
    let mut out = bytes::BytesMut::new();
    for cookie in 1..=3 {
        let command = Command::Write;
        Request { flags: 0, command, cookie, offset: 0, length: 512 }.encode(&mut out);
        out.extend_from_slice(&[1; 512]);
    }
    near.write_all(&out).await.unwrap();
    export.until("the first write", |export| export.calls().len() == 1).await;
    let down = tokio::spawn(async move { server.shutdown(PATIENCE).await });
    // The others have arrived, and wait for room.
    tokio::task::yield_now().await;
    export.release();
    let mut replies = Vec::new();
    near.read_to_end(&mut replies).await.unwrap();
    assert_eq!(replies, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert!(down.await.unwrap(), "in order");
    serving.await.unwrap().unwrap();
    assert_eq!(export.calls().len(), 1);
}
