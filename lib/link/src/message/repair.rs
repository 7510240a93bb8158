//! What a target asks of a source when its own copy is damaged.

use tidemark_journal::VolumeId;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// The name under which both sides announce that they know this message.
pub const REPAIR_FEATURE: &str = "repair";
/// The most rows in a message.
pub const REPAIR_ROWS_MAX: usize = 256;
/// Bytes of a row.
pub(super) const ROW_BYTES: usize = size_of::<Row>();

/// Regions whose newest content is damaged at the target: the source compares them with its disk
/// once more, and sends what the target then says it lacks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Repair {
    /// The regions; at least one run and at most [`REPAIR_ROWS_MAX`].
    pub runs: Vec<RegionRun>,
}

/// A run of regions of 1 MiB of one volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct RegionRun {
    /// The volume.
    pub volume: VolumeId,
    /// The first region.
    pub first: u32,
    /// How many, at least one.
    pub regions: u32,
}

/// A row of the body, 12 bytes.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 2 | volume |
/// | 2 | 2 | reserved, zero |
/// | 4 | 4 | first region |
/// | 8 | 4 | regions, at least one |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Row {
    volume: U16,
    reserved: U16,
    first: U32,
    regions: U32,
}

const _: () = assert!(ROW_BYTES == 12);

impl Repair {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        for run in &self.runs {
            let row = Row {
                volume: run.volume.0.into(),
                reserved: 0.into(),
                first: run.first.into(),
                regions: run.regions.into(),
            };
            out.extend_from_slice(row.as_bytes());
        }
    }

    pub(super) fn decode(body: &[u8]) -> Result<Repair, String> {
        let rows = <[Row]>::ref_from_bytes(body).map_err(|_| "it is cut short".to_owned())?;
        let runs = rows.iter().map(|row| {
            let run = RegionRun {
                volume: VolumeId(row.volume.get()),
                first: row.first.get(),
                regions: row.regions.get(),
            };
            if run.regions == 0 || run.first.checked_add(run.regions).is_none() {
                return Err("it names a run of regions that cannot be".to_owned());
            }
            Ok(run)
        });
        Ok(Repair { runs: runs.collect::<Result<_, _>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{DecodeError, Envelope, Message, MessageKind};

    #[test]
    fn its_bytes_are_as_documented() {
        let run = |volume, first, regions| RegionRun { volume: VolumeId(volume), first, regions };
        let message = Message::Repair(Repair { runs: vec![run(1, 2, 3), run(0x0102, 0x0a0b, 1)] });
        let mut bytes = Vec::new();
        message.encode(&mut bytes).expect("short enough");
        let golden = [
            11, 0, 1, 0, 24, 0, 0, 0, // the envelope
            1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, //
            2, 1, 0, 0, 0x0b, 0x0a, 0, 0, 1, 0, 0, 0,
        ];
        assert_eq!(bytes, golden);
        let decoded = Message::decode(MessageKind::Repair, golden[8..].to_vec());
        assert_eq!(decoded, Ok(message));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = |body: Vec<u8>| {
            let error = Message::decode(MessageKind::Repair, body).expect_err("refused");
            assert!(matches!(error, DecodeError::Body { .. } | DecodeError::Length { .. }));
        };
        refused(Vec::new());
        refused(vec![1; 13]);
        // No region, and regions beyond the last there can be.
        refused(vec![0; 12]);
        refused([[0; 4], [0xff; 4], [1, 0, 0, 0]].concat());
        refused(vec![1; 12 * (REPAIR_ROWS_MAX + 1)]);
        assert!(Envelope::new(MessageKind::Repair, 12 * REPAIR_ROWS_MAX).is_ok());
    }
}
