//! Newtypes for identities, places and sequences.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes in a sector, the unit of every address.
pub const SECTOR_BYTES: u64 = 512;

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// A fresh random id from the kernel's generator.
            ///
            /// # Errors
            /// When the kernel has no randomness to give.
            pub fn random() -> std::io::Result<Self> {
                let mut bytes = [0; 16];
                getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
                Ok(Self(bytes))
            }

            /// Whether every byte is zero, which means "none".
            pub fn is_nil(&self) -> bool {
                self.0 == [0; 16]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                u128::from_str_radix(text, 16)
                    .ok()
                    .filter(|_| text.len() == 32 && !text.starts_with('+'))
                    .map(|id| Self(id.to_be_bytes()))
                    .ok_or_else(|| ParseIdError(text.chars().take(64).collect()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id128! {
    /// A group: the volumes of one source that share one write order. Shown as 32 hex digits.
    GroupId
}
id128! {
    /// A term: a stretch of history by one writer. Shown as 32 hex digits.
    TermId
}

/// A text that is not 32 hex digits.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not an id: 32 hexadecimal digits are wanted")]
pub struct ParseIdError(String);

/// A volume's number inside its group, stable for the life of the group.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct VolumeId(pub u16);

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A record's place in its group's total order. Zero is "before the first record".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl Seq {
    /// The place before the first record.
    pub const ZERO: Seq = Seq(0);

    /// The last place that is taken from outside, be it of a frame, a peer or a file: with room above it,
    /// no sum with a sequence can overflow. A million records a second reach it in 146,000 years.
    pub const MAX: Seq = Seq((1 << 62) - 1);

    /// The next place in the order.
    pub fn next(self) -> Seq {
        Seq(self.0 + 1)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl<'de> Deserialize<'de> for Seq {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seq = Seq(u64::deserialize(deserializer)?);
        let possible = seq <= Seq::MAX;
        possible.then_some(seq).ok_or_else(|| {
            serde::de::Error::custom(format_args!("{seq} is above the last sequence there can be"))
        })
    }
}

/// An address on a volume, in sectors of 512 bytes.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Sector(pub u64);

impl Sector {
    /// The address in bytes.
    pub fn bytes(self) -> u64 {
        self.0 * SECTOR_BYTES
    }
}

/// A place in a group's history: a term and a sequence on its path.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, Default, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Position {
    /// The writer's stretch of history.
    pub term: TermId,
    /// The last record that is part of the state at this position.
    pub seq: Seq,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.term, self.seq)
    }
}
