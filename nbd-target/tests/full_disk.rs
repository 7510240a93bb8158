//! A disk that others have filled up: history leaves all the same, and the log goes on by itself.

mod common;

use common::{
    Lab, Small, equals, eventually, fill, model::Random, run, send_until_full, source::Source,
};
use tidemark_journal::{GapReason, Seq};
use tidemark_target::damage::{DamageRow, Place, Spot};

const MIB: usize = 1 << 20;
/// Bytes of a write, a frame each.
const WRITE: usize = 64 << 10;

/// A target on a small disk with segments of 1 MiB.
fn lab(group: &str) -> (Lab, Small) {
    let dir = tempfile::TempDir::new().expect("a directory");
    let small = Small::mount(&dir.path().join("small"), 48 * MIB);
    let data = small.0.join("data");
    (Lab::at(dir, Some(data), "segment = \"1 MiB\"", group), small)
}

/// A whole replica of 4 MiB which nothing was written into.
async fn begin(lab: &Lab) -> (Source, Seq) {
    let mut source = Source::new(&[4 * MIB]);
    source.connect(lab).await;
    source.gap_begin(0, GapReason::FirstSync);
    let first = source.gap_end(0);
    source.send().await;
    source.acknowledged().await;
    (source, first)
}

/// Writes all of the volume so many times, with what does not compress.
async fn pour(source: &mut Source, times: usize) {
    let mut random = Random(9);
    for place in (0..times).flat_map(|_| 0..4 * MIB / WRITE) {
        let content: Vec<u8> = (0..WRITE).map(|_| random.next() as u8).collect();
        source.write(0, (place * WRITE / 512) as u64, &content);
        source.send().await;
    }
    source.acknowledged().await;
}

/// Whether the reserve takes what it is to take.
fn is_reserved(lab: &Lab) -> bool {
    use std::os::unix::fs::MetadataExt;
    let bytes = lab.target().groups().catalogue().reserve().bytes();
    let meta = std::fs::metadata(lab.config.data_dir.join("groups/.reserve"));
    bytes == 3 << 20 && meta.is_ok_and(|meta| meta.blocks() * 512 == bytes)
}

/// Old history has to be folded into a base that has no blocks yet, and there is no room for one: the
/// target used to wait for ever for the room that only folding gives.
#[test]
fn history_leaves_a_full_disk_and_the_log_goes_on() {
    for restarted in [false, true] {
        run(async || {
            let (mut lab, small) = lab("window = \"1 s\"");
            assert!(is_reserved(&lab));
            let (mut source, first) = begin(&lab).await;
            // Nothing may leave yet.
            let pin = lab.open(&format!("shop/disk0@seq:{first}")).await.expect("it opens");
            pour(&mut source, 3).await;
            let filler = small.0.join("filler");
            fill(&filler);
            send_until_full(&mut source).await;
            equals(&lab, &source, first).await;
            let stalled = lab.replica().journal().progress().stalled;
            assert!(stalled.is_some_and(|why| why.contains("no room for another segment")));
            let acked = source.ack().expect("acknowledged").final_durable;
            equals(&lab, &source, acked).await;

            if restarted {
                source.disconnect();
                drop(pin);
                lab.restart();
                equals(&lab, &source, acked).await;
                source.connect(&lab).await;
            } else {
                pin.disconnect().await;
            }
            eventually("history leaves", || {
                lab.replica().ledger().history(|history| history.oldest) > first
            })
            .await;
            // Each fold may need it once more, as long as the log takes what the last one gave.
            eventually("the reserve is whole again", || is_reserved(&lab)).await;
            let going_on = || lab.replica().journal().progress().stalled.is_none();
            eventually("the log goes on", going_on).await;
            source.acknowledged().await;
            assert_eq!(lab.replica().journal().progress().failed, None);
            let last = source.before.seq;
            equals(&lab, &source, last).await;
            assert!(filler.exists(), "nobody made room");
            source.disconnect();
            lab.stop();
        });
    }
}

/// The catalogue grows on a full disk; the log then begins no other segment until the room that it took
/// is there again.
#[test]
fn the_catalogue_goes_on_on_a_full_disk() {
    run(async || {
        let (mut lab, small) = lab("");
        let (mut source, first) = begin(&lab).await;
        pour(&mut source, 1).await;
        let filler = small.0.join("filler");
        fill(&filler);
        let catalogue = std::sync::Arc::clone(lab.target().groups().catalogue());
        let place = Place::Header { segment: 0 };
        let text = "x".repeat(400 << 10);
        let spot = Spot { place, text, found_wall_ns: 0, extents: Vec::new() };
        let row = DamageRow { spots: vec![spot], unlisted: 0 };
        for name in ["one", "two"] {
            catalogue.put_damages(name, &row).expect("there is room in reserve");
        }
        assert!(!catalogue.reserve().is_whole(), "more was kept than there was room for");
        equals(&lab, &source, first).await;
        send_until_full(&mut source).await;
        assert_eq!(catalogue.damages("two").expect("read"), row);
        drop(catalogue);
        // Also with the reserve given up, it starts and has all of it.
        let acked = source.ack().expect("acknowledged").final_durable;
        source.disconnect();
        lab.restart();
        equals(&lab, &source, acked).await;
        let catalogue = lab.target().groups().catalogue();
        assert_eq!(catalogue.damages("two").expect("read"), row);

        std::fs::remove_file(&filler).expect("removed");
        eventually("the reserve is whole", || catalogue.reserve().is_whole()).await;
        let going_on = || lab.replica().journal().progress().stalled.is_none();
        eventually("the log goes on", going_on).await;
        source.connect(&lab).await;
        source.acknowledged().await;
        let last = source.before.seq;
        equals(&lab, &source, last).await;
        source.disconnect();
        lab.stop();
    });
}
