//! The ring against a plain queue.

use std::{collections::VecDeque, sync::Arc};

use proptest::prelude::*;
use tidemark_journal::{
    GapReason, GroupId, Kind, Record, Sector, Seq, TermId, VolumeId, checksum::crc64, record::flag,
};

use super::super::{
    gap::Gap,
    ring::{
        About, HEADER_BYTES, Layout, RingMemory, RingReader, RingWriter, SLOTS_RESERVED, SlotRef,
    },
};
use crate::{clock::JournalClock, dirty::tests::random::Random};

fn memory(slots: u64, data_bytes: u64) -> Arc<RingMemory> {
    let frame_bytes = 8192 - (slots * 64 + data_bytes) % 4096;
    let layout = Layout { slots, data_bytes, frame_bytes };
    RingMemory::plain(layout, &[])
}

fn record(kind: Kind, seq: u64, sectors: u32) -> Record {
    let (volume, start) = (VolumeId(seq as u16), Sector(seq * 8));
    Record { kind, flags: flag::FUA, volume, seq: Seq(seq), time_ns: seq * 10, start, sectors }
}

/// The payload of a record, which says whose it is all over.
fn payload(seq: u64, bytes: u64) -> Vec<u8> {
    (0..bytes).map(|at| (seq.wrapping_mul(31).wrapping_add(at / 7)) as u8).collect()
}

#[test]
fn the_bytes_of_the_header_the_volumes_and_a_slot() {
    let layout = Layout { slots: 128, data_bytes: 1 << 20, frame_bytes: 4096 };
    let clock = JournalClock::going_on(0x0506, 0x0708).expect("the machine runs for longer");
    let memory = RingMemory::create(
        &About {
            group: GroupId(*b"0123456789abcdef"),
            id: 0x1122_3344,
            clock,
            volumes: vec![(VolumeId(0x0304), 0x0901), (VolumeId(7), 0x0902)],
        },
        layout,
    )
    .expect("a ring");
    let bytes = |at, count| {
        let mut bytes = vec![0; count];
        memory.region().copy_out(at, &mut bytes).unwrap();
        bytes
    };
    let mut fixed = b"TMRING\0\x010123456789abcdef".to_vec();
    let words: [u64; 7] = [0x1122_3344, 128, 1 << 20, 4096, 0x0506, 0x0708, 2];
    fixed.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    fixed.extend(crc64(&fixed).to_le_bytes());
    assert_eq!(bytes(0, 88), fixed);
    assert_eq!(bytes(88, 72), [0; 72], "nobody may inherit it yet");

    let write = Record {
        kind: Kind::Write,
        flags: 1,
        volume: VolumeId(0x0102),
        seq: Seq(0x0a0b),
        time_ns: 0x0c0d,
        start: Sector(0x0e0f),
        sectors: 3,
    };
    let mut writer = RingWriter::new(memory.clone());
    assert!(writer.has_room(1536, false));
    let first = writer.reserve(&write, false);
    writer.commit(first);
    assert!(writer.has_room(1536, false));
    let second = writer.reserve(&write, false);
    memory.begin_term(TermId([9; 16]), Seq(0x0a0a));
    memory.set_flush_failed(1, true);
    memory.set_gap(1, Some(Gap { reason: GapReason::Overflow, begun: true }));

    let mut words = vec![9; 16];
    // May be continued; reserved, encoded, freed; the frames' end and start; in frames.
    words.extend([1u64, 2, 0, 0, 0, 0, 0x0a0a].iter().flat_map(|word| word.to_le_bytes()));
    assert_eq!(bytes(88, 72), words);
    let rows = [0x04, 3, 0, 0, 0, 0, 0, 0, 1, 9, 0, 0, 0, 0, 0, 0, 7, 0, 2, 1, 1, 0, 0, 0, 2, 9];
    assert_eq!(bytes(4096, 26), rows);
    let mut slots = Vec::new();
    for (state, from) in [(3u64, 0u64), (1, 1536)] {
        let words = [state, 0x0a0b, 0x0c0d, 0x0e0f];
        slots.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        slots.extend_from_slice(&[3, 0, 0, 0, 0x02, 0x01, 1, 1]);
        slots.extend([from, 1536, from + 1536].iter().flat_map(|word| word.to_le_bytes()));
    }
    assert_eq!(HEADER_BYTES, 20480);
    assert_eq!(bytes(HEADER_BYTES, 128), slots);
    writer.local_failed(first);
    assert_eq!(bytes(HEADER_BYTES, 1), [11]);
    writer.local_done(first);
    assert_eq!(bytes(HEADER_BYTES, 1), [15]);
    assert_eq!(second.payload_at, HEADER_BYTES + 128 * 64 + 1536);
    assert_eq!(second.slot, 1);
}

#[test]
fn the_last_slots_are_for_what_is_about_the_ring() {
    let mut writer = RingWriter::new(memory(70, 1 << 20));
    let mut seq = 0;
    let mut fill = |writer: &mut RingWriter, about_ring| {
        let mut taken = 0;
        while writer.has_room(0, about_ring) {
            seq += 1;
            writer.reserve(&record(Kind::Flush, seq, 0), about_ring);
            taken += 1;
        }
        taken
    };
    assert_eq!(fill(&mut writer, false), 70 - SLOTS_RESERVED);
    assert_eq!(fill(&mut writer, true), SLOTS_RESERVED);
    assert_eq!(writer.fill_permille(), 1000);
}

#[test]
fn a_ring_of_any_size_has_room_for_the_longest_content() {
    for mib in [16u64, 17, 100, 1000] {
        let layout = Layout::of(mib << 20);
        assert!(layout.total_bytes() <= mib << 20);
        assert!(layout.total_bytes().is_multiple_of(4096));
        // Catch-up begins a read of 1 MiB below three tenths; less than that again may be skipped.
        assert!(layout.data_bytes * 3 / 10 + (2 << 20) <= layout.data_bytes);
    }
}

/// A reserved slot of the model: committed, void, through on the local disk.
struct Reserved {
    slot: SlotRef,
    record: Record,
    committed: bool,
    local_done: bool,
    encoded: bool,
}

/// One step of the test: what to do, and a number to do it with.
type Step = (u8, u64);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((0u8..10, any::<u64>()), 1..400)
}

/// Any calls in any order that the rules allow, against a queue that keeps every byte.
fn against_a_queue(slots: u64, data_sectors: u64, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let memory = memory(slots, data_sectors * 512);
    let (mut writer, mut reader) =
        (RingWriter::new(memory.clone()), RingReader::new(memory.clone()));
    let mut live: VecDeque<Reserved> = VecDeque::new();
    let (mut seq, mut taken) = (0, 0);
    for (what, number) in steps {
        let open = |done: &dyn Fn(&Reserved) -> bool| -> Vec<usize> {
            (0..live.len()).filter(|at| !done(&live[*at])).collect()
        };
        match what {
            0..4 => {
                let kind = [Kind::Write, Kind::Write, Kind::Flush, Kind::Mark][what as usize];
                let sectors = match kind {
                    Kind::Write => 1 + (number % data_sectors) as u32,
                    Kind::Mark => 17 + (number % 200) as u32,
                    _ => 0,
                };
                let about_ring = kind != Kind::Write;
                let record = record(kind, seq + 1, sectors);
                let bytes = record.payload_bytes();
                if !writer.has_room(bytes, about_ring) {
                    let through = |live: &Reserved| live.encoded && live.local_done;
                    let held = live.len() - live.iter().take_while(|live| through(live)).count();
                    let slots = if about_ring { slots } else { slots - SLOTS_RESERVED };
                    // With nothing in use, a place's worth may still be skipped at the end.
                    let wanted = held > 0 || 2 * bytes > data_sectors * 512;
                    prop_assert!(wanted, "no room for {bytes} in an empty ring");
                    prop_assert!(bytes > 0 || held as u64 >= slots, "no slot beside {held}");
                    continue;
                }
                seq += 1;
                let slot = writer.reserve(&record, about_ring);
                memory.region().copy_in(slot.payload_at, &payload(seq, bytes)).unwrap();
                let end = slot.payload_at + bytes;
                prop_assert!(end <= memory.layout().frames_at());
                prop_assert!(slot.payload_at >= HEADER_BYTES + slots * 64);
                live.push_back(Reserved {
                    slot,
                    record,
                    committed: false,
                    local_done: false,
                    encoded: false,
                });
            }
            4..6 => {
                let open = open(&|live| live.committed);
                if let Some(at) = open.get(number as usize % open.len().max(1)) {
                    let live = &mut live[*at];
                    live.committed = true;
                    if number % 7 == 0 && live.record.kind == Kind::Write {
                        writer.make_void(live.slot);
                        live.local_done = true;
                        let Record { volume, seq, time_ns, start, .. } = live.record;
                        let (kind, flags, sectors) = (Kind::Void, 0, 0);
                        live.record = Record { kind, flags, volume, seq, time_ns, start, sectors };
                    } else {
                        writer.commit(live.slot);
                    }
                }
            }
            6 => {
                let open = open(&|live| live.local_done || !live.committed);
                if let Some(at) = open.get(number as usize % open.len().max(1)) {
                    writer.local_done(live[*at].slot);
                    live[*at].local_done = true;
                }
            }
            7 => {
                writer.collect();
                while live.front().is_some_and(|live| live.encoded && live.local_done) {
                    live.pop_front();
                }
            }
            8 => {
                let next = live.iter().find(|live| live.slot.slot == taken);
                let ready = next.is_some_and(|next| next.committed);
                prop_assert_eq!(reader.has_more(), ready);
                let mut same = true;
                let refuse = number % 5 == 0;
                let took = reader.take(|record, bytes| {
                    let next = next.expect("nothing was reserved");
                    same = *record == next.record
                        && *bytes == payload(record.seq.0, record.payload_bytes());
                    !refuse
                });
                prop_assert!(same, "not the record and the bytes that were put in");
                prop_assert_eq!(took, ready && !refuse);
                taken += u64::from(took);
            }
            _ => {
                reader.encoded();
                live.iter_mut().for_each(|live| live.encoded = live.slot.slot < taken);
                prop_assert_eq!(writer.is_drained(), taken == seq);
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn it_behaves_like_a_queue_of_few_slots(steps in steps()) {
        against_a_queue(SLOTS_RESERVED + 5, 4096, steps)?;
    }

    #[test]
    fn it_behaves_like_a_queue_of_few_bytes(steps in steps()) {
        against_a_queue(SLOTS_RESERVED + 200, 16, steps)?;
    }
}

/// Both ends at once, over many rounds of the ring.
#[test]
fn two_threads_see_the_same_records() {
    const RECORDS: u64 = 30_000;
    let memory = memory(SLOTS_RESERVED + 20, 64 * 512);
    let mut reader = RingReader::new(memory.clone());
    let encoder = std::thread::spawn(move || {
        let mut random = Random::new(1);
        let mut next = 1;
        while next <= RECORDS {
            let took = reader.take(|record, bytes| {
                assert_eq!(record.seq, Seq(next), "out of order");
                let kind = if record.seq.0 % 11 == 0 { Kind::Void } else { Kind::Write };
                assert_eq!(record.kind, kind);
                assert_eq!(bytes, payload(next, record.payload_bytes()));
                true
            });
            if took {
                next += 1;
            } else {
                std::thread::yield_now();
            }
            if !took || random.percent(30) {
                reader.encoded();
            }
        }
        reader.encoded();
    });
    let mut writer = RingWriter::new(memory.clone());
    let mut random = Random::new(2);
    let (mut seq, mut copying, mut writing) = (0, Vec::new(), Vec::new());
    while seq < RECORDS || !copying.is_empty() || !writing.is_empty() {
        let sectors = 1 + random.below(5) as u32;
        if seq < RECORDS && random.percent(50) && writer.has_room(u64::from(sectors) * 512, false) {
            seq += 1;
            copying.push((seq, writer.reserve(&record(Kind::Write, seq, sectors), false)));
        } else if random.percent(60)
            && let Some((seq, slot)) = random.take(&mut copying)
        {
            if seq % 11 == 0 {
                writer.make_void(slot);
            } else {
                let bytes = payload(seq, slot.payload_bytes);
                memory.region().copy_in(slot.payload_at, &bytes).unwrap();
                writer.commit(slot);
                writing.push(slot);
            }
        } else if let Some(slot) = random.take(&mut writing) {
            writer.local_done(slot);
        } else {
            writer.collect();
            std::thread::yield_now();
        }
    }
    encoder.join().unwrap();
    writer.collect();
    assert!(writer.is_drained());
    assert_eq!(writer.fill_permille(), 0);
}
