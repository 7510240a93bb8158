//! The index of a sealed segment, read page by page from its file.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tidemark_journal::{Seq, VolumeId};
use tidemark_target::machine;
use tidemark_target::store::index::page::{PAGE_BYTES, PageCache, PageReader};
use tidemark_target::store::index::{Query, SealedIndex};

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    read(&bytes);
    for page in bytes.chunks_exact_mut(PAGE_BYTES) {
        let crc = tidemark_journal::checksum::crc64(&page[8..]);
        page[..8].copy_from_slice(&crc.to_le_bytes());
    }
    read(&bytes);
});

fn read(bytes: &[u8]) {
    let file = memfd_create("index", MFdFlags::MFD_CLOEXEC).expect("a file in memory");
    let file = File::from(file);
    file.write_all_at(bytes, 0).expect("room for it");
    let (file, cache) = (machine::File::Real(file), PageCache::new(64));
    let reader = PageReader { file: &file, file_id: 1, segment: 1, index_at: 0, cache: &cache };
    let Ok(index) = SealedIndex::open(reader) else { return };
    let mut volumes = vec![VolumeId(1)];
    let _ = index.for_each(reader, |key, _| volumes.push(key.volume));
    for volume in volumes.into_iter().take(4) {
        for (start, end, at) in [(0, 8, u64::MAX), (0, u64::MAX, 5), (1 << 40, 1 << 41, 1 << 40)] {
            let query = Query { volume, start, end, at: Seq(at) };
            let _ = index.find(reader, &query, |_, _| {});
        }
    }
    for number in [0, 1, index.entries(), index.frames().wrapping_sub(1), u32::MAX] {
        let _ = index.chunk(reader, number);
        let _ = index.frame(reader, number);
    }
}
