//! What is wrong is refused with a sentence that says so, nothing is lost by it, and when it is put right
//! everything goes on.

use std::fs::{self, OpenOptions};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use tidemark_agent::Agent;
use tidemark_agent::config::AgentConfig;
use tidemark_control::agent::{GroupStatus, LinkState};
use tidemark_journal::{
    Ancestry, Compression, FrameBuilder, FrameMeta, GroupId, Kind, Position, Record, Sector, Seq,
    VolumeId,
};
use tidemark_link::conn::{Connection, Timeouts};
use tidemark_link::message::{GroupHello, Hello, Message, ProtocolRange, VolumeHello};
use tidemark_link::pki::{self, Authority, Identity, Trust};
use tidemark_link::seam;
use tidemark_tests::site::{GROUP, Plan, SOURCE, Site, TARGET};
use tidemark_tests::small_disk::SmallDisk;
use tidemark_tests::workload::disk::Disk;
use tidemark_tests::workload::{self, Shape};

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 32 * MIB;

fn shape(seed: u64, operations: usize) -> Shape {
    Shape {
        seed,
        operations,
        sizes_bytes: vec![SIZE_BYTES],
        block_bytes: 4096,
        blocks_max: 32,
        zeroes_percent: 2,
        discards_percent: 2,
        flushes_percent: 2,
        hot_bytes: 4 * MIB,
    }
}

/// Writes to the first volume; all of it is acknowledged.
fn write(site: &Site, seed: u64, operations: usize) -> Result<()> {
    let (disk, never) = (site.disk(0, 1)?, AtomicBool::new(false));
    let log = workload::run(&[&disk], &shape(seed, operations).operations()?, 8, &never);
    ensure!(log.error().is_none(), "{:?}", log.error());
    ensure!(log.entries.len() == operations, "a part of the load was left out");
    Ok(())
}

fn expect_replica(site: &Site) -> Result<()> {
    site.wait_in_sync()?;
    // Not `@latest`, which stays where it is for a client that has just looked at it.
    let now = format!("/v0@seq:{}", site.status()?.position.seq);
    ensure!(site.read_export(&now)? == fs::read(site.image(0))?, "the replica differs at {now}");
    Ok(())
}

/// Waits until the link's sentence has all these words, the application being served meanwhile.
fn expect_sentence(site: &Site, words: &[&str]) -> Result<()> {
    let says = |status: &GroupStatus| {
        let sentence = status.link.sentence.as_deref().unwrap_or_default();
        status.link.state != LinkState::Up && words.iter().all(|word| sentence.contains(word))
    };
    site.wait(&format!("a sentence with {words:?}"), says)
}

#[test]
fn a_certificate_of_another_authority_is_refused_until_it_is_exchanged() -> Result<()> {
    let mut site = Site::new(Plan::new(&[SIZE_BYTES]))?;
    site.start_target()?;
    let issued = Authority::create("another")?.issue(&SOURCE.parse()?)?;
    let mut node = site.node_config(SOURCE)?;
    node.tls.certificate = site.dir().join("foreign.pem");
    node.tls.key = site.dir().join("foreign.key");
    fs::write(&node.tls.certificate, &issued.certificate_pem)?;
    fs::write(&node.tls.key, &issued.key_pem)?;
    site.start_agent_as(node)?;
    write(&site, 1, 50)?;
    expect_sentence(&site, &["this node's certificate", "another authority"])?;
    ensure!(site.open_export("/v0@latest").is_err(), "something was received");
    site.stop_agent()?;
    site.start_agent()?;
    expect_replica(&site)
}

#[test]
fn a_target_of_another_authority_is_not_trusted() -> Result<()> {
    let mut site = Site::new(Plan::new(&[SIZE_BYTES]))?;
    site.start_target()?;
    let mut node = site.node_config(SOURCE)?;
    node.tls.ca = site.dir().join("foreign-ca.pem");
    fs::write(&node.tls.ca, &Authority::create("another")?.pem().certificate_pem)?;
    site.start_agent_as(node)?;
    write(&site, 1, 50)?;
    expect_sentence(&site, &["its certificate", "the authority that this side trusts"])
}

#[test]
fn an_unknown_group_is_refused_until_it_is_known() -> Result<()> {
    let mut plan = Plan::new(&[SIZE_BYTES]);
    plan.target_group = "store";
    let mut site = Site::started(plan)?;
    write(&site, 1, 50)?;
    expect_sentence(&site, &["does not know the group 'shop'", "add a [[group]]", SOURCE])?;
    ensure!(site.status()?.link.state == LinkState::Refused);
    site.stop_target()?;
    site.plan_mut().target_group = GROUP;
    site.start_target()?;
    expect_replica(&site)
}

#[test]
fn a_node_may_not_write_the_group_of_another() -> Result<()> {
    let mut site = Site::started(Plan::new(&[SIZE_BYTES]))?;
    write(&site, 1, 50)?;
    expect_replica(&site)?;
    let replica = fs::read(site.image(0))?;
    ensure!(site.stop_agent()?);
    // The same disk and state under another node's certificate.
    site.start_agent_as(site.node_config("stranger")?)?;
    write(&site, 2, 50)?;
    expect_sentence(&site, &["'stranger' may not write the group 'shop'"])?;
    ensure!(site.read_export("/v0@latest")? == replica, "the replica has changed");
    site.stop_agent()?;
    site.start_agent()?;
    expect_replica(&site)
}

#[test]
fn a_disk_in_use_is_refused_and_its_user_not_disturbed() -> Result<()> {
    let site = Site::started(Plan::new(&[SIZE_BYTES]))?;
    site.wait_in_sync()?;
    let mut node = site.node_config(SOURCE)?;
    node.state_dir = site.dir().join("other-state");
    node.runtime_dir = site.dir().join("other-run");
    let group = site.group_config()?;
    let second = async {
        let agent = Agent::new(&AgentConfig { node, groups: Vec::new() }.into(), None)?;
        agent.start_group(&group).await
    };
    let Err(error) = site.runtime().block_on(second) else { bail!("two agents have one disk") };
    let sentence = format!("{error:#}");
    let image = site.image(0).display().to_string();
    ensure!(sentence.contains("is in use") && sentence.contains(&image), "{sentence}");
    write(&site, 1, 50)?;
    expect_replica(&site)
}

#[test]
fn an_image_of_another_size_is_refused_until_it_is_put_back() -> Result<()> {
    let mut site = Site::started(Plan::new(&[SIZE_BYTES]))?;
    write(&site, 1, 50)?;
    expect_replica(&site)?;
    let (mark, replica) = (site.mark("before")?, fs::read(site.image(0))?);
    site.wait_in_sync()?;
    ensure!(site.stop_agent()?);
    let resize = |bytes| OpenOptions::new().write(true).open(site.image(0))?.set_len(bytes);
    resize(SIZE_BYTES + MIB)?;
    let Err(error) = site.start_agent() else { bail!("an image of another size is protected") };
    let sentence = format!("{error:#}");
    ensure!(sentence.contains("has 34603008 bytes, and had 33554432"), "{sentence}");
    ensure!(site.read_export("/v0@latest")? == replica, "the replica has changed");
    let image = site.image(0);
    OpenOptions::new().write(true).open(image)?.set_len(SIZE_BYTES)?;
    site.start_agent()?;
    write(&site, 2, 50)?;
    expect_replica(&site)?;
    ensure!(site.read_export(&format!("/v0@seq:{mark}"))? == replica, "an old point has changed");
    Ok(())
}

#[test]
fn names_that_name_nothing_are_refused_with_what_there_is() -> Result<()> {
    let site = Site::started(Plan::new(&[SIZE_BYTES]))?;
    site.wait_in_sync()?;
    let mark = site.mark("good")?;
    site.wait_in_sync()?;
    let sentences: [(&str, &[&str]); 12] = [
        ("/v0", &["names no point", "@latest"]),
        ("/v0@yesterday", &["'@yesterday' is not a point", "@seq:N"]),
        ("/v0@seq:many", &["'@seq:many' is not a point"]),
        ("/v0@2026-11-23T09:59:30", &["is not a point", "@2026-11-23T09:59:30Z"]),
        ("/v0@seq:1000000", &["@seq:1000000 has not been received yet", "the newest is @seq:"]),
        ("/v0@seq:1", &["lies in a gap of volume 'v0'", "being sent for the first time"]),
        ("/v0@mark:bad", &["no mark 'bad'", "good"]),
        ("/v0@2200-01-01T00:00:00Z", &["vouched for nothing after", "the newest point is @20"]),
        ("/v0@2001-01-01T00:00:00Z", &["2001-01-01", "the oldest point is @seq:"]),
        ("/v7@latest", &["no volume 'v7'", "v0"]),
        ("@latest", &["name a volume"]),
        ("/v0@branch:none", &["no branch of that name"]),
    ];
    for (name, words) in sentences {
        let Err(error) = site.open_export(name) else { bail!("{name} was served") };
        let sentence = format!("{error:#}");
        ensure!(words.iter().all(|word| sentence.contains(word)), "{name}: {sentence}");
    }
    site.open_export(&format!("/v0@seq:{mark}")).context("and the good one is served")?;
    Ok(())
}

#[test]
fn a_point_that_has_left_the_window_is_refused_with_the_oldest() -> Result<()> {
    let mut plan = Plan::new(&[SIZE_BYTES]);
    plan.target_tables = "[store]\nsegment = \"1 MiB\"\n".to_owned();
    plan.target_group_lines = "window = \"2 s\"\nwindow_min = \"0 s\"\n".to_owned();
    let site = Site::started(plan)?;
    site.wait_in_sync()?;
    let early = site.mark("early")?;
    site.wait_in_sync()?;
    site.open_export("/v0@mark:early").context("while it is young")?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let sentence = loop {
        write(&site, 1, 100)?;
        match site.open_export(&format!("/v0@seq:{early}")) {
            Err(error) => break format!("{error:#}"),
            Ok(_) if Instant::now() > deadline => bail!("the point never left its window"),
            Ok(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    };
    ensure!(sentence.contains("no longer retained; the oldest point is @seq:"), "{sentence}");
    // What it names is good: the disk may be read there, and at the end it is the disk.
    let oldest = sentence.rsplit_once("@seq:").map(|(_, seq)| seq).unwrap_or_default();
    let oldest: String = oldest.chars().take_while(char::is_ascii_digit).collect();
    match site.open_export(&format!("/v0@seq:{oldest}")) {
        Ok(export) => drop(site.read(&export, 0, SIZE_BYTES)?),
        // It may have gone on since.
        Err(error) => ensure!(format!("{error:#}").contains("no longer retained"), "{error:#}"),
    }
    expect_replica(&site)
}

/// A source that is no agent: it says and sends what it is told to.
struct Hostile {
    identity: Identity,
    trust: Trust,
    address: String,
    hello: Hello,
}

impl Hostile {
    /// With the certificate of the true source, greeting with the truth.
    fn new(site: &Site, position: Position) -> Result<Hostile> {
        let read = |name: String| fs::read(site.dir().join(name));
        let identity =
            Identity::from_pem(&read(format!("{SOURCE}.pem"))?, &read(format!("{SOURCE}.key"))?)?;
        let trust = Trust::from_pem(&read("ca.pem".to_owned())?)?;
        let volume = VolumeHello {
            id: VolumeId(0),
            name: "v0".to_owned(),
            sectors: SIZE_BYTES / 512,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
        };
        let hello = Hello {
            protocol: ProtocolRange::OWN,
            features: Vec::new(),
            software: "a test".to_owned(),
            group: GroupHello { id: site.group_id(), name: GROUP.to_owned() },
            ancestry: Ancestry::root(position.term),
            volumes: vec![volume],
            acked: position,
            ceiling: Seq(position.seq.0 + (1 << 24)),
            map_generation: 1 << 30,
        };
        Ok(Hostile { identity, trust, address: site.link().to_string(), hello })
    }

    /// Greets, sends one frame and gives the sentence with which the target ends it.
    fn send(&self, frame: Vec<u8>) -> Result<String> {
        let tls = pki::client_config(&self.identity, &self.trust)?;
        let (address, hello) = (self.address.clone(), self.hello.clone());
        let session = async move {
            let (target, timeouts) = (TARGET.parse()?, Timeouts::default());
            let mut connection = Connection::connect(&address, &tls, &target, &timeouts).await?;
            match connection.ask(&Message::Hello(hello)).await? {
                Message::Welcome(_) => {}
                Message::Refuse(refuse) => return Ok(refuse.to_string()),
                other => bail!("the greeting was answered with {:?}", other.kind()),
            }
            let (mut sender, mut receiver) = connection.split();
            sender.send_frame(&[&frame]).await?;
            sender.flush().await?;
            let deadline = Instant::now() + Duration::from_secs(20);
            loop {
                ensure!(Instant::now() < deadline, "the frame was taken");
                match receiver.recv().await? {
                    Some(Message::Refuse(refuse)) => return Ok(refuse.to_string()),
                    Some(_) => {}
                    None => bail!("the connection ended without a word"),
                }
            }
        };
        seam::run(session)?
    }
}

/// A good frame of one write of 4 KiB that continues `before`.
fn frame(group: GroupId, before: Position, start: u64) -> Vec<u8> {
    let record = Record {
        kind: Kind::Write,
        flags: 0,
        volume: VolumeId(0),
        seq: before.seq.next(),
        time_ns: u64::MAX >> 2,
        start: Sector(start),
        sectors: 8,
    };
    let content: Vec<u8> = (0..4096u32).map(|byte| (byte * 7 % 251) as u8).collect();
    let mut builder = FrameBuilder::new(Compression::Off);
    builder.push(&record, [content.as_slice()]);
    builder.finish(&FrameMeta { group, term: before.term, before, wall_ns: 0 }).to_vec()
}

#[test]
fn frames_that_are_not_what_they_say_are_refused_and_nothing_of_them_stays() -> Result<()> {
    let mut site = Site::started(Plan::new(&[SIZE_BYTES]))?;
    write(&site, 1, 50)?;
    expect_replica(&site)?;
    let replica = fs::read(site.image(0))?;
    let end = site.status()?.position;
    ensure!(site.stop_agent()?);

    let hostile = Hostile::new(&site, end)?;
    let good = frame(site.group_id(), end, 0);
    let flipped = |at: usize| {
        let mut frame = good.clone();
        frame[at] ^= 0x10;
        frame
    };
    let ahead = Position { seq: Seq(end.seq.0 + 5), ..end };
    let back = Position { seq: Seq(end.seq.0 - 5), ..end };
    let mut longer = good.clone();
    longer.push(0);
    let cases = [
        (flipped(0), "not a frame"),
        (flipped(130), "checksum"),
        (flipped(200), "checksum"),
        (flipped(good.len() - 1), "checksum"),
        (good[..good.len() - 1].to_vec(), "cut short"),
        (good[..100].to_vec(), "cut short"),
        (longer, "bytes follow it"),
        (frame(GroupId([9; 16]), end, 0), "it belongs to the group"),
        (frame(site.group_id(), ahead, 0), "and the replica ends at"),
        (frame(site.group_id(), back, 0), "and the replica ends at"),
        (frame(site.group_id(), end, SIZE_BYTES / 512), "beyond the end of volume"),
    ];
    for (number, (frame, words)) in cases.into_iter().enumerate() {
        let sentence = hostile.send(frame).with_context(|| format!("case {number}, {words}"))?;
        ensure!(sentence.contains(words), "case {number}, {words}: {sentence}");
    }
    ensure!(site.read_export("/v0@latest")? == replica, "the replica has changed");
    let next = format!("/v0@seq:{}", end.seq.0 + 1);
    ensure!(site.open_export(&next).is_err(), "something of it has stayed");
    // The true source goes on as if nothing had been.
    site.start_agent()?;
    write(&site, 2, 50)?;
    expect_replica(&site)?;
    let status = site.status()?;
    ensure!(status.position.term == end.term && status.gaps_total == 0, "{status:#?}");
    Ok(())
}

#[test]
fn a_full_target_says_so_keeps_its_points_and_goes_on_when_there_is_room() -> Result<()> {
    let mut plan = Plan::new(&[SIZE_BYTES]);
    plan.ring_bytes = 256 * MIB;
    plan.compression = "off";
    plan.target_tables = "[store]\nsegment = \"4 MiB\"\n".to_owned();
    let mut site = Site::new(plan)?;
    let small = SmallDisk::mount(&site.dir().join("target"), 24 * MIB)?;
    site.start_target()?;
    site.start_agent()?;
    site.wait_in_sync()?;
    let disk = site.disk(0, 1)?;
    disk.write(0, &[7; 8192])?;
    let mark = site.mark("before")?;
    let before = fs::read(site.image(0))?;
    site.wait_in_sync()?;

    // More than there is room for: all of it is acknowledged to its writer.
    let mut seed = 1;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !site.status()?.problems.iter().any(|problem| problem.contains("disk is full")) {
        ensure!(Instant::now() < deadline, "the target never said that it was full");
        if seed < 12 {
            write(&site, seed, 200)?;
            seed += 1;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    // What was being sent at that moment goes all the same, and nothing after it, though the link
    // stays up.
    std::thread::sleep(Duration::from_secs(1));
    let sent_bytes = site.status()?.sent_bytes_total;
    write(&site, 100, 50)?;
    std::thread::sleep(Duration::from_secs(2));
    let status = site.status()?;
    ensure!(status.sent_bytes_total == sent_bytes, "frames were sent to a full target");
    ensure!(status.link.state == LinkState::Up, "{:?}", status.link);
    ensure!(site.read_export(&format!("/v0@seq:{mark}"))? == before, "an old point has changed");
    ensure!(status.durable_seq < status.position.seq, "it acknowledged what it has no room for");

    // Restarting the target does not help, nor hurt.
    site.stop_target()?;
    site.start_target()?;
    ensure!(site.read_export("/v0@mark:before")? == before, "an old mark has changed");
    site.wait("it to be full again", |status| {
        let sentence = status.link.sentence.as_deref().unwrap_or_default();
        let says = |text: &str| text.contains("disk is full") || text.contains("no room");
        says(sentence) || status.problems.iter().any(|problem| says(problem))
    })?;

    small.resize(512 * MIB)?;
    expect_replica(&site)?;
    ensure!(site.read_export("/v0@mark:before")? == before, "an old mark has changed");
    ensure!(site.status()?.gaps_total == 0, "the ring was to hold it");
    site.wait("no problem to be left", |status| status.problems.is_empty())?;
    // Before its file system goes away.
    site.stop_agent()?;
    site.stop_target()
}

#[test]
fn requests_that_a_disk_cannot_take_are_errors_and_no_harm() -> Result<()> {
    let site = Site::started(Plan::new(&[SIZE_BYTES]))?;
    site.wait_in_sync()?;
    let front = Arc::new(site.open_front(0)?);
    let write = |offset, bytes| {
        site.runtime().block_on(front.write(offset, Bytes::from(vec![1; bytes]), false))
    };
    ensure!(write(SIZE_BYTES - 4096, 8192).is_err(), "a write beyond the end");
    ensure!(write(u64::MAX - 4095, 4096).is_err(), "a write beyond all ends");
    ensure!(
        site.runtime().block_on(front.read(SIZE_BYTES, 4096)).is_err(),
        "a read beyond the end"
    );
    ensure!(site.runtime().block_on(front.trim(SIZE_BYTES - 512, 1024)).is_err(), "a trim");
    write(SIZE_BYTES - 4096, 4096)?;
    expect_replica(&site)
}
