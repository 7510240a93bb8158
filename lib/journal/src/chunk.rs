//! Chunks: the unit of compression, encryption and random reads.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::checksum::crc64;

/// The most raw bytes in a chunk: a 4 KiB read never unpacks more than this. At 128 KiB, zstd keeps
/// nine tenths of what 1 MiB would save and unpacks in under 0.1 ms.
pub const CHUNK_BYTES_MAX: usize = 128 << 10;

/// How a chunk's bytes are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Codec {
    fn from_u8(number: u8) -> Option<Codec> {
        [Codec::Raw, Codec::Zstd].into_iter().find(|codec| *codec as u8 == number)
    }
}

/// A chunk's row in the frame's chunk table, 40 bytes.
///
/// The checksum is over the stored bytes, so that whoever moves or scrubs them need not unpack.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 4 | raw bytes, 1 to 131072 |
/// | 4 | 4 | stored bytes; equal to the raw ones when the codec is raw |
/// | 8 | 1 | codec: 0 raw, 1 zstd |
/// | 9 | 7 | reserved, zero |
/// | 16 | 8 | CRC-64/NVME of the stored bytes |
/// | 24 | 16 | authentication tag, zero without encryption |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkEntry {
    /// Bytes after unpacking.
    pub raw_bytes: U32,
    /// Bytes as stored.
    pub stored_bytes: U32,
    /// Number of a [`Codec`].
    pub codec: u8,
    /// Zero.
    pub reserved: [u8; 7],
    /// Checksum of the stored bytes.
    pub crc: U64,
    /// Authentication tag of an encrypted chunk.
    pub tag: [u8; 16],
}

const _: () = assert!(size_of::<ChunkEntry>() == 40);

/// What is wrong with a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChunkError {
    /// The table's row contradicts itself.
    #[error("the chunk's row in the table contradicts itself")]
    Entry,
    /// The stored bytes are not those that were written.
    #[error("the chunk's checksum does not match its bytes")]
    Checksum,
    /// The bytes pass their checksum and yet do not unpack.
    #[error("the chunk does not unpack to the length it states")]
    Unpack,
}

impl ChunkEntry {
    /// Checks the row by itself: lengths in bounds, codec known.
    ///
    /// # Errors
    /// [`ChunkError::Entry`].
    pub fn check(&self) -> Result<Codec, ChunkError> {
        let (raw, stored) = (self.raw_bytes.get() as usize, self.stored_bytes.get() as usize);
        let codec = Codec::from_u8(self.codec).ok_or(ChunkError::Entry)?;
        let fits = match codec {
            Codec::Raw => stored == raw,
            Codec::Zstd => stored > 0 && stored < raw,
        };
        if raw == 0 || raw > CHUNK_BYTES_MAX || !fits {
            return Err(ChunkError::Entry);
        }
        Ok(codec)
    }

    /// Checks that `stored` are the bytes that were written.
    ///
    /// # Errors
    /// [`ChunkError::Entry`] or [`ChunkError::Checksum`].
    pub fn verify(&self, stored: &[u8]) -> Result<(), ChunkError> {
        self.check()?;
        if stored.len() != self.stored_bytes.get() as usize || crc64(stored) != self.crc.get() {
            return Err(ChunkError::Checksum);
        }
        Ok(())
    }

    /// Checks `stored` and puts its raw bytes in `raw`, whose old content is dropped.
    ///
    /// # Errors
    /// Any [`ChunkError`]; `raw` is then of no meaning.
    pub fn unpack(&self, stored: &[u8], raw: &mut Vec<u8>) -> Result<(), ChunkError> {
        let codec = self.check()?;
        self.verify(stored)?;
        raw.clear();
        match codec {
            Codec::Raw => raw.extend_from_slice(stored),
            Codec::Zstd => {
                raw.resize(self.raw_bytes.get() as usize, 0);
                let bytes = zstd::bulk::decompress_to_buffer(stored, raw.as_mut_slice())
                    .map_err(|_| ChunkError::Unpack)?;
                if bytes != raw.len() {
                    return Err(ChunkError::Unpack);
                }
            }
        }
        Ok(())
    }
}
