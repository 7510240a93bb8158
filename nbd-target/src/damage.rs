//! What is damaged of a replica, and which points that concerns.
//!
//! A damaged place holds content of some extents. Each of them is missing at the positions from the
//! record that wrote it on, up to the one at which it has been overwritten completely: there, points
//! cannot be read in these extents, and everywhere else they can. The list is durable, and a place
//! leaves it when no point that is offered needs it any more.
//!
//! To find that out takes long where much is damaged. A start does not wait for it: of a base that is
//! lost it lists all of the volume, and the thread that scrubs finds out what the log has of it.

mod extents;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use tidemark_journal::{SECTOR_BYTES, Seq, VolumeId};
use tokio::sync::watch;

use crate::{
    bounds::{COUNT_MAX, SECTORS_MAX, at_most},
    catalogue::Catalogue,
    replica::Replica,
    store::{Where, check::What},
};

/// The most places that are listed of a group.
const SPOTS_MAX: usize = 1000;
/// The most extents of all of them.
const EXTENTS_MAX: usize = 16 << 10;
/// The most places that wait to be looked at.
const SUSPECTS_MAX: usize = 1000;
/// Sectors of a region, in which the source is asked for content.
const REGION_SECTORS: u64 = 2048;

/// Where something is not as it was written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// A segment's header: no point needs it.
    Header {
        /// The segment.
        segment: u64,
    },
    /// The meta of a frame: its times are lost, its content is found without it.
    Frame {
        /// The segment.
        segment: u64,
        /// Byte at which it begins.
        at: u64,
    },
    /// A chunk.
    Chunk {
        /// The segment.
        segment: u64,
        /// Its number there.
        chunk: u32,
    },
    /// Bytes between frames: no point needs them.
    Padding {
        /// The segment.
        segment: u64,
    },
    /// The index of a segment, which cannot be made anew since a frame's meta is damaged too.
    Index {
        /// The segment.
        segment: u64,
    },
    /// A segment's end: no point needs it.
    End {
        /// The segment.
        segment: u64,
    },
    /// Blocks of the base.
    Base {
        /// The volume.
        volume: VolumeId,
        /// The first block of 4096 bytes.
        first: u64,
        /// How many.
        blocks: u64,
    },
}

/// A damaged place.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Spot {
    /// Where.
    pub place: Place,
    /// What is wrong, as a sentence.
    pub text: String,
    /// When it was found, nanoseconds since 1970.
    pub found_wall_ns: i64,
    /// What cannot be read because of it.
    #[serde(deserialize_with = "ranges")]
    pub extents: Vec<Extent>,
}

/// Sectors that cannot be read at some positions.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Extent {
    /// The volume.
    pub volume: VolumeId,
    /// First sector.
    #[serde(deserialize_with = "at_most::<SECTORS_MAX, _>")]
    pub start: u64,
    /// The sector after the last.
    #[serde(deserialize_with = "at_most::<SECTORS_MAX, _>")]
    pub end: u64,
    /// The first position concerned.
    pub from: Seq,
    /// The position from which on it is good again; none as long as the newest is concerned.
    pub until: Option<Seq>,
}

/// Extents as the catalogue has them: none ends before it begins.
fn ranges<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Extent>, D::Error> {
    let extents = Vec::<Extent>::deserialize(from)?;
    let ranges = extents.iter().all(|extent| extent.start <= extent.end);
    ranges
        .then_some(extents)
        .ok_or_else(|| D::Error::custom("an extent that ends before it begins"))
}

/// What the catalogue keeps.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct DamageRow {
    /// The places.
    pub spots: Vec<Spot>,
    /// Places that were found and are not listed, since there are too many.
    #[serde(deserialize_with = "at_most::<COUNT_MAX, _>")]
    pub unlisted: u64,
}

/// Positions of a volume at which something of it cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stretch {
    /// The volume.
    pub volume: VolumeId,
    /// The first position.
    pub from: Seq,
    /// The position from which on it is good again.
    pub until: Option<Seq>,
    /// How much cannot be read.
    pub bytes: u64,
}

/// The damage of a replica, or of a branch's log: no extents are kept of that, since they change with
/// what is written into it.
pub struct Damages {
    group: String,
    catalogue: Arc<Catalogue>,
    row: Mutex<DamageRow>,
    suspects: Mutex<Vec<Where>>,
    /// The newest position up to which the extents were looked at.
    seen: AtomicU64,
    /// Counts the changes.
    changes: watch::Sender<u64>,
}

impl Damages {
    /// The damage of a group or a branch, as the catalogue has it under this name.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn open(group: &str, catalogue: &Arc<Catalogue>) -> anyhow::Result<Damages> {
        Ok(Damages {
            group: group.to_owned(),
            catalogue: Arc::clone(catalogue),
            row: Mutex::new(catalogue.damages(group)?),
            suspects: Mutex::default(),
            seen: AtomicU64::new(0),
            changes: watch::Sender::new(0),
        })
    }

    /// A read has met damage there: it is looked at soon.
    pub fn suspect(&self, place: Where) {
        let mut suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        if suspects.len() < SUSPECTS_MAX && !suspects.contains(&place) {
            suspects.push(place);
        }
    }

    /// What is to be looked at.
    pub fn take_suspects(&self) -> Vec<Where> {
        std::mem::take(&mut *self.suspects.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts what was found now in place of what was known of these places.
    pub fn replace(&self, of: impl Fn(&Place) -> bool, found: Vec<Spot>) {
        let mut row = self.lock();
        let before = row.clone();
        let mut known: BTreeMap<Place, Spot> = BTreeMap::new();
        row.spots.retain(|spot| {
            let replaced = of(&spot.place);
            if replaced {
                known.insert(spot.place, spot.clone());
            }
            !replaced
        });
        for spot in found {
            match known.remove(&spot.place) {
                Some(old) => row.spots.push(old),
                None => self.add(&mut row, spot),
            }
        }
        self.keep(row, &before);
    }

    /// Adds a place unless all of it is known, or opens again what it is listed with. Says whether it
    /// brings something new.
    pub fn report(&self, spot: Spot) -> bool {
        let mut row = self.lock();
        if row.spots.iter().any(|known| known.covers(&spot)) {
            return false;
        }
        let before = row.clone();
        match row.spots.iter_mut().find(|known| known.place == spot.place) {
            Some(known) => (known.text, known.extents) = (spot.text, spot.extents),
            None => self.add(&mut row, spot),
        }
        self.keep(row, &before);
        true
    }

    /// Looks again at what the positions received meanwhile mean for the extents, and drops what no
    /// point needs any more. Blocks on the disk, until `goes_on` says that it is to give up.
    pub fn refresh(&self, replica: &Replica, goes_on: &dyn Fn() -> bool) {
        let end = replica.journal().progress().durable.seq;
        let (oldest, first_segment) = {
            let row = replica.ledger().row();
            (row.history.oldest, row.first_segment)
        };
        let known = self.lock().clone();
        let moved = self.seen.load(Ordering::Relaxed) != end.0;
        if known.spots.is_empty() {
            return;
        }
        let mut left: Vec<Spot> = Vec::new();
        for mut spot in known.spots.iter().cloned() {
            let had = !spot.extents.is_empty();
            if moved {
                let now = extents::look_again(replica, &spot.place, &spot.extents, end, goes_on);
                let Some(extents) = now else { return };
                spot.extents = extents;
            }
            spot.extents.retain(|extent| extent.until.is_none_or(|until| until > oldest));
            let needed = !had || !spot.extents.is_empty();
            if needed && spot.place.segment().is_none_or(|segment| segment >= first_segment) {
                left.push(spot);
            } else {
                tracing::info!(group = %self.group, "no point needs it any more: {}", spot.text);
            }
        }
        self.seen.store(end.0, Ordering::Relaxed);
        let mut row = self.lock();
        // What was found meanwhile has been looked at just now.
        let before = row.clone();
        row.spots.retain(|spot| !known.spots.iter().any(|old| old.place == spot.place));
        row.spots.extend(left);
        if row.spots.is_empty() {
            row.unlisted = 0;
        }
        self.keep(row, &before);
    }

    /// The places.
    pub fn list(&self) -> Vec<Spot> {
        self.lock().spots.clone()
    }

    /// What is listed of a place.
    fn known(&self, place: &Place) -> Option<Spot> {
        self.lock().spots.iter().find(|spot| spot.place == *place).cloned()
    }

    /// Places that are not listed.
    pub fn unlisted(&self) -> u64 {
        self.lock().unlisted
    }

    /// The positions concerned, by volume and stretch, in the order of the volumes.
    pub fn stretches(&self) -> Vec<Stretch> {
        let mut bytes: BTreeMap<(VolumeId, Seq, Option<Seq>), u64> = BTreeMap::new();
        for extent in self.lock().spots.iter().flat_map(|spot| &spot.extents) {
            let sum = bytes.entry((extent.volume, extent.from, extent.until)).or_default();
            *sum += (extent.end - extent.start) * SECTOR_BYTES;
        }
        let stretch = |((volume, from, until), bytes)| Stretch { volume, from, until, bytes };
        bytes.into_iter().map(stretch).collect()
    }

    /// How much of each volume cannot be read at a position.
    pub fn at(&self, seq: Seq) -> BTreeMap<VolumeId, u64> {
        let mut bytes = BTreeMap::new();
        for stretch in self.stretches() {
            if stretch.contains(seq) {
                *bytes.entry(stretch.volume).or_default() += stretch.bytes;
            }
        }
        bytes
    }

    /// The regions that cannot be read at the newest position: first and number, by volume.
    pub fn regions(&self) -> Vec<(VolumeId, u64, u64)> {
        let mut all: Vec<(VolumeId, u64, u64)> = Vec::new();
        let mut open: Vec<Extent> = self
            .lock()
            .spots
            .iter()
            .flat_map(|spot| spot.extents.iter().copied())
            .filter(|extent| extent.until.is_none() && extent.start < extent.end)
            .collect();
        open.sort_unstable();
        for extent in open {
            let first = extent.start / REGION_SECTORS;
            let after = (extent.end - 1) / REGION_SECTORS + 1;
            match all.last_mut() {
                Some((volume, at, count)) if *volume == extent.volume && first <= *at + *count => {
                    *count = (*count).max(after - *at);
                }
                _ => all.push((extent.volume, first, after - first)),
            }
        }
        all
    }

    /// Follows the changes.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn add(&self, row: &mut DamageRow, mut spot: Spot) {
        tracing::error!(group = %self.group, "damaged: {}", spot.text);
        let extents: usize = row.spots.iter().map(|spot| spot.extents.len()).sum();
        if row.spots.len() >= SPOTS_MAX || extents + spot.extents.len() > EXTENTS_MAX {
            row.unlisted += 1;
            return;
        }
        spot.found_wall_ns = self.catalogue.machine().wall_ns();
        row.spots.push(spot);
    }

    fn keep(&self, mut row: MutexGuard<'_, DamageRow>, before: &DamageRow) {
        row.spots.sort_by_key(|spot| spot.place);
        if *row == *before {
            return;
        }
        // Kept under the lock, so that the catalogue never goes back.
        if let Err(error) = self.catalogue.put_damages(&self.group, &row) {
            tracing::error!(group = %self.group, "the list of damage cannot be kept: {error:#}");
        }
        drop(row);
        self.changes.send_modify(|changes| *changes += 1);
    }

    fn lock(&self) -> MutexGuard<'_, DamageRow> {
        self.row.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stretch {
    /// Whether a position is concerned.
    pub fn contains(&self, seq: Seq) -> bool {
        self.from <= seq && self.until.is_none_or(|until| seq < until)
    }
}

impl Place {
    /// The segment that it is in.
    pub fn segment(&self) -> Option<u64> {
        match *self {
            Place::Header { segment }
            | Place::Frame { segment, .. }
            | Place::Chunk { segment, .. }
            | Place::Padding { segment }
            | Place::Index { segment }
            | Place::End { segment } => Some(segment),
            Place::Base { .. } => None,
        }
    }

    /// A part of a segment.
    pub fn of_segment(segment: u64, what: What) -> Place {
        match what {
            What::Header => Place::Header { segment },
            What::Frame(at) => Place::Frame { segment, at },
            What::Chunk(chunk) => Place::Chunk { segment, chunk },
            What::Padding => Place::Padding { segment },
            What::Index => Place::Index { segment },
            What::End => Place::End { segment },
        }
    }

    fn covers(&self, other: &Place) -> bool {
        match (self, other) {
            (
                Place::Base { volume, first, blocks },
                Place::Base { volume: of, first: start, blocks: count },
            ) => {
                volume == of
                    && first <= start
                    && start.saturating_add(*count) <= first.saturating_add(*blocks)
            }
            _ => self == other,
        }
    }
}

impl Spot {
    /// A place that was found to be damaged, with the extents that it concerns. Blocks on the disk. Where
    /// it would take long to find them out, they are those it is listed with, or else all that it may
    /// concern.
    pub fn found(replica: &Replica, place: Place, text: String) -> Spot {
        let listed = || replica.damages().known(&place).map(|known| known.extents);
        let extents = extents::of(replica, &place)
            .or_else(listed)
            .unwrap_or_else(|| extents::at_most(replica, &place));
        Spot { place, text, found_wall_ns: 0, extents }
    }

    /// All that only the base held of a volume, so many blocks: what a [`refresh`](Damages::refresh) leaves
    /// of it, for nothing is read here. Of what it has found of an earlier loss that stays which is in the
    /// log still.
    pub fn lost(replica: &Replica, volume: VolumeId, blocks: u64, text: String) -> Spot {
        let place = Place::Base { volume, first: 0, blocks };
        let base = replica.ledger().row().base.seq;
        let mut extents = match replica.damages().known(&place) {
            Some(known) => known.extents,
            None => extents::at_most(replica, &place),
        };
        for extent in &mut extents {
            extent.until = extent.until.filter(|until| *until > base);
        }
        Spot { place, text, found_wall_ns: 0, extents }
    }

    /// Whether it says all that another says of the newest position.
    fn covers(&self, other: &Spot) -> bool {
        let open = |extent: &&Extent| extent.until.is_none();
        let lies_inside = |extent: &Extent| {
            let mut at = extent.start;
            let mut around: Vec<&Extent> = self.extents.iter().filter(open).collect();
            around.retain(|known| known.volume == extent.volume && known.from <= extent.from);
            around.sort_unstable_by_key(|known| known.start);
            for known in around {
                if known.start <= at {
                    at = at.max(known.end);
                }
            }
            at >= extent.end
        };
        self.place.covers(&other.place) && other.extents.iter().filter(open).all(lies_inside)
    }
}

pub use extents::unknown_after;
