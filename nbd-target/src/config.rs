//! The target's configuration, in TOML.
//!
//! ```toml
//! data_dir = "/var/lib/tidemark/target"
//!
//! [link]
//! listen = "0.0.0.0:7410"
//! ca = "/etc/tidemark/pki/ca.pem"
//! certificate = "/etc/tidemark/pki/node.pem"
//! key = "/etc/tidemark/pki/node.key"
//!
//! [nbd]
//! unix = "/run/tidemark/nbd.sock"
//! listen = "0.0.0.0:10809"
//!
//! [api]
//! socket = "/run/tidemark/target.sock"
//!
//! [[group]]
//! name = "shop"
//! node = "db1"
//! window = "7 days"
//! size_max = "2 TiB"
//! ```

use std::{
    collections::HashSet,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use serde::{Deserialize, Deserializer, de};
use tidemark_link::NodeName;

/// The whole configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// The link to sources.
    pub link: LinkConfig,
    /// The exports.
    #[serde(default)]
    pub nbd: NbdConfig,
    /// The local interface.
    #[serde(default)]
    pub api: ApiConfig,
    /// How the log is kept.
    #[serde(default)]
    pub store: StoreConfig,
    /// The groups that may be received.
    #[serde(default, rename = "group")]
    pub groups: Vec<GroupConfig>,
}

/// The link to sources.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// Address and port to listen on; port 0 takes any.
    pub listen: SocketAddr,
    /// The private CA's certificate, PEM.
    pub ca: PathBuf,
    /// This node's certificate, PEM.
    pub certificate: PathBuf,
    /// This node's key, PEM.
    pub key: PathBuf,
}

/// The exports.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NbdConfig {
    /// A Unix socket for local clients.
    pub unix: Option<PathBuf>,
    /// Address and port for remote ones, over TLS with this node's certificate.
    pub listen: Option<SocketAddr>,
    /// Whether remote clients must have a certificate of the same CA.
    pub require_client_certificate: bool,
    /// How long `@latest` stays at one moment after a client's last connection has gone.
    pub latest_linger: Span,
}

/// The local interface.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiConfig {
    /// Its Unix socket; without one there is no interface.
    pub socket: Option<PathBuf>,
}

/// How the log is kept.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Size of a segment.
    pub segment: Size,
    /// Memory for pages of indexes.
    pub page_cache: Size,
    /// Memory for unpacked chunks.
    pub chunk_cache: Size,
}

/// A group that may be received.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Its name.
    pub name: String,
    /// The node that may write it, by the name in its certificate.
    #[serde(deserialize_with = "node_name")]
    pub node: NodeName,
    /// How much received history is kept at least as far as space allows.
    #[serde(default = "default_window")]
    pub window: Span,
    /// How much received history is never given up for space: rather nothing more is accepted.
    #[serde(default = "default_window_min")]
    pub window_min: Span,
    /// The size of the log beyond which the oldest history is given up early.
    #[serde(default = "default_size_max")]
    pub size_max: Size,
}

impl Default for StoreConfig {
    fn default() -> StoreConfig {
        StoreConfig { segment: Size(256 << 20), page_cache: Size(32 << 20), chunk_cache: Size(32 << 20) }
    }
}

impl Default for NbdConfig {
    fn default() -> NbdConfig {
        let latest_linger = Span(Duration::from_secs(10));
        NbdConfig { unix: None, listen: None, require_client_certificate: false, latest_linger }
    }
}

fn default_window() -> Span {
    Span(Duration::from_secs(7 * 24 * 3600))
}

fn default_window_min() -> Span {
    Span(Duration::from_secs(3600))
}

fn default_size_max() -> Size {
    Size(1 << 40)
}

/// The smallest segment: one frame of any size fits.
const SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// The largest segment: offsets in it have 32 bits.
const SEGMENT_BYTES_MAX: u64 = 2 << 30;

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// A sentence with the line concerned.
    pub fn load(path: &Path) -> anyhow::Result<Config> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        Config::parse(&text).with_context(|| format!("the configuration {}", path.display()))
    }

    /// Checks a configuration's text.
    ///
    /// # Errors
    /// A sentence with the line concerned.
    pub fn parse(text: &str) -> anyhow::Result<Config> {
        let config: Config = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// A sentence that says what to change.
    pub fn check(&self) -> anyhow::Result<()> {
        let segment = self.store.segment.0;
        anyhow::ensure!(
            (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment),
            "store.segment must be between 1 MiB and 2 GiB"
        );
        let mut names = HashSet::new();
        for group in &self.groups {
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            anyhow::ensure!(
                !group.name.is_empty()
                    && group.name.len() <= 63
                    && group.name.chars().all(good)
                    && !group.name.starts_with('.'),
                "the group name '{}' must have 1 to 63 letters, digits, '-', '_' or '.', and not \
                 begin with a dot",
                group.name
            );
            anyhow::ensure!(names.insert(&group.name), "the group '{}' is there twice", group.name);
            anyhow::ensure!(
                group.window_min.0 <= group.window.0,
                "window_min of group '{}' is longer than its window",
                group.name
            );
            anyhow::ensure!(
                group.size_max.0 >= 4 * segment,
                "size_max of group '{}' must hold at least four segments ({})",
                group.name,
                Size(4 * segment)
            );
        }
        Ok(())
    }

    /// The group of this name.
    pub fn group(&self, name: &str) -> Option<&GroupConfig> {
        self.groups.iter().find(|group| group.name == name)
    }
}

/// A length of time, written like `"7 days"`, `"36h"` or `"1h 30m"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Span(pub Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bad = || {
            de::Error::custom(format!("'{text}' is not a length of time such as \"7 days\" or \"36h\""))
        };
        let span: jiff::Span = text.parse().map_err(|_| bad())?;
        // Days and weeks are taken as 24 hours each; months have no fixed length.
        let relative = jiff::SpanRelativeTo::days_are_24_hours();
        let duration = span.to_duration(relative).map_err(|_| bad())?;
        duration.try_into().map(Span).map_err(|_| bad())
    }
}

/// A number of bytes, written like `"256 MiB"` or `"2TiB"`, or as a plain number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Size(pub u64);

const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let bad = || format!("'{text}' is not a size such as \"256 MiB\" or \"2 TiB\"");
        let (number, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))
            .unwrap_or((text, 1));
        let number: u64 = number.trim().parse().map_err(|_| bad())?;
        number.checked_mul(unit).map(Size).ok_or_else(bad)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(bytes) => Ok(Size(bytes)),
            Form::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |(_, unit): &&(&str, u64)| self.0 >= *unit && self.0.is_multiple_of(*unit);
        let (name, unit) = UNITS.iter().find(whole).unwrap_or(&("B", 1));
        write!(f, "{} {name}", self.0 / unit)
    }
}

fn node_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NodeName, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        data_dir = "/d"
        [link]
        listen = "127.0.0.1:0"
        ca = "ca"
        certificate = "c"
        key = "k"
        [store]
        segment = "64 MiB"
        [[group]]
        name = "shop"
        node = "db1"
        window = "1 day"
        size_max = "2TiB"
    "#;

    #[test]
    fn a_configuration_is_read() {
        let config = Config::parse(GOOD).expect("good");
        let group = config.group("shop").expect("it is there");
        assert_eq!(group.window, Span(Duration::from_secs(86400)));
        assert_eq!(group.size_max, Size(2 << 40));
        assert_eq!(config.store.segment.to_string(), "64 MiB");
    }

    #[test]
    fn mistakes_are_shown_with_their_line() {
        for (change, by, expected) in [
            ("window =", "windw =", "windw"),
            ("\"1 day\"", "\"1 dei\"", "1 dei"),
            ("\"64 MiB\"", "\"64 MB\"", "64 MB"),
            ("\"db1\"", "\"db 1\"", "node = \"db 1\""),
        ] {
            let error = Config::parse(&GOOD.replace(change, by)).expect_err("bad").to_string();
            assert!(error.contains(expected) && error.contains("line"), "{error}");
        }
        for (change, by, expected) in [
            ("\"shop\"", "\"a/b\"", "a/b"),
            ("\"2TiB\"", "\"255 MiB\"", "256 MiB"),
            ("\"64 MiB\"", "\"4 GiB\"", "2 GiB"),
        ] {
            let error = Config::parse(&GOOD.replace(change, by)).expect_err("bad").to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
