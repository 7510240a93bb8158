//! Random lives of a target: frames, crashes, full and failing disks, rot; and what must hold.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use tidemark_control::config as units;
use tidemark_journal::{Seq, VolumeId};
use tidemark_simdisk::{Faults, Op, Rng, SimDisk, errno};
use tidemark_target::{
    branch::{Change, Content, registry::NewBranch},
    config::{GroupConfig, StoreConfig},
    points::Spec,
    simulation::{DATA_DIR, NoContent, SimConfig, SimTarget},
    store::ReadError,
};

use crate::source::{Connected, Disk, GROUP, SECTORS, Source, VOLUMES, WALL_NS, bytes};

/// Seeds that every run takes.
const SEEDS: u64 = 48;
const STEPS: u64 = 120;

/// What goes wrong besides crashes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Crashes,
    FullDisk,
    FailingDisk,
    Rot,
}

/// What a seed's life has come to, to see that something happened.
#[derive(Clone, Copy, Default, Debug)]
struct Tally {
    crashes: u64,
    points: u64,
    folded: u64,
    refused_damaged: u64,
    fingerprint: u64,
}

struct World {
    mode: Mode,
    disk: SimDisk,
    target: Option<SimTarget>,
    source: Source,
    rng: Rng,
    branch: Option<BranchModel>,
    branches_made: u32,
    /// Bits have rotted, or writes have been lost: what is lost is noticed, and no more is promised.
    damaged: bool,
    /// Nothing goes wrong any more.
    quiet: bool,
    tally: Tally,
}

/// A branch: its versions of `disk0`, and from which one on they may be met after a crash.
struct BranchModel {
    name: String,
    versions: Vec<Disk>,
    durable: usize,
}

pub fn config(segment_bytes: u64) -> SimConfig {
    let group = GroupConfig {
        name: GROUP.parse().expect("a name"),
        node: Source::node(),
        readers: Vec::new(),
        branch_writers: Vec::new(),
        window: units::Seconds(20),
        window_min: units::Seconds(1),
        size_max: units::Bytes(3 << 20),
    };
    let store = StoreConfig {
        segment: units::Bytes(segment_bytes),
        page_cache: units::Bytes(64 << 10),
        chunk_cache: units::Bytes(512 << 10),
    };
    SimConfig { groups: vec![group], store }
}

/// Bytes of a segment that holds a few dozen frames: most of it is room for its index.
const SEGMENT_BYTES: u64 = 400 << 10;

/// Whether a start says that the disk is full, and what to do.
fn is_full(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    text.contains("make room") && text.contains("No space left")
}

impl World {
    fn new(seed: u64) -> World {
        let modes = [Mode::Crashes, Mode::FullDisk, Mode::FailingDisk, Mode::Rot];
        let mut rng = Rng::new(seed);
        let mut world = World {
            mode: modes[(seed % 4) as usize],
            disk: SimDisk::new(rng.next_u64()),
            target: None,
            source: Source::new(rng.next_u64()),
            rng,
            branch: None,
            branches_made: 0,
            damaged: false,
            quiet: false,
            tally: Tally::default(),
        };
        world.start();
        world.source.sync_all();
        world
    }

    fn target(&mut self) -> &mut SimTarget {
        self.target.as_mut().expect("it runs")
    }

    /// Starts the target, however often the power goes meanwhile, and looks at all of it.
    fn start(&mut self) {
        loop {
            if !self.quiet && self.rng.below(4) == 0 {
                self.disk.cut_after(self.rng.below(60));
            }
            let seed = self.rng.next_u64();
            let started = SimTarget::start(&config(SEGMENT_BYTES), &self.disk, seed, WALL_NS);
            if self.disk.is_off() {
                drop(started);
                self.disk.crash();
                self.tally.crashes += 1;
                continue;
            }
            let target = match started {
                // Not even the reserve was enough for a copy of the catalogue. People make room.
                Err(error) if self.mode == Mode::FullDisk && is_full(&error) => {
                    self.disk.set_capacity(None);
                    continue;
                }
                started => started.expect("it starts"),
            };
            let failure = target.failure(GROUP);
            if failure.is_some() && self.mode == Mode::FailingDisk {
                // A read failed, as was planned; another start goes well.
                self.disk.fail_no_more();
                target.kill();
                continue;
            }
            assert_eq!(failure, None, "the replica cannot be opened");
            self.target = Some(target);
            break;
        }
        let have = self.target().position(GROUP).seq;
        let acked = self.source.acked.seq;
        assert!(self.damaged || have >= acked, "{acked} was acknowledged, {have} is there");
        self.check(usize::MAX);
        if !self.disk.is_off() {
            self.check_branch_after_restart();
        }
        if self.disk.is_off() {
            self.crash();
        }
    }

    fn crash(&mut self) {
        self.target.take().expect("it runs").crash();
        self.tally.crashes += 1;
        self.start();
    }

    fn kill(&mut self) {
        self.target.take().expect("it runs").kill();
        self.start();
    }

    fn connect(&mut self) {
        let target = self.target.as_mut().expect("it runs");
        match self.source.connect(target) {
            Connected::Resumed | Connected::Refused => {}
            Connected::Doubted(at) => {
                assert!(self.damaged, "the target had lost what it acknowledged, and is at {at}");
                // The new term is greeted with.
                let _ = self.source.connect(target);
            }
        }
    }

    fn advance(&mut self, ms: u64) {
        self.target().advance(Duration::from_millis(ms));
        let target = self.target.as_mut().expect("it runs");
        self.source.hear(target);
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..50 => {
                for _ in 0..=self.rng.below(6) {
                    self.source.record();
                }
                let target = self.target.as_mut().expect("it runs");
                if target.is_connected() {
                    self.source.send(target);
                }
                let ms = self.rng.below(4);
                self.advance(ms);
            }
            50..62 => {
                let target = self.target.as_mut().expect("it runs");
                self.source.heartbeat(target);
                let ms = self.rng.below(3000);
                self.advance(ms);
            }
            62..70 => self.check(3),
            70..74 => {
                self.target().disconnect();
            }
            74..80 => self.branch(),
            80..85 => {
                let effects = self.rng.below(50);
                self.disk.cut_after(effects);
            }
            85..87 => self.crash(),
            87..89 => self.kill(),
            89..91 => {
                self.target.take().expect("it runs").stop();
                self.start();
            }
            91 => self.target().step_wall(-3_600_000_000_000),
            _ => self.fault(),
        }
    }

    fn fault(&mut self) {
        let in_replica = format!("/{GROUP}/");
        match self.mode {
            Mode::Crashes => {}
            Mode::FullDisk => {
                let room = (self.rng.below(3) > 0).then(|| self.rng.below(1 << 20));
                self.disk.set_capacity(room.map(|room| self.disk.used_bytes() + room));
            }
            Mode::FailingDisk => {
                let op =
                    [Op::Write, Op::Sync, Op::Read, Op::Preallocate][self.rng.below(4) as usize];
                self.disk.fail(op, &in_replica, self.rng.below(4) as u32, errno::EIO);
            }
            Mode::Rot => match self.rng.below(3) {
                0 => {
                    let faults = Faults {
                        write_is_lost: 20_000,
                        write_lands_elsewhere: 20_000,
                        ..Faults::default()
                    };
                    self.disk.set_faults_on("/shop/log/", faults);
                    self.damaged = true;
                }
                1 => self.disk.set_faults(Faults::default()),
                _ => self.rot(),
            },
        }
    }

    fn rot(&mut self) {
        let dir = ["log", "base"][self.rng.below(2) as usize];
        let dir = PathBuf::from(DATA_DIR).join("groups").join(GROUP).join(dir);
        let files = self.disk.list(&dir).unwrap_or_default();
        let files: Vec<_> = files.into_iter().filter(|file| file.bytes > 0).collect();
        if let Some(file) = files.get(self.rng.below(files.len() as u64) as usize) {
            // Mostly near the beginning, where there is something.
            let within = if self.rng.below(2) == 0 { file.bytes } else { file.bytes.min(40_000) };
            let bit = self.rng.below(within * 8);
            self.disk.rot(&dir.join(&file.name), bit).expect("it is there");
            self.damaged = true;
        }
    }

    /// Checks some of the points that are offered; and that none is missing.
    fn check(&mut self, most: usize) {
        if self.disk.is_off() {
            return;
        }
        let (oldest, end) = {
            let target = self.target.as_ref().expect("it runs");
            (target.oldest(GROUP), target.position(GROUP).seq)
        };
        let all: Vec<Seq> = (oldest.0.max(1)..=end.0).map(Seq).collect();
        let every = all.len().div_ceil(most.min(25)).max(1);
        let offset = self.rng.below(every as u64) as usize;
        for at in all.into_iter().skip(offset).step_by(every) {
            let volume = self.rng.below(VOLUMES.into()) as u16;
            self.check_point(volume, at);
        }
        let marks = self.source.marks.len() as u64;
        if marks > 0 {
            let (name, at) = self.source.marks[self.rng.below(marks) as usize].clone();
            let target = self.target.as_ref().expect("it runs");
            if let Ok(content) = target.content(GROUP, "disk0", &Spec::Mark(name)) {
                assert_eq!(content, bytes(&self.source.states[&at][0]), "the mark at {at}");
            }
        }
    }

    fn check_point(&mut self, volume: u16, at: Seq) {
        let name = format!("disk{volume}");
        let target = self.target.as_ref().expect("it runs");
        self.tally.points += 1;
        match target.content(GROUP, &name, &Spec::Seq(at)) {
            Ok(content) => {
                let expected = bytes(&self.source.states[&at][usize::from(volume)]);
                let differs =
                    content.chunks(512).zip(expected.chunks(512)).position(|(a, b)| a != b);
                assert_eq!(differs, None, "{name}@seq:{at}: a sector differs");
            }
            Err(NoContent::Refused(refusal)) => {
                assert!(self.damaged || !self.source.is_good(at), "{name}@seq:{at}: {refusal}");
            }
            Err(NoContent::Read(error)) => {
                let failing = matches!(error, ReadError::Io { .. });
                let excused = self.damaged || (failing && self.mode == Mode::FailingDisk);
                assert!(excused, "{name}@seq:{at}: {error}");
                self.tally.refused_damaged += 1;
            }
            Err(NoContent::Absent(why)) => panic!("{name}@seq:{at}: {why}"),
        }
    }

    fn branch(&mut self) {
        let Some(mut model) = self.branch.take() else {
            self.branches_made += 1;
            let name = format!("b{}", self.branches_made);
            let new = NewBranch {
                name: Some(name.clone()),
                group: GROUP.to_owned(),
                volume: None,
                spec: Spec::Latest,
                temporary: false,
            };
            let target = self.target.as_ref().expect("it runs");
            let made = target.create_branch(&new);
            if made.is_ok()
                && !self.disk.is_off()
                && let Ok(content) = target.branch_content(GROUP, &name, "disk0")
            {
                let versions = vec![content.chunks(512).map(value).collect()];
                self.branch = Some(BranchModel { name, versions, durable: 0 });
            }
            return;
        };
        if self.rng.below(5) == 0 {
            let dropped = self.target().drop_branch(GROUP, &model.name);
            if dropped.is_err() {
                // The catalogue may have dropped it, or not: nothing is known of it any more.
                let name = model.name.clone();
                let _ = self.target().drop_branch(GROUP, &name);
            }
            return;
        }
        let start = self.rng.below(SECTORS - 8);
        let number = (1 << 40) + self.rng.below(1 << 30);
        let durable = self.rng.below(3) == 0;
        let mut next = model.versions.last().expect("one").clone();
        next[start as usize..start as usize + 8].fill(number);
        let content = Content::Data(Bytes::from(bytes(&[number; 8])));
        let change = Change { volume: VolumeId(0), start, content };
        let written = self.target().write_branch(GROUP, &model.name, change, durable);
        model.versions.push(next);
        let newest = model.versions.len() - 1;
        match written {
            Ok(()) if !self.disk.is_off() => {
                if durable {
                    model.durable = newest;
                }
                let target = self.target.as_ref().expect("it runs");
                match target.branch_content(GROUP, &model.name, "disk0") {
                    Ok(content) => assert_eq!(content, bytes(&model.versions[newest])),
                    Err(error) => assert!(self.may_fail(), "the branch cannot be read: {error}"),
                }
                self.branch = Some(model);
            }
            // What became of it is not followed further.
            _ => {
                let name = model.name.clone();
                let _ = self.target().drop_branch(GROUP, &name);
            }
        }
    }

    fn may_fail(&self) -> bool {
        self.damaged || self.mode == Mode::FailingDisk || self.disk.is_off()
    }

    fn check_branch_after_restart(&mut self) {
        let Some(model) = &mut self.branch else { return };
        let target = self.target.as_ref().expect("it runs");
        match target.branch_content(GROUP, &model.name, "disk0") {
            Ok(content) => {
                let kept = model.versions.iter().rposition(|version| bytes(version) == content);
                let kept = kept.expect("a branch holds something that was never written");
                assert!(kept >= model.durable, "a branch lost what was durable");
                model.versions.truncate(kept + 1);
                model.durable = kept;
            }
            Err(error) => {
                let excused = self.damaged || self.mode == Mode::FailingDisk || self.disk.is_off();
                let broken = target.broken_branches();
                assert!(excused, "the branch is gone: {error}; {broken:?}");
                self.branch = None;
            }
        }
    }

    /// Drops the branches that are not followed any more: they hold their points, also those that do
    /// not open.
    fn drop_others(&self) {
        let target = self.target.as_ref().expect("it runs");
        let broken = target.broken_branches().into_iter().map(|(name, _)| name);
        let all = target.branch_names().into_iter().chain(broken);
        let followed = self.branch.as_ref().map(|branch| &branch.name);
        for name in all.filter(|name| Some(name) != followed) {
            target.drop_branch(GROUP, &name).expect("dropped");
        }
    }

    fn settle(&mut self) {
        let target = self.target.as_ref().expect("it runs");
        if self.disk.is_off() {
            self.crash();
        } else if target.progress(GROUP).failed.is_some() {
            // What an operator does.
            self.kill();
        }
    }

    fn run(mut self) -> Tally {
        for _ in 0..STEPS {
            self.step();
            self.settle();
            let connected = self.target().is_connected();
            if !connected && self.rng.below(3) == 0 {
                self.connect();
                self.settle();
            }
        }
        // The disk is good again: everything gets there.
        self.disk.set_capacity(None);
        self.disk.set_faults(Faults::default());
        self.disk.fail_no_more();
        self.quiet = true;
        self.source.finish();
        self.kill();
        self.drop_others();
        for _ in 0..4 {
            self.connect();
            for _ in 0..20 {
                let target = self.target.as_mut().expect("it runs");
                self.source.heartbeat(target);
                self.advance(1000);
            }
            if self.source.acked.seq == self.source.last() {
                break;
            }
            self.kill();
        }
        let refusals = std::mem::take(&mut self.source.refusals);
        assert_eq!(
            self.source.acked.seq,
            self.source.last(),
            "not all of it got there: {refusals:?}"
        );
        self.check(usize::MAX);
        self.tally.folded = self.target().oldest(GROUP).0;
        self.tally.fingerprint = self.disk.fingerprint();
        self.tally
    }
}

/// The number that a sector holds.
fn value(sector: &[u8]) -> u64 {
    u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"))
}

fn run(seed: u64) -> Tally {
    let ended = std::panic::catch_unwind(|| World::new(seed).run());
    ended.unwrap_or_else(|_| panic!("seed {seed} (SEED={seed} replays it)"))
}

#[test]
fn whatever_happens_nothing_acknowledged_is_lost_and_nothing_is_wrong() {
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("SEED") {
        println!("{:?}", run(seed));
        return;
    }
    let from = number("FROM").unwrap_or(0);
    let seeds = number("SEEDS").unwrap_or(SEEDS);
    let tallies: Vec<Tally> = (from..from + seeds).map(run).collect();
    let sum = |of: fn(&Tally) -> u64| tallies.iter().map(of).sum::<u64>();
    println!("{} crashes, {} points", sum(|t| t.crashes), sum(|t| t.points));
    assert!(sum(|t| t.crashes) > 2 * seeds && sum(|t| t.points) > 100 * seeds);
    assert!(sum(|t| t.folded) > 0, "history left");
    assert!(sum(|t| t.refused_damaged) > 0, "damage was met");
}
