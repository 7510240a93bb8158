//! What is said on a link.

use tidemark_journal::{Ancestry, Position, Seq, TermId};
use tidemark_link::lease::LEASE;
use tidemark_link::message::{
    Ack, AckFlags, Echo, GroupHello, Heartbeat, Hello, LeaseAsk, LeaseGrant, Message, Need, Notice,
    ProtocolRange, REPAIR_FEATURE, Refuse, RefuseCode, RegionRun, Repair, SYNC_FEATURE, Severity,
    VolumeHello, VolumeSize, Welcome,
};

use crate::{GROUP, TERM, VOLUME, put};

/// Both directions of a session, for those that read the messages and those that act on them.
pub fn put_all(frame: &[u8]) -> std::io::Result<()> {
    let ancestry = Ancestry::root(TermId([2; 16])).fork(TERM, Seq(100)).expect("a path");
    let volume = VolumeHello {
        id: VOLUME,
        name: "data".into(),
        sectors: 1 << 22,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
    };
    let position = Position { term: TERM, seq: Seq(150) };
    let hello = Hello {
        protocol: ProtocolRange { min: 1, max: 1 },
        features: vec![SYNC_FEATURE.into()],
        software: "0.1.0".into(),
        group: GroupHello { id: GROUP, name: "db".into() },
        ancestry: ancestry.clone(),
        volumes: vec![volume],
        acked: position,
        ceiling: Seq(1 << 20),
        map_generation: 7,
    };
    let welcome = Welcome {
        protocol: 1,
        features: vec![REPAIR_FEATURE.into(), SYNC_FEATURE.into()],
        software: "0.1.0".into(),
        position: Some(position),
        path: ancestry.until(position),
        map_generation: 6,
        volumes: vec![VolumeSize { id: VOLUME, sectors: 8192 }],
    };
    let mut need = Need::nothing(Seq(110));
    need.want(3);
    let heartbeat =
        Heartbeat { number: 1, journal_ns: 2, wall_ns: -3, vouched: position, map_generation: 5 };
    let ack = Ack {
        term: TERM,
        hop_received: Seq(3),
        hop_durable: Seq(2),
        final_durable: Seq(1),
        flags: AckFlags { full: true },
    };
    let source = [
        Message::Hello(hello),
        Message::Frame(frame.to_vec()),
        Message::Heartbeat(heartbeat),
        Message::LeaseGrant(LeaseGrant { number: 1, lease: LEASE }),
        Message::Bye,
    ];
    let runs = vec![RegionRun { volume: VOLUME, first: 1, regions: 2 }];
    let target = [
        Message::Welcome(welcome),
        Message::Repair(Repair { runs }),
        Message::Ack(ack),
        Message::Need(need),
        Message::Echo(Echo { number: 1, received_wall_ns: -2 }),
        Message::LeaseAsk(LeaseAsk { number: 1 }),
        Message::Notice(Notice::new(Severity::Warning, "a disk is slow")),
        Message::Refuse(Refuse::new(RefuseCode::SizeMismatch, "no")),
    ];
    for (name, messages) in [("source", &source[..]), ("target", &target[..])] {
        put("link", name, &[&[255], &encoded(messages)[..]].concat())?;
    }
    put("receiver", "new", &[&[0], &encoded(&source)[..]].concat())?;
    put("receiver", "going-on", &[&[2], &encoded(&source)[..]].concat())?;
    let Message::Welcome(welcome) = &target[0] else { return Ok(()) };
    let new = Welcome { position: None, path: None, map_generation: 0, ..welcome.clone() };
    put("source", "new", &encoded(&[&[Message::Welcome(new)], &target[1..]].concat()))?;
    put("source", "doubt", &encoded(&target))
}

fn encoded(messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        message.encode(&mut bytes).expect("messages of bounded length");
    }
    bytes
}
