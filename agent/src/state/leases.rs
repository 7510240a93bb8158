//! What the state says of leases that this agent's target may hold: durable before the first is
//! granted, so that the next agent knows that it has to outlast them (design, section 18).

use std::{io, path::Path, time::Duration};

use tidemark_journal::{GroupId, checksum::crc64};
use tidemark_link::lease::LEASE_MAX;

/// The file's name.
pub const FILE: &str = "leases";
/// Its length.
pub const BYTES: usize = 40;
const MAGIC: &[u8; 4] = b"TMLS";
const VERSION: u16 = 1;

/// The file's content.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 4 | magic `TMLS` |
/// | 4 | 2 | version, 1 |
/// | 6 | 2 | reserved |
/// | 8 | 16 | group |
/// | 24 | 8 | the longest lease that is granted, nanoseconds; 0: none is |
/// | 32 | 8 | checksum of the bytes before |
pub fn encode(group: GroupId, lease: Duration) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[..4].copy_from_slice(MAGIC);
    bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
    bytes[8..24].copy_from_slice(&group.0);
    let lease_ns = u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX);
    bytes[24..32].copy_from_slice(&lease_ns.to_le_bytes());
    let sum = crc64(&bytes[..32]);
    bytes[32..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The longest lease that may have been granted; none if none was. What cannot be read stands for the
/// longest that there can be.
pub fn decode(bytes: &[u8], group: GroupId) -> Option<Duration> {
    let lease_ns: Option<[u8; 8]> = bytes.get(24..32).and_then(|ns| ns.try_into().ok());
    let lease = lease_ns.map_or(LEASE_MAX, |ns| Duration::from_nanos(u64::from_le_bytes(ns)));
    let whole = lease <= LEASE_MAX && encode(group, lease) == bytes;
    let lease = if whole { lease } else { LEASE_MAX };
    Some(lease).filter(|lease| !lease.is_zero())
}

/// The same of a group's state directory, without the rest of its state.
pub fn left_in(dir: &Path, group: GroupId) -> Option<Duration> {
    match std::fs::read(dir.join(FILE)) {
        Ok(bytes) => decode(&bytes, group),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(LEASE_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: GroupId = GroupId([0xab; 16]);

    #[test]
    fn the_bytes_are_as_documented() {
        let bytes = encode(GROUP, Duration::from_secs(2));
        let mut golden = b"TMLS\x01\0\0\0".to_vec();
        golden.extend([0xab; 16]);
        golden.extend([0, 0x94, 0x35, 0x77, 0, 0, 0, 0]);
        golden.extend([93, 84, 32, 30, 109, 3, 179, 7]);
        assert_eq!(bytes[..], golden[..]);
        assert_eq!(decode(&bytes, GROUP), Some(Duration::from_secs(2)));
        assert_eq!(decode(&encode(GROUP, Duration::ZERO), GROUP), None);
    }

    #[test]
    fn what_cannot_be_read_stands_for_the_longest() {
        let bytes = encode(GROUP, Duration::from_secs(2));
        for at in 0..BYTES {
            let mut bytes = bytes;
            bytes[at] ^= 1;
            assert_eq!(decode(&bytes, GROUP), Some(LEASE_MAX), "byte {at}");
        }
        assert_eq!(decode(&bytes, GroupId([1; 16])), Some(LEASE_MAX));
        assert_eq!(decode(&bytes[..30], GROUP), Some(LEASE_MAX));
        assert_eq!(decode(&[], GROUP), Some(LEASE_MAX));
        assert_eq!(decode(&encode(GROUP, LEASE_MAX * 2), GROUP), Some(LEASE_MAX));
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(left_in(dir.path(), GROUP), None);
        std::fs::write(dir.path().join(FILE), bytes).unwrap();
        assert_eq!(left_in(dir.path(), GROUP), Some(Duration::from_secs(2)));
    }
}
