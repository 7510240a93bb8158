//! Clients that want more than their part: many connections, much memory, all places for newcomers. The
//! greedy one is at 127.0.0.2, the others are at 127.0.0.1.

mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use support::{One, PATIENCE, Scripted, everything};
use tidemark_nbd::client::{Client, Options};
use tidemark_nbd::proto::options::{
    InfoRequest, OptionHeader, OptionReplyHeader, ReplyType, option,
};
use tidemark_nbd::proto::transmission::{Command, Request};
use tidemark_nbd::{Limits, Listener, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const GREEDY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const HONEST: Ipv4Addr = Ipv4Addr::LOCALHOST;

async fn start(export: &Arc<Scripted>, limits: Limits) -> SocketAddr {
    let listener = Listener::tcp("127.0.0.1:0").await.unwrap().allow_plain_tcp();
    let address = listener.tcp_address().unwrap();
    let server = Server::new(Arc::new(One(Arc::clone(export))), limits);
    tokio::spawn(async move { server.serve(listener).await });
    address
}

async fn connect(from: Ipv4Addr, server: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    socket.connect(server).await.unwrap()
}

/// Goes through the handshake; the last reply to the wish to enter `disk`.
async fn enter(stream: &mut TcpStream) -> u32 {
    stream.read_exact(&mut [0; 18]).await.unwrap();
    let mut out = BytesMut::new();
    out.put_u32(3);
    let mut data = BytesMut::new();
    InfoRequest { name: "disk".into(), wanted: vec![] }.encode(&mut data);
    OptionHeader { option: option::GO, length: data.len() as u32 }.encode(&mut out);
    out.put_slice(&data);
    stream.write_all(&out).await.unwrap();
    loop {
        let mut raw = [0; 20];
        stream.read_exact(&mut raw).await.unwrap();
        let header = OptionReplyHeader::parse(&raw).unwrap();
        stream.read_exact(&mut vec![0; header.length as usize]).await.unwrap();
        if header.kind != ReplyType::Info as u32 {
            return header.kind;
        }
    }
}

async fn read_ahead(stream: &mut TcpStream, requests: u64, length: u32) {
    let mut out = BytesMut::new();
    for cookie in 0..requests {
        Request { flags: 0, command: Command::Read, cookie, offset: 0, length }.encode(&mut out);
    }
    stream.write_all(&out).await.unwrap();
}

/// One client took all 256 places for connections, for ever, since those that have entered are not cut.
#[tokio::test]
async fn a_client_has_so_many_connections_and_others_get_theirs() {
    let export = Scripted::new(everything());
    let server = start(&export, Limits { client_connections: 3, ..Limits::default() }).await;
    let mut greedy = Vec::new();
    for _ in 0..3 {
        let mut stream = connect(GREEDY, server).await;
        assert_eq!(enter(&mut stream).await, ReplyType::Ack as u32);
        greedy.push(stream);
    }
    assert_eq!(enter(&mut connect(GREEDY, server).await).await, ReplyType::ErrPolicy as u32);
    assert_eq!(enter(&mut connect(HONEST, server).await).await, ReplyType::Ack as u32);
    assert_eq!(export.opened.load(SeqCst), 4, "what is refused is not opened");
    greedy.pop();
    export.until("a connection is gone", |export| export.closed.load(SeqCst) >= 1).await;
    let again = async {
        while enter(&mut connect(GREEDY, server).await).await != ReplyType::Ack as u32 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, again).await.expect("its place is free again");
}

/// Each connection could have 64 MiB under way, and a client 256 of them: 16 GiB of replies that nobody
/// read.
#[tokio::test]
async fn the_connections_of_a_client_share_its_memory() {
    let export = Scripted::holding(everything());
    let (client_bytes, in_flight_bytes) = (4 << 20, 3 << 20);
    let limits = Limits { client_bytes, in_flight_bytes, ..Limits::default() };
    let server = start(&export, limits).await;
    let mut greedy = Vec::new();
    for _ in 0..5 {
        let mut stream = connect(GREEDY, server).await;
        assert_eq!(enter(&mut stream).await, ReplyType::Ack as u32);
        read_ahead(&mut stream, 20, 1 << 20).await;
        greedy.push(stream);
    }
    export.until("all that it may have", |export| export.calls().len() == 4).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(export.calls().len(), 4);

    let mut honest = connect(HONEST, server).await;
    assert_eq!(enter(&mut honest).await, ReplyType::Ack as u32);
    read_ahead(&mut honest, 1, 1 << 20).await;
    export.until("a read of somebody else", |export| export.calls().len() == 5).await;

    // What is given back when connections end is had by those that are left.
    let last = greedy.pop().unwrap();
    greedy.clear();
    let calls = async {
        while export.calls().len() < 5 + 3 {
            export.release();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, calls).await.expect("the last one reads");
    drop(last);
}

/// Whoever made connections faster than others went through their handshakes cut them all.
#[tokio::test]
async fn a_flood_of_connections_cuts_its_own() {
    let export = Scripted::new(everything());
    let server = start(&export, Limits { pending_connections: 8, ..Limits::default() }).await;
    let mut slow = connect(HONEST, server).await;
    let mut flood = Vec::new();
    for _ in 0..100 {
        flood.push(connect(GREEDY, server).await);
    }
    let mut rest = Vec::new();
    let cut = flood[92].read_to_end(&mut rest);
    tokio::time::timeout(PATIENCE, cut).await.expect("all but seven are cut").ok();
    assert_eq!(enter(&mut slow).await, ReplyType::Ack as u32);
    let client = Client::connect(server, "disk", &Options::default()).await.unwrap();
    client.flush().await.unwrap();
}
