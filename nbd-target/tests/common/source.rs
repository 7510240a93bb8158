//! A source driven by hand.

use std::{cell::RefCell, collections::VecDeque, rc::Rc, time::Duration};

use tidemark_journal::{
    Ancestry, Compression, FrameBuilder, FrameMeta, GapReason, GroupId, Kind, Position, Record,
    Sector, Seq, TermId, VolumeId, record::flag,
};
use tidemark_link::{
    conn::{Connection, LinkError, Sender, Timeouts},
    message::{
        Ack, GroupHello, Heartbeat, Hello, Message, Need, Notice, ProtocolRange, RegionRun,
        VolumeHello, Welcome,
    },
    pki, seam,
};
use tokio::sync::watch;

use super::{
    Lab,
    model::{Model, Random},
};

/// What a source remembers from one connection to the next.
pub struct Source {
    pub group: GroupId,
    pub ancestry: Ancestry,
    pub model: Model,
    pub acked: Position,
    pub ceiling: Seq,
    pub map_generation: u64,
    pub before: Position,
    pub time_ns: u64,
    pub wall_ns: i64,
    pub node: String,
    pub name: String,
    builder: FrameBuilder,
    /// Frames sent, to be sent again.
    pub frames: VecDeque<(Position, Vec<u8>)>,
    random: Random,
    /// Without a model of its disks.
    pub plain: bool,
    /// What it says that it can.
    pub features: Vec<String>,
    /// The last record in the frame in the making.
    pending: Option<Seq>,
    link: Option<Link>,
}

struct Link {
    sender: Sender,
    heard: Rc<RefCell<Heard>>,
    acks: watch::Receiver<Option<Ack>>,
}

/// What the target has said.
#[derive(Default)]
pub struct Heard {
    pub needs: Vec<Need>,
    pub notices: Vec<Notice>,
    pub repairs: Vec<RegionRun>,
    pub echoes: u64,
    /// The last number with which a lease was asked for.
    pub lease_ask: u64,
    pub end: Option<String>,
}

/// The wall clock at which sources begin: 2026-11-23T09:00:00Z.
pub const WALL_START_NS: i64 = 1_795_424_400_000_000_000;

impl Source {
    pub fn new(sizes: &[usize]) -> Source {
        let term = TermId([1; 16]);
        Source {
            group: GroupId([7; 16]),
            ancestry: Ancestry::root(term),
            model: Model::new(sizes),
            acked: Position::default(),
            ceiling: Seq(1 << 30),
            map_generation: 0,
            before: Position { term, seq: Seq::ZERO },
            time_ns: 1_000_000_000,
            wall_ns: WALL_START_NS,
            node: "db1".to_owned(),
            name: "shop".to_owned(),
            builder: FrameBuilder::new(Compression::Zstd(1)),
            frames: VecDeque::new(),
            random: Random(42),
            plain: false,
            features: Vec::new(),
            pending: None,
            link: None,
        }
    }

    pub fn hello(&self) -> Hello {
        let volume = |(number, bytes): (usize, &usize)| VolumeHello {
            id: VolumeId(number as u16),
            name: format!("disk{number}"),
            sectors: *bytes as u64 / 512,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
        };
        Hello {
            protocol: ProtocolRange::OWN,
            features: self.features.clone(),
            software: "a test".to_owned(),
            group: GroupHello { id: self.group, name: self.name.clone() },
            ancestry: self.ancestry.clone(),
            volumes: self.model.sizes.iter().enumerate().map(volume).collect(),
            acked: self.acked,
            ceiling: self.ceiling,
            map_generation: self.map_generation,
        }
    }

    /// Connects and greets; what the target answers.
    pub async fn greet(&mut self, lab: &Lab) -> Result<Message, LinkError> {
        let address = lab.link_addr().to_string();
        self.greet_at(lab, &address).await
    }

    /// The same with a target elsewhere.
    pub async fn greet_at(&mut self, lab: &Lab, address: &str) -> Result<Message, LinkError> {
        let (identity, trust) = lab.identity(&self.node);
        let tls = pki::client_config(&identity, &trust).expect("good certificates");
        let expected = "dr1".parse().expect("a name");
        let timeouts = Timeouts::default();
        let mut connection = Connection::connect(address, &tls, &expected, &timeouts).await?;
        let answer = connection.ask(&Message::Hello(self.hello())).await?;
        let (sender, mut receiver) = connection.split();
        let heard = Rc::new(RefCell::new(Heard::default()));
        let (acked, acks) = watch::channel(None);
        let listening = Rc::clone(&heard);
        seam::spawn(async move {
            let end = loop {
                match receiver.recv().await {
                    Ok(Some(Message::Ack(ack))) => {
                        acked.send_replace(Some(ack));
                    }
                    Ok(Some(Message::Need(need))) => listening.borrow_mut().needs.push(need),
                    Ok(Some(Message::Notice(n))) => listening.borrow_mut().notices.push(n),
                    Ok(Some(Message::Repair(repair))) => {
                        listening.borrow_mut().repairs.extend(repair.runs);
                    }
                    Ok(Some(Message::LeaseAsk(ask))) => {
                        listening.borrow_mut().lease_ask = ask.number;
                    }
                    Ok(Some(Message::Echo(_))) => listening.borrow_mut().echoes += 1,
                    Ok(Some(Message::Refuse(refuse))) => break refuse.to_string(),
                    Ok(Some(other)) => break format!("{:?}", other.kind()),
                    Ok(None) => break "the end".to_owned(),
                    Err(error) => break error.to_string(),
                }
            };
            listening.borrow_mut().end = Some(end);
        });
        self.link = Some(Link { sender, heard, acks });
        Ok(answer)
    }

    /// Connects, expecting a welcome, and sends again what the target lacks.
    pub async fn connect(&mut self, lab: &Lab) -> Welcome {
        let welcome = match self.greet(lab).await.expect("connected") {
            Message::Welcome(welcome) => welcome,
            other => panic!("not welcome: {other:?}"),
        };
        let have = welcome.position.unwrap_or_default().seq;
        let again: Vec<Vec<u8>> = self
            .frames
            .iter()
            .filter(|(last, _)| last.seq > have)
            .map(|(_, frame)| frame.clone())
            .collect();
        for frame in again {
            let view = tidemark_journal::FrameView::parse(&frame).expect("a frame");
            let frame = tidemark_journal::cut::tail(&view, have).expect("something is left");
            self.send_raw(&frame).await;
        }
        welcome
    }

    pub fn disconnect(&mut self) {
        if let Some(link) = self.link.take() {
            link.sender.close();
        }
    }

    pub fn heard<T>(&self, look: impl FnOnce(&Heard) -> T) -> T {
        look(&self.link.as_ref().expect("connected").heard.borrow())
    }

    /// Adds a record to the frame in the making, and to the model.
    pub fn push(
        &mut self,
        kind: Kind,
        flags: u8,
        volume: u16,
        start: u64,
        sectors: u32,
        payload: &[u8],
    ) -> Seq {
        let last = self.builder_last();
        self.time_ns += 1_000_000;
        self.wall_ns += 1_000_000;
        let record = Record {
            kind,
            flags,
            volume: VolumeId(volume),
            seq: last.next(),
            time_ns: self.time_ns,
            start: Sector(start),
            sectors,
        };
        self.builder.push(&record, [payload]);
        if !self.plain {
            self.model.push(&record, payload);
        }
        self.pending = Some(record.seq);
        record.seq
    }

    pub fn gap_begin(&mut self, volume: u16, reason: GapReason) -> Seq {
        self.push(Kind::GapBegin, reason as u8, volume, 0, 0, &[])
    }

    pub fn gap_end(&mut self, volume: u16) -> Seq {
        self.push(Kind::GapEnd, 0, volume, 0, 0, &[])
    }

    pub fn write(&mut self, volume: u16, start: u64, content: &[u8]) -> Seq {
        self.push(Kind::Write, 0, volume, start, (content.len() / 512) as u32, content)
    }

    pub fn mark(&mut self, name: &str) -> Seq {
        let payload = [&[0; 16], name.as_bytes()].concat();
        self.push(Kind::Mark, 0, 0, 0, payload.len() as u32, &payload)
    }

    /// A random write, sync, zero or discard.
    pub fn random(&mut self) -> Seq {
        let volume = self.random.below(self.model.sizes.len() as u64);
        let all = self.model.sizes[volume as usize] as u64 / 512;
        match self.random.below(10) {
            0 => {
                // Zeros of any length, over 1 MiB too.
                let sectors = 1 + self.random.below(5000.min(all));
                let start = self.random.below(all - sectors + 1);
                let kind = [Kind::Zero, Kind::Discard, Kind::Sync][self.random.below(3) as usize];
                let flags = if kind == Kind::Sync { flag::ZEROS } else { 0 };
                self.push(kind, flags, volume as u16, start, sectors as u32, &[])
            }
            choice => {
                let longest = [8, 8, 8, 8, 1, 64, 300, 2048, 16][choice as usize - 1];
                let start = self.random.below(all);
                let room = (2048 - start % 2048).min(all - start);
                let sectors = (1 + self.random.below(longest)).min(room);
                let mut content = vec![0; sectors as usize * 512];
                let seed = self.random.next();
                for (n, word) in content.chunks_mut(8).enumerate() {
                    // Half of it compresses.
                    let value = if n % 2 == 0 { seed } else { self.random.next() };
                    word.copy_from_slice(&value.to_le_bytes());
                }
                let kind = if self.random.below(8) == 0 { Kind::Sync } else { Kind::Write };
                self.push(kind, 0, volume as u16, start, sectors as u32, &content)
            }
        }
    }

    /// Closes the frame in the making.
    pub fn finish(&mut self) -> Vec<u8> {
        let term = self.ancestry.current().id;
        let records = self.builder.records() as i64;
        let wall_ns = self.wall_ns - (records - 1) * 1_000_000;
        let meta = FrameMeta { group: self.group, term, before: self.before, wall_ns };
        let frame = self.builder.finish(&meta).to_vec();
        self.builder.clear();
        let seq = self.pending.take().expect("records were pushed");
        self.before = Position { term, seq };
        self.frames.push_back((self.before, frame.clone()));
        frame
    }

    /// Sends the frame in the making.
    pub async fn send(&mut self) -> Position {
        let frame = self.finish();
        self.send_raw(&frame).await;
        self.before
    }

    pub async fn send_raw(&mut self, frame: &[u8]) {
        let link = self.link.as_mut().expect("connected");
        let mut sent = link.sender.send_frame(&[frame]).await;
        if sent.is_ok() {
            sent = link.sender.flush().await;
        }
        if let Err(error) = sent {
            tokio::time::sleep(Duration::from_millis(200)).await;
            panic!("{error}; the target said: {:?}", link.heard.borrow().end);
        }
    }

    pub async fn say(&mut self, message: &Message) {
        let link = self.link.as_mut().expect("connected");
        link.sender.send(message).await.expect("sent");
        link.sender.flush().await.expect("sent");
    }

    pub async fn heartbeat(&mut self) {
        let heartbeat = Heartbeat {
            number: 1,
            journal_ns: self.time_ns,
            wall_ns: self.wall_ns,
            vouched: self.before,
            map_generation: self.map_generation,
        };
        self.say(&Message::Heartbeat(heartbeat)).await;
    }

    /// Waits until everything sent is durable at the target.
    pub async fn acknowledged(&mut self) {
        let want = self.before.seq;
        let link = self.link.as_mut().expect("connected");
        let durable = |ack: &Option<Ack>| ack.is_some_and(|ack| ack.final_durable >= want);
        let waited =
            tokio::time::timeout(Duration::from_secs(60), link.acks.wait_for(durable)).await;
        waited.expect("acknowledged in time").expect("still connected");
        self.acked = self.before;
    }

    /// The last acknowledgement.
    pub fn ack(&self) -> Option<Ack> {
        *self.link.as_ref().expect("connected").acks.borrow()
    }

    fn builder_last(&self) -> Seq {
        self.pending.unwrap_or(self.before.seq)
    }
}
