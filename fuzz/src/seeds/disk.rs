//! Memory and files that are given as patches: a ring, and the base of a volume.

use tidemark_fuzz::patch;
use tidemark_journal::{Kind, checksum::crc64};
use tidemark_target::store::base::BLOCK_BYTES;
use tidemark_target::store::base::sums::{self, CONTENT, Header, Rest, SECTOR};

use crate::{GROUP, VOLUME, put};

pub fn put_all(frame: &[u8]) -> std::io::Result<()> {
    ring(frame)?;
    base()
}

/// A ring of two slots with payload, a reserved one, and a frame.
fn ring(frame: &[u8]) -> std::io::Result<()> {
    // Counters: reserved, encoded, freed; end and start of the frames; last sequence in a frame.
    let mut patches = patch(112, &words(&[3, 1, 0, frame.len() as u64, 0, 111]));
    let slots = [(7, 111, 0), (3, 112, 512), (1, 113, 1024)];
    for (slot, (state, seq, data_at)) in slots.into_iter().enumerate() {
        let mut fields = words(&[state, seq, seq * 1_000_000, 8]);
        fields.extend_from_slice(&[1, 0, 0, 0, 1, 0, Kind::Write as u8, 0]);
        fields.extend_from_slice(&words(&[data_at, 512, data_at + 512]));
        patches.extend(patch(20480 + slot as u64 * 64, &fields));
    }
    patches.extend(patch(20480 + 256 * 64 + (32 << 10), frame));
    put("ring", "two-slots-and-a-frame", &patches)
}

/// A header, a map that knows the first unit, that unit, and a block to be redone. The data is zeros.
fn base() -> std::io::Result<()> {
    let header = Header { group: GROUP, volume: VOLUME, generation: 7, rest: Rest::Zeros };
    let mut map = [0; CONTENT];
    map[0] = 1;
    let zeros = crc64(&[0; BLOCK_BYTES as usize]);
    let unit = words(&[zeros ^ 1, 0, 1, zeros]);
    let at = |sector: u64| sector * SECTOR as u64;
    let mut patches = patch(0, &header.encode());
    patches.extend(patch(at(sums::map_sector(0)), &map[..8]));
    patches.extend(patch(at(sums::unit_sector(0)), &unit));
    let mut entry = VOLUME.0.to_le_bytes().to_vec();
    entry.extend_from_slice(&[0b101, 0, 0, 0, 0, 0]);
    entry.extend_from_slice(&words(&[5]));
    entry.extend_from_slice(&[9; 64]);
    patches.extend(patch(1 << 20, &entry));
    // Its end, so that the entry is as long as one is.
    patches.extend(patch((1 << 20) + 16 + BLOCK_BYTES, &[0; 8]));
    put("base", "a-unit-and-a-redo", &patches)
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
