//! What lies in a source's state directory and in a target's catalogue.

use tidemark_agent::dirty::{RegionId, active::ActiveSet, bitmap};
use tidemark_agent::state::{block::GroupState, leases};
use tidemark_fuzz::patch;
use tidemark_journal::{Ancestry, FrameView, Position, Seq, TermId};
use tidemark_link::lease::LEASE;
use tidemark_link::message::VolumeHello;
use tidemark_target::catalogue::{BranchRow, GroupRow, HistoryRow, Vitals};
use tidemark_target::damage::{DamageRow, Extent, Place, Spot};
use tidemark_target::history::History;
use tidemark_target::scrub::{Cursor, Pass, ScrubRow};

use crate::{GROUP, TERM, VOLUME, put};

const MAP_ID: [u8; 16] = *b"map-id-of-16-byt";

/// A value of each kind, with its number in front.
pub fn put_all(frames: &[Vec<u8>]) -> std::io::Result<()> {
    let position = Position { term: TERM, seq: Seq(50) };
    let block = GroupState {
        group: GROUP,
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
    set.replace(3, Some(RegionId { volume: VOLUME, index: 9 }));
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
    let group = GroupRow { id: GROUP, node: "db1".into(), ancestry, created_ns: 3 };
    json("group", 4, &group)?;
    let mut history = History::default();
    history.announce(&[VolumeHello {
        id: VOLUME,
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
    json("branch", 7, &branch)?;
    json("damage", 8, &damage())?;
    let at = Cursor::Base { volume: VOLUME, unit: 7 };
    let pass = Some(Pass { started_wall_ns: 1, bytes: 2, found: 3, at });
    json("scrub", 9, &ScrubRow { pass, ..ScrubRow::default() })?;
    put("state", "disks", &[&[10], DISKS.as_bytes()].concat())?;
    put("state", "verify", &[&[11], VERIFY.as_bytes()].concat())?;
    put("state", "leases", &[&[12], &leases::encode(GROUP, LEASE)[..]].concat())?;
    // The places are those of the target `opening`: state, map, leases, log.
    let terms = serde_json::to_vec(&group.ancestry)?;
    let mut all = (terms.len() as u16).to_le_bytes().to_vec();
    all.extend_from_slice(&terms);
    let block = GroupState { clean: None, spooled: Position::default(), ..block };
    all.extend(patch(4096, &block.encode(3)[..136]));
    all.extend(patch(8192, &page));
    all.extend(patch(16384, &leases::encode(GROUP, LEASE)));
    all.extend(patch(16424, &log[1..]));
    put("opening", "crashed", &all)
}

const DISKS: &str = concat!(
    r#"{"version":1,"group":"01010101010101010101010101010101","doubt":"why","disks":["#,
    r#"{"volume":1,"sectors":64,"facts":{"image":{"inode":7,"born_ns":9}},"rest":null}]}"#
);

const VERIFY: &str = concat!(
    r#"{"version":1,"since_wall_ns":5,"last":{"begun_wall_ns":1,"ended_wall_ns":2,"#,
    r#""differing_blocks":3},"under_way":{"begun_wall_ns":6,"differing_blocks":7,"whole":true,"#,
    r#""reached":[[1,8]]}}"#
);

fn damage() -> DamageRow {
    let place = Place::Base { volume: VOLUME, first: 3, blocks: 2 };
    let extent = Extent { volume: VOLUME, start: 24, end: 40, from: Seq(1), until: Some(Seq(9)) };
    let text = "damaged".to_owned();
    let spots = vec![Spot { place, text, found_wall_ns: 5, extents: vec![extent] }];
    DamageRow { spots, unlisted: 0 }
}

fn json(name: &str, which: u8, row: &impl serde::Serialize) -> std::io::Result<()> {
    put("state", name, &[&[which][..], &serde_json::to_vec(row)?].concat())
}
