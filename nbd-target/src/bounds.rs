//! Bounds of the numbers that are read back from the catalogue: with them no sum can overflow, which in a
//! release build would give a wrong place instead of an error. A row that breaks one is damaged.

use serde::{Deserialize, Deserializer, de::Error};

/// The highest that anything counted comes to.
pub const COUNT_MAX: u64 = 1 << 62;
/// The sectors of the largest volume.
pub const SECTORS_MAX: u64 = 1 << 48;
/// The bytes of the largest file.
pub const FILE_BYTES_MAX: u64 = 1 << 48;

/// For serde's `deserialize_with`: a number of at most `MAX`.
///
/// # Errors
/// A higher one.
pub fn at_most<'de, const MAX: u64, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let number = u64::deserialize(from)?;
    let above = || D::Error::custom(format_args!("{number} is above {MAX}, the most there can be"));
    (number <= MAX).then_some(number).ok_or_else(above)
}

#[cfg(test)]
mod tests;
