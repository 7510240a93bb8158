//! Writes the seed corpus: one sound value of each kind, from the encoders of the project itself.
//!
//! `cargo run --bin seeds` in this directory; what it writes is kept in the repository.

use std::fs;
use std::path::Path;

use tidemark_journal::record::flag;
use tidemark_journal::segment::{BLOCK_BYTES, SegmentEnd, SegmentStart, padding};
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, FrameView, GapReason, GroupId, Kind, Position, Record,
    Sector, Seq, TermId, VolumeId,
};
use tidemark_target::store::index::{MemoryIndex, sealed};

mod disk;
mod link;
mod nbd;
mod state;

const GROUP: GroupId = GroupId([1; 16]);
const TERM: TermId = TermId([7; 16]);
const VOLUME: VolumeId = VolumeId(1);

fn main() -> std::io::Result<()> {
    let frames = [frame(Compression::Off, 100), frame(Compression::Zstd(3), 111)];
    for (name, frame) in ["raw", "zstd"].iter().zip(&frames) {
        put("frame", name, frame)?;
    }
    let start = SegmentStart {
        number: 1,
        group: GROUP,
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
    batches.resize(batches.len().next_multiple_of(BLOCK_BYTES as usize), 0);
    let (header, index) = (start.encode(), index(&frames));
    put("index", "two-frames", &index)?;
    let unsealed = [&header[..], &batches].concat();
    put("spool", "two-frames", &unsealed)?;
    put("log", "unsealed", &[&[11], &unsealed[..]].concat())?;
    let end =
        SegmentEnd { index_at: unsealed.len() as u64, index_bytes: index.len() as u64, ..end };
    put("log", "sealed", &[&[22], &unsealed[..], &index, &end.encode()].concat())?;
    config()?;
    link::put_all(&frames[0])?;
    nbd::put_all()?;
    state::put_all(&frames)?;
    disk::put_all(&frames[0])
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
    let about = FrameMeta { group: GROUP, term: TERM, before, wall_ns: 1_800_000_000 };
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

fn config() -> std::io::Result<()> {
    let node = "\0node = \"db1\"\nstate_dir = \"/var/lib/tidemark/agent\"\n";
    put("config", "node", node.as_bytes())?;
    put("config", "group", concat!("\x01", include_str!("group.toml")).as_bytes())?;
    put("config", "target", concat!("\x02", include_str!("target.toml")).as_bytes())?;
    put("config", "point", b"\x03shop/root@2026-11-23T09:59:30.25Z")
}
