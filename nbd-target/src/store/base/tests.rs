use std::{fs, os::unix::fs::FileExt, path::Path};

use super::{
    apply::{Change, NewContent},
    *,
};

const GROUP: GroupId = GroupId([2; 16]);
const VOLUME: VolumeId = VolumeId(3);
type Rows = BTreeMap<VolumeId, BaseRow>;

fn change(base: &Base, first: u64, content: NewContent) {
    let mut damage = Vec::new();
    base.apply(&Change { volume: VOLUME, first, content }, &mut damage).expect("applied");
    assert_eq!(damage, Vec::<String>::new());
}

fn data(blocks: u64, byte: u8) -> NewContent {
    NewContent::Data(vec![byte; (blocks * BLOCK_BYTES) as usize])
}

fn commit(base: &Base, rows: &mut Rows) {
    let changed = base.finish().expect("durable");
    rows.extend(&changed);
    base.committed(&changed);
}

/// A base of 200 blocks: the second half of it is ones, the rest was never written.
fn make(dir: &Path, group: GroupId) -> (Base, Rows) {
    let mut rows = Rows::new();
    let (base, damage) = Base::open(&Machine::Real, dir, group, &rows).expect("opened");
    assert_eq!(damage, Vec::<String>::new());
    change(&base, 100, data(100, 1));
    commit(&base, &mut rows);
    (base, rows)
}

/// A block's first byte, after all of it was checked.
fn block(base: &Base, number: u64) -> Result<Option<u8>, ReadError> {
    let (block, unknown) = base.block(VOLUME, number)?;
    assert_eq!(block, vec![block[0]; BLOCK_BYTES as usize]);
    assert!(unknown == Unknown::NONE || unknown == Unknown::ALL, "{unknown:?}");
    Ok((unknown == Unknown::NONE).then_some(block[0]))
}

fn is_damaged(base: &Base, number: u64) {
    let read = block(base, number);
    assert!(matches!(read, Err(ReadError::Damaged(_))), "block {number}: {read:?}");
}

#[test]
fn what_is_durable_is_read_again() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let (base, mut rows) = make(dir.path(), GROUP);
    change(&base, 150, NewContent::Zeros(10));
    change(&base, 160, NewContent::Unreadable(1));
    // Beyond the first stretch of the file.
    change(&base, 300_000, data(1, 5));
    commit(&base, &mut rows);
    let row = BaseRow { generation: 2, blocks: 300_001 };
    assert_eq!(rows, Rows::from([(VOLUME, row)]));
    drop(base);
    let (base, damage) = Base::open(&Machine::Real, dir.path(), GROUP, &rows).expect("opened");
    assert_eq!(damage, Vec::<String>::new());
    let read = |number| block(&base, number).expect("good");
    let expected = [(0, 0), (99, 0), (100, 1), (149, 1), (150, 0), (159, 0), (161, 1), (199, 1)];
    for (number, byte) in expected {
        assert_eq!(read(number), Some(byte), "block {number}");
    }
    assert_eq!((read(160), read(300_000), read(300_001)), (None, Some(5), Some(0)));
    let zeros: Vec<(u64, u64)> = base
        .stretches(VOLUME, 0, 300_100 * BLOCK_SECTORS)
        .expect("known")
        .iter()
        .filter(|stretch| stretch.zeros)
        .map(|stretch| (stretch.start / BLOCK_SECTORS, stretch.end / BLOCK_SECTORS))
        .collect();
    assert_eq!(zeros, [(0, 100), (150, 160), (200, 300_000), (300_001, 300_100)]);
}

/// What befalls the files, and the blocks that are damage then. Nothing else may be read wrongly.
#[test]
fn loss_is_never_read_as_zeros() {
    let other = tempfile::TempDir::new().expect("a directory");
    make(other.path(), GroupId([9; 16]));
    let older = tempfile::TempDir::new().expect("a directory");
    make(older.path(), GROUP);
    let copy = |from: &Path, to: &Path| {
        for name in ["00003.data", "00003.sums"] {
            fs::copy(from.join(name), to.join(name)).expect("copied");
        }
    };
    let all = 0..400;
    let (cut, page) = (50 * BLOCK_BYTES, sums::unit_sector(2) * sums::SECTOR as u64);
    type Befall<'a> = Box<dyn Fn(&Path) + 'a>;
    let set_len = |name: &'static str, bytes| -> Befall<'_> {
        Box::new(move |dir| {
            fs::OpenOptions::new()
                .write(true)
                .open(dir.join(name))
                .and_then(|file| file.set_len(bytes))
                .expect("cut");
        })
    };
    let hole = |at: u64| -> Befall<'_> {
        Box::new(move |dir| {
            let file = fs::OpenOptions::new().write(true).open(dir.join("00003.sums"));
            file.and_then(|file| file.write_all_at(&[0; 512], at)).expect("zeroed");
        })
    };
    let remove = |name: &'static str| -> Befall<'_> {
        Box::new(move |dir| fs::remove_file(dir.join(name)).expect("removed"))
    };
    let cases: Vec<(&str, &str, Befall<'_>, std::ops::Range<u64>)> = vec![
        ("no data", "missing", remove("00003.data"), all.clone()),
        ("no sums", "missing", remove("00003.sums"), all.clone()),
        ("empty sums", "header", set_len("00003.sums", 0), all.clone()),
        ("no header", "header", hole(0), all.clone()),
        ("short data", "cut short", set_len("00003.data", cut), 100..200),
        ("short sums", "cut short", set_len("00003.sums", page), 126..200),
        ("a hole in the sums", "", hole(page), 126..189),
        ("a hole in the map", "map 0", hole(sums::map_sector(0) * 512), 0..0),
        ("another group's", "another", Box::new(|dir| copy(other.path(), dir)), all.clone()),
        ("an older copy", "generation 1", Box::new(|dir| copy(older.path(), dir)), all),
    ];
    for (name, says, befall, lost) in cases {
        let dir = tempfile::TempDir::new().expect("a directory");
        let (base, mut rows) = make(dir.path(), GROUP);
        // So that the copy made before is older.
        for byte in [2, 1] {
            change(&base, 100, data(1, byte));
            commit(&base, &mut rows);
        }
        drop(base);
        befall(dir.path());
        let (base, damage) = Base::open(&Machine::Real, dir.path(), GROUP, &rows).expect("opened");
        let said = damage.iter().any(|sentence| sentence.contains(says));
        let another = says == "another" && damage.iter().any(|text| text.contains("of the group"));
        assert!(said || another || says.is_empty(), "{name}: {damage:?}");
        for number in (0..200).filter(|number| lost.contains(number)) {
            is_damaged(&base, number);
        }
        for number in (100..200).filter(|number| !lost.contains(number)) {
            assert_eq!(block(&base, number).expect("good"), Some(1), "{name}, block {number}");
        }
        for number in (0..100).filter(|number| !lost.contains(number)) {
            // Never written: zeros, or not known any more, but nothing else.
            match block(&base, number) {
                Ok(read) => assert_eq!(read, Some(0), "{name}, block {number}"),
                Err(error) => assert!(matches!(error, ReadError::Damaged(_)), "{name}: {error}"),
            }
        }
        if lost.end == 400 {
            assert!(base.stretches(VOLUME, 0, 1600).is_err(), "{name}: not zeros either");
        }
    }
}

/// What is folded in after a loss is known, and nothing else, until all of it was.
#[test]
fn a_lost_volume_is_begun_anew_as_unknown() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let (base, mut rows) = make(dir.path(), GROUP);
    drop(base);
    fs::remove_file(dir.path().join("00003.sums")).expect("removed");
    let (base, _) = Base::open(&Machine::Real, dir.path(), GROUP, &rows).expect("opened");
    change(&base, 10, data(2, 7));
    change(&base, 63, NewContent::Zeros(63));
    let check = |base: &Base| {
        assert_eq!(block(base, 9).expect("read"), None);
        assert_eq!(block(base, 10).expect("read"), Some(7));
        assert_eq!(block(base, 12).expect("read"), None);
        assert_eq!(block(base, 63).expect("read"), Some(0));
        assert_eq!(block(base, 126).expect("read"), None);
        assert_eq!(block(base, 199).expect("read"), None);
    };
    check(&base);
    // The power fails before the catalogue knows: what was folded in is still in the log.
    base.finish().expect("durable");
    drop(base);
    let (base, damage) = Base::open(&Machine::Real, dir.path(), GROUP, &rows).expect("opened");
    assert!(damage.iter().any(|sentence| sentence.contains("parts are unknown")), "{damage:?}");
    change(&base, 10, data(2, 7));
    change(&base, 63, NewContent::Zeros(63));
    commit(&base, &mut rows);
    check(&base);
    assert_eq!(rows[&VOLUME].generation, 2);
    // The old content is kept: it may be somebody's.
    assert!(dir.path().join("00003.data.damaged").exists());
    change(&base, 0, data(200, 8));
    commit(&base, &mut rows);
    drop(base);
    let (base, damage) = Base::open(&Machine::Real, dir.path(), GROUP, &rows).expect("opened");
    assert_eq!(damage, Vec::<String>::new());
    assert_eq!(block(&base, 150).expect("read"), Some(8));
}

/// Sums are changed in place, and a unit that is new counts only with its map: a crash before that
/// leaves what the catalogue's row says.
#[test]
fn what_was_not_finished_does_not_count() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let (base, rows) = make(dir.path(), GROUP);
    change(&base, 0, data(1, 9));
    change(&base, 900_000, data(1, 9));
    drop(base);
    let (base, damage) = Base::open(&Machine::Real, dir.path(), GROUP, &rows).expect("opened");
    assert_eq!(damage, Vec::<String>::new());
    for (number, byte) in [(0, 0), (900_000, 0), (100, 1)] {
        assert_eq!(block(&base, number).expect("good"), Some(byte), "block {number}");
    }
}

/// Sums that are damaged are unknown once blocks beside them change, and that is said.
#[test]
fn damaged_sums_become_unknown_when_a_block_beside_them_changes() {
    let dir = tempfile::TempDir::new().expect("a directory");
    let (base, _) = make(dir.path(), GROUP);
    let file = fs::OpenOptions::new().write(true).open(dir.path().join("00003.sums"));
    let at = sums::unit_sector(2) * sums::SECTOR as u64;
    file.and_then(|file| file.write_all_at(&[1; 8], at)).expect("damaged");
    is_damaged(&base, 130);
    let mut damage = Vec::new();
    let change = Change { volume: VOLUME, first: 130, content: data(1, 4) };
    base.apply(&change, &mut damage).expect("applied");
    assert!(damage.len() == 1 && damage[0].contains("126..189"), "{damage:?}");
    assert_eq!(block(&base, 130).expect("good"), Some(4));
    assert_eq!(block(&base, 131).expect("read"), None);
    assert_eq!(block(&base, 125).expect("good"), Some(1));
}

/// What the list of damage is made of: the same as a read of each block says, and of what was never
/// written without looking at each.
#[test]
fn what_is_bad_is_what_a_read_does_not_give() {
    const SECTORS: u64 = 300 * BLOCK_SECTORS;
    let dir = tempfile::TempDir::new().expect("a directory");
    let (base, mut rows) = make(dir.path(), GROUP);
    change(&base, 160, NewContent::Unreadable(1));
    let mut part = vec![7; BLOCK_BYTES as usize];
    part[512..1024].fill(0);
    change(&base, 170, NewContent::Parts(part, Unknown::of(1..2)));
    commit(&base, &mut rows);
    let data = fs::File::options().write(true).open(dir.path().join("00003.data"));
    data.and_then(|file| file.write_all_at(b"rot", 120 * BLOCK_BYTES)).expect("damaged");
    let sectors = |block: u64| (block * BLOCK_SECTORS, (block + 1) * BLOCK_SECTORS);
    assert_eq!(base.bad(VOLUME, 0, SECTORS), [120, 160, 170].map(sectors));
    let unknown = 170 * BLOCK_SECTORS + 1;
    assert_eq!(base.bad(VOLUME, unknown, unknown + 1), [(unknown, unknown + 1)]);
    assert_eq!(base.bad(VOLUME, unknown + 1, SECTORS), []);
    assert_eq!(base.bad(VolumeId(9), 0, SECTORS), [], "never written");

    base.lose([VOLUME]).expect("made anew");
    change(&base, 100, NewContent::Data(vec![1; 2 * BLOCK_BYTES as usize]));
    assert_eq!(base.bad(VOLUME, 3, SECTORS), [(3, 800), (816, SECTORS)]);
    let mut out = [0; 512];
    for (start, end) in (0..SECTORS).map(|sector| (sector, sector + 1)) {
        let is_bad = !base.bad(VOLUME, start, end).is_empty();
        out.fill(0);
        assert_eq!(base.read(VOLUME, start, end, &mut out).is_err(), is_bad, "sector {start}");
    }
}
