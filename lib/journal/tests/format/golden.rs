//! The bytes of the format, pinned. A change here is another format: raise its version.
//!
//! The expected bytes were put together from the tables in the documentation by another program,
//! with a checksum and a hash of its own.

use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, FrameView, GapReason, GroupId, Kind, Position, Record,
    Sector, Seq, TermId, VolumeId,
    chunk::{ChunkEntry, ChunkError, Codec},
    record::flag,
    segment::{SegmentEnd, SegmentStart},
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compares `bytes` with lines of hex, each with what it holds after a '#'.
fn assert_bytes(bytes: &[u8], lines: &str) {
    let mut at = 0;
    for line in lines.lines() {
        let (digits, what) = line.split_once('#').unwrap_or((line, ""));
        let digits: String = digits.split_whitespace().collect();
        let end = at + digits.len() / 2;
        assert_eq!(hex(&bytes[at..end]), digits, "at byte {at}:{what}");
        at = end;
    }
    assert_eq!(at, bytes.len(), "bytes in all");
}

fn record(kind: Kind, seq: u64, time_ns: u64, start: u64, sectors: u32) -> Record {
    let volume = VolumeId(if kind == Kind::Mark { 0 } else { 0x0201 });
    Record { kind, flags: 0, volume, seq: Seq(seq), time_ns, start: Sector(start), sectors }
}

fn frame() -> Vec<u8> {
    let mut builder = FrameBuilder::new(Compression::Off);
    let base = 1_000_000_000_000;
    let write = Record { flags: flag::FUA, ..record(Kind::Write, 1001, base, 0x0102_0304_0506, 1) };
    builder.push(&write, [&[0xa5; 512][..]]);
    builder.push(&record(Kind::Flush, 1002, base + 1_999, 0, 0), []);
    let mark = [&[0xee; 16][..], b"before upgrade"];
    builder.push(&record(Kind::Mark, 1003, base + 2_000, 0, 30), mark);
    let zero = Record { flags: flag::UNMAP, ..record(Kind::Zero, 1004, base + 2_000, 64, 1 << 21) };
    builder.push(&zero, []);
    let reason = GapReason::Overflow as u8;
    let gap = Record { flags: reason, ..record(Kind::GapBegin, 1010, base + 5_000_000, 0, 0) };
    builder.push(&gap, []);
    builder.push(&record(Kind::Offer, 1011, base + 5_000_000, 2048, 9), [&[0xcc; 32][..]]);
    let about = FrameMeta {
        group: GroupId(*b"group-id-of-16-b"),
        term: TermId(*b"term-id-of-16-by"),
        before: Position { term: TermId(*b"term-before-of16"), seq: Seq(1000) },
        wall_ns: 1_800_000_000_000_000_000,
    };
    builder.finish(&about).to_vec()
}

#[test]
fn a_frame() {
    let payload = format!(
        "{} # the write\n{} 6265666f72652075706772616465 # the mark\n{} # the offer",
        "a5".repeat(512),
        "ee".repeat(16),
        "cc".repeat(32),
    );
    let meta = include_str!("golden-frame.txt");
    assert_bytes(&frame(), &format!("{meta}{payload}"));
    let bytes = frame();
    FrameView::parse(&bytes).unwrap().verify_chunks().unwrap();
}

#[test]
fn the_numbers_of_the_kinds() {
    let numbers: Vec<_> = Kind::ALL.iter().map(|kind| (*kind as u8, kind.name())).collect();
    assert_eq!(
        numbers,
        [
            (1, "write"),
            (2, "zero"),
            (3, "discard"),
            (4, "flush"),
            (5, "mark"),
            (6, "resize"),
            (7, "sync"),
            (8, "offer"),
            (9, "gap-begin"),
            (10, "gap-end"),
            (11, "unreadable"),
            (12, "void"),
        ]
    );
    for kind in Kind::ALL {
        assert_eq!(Kind::from_u8(kind as u8), Some(kind));
    }
    assert_eq!((Kind::from_u8(0), Kind::from_u8(13)), (None, None));
    let reasons = [
        (1, GapReason::FirstSync),
        (2, GapReason::Overflow),
        (3, GapReason::Crash),
        (4, GapReason::Doubt),
    ];
    for (number, reason) in reasons {
        assert_eq!(GapReason::from_u8(number), Some(reason));
    }
    assert_eq!((GapReason::from_u8(0), GapReason::from_u8(5)), (None, None));
    assert_eq!((flag::FUA, flag::ZEROS, flag::UNMAP), (1, 2, 4));
}

/// A compressed chunk is a zstd frame as any zstd makes it; this one is the command's.
#[test]
fn a_zstd_chunk() {
    let stored = [
        0x28, 0xb5, 0x2f, 0xfd, 0x64, 0x00, 0x0f, 0x7d, 0x00, 0x00, 0x40, 0x74, 0x69, 0x64, 0x65,
        0x6d, 0x61, 0x72, 0x6b, 0x01, 0x00, 0xf5, 0x9f, 0x5f, 0xb8, 0xb6, 0x20, 0xc8, 0x34,
    ];
    let entry = ChunkEntry {
        raw_bytes: 4096.into(),
        stored_bytes: 29.into(),
        codec: Codec::Zstd as u8,
        reserved: [0; 7],
        crc: 0xa395_235c_c350_0b17.into(),
        tag: [0; 16],
    };
    let mut raw = vec![1, 2, 3];
    entry.unpack(&stored, &mut raw).unwrap();
    assert_eq!(raw, b"tidemark".repeat(512));
    // Good bytes that unpack to another length than the table states.
    for wrong in [4095u32, 4097, 100_000] {
        let entry = ChunkEntry { raw_bytes: wrong.into(), ..entry };
        assert_eq!(entry.unpack(&stored, &mut raw), Err(ChunkError::Unpack), "{wrong}");
    }
}

#[test]
fn a_segment_header() {
    let start = SegmentStart {
        number: 0x0807_0605_0403_0201,
        group: GroupId(*b"group-id-of-16-b"),
        before: Position { term: TermId(*b"term-before-of16"), seq: Seq(1000) },
        created_ns: -2,
        chain_before: [0xab; 32],
    };
    let lines = format!(
        "{}{} # the rest of the block",
        include_str!("golden-segment-header.txt"),
        "00".repeat(4096 - 160)
    );
    assert_bytes(&start.encode(), &lines);
    assert_eq!(SegmentStart::decode(&start.encode()).unwrap(), start);
}

#[test]
fn a_segment_trailer() {
    let data_hash = [0x44; 32];
    let end = SegmentEnd {
        number: 0x0807_0605_0403_0201,
        index_at: 8192,
        index_bytes: 777,
        last: Position { term: TermId(*b"term-id-of-16-by"), seq: Seq(1011) },
        data_hash,
        chain: SegmentEnd::chain_hash(&[0xab; 32], &data_hash),
        index_crc: 0x1122_3344_5566_7788,
    };
    let lines = format!(
        "{}{} # the rest of the block",
        include_str!("golden-segment-trailer.txt"),
        "00".repeat(4096 - 192)
    );
    assert_bytes(&end.encode(), &lines);
    assert_eq!(SegmentEnd::decode(&end.encode()).unwrap(), end);
}
