//! The target as the world sees it, and a plain one.

use std::{cell::RefCell, collections::VecDeque};

use tidemark_journal::{Ancestry, FrameView, Kind, Position, Seq};
use tidemark_link::{
    hello::TargetMemory,
    message::{Echo, Hello, Message, Need, VolumeSize},
};
use tidemark_simdisk::Rng;
use tidemark_target::{
    receiver::{Session, Step},
    store::journal::Progress,
};

use crate::content::{Entry, Image, Stamp, bytes};

/// A target, one of whose groups is the simulator's.
pub trait Target {
    /// Begins a session in place of the one before.
    fn connect(&mut self, hello: Hello);
    /// The connection is gone.
    fn disconnect(&mut self);
    /// Hands a message of the source over.
    fn feed(&mut self, message: Message);
    /// Lets so many nanoseconds go by for it.
    fn advance(&mut self, ns: u64);
    /// What it has said since the last call.
    fn replies(&mut self) -> Vec<Message>;
    /// The end of what is durable.
    fn position(&self) -> Position;
    /// The stretches of sequences that are offered for the whole group.
    fn points(&self) -> Vec<(Seq, Seq)>;
    /// Content of a volume (from 0) at a sequence.
    ///
    /// # Errors
    /// Why there is none, for people.
    fn read(&self, volume: usize, seq: Seq, start: u64, sectors: u64)
    -> Result<Vec<Stamp>, String>;
    /// The oldest sequence offered: what lies below has left the window.
    fn oldest(&self) -> Seq {
        Seq::ZERO
    }
    /// How long it keeps what it has received.
    fn window_ns(&self) -> u64 {
        u64::MAX
    }
    /// Has its power fail after so many more effects on its disk, if it has one.
    fn cut_after(&mut self, _effects: u64) {}
    /// Whether its power is off: it is to be crashed.
    fn is_off(&self) -> bool {
        false
    }
    /// Its process dies, or (`power`) its machine; it is there again.
    fn crash(&mut self, power: bool);
    /// Remembers what is on its disk.
    fn keep_image(&mut self);
    /// The power fails, and the disk is as it was when it was remembered. False if it never was.
    fn roll_back(&mut self) -> bool;
    /// A bit of its disk rots, or a few writes go astray. False if it has no disk.
    fn rot(&mut self) -> bool {
        false
    }
    /// Its disk is as it should be from now on.
    fn rot_no_more(&mut self) {}
    /// Looks for damage in all that it has, while nothing is under way: whether its newest content is
    /// whole.
    fn scrub(&mut self) -> bool {
        true
    }
}

/// Frames as they were taken in: the position each ends at, and its records.
type Log = Vec<(Position, Vec<Entry>)>;

/// A target that is as simple as can be: what it keeps is a list. Its sessions are the real ones.
pub struct Plain {
    sizes: Vec<u64>,
    session: Option<Session>,
    inbox: VecDeque<Message>,
    replies: Vec<Message>,
    log: Log,
    durable: usize,
    /// The generation heard of, and the durable one.
    generation: (u64, u64),
    volumes: Vec<VolumeSize>,
    /// The path of terms, as the source last named it.
    path: Option<Ancestry>,
    image: Option<(Log, u64, Vec<VolumeSize>)>,
    /// The content that was last asked for: at this sequence, of a log that ended so.
    read: RefCell<Option<(Seq, Option<Position>, Image)>>,
    rng: Rng,
}

impl Plain {
    /// An empty one.
    pub fn new(sizes: &[u64], rng: &mut Rng) -> Plain {
        Plain {
            sizes: sizes.to_vec(),
            session: None,
            inbox: VecDeque::new(),
            replies: Vec::new(),
            log: Vec::new(),
            durable: 0,
            generation: (0, 0),
            volumes: Vec::new(),
            path: None,
            image: None,
            read: RefCell::default(),
            rng: rng.fork(),
        }
    }

    fn image_at(&self, seq: Seq) -> Image {
        let mut image = Image::new(&self.sizes);
        let entries = self.log.iter().flat_map(|(_, entries)| entries);
        for entry in entries.take_while(|entry| entry.record.seq <= seq) {
            image.apply(entry);
        }
        image
    }

    fn take(&mut self, message: Message) {
        let Some(session) = &mut self.session else { return };
        match session.receive(message) {
            Ok(Step::Append { frame, .. }) => {
                let (last, entries) = entries(&frame);
                let offers: Vec<Entry> = entries
                    .iter()
                    .filter(|entry| entry.record.kind == Kind::Offer)
                    .cloned()
                    .collect();
                self.log.push((last, entries));
                for offer in offers {
                    let need = self.compare(&offer);
                    self.replies.push(Message::Need(need));
                }
            }
            // The source grants none.
            Ok(Step::Lease(_)) => {}
            Ok(Step::Heartbeat(heartbeat)) => {
                self.generation.0 = self.generation.0.max(heartbeat.map_generation);
                let echo = Echo { number: heartbeat.number, received_wall_ns: 0 };
                self.replies.push(Message::Echo(echo));
            }
            Ok(Step::End) => self.session = None,
            Err(refusal) => {
                self.replies.push(Message::Refuse(refusal));
                self.session = None;
            }
        }
    }

    fn compare(&self, offer: &Entry) -> Need {
        let record = &offer.record;
        let image = self.image_at(record.seq);
        let range = record.start.0 as usize..record.end().0 as usize;
        let volume = usize::from(record.volume.0) - 1;
        let own = bytes(&image.volumes[volume][range.clone()]);
        let mut need = Need::nothing(record.seq);
        for (number, (block, hash)) in own.chunks(4096).zip(offer.hashes.chunks(16)).enumerate() {
            let first = range.start + number * 8;
            let unknown = image.unknown[volume][first..(first + 8).min(range.end)].contains(&true);
            if unknown || blake3::hash(block).as_bytes()[..16] != *hash {
                need.want(number);
            }
        }
        need
    }
}

/// A frame's end and its records.
///
/// # Panics
/// When the frame is damaged.
pub fn entries(frame: &[u8]) -> (Position, Vec<Entry>) {
    let view = FrameView::parse(frame).expect("a whole frame");
    let entry = |(index, record)| {
        Entry::new(&record, &view.payload(index).expect("a payload that can be unpacked"))
    };
    (view.header().last(), view.records().enumerate().map(entry).collect())
}

impl Target for Plain {
    fn connect(&mut self, hello: Hello) {
        self.disconnect();
        // What the last session left is durable before the next is answered.
        self.durable = self.log.len();
        self.generation.1 = self.generation.0;
        let position = self.log.last().map(|(last, _)| *last);
        let memory = TargetMemory {
            position,
            path: position.and_then(|position| self.path.as_ref()?.until(position)),
            map_generation: self.generation.1,
            volumes: self.volumes.clone(),
        };
        match Session::greet(&hello, 1, memory) {
            Ok((session, welcome)) => {
                if position.is_none_or(|position| hello.ancestry.contains(position)) {
                    self.path = Some(hello.ancestry.clone());
                }
                self.volumes = hello
                    .volumes
                    .iter()
                    .map(|volume| VolumeSize { id: volume.id, sectors: volume.sectors })
                    .collect();
                self.session = Some(session);
                self.replies.push(Message::Welcome(welcome));
            }
            Err(refusal) => self.replies.push(Message::Refuse(refusal)),
        }
    }

    fn disconnect(&mut self) {
        self.session = None;
        self.inbox.clear();
        self.replies.clear();
    }

    fn feed(&mut self, message: Message) {
        self.inbox.push_back(message);
    }

    fn advance(&mut self, _ns: u64) {
        for _ in 0..1 + self.rng.below(8) {
            let Some(message) = self.inbox.pop_front() else { break };
            self.take(message);
        }
        if self.rng.chance(500_000) {
            self.durable = self.log.len();
            self.generation.1 = self.generation.0;
        }
        let durable = self.position();
        let written = self.log.last().map_or(Position::default(), |(last, _)| *last);
        let progress = Progress { written, durable, ..Progress::default() };
        if let Some(ack) = self.session.as_mut().and_then(|session| session.acknowledge(&progress))
        {
            self.replies.push(Message::Ack(ack));
        }
    }

    fn replies(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.replies)
    }

    fn position(&self) -> Position {
        self.durable.checked_sub(1).map_or(Position::default(), |last| self.log[last].0)
    }

    fn points(&self) -> Vec<(Seq, Seq)> {
        let mut image = Image::new(&self.sizes);
        let mut points: Vec<(Seq, Seq)> = Vec::new();
        let mut open = false;
        for entry in self.log[..self.durable].iter().flat_map(|(_, entries)| entries) {
            image.apply(entry);
            let (whole, seq) = (!image.in_gap.contains(&true), entry.record.seq);
            match points.last_mut().filter(|_| open) {
                Some(last) if whole => last.1 = seq,
                None if whole => points.push((seq, seq)),
                _ => {}
            }
            open = whole;
        }
        points
    }

    fn read(
        &self,
        volume: usize,
        seq: Seq,
        start: u64,
        sectors: u64,
    ) -> Result<Vec<Stamp>, String> {
        let end = self.log.last().map(|(last, _)| *last);
        let mut read = self.read.borrow_mut();
        let kept = read.take().filter(|(at, then, _)| (*at, *then) == (seq, end));
        let kept = kept.unwrap_or_else(|| (seq, end, self.image_at(seq)));
        let content = kept.2.volumes[volume][start as usize..(start + sectors) as usize].to_vec();
        *read = Some(kept);
        Ok(content)
    }

    fn crash(&mut self, power: bool) {
        self.disconnect();
        if power {
            let kept =
                self.durable + self.rng.below((self.log.len() - self.durable) as u64 + 1) as usize;
            self.log.truncate(kept);
        }
        self.durable = self.log.len();
        self.generation.0 = self.generation.1;
    }

    fn keep_image(&mut self) {
        let log = self.log[..self.durable].to_vec();
        self.image = Some((log, self.generation.1, self.volumes.clone()));
    }

    fn roll_back(&mut self) -> bool {
        let Some((log, generation, volumes)) = self.image.take() else { return false };
        self.disconnect();
        (self.durable, self.log, self.volumes) = (log.len(), log, volumes);
        self.generation = (generation, generation);
        true
    }
}
