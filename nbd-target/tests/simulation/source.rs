//! A source that is played: it makes frames, keeps them, and remembers what each position holds.

use std::collections::BTreeMap;

use tidemark_journal::{
    Ancestry, Compression, FrameBuilder, FrameMeta, FrameView, GapReason, GroupId, Kind, Position,
    Record, Sector, Seq, TermId, VolumeId, record::flag,
};
use tidemark_link::{
    NodeName,
    hello::{TargetMemory, Verdict, compare},
    message::{GroupHello, Heartbeat, Hello, Message, ProtocolRange, Refuse, VolumeHello},
};
use tidemark_simdisk::Rng;
use tidemark_target::simulation::SimTarget;

pub const GROUP: &str = "shop";
pub const VOLUMES: u16 = 2;
/// Sectors of a volume: eight blocks of 4096.
pub const SECTORS: u64 = 64;
/// The wall clock at which everything begins.
pub const WALL_NS: i64 = 1_795_424_400_000_000_000;

/// What a volume holds: a number for each sector, zero for zeros.
pub type Disk = Vec<u64>;

/// The source.
pub struct Source {
    pub rng: Rng,
    ancestry: Ancestry,
    builder: FrameBuilder,
    before: Position,
    last: Seq,
    pub acked: Position,
    now: Vec<Disk>,
    /// What each position holds, from the first record on.
    pub states: BTreeMap<Seq, Vec<Disk>>,
    pub marks: Vec<(String, Seq)>,
    /// Positions between a gap's begin and its end.
    in_gap: bool,
    pub gaps: Vec<(Seq, Option<Seq>)>,
    frames: Vec<(Position, Vec<u8>)>,
    next_value: u64,
    time_ns: u64,
    map_generation: u64,
    terms: u8,
    /// What is full at the target: nothing is sent.
    pub full: bool,
    /// Offers not answered yet, with the blocks that are wanted at least.
    pub offers: BTreeMap<Seq, Vec<usize>>,
    pub refusals: Vec<String>,
    /// What it says that it can.
    pub features: Vec<String>,
    /// The numbers with which leases were asked for.
    pub lease_asks: Vec<u64>,
}

impl Source {
    pub fn new(seed: u64) -> Source {
        let term = TermId([1; 16]);
        let mut source = Source {
            rng: Rng::new(seed),
            ancestry: Ancestry::root(term),
            builder: FrameBuilder::new(Compression::Zstd(1)),
            before: Position { term, seq: Seq::ZERO },
            last: Seq::ZERO,
            acked: Position::default(),
            now: vec![vec![0; SECTORS as usize]; VOLUMES.into()],
            states: BTreeMap::new(),
            marks: Vec::new(),
            in_gap: true,
            gaps: vec![(Seq::ZERO, None)],
            frames: Vec::new(),
            next_value: 1,
            time_ns: 1_000_000_000,
            map_generation: 1,
            terms: 1,
            full: false,
            offers: BTreeMap::new(),
            refusals: Vec::new(),
            features: Vec::new(),
            lease_asks: Vec::new(),
        };
        source.states.insert(Seq::ZERO, source.now.clone());
        source
    }

    /// The same source once more; nothing is in the making.
    pub fn copy(&self) -> Source {
        Source {
            rng: self.rng.clone(),
            ancestry: self.ancestry.clone(),
            builder: FrameBuilder::new(Compression::Zstd(1)),
            now: self.now.clone(),
            states: self.states.clone(),
            marks: self.marks.clone(),
            gaps: self.gaps.clone(),
            frames: self.frames.clone(),
            offers: self.offers.clone(),
            refusals: self.refusals.clone(),
            features: self.features.clone(),
            lease_asks: self.lease_asks.clone(),
            ..*self
        }
    }

    pub fn node() -> NodeName {
        "db1".parse().expect("a name")
    }

    fn hello(&self) -> Hello {
        let volume = |id: u16| VolumeHello {
            id: VolumeId(id),
            name: format!("disk{id}"),
            sectors: SECTORS,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
        };
        Hello {
            protocol: ProtocolRange::OWN,
            features: self.features.clone(),
            software: "a played source".to_owned(),
            group: GroupHello { id: GroupId([7; 16]), name: GROUP.to_owned() },
            ancestry: self.ancestry.clone(),
            volumes: (0..VOLUMES).map(volume).collect(),
            acked: self.acked,
            ceiling: Seq(1 << 40),
            map_generation: self.map_generation,
        }
    }

    /// Greets and sends again what the target lacks. Says whether the target had lost what it
    /// acknowledged: then a new term has begun, with everything in it.
    pub fn connect(&mut self, target: &mut SimTarget) -> Connected {
        self.offers.clear();
        self.full = false;
        let hello = self.hello();
        match target.greet(&Source::node(), hello.clone()) {
            Some(Message::Welcome(welcome)) => {
                let memory = TargetMemory::from(&welcome);
                match compare(&hello, &memory) {
                    Verdict::Resume { from } => {
                        self.resend(target, from.seq);
                        Connected::Resumed
                    }
                    Verdict::Fresh => {
                        self.resend(target, Seq::ZERO);
                        Connected::Resumed
                    }
                    Verdict::Doubt { .. } => {
                        let at = welcome.position.unwrap_or_default();
                        self.begin_anew(at);
                        Connected::Doubted(at)
                    }
                    Verdict::Refuse(refuse) => self.refused(&refuse),
                }
            }
            Some(Message::Refuse(refuse)) => self.refused(&refuse),
            Some(other) => panic!("{other:?} is no answer to a greeting"),
            None => Connected::Refused,
        }
    }

    fn refused(&mut self, refuse: &Refuse) -> Connected {
        self.refusals.push(refuse.to_string());
        Connected::Refused
    }

    fn resend(&mut self, target: &SimTarget, have: Seq) {
        for (last, frame) in &self.frames {
            if last.seq > have {
                let view = FrameView::parse(frame).expect("a frame");
                let rest = tidemark_journal::cut::tail(&view, have).expect("something is left");
                target.feed(Message::Frame(rest.to_vec()));
            }
        }
    }

    /// Everything is compared: a new term, whose first frames hold all content again.
    fn begin_anew(&mut self, at: Position) {
        self.finish();
        self.terms += 1;
        let id = TermId([self.terms; 16]);
        self.ancestry = self.ancestry.fork(id, self.last).expect("a path");
        self.acked = at;
        self.map_generation += 1;
        self.frames.clear();
        for volume in 0..VOLUMES {
            let begin = self.push(Kind::GapBegin, GapReason::Doubt as u8, volume, 0, 0, &[]);
            if volume == 0 {
                // Nothing is known of what was lost.
                self.gaps.push((begin.min(at.seq.next()), None));
            }
        }
        self.in_gap = true;
        self.finish();
        self.sync_all();
    }

    /// A volume is in a gap from now on.
    pub fn gap_begin(&mut self) {
        let begin = self.push(Kind::GapBegin, GapReason::Overflow as u8, 0, 0, 0, &[]);
        self.gaps.push((begin, None));
        self.in_gap = true;
    }

    /// Sends all content and ends the gap.
    pub fn sync_all(&mut self) {
        for volume in 0..VOLUMES {
            let bytes = bytes(&self.now[usize::from(volume)]);
            self.push(Kind::Sync, 0, volume, 0, SECTORS as u32, &bytes);
        }
        self.finish();
        let mut end = Seq::ZERO;
        for volume in 0..VOLUMES {
            end = self.push(Kind::GapEnd, 0, volume, 0, 0, &[]);
        }
        self.finish();
        self.in_gap = false;
        if let Some(gap) = self.gaps.last_mut() {
            gap.1 = Some(end);
        }
    }

    /// One record by chance.
    pub fn record(&mut self) {
        let volume = self.rng.below(VOLUMES.into()) as u16;
        let whole_blocks = self.rng.below(3) > 0;
        let mut start = self.rng.below(SECTORS);
        let mut sectors = 1 + self.rng.below(12).min(SECTORS - start - 1);
        if whole_blocks {
            start = start / 8 * 8;
            sectors = sectors.next_multiple_of(8).min(SECTORS - start);
        }
        match self.rng.below(16) {
            0 => drop(self.push(Kind::Zero, 0, volume, start, sectors as u32, &[])),
            1 => drop(self.push(Kind::Discard, 0, volume, start, sectors as u32, &[])),
            2 => drop(self.push(Kind::Sync, flag::ZEROS, volume, start, sectors as u32, &[])),
            3 => drop(self.push(Kind::Flush, 0, 0, 0, 0, &[])),
            4 => self.mark(),
            5 => self.offer(volume),
            _ => self.write(volume, start, sectors),
        }
    }

    pub fn write(&mut self, volume: u16, start: u64, sectors: u64) {
        let value = self.next_value;
        self.next_value += 1;
        let content = bytes(&vec![value; sectors as usize]);
        self.push(Kind::Write, 0, volume, start, sectors as u32, &content);
    }

    pub fn mark(&mut self) {
        let name = format!("m{}", self.last.0 + 1);
        let payload = [&[0; 16], name.as_bytes()].concat();
        let seq = self.push(Kind::Mark, 0, 0, 0, payload.len() as u32, &payload);
        self.marks.push((name, seq));
    }

    /// Offers a volume with some blocks changed: those must be wanted.
    fn offer(&mut self, volume: u16) {
        let wanted: Vec<usize> =
            (0..SECTORS as usize / 8).filter(|_| self.rng.below(3) == 0).collect();
        let mut content = bytes(&self.now[usize::from(volume)]);
        for block in &wanted {
            content[block * 4096] ^= 1;
        }
        let hash = |block: &[u8]| blake3::hash(block).as_bytes()[..16].to_vec();
        let hashes: Vec<u8> = content.chunks(4096).flat_map(hash).collect();
        let seq = self.push(Kind::Offer, 0, volume, 0, SECTORS as u32, &hashes);
        self.offers.insert(seq, wanted);
    }

    /// Adds a record to the frame in the making, and to the model.
    fn push(
        &mut self,
        kind: Kind,
        flags: u8,
        volume: u16,
        start: u64,
        sectors: u32,
        payload: &[u8],
    ) -> Seq {
        self.time_ns += 1_000_000;
        self.last = self.last.next();
        let (volume, seq, time_ns) = (VolumeId(volume), self.last, self.time_ns);
        let record = Record { kind, flags, volume, seq, time_ns, start: Sector(start), sectors };
        self.builder.push(&record, [payload]);
        if kind.changes_content() {
            let disk = &mut self.now[usize::from(volume.0)];
            for sector in 0..u64::from(sectors) {
                let at = sector as usize * 512;
                let value = payload
                    .get(at..at + 8)
                    .map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
                disk[(start + sector) as usize] = value;
            }
        }
        self.states.insert(seq, self.now.clone());
        seq
    }

    /// Closes the frame in the making, if anything is in it.
    pub fn finish(&mut self) -> Option<Vec<u8>> {
        if self.builder.is_empty() {
            return None;
        }
        let term = self.ancestry.current().id;
        let group = GroupId([7; 16]);
        let wall_ns = WALL_NS + self.time_ns as i64;
        let meta = FrameMeta { group, term, before: self.before, wall_ns };
        let frame = self.builder.finish(&meta).to_vec();
        self.builder.clear();
        self.before = Position { term, seq: self.last };
        self.frames.push((self.before, frame.clone()));
        Some(frame)
    }

    /// Sends the frame in the making.
    pub fn send(&mut self, target: &SimTarget) {
        if let Some(frame) = self.finish()
            && !self.full
        {
            target.feed(Message::Frame(frame));
        }
    }

    pub fn heartbeat(&mut self, target: &SimTarget) {
        self.time_ns += 1_000_000;
        target.feed(Message::Heartbeat(Heartbeat {
            number: 1,
            journal_ns: self.time_ns,
            wall_ns: WALL_NS + self.time_ns as i64,
            vouched: self.before,
            map_generation: self.map_generation,
        }));
    }

    /// Takes in what the target has said.
    pub fn hear(&mut self, target: &mut SimTarget) {
        for reply in target.replies() {
            match reply {
                Message::Ack(ack) => {
                    assert!(ack.final_durable <= self.last, "acknowledged and never sent");
                    assert!(ack.final_durable >= self.acked.seq, "an acknowledgement goes back");
                    if ack.final_durable > self.acked.seq {
                        let terms =
                            self.frames.iter().find(|(last, _)| last.seq >= ack.final_durable);
                        let term = terms.map_or(self.before.term, |(last, _)| last.term);
                        self.acked = Position { term, seq: ack.final_durable };
                    }
                    let resumes = self.full && !ack.flags.full;
                    self.full = ack.flags.full;
                    if resumes {
                        // What was held back follows what was received.
                        self.resend(target, ack.hop_received);
                    }
                }
                Message::Need(need) => {
                    if let Some(wanted) = self.offers.remove(&need.seq) {
                        let missed = wanted.iter().find(|block| !need.wants(**block));
                        assert_eq!(missed, None, "a block that differs is not wanted");
                    }
                }
                Message::Refuse(refuse) => self.refusals.push(refuse.to_string()),
                Message::LeaseAsk(ask) => self.lease_asks.push(ask.number),
                _ => {}
            }
        }
    }

    /// Whether a position is outside all gaps.
    pub fn is_good(&self, at: Seq) -> bool {
        self.gaps.iter().all(|(begin, end)| at < *begin || end.is_some_and(|end| at >= end))
    }

    pub fn last(&self) -> Seq {
        self.last
    }
}

/// What came of a greeting.
#[derive(Debug)]
pub enum Connected {
    Resumed,
    Doubted(Position),
    Refused,
}

/// A disk's bytes.
pub fn bytes(disk: &[u64]) -> Vec<u8> {
    let mut all = vec![0; disk.len() * 512];
    for (sector, value) in all.chunks_mut(512).zip(disk) {
        for (word, n) in sector.chunks_mut(8).zip(0..) {
            // The first word is the value itself; zeros are zeros throughout.
            let spread = if *value == 0 { 0 } else { value.wrapping_mul(1 + 2 * n) };
            word.copy_from_slice(&spread.to_le_bytes());
        }
    }
    all
}
