//! From a source over the link into the log and out through exports, against a model.

mod common;

use common::{
    Lab,
    model::{Random, difference},
    run,
    source::Source,
};
use tidemark_journal::{GapReason, Seq, VolumeId};

const MIB: usize = 1 << 20;

/// Begins a group of two volumes that are whole from the start.
async fn begin(lab: &Lab, sizes: &[usize]) -> Source {
    let mut source = Source::new(sizes);
    let welcome = source.connect(lab).await;
    assert_eq!(welcome.position, None);
    for volume in 0..sizes.len() as u16 {
        source.gap_begin(volume, GapReason::FirstSync);
    }
    for volume in 0..sizes.len() as u16 {
        source.gap_end(volume);
    }
    source.send().await;
    source
}

/// Sends so many random records in frames of random length.
async fn load(source: &mut Source, records: u64, random: &mut Random) {
    let mut left = records;
    while left > 0 {
        let some = (1 + random.below(60)).min(left);
        for _ in 0..some {
            source.random();
        }
        source.send().await;
        left -= some;
    }
    source.acknowledged().await;
}

/// Compares positions with the model, read through exports in requests of any alignment.
async fn compare(lab: &Lab, source: &Source, positions: &[Seq], random: &mut Random) {
    for seq in positions {
        for volume in 0..source.model.sizes.len() {
            let name = format!("shop/disk{volume}@seq:{seq}");
            let client = lab.open(&name).await.expect("it opens");
            let model = source.model.at(VolumeId(volume as u16), *seq);
            assert_eq!(client.info().size, model.len() as u64);
            let mut disk = Vec::new();
            while disk.len() < model.len() {
                let length =
                    (1 + random.below(MIB as u64 * 2)).min((model.len() - disk.len()) as u64);
                let read = client.read(disk.len() as u64, length as u32).await.expect("it reads");
                disk.extend_from_slice(&read);
            }
            assert_eq!(difference(&disk, &model), None, "{name} differs at this sector");
        }
    }
}

fn positions(source: &Source, number: u64, random: &mut Random) -> Vec<Seq> {
    let (first, last) = (4, source.before.seq.0);
    (0..number).map(|_| Seq(first + random.below(last - first + 1))).chain([Seq(last)]).collect()
}

#[test]
fn any_position_equals_the_model() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"", "");
        let mut random = Random(1);
        let mut source = begin(&lab, &[8 * MIB, 3 * MIB + 512]).await;
        load(&mut source, 1500, &mut random).await;
        let some = positions(&source, 8, &mut random);
        compare(&lab, &source, &some, &mut random).await;

        // A restart in the middle: everything acknowledged is still there, and it goes on exactly.
        source.disconnect();
        lab.restart();
        compare(&lab, &source, &some, &mut random).await;
        let welcome = source.connect(&lab).await;
        assert_eq!(welcome.position, Some(source.before));
        load(&mut source, 1500, &mut random).await;
        let some = positions(&source, 8, &mut random);
        compare(&lab, &source, &some, &mut random).await;
        assert!(lab.replica().journal().segments().len() > 3, "the log has several segments");
    });
}

#[test]
fn what_leaves_the_window_is_folded_into_the_base() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"", "window_min = 0\nsize_max = \"4 MiB\"");
        let mut random = Random(2);
        let mut source = begin(&lab, &[8 * MIB, 3 * MIB + 512]).await;
        load(&mut source, 3000, &mut random).await;
        let log = lab.replica();
        let folded = || log.ledger().history(|history| history.oldest) > Seq(100);
        common::eventually("segments are folded", folded).await;
        // With the segment that comes next: until then it goes on.
        let small = || (log.journal().bytes() + MIB as u64) <= 4 * MIB as u64;
        common::eventually("the log is small enough", small).await;
        drop(log);
        let oldest = lab.replica().ledger().history(|history| history.oldest);
        let refusal = lab.refusal(&format!("shop/disk0@seq:{}", oldest.0 - 1)).await;
        assert!(refusal.contains("no longer retained") && refusal.contains(&oldest.to_string()));
        let last = source.before.seq;
        let some: Vec<Seq> = (0..6).map(|n| Seq(oldest.0 + (last.0 - oldest.0) * n / 5)).collect();
        compare(&lab, &source, &some, &mut random).await;
        // The same out of the files again.
        source.disconnect();
        lab.restart();
        compare(&lab, &source, &some, &mut random).await;
        source.connect(&lab).await;
        load(&mut source, 1000, &mut random).await;
        let last = source.before.seq;
        compare(&lab, &source, &[last], &mut random).await;
    });
}

#[test]
fn an_open_export_pins_its_point_and_is_named() {
    run(async || {
        let lab = Lab::new("segment = \"1 MiB\"", "window_min = 0\nsize_max = \"4 MiB\"");
        let mut random = Random(3);
        let mut source = begin(&lab, &[8 * MIB, 3 * MIB]).await;
        load(&mut source, 100, &mut random).await;
        let point = source.before.seq;
        let client = lab.open(&format!("shop/disk0@seq:{point}")).await.expect("it opens");
        // More than the log may hold: at some point nothing more is accepted.
        for _ in 0..400 {
            if source.ack().is_some_and(|ack| ack.flags.full) {
                break;
            }
            source.random();
            source.send().await;
            tokio::time::sleep(std::time::Duration::from_millis(25)).await;
        }
        let full = || source.ack().is_some_and(|ack| ack.flags.full);
        common::eventually("the source is told", full).await;
        // What lies below the point may leave first; then the export is in the way, and is named.
        let pins = format!("@seq:{point} is held by");
        let named = || {
            source.heard(|heard| {
                let mut sentences = heard.notices.iter().map(|notice| &notice.sentence);
                sentences.any(|s| s.contains(&pins) && s.contains("an open export"))
            })
        };
        common::eventually("and why", named).await;
        // The point is as it was; once it is let go of, everything goes on.
        let model = source.model.at(VolumeId(0), point);
        let mut disk = Vec::new();
        while disk.len() < model.len() {
            disk.extend_from_slice(
                &client.read(disk.len() as u64, MIB as u32).await.expect("read"),
            );
        }
        assert_eq!(difference(&disk, &model), None);
        client.disconnect().await;
        source.acknowledged().await;
        let last = source.before.seq;
        compare(&lab, &source, &[last], &mut random).await;
    });
}
