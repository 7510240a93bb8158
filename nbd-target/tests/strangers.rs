//! Who is at the link's port without being a source of this target's: connections that say nothing, and nodes
//! with a good certificate and no right to the group.

mod common;

use std::{net::TcpStream, time::Duration};

use common::{Lab, run, source::Source};
use tidemark_journal::{GroupId, Seq};
use tidemark_link::message::{Message, RefuseCode};

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
