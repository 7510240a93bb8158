//! What is done to a source one thing after the other, so that its power can be cut before each effect
//! on its disks.

use tidemark_agent::capture::Ask;
use tidemark_journal::VolumeId;
use tidemark_simdisk::{Op, Rng, SimDisk, errno};

use crate::{
    target::{Plain, Target},
    world::World,
};

/// Something that is done to a source. All that follows from it is done at once, but for sending.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Do {
    /// The first sectors of a region are written.
    Write,
    /// Two writes at once, one of which overlaps the other, across the end of a region.
    Overlap,
    /// All of the volume is discarded.
    Discard,
    /// The disk is flushed, and a mark set.
    Mark,
    /// The target has everything durably, and the source notes that.
    Send,
    /// The map gives up what it can: an epoch of dirty bits ends.
    Tidy,
    /// More is written than the ring can hold.
    Overflow,
    /// The disk refuses a write.
    Refuse,
    /// The disk refuses to be flushed, and has lost some of what it was to keep.
    Lose,
    /// The agent is killed, and goes on with its ring.
    Kill,
    /// The agent is stopped in order once everything is at rest, and started again.
    Stop,
}

/// All of them.
pub const ALL: [Do; 11] = [
    Do::Write,
    Do::Overlap,
    Do::Discard,
    Do::Mark,
    Do::Send,
    Do::Tidy,
    Do::Overflow,
    Do::Refuse,
    Do::Lose,
    Do::Kill,
    Do::Stop,
];

/// One volume of two regions.
const SECTORS: u64 = 2048 + 600;
const VOLUME: VolumeId = VolumeId(1);
/// Records that the ring has room for.
const RECORDS: u64 = 40;
/// How many of the crashes are followed until everything is at rest.
const FOLLOWED: u64 = 3;
/// Turns after which it should have come to rest.
const TURNS_MAX: u32 = 10_000;

/// Where the power is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disk {
    /// Before an effect on the disk with the state.
    State,
    /// Before an effect on the volume's disk.
    Volume,
}

/// What there is after one crash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// The power was cut before that effect.
    Cut,
    /// There are not so many effects: it was cut after all of them.
    After,
}

/// Plays the operations and cuts the source's power before an effect of the last one (counted from
/// 0); starts it again, and, of every third seed, has everything come to rest.
///
/// # Panics
/// When anything is violated.
pub fn crash(sequence: &[Do], at: Disk, effect: u64, seed: u64) -> Crash {
    let make_target =
        |sizes: &[u64], rng: &mut Rng| -> Box<dyn Target> { Box::new(Plain::new(sizes, rng)) };
    let mut world = World::of(Rng::new(seed), vec![SECTORS], RECORDS, false, make_target);
    world.calm = true;
    world.rest();
    let Some((last, before)) = sequence.split_last() else { return Crash::After };
    for act in before {
        assert!(world.act(*act), "nobody cuts the power");
    }
    world.source_disk(at).cut_after(effect);
    // A start in which the power goes leaves no agent.
    let through = world.act(*last) && world.agent.is_some();
    world.power_cut(true);
    world.restart();
    if seed.is_multiple_of(FOLLOWED) {
        world.rest();
        world.check_at_rest();
    }
    if through { Crash::After } else { Crash::Cut }
}

impl World {
    fn source_disk(&self, which: Disk) -> &SimDisk {
        match which {
            Disk::State => &self.site.state,
            Disk::Volume => &self.site.disk,
        }
    }

    /// Does something, and all that follows from it at once. False if the power went meanwhile.
    fn act(&mut self, act: Do) -> bool {
        match act {
            Do::Write => self.write(0, 4),
            Do::Overlap => {
                self.write(2048 - 6, 12);
                self.write(2048 - 2, 8);
            }
            Do::Discard => self.ask(VOLUME, Ask::Discard, 0, SECTORS),
            Do::Mark => {
                self.ask(VOLUME, Ask::Flush, 0, 0);
                if let Some(agent) = &mut self.agent {
                    let payload = [&[0; 16][..], b"mark"].concat();
                    // In a gap there is none.
                    let _ = agent.core.mark(&payload);
                    agent.turn();
                }
            }
            Do::Send => return self.send() && self.note(),
            Do::Tidy => return (0..3).all(|_| self.tidy()),
            Do::Overflow => (0..RECORDS + 4).for_each(|at| self.write(at % 20, 2)),
            Do::Refuse => {
                self.site.disk.fail(Op::Write, "/1", 0, errno::EIO);
                self.write(2, 4);
            }
            Do::Lose => {
                self.site.disk.fail(Op::Sync, "/1", 0, errno::EIO);
                self.ask(VOLUME, Ask::Flush, 0, 0);
            }
            Do::Kill => {
                self.kill(true);
                self.restart();
            }
            Do::Stop => return self.stop(),
        }
        self.settle_here()
    }

    fn write(&mut self, start: u64, sectors: u64) {
        self.ask(VOLUME, Ask::Write { fua: false }, start, sectors);
    }

    fn is_cut(&self) -> bool {
        self.site.state.is_off() || self.site.disk.is_off()
    }

    /// Does the next thing that is to be done on the source's machine. False if there is none.
    fn turn_here(&mut self) -> bool {
        self.counts.steps += 1;
        self.tick();
        let Some(agent) = &mut self.agent else { return false };
        let (jobs, answers, commands) = agent.waiting();
        // Disks, keeper and link do not wait for each other.
        let others = jobs + answers + commands > 0 && self.rng.below(2) == 0;
        if !agent.tasks.is_empty() && !others {
            agent.work(0);
        } else if jobs > 0 {
            agent.keep(false);
        } else if answers > 0 {
            agent.hear_keeper();
        } else if commands > 0 {
            agent.hear_link();
        } else {
            return false;
        }
        true
    }

    /// Does all that is to be done there. False if the power went.
    fn settle_here(&mut self) -> bool {
        for _ in 0..TURNS_MAX {
            let worked = self.turn_here();
            if self.is_cut() {
                return false;
            }
            self.look();
            if !worked {
                return true;
            }
        }
        panic!("it does not settle: {}", self.describe());
    }

    /// Everything there is goes to the target. False if the power went.
    fn send(&mut self) -> bool {
        for _ in 0..TURNS_MAX {
            if let Some(agent) = &mut self.agent {
                while agent.encode() {}
            }
            self.link();
            self.deliver();
            self.let_target_work();
            self.collect();
            if !self.settle_here() {
                return false;
            }
            let all = |agent: &crate::agent::Agent| agent.core.durable() == agent.core.last_seq();
            if self.agent.as_ref().is_some_and(all) {
                return true;
            }
        }
        panic!("it is not sent: {}", self.describe());
    }

    /// The keeper writes what is not urgent.
    fn note(&mut self) -> bool {
        if let Some(agent) = &mut self.agent {
            agent.keep(true);
        }
        !self.is_cut() && self.settle_here()
    }

    fn tidy(&mut self) -> bool {
        if let Some(agent) = &mut self.agent {
            agent.maintain();
        }
        self.settle_here()
    }

    /// Everything comes to rest: what was not captured is caught up, all of it is at the target.
    fn rest(&mut self) -> bool {
        for _ in 0..TURNS_MAX {
            if !(self.send() && self.note() && self.tidy()) {
                return false;
            }
            if self.is_at_rest() {
                return true;
            }
        }
        panic!("it does not come to rest: {}", self.describe());
    }

    fn stop(&mut self) -> bool {
        if !self.rest() {
            return false;
        }
        for _ in 0..TURNS_MAX {
            let Some(agent) = &mut self.agent else { return false };
            let settled = agent.settle();
            if !self.settle_here() {
                return false;
            }
            if settled {
                break;
            }
        }
        if let Some(agent) = &mut self.agent {
            agent.end();
        }
        if self.is_cut() {
            return false;
        }
        self.kill(false);
        self.restart();
        !self.is_cut() && self.settle_here()
    }
}
