//! Starts one after the other, each from what the one before has written.

use super::*;
use crate::dirty::REGION_SECTORS;

const GROUP: GroupId = GroupId([1; 16]);
const VOLUMES: [(VolumeId, u64); 1] = [(VolumeId(1), 4 * REGION_SECTORS)];

/// A start from what lies in the directory, with ids that no other has had.
fn start(dir: &Path, number: u8) -> Opened {
    let (files, found) =
        StateFiles::open(dir, GROUP, &regions(&VOLUMES)).expect("the start before wrote it");
    let opening = Opening {
        group: GROUP,
        name: "shop",
        volumes: &VOLUMES,
        layout: Layout { slots: 256, data_bytes: 32 << 10, frame_bytes: 32 << 10 },
        rings: Vec::new(),
        sync_timeout: None,
        fresh: [1, 2, 3].map(|which| [10 * number + which; 16]),
    };
    opening.open(dir, files, &found, None).expect("a start goes on from the one before")
}

/// An agent is killed right after each start, before it has written anything else. The sequences of
/// every start may be at the target all the same, so a copy of the state from before it is an older one,
/// and has to have a lower generation than the target is told.
#[test]
fn a_start_is_a_writing_of_the_state() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut generation, mut last_seq) = (0, Seq::ZERO);
    for number in 1..5 {
        let opened = start(dir.path(), number);
        assert_eq!(opened.generation_found, generation, "start {number}: what the last one wrote");
        assert!(opened.state.generation > generation, "start {number} counts");
        assert!(opened.core.last_seq() >= last_seq, "start {number}: sequences never go back");
        (generation, last_seq) = (opened.state.generation, opened.core.last_seq());
    }
}
