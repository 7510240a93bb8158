//! How a target asks for a zero-loss lease, and how a source grants it: see [`crate::lease`].

use std::time::Duration;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian::U64};

use crate::lease::LEASE_MAX;

/// The name under which both sides announce that they know these messages. A source announces it
/// for a group that is to be in sync, and for no other.
pub const SYNC_FEATURE: &str = "sync";

/// The target asks for a lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseAsk {
    /// Counts up from 1 on each connection; the grant carries the same.
    pub number: u64,
}

/// The source grants one. That it does not is said by nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseGrant {
    /// The number of the ask.
    pub number: u64,
    /// How long it lasts, counted from the asking; at most [`LEASE_MAX`].
    pub lease: Duration,
}

/// The body of a [`LeaseAsk`], 8 bytes.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | number |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct LeaseAskBody {
    number: U64,
}

/// The body of a [`LeaseGrant`], 16 bytes.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | number of the ask |
/// | 8 | 8 | how long it lasts, nanoseconds |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct LeaseGrantBody {
    number: U64,
    lease_ns: U64,
}

const _: () = assert!(size_of::<LeaseAskBody>() == 8 && size_of::<LeaseGrantBody>() == 16);

impl From<&LeaseAsk> for LeaseAskBody {
    fn from(ask: &LeaseAsk) -> LeaseAskBody {
        LeaseAskBody { number: ask.number.into() }
    }
}

impl From<LeaseAskBody> for LeaseAsk {
    fn from(body: LeaseAskBody) -> LeaseAsk {
        LeaseAsk { number: body.number.get() }
    }
}

impl From<&LeaseGrant> for LeaseGrantBody {
    fn from(grant: &LeaseGrant) -> LeaseGrantBody {
        let lease_ns = grant.lease.min(LEASE_MAX).as_nanos() as u64;
        LeaseGrantBody { number: grant.number.into(), lease_ns: lease_ns.into() }
    }
}

impl LeaseGrantBody {
    pub(super) fn checked(self) -> Result<LeaseGrant, String> {
        let lease = Duration::from_nanos(self.lease_ns.get());
        if lease.is_zero() || lease > LEASE_MAX {
            return Err(format!("a lease of {lease:?} is not possible"));
        }
        Ok(LeaseGrant { number: self.number.get(), lease })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{DecodeError, Message, MessageKind};

    #[test]
    fn a_lease_that_cannot_be_is_refused() {
        let over_ns = LEASE_MAX.as_nanos() as u64 + 1;
        for lease_ns in [0, over_ns, u64::MAX] {
            let body = [1u64.to_le_bytes(), lease_ns.to_le_bytes()].concat();
            let error = Message::decode(MessageKind::LeaseGrant, body).expect_err("refused");
            assert!(matches!(error, DecodeError::Body { .. }), "{error}");
        }
    }
}
