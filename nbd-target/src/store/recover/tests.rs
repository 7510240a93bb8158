use std::{fs, path::PathBuf};

use tempfile::TempDir;
use tidemark_journal::{
    Compression, FrameBuilder, FrameMeta, Kind, Record, Sector, TermId, VolumeId,
};

use super::*;

const GROUP: GroupId = GroupId([2; 16]);
const LAST: Seq = Seq(7);

struct Nobody;

impl Follower for Nobody {
    fn stored(&self, _frame: &FrameView<'_>) {}

    fn sealed(&self, _segment: &Segment, _end: &SegmentEnd) -> anyhow::Result<()> {
        Ok(())
    }
}

/// What is damaged of the only segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Harm {
    None,
    /// A bit of the header.
    Header,
    /// The header is zeros.
    NoHeader,
    /// A bit of the only frame.
    Frame,
    /// A bit of both.
    Both,
    /// A bit of the header, and the frame is zeros.
    HeaderAndNoFrame,
    /// Nothing but zeros is there.
    All,
}

/// A log of one segment with one frame that ends at `LAST`, and room for more.
fn log(harm: Harm) -> (TempDir, PathBuf) {
    let dir = TempDir::new().expect("a directory");
    let before = Position::default();
    let start =
        SegmentStart { number: 0, group: GROUP, before, created_ns: 0, chain_before: [0; 32] };
    let mut builder = FrameBuilder::new(Compression::Off);
    let (kind, volume) = (Kind::Write, VolumeId(0));
    let (start_at, sectors) = (Sector(0), 8);
    let record = Record { kind, flags: 0, volume, seq: LAST, time_ns: 0, start: start_at, sectors };
    builder.push(&record, [[5; 4096].as_slice()]);
    let meta = FrameMeta { group: GROUP, term: TermId([1; 16]), before, wall_ns: 0 };
    let frame = builder.finish(&meta);
    let mut file = start.encode();
    file.extend_from_slice(&frame.to_vec());
    let (head, frame_end) = (20, file.len() - 100);
    file.resize(64 << 10, 0);
    match harm {
        Harm::None => {}
        Harm::Header => file[head] ^= 1,
        Harm::NoHeader => file[..BLOCK_BYTES as usize].fill(0),
        Harm::Frame => file[frame_end] ^= 1,
        Harm::Both => [head, frame_end].into_iter().for_each(|at| file[at] ^= 1),
        Harm::HeaderAndNoFrame => {
            file[head] ^= 1;
            file[BLOCK_BYTES as usize..].fill(0);
        }
        Harm::All => file.fill(0),
    }
    let path = dir.path().join(file_name(0));
    fs::write(&path, file).expect("written");
    (dir, path)
}

fn recovered(dir: &Path, acked: Seq) -> Recovered {
    let caches = Caches::new(8, 8);
    let options = LogOptions {
        segment_bytes: 64 << 10,
        entries_max: 1000,
        sync_batches: true,
        bytes_max: None,
    };
    let (known, before) = (BTreeMap::new(), Position::default());
    let expected =
        Expected { group: GROUP, first: 0, known: &known, before, acked, received_ns: 0 };
    recover(dir, &caches, &options, &expected, &Nobody).expect("recovered")
}

/// A segment of one batch of which nothing good is left was removed, whatever had been acknowledged.
#[test]
fn a_first_batch_that_was_acknowledged_is_never_removed() {
    let harms = [Harm::Header, Harm::NoHeader, Harm::Frame, Harm::Both, Harm::HeaderAndNoFrame];
    for harm in harms {
        let (dir, path) = log(harm);
        let was = fs::read(&path).expect("read");
        let found = recovered(dir.path(), LAST);
        let kept = fs::read(path.with_extension("damaged-0"));
        assert_eq!(kept.expect("it is kept"), was, "{harm:?}");
        assert_eq!((path.exists(), found.segments.len()), (false, 0), "{harm:?}");
        assert_eq!(found.end, Position::default(), "{harm:?}");
        let [said] = &found.damage[..] else { panic!("{harm:?}: {:?}", found.damage) };
        assert!(said.contains("below what was acknowledged"), "{said}");
    }
    // What a crash leaves of a batch that was on its way: not so much as that is damage.
    for harm in [Harm::NoHeader, Harm::Frame, Harm::All] {
        let (dir, path) = log(harm);
        let found = recovered(dir.path(), Seq::ZERO);
        assert_eq!(found.damage, Vec::<String>::new(), "{harm:?}");
        assert_eq!((path.exists(), fs::read_dir(dir.path()).expect("read").count()), (false, 0));
    }
    let (dir, path) = log(Harm::None);
    let found = recovered(dir.path(), LAST);
    assert_eq!((found.end.seq, found.damage.len(), path.exists()), (LAST, 0, true));
}

/// The catalogue is a second behind what was acknowledged: a header that is neither whole nor zeros is
/// damage if there is a frame behind it, since no crash leaves half a sector.
#[test]
fn a_rotten_header_before_a_whole_frame_is_damage() {
    let (dir, path) = log(Harm::Header);
    let found = recovered(dir.path(), Seq::ZERO);
    assert!(path.with_extension("damaged-0").exists());
    assert_eq!(found.damage.len(), 1, "{:?}", found.damage);
}

/// So is a segment with nothing in it that a later one follows.
#[test]
fn a_segment_that_another_follows_held_something() {
    let (dir, path) = log(Harm::Frame);
    let before = Position { term: TermId([1; 16]), seq: LAST };
    let start =
        SegmentStart { number: 1, group: GROUP, before, created_ns: 0, chain_before: [0; 32] };
    let next = dir.path().join(file_name(1));
    fs::write(&next, start.encode()).expect("written");
    let found = recovered(dir.path(), Seq::ZERO);
    for path in [path, next] {
        assert!(path.with_extension("damaged-0").exists(), "{}", path.display());
    }
    assert_eq!(found.damage.len(), 2, "{:?}", found.damage);
}
