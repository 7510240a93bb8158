//! Bit rot: what was written and has changed since is found, never served, and mended where it can be.

mod common;

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use common::{
    Lab, eventually,
    model::{Random, difference},
    run,
    source::Source,
};
use tidemark_control::target::ZeroLoss;
use tidemark_journal::{FrameView, GapReason, Seq, VolumeId, segment};
use tidemark_link::{
    lease::LEASE,
    message::{LeaseGrant, Message, REPAIR_FEATURE, RegionRun, SYNC_FEATURE},
};
use tidemark_target::{damage::Place, lease, points::whole, replica::Replica};

const MIB: usize = 1 << 20;
/// Bytes and sectors of a write in these tests: one chunk.
const WRITE: usize = 64 << 10;
const SECTORS: u64 = WRITE as u64 / 512;

/// Writes `places` in turn, each in a frame of its own; the sequence of each.
async fn write(source: &mut Source, random: &mut Random, places: &[u64]) -> Vec<Seq> {
    let mut seqs = Vec::new();
    for place in places {
        let content: Vec<u8> = (0..WRITE).map(|_| random.next() as u8).collect();
        seqs.push(source.write(0, place * SECTORS, &content));
        source.send().await;
    }
    source.acknowledged().await;
    seqs
}

/// A volume of 4 MiB of which 40 places were written, in segments of 1 MiB.
async fn filled(lab: &Lab, random: &mut Random) -> (Source, Vec<Seq>) {
    let mut source = Source::new(&[4 * MIB]);
    source.connect(lab).await;
    source.gap_begin(0, GapReason::FirstSync);
    source.gap_end(0);
    source.send().await;
    let seqs = write(&mut source, random, &(0..40).collect::<Vec<_>>()).await;
    eventually("it is sealed", || lab.replica().journal().segments()[0].is_sealed()).await;
    (source, seqs)
}

fn first_segment(lab: &Lab) -> PathBuf {
    lab.log_dir().join("0000000000000000.seg")
}

/// The frames of a segment file: offset and length.
fn frames(path: &Path) -> Vec<(u64, usize)> {
    let bytes = std::fs::read(path).expect("read");
    let frames = segment::frames(&bytes);
    let place = |view: FrameView<'_>| view.bytes().len();
    frames.map_while(|(at, frame)| Some((at, place(frame.ok()?)))).collect()
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 0x40], at).expect("written");
    file.sync_all().expect("synced");
}

/// Has everything read and checked.
async fn scrub(lab: &Lab) {
    let (scrubs, replica) = (lab.target().scrubs(), lab.replica());
    let before = scrubs.row(&replica).finished_wall_ns;
    scrubs.start("shop");
    eventually("the scrub ends", || scrubs.row(&replica).finished_wall_ns != before).await;
}

fn places(lab: &Lab) -> Vec<Place> {
    lab.replica().damages().list().iter().map(|spot| spot.place).collect()
}

/// Reads all of the volume at a position, a write at a time: the places that fail. The others must
/// be right.
async fn failing(lab: &Lab, source: &Source, seq: Seq) -> Vec<usize> {
    let client = lab.open(&format!("shop/disk0@seq:{seq}")).await.expect("it opens");
    let model = source.model.at(VolumeId(0), seq);
    let mut failing = Vec::new();
    for (place, expected) in model.chunks(WRITE).enumerate() {
        match client.read((place * WRITE) as u64, WRITE as u32).await {
            Ok(read) => assert_eq!(difference(&read, expected), None, "{place} at {seq}"),
            Err(_) => failing.push(place),
        }
    }
    failing
}

#[test]
fn each_place_of_a_segment_is_found_and_nothing_wrong_is_served() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"\nchunk_cache = \"128 KiB\"", "");
        let (mut source, seqs) = filled(&lab, &mut Random(5)).await;
        let last = source.before.seq;
        scrub(&lab).await;
        assert_eq!(places(&lab), []);
        source.disconnect();
        lab.stop();
        let path = first_segment(&lab);
        let whole = std::fs::read(&path).expect("read");
        let (at, bytes) = frames(&path)[4];
        let index_at =
            frames(&path).last().map(|(at, bytes)| (at + *bytes as u64).div_ceil(4096) * 4096);
        let index_at = index_at.expect("frames");
        let end_at = whole.len() as u64 - 4096;
        let segment = 0;
        let frame = Place::Frame { segment, at };
        let chunk = Place::Chunk { segment, chunk: 3 };
        // What is flipped, what is found, and whether some of the content is gone.
        let cases = [
            (20, vec![Place::Header { segment }], false),
            (at + 40, vec![frame], false),
            (at + 192 + 8, vec![frame], false),
            (at + bytes as u64 - 100, vec![chunk], true),
            (index_at + 100, vec![], false),
            (end_at - 4096 + 30, vec![], false),
            (end_at + 40, vec![], false),
        ];
        let mut mended = 0;
        for (place, expected, gone) in cases {
            std::fs::write(&path, &whole).expect("written");
            flip(&path, place);
            lab.start();
            scrub(&lab).await;
            assert_eq!(places(&lab), expected, "byte {place}");
            let failing = failing(&lab, &source, last).await;
            assert_eq!(failing, if gone { vec![3] } else { vec![] }, "byte {place}");
            let row = lab.target().scrubs().row(&lab.replica());
            assert_eq!(row.finished_found, expected.len() as u64, "byte {place}");
            if expected.is_empty() {
                assert_eq!(row.mended_total, mended + 1, "byte {place}");
                mended += 1;
                assert_eq!(std::fs::read(&path).expect("read"), whole, "as it was");
            }
            // The list outlives a restart; what is whole again leaves it with the next pass.
            lab.restart();
            assert_eq!(places(&lab), expected, "byte {place}");
            if gone {
                // The last position without it, and the first with it.
                let before = Seq(seqs[3].0 - 1);
                assert_eq!(self::failing(&lab, &source, before).await, Vec::<usize>::new());
                assert_eq!(whole::missing_at(&lab.replica(), None, before), None);
                let told = whole::missing_at(&lab.replica(), None, seqs[3]).expect("told");
                assert_eq!(told, "64 KiB of shop/disk0");
                assert_eq!(lab.replica().damages().regions(), [(VolumeId(0), 0, 1)]);
            }
            lab.stop();
        }
        std::fs::write(&path, &whole).expect("written");
        lab.start();
        scrub(&lab).await;
        assert_eq!(places(&lab), []);
        assert_eq!(failing(&lab, &source, last).await, Vec::<usize>::new());
    });
}

#[test]
fn only_the_points_that_need_it_are_damaged_and_a_source_that_lives_mends_the_newest() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"\nchunk_cache = \"128 KiB\"", "");
        let mut random = Random(6);
        let (mut source, seqs) = filled(&lab, &mut random).await;
        source.features = vec![REPAIR_FEATURE.to_owned()];
        source.disconnect();
        lab.stop();
        let path = first_segment(&lab);
        let (at, bytes) = frames(&path)[4];
        flip(&path, at + bytes as u64 - 100);
        lab.start();
        // A read that meets it is enough; no scrub has to come by.
        assert_eq!(failing(&lab, &source, source.before.seq).await, [3]);
        eventually("it is listed", || places(&lab).len() == 1).await;
        let replica = lab.replica();
        let scope = replica
            .ledger()
            .history(|history| tidemark_target::points::resolve::Scope::of(history, "shop", None));
        let scope = scope.expect("the whole group");
        let newest = |end| whole::newest(&replica, &scope, end);
        let end = source.before.seq;
        assert_eq!(newest(end), Some(Seq(seqs[3].0 - 1)), "it avoids the damage");
        let problems = whole::problems(&replica);
        assert!(problems[0].contains("64 KiB of shop/disk0"), "{problems:?}");
        // The source is told which region, and sends it.
        let welcome = source.connect(&lab).await;
        assert_eq!(welcome.features, [REPAIR_FEATURE]);
        let region = RegionRun { volume: VolumeId(0), first: 0, regions: 1 };
        eventually("it is asked", || source.heard(|heard| heard.repairs == [region])).await;
        let again = write(&mut source, &mut random, &[3]).await[0];
        eventually("it is mended", || {
            replica.damages().stretches().iter().all(|stretch| stretch.until == Some(again))
        })
        .await;
        assert_eq!(failing(&lab, &source, again).await, Vec::<usize>::new());
        assert_eq!(newest(again), Some(again));
        assert_eq!(whole::problems(&replica), Vec::<String>::new());
        // Older points are as they were: not served wrong, and told.
        assert_eq!(failing(&lab, &source, Seq(again.0 - 1)).await, [3]);
        assert!(whole::missing_at(&replica, Some("disk0"), Seq(again.0 - 1)).is_some());
        let damaged = whole::damaged(&replica);
        assert_eq!(damaged[0].last_seq, Some(Seq(again.0 - 1)));
        assert_eq!(damaged[0].first_seq, seqs[3]);
        assert_eq!(source.heard(|heard| heard.repairs.len()), 1, "asked for once");
        source.disconnect();
    });
}

#[test]
fn nothing_is_claimed_while_the_newest_point_is_damaged() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"", "");
        let mut random = Random(5);
        let (mut source, _) = filled(&lab, &mut random).await;
        source.disconnect();
        lab.stop();
        let path = first_segment(&lab);
        let (at, bytes) = frames(&path)[4];
        flip(&path, at + bytes as u64 - 100);
        lab.start();
        source.features = vec![SYNC_FEATURE.to_owned()];
        assert_eq!(source.connect(&lab).await.features, [SYNC_FEATURE]);
        async fn granted(source: &mut Source, replica: &Replica, wanted: ZeroLoss) {
            eventually("it is asked", || source.heard(|heard| heard.lease_ask > 0)).await;
            let number = source.heard(|heard| heard.lease_ask);
            source.say(&Message::LeaseGrant(LeaseGrant { number, lease: LEASE })).await;
            eventually("it is taken in", || lease::look(replica) == Some(wanted)).await;
        }
        let replica = lab.replica();
        granted(&mut source, &replica, ZeroLoss::Held).await;
        scrub(&lab).await;
        assert_eq!(lease::look(&replica), Some(ZeroLoss::None));
        let again = write(&mut source, &mut random, &[3]).await[0];
        eventually("it is mended", || {
            replica.damages().stretches().iter().all(|stretch| stretch.until == Some(again))
        })
        .await;
        granted(&mut source, &replica, ZeroLoss::Held).await;
        source.disconnect();
    });
}

#[test]
fn an_older_source_is_not_asked() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"", "");
        let (mut source, _) = filled(&lab, &mut Random(7)).await;
        source.disconnect();
        lab.stop();
        let path = first_segment(&lab);
        let (at, bytes) = frames(&path)[4];
        flip(&path, at + bytes as u64 - 100);
        lab.start();
        scrub(&lab).await;
        assert_eq!(places(&lab).len(), 1);
        let welcome = source.connect(&lab).await;
        assert!(welcome.features.is_empty());
        write(&mut source, &mut Random(8), &[9]).await;
        source.heard(|heard| assert!(heard.repairs.is_empty() && heard.end.is_none()));
        source.disconnect();
    });
}

/// Most of it is folded into the base.
async fn folded(lab: &Lab, random: &mut Random) -> Source {
    let mut source = filled(lab, random).await.0;
    let all: Vec<u64> = (0..64).chain(0..40).collect();
    write(&mut source, random, &all).await;
    let replica = lab.replica();
    eventually("some is folded", || replica.ledger().row().first_segment > 2).await;
    eventually("it is small", || replica.journal().bytes() <= 4 * MIB as u64).await;
    source
}

#[test]
fn rot_in_the_base_is_found() {
    run(async || {
        let more = "window_min = 0\nsize_max = \"4 MiB\"";
        let mut lab = Lab::new("segment = \"1 MiB\"", more);
        let mut source = folded(&lab, &mut Random(9)).await;
        let last = source.before.seq;
        scrub(&lab).await;
        assert_eq!(places(&lab), []);
        source.disconnect();
        lab.stop();
        // The newest of these places is in the base: they were not written again.
        let base = lab.config.data_dir.join("groups/shop/base");
        let (data, sums) = (base.join("00000.data"), base.join("00000.sums"));
        let block = 45 * WRITE as u64 / 4096;
        flip(&data, block * 4096 + 77);
        lab.start();
        let fails = failing(&lab, &source, last).await;
        assert!(fails.is_empty() || fails == [45], "{fails:?}");
        scrub(&lab).await;
        let expected = Place::Base { volume: VolumeId(0), first: block, blocks: 1 };
        assert_eq!(places(&lab), [expected]);
        let oldest = lab.replica().ledger().history(|history| history.oldest);
        assert_eq!(
            whole::missing_at(&lab.replica(), None, oldest).as_deref(),
            Some("4 KiB of shop/disk0")
        );
        lab.stop();
        flip(&data, block * 4096 + 77);
        // Sums of 63 blocks: none of them can be trusted.
        let unit = block / 63;
        flip(&sums, (8 + 1 + unit) * 512 + 9);
        lab.start();
        scrub(&lab).await;
        let expected = Place::Base { volume: VolumeId(0), first: unit * 63, blocks: 63 };
        assert_eq!(places(&lab), [expected]);
        // Nothing wrong is served.
        failing(&lab, &source, last).await;
        lab.stop();
        flip(&sums, (8 + 1 + unit) * 512 + 9);
        // A map, and the header, while the target has them in memory: they are written again.
        lab.start();
        let (map, header) = (8 * 512 + 1, 17);
        flip(&sums, map);
        flip(&sums, header);
        scrub(&lab).await;
        assert_eq!(places(&lab), []);
        lab.restart();
        assert_eq!(lab.replica().notices(), Vec::<String>::new());
        assert_eq!(failing(&lab, &source, last).await, Vec::<usize>::new());
    });
}

/// Damages what a sealed segment has after its frames, but for its last page.
fn damage_index(path: &Path) {
    let whole = std::fs::metadata(path).expect("there").len();
    for page in (0..whole - 4096).rev().step_by(4096).take(3) {
        flip(path, page);
    }
}

/// Writes some places again and again until the first segments are folded; the last sequence.
async fn fold_first(lab: &Lab, source: &mut Source, random: &mut Random) -> Seq {
    let all: Vec<u64> = (30..64).chain(30..60).chain(30..60).collect();
    write(source, random, &all).await;
    let replica = lab.replica();
    eventually("it is folded", || replica.ledger().row().first_segment > 1).await;
    source.before.seq
}

/// Once, a damaged index made folding fail again and again, until the log was full.
#[test]
fn a_segment_with_a_damaged_index_is_folded_by_its_frames() {
    run(async || {
        let more = "window_min = 0\nsize_max = \"4 MiB\"";
        let lab = Lab::new("segment = \"1 MiB\"", more);
        let mut random = Random(10);
        let mut source = filled(&lab, &mut random).await.0;
        damage_index(&first_segment(&lab));
        let last = fold_first(&lab, &mut source, &mut random).await;
        assert_eq!(failing(&lab, &source, last).await, Vec::<usize>::new());
        scrub(&lab).await;
        assert_eq!(places(&lab), []);
        source.disconnect();
    });
}

/// With a frame's meta damaged too, nobody knows what it changed.
#[test]
fn what_a_lost_frame_may_have_changed_is_unknown() {
    run(async || {
        let more = "window_min = 0\nsize_max = \"4 MiB\"";
        let lab = Lab::new("segment = \"1 MiB\"", more);
        let mut random = Random(11);
        let mut source = filled(&lab, &mut random).await.0;
        let path = first_segment(&lab);
        let (at, _) = frames(&path)[4];
        flip(&path, at + 200);
        damage_index(&path);
        let last = fold_first(&lab, &mut source, &mut random).await;
        let replica = lab.replica();
        let fails = failing(&lab, &source, last).await;
        assert!(fails.contains(&3), "what it had: {fails:?}");
        assert!(fails.contains(&2), "and what it may have had: {fails:?}");
        assert!(fails.iter().all(|place| *place < 30), "newer content is right: {fails:?}");
        eventually("it is listed", || !places(&lab).is_empty()).await;
        let (missing, end) = (whole::missing_at(&replica, None, last), last);
        assert!(missing.is_some(), "at {end}");
        // The source sends it again, and all is well at the newest point.
        write(&mut source, &mut random, &(0..64).collect::<Vec<_>>()).await;
        let last = source.before.seq;
        assert_eq!(failing(&lab, &source, last).await, Vec::<usize>::new());
        eventually("it is seen", || whole::missing_at(&replica, None, last).is_none()).await;
        source.disconnect();
    });
}

#[test]
fn a_pass_goes_on_after_a_restart() {
    run(async || {
        let mut lab = Lab::new("segment = \"1 MiB\"", "");
        lab.config.scrub.bytes_per_s.0 = 1 << 20;
        lab.restart();
        let (mut source, _) = filled(&lab, &mut Random(12)).await;
        source.disconnect();
        lab.target().scrubs().start("shop");
        let bytes = |lab: &Lab| {
            let row = lab.target().scrubs().row(&lab.replica());
            row.pass.map(|pass| pass.bytes)
        };
        eventually("it is under way", || bytes(&lab).is_some_and(|bytes| bytes > 0)).await;
        let started = lab.target().scrubs().row(&lab.replica()).pass.map(|p| p.started_wall_ns);
        lab.restart();
        let pass = lab.target().scrubs().row(&lab.replica()).pass.expect("still under way");
        assert_eq!(Some(pass.started_wall_ns), started);
        eventually("it ends", || lab.target().scrubs().row(&lab.replica()).finished_wall_ns > 0)
            .await;
    });
}
