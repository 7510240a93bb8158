//! I/O counters of a block device (`Documentation/block/stat.rst`).

use serde::{Deserialize, Serialize};

/// What a device has done since it appeared. A difference that our own I/O does not explain means
/// that somebody else wrote to it. Comparable only within one boot and one `disk_sequence`, and
/// only a hint: adjacent requests are merged before they are counted, sectors are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoCounters {
    /// Number of this appearance of a disk, unique within a boot (0: unknown to this kernel).
    pub disk_sequence: u64,
    /// Sectors of 512 bytes read.
    pub sectors_read: u64,
    /// Write requests.
    pub writes: u64,
    /// Sectors written.
    pub sectors_written: u64,
    /// Sectors discarded.
    pub sectors_discarded: u64,
    /// Flushes.
    pub flushes: u64,
}

impl IoCounters {
    /// The `stat` attribute: 11 numbers, 15 since 4.18 (discards), 17 since 5.5 (flushes).
    pub(super) fn parse(stat: &str, disk_sequence: u64) -> Option<Self> {
        let fields = stat.split_ascii_whitespace().map(|f| f.parse().ok());
        let fields: Vec<u64> = fields.collect::<Option<_>>()?;
        let optional = |index: usize| fields.get(index).copied().unwrap_or(0);
        Some(Self {
            disk_sequence,
            sectors_read: *fields.get(2)?,
            writes: *fields.get(4)?,
            sectors_written: *fields.get(6)?,
            sectors_discarded: optional(13),
            flushes: optional(15),
        })
    }

    /// Whether anything was changed between `earlier` and this, by anybody.
    pub fn changed_since(&self, earlier: &Self) -> bool {
        self.disk_sequence != earlier.disk_sequence
            || self.writes != earlier.writes
            || self.sectors_written != earlier.sectors_written
            || self.sectors_discarded != earlier.sectors_discarded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lengths_of_the_stat_line_are_understood() {
        let stat = "  10 1 80 5  20 2 160 9  0 14 14  3 0 24 1  7 2\n";
        let counters = IoCounters::parse(stat, 42).unwrap();
        let expected = IoCounters {
            disk_sequence: 42,
            sectors_read: 80,
            writes: 20,
            sectors_written: 160,
            sectors_discarded: 24,
            flushes: 7,
        };
        assert_eq!(counters, expected);
        let old = IoCounters::parse("10 1 80 5 20 2 160 9 0 14 14", 42).unwrap();
        assert_eq!(old, IoCounters { sectors_discarded: 0, flushes: 0, ..expected });
        assert_eq!(IoCounters::parse("10 1 80", 42), None);
        assert_eq!(IoCounters::parse("10 1 x 5 20 2 160 9", 42), None);
    }

    #[test]
    fn reads_and_flushes_are_no_change_but_writes_and_another_disk_are() {
        let before = IoCounters { disk_sequence: 1, sectors_written: 8, ..Default::default() };
        let read = IoCounters { sectors_read: 100, flushes: 1, ..before };
        assert!(!read.changed_since(&before));
        assert!(IoCounters { sectors_written: 16, ..before }.changed_since(&before));
        assert!(IoCounters { sectors_discarded: 16, ..before }.changed_since(&before));
        assert!(IoCounters { disk_sequence: 2, ..before }.changed_since(&before));
    }
}
