//! Names: what resolves, what is refused and why, what stays at one moment.

mod common;

use common::{
    Lab, eventually,
    model::difference,
    run,
    source::{Source, WALL_START_NS},
};
use tidemark_control::target::{ResolveRequest, TargetClient};
use tidemark_journal::{GapReason, Kind, Seq, VolumeId, record::OFFER_HASH_BYTES};
use tidemark_link::message::Message;
use tidemark_nbd::client::Client;

const MIB: usize = 1 << 20;

fn time(wall_ns: i64) -> String {
    tidemark_target::clock::format_wall(wall_ns)
}

async fn resolve(lab: &Lab, volume: Option<&str>, point: &str) -> Result<Seq, String> {
    let api = TargetClient::new(&lab.config.api.socket);
    let request = ResolveRequest {
        group: "shop".to_owned(),
        volume: volume.map(str::to_owned),
        point: point.to_owned(),
    };
    api.resolve(&request).await.map(|r| r.position.seq).map_err(|error| error.to_string())
}

/// Two volumes: whole from 4, one write a millisecond up to 104; then a gap of disk 1, which ends.
async fn story(lab: &Lab) -> Source {
    let mut source = Source::new(&[MIB, MIB]);
    source.connect(lab).await;
    for volume in 0..2 {
        source.gap_begin(volume, GapReason::FirstSync);
    }
    for volume in 0..2 {
        source.gap_end(volume);
    }
    for n in 0..50u64 {
        source.write((n % 2) as u16, n * 8, &[n as u8 + 1; 4096]);
        if n % 7 == 6 {
            source.send().await;
        }
    }
    assert_eq!(source.mark("noon"), Seq(55));
    for n in 0..49u64 {
        source.write((n % 2) as u16, n * 8, &[n as u8 + 101; 4096]);
    }
    source.send().await;
    source.acknowledged().await;
    source
}

#[test]
fn moments_and_marks() {
    run(async || {
        let lab = Lab::new("segment = \"1 MiB\"", "");
        let mut source = story(&lab).await;
        // Record n was at n milliseconds after the start.
        let ms = |n: i64| time(WALL_START_NS + n * 1_000_000);
        assert_eq!(resolve(&lab, None, "mark:noon").await, Ok(Seq(55)));
        assert_eq!(resolve(&lab, None, &ms(60)).await, Ok(Seq(60)));
        let between = time(WALL_START_NS + 60_500_000);
        assert_eq!(resolve(&lab, Some("disk1"), &between).await, Ok(Seq(60)));
        assert_eq!(resolve(&lab, None, "latest").await, Ok(Seq(104)));
        let late = resolve(&lab, None, &ms(105)).await.expect_err("not vouched for");
        assert!(late.contains("vouched") && late.contains(&ms(104)), "{late}");
        // The source is idle and says so: later moments are good, and mean the last record.
        source.wall_ns += 3_000_000_000;
        source.time_ns += 3_000_000_000;
        source.heartbeat().await;
        eventually("echoed", || source.heard(|heard| heard.echoes > 0)).await;
        assert_eq!(resolve(&lab, None, &ms(2000)).await, Ok(Seq(104)));
        assert_eq!(resolve(&lab, None, &ms(105)).await, Ok(Seq(104)));
        let future = resolve(&lab, None, &ms(4000)).await.expect_err("not vouched for");
        assert!(future.contains(&ms(3104)), "{future}");
        let early = resolve(&lab, None, &ms(-5)).await.expect_err("before everything");
        assert!(early.contains("before everything"), "{early}");
        // The clock is set back by two seconds: some moments were twice.
        source.wall_ns -= 2_000_000_000;
        for n in 0..10 {
            source.write(0, n * 8, &[7; 4096]);
        }
        source.send().await;
        source.wall_ns += 10_000_000_000;
        source.write(0, 0, &[8; 4096]);
        source.send().await;
        source.acknowledged().await;
        assert_eq!(resolve(&lab, None, &ms(60)).await, Ok(Seq(60)), "this one was once");
        let name = ms(1104 + 5);
        assert_eq!(resolve(&lab, None, &name).await, Ok(Seq(109)), "so was this, by the records");
        assert_eq!(resolve(&lab, None, &ms(1104 + 500)).await, Ok(Seq(114)));
        source.wall_ns -= 11_000_000_000;
        for n in 0..40 {
            source.wall_ns += 20_000_000;
            source.write(0, n * 8, &[7; 4096]);
            source.send().await;
        }
        source.acknowledged().await;
        let twice = resolve(&lab, None, &ms(1109)).await;
        let twice = twice.expect_err("the clock was set back over it");
        assert!(twice.contains("set back") && twice.contains("@seq:109"), "{twice}");
    });
}

#[test]
fn gaps_and_unknown_names_are_refused_with_what_there_is() {
    run(async || {
        let lab = Lab::new("", "");
        let mut source = story(&lab).await;
        let begin = source.gap_begin(1, GapReason::Overflow);
        source.write(0, 0, &[9; 4096]);
        source.send().await;
        source.acknowledged().await;
        assert_eq!(begin, Seq(105));
        let inside = lab.refusal("shop/disk1@seq:106").await;
        assert!(inside.contains("faster than they could be sent"), "{inside}");
        assert!(inside.contains("@seq:104 before and none after"), "{inside}");
        assert!(lab.open("shop/disk0@seq:106").await.is_ok(), "disk 0 has no gap");
        assert!(resolve(&lab, None, "seq:106").await.is_err(), "the group has");
        assert_eq!(resolve(&lab, None, "latest").await, Ok(Seq(104)));
        assert_eq!(resolve(&lab, Some("disk0"), "latest").await, Ok(Seq(106)));
        let end = source.gap_end(1);
        source.send().await;
        source.acknowledged().await;
        assert_eq!(resolve(&lab, None, "latest").await, Ok(end));
        for (name, part) in [
            ("shop/disk0@seq:999", "not been received yet"),
            ("shop/disk0@mark:noen", "has no mark 'noen'; the newest are: noon"),
            ("shop/disk0@yesterday", "is not a point"),
            ("shop/disk9@latest", "has no volume 'disk9'; it has: disk0, disk1"),
            ("shup/disk0@latest", "no replica of a group 'shup'; it has: shop"),
            ("shop@latest", "name a volume"),
            ("shop/disk0", "names no point"),
            ("", "names no point"),
            ("shop/disk0@branch:none", "no branch"),
            ("shop/disk0@seq:2", "in a gap"),
        ] {
            let sentence = lab.refusal(name).await;
            assert!(sentence.contains(part), "{name}: {sentence}");
        }
        let path = lab.target().nbd_unix().expect("configured");
        let listed = Client::list(path, &Default::default()).await.expect("listed");
        let names: Vec<&str> = listed.iter().map(|entry| entry.name.as_str()).collect();
        for name in ["shop/disk0@latest", "shop/disk1@mark:noon", "shop/disk1@seq:4"] {
            assert!(names.contains(&name), "{names:?}");
        }
        for name in &names {
            lab.open(name).await.expect("what is listed can be opened");
        }
    });
}

#[test]
fn latest_is_one_moment_for_a_client() {
    run(async || {
        let lab = Lab::new("", "");
        let mut source = story(&lab).await;
        let first = lab.open("shop/disk0@latest").await.expect("it opens");
        assert_eq!(first.info().canonical_name.as_deref(), Some("shop/disk0@seq:104"));
        assert!(!first.info().features.multi_conn);
        let moment = source.before.seq;
        source.write(0, 0, &[77; 4096]);
        source.write(1, 8, &[78; 4096]);
        source.send().await;
        source.acknowledged().await;
        // Another volume and another connection see the same moment.
        let (second, third) =
            (lab.open("shop/disk1@latest").await, lab.open("shop/disk0@latest").await);
        let (second, third) = (second.expect("it opens"), third.expect("it opens"));
        let at = |volume| source.model.at(VolumeId(volume), moment);
        for (client, model) in [(&first, at(0)), (&second, at(1)), (&third, at(0))] {
            let read = client.read(0, MIB as u32).await.expect("read");
            assert_eq!(difference(&read, &model), None);
        }
        for client in [first, second, third] {
            client.disconnect().await;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
        let later = lab.open("shop/disk0@latest").await.expect("it opens");
        let read = later.read(0, 512).await.expect("read");
        assert_eq!(read[..], [77; 512], "after its client has gone, a newer one");
        let fixed = lab.open("shop/disk0@seq:50").await.expect("it opens");
        assert!(fixed.info().features.multi_conn && fixed.info().features.read_only);
    });
}

#[test]
fn offers_are_compared_at_their_own_position() {
    run(async || {
        let lab = Lab::new("", "");
        let mut source = story(&lab).await;
        let hashes = |content: &[u8]| -> Vec<u8> {
            content
                .chunks(4096)
                .flat_map(|block| blake3::hash(block).as_bytes()[..OFFER_HASH_BYTES].to_vec())
                .collect()
        };
        // Equal but for two blocks; then the disk changes, which the offer is not about.
        let mut content = source.model.at(VolumeId(0), source.before.seq);
        content[3 * 4096] ^= 1;
        content[255 * 4096 + 4095] ^= 1;
        let offer = source.push(Kind::Offer, 0, 0, 0, 2048, &hashes(&content));
        source.write(0, 80, &[99; 4096]);
        source.send().await;
        source.acknowledged().await;
        eventually("answered", || source.heard(|heard| !heard.needs.is_empty())).await;
        let need = source.heard(|heard| heard.needs[0]);
        assert_eq!(need.seq, offer);
        assert_eq!(need.wanted().collect::<Vec<_>>(), [3, 255]);
    });
}

#[test]
fn a_newer_connection_takes_the_place_of_an_older_one() {
    run(async || {
        let lab = Lab::new("", "");
        let source = story(&lab).await;
        let mut twin = Source::new(&[MIB, MIB]);
        twin.before = source.before;
        let welcome = twin.connect(&lab).await;
        assert_eq!(welcome.position, Some(source.before));
        eventually("the older one is ended", || source.heard(|heard| heard.end.is_some())).await;
        twin.write(0, 0, &[5; 4096]);
        twin.send().await;
        twin.acknowledged().await;
        // Who may not write the group learns why, and disturbs nobody.
        let mut other = Source::new(&[MIB, MIB]);
        other.node = "db2".to_owned();
        let answer = other.greet(&lab).await.expect("answered");
        assert!(matches!(&answer, Message::Refuse(r) if r.sentence.contains("may not write")));
        let mut unknown = Source::new(&[MIB]);
        unknown.name = "shup".to_owned();
        let answer = unknown.greet(&lab).await.expect("answered");
        assert!(matches!(&answer, Message::Refuse(r) if r.sentence.contains("does not know")));
        let mut resized = Source::new(&[MIB, 2 * MIB]);
        resized.node = "db1".to_owned();
        let answer = resized.greet(&lab).await.expect("answered");
        assert!(matches!(&answer, Message::Refuse(r) if r.sentence.contains("4096 sectors")));
        drop(source);
    });
}

#[test]
fn status_tells_what_there_is() {
    run(async || {
        let lab = Lab::new("", "");
        let mut source = story(&lab).await;
        source.gap_begin(1, GapReason::Overflow);
        source.send().await;
        source.acknowledged().await;
        let api = TargetClient::new(&lab.config.api.socket);
        let status = api.status().await.expect("asked");
        let group = &status.groups[0];
        assert_eq!((group.name.as_str(), group.source.as_str()), ("shop", "db1"));
        assert_eq!(group.position, source.before);
        assert_eq!(group.link.state, tidemark_control::agent::LinkState::Up);
        assert!(group.volumes[0].gap.is_none() && group.volumes[1].gap.is_some());
        assert!(group.frames_total > 5 && group.received_bytes_total > 5000);
        assert_eq!((group.oldest_seq, &group.problems), (Seq(4), &Vec::new()));
        let points = api.points("shop").await.expect("asked");
        let range = points.ranges[0];
        assert_eq!((range.first_seq, range.last_seq), (Seq(4), Seq(104)));
        assert_eq!(range.last_wall_ns, WALL_START_NS + 104_000_000);
        assert_eq!((points.marks[0].name.as_str(), points.marks[0].seq), ("noon", Seq(55)));
        assert_eq!(points.volumes[0].ranges[0].last_seq, Seq(105));
        let missing = api.points("shup").await.expect_err("unknown");
        assert!(missing.to_string().contains("no replica"), "{missing}");
    });
}
