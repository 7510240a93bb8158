use tidemark_journal::{Compression, FrameBuilder, FrameMeta, GapReason, Sector, Seq, TermId};
use tidemark_link::message::{GroupHello, VolumeHello};

use super::*;

const GROUP: GroupId = GroupId([7; 16]);

fn term(n: u8) -> TermId {
    TermId([n; 16])
}

fn at(n: u8, seq: u64) -> Position {
    Position { term: term(n), seq: Seq(seq) }
}

fn hello() -> Hello {
    Hello {
        protocol: ProtocolRange::OWN,
        features: Vec::new(),
        software: String::new(),
        group: GroupHello { id: GROUP, name: "shop".to_owned() },
        ancestry: Ancestry::root(term(1)).fork(term(2), Seq(100)).expect("a path"),
        volumes: vec![VolumeHello {
            id: VolumeId(0),
            name: "disk".to_owned(),
            sectors: 1000,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
        }],
        acked: Position::default(),
        ceiling: Seq(1000),
        map_generation: 0,
    }
}

fn memory(position: Option<Position>) -> TargetMemory {
    TargetMemory { position, ..TargetMemory::default() }
}

fn session(position: Position) -> Session {
    Session::greet(&hello(), 1, memory(Some(position))).expect("greeted").0
}

fn record(kind: Kind, volume: u16, seq: u64, start: u64, sectors: u32) -> Record {
    Record {
        kind,
        flags: if kind == Kind::GapBegin { GapReason::Doubt as u8 } else { 0 },
        volume: VolumeId(volume),
        seq: Seq(seq),
        time_ns: 0,
        start: Sector(start),
        sectors,
    }
}

fn frame(group: GroupId, term: TermId, before: Position, record: &Record) -> Vec<u8> {
    let mut builder = FrameBuilder::new(Compression::Off);
    builder.push(record, [vec![1; record.payload_bytes() as usize].as_slice()]);
    builder.finish(&FrameMeta { group, term, before, wall_ns: 0 }).to_vec()
}

fn refusal(session: &mut Session, frame: Vec<u8>) -> String {
    session.receive(Message::Frame(frame)).expect_err("refused").sentence
}

#[test]
fn who_may_write_what() {
    let config = GroupConfig {
        name: "shop".parse().expect("a name"),
        node: "db1".parse().expect("a name"),
        readers: Vec::new(),
        branch_writers: Vec::new(),
        window: tidemark_control::config::Seconds(1),
        window_min: tidemark_control::config::Seconds(1),
        size_max: tidemark_control::config::Bytes(1),
    };
    let configs = [config];
    let row = |id| GroupRow {
        id,
        node: "db1".to_owned(),
        ancestry: Ancestry::root(term(1)),
        created_ns: 0,
    };
    let (own, other) = ("db1".parse().expect("a name"), "db2".parse().expect("a name"));
    assert!(admit(&hello(), &own, &configs, |_| None).is_ok());
    assert!(admit(&hello(), &own, &configs, |_| Some(row(GROUP))).is_ok());
    let code = |hello: &Hello, node, known: Option<GroupRow>| {
        admit(hello, node, &configs, |_| known).expect_err("refused").code
    };
    assert_eq!(code(&hello(), &other, None), RefuseCode::NotAllowed);
    assert_eq!(code(&hello(), &own, Some(row(GroupId([8; 16])))), RefuseCode::Diverged);
    let mut unknown = hello();
    unknown.group.name = "other".to_owned();
    assert_eq!(code(&unknown, &own, None), RefuseCode::UnknownGroup);
    let mut newer = hello();
    newer.protocol = ProtocolRange { min: 90, max: 91 };
    assert_eq!(code(&newer, &own, None), RefuseCode::Version);
}

#[test]
fn frames_go_on_exactly() {
    let write = |seq| record(Kind::Write, 0, seq, 0, 8);
    let mut session = session(at(1, 70));
    let gap = frame(GROUP, term(1), at(1, 71), &write(72));
    assert!(refusal(&mut session, gap).contains("the replica ends at"));
    let good = frame(GROUP, term(1), at(1, 70), &write(71));
    let step = session.receive(Message::Frame(good.clone())).expect("accepted");
    assert!(matches!(step, Step::Append { frame, offers } if frame == good && offers.is_empty()));
    assert!(refusal(&mut session, good).contains("the replica ends at"), "a second time");
    // A new term follows what there is of the old one.
    let next = frame(GROUP, term(2), at(1, 100), &record(Kind::GapBegin, 0, 101, 0, 0));
    assert!(session.receive(Message::Frame(next)).is_ok());
    let back = frame(GROUP, term(1), at(1, 71), &write(72));
    assert!(refusal(&mut session, back).contains("the replica ends at"));
}

#[test]
fn frames_that_must_not_be_stored() {
    let write = record(Kind::Write, 0, 71, 0, 8);
    let good = frame(GROUP, term(1), at(1, 70), &write);
    let fresh = || session(at(1, 70));
    let mut flipped = good.clone();
    *flipped.last_mut().expect("bytes") ^= 1;
    assert!(refusal(&mut fresh(), flipped).contains("checksum"));
    assert!(refusal(&mut fresh(), good[..good.len() - 1].to_vec()).contains("cut short"));
    assert!(refusal(&mut fresh(), [&good[..], &[0]].concat()).contains("follow it"));
    assert!(refusal(&mut fresh(), vec![0; 500]).contains("not a frame"));
    let foreign = frame(GroupId([9; 16]), term(1), at(1, 70), &write);
    assert!(refusal(&mut fresh(), foreign).contains("belongs to the group"));
    let stranger = frame(GROUP, term(5), at(1, 70), &write);
    assert!(refusal(&mut fresh(), stranger).contains("own path"));
    let beyond = frame(GROUP, term(1), at(1, 70), &record(Kind::Zero, 0, 71, 990, 11));
    assert!(refusal(&mut fresh(), beyond).contains("beyond the end"));
    let unknown = frame(GROUP, term(1), at(1, 70), &record(Kind::Zero, 3, 71, 0, 8));
    assert!(refusal(&mut fresh(), unknown).contains("not announced"));
    let refused = fresh()
        .receive(Message::Welcome(Session::greet(&hello(), 1, memory(None)).expect("greeted").1))
        .expect_err("refused");
    assert!(refused.sentence.contains("does not send"));
}

#[test]
fn a_doubt_lets_nothing_in() {
    let behind = Hello { acked: at(1, 90), ..hello() };
    let (mut session, welcome) =
        Session::greet(&behind, 1, memory(Some(at(1, 70)))).expect("greeted");
    assert_eq!(welcome.position, Some(at(1, 70)));
    let next = frame(GROUP, term(1), at(1, 70), &record(Kind::Write, 0, 71, 0, 8));
    assert!(refusal(&mut session, next).contains("everything is compared"));
}

#[test]
fn only_what_is_durable_is_acknowledged() {
    let mut session = session(at(1, 70));
    let mut progress = Progress { written: at(1, 70), durable: at(1, 70), ..Progress::default() };
    let ack = session.acknowledge(&progress).expect("the first");
    assert_eq!((ack.term, ack.hop_received, ack.final_durable), (term(2), Seq(70), Seq(70)));
    let next = frame(GROUP, term(1), at(1, 70), &record(Kind::Write, 0, 71, 0, 8));
    session.receive(Message::Frame(next)).expect("accepted");
    assert_eq!(session.acknowledge(&progress), None, "nobody waits for what was received");
    progress.written = at(1, 71);
    assert_eq!(session.acknowledge(&progress), None, "written is not durable");
    progress.stalled = Some("no room".into());
    let ack = session.acknowledge(&progress).expect("full");
    assert_eq!((ack.hop_received, ack.hop_durable, ack.final_durable), (Seq(71), Seq(70), Seq(70)));
    assert!(ack.flags.full);
    progress.durable = at(1, 71);
    let ack = session.acknowledge(&progress).expect("durable");
    assert!(ack.final_durable == Seq(71) && ack.flags.full);
    assert_eq!(session.acknowledge(&progress), None, "nothing new");
}

#[test]
fn sizes_that_differ_are_refused() {
    let volumes = vec![VolumeSize { id: VolumeId(0), sectors: 999 }];
    let memory = TargetMemory { position: Some(at(1, 70)), volumes, ..TargetMemory::default() };
    let refused = Session::greet(&hello(), 1, memory).err().expect("refused");
    assert_eq!(refused.code, RefuseCode::SizeMismatch);
}
