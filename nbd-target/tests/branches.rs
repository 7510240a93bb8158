//! Branches: written, read, restarted, dropped.

mod common;

use bytes::Bytes;
use common::{
    Lab,
    model::{Random, difference},
    run,
    source::Source,
};
use tidemark_control::{
    config::Seconds,
    target::{BranchRequest, BranchStatus, TargetClient},
};
use tidemark_journal::{GapReason, VolumeId};
use tidemark_nbd::Zeroing;

const MIB: usize = 1 << 20;
/// Bytes of a write that is a chunk.
const WRITE: usize = 64 << 10;

async fn api(lab: &Lab) -> TargetClient {
    TargetClient::new(&lab.config.api.socket)
}

fn request(name: &str, point: &str) -> BranchRequest {
    BranchRequest {
        name: Some(name.to_owned()),
        group: "shop".to_owned(),
        volume: None,
        point: point.to_owned(),
        temporary: false,
    }
}

#[test]
fn a_branch_is_a_disk_of_its_own() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"", "");
        let mut source = Source::new(&[4 * MIB, 4 * MIB]);
        source.connect(&lab).await;
        for volume in 0..2 {
            source.gap_begin(volume, GapReason::FirstSync);
            source.gap_end(volume);
        }
        for _ in 0..200 {
            source.random();
        }
        let point = source.mark("before the test");
        for _ in 0..100 {
            source.random();
        }
        source.send().await;
        source.acknowledged().await;

        let api = api(&lab).await;
        let made = api.create_branch(&request("test", "mark:before the test")).await.expect("made");
        assert_eq!(made.parent.seq, point);
        let names: Vec<&str> = made.exports.iter().map(|export| export.export.as_str()).collect();
        assert_eq!(names, ["shop/disk0@branch:test", "shop/disk1@branch:test"]);
        let again = api.create_branch(&request("test", "latest")).await.expect_err("twice");
        assert!(again.to_string().contains("already"), "{again}");

        let mut model = source.model.at(VolumeId(0), point);
        let client = lab.open("shop/disk0@branch:test").await.expect("it opens");
        assert!(!client.info().features.read_only);
        // Across a multiple of 1 MiB, partly over each other, then zeros.
        for (offset, length, byte) in [(MIB - 4096, 3 * 4096, 1), (MIB, 512, 2), (0, 2 * MIB, 3)] {
            let content: Vec<u8> = (0..length).map(|n| byte + (n / 512) as u8 % 100).collect();
            client.write(offset as u64, Bytes::from(content.clone()), byte == 2).await.expect("ok");
            model[offset..offset + length].copy_from_slice(&content);
        }
        let zeroing = Zeroing { fua: true, no_hole: false, fast_only: true };
        client.write_zeroes(8192, 1024, zeroing).await.expect("zeroed");
        model[8192..8192 + 1024].fill(0);
        client.trim(3 * MIB as u64, 4096).await.expect("trimmed");
        model[3 * MIB..3 * MIB + 4096].fill(0);
        client.flush().await.expect("flushed");
        let read = client.read(0, 4 * MIB as u32).await.expect("read");
        assert_eq!(difference(&read, &model), None);

        // The point it was made of, and the other volume, are as they were.
        let parent = lab.open(&format!("shop/disk0@seq:{point}")).await.expect("it opens");
        let read = parent.read(0, 4 * MIB as u32).await.expect("read");
        assert_eq!(difference(&read, &source.model.at(VolumeId(0), point)), None);
        let busy = api.drop_branch("shop", "test").await.expect_err("open");
        assert!(busy.to_string().contains("disconnect"), "{busy}");
        drop((client, parent));

        // It survives a restart, and more can be written.
        source.disconnect();
        lab.restart();
        let client = lab.open("shop/disk0@branch:test").await.expect("it opens");
        let read = client.read(0, 4 * MIB as u32).await.expect("read");
        assert_eq!(difference(&read, &model), None);
        client.write(0, Bytes::from(vec![9; 4096]), true).await.expect("written");
        model[..4096].fill(9);
        let read = client.read(0, 4 * MIB as u32).await.expect("read");
        assert_eq!(difference(&read, &model), None);
        client.disconnect().await;

        let dir = lab.config.data_dir.join("groups/shop/branches/test");
        assert!(dir.exists());
        common::eventually("nobody has it open", || {
            lab.target().branches().list()[0].clients() == 0
        })
        .await;
        api.drop_branch("shop", "test").await.expect("dropped");
        assert!(!dir.exists());
        let refusal = lab.refusal("shop/disk0@branch:test").await;
        assert!(refusal.contains("no branch"), "{refusal}");
    });
}

/// A whole replica of one small volume, and a branch of its newest point.
async fn branched(lab: &Lab, new: &BranchRequest) -> BranchStatus {
    let mut source = Source::new(&[MIB]);
    source.connect(lab).await;
    source.gap_begin(0, GapReason::FirstSync);
    source.gap_end(0);
    source.send().await;
    source.acknowledged().await;
    source.disconnect();
    api(lab).await.create_branch(new).await.expect("made")
}

#[test]
fn a_temporary_branch_lasts_until_nobody_has_wanted_it_for_a_while() {
    run(async || {
        let mut lab = Lab::new("", "");
        lab.config.nbd.temporary_linger = Seconds(3);
        lab.restart();
        let new = BranchRequest { name: None, temporary: true, ..request("", "latest") };
        let made = branched(&lab, &new).await;
        assert_eq!(made.name, "shop-1");
        let client = lab.open("shop/disk0@branch:shop-1").await.expect("it opens");
        client.write(0, Bytes::from(vec![5; 4096]), false).await.expect("written");
        drop(client);
        // Its host waits for the target and comes back, to what it had written.
        lab.restart();
        let client = lab.open("shop/disk0@branch:shop-1").await.expect("it opens");
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
        assert_eq!(client.read(0, 4096).await.expect("in use for longer")[..], [5; 4096]);
        client.disconnect().await;
        let dir = lab.config.data_dir.join("groups/shop/branches/shop-1");
        let gone = || lab.target().branches().list().is_empty() && !dir.exists();
        common::eventually("nobody wants it", gone).await;
        lab.restart();
        assert_eq!(api(&lab).await.branches().await.expect("listed").branches, []);
    });
}

#[test]
fn a_damaged_branch_is_refused_with_the_reason() {
    run(async || {
        let mut lab = Lab::new("", "");
        branched(&lab, &request("test", "latest")).await;
        let client = lab.open("shop/disk0@branch:test").await.expect("it opens");
        for byte in 1..4 {
            client.write(0, Bytes::from(vec![byte; 4096]), true).await.expect("durable");
        }
        drop(client);
        lab.stop();
        // In the last of the frames: nothing but the catalogue knows that it was durable.
        let dir = lab.config.data_dir.join("groups/shop/branches/test");
        let path = dir.join("log/0000000000000000.seg");
        let mut bytes = std::fs::read(&path).expect("read");
        let frames = tidemark_journal::segment::frames(&bytes);
        let (at, _) = frames.filter(|(_, frame)| frame.is_ok()).last().expect("frames");
        bytes[at as usize + 20] ^= 1;
        std::fs::write(&path, &bytes).expect("written");
        // It is found once, and remembered.
        for _ in 0..2 {
            lab.start();
            let refusal = lab.refusal("shop/disk0@branch:test").await;
            assert!(refusal.contains("is damaged") && refusal.contains("drop it"), "{refusal}");
            let listed = api(&lab).await.branches().await.expect("listed").branches;
            assert_eq!(listed[0].problem.as_ref(), Some(&refusal));
            lab.stop();
        }
        lab.start();
        let again = api(&lab).await.create_branch(&request("test", "latest")).await;
        assert!(again.expect_err("the name is taken").to_string().contains("already"));
        api(&lab).await.drop_branch("shop", "test").await.expect("dropped");
        assert!(!dir.exists());
        api(&lab).await.create_branch(&request("test", "latest")).await.expect("anew");
        let client = lab.open("shop/disk0@branch:test").await.expect("it opens");
        assert_eq!(client.read(0, 4096).await.expect("read")[..], [0; 4096]);
    });
}

/// Two sealed segments of a branch whose chunks rot: the scrub finds it and says so where people look,
/// nothing wrong is served, and what is written anew is whole again. Reads alone used to find it.
#[test]
fn the_scrub_reads_branches_too() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"\nchunk_cache = \"128 KiB\"", "");
        let mut source = Source::new(&[4 * MIB]);
        source.connect(&lab).await;
        source.gap_begin(0, GapReason::FirstSync);
        source.gap_end(0);
        source.send().await;
        source.acknowledged().await;
        source.disconnect();
        for name in ["other", "test"] {
            api(&lab).await.create_branch(&request(name, "latest")).await.expect("made");
        }
        let mut random = Random(3);
        let mut model = vec![0_u8; 4 * MIB];
        let client = lab.open("shop/disk0@branch:test").await.expect("it opens");
        for place in 0..40 {
            let content: Vec<u8> = (0..WRITE).map(|_| random.next() as u8).collect();
            model[place * WRITE..(place + 1) * WRITE].copy_from_slice(&content);
            client.write((place * WRITE) as u64, content.into(), true).await.expect("written");
        }
        let branch = lab.target().branches().get("shop", "test").expect("there");
        common::eventually("two are sealed", || {
            branch.journal().segments().iter().filter(|segment| segment.is_sealed()).count() >= 2
        })
        .await;
        drop((client, branch));
        assert_eq!(scrub(&lab).await, 0);
        lab.stop();

        // A byte of the third frame's only chunk, in the second segment.
        let dir = lab.config.data_dir.join("groups/shop/branches/test/log");
        let path = dir.join("0000000000000001.seg");
        let mut bytes = std::fs::read(&path).expect("read");
        let (at, length) = {
            let mut frames = tidemark_journal::segment::frames(&bytes);
            let (at, frame) = frames.nth(2).expect("a frame");
            (at as usize, frame.expect("whole").bytes().len())
        };
        bytes[at + length - 100] ^= 1;
        std::fs::write(&path, &bytes).expect("written");
        lab.start();
        assert_eq!(scrub(&lab).await, 1);
        // It is remembered over a restart.
        lab.restart();
        let api = api(&lab).await;
        let told = async || {
            let listed = api.branches().await.expect("listed").branches;
            let problems = api.status().await.expect("status").groups[0].problems.clone();
            let of = |name| listed.iter().find(|branch| branch.name == name).expect("listed");
            assert_eq!(of("other").damage, None);
            (of("test").damage.clone(), problems)
        };
        let (damage, problems) = told().await;
        assert_eq!(damage.as_deref(), Some("64 KiB of shop/disk0"));
        assert!(problems[0].contains("the branch 'test' is damaged: 64 KiB"), "{problems:?}");

        let client = lab.open("shop/disk0@branch:test").await.expect("it opens");
        let mut failing = Vec::new();
        for place in 0..40 {
            match client.read((place * WRITE) as u64, WRITE as u32).await {
                Ok(read) => {
                    assert_eq!(difference(&read, &model[place * WRITE..(place + 1) * WRITE]), None);
                }
                Err(_) => failing.push(place),
            }
        }
        let [place] = failing[..] else { panic!("{failing:?}") };
        client.write((place * WRITE) as u64, vec![7; WRITE].into(), true).await.expect("anew");
        assert_eq!(client.read((place * WRITE) as u64, 4096).await.expect("read")[..], [7; 4096]);
        assert_eq!(told().await.0, None, "nothing needs it any more");
        client.disconnect().await;
        common::eventually("nobody has it open", || {
            lab.target().branches().list().iter().all(|branch| branch.clients() == 0)
        })
        .await;
        api.drop_branch("shop", "test").await.expect("dropped");
        assert_eq!(scrub(&lab).await, 0);
    });
}

/// Has everything read and checked: how many places are damaged.
async fn scrub(lab: &Lab) -> u64 {
    let (scrubs, replica) = (lab.target().scrubs(), lab.replica());
    let before = scrubs.row(&replica).finished_wall_ns;
    scrubs.start("shop");
    common::eventually("it ends", || scrubs.row(&replica).finished_wall_ns != before).await;
    scrubs.row(&replica).finished_found
}
