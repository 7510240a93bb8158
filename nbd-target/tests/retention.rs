//! A log that has reached its size: what may leave, what time does meanwhile, what is never exceeded.

mod common;

use common::{
    Lab, eventually,
    model::{Random, difference},
    run,
    source::Source,
};
use tidemark_journal::{GapReason, VolumeId};

const MIB: usize = 1 << 20;
/// A log of four small segments.
const SMALL: &str = "segment = \"1 MiB\"";

/// Writes of 64 KiB that do not compress, one frame each, over the whole disk and again.
async fn pour(source: &mut Source, bytes: usize, random: &mut Random) {
    let disk = source.model.sizes[0];
    for n in 0..bytes / 65536 {
        let content: Vec<u8> = (0..8192).flat_map(|_| random.next().to_le_bytes()).collect();
        source.write(0, (n * 65536 % disk) as u64 / 512, &content);
        source.send().await;
    }
}

async fn equals_the_model(lab: &Lab, source: &Source) {
    let client = lab.open("shop/disk0@latest").await.expect("it opens");
    let model = source.model.at(VolumeId(0), source.before.seq);
    for (n, part) in model.chunks(MIB).enumerate() {
        let read = client.read((n * MIB) as u64, part.len() as u32).await.expect("it reads");
        assert_eq!(difference(&read, part), None, "in MiB {n}");
    }
}

#[test]
fn a_first_sync_goes_through_a_log_of_any_size() {
    run(async || {
        // window_min is an hour: nothing of the sync is as old as that, and no point is in it.
        let lab = Lab::new(SMALL, "size_max = \"4 MiB\"");
        let mut source = Source::new(&[16 * MIB]);
        source.connect(&lab).await;
        source.gap_begin(0, GapReason::FirstSync);
        pour(&mut source, 16 * MIB, &mut Random(1)).await;
        source.gap_end(0);
        source.send().await;
        source.acknowledged().await;
        equals_the_model(&lab, &source).await;
    });
}

#[test]
fn history_grows_old_while_the_source_is_kept_waiting() {
    run(async || {
        let lab = Lab::new(SMALL, "size_max = \"4 MiB\"\nwindow_min = \"3 s\"");
        let mut source = Source::new(&[16 * MIB]);
        source.connect(&lab).await;
        source.gap_begin(0, GapReason::FirstSync);
        source.gap_end(0);
        // Faster than the least window allows, and then not a word more from the source: what it
        // says lies behind the frames that are not taken in.
        pour(&mut source, 10 * MIB, &mut Random(2)).await;
        let log = lab.replica();
        eventually("it is full", || source.ack().is_some_and(|ack| ack.flags.full)).await;
        let taken = log.journal().bytes();
        assert!((3 * MIB as u64..=4 * MIB as u64).contains(&taken), "{taken} bytes of 4 MiB");
        let young = |heard: &common::source::Heard| {
            heard.notices.iter().any(|notice| notice.sentence.contains("younger than window_min"))
        };
        eventually("it is said why", || source.heard(young)).await;
        let exact = log.journal().segments().iter().map(|s| s.summary().data_bytes).sum::<u64>();
        assert_eq!(log.journal().bytes(), exact, "what is counted is what there is");
        source.acknowledged().await;
        equals_the_model(&lab, &source).await;
    });
}

/// A stop ends the log while it waits for room, which is not what a log fails of.
#[test]
fn a_full_log_is_stopped_without_having_failed() {
    run(async || {
        let mut lab = Lab::new(SMALL, "size_max = \"4 MiB\"");
        let mut source = Source::new(&[16 * MIB]);
        source.connect(&lab).await;
        source.gap_begin(0, GapReason::FirstSync);
        source.gap_end(0);
        pour(&mut source, 10 * MIB, &mut Random(3)).await;
        let log = lab.replica();
        eventually("it is full", || log.journal().progress().stalled.is_some()).await;
        lab.stop();
        assert_eq!(log.journal().progress().failed, None);
    });
}
