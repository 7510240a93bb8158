//! Values that say more than their TOML type.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemark_control::agent::FrontKind;
use tidemark_control::config::{Bytes, Seconds};
use tidemark_journal::Compression;

use crate::capture::core::WIDE_REGIONS_MAX;
use crate::dirty::active::SLOTS;

/// Size of a group's ring in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "Bytes")]
pub struct RingBytes(u64);

impl RingBytes {
    /// The smallest: the largest write must fit several times.
    pub const MIN: u64 = 16 << 20;
    /// The largest.
    pub const MAX: u64 = 64 << 30;

    /// In bytes.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl Default for RingBytes {
    fn default() -> RingBytes {
        RingBytes(256 << 20)
    }
}

impl TryFrom<Bytes> for RingBytes {
    type Error = String;

    fn try_from(bytes: Bytes) -> Result<RingBytes, String> {
        if (RingBytes::MIN..=RingBytes::MAX).contains(&bytes.0) {
            Ok(RingBytes(bytes.0))
        } else {
            Err(format!("a ring of {bytes} is not possible: 16 MiB to 64 GiB are"))
        }
    }
}

/// How many regions of a group may be active at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "usize")]
pub struct ActiveRegions(usize);

impl ActiveRegions {
    /// The fewest: those of the widest requests that run at once.
    pub const MIN: usize = WIDE_REGIONS_MAX;
    /// The most, and the usual number.
    pub const MAX: usize = SLOTS;

    /// The number.
    pub fn get(self) -> usize {
        self.0
    }
}

impl Default for ActiveRegions {
    fn default() -> ActiveRegions {
        ActiveRegions(ActiveRegions::MAX)
    }
}

impl TryFrom<usize> for ActiveRegions {
    type Error = String;

    fn try_from(regions: usize) -> Result<ActiveRegions, String> {
        if (ActiveRegions::MIN..=ActiveRegions::MAX).contains(&regions) {
            Ok(ActiveRegions(regions))
        } else {
            let (min, max) = (ActiveRegions::MIN, ActiveRegions::MAX);
            Err(format!("{regions} active regions are not possible: {min} to {max} are"))
        }
    }
}

/// The most that a spool may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "Bytes")]
pub struct SpoolBytes(u64);

impl SpoolBytes {
    /// The smallest: sixteen of the smallest segments.
    pub const MIN: u64 = 64 << 20;

    /// In bytes.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl TryFrom<Bytes> for SpoolBytes {
    type Error = String;

    fn try_from(bytes: Bytes) -> Result<SpoolBytes, String> {
        if bytes.0 >= SpoolBytes::MIN {
            Ok(SpoolBytes(bytes.0))
        } else {
            Err(format!("a spool of {bytes} is not possible: it takes 64 MiB at least"))
        }
    }
}

/// How long an answer waits for the target in sync mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "Seconds")]
pub struct SyncTimeout(Seconds);

impl SyncTimeout {
    /// The shortest, in seconds.
    pub const MIN_S: u64 = 1;
    /// The longest: with a lease it stays well below the time after which the kernel's NBD client gives
    /// a request up.
    pub const MAX_S: u64 = 5;

    /// As a time.
    pub fn get(self) -> Duration {
        Duration::from_secs(self.0.0)
    }
}

impl Default for SyncTimeout {
    fn default() -> SyncTimeout {
        SyncTimeout(Seconds(3))
    }
}

impl TryFrom<Seconds> for SyncTimeout {
    type Error = String;

    fn try_from(seconds: Seconds) -> Result<SyncTimeout, String> {
        if (SyncTimeout::MIN_S..=SyncTimeout::MAX_S).contains(&seconds.0) {
            Ok(SyncTimeout(seconds))
        } else {
            Err(format!("answers cannot wait for {seconds}: 1 to 5 seconds are possible"))
        }
    }
}

/// `"off"` or a zstd level.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "toml::Value")]
pub struct CompressionSetting(pub Compression);

impl CompressionSetting {
    /// The highest zstd level that is taken; higher ones cost memory that an agent should not use.
    pub const LEVEL_MAX: i32 = 19;
}

impl Default for CompressionSetting {
    fn default() -> CompressionSetting {
        CompressionSetting(Compression::Zstd(1))
    }
}

impl TryFrom<toml::Value> for CompressionSetting {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<CompressionSetting, String> {
        let level = |level: i64| {
            i32::try_from(level)
                .ok()
                .filter(|level| (1..=CompressionSetting::LEVEL_MAX).contains(level))
        };
        match &value {
            toml::Value::String(text) if text == "off" => Some(Compression::Off),
            toml::Value::Integer(number) => level(*number).map(Compression::Zstd),
            _ => None,
        }
        .map(CompressionSetting)
        .ok_or_else(|| {
            format!("{value} is not a compression: \"off\" or a zstd level from 1 to 19 is wanted")
        })
    }
}

/// How volumes are to be presented.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrontChoice {
    /// The best that this kernel has: ublk, else the kernel's NBD client, else an NBD socket.
    #[default]
    Auto,
    /// A ublk block device.
    Ublk,
    /// A block device of the kernel's NBD client.
    NbdKernel,
    /// A plain NBD Unix socket.
    NbdSocket,
}

impl FrontChoice {
    /// The kind asked for; none if the agent is to choose.
    pub fn kind(self) -> Option<FrontKind> {
        match self {
            FrontChoice::Auto => None,
            FrontChoice::Ublk => Some(FrontKind::Ublk),
            FrontChoice::NbdKernel => Some(FrontKind::NbdKernel),
            FrontChoice::NbdSocket => Some(FrontKind::NbdSocket),
        }
    }
}

/// A host and a port: `recovery.example.com:7410`, `192.0.2.7`, `[2001:db8::7]:7410`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPort {
    host: String,
    port: u16,
}

impl HostPort {
    /// The port of the link if none is given.
    pub const DEFAULT_PORT: u16 = 7410;

    /// The host alone, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Reads an address of a service whose usual port is another.
    ///
    /// # Errors
    /// A sentence that says what an address looks like.
    pub fn parse(text: &str, default_port: u16) -> Result<HostPort, String> {
        let bad = || {
            let shown: String = text.chars().take(64).collect();
            format!("'{shown}' is not an address: HOST:PORT is wanted, an IPv6 host in [ ]")
        };
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(bad)?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
                (
                    host,
                    if port.is_empty() {
                        None
                    } else {
                        Some(port.strip_prefix(':').ok_or_else(bad)?)
                    },
                )
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        let port = match port {
            None => default_port,
            Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?,
        };
        if host.is_empty() || host.len() > 253 || !host.chars().all(plain) {
            return Err(bad());
        }
        Ok(HostPort { host: host.to_owned(), port })
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<HostPort, String> {
        HostPort::parse(text, HostPort::DEFAULT_PORT)
    }
}

impl TryFrom<String> for HostPort {
    type Error = String;

    fn try_from(text: String) -> Result<HostPort, String> {
        text.parse()
    }
}

impl From<HostPort> for String {
    fn from(address: HostPort) -> String {
        address.to_string()
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}
