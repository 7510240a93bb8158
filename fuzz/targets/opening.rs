//! A source's start from whatever its state directory holds. The input is a number of bytes for `terms.json`
//! (2 bytes), these without their checksum, and patches on empty files: of the state, of the log, of a
//! volume's map, of leases. The second copy of each file is not there.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tidemark_agent::capture::ring::Layout;
use tidemark_agent::dirty::{REGION_SECTORS, active, bitmap};
use tidemark_agent::group::opening::{Opened, Opening};
use tidemark_agent::state::{COUNT_MAX, block::GroupState, files::StateFiles, leases};
use tidemark_fuzz::{apply, files::Files, patches, seal, seal_blocks};
use tidemark_journal::checksum::crc64;
use tidemark_journal::{GroupId, VolumeId};

const GROUP: GroupId = GroupId([1; 16]);
const REGIONS: u32 = 100;
const VOLUMES: [(VolumeId, u64); 1] = [(VolumeId(1), REGIONS as u64 * REGION_SECTORS)];
const STATE_BYTES: usize = 8192;
const MAP_BYTES: usize = 8192;

fuzz_target!(|bytes: &[u8]| {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (terms, rest) = rest.split_at(length);
    assert_eq!(MAP_BYTES as u64, bitmap::file_bytes(REGIONS));
    // One after the other, as the places of patches see them.
    let mut all = vec![0; STATE_BYTES + MAP_BYTES + leases::BYTES + active::LOG_BYTES as usize];
    patches(rest).for_each(|patch| apply(&mut all, patch));
    let (state, rest) = all.split_at_mut(STATE_BYTES);
    let (map, rest) = rest.split_at_mut(MAP_BYTES);
    let (lease, log) = rest.split_at_mut(leases::BYTES);
    for block in state.chunks_exact_mut(STATE_BYTES / 2) {
        seal(block, 0..128, 128);
        seal(block, 136..160, 160);
    }
    seal_blocks(map, 56);
    seal(lease, 0..32, 32);
    seal_blocks(log, 56);
    let blocks = state.chunks(STATE_BYTES / 2).filter_map(GroupState::decode);
    let counter = blocks.map(|(counter, _)| counter).max().unwrap_or_default();
    let files = Files::default();
    for (name, content) in
        [("state", state), ("1.map", map), ("leases", lease), ("active.log", log)]
    {
        files.put(name, content.to_vec());
    }
    if !terms.is_empty() {
        let sum = format!("\n{:016x}\n", crc64(terms));
        files.put("terms.json", [terms, sum.as_bytes()].concat());
    }
    let Some(first) = open(&files, [9; 16]) else { return };
    assert!(
        first.core.last_seq() <= first.state.ceiling,
        "no sequence is used before it is reserved"
    );
    // What a start has written can be read by the next one, while there are numbers left to count with. Its
    // ids are random: none is of a term that there was.
    let (state, terms) = (first.state, first.ancestry.terms());
    let numbers = [counter, state.generation, state.time_ceiling_ns, state.ceiling.0];
    let fork_seq = first.ancestry.current().fork_seq.0;
    if numbers.iter().chain([&fork_seq]).all(|number| *number <= COUNT_MAX / 2) {
        let unused = |id: &[u8; 16]| terms.iter().all(|term| term.id.0 != *id);
        let id = (1u128..).map(u128::to_le_bytes).find(unused).expect("more ids than terms");
        let again = open(&files, id).expect("it was written just now");
        assert!(again.core.last_seq() >= first.core.last_seq(), "sequences never go back");
        assert_eq!(again.state.generation, state.generation, "no target has been told of it");
    }
});

fn open(files: &Files, term: [u8; 16]) -> Option<Opened> {
    let dir = Path::new("/state");
    let volumes = [(VOLUMES[0].0, REGIONS)];
    let (state, found) = StateFiles::on(Box::new(files.clone()), dir, GROUP, &volumes).ok()?;
    let opening = Opening {
        group: GROUP,
        name: "shop",
        volumes: &VOLUMES,
        layout: Layout { slots: 256, data_bytes: 32 << 10, frame_bytes: 32 << 10 },
        active_max: active::SLOTS,
        rings: Vec::new(),
        sync_timeout: None,
        fresh: [term, *b"map-id-of-16-byt", [10; 16]],
    };
    opening.open(dir, state, &found, None).ok()
}
