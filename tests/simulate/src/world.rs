//! The world: a source with its agent, a network, a target, two clocks, and what goes wrong.
//!
//! Every step is one turn of somebody, chosen by the seed; between two steps anybody may die.

use std::{collections::VecDeque, os::fd::OwnedFd};

use tidemark_agent::{
    capture::{
        Ask, Request, RequestId,
        ring::{Layout, RingReader},
    },
    dirty::active::SLOTS,
};
use tidemark_journal::{Position, Sector, Seq, TermId, VolumeId};
use tidemark_link::message::Message;
use tidemark_simdisk::{How, Image as DiskImage, Rng, SimDisk};

use crate::{
    agent::{Agent, Asked, Session, Site},
    content::{Entry, Image, Stamp, bytes},
    requests,
    state_disk::Copy,
    target::Target,
};

/// What was asked of a source.
#[derive(Debug)]
pub struct Record {
    /// The request.
    pub request: Request,
    /// The step at which it was asked, and the last sequence drawn then.
    pub submitted: u64,
    /// See above.
    pub after: Seq,
    /// The last sequence drawn when it was answered.
    pub answered: Option<Seq>,
    /// Nobody waits for its answer any more.
    pub lost: bool,
}

/// Messages under way.
#[derive(Default)]
pub struct Net {
    /// To the target.
    pub there: VecDeque<Message>,
    /// To the agent.
    pub back: VecDeque<Message>,
    /// Whether the target has a session with this agent.
    pub open: bool,
    /// Nothing is delivered for so many steps.
    pub cut: u64,
}

/// A frame that was handed to the target.
#[derive(Clone)]
pub struct Fed {
    /// Where it ends.
    pub last: Position,
    /// Its records.
    pub entries: Vec<Entry>,
    /// When it was, by the time that has passed for the target.
    pub at_ns: u64,
}

/// Counts of a run.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Steps.
    pub steps: u64,
    /// Kills and power cuts of either side.
    pub crashes: u64,
    /// Points whose content was checked.
    pub points: u64,
    /// Records of the source.
    pub records: u64,
    /// Requests of the source's applications.
    pub requests: u64,
    /// Doubts.
    pub doubts: u64,
    /// Times a ring was gone on with.
    pub inherited: u64,
}

/// Everything.
pub struct World {
    /// Numbers by chance.
    pub rng: Rng,
    /// The source's machine.
    pub site: Site,
    /// Its agent, unless it is dead.
    pub agent: Option<Agent>,
    /// What a dead agent has left behind.
    pub left: Option<(OwnedFd, RingReader)>,
    /// The other side.
    pub target: Box<dyn Target>,
    /// Between them.
    pub net: Net,
    /// What was asked, by number.
    pub asked: Vec<Record>,
    /// Requests that a dead agent left unanswered.
    pub unanswered: Vec<Request>,
    /// Stretches of the volumes that are written: volume, first sector, sectors.
    pub hot: Vec<(usize, u64, u64)>,
    /// What each of their sectors may hold.
    pub sectors: Vec<Vec<requests::Sector>>,
    /// Those that are written at present: the others are left alone for a while.
    pub warm: Vec<usize>,
    /// Frames that were handed to the target.
    pub fed: Vec<Fed>,
    /// What the spool held when the agent was started without a ring: it comes before those. None if that cannot be
    /// read, until there is a doubt.
    pub spooled: Option<Vec<Entry>>,
    /// Records of the present term, as committed.
    pub own: Vec<Entry>,
    /// That term.
    pub term: TermId,
    /// The journal applied to its end, once it is known what came before.
    pub replayed: Option<Image>,
    /// What was acknowledged.
    pub promised: Position,
    /// Memories disagree by our doing, and not everything was compared since.
    pub suspect: bool,
    /// How many doubts there had been when they came to.
    pub doubts_then: u64,
    /// Something of what the target has may be damaged: what it serves is right, or an error.
    pub damaged: bool,
    /// Whether the target's disk rots.
    pub target_rots: bool,
    /// The agent prepares a new term.
    pub doubted: bool,
    /// Nothing goes wrong any more.
    pub calm: bool,
    /// Nothing new is asked.
    pub quiet: bool,
    /// Counts.
    pub counts: Counts,
    /// An image of the state disk, and the generation that was durable.
    pub state_image: Option<(DiskImage, u64)>,
    /// The frames that the target had when its disk was remembered.
    pub fed_then: Vec<Fed>,
    /// How rarely something goes wrong but at the target: in a long life there is more to be lost.
    pub(crate) rarity: u64,
    /// What may be rolled back: 0 nothing, 1 the source's state, 2 the target.
    pub rolls: u64,
    /// The newest generation in a welcome.
    pub welcomed: u64,
    /// A hash of all that has happened.
    pub trace: u64,
    /// Says what happens, on standard output.
    pub tell: bool,
    depth: usize,
    flushing: bool,
    boot_ns: u64,
    /// How far the target's time has come, on the same scale.
    pub(crate) target_ns: u64,
    wall_ns: i64,
}

/// The stamp that a request puts into a sector.
pub fn stamp(request: u64, sector: u64) -> Stamp {
    (request + 1) << 16 | sector
}

impl World {
    /// A new source and a new target, by the seed.
    pub fn new(seed: u64, make_target: impl FnOnce(&[u64], &mut Rng) -> Box<dyn Target>) -> World {
        let mut rng = Rng::new(seed);
        let sizes: Vec<u64> = match rng.below(3) {
            0 => vec![2048 + 600, 300],
            1 => vec![700, 300, 90],
            _ => vec![2048 + 56],
        };
        let records = [8, 40, 400][rng.below(3) as usize];
        World::of(rng, sizes, records, true, make_target)
    }

    /// The same with volumes of these sectors, a ring for so many records, and perhaps a spool; the rest
    /// by chance.
    pub fn of(
        mut rng: Rng,
        sizes: Vec<u64>,
        records: u64,
        with_spool: bool,
        make_target: impl FnOnce(&[u64], &mut Rng) -> Box<dyn Target>,
    ) -> World {
        let mut hot: Vec<(usize, u64, u64)> = Vec::new();
        for (volume, sectors) in sizes.iter().enumerate() {
            hot.push((volume, 0, 24));
            hot.push((volume, sectors - 20, 20));
            if *sectors > 2048 + 100 {
                hot.push((volume, 2048 - 16, 32));
            }
        }
        let slots = 64 + records;
        let spooled = with_spool && rng.below(2) == 0;
        // Half of it, and the spool is used.
        // The longest record has to fit as it is.
        let frame_bytes = if spooled { 1100 << 10 } else { 2 << 20 };
        let layout = Layout {
            slots,
            data_bytes: 3 << 20,
            frame_bytes: frame_bytes + (4096 - slots * 64 % 4096) % 4096,
        };
        let site = Site {
            disk: SimDisk::new_direct(rng.next_u64()),
            state: SimDisk::new(rng.next_u64()),
            spool: spooled.then(|| SimDisk::new(rng.next_u64())),
            rotten: [None, Some(Copy::First), Some(Copy::Second)][rng.below(3) as usize],
            sizes: sizes.clone(),
            layout,
            // With two, others have to give way all the time.
            active_max: if rng.below(2) == 0 { 2 } else { SLOTS },
        };
        let mut sectors = Vec::new();
        let mut contents: Vec<Vec<Stamp>> =
            sizes.iter().map(|sectors| vec![0; *sectors as usize]).collect();
        for (volume, start, length) in &hot {
            let mut stretch = Vec::new();
            for sector in *start..start + length {
                let content = if rng.below(2) == 0 { 0 } else { u64::MAX << 20 | sector };
                contents[*volume][sector as usize] = content;
                stretch.push(requests::Sector::new(content, 0));
            }
            sectors.push(stretch);
        }
        for (volume, content) in contents.iter().enumerate() {
            let path = format!("/{}", volume + 1);
            let file = site.disk.open(std::path::Path::new(&path), How::New).expect("a new disk");
            file.write_at(&bytes(content), 0).and_then(|()| file.sync()).expect("a new disk");
        }
        site.disk.sync_dir(std::path::Path::new("/")).expect("a new disk");
        let target = make_target(&sizes, &mut rng);
        let mut world = World {
            site,
            agent: None,
            left: None,
            target,
            net: Net::default(),
            asked: Vec::new(),
            unanswered: Vec::new(),
            warm: (0..hot.len()).collect(),
            hot,
            sectors,
            fed: Vec::new(),
            spooled: Some(Vec::new()),
            own: Vec::new(),
            term: TermId::default(),
            replayed: None,
            promised: Position::default(),
            suspect: false,
            doubts_then: 0,
            damaged: false,
            target_rots: rng.below(4) == 0,
            doubted: false,
            calm: false,
            quiet: false,
            counts: Counts::default(),
            state_image: None,
            fed_then: Vec::new(),
            rarity: [1, 1, 4, 30][rng.below(4) as usize],
            rolls: rng.below(3),
            welcomed: 0,
            trace: 0,
            tell: false,
            depth: [2, 6, 16][rng.below(3) as usize],
            flushing: rng.below(4) > 0,
            boot_ns: 1_000_000_000,
            target_ns: 1_000_000_000,
            wall_ns: 1_700_000_000_000_000_000,
            rng,
        };
        world.tick();
        world.restart();
        world
    }

    /// Runs it: so many steps in which things go wrong, then until everything is at rest.
    ///
    /// # Panics
    /// When something is violated.
    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step();
        }
        self.calm = true;
        self.net.cut = 0;
        self.site.disk.fail_no_more();
        self.site.state.fail_no_more();
        self.target.rot_no_more();
        self.site.spool.iter().for_each(SimDisk::fail_no_more);
        for _ in 0..steps / 10 {
            self.step();
        }
        self.quiet = true;
        let mut looked = 0;
        for step in 0..40_000u64 {
            self.step();
            // What is damaged is to be sent again: that takes a while.
            if !self.is_at_rest() || step < looked {
                continue;
            }
            if self.target.scrub() {
                return self.check_at_rest();
            }
            looked = step + 200;
            if self.rng.below(8) == 0 {
                // In one session it asks only once in an hour.
                self.reset();
            }
        }
        panic!("it does not come to rest: {}", self.describe());
    }

    pub(crate) fn is_at_rest(&self) -> bool {
        let Some(agent) = &self.agent else { return false };
        let nobody = self.asked.iter().all(|asked| asked.answered.is_some() || asked.lost);
        nobody
            && !self.target.is_off()
            && self.unanswered.is_empty()
            && agent.is_quiet()
            && matches!(agent.session, Session::Up { .. })
            && self.net.there.is_empty()
            && self.net.back.is_empty()
            && self.target.position().seq == agent.core.last_seq()
    }

    pub(crate) fn describe(&self) -> String {
        let Some(agent) = &self.agent else { return "the agent is dead".into() };
        let volumes = self.site.volumes();
        let gaps: Vec<_> = volumes.iter().map(|(id, _)| agent.core.gap(*id)).collect();
        let counts: Vec<_> =
            volumes.iter().map(|(id, _)| agent.core.map().uncaptured(*id).count()).collect();
        format!(
            "last {} durable {} target {} waiting {:?} tasks {} gaps {gaps:?} uncaptured {counts:?} \
             overflow {} idle {} up {} unanswered {} net {} {}",
            agent.core.last_seq().0,
            agent.core.durable().0,
            self.target.position(),
            agent.waiting(),
            agent.tasks.len(),
            agent.core.is_overflowing(),
            agent.core.is_idle(),
            matches!(agent.session, Session::Up { .. }),
            self.unanswered.len(),
            self.net.there.len(),
            self.net.back.len(),
        )
    }

    pub(crate) fn tell(&self, what: impl FnOnce() -> String) {
        if self.tell {
            println!("{:>6} {}", self.counts.steps, what());
        }
    }

    /// Time goes by.
    pub(crate) fn tick(&mut self) {
        let ns = if self.rng.below(40) == 0 { 2_000_000_000 } else { 5_000_000 };
        let by = 1 + self.rng.below(ns);
        self.boot_ns += by;
        self.wall_ns += by as i64;
        if !self.calm && self.rng.below(300) == 0 {
            self.wall_ns += self.rng.below(7200 << 30) as i64 - (3600 << 30);
        }
        tidemark_agent::clock::simulated::set(self.boot_ns, self.wall_ns);
    }

    fn step(&mut self) {
        self.counts.steps += 1;
        self.tick();
        if self.site.is_off() {
            self.power_cut(true);
        }
        if self.target.is_off() {
            self.target_crash(true);
        }
        if self.rng.below(150) == 0 {
            self.warm_up();
        }
        self.check_a_point();
        if !self.calm {
            self.maybe_go_wrong();
        }
        let Some(agent) = &mut self.agent else {
            if self.calm || self.rng.below(12) == 0 {
                self.restart();
            } else {
                self.let_target_work();
            }
            return self.look();
        };
        let (jobs, answers, commands) = agent.waiting();
        let tasks = agent.tasks.len();
        let up = matches!(agent.session, Session::Up { .. });
        let choice = self.rng.below(100);
        match choice {
            0..20 => self.front(),
            20..45 if tasks > 0 => {
                let task = self.rng.below(tasks as u64) as usize;
                agent.work(task);
            }
            45..53 if jobs > 0 => agent.keep(false),
            53..61 if answers > 0 => agent.hear_keeper(),
            61..69 if commands > 0 => agent.hear_link(),
            69..76 => {
                agent.encode();
            }
            76..82 => {
                for _ in 0..1 + self.rng.below(4) {
                    self.link();
                }
            }
            82..87 => {
                for _ in 0..1 + self.rng.below(6) {
                    self.deliver();
                }
            }
            87..91 => {
                self.let_target_work();
                self.collect();
            }
            91..93 => agent.turn(),
            93 if up => {
                if let Some(heartbeat) = agent.heartbeat() {
                    self.net.there.push_back(Message::Heartbeat(heartbeat));
                }
            }
            94 => agent.spool(),
            95 | 99 => agent.maintain(),
            96 => agent.keep(true),
            97 if !self.quiet => {
                let name = format!("m{}", self.counts.steps);
                let payload = [&[0; 16][..], name.as_bytes()].concat();
                // Inside a gap there is none.
                let _ = agent.core.mark(&payload);
                agent.turn();
            }
            98 if !self.quiet && self.rng.below(8) == 0 => {
                agent.core.verify(VolumeId(1));
                agent.turn();
            }
            _ => {
                if tasks > 0 {
                    agent.work(0);
                }
            }
        }
        self.look();
    }

    /// The target comes up to the present time, or a little nearer to it: so that it may be met in the
    /// middle of something.
    pub(crate) fn let_target_work(&mut self) {
        let behind_ns = self.boot_ns - self.target_ns;
        let by_ns = match self.rng.below(3) {
            0 => behind_ns,
            _ => behind_ns.min(self.rng.below(12_000_000)),
        };
        // Its timers would make whole milliseconds of it.
        let by_ns = by_ns - by_ns % 1_000_000;
        self.target_ns += by_ns;
        self.target.advance(by_ns);
    }

    /// Applications turn to other places.
    fn warm_up(&mut self) {
        let all = 0..self.hot.len();
        self.warm = all.filter(|_| self.rng.below(2) == 0).collect();
        if self.warm.is_empty() || self.quiet {
            self.warm = (0..self.hot.len()).collect();
        }
    }

    /// An application asks for something.
    fn front(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let under_way =
            self.asked.iter().filter(|asked| asked.answered.is_none() && !asked.lost).count();
        // Nobody is served before what was left is carried out again.
        if agent.core.redo_count() > 0 || under_way >= self.depth {
            return;
        }
        if let Some(request) = self.unanswered.pop() {
            return self.ask(request.volume, request.ask, request.start.0, request.sectors);
        }
        if self.quiet {
            return;
        }
        let stretch = self.warm[self.rng.below(self.warm.len() as u64) as usize];
        let (volume, first, length) = self.hot[stretch];
        let id = VolumeId(volume as u16 + 1);
        let in_gap = agent.core.gap(id).is_some();
        let offset = self.rng.below(length);
        let sectors = 1 + self.rng.below((length - offset).min(12));
        let fua = self.flushing && self.rng.below(30) == 0;
        match self.rng.below(100) {
            0..10 if self.flushing => self.ask(id, Ask::Flush, 0, 0),
            // Or makes all of it again what it was once, in a gap above all: content that has come back is told
            // from content that never went by its position alone.
            10..16 => self.ask(id, Ask::Zero { unmap: true, fua }, first, length),
            16..22 => self.ask(id, Ask::Zero { unmap: true, fua }, first + offset, sectors),
            22..25 => self.ask(id, Ask::Discard, first + offset, sectors),
            // All of the volume, unless some of it is to be left alone.
            25..27 if self.warm.len() == self.hot.len() => {
                self.ask(id, Ask::Discard, 0, self.site.sizes[volume]);
            }
            27..50 if in_gap => self.ask(id, Ask::Zero { unmap: true, fua }, first, length),
            // A file system writes the same place again and again.
            _ if self.rng.below(3) == 0 => self.ask(id, Ask::Write { fua }, first, 4.min(length)),
            _ => self.ask(id, Ask::Write { fua }, first + offset, sectors),
        }
    }

    pub(crate) fn ask(&mut self, volume: VolumeId, ask: Ask, start: u64, sectors: u64) {
        let number = self.asked.len() as u64;
        let Some(agent) = &mut self.agent else { return };
        let request = Request { id: RequestId(number), volume, ask, start: Sector(start), sectors };
        let after = agent.core.last_seq();
        let submitted = self.counts.steps;
        self.asked.push(Record { request, submitted, after, answered: None, lost: false });
        self.counts.requests += 1;
        if self.tell {
            println!("{submitted:>6} asked: {request:?} after {after}");
        }
        let content: Vec<Stamp> = match ask {
            Ask::Write { .. } => (start..start + sectors).map(|at| stamp(number, at)).collect(),
            _ => Vec::new(),
        };
        if ask != Ask::Flush {
            for (sector, at) in touched(&self.hot, &mut self.sectors, &request) {
                let stamp = content.get((at - start) as usize).copied().unwrap_or(0);
                sector.submitted(stamp, submitted);
            }
        }
        agent.submit(Asked { request, content });
    }

    /// The link does its next step.
    pub(crate) fn link(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        match &agent.session {
            Session::Down => {
                let ready = !self.doubted || agent.has_changed() || self.rng.below(50) == 0;
                if ready && self.net.cut == 0 {
                    self.doubted = false;
                    let hello = agent.greet();
                    self.net.there.clear();
                    self.net.back.clear();
                    self.net.open = true;
                    self.target.connect(hello);
                }
            }
            Session::Greeted(_) if !self.net.open => agent.hang_up(),
            Session::Greeted(_) => {}
            Session::Up { .. } if agent.has_changed() => {
                agent.hang_up();
                self.reset();
            }
            Session::Up { .. } => {
                if !self.net.open && self.rng.below(4) == 0 {
                    // A half-open connection is noticed in the end.
                    agent.hang_up();
                    self.net.there.clear();
                    self.net.back.clear();
                } else if self.net.there.len() < 8
                    && let Some(frame) = agent.next_frame()
                {
                    self.net.there.push_back(Message::Frame(frame));
                }
            }
        }
    }

    /// The connection is reset: what was under way is lost.
    pub(crate) fn reset(&mut self) {
        self.net = Net { cut: self.net.cut, ..Net::default() };
        self.target.disconnect();
    }

    pub(crate) fn deliver(&mut self) {
        if self.net.cut > 0 {
            return;
        }
        if self.net.open
            && let Some(message) = self.net.there.pop_front()
        {
            if let Message::Frame(frame) = &message {
                let (last, entries) = crate::target::entries(frame);
                self.fed.push(Fed { last, entries, at_ns: self.target_ns });
                if self.tell {
                    println!(
                        "{:>6} fed up to {:?}",
                        self.counts.steps,
                        self.fed.last().map(|f| f.last)
                    );
                }
            }
            self.target.feed(message);
        }
        if let Some(message) = self.net.back.pop_front() {
            self.hear(message);
        }
    }

    /// Takes what the target has said onto its way.
    pub(crate) fn collect(&mut self) {
        for message in self.target.replies() {
            if let Message::Ack(ack) = &message
                && let Some(agent) = &self.agent
                && ack.final_durable > self.promised.seq
            {
                self.promised = agent.ancestry().at(ack.final_durable);
            }
            if self.net.open {
                self.net.back.push_back(message);
            }
        }
    }

    fn hear(&mut self, message: Message) {
        let Some(agent) = &mut self.agent else { return };
        match message {
            Message::Welcome(welcome) => {
                self.welcomed = self.welcomed.max(welcome.map_generation);
                match agent.welcomed(&welcome) {
                    Ok(Some(from)) => self.resumed(from, welcome.position),
                    Ok(None) => {
                        self.counts.doubts += 1;
                        self.spooled = Some(Vec::new());
                        self.doubted = true;
                        self.reset();
                    }
                    Err(sentence) => panic!("refused: {sentence}"),
                }
            }
            Message::Ack(ack) => agent.acknowledged(&ack),
            Message::Need(need) => agent.needed(&need),
            Message::Repair(repair) => agent.damaged(repair),
            Message::Refuse(refuse) => panic!("the target refuses: {refuse}"),
            Message::Bye => {
                agent.hang_up();
                self.reset();
            }
            _ => {}
        }
    }

    /// Starts the agent.
    pub(crate) fn restart(&mut self) {
        let (rings, shadow) = match self.left.take() {
            Some((fd, shadow)) => (vec![fd], Some(shadow)),
            None => (Vec::new(), None),
        };
        let had_ring = shadow.is_some();
        match Agent::start(&self.site, rings, shadow, &mut self.rng) {
            Ok(agent) => {
                self.counts.inherited += u64::from(agent.with_ring);
                if had_ring && !agent.with_ring {
                    // It was not to be trusted; what it held is lost.
                    self.replayed = None;
                }
                self.agent = Some(agent);
                self.doubted = false;
                self.tell(|| format!("started: {}", self.describe()));
                self.started();
            }
            Err(error) => {
                // The power went again, or the disk is bad: whoever is in charge starts it again.
                assert!(self.site.is_off() || !self.calm, "it does not start: {error:#}");
                self.power_cut(true);
            }
        }
    }
}

/// The sectors of the hot stretches that a request touches, and their numbers.
pub fn touched<'a>(
    hot: &'a [(usize, u64, u64)],
    sectors: &'a mut [Vec<requests::Sector>],
    request: &Request,
) -> impl Iterator<Item = (&'a mut requests::Sector, u64)> {
    let volume = usize::from(request.volume.0) - 1;
    let range = request.start.0..request.start.0 + request.sectors;
    hot.iter().zip(sectors).filter(move |((of, ..), _)| *of == volume).flat_map(
        move |((_, start, _), stretch)| {
            let range = range.clone();
            let numbered = stretch.iter_mut().zip(*start..);
            numbered.filter(move |(_, at)| range.contains(at))
        },
    )
}
