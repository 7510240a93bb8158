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
//! window = "7 d"
//! size_max = "2 TiB"
//! ```

use std::{
    collections::HashSet,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use tidemark_control::config::{Bytes, ConfigError, Seconds, Source};
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
    pub latest_linger: Seconds,
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
    pub segment: Bytes,
    /// Memory for pages of indexes.
    pub page_cache: Bytes,
    /// Memory for unpacked chunks.
    pub chunk_cache: Bytes,
}

/// A group that may be received.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Its name.
    pub name: String,
    /// The node that may write it, by the name in its certificate.
    pub node: NodeName,
    /// How much received history is kept at least as far as space allows.
    #[serde(default = "default_window")]
    pub window: Seconds,
    /// How much received history is never given up for space: rather nothing more is accepted.
    #[serde(default = "default_window_min")]
    pub window_min: Seconds,
    /// The size of the log beyond which the oldest history is given up early.
    #[serde(default = "default_size_max")]
    pub size_max: Bytes,
}

impl Default for StoreConfig {
    fn default() -> StoreConfig {
        StoreConfig {
            segment: Bytes(256 << 20),
            page_cache: Bytes(32 << 20),
            chunk_cache: Bytes(32 << 20),
        }
    }
}

impl Default for NbdConfig {
    fn default() -> NbdConfig {
        let latest_linger = Seconds(10);
        NbdConfig { unix: None, listen: None, require_client_certificate: false, latest_linger }
    }
}

fn default_window() -> Seconds {
    Seconds(7 * 24 * 3600)
}

fn default_window_min() -> Seconds {
    Seconds(3600)
}

fn default_size_max() -> Bytes {
    Bytes(1 << 40)
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
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        Config::read(&Source::read(path)?)
    }

    /// Checks a configuration's text.
    ///
    /// # Errors
    /// A sentence with the line concerned.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::read(&Source::new(Path::new("target.toml"), text))
    }

    fn read(source: &Source) -> Result<Config, ConfigError> {
        let config: Config = source.parse()?;
        config.check().map_err(|sentence| ConfigError::file(source.path(), sentence))?;
        Ok(config)
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// A sentence that says what to change.
    pub fn check(&self) -> Result<(), String> {
        let segment = self.store.segment.0;
        if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment) {
            return Err("store.segment must be between 1 MiB and 2 GiB".to_owned());
        }
        let mut names = HashSet::new();
        for group in &self.groups {
            let name = &group.name;
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if name.is_empty()
                || name.len() > 63
                || !name.chars().all(good)
                || name.starts_with('.')
            {
                return Err(format!(
                    "the group name '{name}' must have 1 to 63 letters, digits, '-', '_' or '.', \
                     and not begin with a dot"
                ));
            }
            if !names.insert(name) {
                return Err(format!("the group '{name}' is there twice"));
            }
            if group.window_min > group.window {
                return Err(format!("window_min of group '{name}' is longer than its window"));
            }
            if group.size_max.0 < 4 * segment {
                return Err(format!(
                    "size_max of group '{name}' must hold at least four segments ({})",
                    Bytes(4 * segment)
                ));
            }
        }
        Ok(())
    }

    /// The group of this name.
    pub fn group(&self, name: &str) -> Option<&GroupConfig> {
        self.groups.iter().find(|group| group.name == name)
    }
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
        window = "1 d"
        size_max = "2TiB"
    "#;

    #[test]
    fn a_configuration_is_read() {
        let config = Config::parse(GOOD).expect("good");
        let group = config.group("shop").expect("it is there");
        assert_eq!(group.window, Seconds(86_400));
        assert_eq!(group.size_max, Bytes(2 << 40));
        assert_eq!(config.store.segment.to_string(), "64 MiB");
    }

    #[test]
    fn mistakes_are_shown_with_their_line() {
        for (change, by, expected) in [
            ("window =", "windw =", "windw"),
            ("\"1 d\"", "\"1 dei\"", "1 dei"),
            ("\"64 MiB\"", "\"64 MO\"", "64 MO"),
            ("\"db1\"", "\"db 1\"", "node = \"db 1\""),
        ] {
            let error = Config::parse(&GOOD.replace(change, by)).expect_err("bad").to_string();
            assert!(error.contains(expected) && error.contains(", line "), "{error}");
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
