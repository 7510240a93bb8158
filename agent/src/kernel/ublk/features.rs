//! Feature bits of the driver and of a device.

use std::fmt;
use std::ops::BitOr;

/// A set of `UBLK_F_` bits. Asked of the driver ([`super::Control::features`]), never derived from
/// a kernel version: distributions carry features back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

impl Features {
    /// A write's payload is asked for separately, so the server can choose where it goes. Not used.
    pub const NEED_GET_DATA: Self = Self(1 << 2);
    /// The device outlives its server; requests wait for the next one.
    pub const USER_RECOVERY: Self = Self(1 << 3);
    /// Requests the dead server had not answered are handed out again instead of failing.
    pub const USER_RECOVERY_REISSUE: Self = Self(1 << 4);
    /// Unprivileged devices.
    pub const UNPRIVILEGED: Self = Self(1 << 5);
    /// Commands encoded as ioctl numbers, the only way this module speaks.
    pub const CMD_IOCTL_ENCODE: Self = Self(1 << 6);
    /// Payloads are read and written in `/dev/ublkcN`, at the place the server chooses. Not used.
    pub const USER_COPY: Self = Self(1 << 7);
    /// Requests fail while there is no server.
    pub const USER_RECOVERY_FAIL_IO: Self = Self(1 << 9);
    /// The size of a started device can change.
    pub const UPDATE_SIZE: Self = Self(1 << 10);
    /// A server can be asked to stop handing out requests, for its replacement.
    pub const QUIESCE: Self = Self(1 << 12);

    const NAMES: [(Self, &str); 9] = [
        (Self::NEED_GET_DATA, "NEED_GET_DATA"),
        (Self::USER_RECOVERY, "USER_RECOVERY"),
        (Self::USER_RECOVERY_REISSUE, "USER_RECOVERY_REISSUE"),
        (Self::UNPRIVILEGED, "UNPRIVILEGED"),
        (Self::CMD_IOCTL_ENCODE, "CMD_IOCTL_ENCODE"),
        (Self::USER_COPY, "USER_COPY"),
        (Self::USER_RECOVERY_FAIL_IO, "USER_RECOVERY_FAIL_IO"),
        (Self::UPDATE_SIZE, "UPDATE_SIZE"),
        (Self::QUIESCE, "QUIESCE"),
    ];

    /// What the agent cannot do without: a device that survives the agent without an I/O error.
    pub const fn required() -> Self {
        Self(Self::USER_RECOVERY.0 | Self::USER_RECOVERY_REISSUE.0 | Self::CMD_IOCTL_ENCODE.0)
    }

    /// From the driver's number; unknown bits are kept.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The driver's number.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// What is in both.
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `other` is in it.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in it and not in `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Names joined by `|`; bits without a name as one hexadecimal number.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = *self;
        let mut separator = "";
        for (feature, name) in Self::NAMES {
            if self.contains(feature) {
                write!(f, "{separator}{name}")?;
                separator = "|";
                rest = rest.without(feature);
            }
        }
        if rest.0 != 0 || separator.is_empty() {
            write!(f, "{separator}{:#x}", rest.0)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_shown_by_name_with_unknown_bits_kept() {
        assert_eq!(Features::from_bits(0).to_string(), "0x0");
        assert_eq!(Features::required().bits(), 0x58);
        let seen = Features::from_bits(0x1fe);
        assert!(seen.contains(Features::required() | Features::USER_COPY));
        assert!(!seen.contains(Features::UPDATE_SIZE));
        assert_eq!(
            seen.to_string(),
            "NEED_GET_DATA|USER_RECOVERY|USER_RECOVERY_REISSUE|UNPRIVILEGED|CMD_IOCTL_ENCODE|\
             USER_COPY|0x102"
        );
    }
}
