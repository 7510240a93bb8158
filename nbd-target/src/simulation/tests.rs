use std::time::Instant;

use tidemark_journal::{
    Ancestry, Compression, FrameBuilder, FrameMeta, GroupId, Kind, Record, Sector, TermId, VolumeId,
};
use tidemark_link::message::{
    GroupHello, Heartbeat, ProtocolRange, REPAIR_FEATURE, RegionRun, VolumeHello,
};

use super::*;
use crate::{
    damage::{Extent, Place, Spot},
    store::base::BaseRow,
};

const GROUP: &str = "shop";
const VOLUME: VolumeId = VolumeId(0);
const TERM: TermId = TermId([1; 16]);
const WALL_NS: i64 = 1_795_424_400_000_000_000;

fn node() -> NodeName {
    "db1".parse().expect("a name")
}

fn start(disk: &SimDisk) -> SimTarget {
    let group = GroupConfig {
        name: GROUP.parse().expect("a name"),
        node: node(),
        readers: Vec::new(),
        branch_writers: Vec::new(),
        window: Seconds(3600),
        window_min: Seconds(1),
        size_max: Bytes(3 << 20),
    };
    let store = StoreConfig {
        segment: Bytes(1 << 20),
        page_cache: Bytes(64 << 10),
        chunk_cache: Bytes(512 << 10),
    };
    let config = SimConfig { groups: vec![group], store };
    SimTarget::start(&config, disk, 1, WALL_NS).expect("it starts")
}

/// A source that mends, with one volume of so many sectors, greets.
fn greet(target: &mut SimTarget, sectors: u64) {
    let hello = Hello {
        protocol: ProtocolRange::OWN,
        features: vec![REPAIR_FEATURE.to_owned()],
        software: "a played source".to_owned(),
        group: GroupHello { id: GroupId([7; 16]), name: GROUP.to_owned() },
        ancestry: Ancestry::root(TERM),
        volumes: vec![VolumeHello {
            id: VOLUME,
            name: "disk0".to_owned(),
            sectors,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
        }],
        acked: Position::default(),
        ceiling: Seq(1 << 40),
        map_generation: 0,
    };
    let answer = target.greet(&node(), hello);
    assert!(matches!(answer, Some(Message::Welcome(_))), "{answer:?}");
}

/// The source lives on for a while; what it is asked for meanwhile.
fn asked(target: &mut SimTarget, minutes: u64) -> Vec<RegionRun> {
    for number in 0..minutes * 2 {
        target.advance(Duration::from_secs(30));
        target.feed(Message::Heartbeat(Heartbeat {
            number,
            journal_ns: 0,
            wall_ns: WALL_NS,
            vouched: Position::default(),
            map_generation: 0,
        }));
    }
    let replies = target.replies().into_iter();
    let repairs = replies.filter_map(|reply| match reply {
        Message::Repair(repair) => Some(repair.runs),
        _ => None,
    });
    repairs.flatten().collect()
}

/// Heartbeats began the time anew after which it is asked again, so that it never was.
#[test]
fn what_is_not_mended_is_asked_for_again_while_the_source_lives() {
    let mut target = start(&SimDisk::new(1));
    greet(&mut target, 1 << 14);
    let replica = target.replica(GROUP).expect("greeted");
    let extent = Extent { volume: VOLUME, start: 2048, end: 4096, from: Seq::ZERO, until: None };
    let damage = Spot {
        place: Place::Base { volume: VOLUME, first: 256, blocks: 256 },
        text: "some blocks are damaged".to_owned(),
        found_wall_ns: 0,
        extents: vec![extent],
    };
    let region = RegionRun { volume: VOLUME, first: 1, regions: 1 };
    replica.damages().report(damage.clone());
    assert_eq!(asked(&mut target, 1), [region]);
    assert_eq!(asked(&mut target, 58), []);
    assert_eq!(asked(&mut target, 3), [region], "an hour later");
    // What is mended, and damaged once more, has not been asked for.
    replica.damages().replace(|_| true, Vec::new());
    assert_eq!(asked(&mut target, 1), []);
    replica.damages().report(damage);
    assert_eq!(asked(&mut target, 1), [region]);
}

/// It read all of the volume before any port was open, at every start.
#[test]
fn a_start_does_not_wait_for_what_a_lost_base_means() {
    // 8 TiB.
    const SECTORS: u64 = 1 << 34;
    let disk = SimDisk::new(1);
    let mut target = start(&disk);
    greet(&mut target, SECTORS);
    let mut builder = FrameBuilder::new(Compression::Off);
    let (kind, seq, start_at) = (Kind::Write, Seq(5), Sector(800));
    let record =
        Record { kind, flags: 0, volume: VOLUME, seq, time_ns: 0, start: start_at, sectors: 8 };
    builder.push(&record, [[9; 4096].as_slice()]);
    let before = Position { term: TERM, seq: Seq::ZERO };
    let meta = FrameMeta { group: GroupId([7; 16]), term: TERM, before, wall_ns: WALL_NS };
    target.feed(Message::Frame(builder.finish(&meta).to_vec()));
    target.advance(Duration::from_secs(1));
    assert_eq!(target.position(GROUP).seq, seq);
    let replica = target.replica(GROUP).expect("greeted");
    // A base without its files.
    let row = BaseRow { generation: 1, blocks: SECTORS / 8 };
    replica.ledger().change(|of| of.bases.insert(VOLUME, row));
    replica.ledger().keep_history().expect("kept");
    drop(replica);
    target.kill();

    let began = Instant::now();
    let target = start(&disk);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let extents = |target: &SimTarget| {
        let replica = target.replica(GROUP).expect("opened");
        let spots = replica.damages().list();
        assert_eq!(spots.len(), 1, "{spots:?}");
        spots[0].extents.clone()
    };
    let extent = |start, end, until| Extent { volume: VOLUME, start, end, from: Seq::ZERO, until };
    assert_eq!(extents(&target), [extent(0, SECTORS, None)], "all, until it is looked at");
    // Nor is it, when it is found once more.
    let replica = target.replica(GROUP).expect("opened");
    let place = Place::Base { volume: VOLUME, first: 0, blocks: SECTORS / 8 };
    let found = Spot::found(&replica, place, "again".to_owned());
    assert_eq!(found.extents, [extent(0, SECTORS, None)]);
    drop(replica);
    let refresh = |target: &SimTarget, goes_on: bool| {
        let _inside = target.runtime.enter();
        let replica = target.replica(GROUP).expect("opened");
        replica.damages().refresh(&replica, &|| goes_on);
    };
    refresh(&target, false);
    assert_eq!(extents(&target), [extent(0, SECTORS, None)], "a target that ends gives up");
    refresh(&target, true);
    let known = [extent(0, 800, None), extent(800, 808, Some(seq)), extent(808, SECTORS, None)];
    assert_eq!(extents(&target), known);
    target.kill();
    // Nor is it found out once more.
    let target = start(&disk);
    assert_eq!(extents(&target), known);
    // Until the log has it no more.
    let replica = target.replica(GROUP).expect("opened");
    replica.ledger().change(|of| of.base.seq = seq);
    let lost = Spot::lost(&replica, VOLUME, SECTORS / 8, String::new());
    let open = known.map(|extent| Extent { until: None, ..extent });
    assert_eq!(lost.extents, open);
}

/// A volume that was listed once hid all that was damaged of it later.
#[test]
fn what_is_damaged_anew_is_listed() {
    let mut target = start(&SimDisk::new(1));
    greet(&mut target, 1 << 14);
    let replica = target.replica(GROUP).expect("greeted");
    let extent = |start, end, until| Extent { volume: VOLUME, start, end, from: Seq::ZERO, until };
    let spot = |first, blocks, extents: &[Extent]| Spot {
        place: Place::Base { volume: VOLUME, first, blocks },
        text: String::new(),
        found_wall_ns: 0,
        extents: extents.to_vec(),
    };
    let mended = extent(800, 808, Some(Seq(5)));
    let whole = [extent(0, 800, None), mended, extent(808, 1 << 14, None)];
    assert!(replica.damages().report(spot(0, 2048, &whole)));
    assert!(!replica.damages().report(spot(99, 1, &[extent(792, 800, None)])), "it is known");
    assert!(!replica.damages().report(spot(100, 1, &[mended])), "and mended");
    assert_eq!(replica.damages().at(Seq(9))[&VOLUME], ((1 << 14) - 8) * 512);
    assert!(replica.damages().report(spot(99, 2, &[extent(792, 808, None)])), "in part");
    replica.damages().replace(|place| *place == spot(99, 2, &[]).place, Vec::new());
    // The same place: what is said of it now counts.
    let again = [extent(0, 1 << 14, None)];
    assert!(replica.damages().report(spot(0, 2048, &again)));
    assert_eq!(
        replica.damages().list(),
        [Spot {
            found_wall_ns: replica.damages().list()[0].found_wall_ns,
            ..spot(0, 2048, &again)
        }]
    );
}
