//! Torn tails, damage, full disks: what is lost, what is said, what stays readable.

mod common;

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use common::{
    Lab, Small, equals, eventually, fill, model::difference, run, send_until_full, source::Source,
    synced,
};
use tidemark_journal::{FrameView, GapReason, Seq, VolumeId, segment};
use tidemark_link::message::Message;
use tidemark_target::damage::Place;

const MIB: usize = 1 << 20;

/// The frames of a segment file: offset, length and last sequence.
fn frames(path: &Path) -> Vec<(u64, usize, Seq)> {
    let bytes = std::fs::read(path).expect("read");
    let end = |view: &FrameView<'_>| (view.bytes().len(), view.header().last().seq);
    segment::frames(&bytes)
        .map_while(|(at, frame)| frame.ok().map(|view| (at, end(&view).0, end(&view).1)))
        .collect()
}

fn first_segment(lab: &Lab) -> PathBuf {
    lab.log_dir().join("0000000000000000.seg")
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 0x40], at).expect("written");
    file.sync_all().expect("synced");
}

#[test]
fn an_unacknowledged_tail_is_cut_off() {
    run(async || {
        let mut lab = Lab::new("", "");
        let mut source = synced(&lab, MIB).await;
        for _ in 0..50 {
            source.random();
        }
        source.send().await;
        source.acknowledged().await;
        let good = source.before;
        source.disconnect();
        lab.stop();
        // As a power cut in the middle of a batch leaves it: half a frame after the good ones.
        let path = first_segment(&lab);
        let (at, bytes, last) = *frames(&path).last().expect("frames");
        assert_eq!(last, good.seq);
        let mut next = Source::new(&[MIB]);
        next.before = good;
        for _ in 0..50 {
            next.random();
        }
        let torn = next.finish();
        let end = (at + bytes as u64).next_multiple_of(4096);
        let file = OpenOptions::new().write(true).open(&path).expect("open");
        file.write_all_at(&torn[..torn.len() / 2], end).expect("written");
        lab.start();
        equals(&lab, &source, good.seq).await;
        let welcome = source.connect(&lab).await;
        assert_eq!(welcome.position, Some(good));
        assert_eq!(lab.replica().notices(), Vec::<String>::new());
        for _ in 0..50 {
            source.random();
        }
        source.send().await;
        source.acknowledged().await;
        let last = source.before.seq;
        source.disconnect();
        lab.restart();
        equals(&lab, &source, last).await;
    });
}

#[test]
fn damage_below_what_was_acknowledged_is_kept_and_reported() {
    run(async || {
        let mut lab = Lab::new("", "");
        let mut source = synced(&lab, MIB).await;
        for _ in 0..5 {
            for _ in 0..20 {
                source.random();
            }
            source.send().await;
            source.acknowledged().await;
        }
        source.disconnect();
        lab.stop();
        let path = first_segment(&lab);
        let all = frames(&path);
        let (at, bytes, _) = all[3];
        let good = all[2].2;
        flip(&path, at + bytes as u64 - 7);
        let damaged = std::fs::read(&path).expect("read");
        lab.start();
        let notices = lab.replica().notices();
        assert!(notices.len() == 1 && notices[0].contains("damaged"), "{notices:?}");
        let kept = path.with_extension("damaged-0");
        assert_eq!(std::fs::read(kept).expect("it is kept"), damaged, "as it was");
        equals(&lab, &source, good).await;
        let refusal = lab.refusal(&format!("shop/disk0@seq:{}", good.0 + 1)).await;
        assert!(refusal.contains("has been lost here") && refusal.contains("damaged"), "{refusal}");
        let point = format!("@seq:{}", good.0);
        assert!(refusal.contains(&point), "{refusal}");
        // The source is told the truth, and what it still has goes on from there.
        source.acked = Default::default();
        let welcome = source.connect(&lab).await;
        assert_eq!(welcome.position.expect("known").seq, good);
        source.acknowledged().await;
        let last = source.before.seq;
        equals(&lab, &source, last).await;
    });
}

#[test]
fn a_tail_that_was_acknowledged_is_never_cut_off() {
    run(async || {
        let mut lab = Lab::new("", "");
        let mut source = synced(&lab, MIB).await;
        for _ in 0..20 {
            source.random();
        }
        source.send().await;
        source.acknowledged().await;
        source.disconnect();
        lab.stop();
        // The very last frame: nothing follows it, but the catalogue knows that it was durable.
        let path = first_segment(&lab);
        let (at, bytes, _) = *frames(&path).last().expect("frames");
        flip(&path, at + bytes as u64 - 7);
        lab.start();
        assert!(path.with_extension("damaged-0").exists());
        assert!(lab.replica().notices()[0].contains("below what was acknowledged"));
        // The source remembers it as acknowledged: that is a doubt, and nothing is resumed.
        let answer = source.greet(&lab).await.expect("answered");
        let Message::Welcome(welcome) = answer else { panic!("{answer:?}") };
        assert!(welcome.position.expect("known").seq < source.acked.seq);
        source.random();
        source.send().await;
        eventually("it ends", || source.heard(|heard| heard.end.is_some())).await;
        let end = source.heard(|heard| heard.end.clone().expect("it ended"));
        assert!(end.contains("everything is compared"), "{end}");
    });
}

#[test]
fn a_damaged_chunk_is_an_error_and_never_wrong_data() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"\nchunk_cache = \"128 KiB\"", "");
        let mut source = synced(&lab, 4 * MIB).await;
        let mut random = common::model::Random(5);
        let mut content = || (0..65536).map(|_| random.next() as u8).collect::<Vec<u8>>();
        for place in 0..40 {
            source.write(0, place * 128, &content());
            source.send().await;
        }
        source.acknowledged().await;
        let last = source.before.seq;
        eventually("the first segment is sealed", || {
            lab.replica().journal().segments()[0].is_sealed()
        })
        .await;
        source.disconnect();
        lab.restart();
        let path = first_segment(&lab);
        let (at, bytes, _) = frames(&path)[3];
        flip(&path, at + bytes as u64 - 100);
        let client = lab.open(&format!("shop/disk0@seq:{last}")).await.expect("it opens");
        let place = 65536 * 2;
        let error = client.read(place, 4096).await.expect_err("damaged");
        assert!(
            error.message.contains("segment 0") && error.message.contains("checksum"),
            "{error}"
        );
        // The rest reads as it should.
        let model = source.model.at(VolumeId(0), last);
        let read = client.read(place + 65536, 65536).await.expect("it reads");
        assert_eq!(read[..], model[place as usize + 65536..][..65536]);
        // So does damage in the index itself.
        let trailer = std::fs::metadata(&path).expect("there").len() - 4096;
        for page in (0..trailer).rev().step_by(4096).take(20) {
            flip(&path, page);
        }
        lab.restart();
        let client = lab.open(&format!("shop/disk0@seq:{last}")).await.expect("it opens");
        let error = client.read(0, 4096).await.expect_err("damaged");
        assert!(error.message.contains("index"), "{error}");
    });
}

#[test]
fn a_sealed_segment_that_was_cut_is_mended_or_told() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"", "");
        let mut source = synced(&lab, 4 * MIB).await;
        let mut random = common::model::Random(6);
        for place in 0..40 {
            let content: Vec<u8> = (0..65536).map(|_| random.next() as u8).collect();
            source.write(0, place * 128, &content);
            source.send().await;
        }
        source.acknowledged().await;
        let last = source.before.seq;
        eventually("it is sealed", || lab.replica().journal().segments()[0].is_sealed()).await;
        source.disconnect();
        lab.stop();
        let path = first_segment(&lab);
        let bytes = std::fs::metadata(&path).expect("there").len();
        let whole = std::fs::read(&path).expect("read");
        let file = OpenOptions::new().write(true).open(&path).expect("open");
        file.set_len(bytes - 4096).expect("cut");
        lab.start();
        // The log goes on where it ended, and what was cut off is made again from the frames.
        assert_eq!(lab.replica().journal().progress().durable.seq, last);
        eventually("it is whole", || std::fs::read(&path).is_ok_and(|now| now == whole)).await;
        eventually("it is said no more", || lab.replica().damages().list().is_empty()).await;
        // Not so with a frame whose meta is damaged too: a map of it knows nothing, and it is told.
        let (at, _, _) = frames(&path)[3];
        lab.stop();
        flip(&path, at + 200);
        let index_at = index_at(&path);
        let mut broken = std::fs::read(&path).expect("read");
        broken[index_at..].fill(0xff);
        std::fs::write(&path, broken).expect("written");
        lab.start();
        let view = lab.open(&format!("shop/disk0@seq:{last}")).await.expect("it opens");
        let map = view.block_status(0, 4 << 20, false).await.expect("it is to be read");
        assert!(map.len() == 1 && map[0].length == 1 << 20 && !map[0].zero, "{map:?}");
        view.read(0, 4096).await.expect_err("damaged");
        let index = Place::Index { segment: 0 };
        eventually("it is listed", || {
            lab.replica().damages().list().iter().any(|spot| spot.place == index)
        })
        .await;
    });
}

/// Where the index of a whole segment begins.
fn index_at(path: &Path) -> usize {
    let bytes = std::fs::read(path).expect("read");
    let end = segment::SegmentEnd::decode(&bytes[bytes.len() - 4096..]).expect("a trailer");
    end.index_at as usize
}

#[test]
fn a_lost_base_is_an_error_until_the_source_sends_it_again() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"", "window_min = 0\nsize_max = \"4 MiB\"");
        let mut source = synced(&lab, 8 * MIB).await;
        let mut random = common::model::Random(7);
        for place in 0..160 {
            let content: Vec<u8> = (0..65536).map(|_| random.next() as u8).collect();
            source.write(0, place * 128 % 16384, &content);
            source.send().await;
        }
        source.acknowledged().await;
        let last = source.before.seq;
        let log = lab.replica();
        eventually("some is folded", || log.ledger().row().first_segment > 2).await;
        eventually("it is small", || log.journal().bytes() <= 4 * MIB as u64).await;
        drop(log);
        source.disconnect();
        lab.stop();
        let base = lab.config.data_dir.join("groups/shop/base");
        std::fs::remove_dir_all(&base).expect("removed");
        lab.start();
        let replica = lab.replica();
        assert!(replica.notices().iter().any(|text| text.contains("lost")), "it is said");
        let oldest = replica.ledger().history(|history| history.oldest);
        assert!(oldest > Seq(100), "much is in the base only");
        // Points are still offered; what only the base held is an error, the rest is right.
        let model = source.model.at(VolumeId(0), last);
        let client = lab.open(&format!("shop/disk0@seq:{last}")).await.expect("it opens");
        let mut failed = Vec::new();
        for place in (0..8 * MIB).step_by(65536) {
            match client.read(place as u64, 65536).await {
                Ok(read) => assert_eq!(read[..], model[place..][..65536], "at {place}"),
                Err(error) => {
                    // The second once the loss is in the group's history.
                    let said = ["is lost", "its copy here was damaged"];
                    assert!(said.iter().any(|said| error.message.contains(said)), "{error}");
                    failed.push(place);
                }
            }
        }
        assert!(!failed.is_empty());
        drop(client);
        // What a verify finds missing is sent again, and is good from there on.
        source.connect(&lab).await;
        for place in &failed {
            source.write(0, *place as u64 / 512, &model[*place..][..65536]);
            source.send().await;
        }
        source.acknowledged().await;
        let last = source.before.seq;
        let client = lab.open(&format!("shop/disk0@seq:{last}")).await.expect("it opens");
        for place in (0..8 * MIB).step_by(MIB) {
            let read = client.read(place as u64, MIB as u32).await.expect("it reads");
            assert_eq!(difference(&read, &model[place..][..MIB]), None, "at {place}");
        }
        source.disconnect();
    });
}

#[test]
fn a_group_that_cannot_be_opened_does_not_keep_the_others_from_it() {
    run(async || {
        let other = "\n[[group]]\nname = \"till\"\nnode = \"db1\"";
        let mut lab = Lab::new("segment = \"1 MiB\"", other);
        let mut source = synced(&lab, 2 * MIB).await;
        let mut till = Source::new(&[MIB]);
        till.name = "till".to_owned();
        till.group = tidemark_journal::GroupId([9; 16]);
        till.connect(&lab).await;
        till.gap_begin(0, GapReason::FirstSync);
        till.gap_end(0);
        till.send().await;
        till.acknowledged().await;
        let good = till.before.seq;
        source.acknowledged().await;
        source.disconnect();
        till.disconnect();
        lab.stop();
        // What is read of it at a start is not a file any more.
        let log = lab.log_dir();
        std::fs::remove_dir_all(&log).expect("removed");
        std::fs::write(&log, "not a directory").expect("written");
        lab.start();
        let groups = lab.target().groups();
        let why = groups.failure("shop").expect("it failed");
        assert!(why.contains("cannot create") && why.contains("restart the target"), "{why}");
        let refusal = lab.refusal("shop/disk0@latest").await;
        assert!(refusal.contains("could not be opened"), "{refusal}");
        let answer = source.greet(&lab).await.expect("answered");
        assert!(
            matches!(&answer, Message::Refuse(refuse) if refuse.sentence.contains("could not be opened")),
            "{answer:?}"
        );
        // The other group is served and received.
        lab.open(&format!("till/disk0@seq:{good}")).await.expect("it opens");
        till.connect(&lab).await;
        till.random();
        till.send().await;
        till.acknowledged().await;
        till.disconnect();
    });
}

#[test]
fn a_full_disk_stops_and_says_so_and_resumes_with_room() {
    run(async || {
        let dir = tempfile::TempDir::new().expect("a directory");
        let small = Small::mount(&dir.path().join("small"), 16 * MIB);
        let data = small.0.join("data");
        let mut lab = Lab::at(dir, Some(data), "segment = \"1 MiB\"", "");
        let filler = small.0.join("filler");
        let mut source = synced(&lab, 4 * MIB).await;
        for _ in 0..20 {
            source.random();
        }
        source.send().await;
        source.acknowledged().await;
        let early = source.before.seq;
        // Somebody else takes all the room there is.
        fill(&filler);
        send_until_full(&mut source).await;
        eventually("and why", || source.heard(|heard| !heard.notices.is_empty())).await;
        let why = source.heard(|heard| heard.notices[0].sentence.clone());
        assert!(why.contains("no room for another segment"), "{why}");
        // Old points stay readable meanwhile; another connection is told at once.
        equals(&lab, &source, early).await;
        source.disconnect();
        let answer = source.greet(&lab).await.expect("answered");
        assert!(matches!(&answer, Message::Refuse(refuse) if refuse.sentence.contains("no room")));
        // With room, everything that was sent becomes durable.
        std::fs::remove_file(&filler).expect("removed");
        eventually("it goes on", || lab.replica().journal().progress().stalled.is_none()).await;
        source.connect(&lab).await;
        source.acknowledged().await;
        let last = source.before.seq;
        equals(&lab, &source, last).await;
        source.disconnect();
        lab.stop();
    });
}
