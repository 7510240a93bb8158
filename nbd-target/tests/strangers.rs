//! Who is at the link's port without being a source of this target's: connections that say nothing, and nodes
//! with a good certificate and no right to the group.

mod common;

use std::{net::TcpStream, time::Duration};

use common::{Lab, run, source::Source};
use tidemark_journal::{GroupId, Seq};
use tidemark_link::{
    conn::{Connection, Timeouts},
    message::{Message, RefuseCode},
    pki,
    seam::Stream,
};
use tokio::{io::AsyncReadExt, net::TcpSocket};

/// A target and its source, which has written something.
async fn begun() -> (Lab, Source) {
    let lab = Lab::new("", "");
    let mut source = Source::new(&[1 << 20]);
    source.connect(&lab).await;
    write(&mut source, 8).await;
    (lab, source)
}

async fn write(source: &mut Source, at: u64) {
    source.write(0, at, &[7; 4096]);
    source.send().await;
    source.acknowledged().await;
}

/// 64 connections that said nothing held all places for newcomers until their time for the handshake was over,
/// and every source waited half a minute. Now the oldest of them makes room.
#[test]
fn silent_strangers_keep_no_source_out() {
    run(|| async {
        let (lab, mut source) = begun().await;
        let connect = || TcpStream::connect(lab.link_addr()).expect("a connection");
        let strangers: Vec<TcpStream> = (0..300).map(|_| connect()).collect();
        let mut again = Source::new(&[1 << 20]);
        again.node = "db2".into();
        let answer = tokio::time::timeout(Duration::from_secs(15), again.greet(&lab)).await;
        let answer = answer.expect("an answer before the strangers' time is over").expect("one");
        assert!(matches!(answer, Message::Refuse(refuse) if refuse.code == RefuseCode::NotAllowed));
        // The source that was there is left alone.
        write(&mut source, 16).await;
        drop(strangers);
    });
}

/// Whoever made connections faster than a source went through its handshake kept the source out. Now the
/// one that has the most loses its own.
#[test]
fn a_flood_from_elsewhere_cuts_its_own_and_no_source() {
    run(|| async {
        let (lab, _source) = begun().await;
        let timeouts = Timeouts::default();
        let slow = Stream::connect(&lab.link_addr().to_string(), timeouts.connect).await;
        let slow = slow.expect("a connection");
        let mut flood = Vec::new();
        for _ in 0..200 {
            let socket = TcpSocket::new_v4().expect("a socket");
            socket.bind(([127, 0, 0, 2], 0).into()).expect("an address");
            flood.push(socket.connect(lab.link_addr()).await.expect("a connection"));
        }
        // All but the last 63 are cut, besides the one that came before.
        let mut byte = [0];
        let cut = tokio::time::timeout(Duration::from_secs(15), flood[136].read(&mut byte)).await;
        assert_eq!(cut.expect("cut for others").unwrap_or(0), 0);

        let (identity, trust) = lab.identity("db2");
        let tls = pki::client_config(&identity, &trust).expect("good certificates");
        let expected = "dr1".parse().expect("a name");
        let connection = Connection::client(slow, &tls, &expected, &timeouts).await;
        let mut connection = connection.expect("its place is kept");
        let mut source = Source::new(&[1 << 20]);
        source.node = "db2".into();
        let answer = connection.ask(&Message::Hello(source.hello())).await.expect("an answer");
        assert!(matches!(answer, Message::Refuse(refuse) if refuse.code == RefuseCode::NotAllowed));
    });
}

/// Before it has greeted, a node's longest message is a greeting: 64 newcomers with 24 MiB each of what
/// might be a frame were 1.5 GiB.
#[test]
fn a_frame_instead_of_a_greeting_is_not_waited_for() {
    run(|| async {
        let (lab, _source) = begun().await;
        let (identity, trust) = lab.identity("db2");
        let tls = pki::client_config(&identity, &trust).expect("good certificates");
        let expected = "dr1".parse().expect("a name");
        let address = lab.link_addr().to_string();
        let timeouts = Timeouts::default();
        let connect = || Connection::connect(&address, &tls, &expected, &timeouts);
        let mut short = connect().await.expect("a connection");
        let answer = short.ask(&Message::Frame(vec![7; 1000])).await.expect("an answer");
        assert!(
            matches!(answer, Message::Refuse(refuse) if refuse.sentence.contains("greets first"))
        );
        let mut long = connect().await.expect("a connection");
        let answer = long.ask(&Message::Frame(vec![7; 300 << 10])).await;
        assert!(answer.is_err(), "read to its end: {answer:?}");
    });
}

/// A node's certificate opens its own groups alone: it cannot write another's, nor end its session, nor learn
/// its position by asking.
#[test]
fn a_node_cannot_touch_the_group_of_another() {
    run(|| async {
        let (lab, mut source) = begun().await;
        let before = lab.replica().journal().progress().durable;

        // With the group's own id and history, which it may have seen; and with one of its own.
        let mut known = Source::new(&[1 << 20]);
        (known.node, known.group) = ("db2".into(), source.group);
        let mut own = Source::new(&[1 << 20]);
        (own.node, own.group) = ("db2".into(), GroupId([9; 16]));
        for mut thief in [known, own] {
            thief.ancestry = source.ancestry.clone();
            let Message::Refuse(refuse) = thief.greet(&lab).await.expect("an answer") else {
                panic!("a stranger was welcomed")
            };
            assert_eq!(refuse.code, RefuseCode::NotAllowed);
            assert_eq!(refuse.sentence, "the node 'db2' may not write the group 'shop'");
        }
        assert_eq!(lab.replica().journal().progress().durable, before);
        assert_eq!(lab.replica().config().node.to_string(), "db1");
        assert!(before.seq > Seq::ZERO);

        // The session goes on as if nothing had been.
        write(&mut source, 16).await;
    });
}
