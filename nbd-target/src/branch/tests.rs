//! Branches of a played target: what goes wrong with them, and what is left of them.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tidemark_control::config as units;
use tidemark_journal::{
    Ancestry, Compression, FrameBuilder, FrameMeta, GroupId, Kind, Position, Record, SECTOR_BYTES,
    Sector, Seq, TermId, VolumeId, record::flag,
};
use tidemark_link::message::{GroupHello, Heartbeat, Hello, Message, ProtocolRange, VolumeHello};
use tidemark_simdisk::{Op, Rng, SimDisk, errno};

use super::{Change, Content, WriteError, registry::NewBranch};
use crate::{
    catalogue::Vitals,
    config::{GroupConfig, StoreConfig},
    points::Spec,
    simulation::{SimConfig, SimTarget},
};

const SHOP: &str = "shop";
const TILL: &str = "till";
/// Sectors of the only volume: 2 MiB.
const SECTORS: u64 = 4096;
/// Bytes of a write.
const WRITE: usize = 8 << 10;
const WALL_NS: i64 = 1_795_424_400_000_000_000;

/// A source of one group.
struct Source {
    group: &'static str,
    id: u8,
    before: Position,
    builder: FrameBuilder,
    time_ns: u64,
}

/// A target with two groups on one disk, each with a replica that is whole.
struct Play {
    disk: SimDisk,
    target: SimTarget,
    sources: [Source; 2],
    rng: Rng,
}

impl Source {
    fn new(group: &'static str, id: u8) -> Source {
        let before = Position { term: TermId([id; 16]), seq: Seq::ZERO };
        let builder = FrameBuilder::new(Compression::Off);
        Source { group, id, before, builder, time_ns: 0 }
    }

    fn hello(&self) -> Hello {
        Hello {
            protocol: ProtocolRange::OWN,
            features: Vec::new(),
            software: "a played source".to_owned(),
            group: GroupHello { id: GroupId([self.id; 16]), name: self.group.to_owned() },
            ancestry: Ancestry::root(TermId([self.id; 16])),
            volumes: vec![VolumeHello {
                id: VolumeId(0),
                name: "disk".to_owned(),
                sectors: SECTORS,
                logical_block_bytes: 512,
                physical_block_bytes: 4096,
            }],
            acked: self.before,
            ceiling: Seq(1 << 40),
            map_generation: 1,
        }
    }

    /// A frame of one record.
    fn frame(&mut self, kind: Kind, flags: u8, start: u64, sectors: u64, bytes: &[u8]) -> Message {
        self.time_ns += 1_000_000;
        let (term, seq) = (self.before.term, self.before.seq.next());
        let (volume, time_ns, start) = (VolumeId(0), self.time_ns, Sector(start));
        let sectors = sectors as u32;
        let record = Record { kind, flags, volume, seq, time_ns, start, sectors };
        self.builder.push(&record, [bytes]);
        let (group, wall_ns) = (GroupId([self.id; 16]), WALL_NS + self.time_ns as i64);
        let meta = FrameMeta { group, term, before: self.before, wall_ns };
        let frame = self.builder.finish(&meta).to_vec();
        self.builder.clear();
        self.before.seq = seq;
        Message::Frame(frame)
    }

    fn heartbeat(&self) -> Message {
        Message::Heartbeat(Heartbeat {
            number: 1,
            journal_ns: self.time_ns,
            wall_ns: WALL_NS + self.time_ns as i64,
            vouched: self.before,
            map_generation: 1,
        })
    }
}

fn config() -> SimConfig {
    let group = |name: &str| GroupConfig {
        name: name.parse().expect("a name"),
        node: "db1".parse().expect("a name"),
        readers: Vec::new(),
        branch_writers: Vec::new(),
        window: units::Seconds(1),
        window_min: units::Seconds(1),
        size_max: units::Bytes(64 << 20),
    };
    let store = StoreConfig {
        segment: units::Bytes(64 << 10),
        page_cache: units::Bytes(64 << 10),
        chunk_cache: units::Bytes(512 << 10),
    };
    SimConfig { groups: vec![group(SHOP), group(TILL)], store }
}

impl Play {
    fn new(seed: u64) -> Play {
        let disk = SimDisk::new(seed);
        let target = SimTarget::start(&config(), &disk, seed, WALL_NS).expect("it starts");
        let sources = [Source::new(SHOP, 7), Source::new(TILL, 8)];
        let mut play = Play { disk, target, sources, rng: Rng::new(seed) };
        for group in [SHOP, TILL] {
            play.connect(group);
            let source = play.source(group);
            let frames = [
                source.frame(Kind::Sync, flag::ZEROS, 0, SECTORS, &[]),
                source.frame(Kind::GapEnd, 0, 0, 0, &[]),
            ];
            frames.into_iter().for_each(|frame| play.target.feed(frame));
            play.target.advance(Duration::from_secs(1));
            play.live(group, 4);
        }
        play
    }

    fn source(&mut self, group: &str) -> &mut Source {
        self.sources.iter_mut().find(|source| source.group == group).expect("one of the two")
    }

    fn connect(&mut self, group: &str) {
        let hello = self.source(group).hello();
        let answer = self.target.greet(&"db1".parse().expect("a name"), hello);
        assert!(matches!(answer, Some(Message::Welcome(_))), "{answer:?}");
    }

    /// Writes that fill segments, over so many quarters of a second, all of which are acknowledged.
    fn live(&mut self, group: &str, steps: u64) {
        self.connect(group);
        for step in 0..steps {
            for part in 0..4 {
                let content = self.random(WRITE);
                let start = (step * 4 + part) * 16 % SECTORS;
                let source = self.source(group);
                let frame = source.frame(Kind::Write, 0, start, 16, &content);
                self.target.feed(frame);
            }
            let heartbeat = self.source(group).heartbeat();
            self.target.feed(heartbeat);
            self.target.advance(Duration::from_millis(250));
            self.target.replies();
        }
        self.target.advance(Duration::from_secs(1));
        assert_eq!(self.target.position(group), self.source(group).before);
    }

    fn random(&mut self, bytes: usize) -> Vec<u8> {
        (0..bytes / 8).flat_map(|_| self.rng.next_u64().to_le_bytes()).collect()
    }

    /// Kills the target and starts it again, with reads of these files failing meanwhile.
    fn again(mut self, unreadable: Option<&str>) -> Play {
        self.target.kill();
        for _ in 0..unreadable.map_or(0, |_| 100) {
            self.disk.fail(Op::Read, unreadable.unwrap_or_default(), 0, errno::EIO);
        }
        self.target = SimTarget::start(&config(), &self.disk, 3, WALL_NS).expect("it starts");
        self.disk.fail_no_more();
        self
    }

    fn create(&self, group: &str, name: Option<&str>) -> Result<(), String> {
        let new = NewBranch {
            name: name.map(str::to_owned),
            group: group.to_owned(),
            volume: None,
            spec: Spec::Latest,
            temporary: false,
        };
        self.target.create_branch(&new).map_err(|error| error.to_string())
    }

    /// Writes random content to a branch's beginning and returns it.
    fn write(&mut self, group: &str, name: &str, bytes: usize) -> Result<Vec<u8>, WriteError> {
        let content = self.random(bytes);
        let data = Content::Data(Bytes::from(content.clone()));
        let change = Change { volume: VolumeId(0), start: 0, content: data };
        self.target.write_branch(group, name, change, true).map(|()| content)
    }

    /// What a branch begins with.
    fn read(&self, group: &str, name: &str, bytes: usize) -> Vec<u8> {
        let mut content = self.target.branch_content(group, name, "disk").expect("it is read");
        assert_eq!(content.len() as u64, SECTORS * SECTOR_BYTES);
        content.truncate(bytes);
        content
    }

    fn newest(&self, group: &str, bytes: usize) -> Vec<u8> {
        let mut content = self.target.content(group, "disk", &Spec::Latest).expect("it is read");
        content.truncate(bytes);
        content
    }

    /// Why the only branch that does not open does not.
    fn broken(&self) -> String {
        let broken = self.target.broken_branches();
        assert_eq!(broken.len(), 1, "{broken:?}");
        broken.into_iter().map(|(_, why)| why).collect()
    }
}

/// One start at which its log could not be read, and history went past its point.
#[test]
fn a_branch_that_does_not_open_keeps_its_point() {
    let mut play = Play::new(1);
    play.create(SHOP, Some("fix")).expect("made");
    let point = play.target.position(SHOP).seq;
    let content = play.write(SHOP, "fix", WRITE).expect("written");
    play.live(SHOP, 20);

    let mut play = play.again(Some("/branches/fix/"));
    assert!(play.broken().contains("cannot recover the branch 'fix'"), "{}", play.broken());
    play.live(SHOP, 40);
    assert!(play.target.oldest(SHOP) <= point, "its point has left");

    let mut play = play.again(None);
    assert_eq!(play.target.broken_branches(), []);
    assert!(play.read(SHOP, "fix", WRITE) == content);
    play.target.drop_branch(SHOP, "fix").expect("dropped");
    play.live(SHOP, 20);
    assert!(play.target.oldest(SHOP) > point, "nothing holds it any more");
}

/// One row that cannot be read hides all branches of its group, with the points that they need.
#[test]
fn nothing_leaves_while_the_branches_cannot_be_read() {
    let mut play = Play::new(2);
    play.create(SHOP, Some("fix")).expect("made");
    let point = play.target.position(SHOP).seq;
    let content = play.write(SHOP, "fix", WRITE).expect("written");
    let catalogue = Arc::clone(play.target.groups().catalogue());
    let row = catalogue.branches(SHOP).expect("read").remove("fix").expect("there");
    catalogue.spoil_branch(SHOP, "fix");
    drop(catalogue);

    let mut play = play.again(None);
    play.live(SHOP, 40);
    assert!(play.target.oldest(SHOP) <= point, "its point has left");
    let notices = play.target.notices(SHOP);
    assert!(notices.iter().any(|notice| notice.contains("none of its history leaves")));
    let refusal = play.create(SHOP, Some("fix")).expect_err("it may be there");
    assert!(refusal.contains("the branches of 'shop' cannot be read"), "{refusal}");
    assert_eq!(play.target.branches().unread(), [refusal]);
    play.create(TILL, Some("fix")).expect("another group");

    play.target.groups().catalogue().put_branch(SHOP, "fix", &row).expect("mended");
    let play = play.again(None);
    assert!(play.read(SHOP, "fix", WRITE) == content);
}

#[test]
fn a_made_up_name_passes_over_a_branch_that_does_not_open() {
    let mut play = Play::new(3);
    play.create(SHOP, None).expect("made");
    play.write(SHOP, "shop-1", WRITE).expect("written");
    let play = play.again(Some("/branches/shop-1/"));
    play.broken();
    play.create(SHOP, None).expect("made");
    assert_eq!(play.target.branch_names(), ["shop-2"]);
}

/// A segment that was being sealed when its branch was dropped left its row behind.
#[test]
fn a_branch_is_dropped_after_all_that_works_on_it() {
    let mut play = Play::new(4);
    for writes in 6..30 {
        play.create(SHOP, Some("fix")).expect("made");
        for _ in 0..writes {
            play.write(SHOP, "fix", WRITE).expect("written");
        }
        let branch = play.target.branches().get(SHOP, "fix").expect("there");
        play.target.drop_branch(SHOP, "fix").expect("dropped");
        // All but the one that was written last: nobody seals files that are gone.
        let segments = branch.journal().segments();
        let (_, ended) = segments.split_last().expect("written");
        assert!(ended.iter().all(|segment| segment.is_sealed()), "one was being sealed");
        // As somebody who had listed it before.
        let catalogue = play.target.groups().catalogue();
        branch.keep_vitals(catalogue).expect("nothing is kept");
        assert_eq!(catalogue.vitals("shop/fix").expect("read"), Vitals::default());
        assert_eq!(catalogue.segments("shop/fix").expect("read").len(), 0);
        play.create(SHOP, Some("fix")).expect("made again");
        play.target.advance(Duration::from_secs(1));
        assert_eq!(play.target.groups().catalogue().segments("shop/fix").expect("read").len(), 0);
        play.target.drop_branch(SHOP, "fix").expect("dropped");
    }
    play.create(SHOP, Some("fix")).expect("made");
    let play = play.again(None);
    assert_eq!(play.target.broken_branches(), []);
    assert!(play.read(SHOP, "fix", WRITE) == play.newest(SHOP, WRITE));
}

/// A directory that could not be removed gave a later branch of that name and point the content of
/// the one that had been dropped.
#[test]
fn what_a_dropped_branch_leaves_is_not_taken_for_the_next_ones() {
    let mut play = Play::new(5);
    play.create(SHOP, Some("fix")).expect("made");
    play.write(SHOP, "fix", WRITE).expect("written");
    play.disk.fail(Op::Remove, "/branches/fix/log/", 0, errno::EIO);
    let error = play.target.drop_branch(SHOP, "fix").expect_err("a file stays").to_string();
    assert!(error.contains("the branch is dropped, but cannot remove"), "{error}");
    // Nor may rows that were left.
    let vitals = Vitals {
        acked: Position { term: TermId([1; 16]), seq: Seq(1 << 30) },
        ..Vitals::default()
    };
    play.target.groups().catalogue().put_vitals("shop/fix", &vitals).expect("written");
    play.create(SHOP, Some("fix")).expect("made");
    assert!(play.read(SHOP, "fix", WRITE) == play.newest(SHOP, WRITE));
    let content = play.write(SHOP, "fix", WRITE).expect("written");
    let play = play.again(None);
    assert_eq!(play.target.broken_branches(), []);
    assert!(play.read(SHOP, "fix", WRITE) == content);
}

/// A branch that could not be made was there after the next start.
#[test]
fn what_could_not_be_made_is_not_there_later() {
    let play = Play::new(6);
    play.disk.fail(Op::Create, "/branches/fix/log", 0, errno::EIO);
    play.create(SHOP, Some("fix")).expect_err("no directory for its log");
    assert_eq!(play.target.broken_branches(), []);
    let play = play.again(None);
    assert_eq!(play.target.branch_names(), [""; 0]);
    assert_eq!(play.target.broken_branches(), []);
}

/// Of two branches of one name one lost its pin, and its place in the list.
#[test]
fn groups_may_have_branches_of_the_same_name() {
    let mut play = Play::new(7);
    let mut contents = Vec::new();
    for group in [SHOP, TILL] {
        play.create(group, Some("fix")).expect("made");
        contents.push(play.write(group, "fix", WRITE).expect("written"));
    }
    let play = play.again(None);
    for (group, content) in [SHOP, TILL].into_iter().zip(contents) {
        assert!(play.read(group, "fix", WRITE) == content);
        let replica = play.target.groups().replica(group).expect("there");
        let pins: Vec<String> = replica.pins().list().into_iter().map(|pin| pin.what).collect();
        assert_eq!(pins, ["the branch 'fix'"]);
        play.target.drop_branch(group, "fix").expect("dropped");
        assert_eq!(replica.pins().list(), []);
    }
}

/// Writes that had been refused took effect when there was room again; and after 48 MiB of them
/// nothing was answered any more. A flush, which needs no room, was refused like them.
#[test]
fn a_write_that_is_refused_never_takes_effect() {
    let mut play = Play::new(8);
    play.create(SHOP, Some("fix")).expect("made");
    let mut content = play.write(SHOP, "fix", WRITE).expect("written");
    play.disk.set_capacity(Some(play.disk.used_bytes()));
    for _ in 0..40 {
        match play.write(SHOP, "fix", 2 << 20) {
            Err(WriteError::Full(why)) if why.contains("no room for another segment") => {}
            other => panic!("{:?}", other.map(|_| "written")),
        }
    }
    assert!(play.read(SHOP, "fix", WRITE) == content);
    for _ in 0..10_000 {
        let Ok(last) = play.write(SHOP, "fix", WRITE) else { break };
        content = last;
    }
    assert!(play.write(SHOP, "fix", WRITE).is_err(), "the last segment is full");
    play.target.flush_branch(SHOP, "fix").expect("all that was taken in is durable");
    play.disk.set_capacity(None);
    play.target.advance(Duration::from_secs(5));
    assert!(play.read(SHOP, "fix", WRITE) == content, "a refused write has taken effect");
    let content = play.write(SHOP, "fix", WRITE).expect("there is room");
    let play = play.again(None);
    assert!(play.read(SHOP, "fix", WRITE) == content);
}

/// Where there is room for it: it would take effect without what came before.
#[test]
fn what_follows_a_refused_part_of_a_write_is_refused_too() {
    let mut play = Play::new(9);
    play.create(SHOP, Some("fix")).expect("made");
    play.write(SHOP, "fix", WRITE).expect("written");
    let branch = play.target.branches().get(SHOP, "fix").expect("there");
    let end = branch.journal().progress().written;
    play.disk.set_capacity(Some(play.disk.used_bytes() + (4 << 20)));
    // Longer than a frame; what is left of it takes next to no room.
    let mut long = play.random(23 << 20);
    long.resize(24 << 20, 0);
    let change = Change { volume: VolumeId(0), start: 0, content: Content::Data(long.into()) };
    let written = play.target.write_branch(SHOP, "fix", change, true);
    assert!(matches!(written, Err(WriteError::Full(_))), "{written:?}");
    assert_eq!(branch.journal().progress().written, end);
    play.disk.set_capacity(None);
    play.write(SHOP, "fix", WRITE).expect("there is room");
}
