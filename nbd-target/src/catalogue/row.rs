//! A row's value: a checksum, then JSON.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | CRC-64/NVME of the table's name, a zero, the key, a zero, and the JSON |
//! | 8 | - | JSON |
//!
//! The checksum is over the row's place too, so that a row is not taken for another's.

use anyhow::Context;
use serde::{Serialize, de::DeserializeOwned};
use tidemark_journal::checksum::crc64_of;

/// Where a row stands.
#[derive(Clone, Copy)]
pub struct RowPlace<'a> {
    /// The table's name.
    pub table: &'a str,
    /// The group, or the log.
    pub of: &'a str,
    /// The rest of the key, where it has one.
    pub rest: &'a [u8],
}

impl RowPlace<'_> {
    /// The value's bytes.
    ///
    /// # Errors
    /// When it has no JSON form.
    pub fn seal(&self, value: &impl Serialize) -> anyhow::Result<Vec<u8>> {
        let json = serde_json::to_vec(value)?;
        Ok([self.crc(&json).to_le_bytes().as_slice(), &json].concat())
    }

    /// The value in a row's bytes.
    ///
    /// # Errors
    /// When the bytes are not those that were written there.
    pub fn open<T: DeserializeOwned>(&self, bytes: &[u8]) -> anyhow::Result<T> {
        let json = self.check(bytes)?;
        serde_json::from_slice(json).with_context(|| self.damaged())
    }

    /// The JSON in a row's bytes.
    ///
    /// # Errors
    /// When the bytes are not those that were written there.
    pub fn check<'b>(&self, bytes: &'b [u8]) -> anyhow::Result<&'b [u8]> {
        let (crc, json) = bytes.split_at_checked(8).with_context(|| self.damaged())?;
        anyhow::ensure!(self.crc(json).to_le_bytes() == *crc, self.damaged());
        Ok(json)
    }

    fn crc(&self, json: &[u8]) -> u64 {
        crc64_of([self.table.as_bytes(), &[0], self.of.as_bytes(), &[0], self.rest, &[0], json])
    }

    fn damaged(&self) -> String {
        let Self { table, of, .. } = self;
        format!(
            "a row of '{of}' in the table '{table}' of the catalogue is damaged: stop the target, \
             move catalogue.redb away and start it again, so that it is made anew from its copy"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_holds_only_in_its_place() {
        let place = RowPlace { table: "vitals", of: "shop", rest: &[] };
        let bytes = place.seal(&7).expect("sealed");
        assert_eq!(bytes[8..], *b"7");
        assert_eq!(bytes[..8], crc64_of([b"vitals\0shop\0\0".as_slice(), b"7"]).to_le_bytes());
        assert_eq!(place.open::<u64>(&bytes).expect("good"), 7);
        for other in [
            RowPlace { table: "groups", ..place },
            RowPlace { of: "shoq", ..place },
            RowPlace { rest: b"1", ..place },
        ] {
            other.open::<u64>(&bytes).expect_err("another place");
        }
        for at in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            place.open::<u64>(&bytes).expect_err("damaged");
        }
        place.open::<u64>(&bytes[..7]).expect_err("cut short");
    }
}
