//! Finding what a range reads as at a position, in anything sorted like an index.

use tidemark_journal::{Sector, Seq, VolumeId};

use super::entry::{CLASS_SECTORS, Content, Key};

/// A range of a volume at a position.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// The volume.
    pub volume: VolumeId,
    /// First sector.
    pub start: u64,
    /// The sector after the last.
    pub end: u64,
    /// The newest sequence that counts.
    pub at: Seq,
}

/// Entries in the order of [`Key`], sought from above.
pub trait Sorted {
    /// Why a seek can fail: an index on disk may be damaged.
    type Error;

    /// The greatest entry that is not above `key`.
    ///
    /// # Errors
    /// When the index cannot be read.
    fn at_or_below(&mut self, key: &Key) -> Result<Option<(Key, Content)>, Self::Error>;
}

/// Collects the extents that overlap the query: of each extent (start and length) the newest
/// version at or below the query's sequence. `classes` is the set of length classes in use, bit by
/// bit.
///
/// # Errors
/// When a seek fails.
pub fn find<S: Sorted>(
    source: &mut S,
    classes: u16,
    query: &Query,
    mut found: impl FnMut(Key, Content),
) -> Result<(), S::Error> {
    for (class, longest) in CLASS_SECTORS.iter().enumerate() {
        if classes & (1 << class) == 0 || query.start >= query.end {
            continue;
        }
        let lowest = (query.start + 1).saturating_sub(*longest);
        let mut probe = Key {
            volume: query.volume,
            class: class as u8,
            start: Sector(query.end - 1),
            sectors: u32::MAX,
            seq: Seq(u64::MAX),
        };
        while let Some((key, content)) = source.at_or_below(&probe)? {
            let inside = key.volume == query.volume && usize::from(key.class) == class;
            if !inside || key.start.0 < lowest {
                break;
            }
            if key.end() > query.start {
                if key.seq <= query.at {
                    found(key, content);
                } else if query.at > Seq::ZERO {
                    let older = source.at_or_below(&Key { seq: query.at, ..key })?;
                    if let Some((key, content)) = older.filter(|(k, _)| k.same_extent(&key)) {
                        found(key, content);
                    }
                }
            }
            // Sequences begin at one, so this is below every version of the extent.
            probe = Key { seq: Seq::ZERO, ..key };
        }
    }
    Ok(())
}
