//! How fast a target takes history in, over TLS and durably, against the same TLS stream received and thrown away; and
//! against the same bytes written to a file in one go, which is what the disk can do.

use std::{fs::File, io::Write, path::Path, sync::Arc, thread, time::Instant};

use anyhow::{Context, Result, bail};
use tidemark_journal::{
    Ancestry, Compression, FrameBuilder, FrameMeta, GapReason, GroupId, Kind, Position, Record,
    Sector, Seq, TermId, VolumeId,
};
use tidemark_link::{
    conn::{Connection, Timeouts},
    message::{GroupHello, Hello, Message, ProtocolRange, VolumeHello},
    pki::{self, Identity, Trust},
    seam::{self, Listener},
};
use tidemark_tests::{
    site::{GROUP, Plan, SOURCE, Site, TARGET},
    workload::rng::Rng,
};

use super::node;
use crate::figures::{Bar, Bound, Comparison, in_turn};

const VOLUME: VolumeId = VolumeId(1);
const VOLUME_BYTES: u64 = 64 << 30;
const BLOCK_BYTES: usize = 4096;
const WRITES_PER_FRAME: u64 = 128;
const TERM: TermId = TermId([1; 16]);

/// Megabytes of frames per second, until the last is durable or thrown away.
///
/// # Errors
/// A target that cannot be started, a connection that ends.
pub fn measure(rounds: usize, short: bool) -> Result<Comparison> {
    let frames_per_round = if short { 64 } else { 2048 };
    let mut site = Site::new(Plan::new(&[]))?;
    site.spawn_target(&node()?)?;
    let mut source = Source::new(site.group_id());
    let link = site.link().to_string();
    let trash = throw_away(site.dir(), frames_per_round)?;
    let rounds = in_turn(3, rounds, |which| {
        let frames = source.frames(frames_per_round);
        let bytes: usize = frames.iter().map(Vec::len).sum();
        let hello = source.hello();
        let seconds = match which {
            0 => seam::run(send(site.dir(), &link, hello, &frames, Some(source.before.seq)))??,
            1 => seam::run(send(site.dir(), &trash, hello, &frames, None))??,
            _ => to_file(&site.dir().join("raw"), &frames)?,
        };
        if which > 0 {
            // It is no history for the target: it takes it up in the next round.
            source.forget();
        }
        Ok(bytes as f64 / 1e6 / seconds)
    })?;
    Ok(Comparison {
        what: format!("history in frames of {WRITES_PER_FRAME} random writes of 4 KiB, over TLS"),
        unit: "MB/s",
        names: ["durable at the target", "received and thrown away", "written to a file, synced"]
            .map(str::to_owned)
            .to_vec(),
        rounds,
        bars: vec![Bar::ratio(0, 1, Bound::AtLeast(0.7)), Bar::printed(0, 2)],
    })
}

/// A history that goes on from round to round.
struct Source {
    group: GroupId,
    before: Position,
    kept: Position,
    noise: Vec<u8>,
}

impl Source {
    fn new(group: GroupId) -> Source {
        let mut rng = Rng::new(1);
        let noise = (0..1 << 17).flat_map(|_| rng.draw().to_le_bytes()).collect();
        let before = Position { term: TERM, seq: Seq::ZERO };
        Source { group, before, kept: before, noise }
    }

    fn hello(&self) -> Hello {
        Hello {
            protocol: ProtocolRange::OWN,
            features: Vec::new(),
            software: "a measurement".to_owned(),
            group: GroupHello { id: self.group, name: GROUP.to_owned() },
            ancestry: Ancestry::root(TERM),
            volumes: vec![VolumeHello {
                id: VOLUME,
                name: "v1".to_owned(),
                sectors: VOLUME_BYTES / 512,
                logical_block_bytes: 512,
                physical_block_bytes: 4096,
            }],
            acked: Position::default(),
            ceiling: Seq(1 << 40),
            map_generation: 0,
        }
    }

    fn frames(&mut self, count: u64) -> Vec<Vec<u8>> {
        self.kept = self.before;
        let mut builder = FrameBuilder::new(Compression::Off);
        (0..count).map(|_| self.frame(&mut builder)).collect()
    }

    fn forget(&mut self) {
        self.before = self.kept;
    }

    fn frame(&mut self, builder: &mut FrameBuilder) -> Vec<u8> {
        let before = self.before;
        let mut seq = before.seq;
        let mut record = |kind, flags, start, sectors| {
            seq = seq.next();
            let (volume, time_ns) = (VOLUME, seq.0 * 1000);
            Record { kind, flags, volume, seq, time_ns, start: Sector(start), sectors }
        };
        if before.seq == Seq::ZERO {
            builder.push(&record(Kind::GapBegin, GapReason::FirstSync as u8, 0, 0), []);
            builder.push(&record(Kind::GapEnd, 0, 0, 0), []);
        }
        for number in 0..WRITES_PER_FRAME {
            let random = (before.seq.0 + number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let block = random >> 40;
            let at = (random as usize >> 8) % (self.noise.len() - BLOCK_BYTES);
            let write = record(Kind::Write, 0, block * 8 % (VOLUME_BYTES / 512), 8);
            builder.push(&write, [&self.noise[at..at + BLOCK_BYTES]]);
        }
        self.before.seq = seq;
        let wall_ns = 1_800_000_000_000_000_000;
        let about = FrameMeta { group: self.group, term: TERM, before, wall_ns };
        let frame = builder.finish(&about).to_vec();
        builder.clear();
        frame
    }
}

/// Sends the frames; the seconds until the peer has everything durably, or says that it is through.
async fn send(
    dir: &Path,
    address: &str,
    hello: Hello,
    frames: &[Vec<u8>],
    last: Option<Seq>,
) -> Result<f64> {
    let tls = pki::client_config(&identity(dir, SOURCE)?, &trust(dir)?)?;
    let mut link =
        Connection::connect(address, &tls, &TARGET.parse()?, &Timeouts::default()).await?;
    if last.is_some() {
        match link.ask(&Message::Hello(hello)).await? {
            Message::Welcome(_) => {}
            other => bail!("no welcome: {other:?}"),
        }
    }
    let (mut sender, mut receiver) = link.split();
    let start = Instant::now();
    let listening = seam::spawn(async move {
        loop {
            match receiver.recv().await?.context("the peer has ended")? {
                Message::Ack(ack) if last.is_some_and(|last| ack.final_durable >= last) => break,
                Message::Bye if last.is_none() => break,
                Message::Refuse(refuse) => bail!("refused: {refuse}"),
                _ => {}
            }
        }
        Ok(start.elapsed().as_secs_f64())
    });
    for frame in frames {
        sender.send_frame(&[frame]).await?;
    }
    sender.flush().await?;
    listening.await?
}

/// Takes connections up and throws away what comes over them; says goodbye after so many messages. Its address.
fn throw_away(dir: &Path, messages: u64) -> Result<String> {
    let tls = pki::server_config(&identity(dir, TARGET)?, &trust(dir)?)?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    thread::spawn(move || {
        let served = seam::run(async move {
            let mut listener = Listener::from_std(listener);
            loop {
                let (stream, _) = listener.accept().await?;
                let link =
                    Connection::accept(stream, &Arc::clone(&tls), &Timeouts::default()).await?;
                let (mut sender, mut receiver) = link.split();
                for _ in 0..messages {
                    receiver.recv().await?.context("the sender has ended")?;
                }
                sender.send(&Message::Bye).await?;
                sender.flush().await?;
                // Until it has heard it.
                while let Ok(Some(_)) = receiver.recv().await {}
            }
        });
        let ended: Result<()> = served.map_err(Into::into).and_then(|result| result);
        if let Err(error) = ended {
            eprintln!("what throws away has ended: {error:#}");
        }
    });
    Ok(address)
}

/// Writes the frames to a new file; the seconds until all of it is on the disk.
fn to_file(path: &Path, frames: &[Vec<u8>]) -> Result<f64> {
    let mut file = File::create(path)?;
    let start = Instant::now();
    for frame in frames {
        file.write_all(frame)?;
    }
    file.sync_data()?;
    let seconds = start.elapsed().as_secs_f64();
    std::fs::remove_file(path)?;
    Ok(seconds)
}

fn identity(dir: &Path, node: &str) -> Result<Identity> {
    let read = |kind: &str| std::fs::read(dir.join(format!("{node}.{kind}")));
    Ok(Identity::from_pem(&read("pem")?, &read("key")?)?)
}

fn trust(dir: &Path) -> Result<Trust> {
    Ok(Trust::from_pem(&std::fs::read(dir.join("ca.pem"))?)?)
}
