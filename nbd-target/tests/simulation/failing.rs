//! Each place of the target's disk, each way in which it fails: what stays, what is said, and that it
//! goes on.

use std::time::Duration;

use tidemark_control::config::Seconds;
use tidemark_journal::Seq;
use tidemark_simdisk::{Op, SimDisk, errno};
use tidemark_target::{
    points::Spec,
    simulation::{NoContent, SimConfig, SimTarget},
    store::ReadError,
};

use crate::{
    random::config,
    source::{Connected, GROUP, Source, WALL_NS, bytes},
};

/// What becomes of the log meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Log {
    /// Nothing: all that is sent is acknowledged.
    GoesOn,
    /// It waits, says so, and goes on by itself.
    Waits,
    /// It may have to wait now and then for the reserve, and never fails.
    MayWait,
    /// It has failed and says so; the next start goes on from what was durable.
    Fails,
}

/// A case: part of a path, what fails there and how, and what follows.
type Case = (&'static str, Op, i32, Log);

const CASES: [Case; 16] = [
    ("/shop/log/", Op::Write, errno::EIO, Log::Fails),
    ("/shop/log/", Op::Write, errno::ENOSPC, Log::Waits),
    // Final for the file, whatever the reason.
    ("/shop/log/", Op::Sync, errno::EIO, Log::Fails),
    ("/shop/log/", Op::Sync, errno::ENOSPC, Log::Fails),
    ("/shop/log/", Op::Preallocate, errno::EIO, Log::Fails),
    ("/shop/log/", Op::Preallocate, errno::ENOSPC, Log::Waits),
    ("/shop/log/", Op::Read, errno::EIO, Log::GoesOn),
    ("/shop/base/", Op::Write, errno::EIO, Log::GoesOn),
    // The reserve is given up for the base, so the log does not grow.
    ("/shop/base/", Op::Write, errno::ENOSPC, Log::Waits),
    ("/shop/base/", Op::Sync, errno::EIO, Log::GoesOn),
    ("/shop/base/", Op::Sync, errno::ENOSPC, Log::Waits),
    ("/shop/base/", Op::Read, errno::EIO, Log::GoesOn),
    ("catalogue", Op::Write, errno::EIO, Log::GoesOn),
    ("catalogue", Op::Write, errno::ENOSPC, Log::MayWait),
    ("catalogue", Op::Sync, errno::EIO, Log::GoesOn),
    ("catalogue", Op::Sync, errno::ENOSPC, Log::MayWait),
];

struct World {
    case: Case,
    config: SimConfig,
    disk: SimDisk,
    target: SimTarget,
    source: Source,
}

impl World {
    /// A target that has folded some of its history already, and acknowledged everything.
    fn new(case: Case, seed: u64) -> World {
        let mut config = config(64 << 10);
        config.groups[0].window = Seconds(4);
        let disk = SimDisk::new(seed);
        let mut target = SimTarget::start(&config, &disk, seed, WALL_NS).expect("it starts");
        let mut source = Source::new(seed);
        source.sync_all();
        assert!(matches!(source.connect(&mut target), Connected::Resumed));
        let mut world = World { case, config, disk, target, source };
        world.live(40);
        assert!(world.target.oldest(GROUP) > Seq::ZERO, "history has left");
        world.check(false);
        world
    }

    /// Writes and lets time pass, so that segments are filled, sealed and folded.
    fn live(&mut self, steps: u64) {
        for _ in 0..steps {
            if !self.target.is_connected() {
                // It may be refused meanwhile, and tries again.
                let _ = self.source.connect(&mut self.target);
            }
            for _ in 0..4 {
                self.source.record();
            }
            self.source.send(&self.target);
            self.source.heartbeat(&self.target);
            self.target.advance(Duration::from_millis(250));
            self.source.hear(&mut self.target);
        }
    }

    /// Every point that is offered is what it was, or, while the disk does not read, an error.
    fn check(&self, failing: bool) {
        let (oldest, end) = (self.target.oldest(GROUP), self.target.position(GROUP).seq);
        assert!(end >= self.source.acked.seq, "{:?}: something acknowledged is gone", self.case);
        for at in (oldest.0.max(1)..=end.0).step_by(7).chain([end.0]).map(Seq) {
            match self.target.content(GROUP, "disk0", &Spec::Seq(at)) {
                Ok(content) => {
                    let right = content == bytes(&self.source.states[&at][0]);
                    assert!(right, "{:?}: @seq:{at} is wrong", self.case);
                }
                Err(NoContent::Read(ReadError::Io { .. })) if failing => {}
                Err(error) => {
                    assert!(!self.source.is_good(at), "{:?}: @seq:{at}: {error}", self.case);
                }
            }
        }
    }

    fn run(mut self) {
        let (part, op, errno, log) = self.case;
        let acked = self.source.acked;
        for _ in 0..10_000 {
            self.disk.fail(op, part, 0, errno);
        }
        self.live(60);
        self.check(op == Op::Read);
        let progress = self.target.progress(GROUP);
        match log {
            Log::GoesOn => {
                assert_eq!((progress.stalled, progress.failed), (None, None), "{:?}", self.case);
                assert!(self.source.acked.seq > acked.seq, "{:?}: nothing came", self.case);
            }
            Log::Waits => {
                assert!(progress.stalled.is_some(), "{:?}: it does not say so", self.case);
                assert_eq!(progress.failed, None, "{:?}", self.case);
                assert!(self.source.full, "{:?}: the source is not told", self.case);
            }
            Log::MayWait => assert_eq!(progress.failed, None, "{:?}", self.case),
            Log::Fails => assert!(progress.failed.is_some(), "{:?}", self.case),
        }
        self.disk.fail_no_more();
        if log == Log::Fails {
            // What an operator does.
            self = self.again();
        } else if log != Log::GoesOn {
            self.target.advance(Duration::from_secs(5));
            self.source.hear(&mut self.target);
            assert_eq!(self.target.progress(GROUP).stalled, None, "{:?}", self.case);
            assert!(!self.source.full, "{:?}", self.case);
        }
        let oldest = self.target.oldest(GROUP);
        self.live(40);
        let refusals = &self.source.refusals;
        assert_eq!(self.source.acked.seq, self.source.last(), "{:?}: {refusals:?}", self.case);
        assert!(self.target.oldest(GROUP) > oldest, "{:?}: nothing leaves any more", self.case);
        self.check(false);
        // And all of it is there without what this process remembers.
        self = self.again();
        self.check(false);
        assert_eq!(self.target.position(GROUP).seq, self.source.last(), "{:?}", self.case);
    }

    /// Kills the target and starts it again.
    fn again(mut self) -> World {
        self.target.kill();
        self.target = SimTarget::start(&self.config, &self.disk, 3, WALL_NS).expect("it starts");
        assert_eq!(self.target.failure(GROUP), None, "{:?}", self.case);
        assert!(matches!(self.source.connect(&mut self.target), Connected::Resumed));
        self
    }
}

#[test]
fn each_place_may_fail_in_each_way_and_it_goes_on() {
    for (case, seed) in CASES.into_iter().zip(1..) {
        println!("{case:?}");
        World::new(case, seed).run();
    }
}
