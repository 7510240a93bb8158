//! What both sides find on their own disks after a crash: the agent's state block, terms, log of
//! active regions, bitmaps, leases, disks and verifies, and the rows of the target's catalogue. The first
//! byte says which.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};
use tidemark_agent::dirty::{active, bitmap};
use tidemark_agent::disks::Disks;
use tidemark_agent::state::{block::GroupState, leases};
use tidemark_agent::verify;
use tidemark_fuzz::{seal, seal_blocks};
use tidemark_journal::{Ancestry, GroupId, Position, Seq};
use tidemark_link::lease::LEASE_MAX;
use tidemark_target::catalogue::{BranchRow, GroupRow, HistoryRow, Vitals};
use tidemark_target::damage::DamageRow;
use tidemark_target::scrub::ScrubRow;

/// The map that the blocks of the corpus are of.
const MAP_ID: [u8; 16] = *b"map-id-of-16-byt";

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    match which % 13 {
        0 => block(bytes),
        1 => log(bytes),
        2 => map(bytes),
        3 => {
            if let Some(ancestry) = row::<Ancestry>(bytes) {
                terms(&ancestry);
            }
        }
        4 => drop(row::<GroupRow>(bytes)),
        5 => {
            if let Some(row) = row::<HistoryRow>(bytes) {
                history(row);
            }
        }
        6 => drop(row::<Vitals>(bytes)),
        7 => drop(row::<BranchRow>(bytes)),
        8 => drop(row::<DamageRow>(bytes)),
        9 => drop(row::<ScrubRow>(bytes)),
        10 => drop(row::<Disks>(bytes)),
        11 => drop(row::<verify::Record>(bytes)),
        _ => lease(bytes),
    }
});

fn block(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    seal(&mut bytes, 0..128, 128);
    seal(&mut bytes, 136..160, 160);
    if let Some((counter, mut state)) = GroupState::decode(&bytes) {
        // None is written without its term.
        if state.spooled.seq == Seq::ZERO {
            state.spooled = Position::default();
        }
        assert_eq!(GroupState::decode(&state.encode(counter)), Some((counter, state)));
    }
}

fn lease(bytes: &[u8]) {
    let (mut bytes, group) = (bytes.to_vec(), GroupId([1; 16]));
    seal(&mut bytes, 0..32, 32);
    let lease = leases::decode(&bytes, group);
    assert!(lease.is_none_or(|lease| lease <= LEASE_MAX));
    let again = leases::encode(group, lease.unwrap_or_default());
    assert_eq!(leases::decode(&again, group), lease);
}

fn log(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    seal_blocks(&mut bytes, 56);
    if let Ok(found) = active::recover(&bytes, MAP_ID) {
        assert!(found.active.len() <= active::SLOTS);
    }
}

fn map(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    seal_blocks(&mut bytes, 56);
    for regions in [1, 20_000] {
        let found = bitmap::recover(&bytes, MAP_ID, regions);
        assert!(found.dirty.count() <= regions && found.uncaptured.count() <= regions);
        assert!(found.damaged_pages <= bitmap::pages_in(regions));
    }
}

/// Reads a row; what was read is written and read again as the same.
fn row<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) -> Option<T> {
    let row: T = serde_json::from_slice(bytes).ok()?;
    let again = serde_json::to_vec(&row).expect("plain data has a JSON form");
    assert_eq!(serde_json::from_slice::<T>(&again).ok().as_ref(), Some(&row));
    Some(row)
}

fn terms(ancestry: &Ancestry) {
    for term in ancestry.terms() {
        let at = ancestry.at(term.fork_seq);
        assert!(ancestry.contains(at), "what lies on the path is on it");
        let _ = ancestry.continues(at, ancestry.at(Seq(u64::MAX)));
    }
}

fn history(row: HistoryRow) {
    let mut history = row.history;
    for at in [Seq::ZERO, Seq(1), history.end.seq, Seq(u64::MAX)] {
        let _ = history.position(at);
        for volume in &history.volumes {
            let _ = (volume.sectors_at(at), volume.present_at(at), volume.gap_at(at));
        }
    }
    let names: Vec<String> = history.volumes.iter().map(|volume| volume.name.clone()).collect();
    for name in names {
        assert!(history.volume(&name).is_some());
    }
    // A log that has lost its newer half.
    let (end, oldest) = (history.end, history.oldest);
    history.truncate(Position { seq: Seq(end.seq.0 / 2), ..end }, 0);
    history.raise_oldest(Seq(oldest.0.saturating_add(1)), 0);
}
