//! The bytes of the log's blocks and of the bitmap's pages, and what is read from damaged files.

use tidemark_journal::{VolumeId, checksum::crc64};

use super::{
    super::{
        BLOCK_BYTES, RegionId,
        active::{self, ActiveSet, BLOCKS, BLOCKS_NEEDED, CHANGES_MAX, LOG_BYTES, SLOTS},
        bitmap::{self, Bits, PAGE_REGIONS},
    },
    random::Random,
};

const MAP_ID: [u8; 16] = *b"0123456789abcdef";

fn region(volume: u16, index: u32) -> RegionId {
    RegionId { volume: VolumeId(volume), index }
}

/// The block with its checksum field zero, as the checksum sees it.
fn crc_of(block: &[u8]) -> u64 {
    let mut block = block.to_vec();
    block[56..64].fill(0);
    crc64(&block)
}

#[test]
fn the_bytes_of_a_block_of_the_log() {
    let mut set = ActiveSet::new(MAP_ID, 0x0102_0304_0506);
    set.replace(300, Some(region(7, 0x0a0b_0c0d)));
    set.replace(2, Some(region(1, 5)));
    let (offset, block) = set.transaction(&[300]);
    assert_eq!(offset, (0x0102_0304_0507 % 64) * 4096);
    assert_eq!(block.len(), BLOCK_BYTES);
    let mut wanted = Vec::new();
    wanted.extend_from_slice(b"TMAL\x01\x00\x01\x01"); // version 1, 257 entries
    wanted.extend_from_slice(&[0x07, 0x05, 0x04, 0x03, 0x02, 0x01, 0, 0]);
    wanted.extend_from_slice(&MAP_ID);
    wanted.extend_from_slice(&[0x07, 0x05, 0x04, 0x03, 0x02, 0x01, 0, 0]);
    wanted.extend_from_slice(&[0; 16]);
    wanted.extend_from_slice(&crc_of(&block).to_le_bytes());
    wanted.extend_from_slice(&[0x2c, 0x01, 0x07, 0x00, 0x0d, 0x0c, 0x0b, 0x0a]);
    wanted.extend_from_slice(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    wanted.extend_from_slice(&[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    wanted.extend_from_slice(&[2, 0, 1, 0, 5, 0, 0, 0]);
    assert_eq!(block[..wanted.len()], wanted);
    assert!(block[64 + 257 * 8..].iter().all(|byte| *byte == 0), "what is not in use is zero");
    // The checksums of these blocks, from a plain bit-by-bit CRC-64/NVME.
    assert_eq!(block[56..64], [0xfd, 0xfd, 0x8b, 0xf0, 0x97, 0x83, 0x1d, 0x9e]);
    // The next one restates the slots that follow.
    let (_, block) = set.transaction(&[]);
    assert_eq!(block[6..8], [0x00, 0x01]);
    assert_eq!(block[64..72], [0x00, 0x01, 0, 0, 0xff, 0xff, 0xff, 0xff]);
}

#[test]
fn the_bytes_of_a_page_of_the_bitmap() {
    let regions = PAGE_REGIONS + 100;
    let (mut dirty, mut more) = (Bits::new(regions), Bits::new(regions));
    let mut uncaptured = Bits::new(regions);
    dirty.set(PAGE_REGIONS);
    dirty.set(3); // on the other page
    more.set(PAGE_REGIONS + 9);
    uncaptured.set(PAGE_REGIONS + 99);
    let (offset, page) = bitmap::encode(MAP_ID, 1, 0x1122_3344, 5, [&dirty, &more], &uncaptured);
    assert_eq!(offset, 3 * 4096, "the second place of page 1");
    let mut wanted = Vec::new();
    wanted.extend_from_slice(b"TMBM\x01\x00\x00\x00");
    wanted.extend_from_slice(&[0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0]);
    wanted.extend_from_slice(&MAP_ID);
    wanted.extend_from_slice(&[1, 0, 0, 0]);
    wanted.extend_from_slice(&[0; 20]);
    wanted.extend_from_slice(&crc_of(&page).to_le_bytes());
    wanted.extend_from_slice(&[1, 2]);
    wanted.extend_from_slice(&[0; 2014]);
    wanted.extend_from_slice(&[0; 12]);
    wanted.extend_from_slice(&[8]);
    wanted.extend_from_slice(&[0; 2003]);
    assert_eq!(page, wanted);
    assert_eq!(page[56..64], [0x1c, 0x5d, 0x51, 0xfe, 0x73, 0x6a, 0xa2, 0x9d]);
    assert_eq!(bitmap::encode(MAP_ID, 1, 1, 6, [&dirty, &more], &uncaptured).0, 2 * 4096);
}

/// A set and its log file, to which every transaction is written.
struct Log {
    set: ActiveSet,
    file: Vec<u8>,
    /// What each slot holds.
    model: Vec<Option<RegionId>>,
}

impl Log {
    fn new() -> Log {
        let set = ActiveSet::new(MAP_ID, 0);
        Log { set, file: vec![0; LOG_BYTES as usize], model: vec![None; SLOTS] }
    }

    /// Changes so many slots and writes the transaction.
    fn change(&mut self, random: &mut Random, changes: usize) {
        let changed: Vec<u16> = (0..changes).map(|_| random.below(SLOTS as u64) as u16).collect();
        for slot in &changed {
            let holds = (!random.percent(20)).then(|| region(1, random.below(1 << 20) as u32));
            let holds = holds.filter(|region| !self.set.contains(*region));
            self.set.replace(*slot, holds);
            self.model[usize::from(*slot)] = holds;
        }
        let (offset, block) = self.set.transaction(&changed);
        self.file[offset as usize..][..BLOCK_BYTES].copy_from_slice(&block);
    }

    fn block_of(&mut self, transaction: u64) -> &mut [u8] {
        &mut self.file[(transaction % BLOCKS) as usize * BLOCK_BYTES..][..BLOCK_BYTES]
    }

    fn active(&self) -> Vec<RegionId> {
        let mut active: Vec<RegionId> = self.model.iter().flatten().copied().collect();
        active.sort();
        active.dedup();
        active
    }

    fn recovered(&self) -> active::Recovered {
        active::recover(&self.file, MAP_ID).expect("an undamaged log")
    }
}

#[test]
fn the_log_is_read_back_however_often_it_went_round() {
    let mut random = Random::new(1);
    let mut log = Log::new();
    for transaction in 1..=3 * BLOCKS {
        let changes = random.below(CHANGES_MAX as u64 + 1) as usize;
        log.change(&mut random, changes);
        let recovered = log.recovered();
        assert_eq!(recovered.transaction, transaction);
        assert_eq!(recovered.active, log.active(), "after transaction {transaction}");
    }
}

#[test]
fn a_newest_block_torn_at_any_sector_counts_as_not_written() {
    let mut random = Random::new(2);
    let mut log = Log::new();
    for transaction in 1..=2 * BLOCKS + 5 {
        let before = (log.file.clone(), log.active());
        log.change(&mut random, 40);
        if transaction % 7 != 0 {
            continue;
        }
        let at = (transaction % BLOCKS) as usize * BLOCK_BYTES;
        for _ in 0..4 {
            let mut torn = before.0.clone();
            let mut kept = 0;
            for sector in 0..8 {
                let bytes = at + sector * 512..at + (sector + 1) * 512;
                let reached = random.percent(50) && kept < 7;
                kept += u32::from(reached || torn[bytes.clone()] == log.file[bytes.clone()]);
                if reached {
                    torn[bytes.clone()].copy_from_slice(&log.file[bytes]);
                }
            }
            if torn == log.file {
                continue;
            }
            let recovered = active::recover(&torn, MAP_ID).expect("only the newest is torn");
            assert_eq!(recovered.transaction, transaction - 1);
            assert_eq!(recovered.active, before.1);
        }
    }
}

#[test]
fn a_missing_block_that_is_needed_is_noticed_and_no_other() {
    let mut random = Random::new(3);
    let mut log = Log::new();
    for _ in 0..2 * BLOCKS + 20 {
        log.change(&mut random, CHANGES_MAX);
    }
    let newest = 2 * BLOCKS + 20;
    let whole = log.file.clone();
    for back in 1..BLOCKS {
        log.file.clone_from(&whole);
        log.block_of(newest - back)[100] ^= 1;
        match active::recover(&log.file, MAP_ID) {
            Ok(recovered) => {
                assert!(back >= BLOCKS_NEEDED, "the block {back} before the newest is needed");
                assert_eq!(recovered.active, log.active());
            }
            Err(damaged) => {
                assert!(back <= BLOCKS_NEEDED, "{back} before the newest: {damaged}");
                assert_eq!(damaged.transaction, newest, "a new life goes on after the newest");
            }
        }
    }
}

/// The newest block that has rotted was taken for one that was torn, and what it had made active for
/// never marked. With a copy of it, it is there.
#[test]
fn what_rots_in_one_copy_of_the_log_is_in_the_other() {
    let mut random = Random::new(8);
    let mut log = Log::new();
    for transaction in 1..=BLOCKS + 9 {
        log.change(&mut random, 40);
        let twice = [log.file.clone(), log.file.clone()].concat();
        for half in [0, BLOCKS] {
            let mut rotten = twice.clone();
            for block in 0..BLOCKS {
                let at = ((half + block) as usize) * BLOCK_BYTES + random.below(4096) as usize;
                rotten[at] ^= 1 << random.below(8);
            }
            let recovered = active::recover(&rotten, MAP_ID).expect("one copy is sound");
            assert_eq!((recovered.transaction, recovered.active), (transaction, log.active()));
        }
    }
}

#[test]
fn a_new_life_does_not_see_the_one_before() {
    let mut random = Random::new(4);
    let mut log = Log::new();
    for _ in 0..100 {
        log.change(&mut random, 100);
    }
    assert!(log.recovered().active.len() > 1000);
    log.set = ActiveSet::new(MAP_ID, log.recovered().transaction);
    log.model = vec![None; SLOTS];
    for transaction in 101..300 {
        log.change(&mut random, 3);
        let recovered = log.recovered();
        assert_eq!((recovered.transaction, recovered.active), (transaction, log.active()));
    }
}

/// Once, a log of which nothing was left was taken for one in which nothing is active.
#[test]
fn a_log_without_a_block_of_its_map_is_damaged() {
    let mut random = Random::new(5);
    let mut log = Log::new();
    log.change(&mut random, 10);
    active::recover(&log.file, [0; 16]).expect_err("blocks of another map do not count");
    active::recover(&vec![0; log.file.len()], MAP_ID).expect_err("zeros");
    active::recover(&[], MAP_ID).expect_err("nothing");
}

/// A block that named a later transaction than its own as the first of its life made the number of blocks that
/// are needed negative. It contradicts itself, and does not count.
#[test]
fn a_block_from_before_its_own_life_does_not_count() {
    let mut random = Random::new(7);
    let mut log = Log::new();
    log.change(&mut random, 10);
    let before = log.recovered();
    log.change(&mut random, 10);
    let block = log.block_of(2);
    block[32..40].copy_from_slice(&3u64.to_le_bytes());
    let crc = crc_of(block);
    block[56..64].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(log.recovered(), before);
}

fn write_page(file: &mut [u8], generation: u64, written: u64, dirty: &Bits, uncaptured: &Bits) {
    let none = Bits::new_like(dirty);
    let (offset, page) = bitmap::encode(MAP_ID, 0, generation, written, [dirty, &none], uncaptured);
    file[offset as usize..][..BLOCK_BYTES].copy_from_slice(&page);
}

#[test]
fn a_page_torn_at_any_sector_leaves_the_one_before() {
    let regions = 12_345;
    let mut file = vec![0; bitmap::file_bytes(regions) as usize];
    let mut random = Random::new(6);
    let (mut dirty, mut uncaptured) = (Bits::new(regions), Bits::new(regions));
    for generation in 1..200u64 {
        let written = generation - 1;
        let before = (file.clone(), dirty.clone(), uncaptured.clone());
        for _ in 0..20 {
            let region = random.below(u64::from(regions)) as u32;
            match random.below(3) {
                0 => dirty.set(region),
                1 => dirty.clear(region),
                _ => uncaptured.set(region),
            };
        }
        write_page(&mut file, generation, written, &dirty, &uncaptured);
        let reached = random.below(256);
        let mut torn = before.0.clone();
        for sector in (0..16).filter(|sector| reached & (1 << (sector % 8)) != 0) {
            let bytes = sector * 512..(sector + 1) * 512;
            torn[bytes.clone()].copy_from_slice(&file[bytes]);
        }
        let recovered = bitmap::recover(&torn, MAP_ID, regions);
        let whole = torn == file;
        if whole {
            assert_eq!((&recovered.dirty, &recovered.uncaptured), (&dirty, &uncaptured));
            assert_eq!(recovered.generation, generation);
        } else if generation > 1 {
            assert_eq!((&recovered.dirty, &recovered.uncaptured), (&before.1, &before.2));
            assert_eq!(recovered.generation, generation - 1);
            assert_eq!(recovered.damaged_pages, 0);
        } else {
            assert_eq!(recovered.damaged_pages, 1);
            assert_eq!(recovered.uncaptured.count(), regions);
        }
        // A new life goes on with the other place, so it never destroys what it relies on.
        if !whole && generation > 1 {
            assert_eq!(recovered.written[0] % 2, written % 2);
        }
    }
}

/// The page before was found where the newest had rotted, and what had been marked since was lost.
#[test]
fn what_rots_in_one_copy_of_the_bitmap_is_in_the_other() {
    let regions = PAGE_REGIONS + 7;
    let (mut file, mut dirty) = (vec![0; bitmap::file_bytes(regions) as usize], Bits::new(regions));
    let none = Bits::new(regions);
    for generation in 1..6u64 {
        dirty.set(generation as u32);
        dirty.set(PAGE_REGIONS + generation as u32);
        for number in 0..2 {
            let (offset, page) =
                bitmap::encode(MAP_ID, number, generation, generation, [&dirty, &none], &none);
            file[offset as usize..][..BLOCK_BYTES].copy_from_slice(&page);
        }
        for half in [0, file.len()] {
            let mut rotten = [file.clone(), file.clone()].concat();
            for block in 0..4 {
                rotten[half + block * BLOCK_BYTES + 777] ^= 0x10;
            }
            let recovered = bitmap::recover(&rotten, MAP_ID, regions);
            assert_eq!((recovered.damaged_pages, recovered.generation), (0, generation));
            assert_eq!(recovered.dirty, dirty);
            assert_eq!(recovered.written, [generation % 2 + 1; 2]);
        }
    }
}

#[test]
fn a_page_that_cannot_be_read_counts_as_uncaptured() {
    let regions = PAGE_REGIONS + 7;
    let mut file = vec![0; bitmap::file_bytes(regions) as usize];
    let none = Bits::new(regions);
    for (number, written) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let (offset, page) = bitmap::encode(MAP_ID, number, 9, written, [&none, &none], &none);
        file[offset as usize..][..BLOCK_BYTES].copy_from_slice(&page);
    }
    assert_eq!(bitmap::recover(&file, MAP_ID, regions).uncaptured.count(), 0);
    let mut damaged = file.clone();
    damaged[2 * BLOCK_BYTES + 3000] ^= 0x10;
    assert_eq!(bitmap::recover(&damaged, MAP_ID, regions).damaged_pages, 0, "one place is left");
    damaged[3 * BLOCK_BYTES + 5] ^= 0x10;
    let recovered = bitmap::recover(&damaged, MAP_ID, regions);
    assert_eq!(recovered.damaged_pages, 1);
    assert_eq!(
        recovered.uncaptured.iter().collect::<Vec<_>>(),
        (PAGE_REGIONS..regions).collect::<Vec<_>>()
    );
    // A file that was cut, and the map of another volume.
    assert_eq!(bitmap::recover(&file[..5000], MAP_ID, regions).damaged_pages, 1);
    assert_eq!(bitmap::recover(&file, [1; 16], regions).damaged_pages, 2);
    // A page at another's place.
    let (first, second) = file.split_at_mut(2 * BLOCK_BYTES);
    first.copy_from_slice(second);
    assert_eq!(bitmap::recover(&file, MAP_ID, regions).damaged_pages, 1);
}

proptest::proptest! {
    #[test]
    fn bits_are_a_set(regions in 1u32..300,
                      steps in proptest::collection::vec((0u8..4, 0u32..300), 1..200)) {
        let (mut bits, mut other) = (Bits::new(regions), Bits::new(regions));
        let mut model = std::collections::BTreeSet::new();
        for (what, region) in steps {
            let region = region % regions;
            match what {
                0 => proptest::prop_assert_eq!(bits.set(region), model.insert(region)),
                1 => proptest::prop_assert_eq!(bits.clear(region), model.remove(&region)),
                2 => { other.set(region); }
                _ => {
                    model.extend(other.iter());
                    bits.absorb(&mut other);
                    proptest::prop_assert_eq!(other.count(), 0);
                }
            }
            proptest::prop_assert_eq!(bits.get(region), model.contains(&region));
            proptest::prop_assert_eq!(bits.count() as usize, model.len());
            proptest::prop_assert!(bits.iter().eq(model.iter().copied()));
            proptest::prop_assert_eq!(bits.next(region), model.range(region..).next().copied());
        }
        bits.fill();
        proptest::prop_assert_eq!(bits.count(), regions);
    }
}
