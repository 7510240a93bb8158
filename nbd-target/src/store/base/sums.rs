//! The format of a volume's file of sums.
//!
//! The file is made of sectors of 512 bytes, because a sector is what a disk writes whole or not at
//! all: no crash can tear one, so nothing but damage makes its checksum fail. Sector 0 is the
//! [`Header`]; the next seven are zeros. Then follow stretches of 4033 sectors, each for 254,016
//! blocks (just under 1 GiB) of the volume: a map, and 4032 units.
//!
//! | a sector of | holds |
//! |---|---|
//! | a map | 4032 bits, the lowest of a byte first: whether the unit of that number has been written |
//! | a unit | 63 sums of eight bytes, one for each block of 4096 bytes |
//!
//! Both end with a checksum in their last eight bytes, which is over the other 504, the group's id
//! (16), the volume's number (2) and the sector's number in the file (8): a sector of another file
//! or place is not taken for this one's. The map says which units count, so that nothing is told by
//! a hole: a unit that the map names and that is not there is damage. A unit that was never written
//! is what the header says of the rest. The map comes before its units so that the file grows at
//! its end as the volume does.

use tidemark_journal::{
    GroupId, VolumeId,
    checksum::{crc64, crc64_of},
};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Bytes in a sector of the file.
pub const SECTOR: usize = 512;
/// Bytes of it that are content.
pub const CONTENT: usize = SECTOR - 8;
/// Blocks whose sums a unit holds.
pub const UNIT_BLOCKS: u64 = CONTENT as u64 / 8;
/// Units that a map knows.
pub const MAP_UNITS: u64 = CONTENT as u64 * 8;
/// Sectors before the first stretch.
const HEAD_SECTORS: u64 = 8;

/// What is at the start of the file.
pub const MAGIC: [u8; 8] = *b"TMBASE\0\x01";
/// The version of the format.
pub const VERSION: u32 = 1;

/// What the header says: whose base it is, and how new.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The group.
    pub group: GroupId,
    /// The volume.
    pub volume: VolumeId,
    /// Counts the folds that changed this volume; the catalogue has it too.
    pub generation: u64,
    /// What the blocks of units that were never written are.
    pub rest: Rest,
}

/// What a block is that no unit speaks of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Rest {
    /// Never written: zeros.
    Zeros = 0,
    /// Unknown: what was here before has been lost.
    Unknown = 1,
}

/// The header as it is stored.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | magic `TMBASE`, 0, 1 |
/// | 8 | 4 | version: 1 |
/// | 12 | 4 | units never written: 0 zeros, 1 unknown |
/// | 16 | 16 | group id |
/// | 32 | 2 | volume |
/// | 34 | 6 | zeros |
/// | 40 | 8 | generation |
/// | 48 | 456 | zeros |
/// | 504 | 8 | CRC-64/NVME of the other 504 bytes |
///
/// Its checksum is over these bytes alone, so that another group's header can be read and named.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StoredHeader {
    magic: [u8; 8],
    version: U32,
    rest: U32,
    group: [u8; 16],
    volume: U16,
    reserved: [u8; 6],
    generation: U64,
    reserved_more: [u8; 456],
    crc: U64,
}

const _: () = assert!(size_of::<StoredHeader>() == SECTOR);

impl Header {
    /// The header's sector.
    pub fn encode(&self) -> [u8; SECTOR] {
        let mut stored = StoredHeader {
            magic: MAGIC,
            version: VERSION.into(),
            rest: (self.rest as u32).into(),
            group: self.group.0,
            volume: self.volume.0.into(),
            reserved: [0; 6],
            generation: self.generation.into(),
            reserved_more: [0; 456],
            crc: 0.into(),
        };
        stored.crc = crc64(&stored.as_bytes()[..CONTENT]).into();
        let mut sector = [0; SECTOR];
        sector.copy_from_slice(stored.as_bytes());
        sector
    }

    /// Reads a header's sector.
    ///
    /// # Errors
    /// What is wrong with it, as a clause.
    pub fn decode(sector: &[u8; SECTOR]) -> Result<Header, String> {
        let stored = StoredHeader::read_from_bytes(sector).map_err(|error| error.to_string())?;
        if stored.magic != MAGIC || crc64(&sector[..CONTENT]) != stored.crc.get() {
            return Err("its header is damaged".to_owned());
        }
        if stored.version.get() != VERSION {
            return Err(format!(
                "it has version {}; this program reads version {VERSION}",
                stored.version
            ));
        }
        let rest = match stored.rest.get() {
            0 => Rest::Zeros,
            1 => Rest::Unknown,
            other => return Err(format!("its header has an unknown word, {other}")),
        };
        Ok(Header {
            group: GroupId(stored.group),
            volume: VolumeId(stored.volume.get()),
            generation: stored.generation.get(),
            rest,
        })
    }
}

/// What the checksums of a file's sectors cover besides their content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seal {
    /// The group.
    pub group: GroupId,
    /// The volume.
    pub volume: VolumeId,
}

impl Seal {
    /// A sector with this content, for its place.
    pub fn seal(&self, content: &[u8; CONTENT], number: u64) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        let (body, crc) = sector.split_at_mut(CONTENT);
        body.copy_from_slice(content);
        crc.copy_from_slice(&self.crc(content, number).to_le_bytes());
        sector
    }

    /// The content of a sector, if it is good and of this place.
    pub fn open(&self, sector: &[u8; SECTOR], number: u64) -> Option<[u8; CONTENT]> {
        let (content, crc) = sector.split_at(CONTENT);
        let content = content.try_into().ok()?;
        (self.crc(&content, number).to_le_bytes() == *crc).then_some(content)
    }

    fn crc(&self, content: &[u8; CONTENT], number: u64) -> u64 {
        let volume = self.volume.0.to_le_bytes();
        crc64_of([&content[..], &self.group.0, &volume, &number.to_le_bytes()])
    }
}

/// The sector of a stretch's map.
pub fn map_sector(stretch: u64) -> u64 {
    HEAD_SECTORS + stretch * (1 + MAP_UNITS)
}

/// The sector of a unit.
pub fn unit_sector(unit: u64) -> u64 {
    map_sector(unit / MAP_UNITS) + 1 + unit % MAP_UNITS
}

/// The stretches that so many blocks take.
pub fn stretches(blocks: u64) -> u64 {
    blocks.div_ceil(UNIT_BLOCKS * MAP_UNITS)
}

/// Bytes of a file for so many blocks.
pub fn file_bytes(blocks: u64) -> u64 {
    map_sector(stretches(blocks)) * SECTOR as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEAL: Seal = Seal { group: GroupId([7; 16]), volume: VolumeId(0x0201) };

    #[test]
    fn the_header_is_these_bytes() {
        let header = Header {
            group: SEAL.group,
            volume: SEAL.volume,
            generation: 0x0807_0605_0403_0201,
            rest: Rest::Unknown,
        };
        let sector = header.encode();
        let mut golden = Vec::from(*b"TMBASE\0\x01\x01\0\0\0\x01\0\0\0");
        golden.extend([7; 16]);
        golden.extend([1, 2, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        golden.resize(504, 0);
        golden.extend(0xdcba_284c_c5e4_b27a_u64.to_le_bytes());
        assert_eq!(sector[..], golden[..]);
        assert_eq!(Header::decode(&sector), Ok(header));
        for at in 0..SECTOR {
            let mut damaged = sector;
            damaged[at] ^= 0x10;
            assert!(Header::decode(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_sector_is_these_bytes_and_of_its_place() {
        let mut content = [0; CONTENT];
        content[0] = 5;
        content[503] = 6;
        let sector = SEAL.seal(&content, unit_sector(1));
        assert_eq!(sector[..CONTENT], content);
        assert_eq!(sector[CONTENT..], 0xd134_5473_93e6_d8e2_u64.to_le_bytes());
        assert_eq!(SEAL.open(&sector, 10), Some(content));
        assert_eq!(SEAL.open(&sector, 11), None, "another place");
        let other = Seal { volume: VolumeId(1), ..SEAL };
        assert_eq!(other.open(&sector, 10), None, "another volume");
        let other = Seal { group: GroupId([8; 16]), ..SEAL };
        assert_eq!(other.open(&sector, 10), None, "another group");
        assert_eq!(SEAL.open(&[0; SECTOR], 10), None, "a hole");
    }

    #[test]
    fn places_follow_each_other() {
        assert_eq!((map_sector(0), unit_sector(0), unit_sector(4031)), (8, 9, 4040));
        assert_eq!((map_sector(1), unit_sector(4032)), (4041, 4042));
        assert_eq!((stretches(0), stretches(254_016), stretches(254_017)), (0, 1, 2));
        assert_eq!(file_bytes(1), 4041 * 512);
    }
}
