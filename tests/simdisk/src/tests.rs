//! The disk keeps its own promises, and keeps no others.

use std::{collections::BTreeSet, path::Path};

use crate::{Faults, How, Op, SECTOR_BYTES, SimDisk, errno};

const SECTOR: usize = SECTOR_BYTES as usize;

fn path(name: &str) -> &Path {
    Path::new(name)
}

fn read(disk: &SimDisk, name: &str) -> Vec<u8> {
    let file = disk.open(path(name), How::Read).expect("it is there");
    let mut bytes = vec![0; file.length().expect("a length") as usize];
    assert_eq!(file.read_at(&mut bytes, 0).expect("read"), bytes.len());
    bytes
}

/// What many seeds make of a power cut after the same steps.
fn outcomes<T: Ord>(steps: impl Fn(&SimDisk), look: impl Fn(&SimDisk) -> T) -> BTreeSet<T> {
    (0..200)
        .map(|seed| {
            let disk = SimDisk::new(seed);
            steps(&disk);
            disk.crash();
            look(&disk)
        })
        .collect()
}

#[test]
fn what_is_synced_stays_and_sectors_are_torn() {
    let steps = |disk: &SimDisk| {
        let file = disk.open(path("/a"), How::New).expect("made");
        file.write_at(&[1; 2 * SECTOR], 0).expect("written");
        file.sync().expect("synced");
        disk.sync_dir(path("/")).expect("synced");
        file.write_at(&[2; 2 * SECTOR], 0).expect("written");
        file.write_at(&[3; SECTOR], 0).expect("written");
        assert_eq!(read(disk, "/a")[..SECTOR], [3; SECTOR], "reads see what is not durable");
    };
    let seen = outcomes(steps, |disk| {
        let bytes = read(disk, "/a");
        assert!(bytes.chunks(SECTOR).all(|sector| sector.iter().all(|b| *b == sector[0])));
        (bytes[0], bytes[SECTOR])
    });
    let all = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)];
    assert_eq!(seen, BTreeSet::from(all));
}

#[test]
fn names_last_by_their_directory_alone() {
    let steps = |disk: &SimDisk| {
        disk.create_dir_all(path("/d")).expect("made");
        disk.sync_dir(path("/")).expect("synced");
        for name in ["/d/a", "/d/b"] {
            let file = disk.open(path(name), How::New).expect("made");
            file.write_at(name.as_bytes(), 0).expect("written");
            file.sync().expect("synced");
        }
        disk.sync_dir(path("/d")).expect("synced");
        disk.rename(path("/d/a"), path("/d/b")).expect("renamed");
        drop(disk.open(path("/d/c"), How::New).expect("made"));
    };
    let seen = outcomes(steps, |disk| {
        let there = |name| disk.exists(path(name));
        let b = read(disk, "/d/b");
        assert_eq!(b == b"/d/a", !there("/d/a"), "a rename is whole or not at all");
        (there("/d/a"), there("/d/c"))
    });
    assert_eq!(seen.len(), 4);
    let unsynced_parent = |disk: &SimDisk| {
        disk.create_dir_all(path("/x/y")).expect("made");
        drop(disk.open(path("/x/y/f"), How::New).expect("made"));
        disk.sync_dir(path("/x/y")).expect("synced");
        disk.sync_dir(path("/x")).expect("synced");
    };
    let seen =
        outcomes(unsynced_parent, |disk| (disk.exists(path("/x")), disk.exists(path("/x/y/f"))));
    assert_eq!(seen, BTreeSet::from([(false, false), (true, true)]));
}

/// A name was given, taken and given again, and the process died, before the directory was synced: after a power cut
/// it may stand for the file in between, which has to be there then.
#[test]
fn a_name_may_go_back_to_a_file_that_it_stood_for_in_between() {
    let steps = |disk: &SimDisk| {
        for content in [1, 2] {
            let file = disk.open(path("/a"), How::New).expect("made");
            file.write_at(&[content; SECTOR], 0).expect("written");
            file.sync().expect("synced");
            if content == 1 {
                disk.remove_file(path("/a")).expect("removed");
            }
        }
        disk.kill();
    };
    let look =
        |disk: &SimDisk| disk.open(path("/a"), How::Read).is_ok().then(|| read(disk, "/a")[0]);
    assert_eq!(outcomes(steps, look), BTreeSet::from([None, Some(1), Some(2)]));
}

#[test]
fn lengths_and_holes_come_in_order() {
    let steps = |disk: &SimDisk| {
        let file = disk.open(path("/a"), How::New).expect("made");
        file.write_at(&[1; 4 * 4096], 0).expect("written");
        file.sync().expect("synced");
        disk.sync_dir(path("/")).expect("synced");
        file.set_length(700).expect("cut");
        file.set_length(8192).expect("longer");
        file.punch(100, 100).expect("punched");
        file.punch(0, 512).expect("punched");
    };
    let seen = outcomes(steps, |disk| {
        let bytes = read(disk, "/a");
        match bytes.len() {
            16384 | 700 => (bytes.len(), u64::from(bytes[0]), 0),
            _ => {
                (bytes.len(), u64::from(bytes[0]), bytes[512..].iter().map(|b| u64::from(*b)).sum())
            }
        }
    });
    assert_eq!(seen, BTreeSet::from([(16384, 1, 0), (700, 1, 0), (8192, 1, 188), (8192, 0, 188)]));
}

#[test]
fn a_failed_sync_is_never_made_good() {
    let steps = |disk: &SimDisk| {
        let file = disk.open(path("/a"), How::New).expect("made");
        disk.sync_dir(path("/")).expect("synced");
        file.set_length(SECTOR as u64).expect("longer");
        file.sync().expect("synced");
        file.write_at(&[1; SECTOR], 0).expect("written");
        disk.fail(Op::Sync, "/a", 0, errno::EIO);
        assert!(file.sync().is_err());
        file.sync().expect("it says so");
        assert_eq!(read(disk, "/a")[0], 1, "and still shows it");
    };
    assert_eq!(outcomes(steps, |disk| read(disk, "/a")[0]), BTreeSet::from([0, 1]));
}

#[test]
fn what_a_direct_disk_has_lost_is_gone_at_once() {
    let seen = (0..40).map(|seed| {
        let disk = SimDisk::new_direct(seed);
        let file = disk.open(path("/a"), How::New).expect("made");
        disk.sync_dir(path("/")).expect("synced");
        file.set_length(SECTOR as u64).expect("longer");
        file.sync().expect("synced");
        file.write_at(&[1; SECTOR], 0).expect("written");
        assert_eq!(read(&disk, "/a")[0], 1);
        disk.fail(Op::Sync, "/a", 0, errno::EIO);
        assert!(file.sync().is_err());
        let seen = read(&disk, "/a")[0];
        disk.crash();
        assert_eq!(read(&disk, "/a")[0], seen, "what is left is durable");
        seen
    });
    assert_eq!(seen.collect::<BTreeSet<u8>>(), BTreeSet::from([0, 1]));
}

#[test]
fn the_power_goes_after_so_many_effects() {
    for cut in 0..4 {
        let disk = SimDisk::new(1);
        disk.cut_after(cut);
        let steps = || {
            let file = disk.open(path("/a"), How::New)?;
            file.write_at(b"x", 0)?;
            file.sync()?;
            disk.sync_dir(path("/"))
        };
        let stopped: std::io::Result<()> = steps();
        assert!(stopped.is_err() && disk.is_off() && disk.effects() == cut, "cut {cut}");
        assert!(disk.open(path("/a"), How::Read).is_err());
        disk.crash();
        assert!(!disk.is_off());
    }
}

#[test]
fn every_moment_can_be_had() {
    let disk = SimDisk::new(1);
    let (images, seen) = std::sync::mpsc::channel();
    disk.watch(Some(Box::new(move |image| drop(images.send(image)))));
    let file = disk.open(path("/a"), How::New).expect("made");
    file.write_at(b"one", 0).expect("written");
    file.write_at(b"two", 0).expect("written");
    disk.watch(None);
    file.sync().expect("synced");
    let lengths: Vec<Option<Vec<u8>>> = seen
        .iter()
        .map(|image| {
            let disk = SimDisk::new(1);
            disk.restore(&image);
            disk.exists(path("/a")).then(|| read(&disk, "/a"))
        })
        .collect();
    assert_eq!(lengths, [None, Some(Vec::new()), Some(b"one".to_vec())]);
}

#[test]
fn handles_die_with_their_life() {
    let disk = SimDisk::new(1);
    let file = disk.open(path("/a"), How::New).expect("made");
    file.write_at(b"kept", 0).expect("written");
    disk.kill();
    assert!(file.write_at(b"lost", 0).is_err() && file.sync().is_err());
    assert_eq!(read(&disk, "/a"), b"kept");
}

#[test]
fn a_full_disk_takes_what_fits() {
    let disk = SimDisk::new(1);
    disk.set_capacity(Some(4 * 4096));
    let file = disk.open(path("/a"), How::New).expect("made");
    file.preallocate(0, 8192).expect("room");
    let full = |error: std::io::Error| error.raw_os_error() == Some(errno::ENOSPC);
    assert!(full(file.preallocate(0, 5 * 4096).expect_err("no room")));
    assert_eq!((file.length().expect("a length"), disk.used_bytes()), (8192, 8192));
    assert!(full(file.write_at(&[1; 5 * 4096], 0).expect_err("no room")));
    assert_eq!(disk.used_bytes(), 4 * 4096);
    file.punch(4096, 4096).expect("a hole");
    assert_eq!(disk.used_bytes(), 3 * 4096);
    file.set_length(0).expect("emptied");
    assert_eq!(disk.used_bytes(), 0);
    disk.remove_file(path("/a")).expect("removed");
}

#[test]
fn faults_strike_and_are_counted_on() {
    let disk = SimDisk::new(3);
    let file = disk.open(path("/a"), How::New).expect("made");
    file.write_at(&[1; 64 * SECTOR], 0).expect("written");
    disk.set_faults(Faults { write_is_lost: 500_000, ..Faults::default() });
    file.write_at(&[2; 64 * SECTOR], 0).expect("it says so");
    let lost = read(&disk, "/a").iter().filter(|b| **b == 1).count();
    assert!(lost > 0 && lost < 64 * SECTOR);
    disk.set_faults(Faults { write_lands_elsewhere: 1_000_000, ..Faults::default() });
    file.write_at(&[3; SECTOR], 0).expect("it says so");
    let at = read(&disk, "/a").iter().position(|b| *b == 3).expect("it is somewhere");
    assert_ne!(at, 0);
    disk.set_faults(Faults { read_fails: 1_000_000, ..Faults::default() });
    assert!(file.read_at(&mut [0], 0).is_err());
    disk.set_faults(Faults::default());
    let before = read(&disk, "/a");
    disk.rot(path("/a"), 8 * 700 + 3).expect("rotten");
    let after = read(&disk, "/a");
    assert_eq!((before[700] ^ 8, &before[..700]), (after[700], &after[..700]));
}

#[test]
fn an_image_rolls_back() {
    let disk = SimDisk::new(1);
    let file = disk.open(path("/a"), How::New).expect("made");
    file.write_at(b"old", 0).expect("written");
    let image = disk.image();
    file.write_at(b"new", 0).expect("written");
    drop(disk.open(path("/b"), How::New).expect("made"));
    disk.restore(&image);
    assert_eq!(read(&disk, "/a"), b"old");
    assert!(!disk.exists(path("/b")));
    let other = SimDisk::new(2);
    other.restore(&image);
    drop(other.open(path("/b"), How::New).expect("made"));
    assert_eq!(read(&other, "/a"), b"old", "a new file is not one of the image's");
}

#[test]
fn the_same_seed_is_the_same_disk() {
    let run = |seed| {
        let disk = SimDisk::new(seed);
        disk.set_faults(Faults { write_fails: 200_000, sync_fails: 100_000, ..Faults::default() });
        for n in 0..50u8 {
            let name = format!("/{}", n % 5);
            if let Ok(file) = disk.open(path(&name), How::Create) {
                let _ = file.write_at(&[n; 3000], u64::from(n) * 100);
                let _ = file.sync();
            }
            if n % 7 == 0 {
                let _ = disk.sync_dir(path("/"));
            }
            if n % 20 == 19 {
                disk.crash();
            }
        }
        let names = disk.list(path("/")).expect("listed");
        for entry in names {
            let _ = read_quietly(&disk, &entry.name);
        }
        disk.fingerprint()
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

fn read_quietly(disk: &SimDisk, name: &str) -> Option<usize> {
    let file = disk.open(&path("/").join(name), How::Read).ok()?;
    file.read_at(&mut [0; 10_000], 0).ok()
}
