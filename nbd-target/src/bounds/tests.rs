//! Rows and files with numbers that no target writes are damaged, and nothing is done by them.

use std::collections::BTreeMap;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tidemark_journal::{GroupId, VolumeId, checksum::crc64};

use crate::{
    catalogue::{HistoryRow, Vitals},
    damage::DamageRow,
    machine::Machine,
    scrub::ScrubRow,
    store::base::{Base, BaseRow, apply::Change, apply::NewContent},
};

/// A row is read as it is, and refused with another value at this place.
fn refused<T: Serialize + DeserializeOwned>(row: &Value, place: &str, value: Value) {
    serde_json::from_value::<T>(row.clone()).expect("a good row");
    let mut changed = row.clone();
    *changed.pointer_mut(place).expect(place) = value;
    assert!(serde_json::from_value::<T>(changed).is_err(), "{place}");
}

/// Sizes in bytes, and the next of what they count, wrapped in a release build.
#[test]
fn rows_with_impossible_numbers_are_damaged() {
    let row = json!({ "generation": 1, "blocks": 1 });
    refused::<BaseRow>(&row, "/generation", u64::MAX.into());
    refused::<BaseRow>(&row, "/blocks", (1u64 << 52).into());
    let row = serde_json::to_value(Vitals::default()).expect("a row");
    refused::<Vitals>(&row, "/received_ns", u64::MAX.into());
    refused::<Vitals>(&row, "/acked/seq", u64::MAX.into());
    let mut row = serde_json::to_value(HistoryRow::default()).expect("a row");
    refused::<HistoryRow>(&row, "/first_segment", u64::MAX.into());
    row["history"]["volumes"] = json!([{
        "id": 1, "name": "data", "logical_block_bytes": 512, "physical_block_bytes": 512,
        "sizes": [{ "from": 0, "sectors": 8 }], "added": 0, "removed": null, "gaps": [],
        "unreadable": [{ "seq": 1, "start": 8, "sectors": 8 }],
    }]);
    refused::<HistoryRow>(&row, "/history/volumes/0/sizes/0/sectors", (1u64 << 55).into());
    refused::<HistoryRow>(&row, "/history/volumes/0/unreadable/0/start", u64::MAX.into());
    let row = serde_json::to_value(ScrubRow::default()).expect("a row");
    refused::<ScrubRow>(&row, "/mended_total", u64::MAX.into());
}

/// Its bytes were counted as nearly 2^64.
#[test]
fn damage_that_ends_before_it_begins_is_no_row() {
    let row = json!({ "unlisted": 0, "spots": [{
        "place": { "header": { "segment": 1 } }, "text": "damaged", "found_wall_ns": 1,
        "extents": [{ "volume": 1, "start": 8, "end": 16, "from": 1, "until": null }],
    }]});
    refused::<DamageRow>(&row, "/spots/0/extents/0/start", 17.into());
    refused::<DamageRow>(&row, "/spots/0/extents/0/end", u64::MAX.into());
}

/// Block 2^52 begins at byte 2^64, and the maps of so long a base took more memory than there is.
#[test]
fn a_redo_beyond_every_volume_is_not_done() {
    let dir = tempfile::tempdir().expect("a directory");
    let (group, volume) = (GroupId([1; 16]), VolumeId(1));
    let open = |rows: &BTreeMap<VolumeId, BaseRow>| {
        Base::open(&Machine::Real, dir.path(), group, rows).expect("opened").0
    };
    let base = open(&BTreeMap::new());
    let content = NewContent::Data(vec![5; 4096]);
    base.apply(&Change { volume, first: 0, content }, &mut Vec::new()).expect("applied");
    let rows = base.finish().expect("durable");
    drop(base);
    let mut entry = volume.0.to_le_bytes().to_vec();
    entry.extend_from_slice(&[0; 6]);
    entry.extend_from_slice(&(1u64 << 52).to_le_bytes());
    entry.extend_from_slice(&[9; 4096]);
    let crc = crc64(&entry);
    entry.extend_from_slice(&crc.to_le_bytes());
    std::fs::write(dir.path().join("fold.redo"), entry).expect("written");
    let (block, _) = open(&rows).block(volume, 0).expect("good");
    assert_eq!(block, [5; 4096]);
}
