//! Sizes and times: a plain number in the base unit, or a text with a unit.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, de};

/// A size: `1073741824` or `"1 GiB"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// A stretch of time: `3600` or `"1 h"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Seconds(pub u64);

/// A text that is no size or time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{found}' is not {what}: a number, alone or followed by one of {units}, is wanted")]
pub struct UnitError {
    found: String,
    what: &'static str,
    units: String,
}

type Unit = (&'static str, u64);

const SIZES: &[Unit] = &[
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];
const TIMES: &[Unit] = &[("s", 1), ("min", 60), ("h", 3600), ("d", 86_400)];

impl Seconds {
    /// The same for the clock.
    pub fn duration(self) -> Duration {
        Duration::from_secs(self.0)
    }
}

impl FromStr for Bytes {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Bytes, UnitError> {
        read(text, "a size", SIZES).map(Bytes)
    }
}

impl FromStr for Seconds {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Seconds, UnitError> {
        read(text, "a time", TIMES).map(Seconds)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write(f, self.0, SIZES.get(..5).unwrap_or(SIZES))
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write(f, self.0, TIMES)
    }
}

fn read(text: &str, what: &'static str, units: &[Unit]) -> Result<u64, UnitError> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start();
    let factor = match unit {
        "" => Some(1),
        _ => units.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor),
    };
    let value = number.parse::<u64>().ok();
    value.zip(factor).and_then(|(value, factor)| value.checked_mul(factor)).ok_or_else(|| {
        UnitError {
            found: text.chars().take(32).collect(),
            what,
            units: units.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
        }
    })
}

/// In the largest unit that leaves a whole number, so that it reads back as the same.
fn write(f: &mut fmt::Formatter<'_>, value: u64, units: &[Unit]) -> fmt::Result {
    let whole = |unit: &&Unit| value != 0 && value.is_multiple_of(unit.1);
    let (name, factor) = units.iter().rev().find(whole).or(units.first()).unwrap_or(&("", 1));
    f.pad(&format!("{} {name}", value / factor))
}

struct Visitor<T>(std::marker::PhantomData<T>, &'static str);

macro_rules! deserialize {
    ($type:ident, $wanted:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Visitor::<$type>(std::marker::PhantomData, $wanted))
            }
        }

        impl de::Visitor<'_> for Visitor<$type> {
            type Value = $type;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.1)
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<$type, E> {
                Ok($type(value))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<$type, E> {
                let wrong = || E::invalid_value(de::Unexpected::Signed(value), &self);
                u64::try_from(value).map($type).map_err(|_| wrong())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                text.parse().map_err(E::custom)
            }
        }
    };
}

deserialize!(Bytes, "a size: bytes, or a text such as \"256 MiB\"");
deserialize!(Seconds, "a time: seconds, or a text such as \"12 h\"");
