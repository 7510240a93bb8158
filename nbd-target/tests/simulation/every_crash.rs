//! All sequences of up to three operations, with the power cut before every effect of the last one.
//!
//! Each frame gets a segment of its own here, so a frame seals the one before.

use std::{
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use tidemark_journal::{Seq, VolumeId};
use tidemark_simdisk::{Image, SimDisk};
use tidemark_target::{
    branch::{Change, Content, registry::NewBranch},
    points::Spec,
    simulation::{NoContent, SimTarget},
};

use crate::{
    random::config,
    source::{Connected, Disk, GROUP, Source, VOLUMES, WALL_NS, bytes},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Do {
    /// A frame is sent, and is on its way.
    Frame,
    /// A mark is.
    Mark,
    /// All that is under way gets done: syncs, seals, vitals.
    Settle,
    /// The oldest segment is folded into the base.
    Fold,
    /// A branch is made if there is none, and written to.
    Branch,
    /// The branch is dropped.
    Drop,
}

const ALL: [Do; 6] = [Do::Frame, Do::Mark, Do::Settle, Do::Fold, Do::Branch, Do::Drop];
const BRANCH: &str = "try";
/// How many of the crashes are followed until everything has got there.
const FOLLOWED: usize = 6;

struct Play {
    disk: SimDisk,
    target: SimTarget,
    source: Source,
    /// What the branch holds durably.
    branch: Option<Disk>,
    writes: u64,
}

/// The disk just before an effect, and the last sequence that was durable then.
type Moment = (Image, Seq);

fn start(disk: &SimDisk, seed: u64) -> SimTarget {
    let target = SimTarget::start(&config(1), disk, seed, WALL_NS).expect("it starts");
    assert_eq!(target.failure(GROUP), None);
    target
}

/// A replica with a few segments, stopped in order, and its source.
fn beginning() -> &'static Mutex<(Image, Source)> {
    static BEGINNING: OnceLock<Mutex<(Image, Source)>> = OnceLock::new();
    BEGINNING.get_or_init(|| {
        let disk = SimDisk::new(1);
        let mut target = start(&disk, 1);
        let mut source = Source::new(1);
        source.sync_all();
        assert!(matches!(source.connect(&mut target), Connected::Resumed));
        for start in [3, 16] {
            source.write(0, start, 10);
            source.write(1, start, 8);
            source.send(&target);
            target.advance(Duration::from_secs(2));
            source.hear(&mut target);
        }
        assert_eq!(source.acked.seq, source.last());
        target.stop();
        Mutex::new((disk.image(), source))
    })
}

impl Play {
    fn new() -> Play {
        let (image, mut source) = {
            let beginning = beginning().lock().expect("no panic");
            (beginning.0.clone(), beginning.1.copy())
        };
        let disk = SimDisk::new(2);
        disk.restore(&image);
        let mut target = start(&disk, 2);
        assert!(matches!(source.connect(&mut target), Connected::Resumed));
        Play { disk, target, source, branch: None, writes: 0 }
    }

    fn act(&mut self, act: Do) {
        self.writes += 1;
        let at = self.writes * 5 % 50;
        match act {
            Do::Frame | Do::Mark => {
                self.source.write(0, at, 9);
                self.source.write(1, at, 3);
                if act == Do::Mark {
                    self.source.mark();
                }
                self.source.send(&self.target);
                self.target.advance(Duration::from_millis(2));
            }
            Do::Settle => self.target.advance(Duration::from_millis(1500)),
            Do::Fold => {
                if self.target.can_fold(GROUP) {
                    self.target.fold(GROUP).expect("folded");
                }
            }
            Do::Branch => {
                let new = NewBranch {
                    name: Some(BRANCH.to_owned()),
                    group: GROUP.to_owned(),
                    volume: None,
                    spec: Spec::Latest,
                    temporary: false,
                };
                if self.branch.is_none() {
                    self.target.create_branch(&new).expect("made");
                    let content = self.target.branch_content(GROUP, BRANCH, "disk0").expect("read");
                    let value = |s: &[u8]| u64::from_le_bytes(s[..8].try_into().expect("eight"));
                    self.branch = Some(content.chunks(512).map(value).collect());
                }
                let number = 1_000_000 + self.writes;
                let content = Content::Data(Bytes::from(bytes(&[number; 4])));
                let change = Change { volume: VolumeId(0), start: at, content };
                self.target.write_branch(GROUP, BRANCH, change, true).expect("written");
                let held = self.branch.as_mut().expect("made");
                held[at as usize..at as usize + 4].fill(number);
            }
            Do::Drop => {
                if self.branch.take().is_some() {
                    self.target.drop_branch(GROUP, BRANCH).expect("dropped");
                }
            }
        }
        self.source.hear(&mut self.target);
    }

    /// Does the last operation, and keeps every moment of it.
    fn act_watched(&mut self, act: Do) -> Vec<Moment> {
        let moments = Arc::new(Mutex::new(Vec::new()));
        let journal = self.target.journal(GROUP).expect("a replica");
        let (seen, log) = (Arc::clone(&moments), Arc::clone(&journal));
        self.disk.watch(Some(Box::new(move |image| {
            let durable = log.progress().durable.seq;
            seen.lock().expect("no panic").push((image, durable));
        })));
        self.act(act);
        self.disk.watch(None);
        let mut moments = std::mem::take(&mut *moments.lock().expect("no panic"));
        moments.push((self.disk.image(), journal.progress().durable.seq));
        moments
    }
}

/// The power goes at this moment; what is found must be right, and go on.
fn crash(moment: &Moment, number: usize, source: &Source, branches: &[Option<Disk>; 2]) {
    let (image, durable) = moment;
    let disk = SimDisk::new(number as u64);
    disk.restore(image);
    disk.crash();
    let mut target = start(&disk, number as u64);
    let (oldest, end) = (target.oldest(GROUP), target.position(GROUP).seq);
    assert!(
        end >= *durable,
        "{durable} was durable, {end} is there; {:?} {:?}",
        target.groups().catalogue().groups(),
        target.notices(GROUP)
    );
    assert_eq!(target.notices(GROUP), Vec::<String>::new());
    for at in (oldest.0.max(1)..=end.0).map(Seq) {
        for volume in 0..VOLUMES {
            let held = &source.states[&at][usize::from(volume)];
            match target.content(GROUP, &format!("disk{volume}"), &Spec::Seq(at)) {
                Ok(content) => assert!(content == bytes(held), "disk{volume}@seq:{at} is wrong"),
                Err(NoContent::Refused(_)) if !source.is_good(at) => {}
                Err(error) => panic!("disk{volume}@seq:{at}: {error}"),
            }
        }
    }
    for (name, at) in source.marks.iter().filter(|(_, at)| (oldest..=end).contains(at)) {
        let content = target.content(GROUP, "disk1", &Spec::Mark(name.clone())).expect("a mark");
        assert!(content == bytes(&source.states[at][1]), "@mark:{name} is wrong");
    }
    assert_eq!(target.broken_branches(), Vec::new());
    let held = target.branch_content(GROUP, BRANCH, "disk0").ok();
    // A branch that is being made holds its point until the first write; nothing else comes between.
    let point = held.is_some() && branches[0].is_none() && branches[1].is_some();
    let allowed = branches.iter().any(|branch| branch.as_deref().map(bytes) == held);
    assert!(allowed || point, "the branch is neither as before nor as after");
    if number.is_multiple_of(FOLLOWED) {
        let mut source = source.copy();
        // What it had heard by then.
        source.acked.seq = source.acked.seq.min(*durable);
        let connected = source.connect(&mut target);
        let why = &source.refusals;
        assert!(matches!(connected, Connected::Resumed), "{connected:?}: {why:?}");
        target.advance(Duration::from_secs(3));
        source.hear(&mut target);
        assert_eq!(source.acked.seq, source.last(), "not all of it got there");
        let newest = target.content(GROUP, "disk0", &Spec::Latest).expect("the newest");
        assert!(newest == bytes(&source.states[&source.last()][0]), "the newest is wrong");
    }
}

/// All sequences that begin so: by themselves, and with one and two operations more.
fn every_crash(first: Do) {
    let seconds = ALL.map(|second| vec![first, second]);
    let thirds =
        seconds.iter().flat_map(|two| ALL.map(|third| [two.as_slice(), &[third]].concat()));
    let sequences: Vec<Vec<Do>> =
        [vec![first]].into_iter().chain(seconds.clone()).chain(thirds).collect();
    assert_eq!(sequences.len(), 1 + 6 + 36);
    let mut crashes = 0;
    for sequence in sequences {
        let Some((last, before)) = sequence.split_last() else { continue };
        let mut play = Play::new();
        before.iter().for_each(|act| play.act(*act));
        let branch = play.branch.clone();
        let moments = play.act_watched(*last);
        let branches = [branch, play.branch.clone()];
        for (number, moment) in moments.iter().enumerate() {
            let check = || crash(moment, number, &play.source, &branches);
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err() {
                panic!("{sequence:?}, cut before effect {number} of {}", moments.len() - 1);
            }
        }
        crashes += moments.len();
    }
    println!("{crashes} crashes");
    assert!(crashes > 200, "{crashes} crashes");
}

#[test]
fn every_crash_from_a_frame_on() {
    every_crash(Do::Frame);
}

#[test]
fn every_crash_from_a_mark_on() {
    every_crash(Do::Mark);
}

#[test]
fn every_crash_from_a_settled_log_on() {
    every_crash(Do::Settle);
}

#[test]
fn every_crash_from_a_fold_on() {
    every_crash(Do::Fold);
}

#[test]
fn every_crash_from_a_branch_on() {
    every_crash(Do::Branch);
}

#[test]
fn every_crash_without_a_branch_to_drop() {
    every_crash(Do::Drop);
}
