//! The base of a volume and what an interrupted fold left to be redone, as patches on files that a good base
//! made: the sums from 0 on, the redo from 1 MiB on. What the next fold then writes to it is read back.
#![no_main]

use std::collections::BTreeMap;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tidemark_fuzz::{patches, seal};
use tidemark_journal::checksum::crc64_of;
use tidemark_journal::{GroupId, VolumeId};
use tidemark_simdisk::{How, SimDisk};
use tidemark_target::machine::{Machine, simulated::Simulated};
use tidemark_target::store::base::apply::{Change, NewContent, Redo};
use tidemark_target::store::base::sums::{self, SECTOR};
use tidemark_target::store::base::{BLOCK_BYTES, Base, BaseRow};

const GROUP: GroupId = GroupId([1; 16]);
const VOLUME: VolumeId = VolumeId(1);
const BLOCKS: u64 = 1000;
const REDO_AT: u64 = 1 << 20;
const REDO_BYTES: usize = 16 + BLOCK_BYTES as usize + 8;

fuzz_target!(|bytes: &[u8]| {
    let disk = SimDisk::new(1);
    let machine = Machine::Simulated(Simulated::new(disk.clone(), 1, 0));
    let dir = Path::new("/base");
    disk.create_dir_all(dir).expect("a directory");
    let file = |name: &str| disk.open(&dir.join(name), How::Create).expect("a file");
    let sums_file = file("00001.sums");
    sums_file.set_length(sums::file_bytes(BLOCKS)).expect("room");
    file("00001.data").set_length(BLOCKS * BLOCK_BYTES).expect("room");
    let mut redo = Vec::new();
    for (at, content) in patches(bytes) {
        match at.checked_sub(REDO_AT) {
            Some(at) if at <= 4 * REDO_BYTES as u64 => {
                redo.resize(redo.len().max(at as usize + content.len()), 0);
                redo[at as usize..][..content.len()].copy_from_slice(content);
            }
            Some(_) => {}
            None => sums_file.write_at(content, at).expect("room"),
        }
    }
    put_right(&sums_file);
    for entry in redo.chunks_exact_mut(REDO_BYTES) {
        // Blocks far out are possible, and their maps take more memory than a fuzzer has.
        entry[10..16].fill(0);
        seal(entry, 0..REDO_BYTES - 8, REDO_BYTES - 8);
    }
    if !redo.is_empty() {
        file("fold.redo").write_at(&redo, 0).expect("room");
    }
    let rows = BTreeMap::from([(VOLUME, BaseRow { generation: 7, blocks: BLOCKS })]);
    let (base, _) = Base::open(&machine, dir, GROUP, &rows).expect("a disk without errors");
    read(&base);
    // As a fold begins and ends: nothing of an earlier one is redone over what it writes.
    let redo = Redo::create(&base).expect("room");
    let change = |first, content| Change { volume: VOLUME, first, content };
    let damage = &mut Vec::new();
    let data = vec![5; 2 * BLOCK_BYTES as usize];
    base.apply(&change(3, NewContent::Data(data.clone())), damage).expect("written");
    base.apply(&change(60, NewContent::Zeros(10)), damage).expect("written");
    let rows = base.finish().expect("durable");
    redo.remove().expect("removed");
    base.committed(&rows);
    let (base, _) = Base::open(&machine, dir, GROUP, &rows).expect("a disk without errors");
    let mut out = vec![0; data.len()];
    base.read(VOLUME, 24, 40, &mut out).expect("written just now");
    assert_eq!(out, data);
    base.read(VOLUME, 480, 560, &mut [0; 80 * 512]).expect("written just now");
    read(&base);
});

/// Header, first map, and the units that have something in them.
fn put_right(file: &tidemark_simdisk::SimFile) {
    let mut sector = [0; SECTOR];
    let mut seal_at = |number: u64, of: &[&[u8]]| {
        file.read_at(&mut sector, number * SECTOR as u64).expect("read");
        if sector.iter().any(|byte| *byte != 0) {
            let content = &sector[..SECTOR - 8];
            let crc = crc64_of([&[content], of].concat().into_iter());
            sector[SECTOR - 8..].copy_from_slice(&crc.to_le_bytes());
            file.write_at(&sector, number * SECTOR as u64).expect("written");
        }
    };
    seal_at(0, &[]);
    let volume = VOLUME.0.to_le_bytes();
    for number in [sums::map_sector(0)].into_iter().chain((0..4).map(sums::unit_sector)) {
        seal_at(number, &[&GROUP.0, &volume, &number.to_le_bytes()]);
    }
}

fn read(base: &Base) {
    let sectors = 64 * 8;
    let mut out = vec![0; sectors * 512];
    let _ = base.read(VOLUME, 0, sectors as u64, &mut out);
    let _ = base.block(VOLUME, BLOCKS - 1);
    let end = BLOCKS * 8;
    if let Ok(stretches) = base.stretches(VOLUME, 5, end) {
        assert!(stretches[0].start == 5 && stretches.iter().all(|one| one.start < one.end));
        assert!(stretches.windows(2).all(|pair| pair[0].end == pair[1].start));
    }
    let mut from = Some(0);
    while let Some(unit) = from {
        let looked = base.check(VOLUME, unit).expect("a disk without errors");
        assert!(looked.next.is_none_or(|next| next > unit), "the check goes on");
        from = looked.next;
    }
}
