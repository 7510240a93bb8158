//! The cache loses what it may lose, and nothing else.

use std::fs;

use super::*;

const BYTES: u64 = 1 << 20;

fn disk(seed: u64) -> (tempfile::TempDir, VolatileDisk) {
    let directory = tempfile::tempdir().unwrap();
    let disk = VolatileDisk::new(directory.path(), "disk", BYTES, seed).unwrap();
    (directory, disk)
}

/// The first byte of each sector.
fn seen(disk: &VolatileDisk) -> Vec<u8> {
    fs::read(&disk.path).unwrap().into_iter().step_by(SECTOR_BYTES as usize).collect()
}

#[test]
fn a_cut_keeps_what_was_flushed_and_a_part_of_the_rest() {
    let mut parts = Vec::new();
    for seed in 0..20 {
        let (_directory, disk) = disk(seed);
        let mut state = disk.state();
        state.write(0, &[1; 64 << 10], false).unwrap();
        state.flush().unwrap();
        state.write(4096, &[2; 16 << 10], false).unwrap();
        state.write(512 << 10, &[3; 8192], true).unwrap();
        let (kept, lost) = state.cut().unwrap();
        assert_eq!(kept + lost, 32, "of the write that was not flushed");
        drop(state);
        let seen = seen(&disk);
        let changed = seen[8..40].iter().filter(|byte| **byte == 2).count() as u64;
        assert_eq!(changed, kept);
        assert!(seen[8..40].iter().all(|byte| *byte == 1 || *byte == 2), "new or old, by sector");
        assert!(seen[..8].iter().chain(&seen[40..128]).all(|byte| *byte == 1), "flushed");
        assert!(seen[1024..1040].iter().all(|byte| *byte == 3), "written through");
        parts.push(kept);
    }
    parts.sort_unstable();
    parts.dedup();
    assert!(parts.len() > 10, "cuts differ: {parts:?}");
}

#[test]
fn a_sector_written_twice_may_be_left_in_either_form() {
    let mut forms = [0; 4];
    for seed in 0..40 {
        let (_directory, disk) = disk(seed);
        let mut state = disk.state();
        for form in 1..=3 {
            state.write(0, &[form; 4096], false).unwrap();
        }
        state.cut().unwrap();
        drop(state);
        seen(&disk)[..8].iter().for_each(|form| forms[usize::from(*form)] += 1);
    }
    assert!(forms.iter().all(|count| *count > 0), "{forms:?}");
}

#[test]
fn a_disk_that_lies_loses_what_was_flushed() {
    let (_directory, disk) = disk(1);
    let mut state = disk.state();
    state.lie = Some(Lie { aging: Sectors::new(BYTES / SECTOR_BYTES), since: Instant::now() });
    state.write(0, &[1; 64 << 10], true).unwrap();
    state.flush().unwrap();
    let (_, lost) = state.cut().unwrap();
    assert!(lost > 0);
    // What is old enough is safe all the same.
    state.write(0, &[2; 64 << 10], false).unwrap();
    for _ in 0..2 {
        state.lie.as_mut().unwrap().since -= LIE_HALF;
        state.age().unwrap();
    }
    assert_eq!(state.cut().unwrap(), (0, 0));
    drop(state);
    assert!(seen(&disk)[..128].iter().all(|byte| *byte == 2));
}

#[test]
fn requests_from_before_the_cut_are_lost() {
    let (_directory, disk) = disk(1);
    let disk = Arc::new(disk);
    let connected = Arc::new(Connected { disk: Arc::clone(&disk), life: 0 });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    disk.state().cut().unwrap();
    let mut data = connected.buffer(512);
    data.extend(&[9; 512]);
    runtime.block_on(connected.write(0, data, false)).expect_err("its sender is dead");
    assert_eq!(seen(&disk)[0], 0);
}
