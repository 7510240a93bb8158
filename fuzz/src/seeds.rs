//! Writes the seed corpus: one sound value of each kind, from the encoders of the project itself.
//!
//! `cargo run --bin seeds` in this directory; what it writes is kept in the repository.

use std::fs;
use std::path::Path;

use bytes::{BufMut, BytesMut};
use tidemark_agent::dirty::{RegionId, active::ActiveSet, bitmap};
use tidemark_agent::state::block::GroupState;
use tidemark_journal::record::flag;
use tidemark_journal::segment::{BLOCK_BYTES, SegmentEnd, SegmentStart, padding};
use tidemark_journal::{
    Ancestry, Compression, FrameBuilder, FrameMeta, FrameView, GapReason, GroupId, Kind, Position,
    Record, Sector, Seq, TermId, VolumeId,
};
use tidemark_link::lease::LEASE;
use tidemark_link::message::{
    Ack, AckFlags, Echo, GroupHello, Heartbeat, Hello, LeaseAsk, LeaseGrant, Message, Need, Notice,
    ProtocolRange, Refuse, RefuseCode, Severity, VolumeHello, VolumeSize, Welcome,
};
use tidemark_nbd::proto::options::{
    BASE_ALLOCATION, InfoRequest, MetaContextRequest, OptionHeader, option,
};
use tidemark_nbd::proto::transmission::{Command, Request};
use tidemark_target::catalogue::{BranchRow, GroupRow, HistoryRow, Vitals};
use tidemark_target::history::History;
use tidemark_target::store::index::{MemoryIndex, sealed};

const TERM: TermId = TermId([7; 16]);
const MAP_ID: [u8; 16] = *b"map-id-of-16-byt";

fn main() -> std::io::Result<()> {
    let frames = [frame(Compression::Off, 100), frame(Compression::Zstd(3), 111)];
    for (name, frame) in ["raw", "zstd"].iter().zip(&frames) {
        put("frame", name, frame)?;
    }
    let start = SegmentStart {
        number: 1,
        group: GroupId([1; 16]),
        before: Position { term: TERM, seq: Seq(100) },
        created_ns: 5,
        chain_before: [3; 32],
    };
    put("segment", "header", &start.encode()[..192])?;
    let end = SegmentEnd {
        number: 1,
        index_at: 8192,
        index_bytes: 4096,
        last: Position { term: TERM, seq: Seq(122) },
        data_hash: [4; 32],
        chain: [5; 32],
        index_crc: 6,
    };
    put("segment", "trailer", &end.encode()[..192])?;
    let mut batches = frames[0].clone();
    batches.resize(batches.len() + padding(batches.len() as u64) as usize, 0);
    batches.extend_from_slice(&frames[1]);
    put("segment", "frames", &batches)?;
    put("index", "two-frames", &index(&frames))?;
    link(&frames[0])?;
    nbd()?;
    config()?;
    state(&frames)?;
    ring(&frames[0])
}

fn put(target: &str, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&directory)?;
    fs::write(directory.join(name), bytes)
}

fn record(kind: Kind, seq: u64, start: u64, sectors: u32) -> Record {
    let volume = VolumeId(u16::from(!matches!(kind, Kind::Mark | Kind::Void)));
    let time_ns = seq * 1_000_000;
    Record { kind, flags: 0, volume, seq: Seq(seq), time_ns, start: Sector(start), sectors }
}

/// A frame with a record of every kind.
fn frame(compression: Compression, before: u64) -> Vec<u8> {
    let mut builder = FrameBuilder::new(compression);
    let mut seq = before;
    let mut next = |kind, start, sectors| {
        seq += 1;
        record(kind, seq, start, sectors)
    };
    let write = next(Kind::Write, 8, 1);
    builder.push(&Record { flags: flag::FUA, ..write }, [&[0xa5; 512][..]]);
    builder.push(&next(Kind::Sync, 16, 1), [&[0x11; 512][..]]);
    let zero = next(Kind::Zero, 64, 1 << 21);
    builder.push(&Record { flags: flag::UNMAP, ..zero }, []);
    builder.push(&next(Kind::Discard, 128, 8), []);
    builder.push(&next(Kind::Flush, 0, 0), []);
    builder.push(&next(Kind::Mark, 0, 22), [&[0xee; 16][..], b"before"]);
    builder.push(&next(Kind::Resize, 4096, 0), []);
    let gap = next(Kind::GapBegin, 0, 0);
    builder.push(&Record { flags: GapReason::Overflow as u8, ..gap }, []);
    builder.push(&next(Kind::Offer, 2048, 9), [&[0xcc; 32][..]]);
    builder.push(&next(Kind::Unreadable, 2064, 8), []);
    builder.push(&next(Kind::GapEnd, 0, 0), []);
    let before = Position { term: TERM, seq: Seq(before) };
    let about = FrameMeta { group: GroupId([1; 16]), term: TERM, before, wall_ns: 1_800_000_000 };
    builder.finish(&about).to_vec()
}

fn index(frames: &[Vec<u8>]) -> Vec<u8> {
    let (mut index, mut at) = (MemoryIndex::default(), BLOCK_BYTES);
    for frame in frames {
        index.insert(&FrameView::parse(frame).expect("a frame of one's own"), at);
        at += (frame.len() as u64).next_multiple_of(BLOCK_BYTES);
    }
    sealed::build(&index, 1, Seq(100))
}

fn link(frame: &[u8]) -> std::io::Result<()> {
    let ancestry = Ancestry::root(TermId([2; 16])).fork(TERM, Seq(100)).expect("a path");
    let volume = VolumeHello {
        id: VolumeId(1),
        name: "data".into(),
        sectors: 2048,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
    };
    let position = Position { term: TERM, seq: Seq(150) };
    let hello = Hello {
        protocol: ProtocolRange { min: 1, max: 1 },
        features: vec!["relay".into()],
        software: "0.1.0".into(),
        group: GroupHello { id: GroupId([1; 16]), name: "db".into() },
        ancestry: ancestry.clone(),
        volumes: vec![volume],
        acked: position,
        ceiling: Seq(1 << 20),
        map_generation: 7,
    };
    let welcome = Welcome {
        protocol: 1,
        features: Vec::new(),
        software: "0.1.0".into(),
        position: Some(position),
        path: ancestry.until(position),
        map_generation: 6,
        volumes: vec![VolumeSize { id: VolumeId(1), sectors: 2048 }],
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
    let target = [
        Message::Welcome(welcome),
        Message::Ack(ack),
        Message::Need(need),
        Message::Echo(Echo { number: 1, received_wall_ns: -2 }),
        Message::LeaseAsk(LeaseAsk { number: 1 }),
        Message::Notice(Notice::new(Severity::Warning, "a disk is slow")),
        Message::Refuse(Refuse::new(RefuseCode::SizeMismatch, "no")),
    ];
    for (name, messages) in [("source", &source[..]), ("target", &target[..])] {
        let mut bytes = vec![255];
        for message in messages {
            message.encode(&mut bytes).expect("messages of bounded length");
        }
        put("link", name, &bytes)?;
    }
    Ok(())
}

fn nbd() -> std::io::Result<()> {
    let mut haggling = BytesMut::new();
    haggling.put_u8(0);
    haggling.put_u32(3);
    let put_option = |out: &mut BytesMut, number, data: &[u8]| {
        OptionHeader { option: number, length: data.len() as u32 }.encode(out);
        out.put_slice(data);
    };
    put_option(&mut haggling, option::STRUCTURED_REPLY, &[]);
    put_option(&mut haggling, option::LIST, &[]);
    let mut data = BytesMut::new();
    MetaContextRequest { name: "disk".into(), queries: vec![BASE_ALLOCATION.into()] }
        .encode(&mut data);
    put_option(&mut haggling, option::SET_META_CONTEXT, &data);
    let mut data = BytesMut::new();
    InfoRequest { name: "disk".into(), wanted: vec![1, 2, 3] }.encode(&mut data);
    put_option(&mut haggling, option::INFO, &data);
    put_option(&mut haggling, option::GO, &data);
    let mut requests = BytesMut::new();
    let all = [
        (Command::Read, 0),
        (Command::Write, 1),
        (Command::Flush, 0),
        (Command::Trim, 0),
        (Command::Cache, 0),
        (Command::WriteZeroes, 2),
        (Command::BlockStatus, 8),
        (Command::Disconnect, 0),
    ];
    for (number, (command, flags)) in all.into_iter().enumerate() {
        let length = if matches!(command, Command::Flush | Command::Disconnect) { 0 } else { 512 };
        Request { flags, command, cookie: number as u64, offset: length.into(), length }
            .encode(&mut requests);
        if command == Command::Write {
            requests.put_slice(&[0x5a; 512]);
        }
    }
    haggling.put_slice(&requests);
    put("nbd", "options-and-requests", &haggling)?;
    let mut bare = BytesMut::new();
    bare.put_u8(0);
    bare.put_u32(1);
    put_option(&mut bare, option::EXPORT_NAME, b"disk");
    bare.put_slice(&requests);
    put("nbd", "export-name", &bare)?;
    put("nbd", "entered", &[&[1], &requests[..]].concat())
}

fn config() -> std::io::Result<()> {
    let node = "\0node = \"db1\"\nstate_dir = \"/var/lib/tidemark/agent\"\n";
    put("config", "node", node.as_bytes())?;
    put("config", "group", concat!("\x01", include_str!("group.toml")).as_bytes())?;
    put("config", "target", concat!("\x02", include_str!("target.toml")).as_bytes())
}

fn state(frames: &[Vec<u8>]) -> std::io::Result<()> {
    let position = Position { term: TERM, seq: Seq(50) };
    let block = GroupState {
        group: GroupId([1; 16]),
        map_id: MAP_ID,
        term: TERM,
        ceiling: Seq(1000),
        time_ceiling_ns: 5,
        acked: position,
        generation: 8,
        clean: Some(Seq(90)),
        ring: 11,
        spooled: position,
    };
    put("state", "block", &[&[0], &block.encode(3)[..168]].concat())?;
    let mut set = ActiveSet::new(MAP_ID, 0);
    set.replace(3, Some(RegionId { volume: VolumeId(1), index: 9 }));
    let mut log = vec![1];
    log.resize(1 + 3 * 4096, 0);
    for _ in 0..2 {
        let (at, block) = set.transaction(&[3]);
        log[1 + at as usize..][..4096].copy_from_slice(&block);
    }
    put("state", "log", &log)?;
    let mut bits = bitmap::Bits::new(100);
    bits.set(42);
    let (_, page) = bitmap::encode(MAP_ID, 0, 7, 0, [&bits, &bits], &bits);
    put("state", "map", &[&[2], &page[..]].concat())?;
    let ancestry = Ancestry::root(TermId([2; 16])).fork(TERM, Seq(100)).expect("a path");
    json("terms", 3, &ancestry)?;
    let term = *ancestry.current();
    let group = GroupRow { id: GroupId([1; 16]), node: "db1".into(), ancestry, created_ns: 3 };
    json("group", 4, &group)?;
    let mut history = History::default();
    history.announce(&[VolumeHello {
        id: VolumeId(1),
        name: "data".into(),
        sectors: 2048,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
    }]);
    for frame in frames {
        history.extend(&FrameView::parse(frame).expect("a frame of one's own"));
    }
    json("history", 5, &HistoryRow { history, ..HistoryRow::default() })?;
    json("vitals", 6, &Vitals { acked: position, ..Vitals::default() })?;
    let branch = BranchRow {
        term,
        volume: Some("data".into()),
        point: "@mark:before".into(),
        temporary: true,
        damage: None,
        created_ns: 4,
    };
    json("branch", 7, &branch)
}

fn json(name: &str, which: u8, row: &impl serde::Serialize) -> std::io::Result<()> {
    put("state", name, &[&[which][..], &serde_json::to_vec(row)?].concat())
}

/// Patches that make a ring of two slots with payload and a frame.
fn ring(frame: &[u8]) -> std::io::Result<()> {
    let mut patches = Vec::new();
    let mut patch = |at: u64, content: &[u8]| {
        for (index, part) in content.chunks(255).enumerate() {
            let place = (at + index as u64 * 255).to_le_bytes();
            patches.extend_from_slice(&place[..3]);
            patches.push(part.len() as u8);
            patches.extend_from_slice(part);
        }
    };
    let words =
        |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    // Counters: reserved, encoded, freed; end and start of the frames; last sequence in a frame.
    patch(112, &words(&[3, 1, 0, frame.len() as u64, 0, 111]));
    let slots = [(7, 111, 0), (3, 112, 512), (1, 113, 1024)];
    for (slot, (state, seq, data_at)) in slots.into_iter().enumerate() {
        let mut fields = words(&[state, seq, seq * 1_000_000, 8]);
        fields.extend_from_slice(&[1, 0, 0, 0, 1, 0, Kind::Write as u8, 0]);
        fields.extend_from_slice(&words(&[data_at, 512, data_at + 512]));
        patch(20480 + slot as u64 * 64, &fields);
    }
    patch(20480 + 256 * 64 + (32 << 10), frame);
    put("ring", "two-slots-and-a-frame", &patches)
}
