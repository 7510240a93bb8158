//! What was written comes back.

use proptest::prelude::*;
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, FramePlan, FrameView, FrameWriter, Kind, Position,
    Record, Sector, Seq, VolumeId,
    chunk::CHUNK_BYTES_MAX,
    dump,
    encode::EncodedFrame,
    frame::{FrameHeader, HEADER_BYTES, RECORDS_MAX},
};

use crate::random::{Content, GROUP, TERM, content, payload};

/// A record's time as a reader sees it: whole microseconds after the frame's first record.
fn read_time(record: &Record, first: &Record) -> u64 {
    first.time_ns + (record.time_ns - first.time_ns) / 1000 * 1000
}

/// Checks that `bytes` read as `content` in every way there is.
pub fn assert_reads_as(bytes: &[u8], content: &Content) {
    assert_eq!(FrameHeader::peek(bytes).unwrap().frame_bytes(), bytes.len());
    let view = FrameView::parse(bytes).unwrap();
    let first = content.first();
    assert_eq!(view.header().before(), content.before);
    assert_eq!(view.header().last(), Position { term: TERM, seq: content.last_seq() });
    assert_eq!(view.header().group(), GROUP);
    assert_eq!(view.records().len(), content.items.len());
    view.verify_chunks().unwrap();
    for (index, (record, (wanted, payload))) in view.records().zip(&content.items).enumerate() {
        assert_eq!(record, Record { time_ns: read_time(wanted, first), ..*wanted });
        assert_eq!(&view.payload(index).unwrap(), payload, "the payload of record {index}");
        assert_eq!(
            view.wall_ns(&record),
            content.wall_ns + i64::try_from(record.time_ns - first.time_ns).unwrap(),
        );
        let pieces: Vec<_> = view.pieces(index).collect();
        assert_eq!(pieces.iter().map(|piece| piece.bytes).sum::<usize>(), payload.len());
        if payload.len() <= CHUNK_BYTES_MAX {
            assert!(pieces.len() <= 1, "a small payload lies in one chunk");
        }
    }
    let raw: u64 = view.table().iter().map(|entry| u64::from(entry.raw_bytes.get())).sum();
    assert_eq!(raw, content.items.iter().map(|(_, payload)| payload.len() as u64).sum::<u64>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn small_records_come_back(content in content(200, 16)) {
        assert_reads_as(&content.encode(), &content);
    }

    #[test]
    fn large_records_come_back(content in content(8, 2048)) {
        assert_reads_as(&content.encode(), &content);
    }

    #[test]
    fn bytes_after_the_frame_do_not_matter(content in content(5, 8), after in any::<[u8; 9]>()) {
        let mut bytes = content.encode();
        let length = bytes.len();
        bytes.extend(after);
        let view = FrameView::parse(&bytes).unwrap();
        prop_assert_eq!(view.bytes().len(), length);
        view.verify_chunks().unwrap();
    }

    #[test]
    fn the_meta_alone_tells_everything_but_payloads(content in content(20, 8)) {
        let bytes = content.encode();
        let meta = FrameHeader::peek(&bytes).unwrap().meta_bytes.get() as usize;
        let view = FrameView::parse_meta(&bytes[..meta]).unwrap();
        let whole = FrameView::parse(&bytes).unwrap();
        prop_assert!(view.records().eq(whole.records()));
        for index in 0..content.items.len() {
            prop_assert!(view.pieces(index).eq(whole.pieces(index)));
            let has_payload = whole.pieces(index).next().is_some();
            prop_assert_eq!(view.payload(index).is_err(), has_payload);
        }
        prop_assert_eq!(view.verify_chunks().is_err(), !whole.table().is_empty());
    }

    #[test]
    fn a_dump_has_a_line_for_each_record(content in content(50, 8)) {
        let bytes = content.encode();
        let mut text = String::new();
        dump::frame(&mut text, &FrameView::parse(&bytes).unwrap()).unwrap();
        prop_assert_eq!(text.lines().count(), 1 + content.items.len());
        for (line, (record, _)) in text.lines().skip(1).zip(&content.items) {
            prop_assert!(line.contains(record.kind.name()) && line.contains(&record.seq.to_string()));
        }
    }
}

fn write(seq: u64, sectors: u32) -> Record {
    Record {
        kind: Kind::Write,
        flags: 0,
        volume: VolumeId(1),
        seq: Seq(seq),
        time_ns: 0,
        start: Sector(0),
        sectors,
    }
}

const ABOUT: FrameMeta = FrameMeta {
    group: GROUP,
    term: TERM,
    before: Position { term: TERM, seq: Seq(0) },
    wall_ns: 0,
};

fn table_of(frame: &EncodedFrame<'_>) -> Vec<(u32, bool)> {
    let bytes = frame.to_vec();
    let view = FrameView::parse(&bytes).unwrap();
    view.table().iter().map(|entry| (entry.raw_bytes.get(), entry.codec == 1)).collect()
}

#[test]
fn chunks_are_filled_up_and_records_not_split_without_need() {
    let mut builder = FrameBuilder::new(Compression::Off);
    // 100 KiB, then 100 KiB: the second begins a chunk of its own. Then 1 KiB, which joins it, and
    // 300 KiB, which begins anew and fills three chunks.
    for (seq, sectors) in [(1, 200), (2, 200), (3, 2), (4, 600)] {
        let bytes = payload(u64::from(sectors) * 512, seq);
        builder.push(&write(seq, sectors), [&bytes[..]]);
    }
    let kib = |kib: u32| (kib << 10, false);
    let table = table_of(&builder.finish(&ABOUT));
    assert_eq!(table, [kib(100), kib(101), kib(128), kib(128), kib(44)]);
}

#[test]
fn a_chunk_is_stored_raw_unless_it_shrinks_by_a_sixteenth() {
    let mut builder = FrameBuilder::new(Compression::Zstd(1));
    let noise = payload(128 << 10, 1);
    builder.push(&write(1, 256), [&noise[..]]);
    let zeros = vec![0; 128 << 10];
    builder.push(&write(2, 256), [&zeros[..]]);
    // Noise with just so many zeros that it shrinks, but not enough.
    let mut mixed = noise.clone();
    mixed[..4096].fill(0);
    builder.push(&write(3, 256), [&mixed[..]]);
    let table = table_of(&builder.finish(&ABOUT));
    assert_eq!(table, [(128 << 10, false), (128 << 10, true), (128 << 10, false)]);
}

#[test]
fn what_shrinks_is_noticed_after_what_did_not() {
    let mut builder = FrameBuilder::new(Compression::Zstd(1));
    let noise = payload(128 << 10, 1);
    // Blocks of which the second half is empty, or the first.
    let emptied = |empty: &dyn Fn(usize) -> bool| -> Vec<u8> {
        let byte = |(at, byte): (usize, &u8)| if empty(at) { 0 } else { *byte };
        noise.iter().enumerate().map(byte).collect()
    };
    let ends = emptied(&|at| at % 4096 >= 2048);
    let begins = emptied(&|at| at % 4096 < 2048);
    let parts = [&noise, &noise, &ends, &noise, &begins, &noise, &noise];
    for (seq, part) in (1..).zip(parts) {
        builder.push(&write(seq, 256), [&part[..]]);
    }
    let shrunk: Vec<bool> =
        table_of(&builder.finish(&ABOUT)).iter().map(|(_, shrunk)| *shrunk).collect();
    assert_eq!(shrunk, [false, false, true, false, true, false, false]);
}

#[test]
fn a_builder_is_used_again() {
    let mut builder = FrameBuilder::new(Compression::Zstd(1));
    let mut frames = Vec::new();
    for _ in 0..2 {
        assert!(builder.is_empty());
        builder.push(&write(5, 8), [&[7; 4096][..]]);
        frames.push(builder.finish(&ABOUT).to_vec());
        builder.clear();
    }
    assert_eq!(frames[0], frames[1]);
}

#[test]
fn a_frame_takes_what_fits_and_no_more() {
    let mut builder = FrameBuilder::new(Compression::Off);
    let megabyte = vec![1; 1 << 20];
    let mut seq = 1;
    while builder.fits(&write(seq, 2048)) {
        builder.push(&write(seq, 2048), [&megabyte[..]]);
        seq += 1;
    }
    assert_eq!(builder.records(), 23, "24 MiB less the meta");
    let bytes = builder.finish(&ABOUT).to_vec();
    FrameView::parse(&bytes).unwrap().verify_chunks().unwrap();

    builder.clear();
    let flush = |seq| Record { kind: Kind::Flush, sectors: 0, ..write(seq, 0) };
    for seq in 1..=RECORDS_MAX as u64 {
        assert!(builder.fits(&flush(seq)));
        builder.push(&flush(seq), []);
    }
    assert!(!builder.fits(&flush(RECORDS_MAX as u64 + 1)));
    let bytes = builder.finish(&ABOUT).to_vec();
    assert_eq!(bytes.len(), HEADER_BYTES + 32 * RECORDS_MAX);
    assert_eq!(FrameView::parse(&bytes).unwrap().records().len(), RECORDS_MAX);

    builder.clear();
    builder.push(&flush(1), []);
    assert!(builder.fits(&flush(1 + u64::from(u32::MAX))));
    assert!(!builder.fits(&flush(2 + u64::from(u32::MAX))), "too far in sequence");
    let late = |time_ns| Record { time_ns, ..flush(2) };
    assert!(builder.fits(&late(u64::from(u32::MAX) * 1000 + 999)));
    assert!(!builder.fits(&late((u64::from(u32::MAX) + 1) * 1000)), "too far in time");
}

/// A plan for less room takes less; its first record comes in anyhow. What is written in place is what a builder makes.
#[test]
fn a_planned_frame_is_written_where_it_belongs() {
    const ROOM: usize = 300 << 10;
    for compression in [Compression::Off, Compression::Zstd(1)] {
        let mut plan = FramePlan::of_at_most(ROOM);
        let mut builder = FrameBuilder::new(compression);
        let mut payloads: Vec<Vec<u8>> = Vec::new();
        for seq in 1.. {
            let record = write(seq, (seq % 40) as u32 + 1);
            if !plan.fits(&record) {
                break;
            }
            plan.push(&record);
            payloads.push(vec![seq as u8; record.payload_bytes() as usize]);
            builder.push(&record, [payloads[payloads.len() - 1].as_slice()]);
            assert!(plan.frame_bytes_max() <= ROOM);
        }
        assert!(plan.frame_bytes_max() > ROOM - (40 << 10));
        // In pieces that have nothing to do with records or chunks.
        let whole = payloads.concat();
        let mut out = vec![0xee; ROOM];
        let bytes =
            FrameWriter::new(compression).write(&plan, &ABOUT, whole.chunks(7777), &mut out);
        assert_eq!(out[..bytes], *builder.finish(&ABOUT).bytes);
        assert_eq!(bytes == plan.frame_bytes_max(), compression == Compression::Off);

        plan.clear();
        plan.push(&write(1, 2048));
        assert!(plan.frame_bytes_max() > ROOM);
        assert!(!plan.fits(&write(2, 1)));
    }
}
