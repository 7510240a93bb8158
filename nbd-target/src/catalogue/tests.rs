//! Rotted catalogues: a row is right, restored, or refused, and never taken for absent.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
};

use tempfile::TempDir;
use tidemark_journal::{Term, TermId};
use tidemark_simdisk::{Op, SimDisk, errno};

use super::*;
use crate::machine::{How, simulated::Simulated};

const NAMES: [&str; 3] = ["one", "three", "two"];

pub(super) fn open(path: &Path) -> anyhow::Result<Catalogue> {
    let reserve = Reserve::new(&Machine::Real, path.parent().expect("a directory"), 0);
    Catalogue::open(&Machine::Real, path, &Arc::new(reserve))
}

impl Catalogue {
    /// Makes a branch's row something that was never written.
    pub(crate) fn spoil_branch(&self, group: &str, name: &str) {
        let row = b"never written".as_slice();
        let spoil = |tx: &WriteTransaction| {
            tx.open_table(BRANCHES)?.insert((group, name), row)?;
            Ok(())
        };
        self.write(spoil).expect("written");
    }
}

/// A catalogue with a group and three branches; where it is, and what is in it.
fn filled(dir: &TempDir) -> (PathBuf, BTreeMap<String, BranchRow>) {
    let path = dir.path().join("catalogue.redb");
    let catalogue = open(&path).expect("made");
    assert_eq!(catalogue.damage(), [""; 0]);
    let row = GroupRow {
        id: GroupId([7; 16]),
        node: "db1".to_owned(),
        ancestry: Ancestry::root(TermId([1; 16])),
        created_ns: 5,
    };
    catalogue.put_group("shop", &row, &HistoryRow::default()).expect("kept");
    for (number, name) in NAMES.into_iter().enumerate() {
        let branch = BranchRow {
            term: Term {
                id: TermId([2; 16]),
                parent: TermId([1; 16]),
                fork_seq: tidemark_journal::Seq(number as u64),
            },
            volume: None,
            point: "latest".to_owned(),
            temporary: false,
            damage: None,
            created_ns: 6,
        };
        catalogue.put_branch("shop", name, &branch).expect("kept");
    }
    let rows = catalogue.branches("shop").expect("read");
    assert_eq!(rows.keys().collect::<Vec<_>>(), NAMES.iter().collect::<Vec<_>>());
    assert!(catalogue.verify().expect("all is well") >= 5);
    (path, rows)
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("written");
}

/// Once, one flipped bit took a branch away in silence: its key's page no longer held it.
#[test]
fn no_flipped_bit_takes_a_row_away() {
    let dir = TempDir::new().expect("a directory");
    let (path, rows) = filled(&dir);
    let copy = path.with_extension("copy.redb");
    let whole = [std::fs::read(&path).expect("read"), std::fs::read(&copy).expect("read")];
    let used = |bytes: &[u8], at: usize| bytes[at / 512 * 512..].iter().take(512).any(|b| *b != 0);
    let mut told = 0;
    for (victim, bytes) in [&path, &copy].into_iter().zip(&whole) {
        let places = (0..bytes.len()).filter(|at| used(bytes, *at));
        for at in places.step_by(211) {
            for name in std::fs::read_dir(dir.path()).expect("listed").flatten() {
                std::fs::remove_file(name.path()).expect("removed");
            }
            std::fs::write(&path, &whole[0]).expect("written");
            std::fs::write(&copy, &whole[1]).expect("written");
            flip(victim, at as u64);
            let catalogue = open(&path).expect("the other copy is good");
            assert_eq!(catalogue.branches("shop").expect("read"), rows, "byte {at}");
            assert!(catalogue.group("shop").expect("read").is_some(), "byte {at}");
            catalogue.verify().expect("both are good again");
            told += usize::from(!catalogue.damage().is_empty());
        }
    }
    assert!(told > 20, "much of a file counts, and {told} were told");
}

#[test]
fn a_damaged_catalogue_is_kept_and_made_anew() {
    let dir = TempDir::new().expect("a directory");
    let (path, rows) = filled(&dir);
    let file = File::options().write(true).open(&path).expect("open");
    file.write_all_at(&[0xff; 64 << 10], 0).expect("written");
    let catalogue = open(&path).expect("the copy is good");
    let said = catalogue.damage();
    assert!(said.len() == 1 && said[0].contains("made anew from the other"), "{said:?}");
    assert_eq!(catalogue.branches("shop").expect("read"), rows);
    assert!(path.with_added_extension("damaged-0").exists());
    drop(catalogue);
    assert_eq!(open(&path).expect("good").damage(), [""; 0], "it is over");
}

#[test]
fn one_that_is_missing_comes_from_its_copy() {
    let dir = TempDir::new().expect("a directory");
    let (path, rows) = filled(&dir);
    std::fs::remove_file(&path).expect("removed");
    let catalogue = open(&path).expect("the copy is good");
    assert!(catalogue.damage()[0].contains("missing"));
    assert_eq!(catalogue.branches("shop").expect("read"), rows);
}

#[test]
fn one_that_has_missed_a_transaction_follows_the_other() {
    let dir = TempDir::new().expect("a directory");
    let (path, mut rows) = filled(&dir);
    let copy = path.with_extension("copy.redb");
    for behind in [&path, &copy] {
        let before = std::fs::read(behind).expect("read");
        let catalogue = open(&path).expect("good");
        catalogue.drop_branch("shop", rows.keys().next().expect("one")).expect("dropped");
        rows.pop_first();
        drop(catalogue);
        std::fs::write(behind, before).expect("put back");
        let catalogue = open(&path).expect("good");
        assert_eq!(catalogue.branches("shop").expect("read"), rows);
        catalogue.verify().expect("both are alike");
    }
}

/// A target whose disk was full did not start: beside the copy that had missed a transaction, or was
/// damaged, there was no room for a new one.
#[test]
fn on_a_full_disk_a_copy_takes_the_place_of_the_one_before() {
    let (path, copy) = (Path::new("/target/c.redb"), Path::new("/target/c.copy.redb"));
    let vitals = |received_ns| Vitals { received_ns, ..Vitals::default() };
    for spoil in [true, false] {
        let disk = SimDisk::new(1);
        let machine = Machine::Simulated(Simulated::new(disk.clone(), 1, 0));
        machine.create_dir_all(Path::new("/target")).expect("made");
        let open = || {
            let reserve = Reserve::new(&machine, Path::new("/target"), 0);
            Catalogue::open(&machine, path, &Arc::new(reserve))
        };
        let catalogue = open().expect("made");
        catalogue.put_vitals("shop", &vitals(1)).expect("kept");
        if spoil {
            drop(catalogue);
            let file = machine.open(copy, How::Write).expect("there");
            file.write_all_at(&[0xff; 16 << 10], 0).expect("written");
        } else {
            disk.fail(Op::Write, "/target/c.copy.redb", 0, errno::EIO);
            catalogue.put_vitals("shop", &vitals(2)).expect_err("the first copy alone has it");
            drop(catalogue);
            disk.fail_no_more();
        }
        // A block less than another copy takes.
        let copy_bytes = machine.open(copy, How::Read).and_then(|file| file.length());
        let room = copy_bytes.expect("there") - 4096;
        disk.set_capacity(Some(disk.used_bytes() + room));
        let catalogue = open().expect("the first copy is good");
        assert_eq!(catalogue.damage().len(), usize::from(spoil), "{:?}", catalogue.damage());
        let received_ns = if spoil { 1 } else { 2 };
        assert_eq!(catalogue.vitals("shop").expect("read"), vitals(received_ns));
        catalogue.verify().expect("both are alike");
        let names: Vec<String> = machine
            .list(Path::new("/target"))
            .expect("listed")
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        assert_eq!(names.len(), 2, "nothing else is left: {names:?}");
    }
}

#[test]
fn without_a_good_copy_it_is_refused() {
    let dir = TempDir::new().expect("a directory");
    let (path, _) = filled(&dir);
    for victim in [path.clone(), path.with_extension("copy.redb")] {
        let file = File::options().write(true).open(victim).expect("open");
        file.write_all_at(&[0xff; 64 << 10], 0).expect("written");
    }
    let error = open(&path).err().expect("refused");
    let text = format!("{error:#}");
    assert!(text.contains("from a backup") && text.contains("damaged"), "{text}");
}

#[test]
fn a_row_that_is_damaged_is_refused() {
    let dir = TempDir::new().expect("a directory");
    let (path, _) = filled(&dir);
    let catalogue = open(&path).expect("good");
    // As if a page had been changed after redb had checked it.
    let row = catalogue.group("shop").expect("read").expect("there");
    let bytes = at(&GROUPS, "another").seal(&row).expect("sealed");
    catalogue
        .write(|tx| {
            tx.open_table(GROUPS)?.insert("shop", bytes.as_slice())?;
            Ok(())
        })
        .expect("written");
    let error = catalogue.group("shop").expect_err("damaged");
    assert!(error.to_string().contains("'shop' in the table 'groups'"), "{error}");
    catalogue.verify().expect_err("damaged");
}

/// A group with one could not be forgotten.
#[test]
fn a_group_is_forgotten_with_a_branch_that_cannot_be_read() {
    let dir = TempDir::new().expect("a directory");
    let (path, _) = filled(&dir);
    let catalogue = open(&path).expect("good");
    catalogue.spoil_branch("shop", "one");
    catalogue.branches("shop").expect_err("it cannot be read");
    catalogue.forget("shop").expect("forgotten");
    assert_eq!(catalogue.branches("shop").expect("read"), BTreeMap::new());
    assert!(catalogue.group("shop").expect("read").is_none());
}
