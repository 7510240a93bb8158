//! Random records and the frames made of them.

use proptest::{collection::vec, prelude::*};
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, GapReason, GroupId, Kind, Position, Record, Sector, Seq,
    TermId, VolumeId,
    record::{MARK_ID_BYTES, flag},
};

pub const GROUP: GroupId = GroupId([0x61; 16]);
pub const TERM: TermId = TermId([0x74; 16]);

/// A record with its payload.
pub type Item = (Record, Vec<u8>);

/// What goes into one frame.
#[derive(Clone, Debug)]
pub struct Content {
    pub items: Vec<Item>,
    pub before: Position,
    pub wall_ns: i64,
    pub compression: Compression,
}

impl Content {
    pub fn first(&self) -> &Record {
        &self.items[0].0
    }

    pub fn last_seq(&self) -> Seq {
        self.items[self.items.len() - 1].0.seq
    }

    /// The frame's bytes. Payloads are pushed in two pieces.
    pub fn encode(&self) -> Vec<u8> {
        let mut builder = FrameBuilder::new(self.compression);
        for (record, payload) in &self.items {
            let (head, tail) = payload.split_at(payload.len() / 3);
            builder.push(record, [head, tail]);
        }
        let about =
            FrameMeta { group: GROUP, term: TERM, before: self.before, wall_ns: self.wall_ns };
        builder.finish(&about).to_vec()
    }
}

/// A payload that compresses by how much `seed` says.
pub fn payload(bytes: u64, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..bytes)
        .map(|n| {
            if seed.is_multiple_of(3) {
                (n / 97) as u8
            } else {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            }
        })
        .collect()
}

/// Records as a source would write them: going up in sequence and time, none contradicting itself.
pub fn content(records: usize, sectors_max: u32) -> impl Strategy<Value = Content> {
    let before = (0..Seq::MAX.0 / 2).prop_map(|seq| Position { term: TERM, seq: Seq(seq) });
    let compression = prop_oneof![Just(Compression::Off), Just(Compression::Zstd(1))];
    let time_ns = 0..u64::MAX >> 2;
    let items = vec((one(sectors_max), 1..1000u64, 0..10_000_000u64), 1..records);
    (before, compression, any::<i64>(), time_ns, items).prop_map(
        |(before, compression, wall_ns, mut time_ns, items)| {
            let mut seq = before.seq;
            let items = items
                .into_iter()
                .map(|((record, payload), step, later_ns)| {
                    seq = Seq(seq.0 + step);
                    time_ns += later_ns;
                    (Record { seq, time_ns, ..record }, payload)
                })
                .collect();
            Content { items, before, wall_ns: wall_ns >> 2, compression }
        },
    )
}

fn one(sectors_max: u32) -> impl Strategy<Value = Item> {
    let region = 2048u64;
    let place = (0..(1u64 << 48) / region, 0..region, 1..=sectors_max);
    (0..Kind::ALL.len(), any::<u16>(), any::<u64>(), place).prop_map(
        move |(kind, volume, seed, (number, offset, sectors))| {
            let kind = Kind::ALL[kind];
            let mut record = Record {
                kind,
                flags: 0,
                volume: VolumeId(volume),
                seq: Seq::ZERO,
                time_ns: 0,
                start: Sector(number * region + offset),
                sectors: sectors.min((region - offset) as u32),
            };
            match kind {
                Kind::Write => record.flags = (seed as u8) & flag::FUA,
                Kind::Sync => record.flags = (seed as u8) & flag::ZEROS,
                Kind::Zero | Kind::Discard => record.flags = (seed as u8) & flag::UNMAP,
                Kind::Offer | Kind::Unreadable => {}
                Kind::Mark => {
                    (record.volume, record.start) = (VolumeId(0), Sector(0));
                    record.sectors = MARK_ID_BYTES as u32 + 1 + seed as u32 % 255;
                }
                Kind::GapBegin => {
                    record.flags = GapReason::Crash as u8;
                    (record.start, record.sectors) = (Sector(0), 0);
                }
                Kind::Resize => (record.start.0, record.sectors) = (record.start.0 + 1, 0),
                Kind::Flush | Kind::GapEnd | Kind::Void => {
                    (record.start, record.sectors) = (Sector(0), 0);
                }
            }
            (record, payload(record.payload_bytes(), seed))
        },
    )
}
