//! Places that may be damaged, as whoever reads meets them.

use std::fmt;

use tidemark_journal::VolumeId;

/// Damage that a read has met.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Damage {
    /// What is damaged, as a sentence that names the file and the place in it.
    pub text: String,
    /// Where, when it is a place that can be looked at again.
    pub at: Option<Where>,
}

/// A place in the files of a log or a base.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Where {
    /// A segment, by its id in this process.
    Segment {
        /// The id.
        id: u64,
        /// The chunk concerned; none means the index.
        chunk: Option<u32>,
    },
    /// A run of blocks of a volume's base, or their sums.
    Base {
        /// The volume.
        volume: VolumeId,
        /// The first block.
        first: u64,
        /// How many.
        blocks: u64,
    },
}

impl Damage {
    /// Damage at a place.
    pub fn at(place: Where, text: impl Into<String>) -> Damage {
        Damage { text: text.into(), at: Some(place) }
    }
}

impl From<String> for Damage {
    fn from(text: String) -> Damage {
        Damage { text, at: None }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
