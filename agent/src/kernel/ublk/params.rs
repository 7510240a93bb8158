//! What a ublk device shows of itself: the backing's sizes and abilities, repeated honestly.

use super::abi;
use crate::kernel::blockdev::{Abilities, Geometry};

/// Parameters of a device, in bytes. What the backing cannot do is not advertised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceParams {
    /// Sizes, the backing's.
    pub geometry: Geometry,
    /// Abilities, the backing's.
    pub abilities: Abilities,
    /// Largest read or write; must not exceed the device's `max_io_bytes`.
    pub max_io_bytes: u32,
    /// Largest write-zeroes or discard, where the backing has them.
    pub max_zero_bytes: u32,
}

/// Why a backing cannot be shown through ublk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParamsError {
    /// The driver takes powers of two from 512 to the page size.
    #[error("a logical block size of {0} bytes cannot be served through ublk (512 to 4096 can)")]
    LogicalBlock(u32),
    /// See [`abi::MAX_IO_BYTES`].
    #[error("a largest request of {0} bytes is not between 4096 and 33554432")]
    MaxIo(u32),
}

impl DeviceParams {
    /// Parameters for a device in front of a backing.
    pub const fn new(
        geometry: Geometry,
        abilities: Abilities,
        max_io_bytes: u32,
        max_zero_bytes: u32,
    ) -> Self {
        Self { geometry, abilities, max_io_bytes, max_zero_bytes }
    }

    /// As the driver wants them.
    ///
    /// # Errors
    /// Sizes that ublk cannot express.
    pub fn encode(&self) -> Result<abi::Params, ParamsError> {
        let geometry = &self.geometry;
        let logical = geometry.logical_block_bytes;
        if !logical.is_power_of_two() || !(512..=4096).contains(&logical) {
            return Err(ParamsError::LogicalBlock(logical));
        }
        if !(4096..=abi::MAX_IO_BYTES).contains(&self.max_io_bytes) {
            return Err(ParamsError::MaxIo(self.max_io_bytes));
        }
        // The driver takes shifts only. A physical block that is no power of two (some flash
        // claims 3 pages) is rounded up, preferences are rounded down, and "no preference" is the
        // physical block, as one byte would be worse.
        let physical = geometry.physical_block_bytes.max(logical);
        let physical = physical.checked_next_power_of_two().unwrap_or(physical);
        let preferred = |bytes: u32| bytes.max(physical).ilog2() as u8;
        let mut attrs = 0;
        for (is_so, bit) in [
            (self.abilities.read_only, abi::ATTR_READ_ONLY),
            (self.abilities.rotational, abi::ATTR_ROTATIONAL),
            (self.abilities.volatile_cache, abi::ATTR_VOLATILE_CACHE),
            // FUA means nothing where there is no cache to get past.
            (self.abilities.fua && self.abilities.volatile_cache, abi::ATTR_FUA),
        ] {
            if is_so {
                attrs |= bit;
            }
        }
        let (types, discard) = match self.encode_zeroes(logical) {
            Some(discard) => (abi::PARAM_BASIC | abi::PARAM_DISCARD, discard),
            None => (abi::PARAM_BASIC, abi::ParamDiscard::default()),
        };
        Ok(abi::Params {
            len: size_of::<abi::Params>() as u32,
            types,
            basic: abi::ParamBasic {
                attrs,
                logical_bs_shift: logical.ilog2() as u8,
                physical_bs_shift: physical.ilog2() as u8,
                io_opt_shift: preferred(geometry.io_opt_bytes),
                io_min_shift: preferred(geometry.io_min_bytes),
                max_sectors: self.max_io_bytes >> 9,
                chunk_sectors: 0,
                dev_sectors: geometry.size_bytes >> 9,
                virt_boundary_mask: 0,
            },
            discard,
            pad: 0,
        })
    }

    /// Discard is advertised only where it is zeroing (see [`crate::kernel::blockdev::ZeroMode`]),
    /// write-zeroes where the backing makes zeroes without being sent them.
    fn encode_zeroes(&self, logical: u32) -> Option<abi::ParamDiscard> {
        let sectors = |bytes: u64| {
            let bytes = bytes.min(u64::from(self.max_zero_bytes));
            ((bytes / u64::from(logical) * u64::from(logical)) >> 9) as u32
        };
        let unmap = self.abilities.unmap;
        let max_discard_sectors = unmap.map_or(0, |limits| sectors(limits.max_bytes));
        let zeroes = unmap.is_some() || self.abilities.fast_zeroes;
        let max_write_zeroes_sectors = if zeroes { sectors(u64::MAX) } else { 0 };
        (max_discard_sectors > 0 || max_write_zeroes_sectors > 0).then(|| abi::ParamDiscard {
            discard_alignment: unmap.map_or(0, |limits| limits.alignment_bytes),
            discard_granularity: unmap.map_or(logical, |limits| limits.granularity_bytes),
            max_discard_sectors,
            max_write_zeroes_sectors,
            max_discard_segments: 1,
            reserved0: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::blockdev::UnmapLimits;
    use zerocopy::IntoBytes;

    const GEOMETRY: Geometry = Geometry {
        size_bytes: 1 << 30,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        io_min_bytes: 4096,
        io_opt_bytes: 0,
    };
    const PLAIN: Abilities = Abilities {
        read_only: false,
        rotational: false,
        volatile_cache: false,
        fua: true,
        unmap: None,
        fast_zeroes: false,
    };
    const UNMAP: UnmapLimits =
        UnmapLimits { granularity_bytes: 8192, alignment_bytes: 512, max_bytes: 3 << 20 };

    #[test]
    fn what_the_backing_cannot_do_is_not_advertised() {
        let params = DeviceParams::new(GEOMETRY, PLAIN, 1 << 20, 1 << 20).encode().unwrap();
        assert_eq!(params.types, abi::PARAM_BASIC);
        assert_eq!(params.basic.attrs, 0, "no cache: neither flush nor FUA");
        assert_eq!(params.discard, abi::ParamDiscard::default());
        let zeroes = Abilities { fast_zeroes: true, volatile_cache: true, fua: false, ..PLAIN };
        let params = DeviceParams::new(GEOMETRY, zeroes, 1 << 20, 1 << 20).encode().unwrap();
        assert_eq!(params.basic.attrs, abi::ATTR_VOLATILE_CACHE);
        assert_eq!(params.discard.max_discard_sectors, 0);
        assert_eq!(params.discard.max_write_zeroes_sectors, 2048);
    }

    #[test]
    fn the_encoding_is_pinned() {
        let abilities = Abilities {
            read_only: true,
            rotational: true,
            volatile_cache: true,
            unmap: Some(UNMAP),
            fast_zeroes: true,
            ..PLAIN
        };
        let geometry = Geometry { io_opt_bytes: 100_000, ..GEOMETRY };
        let params = DeviceParams::new(geometry, abilities, 1 << 20, 2 << 20).encode().unwrap();
        let golden = [
            64, 0, 0, 0, 3, 0, 0, 0, // length, types
            0x0f, 0, 0, 0, 9, 12, 16, 12, // attributes, shifts: logical, physical, opt, min
            0, 8, 0, 0, 0, 0, 0, 0, // largest request, chunk
            0, 0, 0x20, 0, 0, 0, 0, 0, // size
            0, 0, 0, 0, 0, 0, 0, 0, // boundary
            0, 2, 0, 0, 0, 0x20, 0, 0, // discard: alignment, granularity
            0, 0x10, 0, 0, 0, 0x10, 0, 0, // largest discard, write-zeroes
            1, 0, 0, 0, 0, 0, 0, 0, // segments
        ];
        assert_eq!(params.as_bytes(), golden);
    }

    #[test]
    fn limits_are_whole_blocks() {
        let geometry = Geometry { logical_block_bytes: 4096, ..GEOMETRY };
        let unmap = UnmapLimits { max_bytes: 10_000, ..UNMAP };
        let abilities = Abilities { unmap: Some(unmap), ..PLAIN };
        let params = DeviceParams::new(geometry, abilities, 1 << 20, 1 << 20).encode().unwrap();
        assert_eq!(params.discard.max_discard_sectors, 16);
        assert_eq!(params.basic.logical_bs_shift, 12);
    }

    #[test]
    fn sizes_the_driver_refuses_are_refused_before_it() {
        for bytes in [0, 256, 520, 8192] {
            let geometry = Geometry { logical_block_bytes: bytes, ..GEOMETRY };
            let refused = DeviceParams::new(geometry, PLAIN, 1 << 20, 1 << 20).encode();
            assert_eq!(refused, Err(ParamsError::LogicalBlock(bytes)));
        }
        let refused = DeviceParams::new(GEOMETRY, PLAIN, 64 << 20, 0).encode();
        assert_eq!(refused, Err(ParamsError::MaxIo(64 << 20)));
    }
}
