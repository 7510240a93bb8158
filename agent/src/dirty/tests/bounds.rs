//! Files whose numbers cannot be counted on from: they are damaged, and everything they speak of is doubted.
//!
//! In a release build the number after the highest of 64 bits is 0. A log that went on so was read as its
//! old blocks ever after, and what had been marked since was lost.

use super::super::{
    active::{self, ActiveSet, DamagedLog, LOG_BYTES},
    bitmap::{self, Bits},
};
use crate::state::COUNT_MAX;

const MAP_ID: [u8; 16] = *b"0123456789abcdef";

#[test]
fn a_log_with_an_impossible_transaction_is_damaged() {
    let log_after = |number: u64| {
        let mut log = vec![0; LOG_BYTES as usize];
        let mut set = ActiveSet::new(MAP_ID, 6);
        for life in [set.transaction(&[]), ActiveSet::new(MAP_ID, number - 1).transaction(&[])] {
            let (offset, block) = life;
            log[offset as usize..][..block.len()].copy_from_slice(&block);
        }
        log
    };
    let found = active::recover(&log_after(COUNT_MAX), MAP_ID).expect("possible");
    assert_eq!(found.transaction, COUNT_MAX);
    for number in [COUNT_MAX + 1, u64::MAX] {
        let damaged = active::recover(&log_after(number), MAP_ID);
        assert_eq!(damaged, Err(DamagedLog { missing: 1, transaction: 7 }), "{number:#x}");
    }
}

#[test]
fn a_page_of_an_impossible_generation_is_damaged() {
    let mut dirty = Bits::new(100);
    dirty.set(42);
    let none = Bits::new(100);
    let file = |generation: u64| {
        let mut file = vec![0; bitmap::file_bytes(100) as usize];
        for (written, generation) in [(0, 7), (1, generation)] {
            let (at, page) = bitmap::encode(MAP_ID, 0, generation, written, [&dirty, &none], &none);
            file[at as usize..][..page.len()].copy_from_slice(&page);
        }
        file
    };
    let found = bitmap::recover(&file(COUNT_MAX), MAP_ID, 100);
    assert_eq!((found.damaged_pages, found.generation), (0, COUNT_MAX));
    for generation in [COUNT_MAX + 1, u64::MAX] {
        // The page before it does not know what this one said.
        let found = bitmap::recover(&file(generation), MAP_ID, 100);
        assert_eq!((found.damaged_pages, found.uncaptured.count()), (1, 100), "{generation:#x}");
        assert_eq!(found.generation, 0);
    }
}
