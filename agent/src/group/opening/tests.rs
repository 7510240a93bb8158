//! Starts one after the other, each from what the one before has written.

use super::*;
use crate::dirty::{REGION_SECTORS, active::SLOTS};

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
        active_max: SLOTS,
        rings: Vec::new(),
        sync_timeout: None,
        fresh: [1, 2, 3].map(|which| [10 * number + which; 16]),
    };
    opening.open(dir, files, &found, None).expect("a start goes on from the one before")
}

/// An agent is killed right after each start, before a target has welcomed it. Its sequences never go back;
/// and as no target knows of any of these lives, the next greeting is that of the first: else a source that
/// was rolled back would come to the generation that the target knows, and pass for the newest.
#[test]
fn a_start_of_which_no_target_knows_is_not_counted() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut last_seq = Seq::ZERO;
    for number in 1..5 {
        let opened = start(dir.path(), number);
        assert_eq!(opened.state.generation, 0, "start {number}");
        assert!(opened.core.last_seq() > last_seq || number == 1, "start {number}");
        last_seq = opened.core.last_seq();
    }
}
