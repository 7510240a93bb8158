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
//! [scrub]
//! interval = "7 d"
//! bytes_per_s = "32 MiB"
//!
//! [api]
//! socket = "/run/tidemark/target.sock"
//!
//! [[group]]
//! name = "shop"
//! node = "db1"
//! readers = ["report1"]
//! branch_writers = ["recovery2"]
//! window = "7 d"
//! size_max = "2 TiB"
//! ```

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use serde::{Deserialize, Deserializer, de};
use tidemark_control::config::{Bytes, ConfigError, Name, Seconds, Source};
use tidemark_link::{
    NodeName,
    pki::{self, Identity, Trust},
};
use toml::Spanned;

/// The whole configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// The link to sources.
    pub link: LinkConfig,
    /// The exports.
    pub nbd: NbdConfig,
    /// The local interface.
    pub api: ApiConfig,
    /// How the log is kept.
    pub store: StoreConfig,
    /// How what is kept is read again.
    pub scrub: ScrubConfig,
    /// The groups that may be received.
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
    /// Whether remote clients must have a certificate of the same CA, which says what they may read.
    /// Without one whoever gets in reads every replica, so it takes a word to let strangers in.
    pub require_client_certificate: bool,
    /// How long `@latest` stays at one moment after a client's last connection has gone.
    pub latest_linger: Seconds,
    /// How long a temporary branch stays when nobody has it open.
    pub temporary_linger: Seconds,
}

/// The local interface.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    /// Its Unix socket.
    pub socket: PathBuf,
}

/// How the log is kept.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Size of a segment.
    #[serde(deserialize_with = "segment_bytes")]
    pub segment: Bytes,
    /// Memory for pages of indexes.
    pub page_cache: Bytes,
    /// Memory for unpacked chunks.
    pub chunk_cache: Bytes,
}

/// How what is kept is read again, to find what has rotted.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScrubConfig {
    /// The time from the end of a pass to the next one; zero for none but those asked for.
    pub interval: Seconds,
    /// The most that it reads in a second.
    #[serde(deserialize_with = "scrub_rate")]
    pub bytes_per_s: Bytes,
}

/// A group that may be received.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// Its name.
    pub name: Name,
    /// The node that may write it, by the name in its certificate; it may read it too.
    pub node: NodeName,
    /// Other nodes that may read its points and branches over NBD.
    pub readers: Vec<NodeName>,
    /// Nodes that may read it over NBD and write its branches.
    pub branch_writers: Vec<NodeName>,
    /// How much received history is kept at least as far as space allows.
    pub window: Seconds,
    /// How much received history is never given up for space: rather nothing more is accepted.
    pub window_min: Seconds,
    /// The size of the log beyond which the oldest history is given up early.
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

impl Default for ScrubConfig {
    fn default() -> ScrubConfig {
        ScrubConfig { interval: Seconds(7 * 24 * 3600), bytes_per_s: Bytes(32 << 20) }
    }
}

impl Default for NbdConfig {
    fn default() -> NbdConfig {
        NbdConfig {
            unix: None,
            listen: None,
            require_client_certificate: true,
            latest_linger: Seconds(10),
            temporary_linger: Seconds(24 * 3600),
        }
    }
}

impl Default for ApiConfig {
    fn default() -> ApiConfig {
        ApiConfig { socket: tidemark_control::target::SOCKET.into() }
    }
}

/// How much history is kept unless something else is said.
const WINDOW: Seconds = Seconds(7 * 24 * 3600);
/// The longest window: what is longer is a slip of the pen, and no clock's arithmetic reaches it.
const WINDOW_MAX: Seconds = Seconds(36_500 * 24 * 3600);
/// How much is never given up for space unless something else is said.
const WINDOW_MIN: Seconds = Seconds(3600);
/// The size of a log unless something else is said.
const SIZE_MAX: Bytes = Bytes(1 << 40);

/// The smallest segment: one frame of any size fits.
const SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// The largest segment: offsets in it have 32 bits.
const SEGMENT_BYTES_MAX: u64 = 2 << 30;

impl LinkConfig {
    /// Reads the certificates: this node's name, and the TLS of the link.
    ///
    /// # Errors
    /// A sentence with the file concerned.
    pub fn tls(&self) -> anyhow::Result<(NodeName, Arc<rustls::ServerConfig>)> {
        let read = |path: &Path| {
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
        };
        let identity = Identity::from_pem(&read(&self.certificate)?, &read(&self.key)?)
            .with_context(|| format!("the identity in {}", self.certificate.display()))?;
        let trust = Trust::from_pem(&read(&self.ca)?)
            .with_context(|| format!("the authority in {}", self.ca.display()))?;
        let tls = pki::server_config(&identity, &trust).with_context(|| {
            format!("{} with {}", self.certificate.display(), self.key.display())
        })?;
        Ok((identity.name().clone(), tls))
    }
}

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
        let file: ConfigFile = source.parse()?;
        let paths = [
            ("data_dir", Some(&file.data_dir)),
            ("link.ca", Some(&file.link.ca)),
            ("link.certificate", Some(&file.link.certificate)),
            ("link.key", Some(&file.link.key)),
            ("nbd.unix", file.nbd.unix.as_ref()),
            ("api.socket", Some(&file.api.socket)),
        ];
        for (key, path) in paths {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                let path = path.display();
                let sentence = format!("'{key}' must be a path that begins with '/', not '{path}'");
                return Err(ConfigError::file(source.path(), sentence));
            }
        }
        if file.nbd.listen.is_some_and(|nbd| overlap(nbd, file.link.listen)) {
            let sentence = "'nbd.listen' and 'link.listen' have the same port: each needs its own";
            return Err(ConfigError::file(source.path(), sentence));
        }
        if file.nbd.unix.as_ref() == Some(&file.api.socket) {
            let sentence = "'nbd.unix' and 'api.socket' are the same socket: each needs its own";
            return Err(ConfigError::file(source.path(), sentence));
        }
        let mut groups: Vec<GroupConfig> = Vec::new();
        for group in file.groups {
            let group = group.judge(source, &groups, file.store.segment)?;
            groups.push(group);
        }
        let ConfigFile { data_dir, link, nbd, api, store, scrub, .. } = file;
        Ok(Config { data_dir, link, nbd, api, store, scrub, groups })
    }

    /// The group of this name.
    pub fn group(&self, name: &str) -> Option<&GroupConfig> {
        self.groups.iter().find(|group| group.name.as_str() == name)
    }
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    data_dir: PathBuf,
    link: LinkConfig,
    #[serde(default)]
    nbd: NbdConfig,
    #[serde(default)]
    api: ApiConfig,
    #[serde(default)]
    store: StoreConfig,
    #[serde(default)]
    scrub: ScrubConfig,
    #[serde(default, rename = "group")]
    groups: Vec<GroupFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupFile {
    name: Spanned<Name>,
    node: NodeName,
    #[serde(default)]
    readers: Vec<NodeName>,
    #[serde(default)]
    branch_writers: Vec<NodeName>,
    #[serde(default)]
    window: Option<Spanned<Seconds>>,
    #[serde(default)]
    window_min: Option<Spanned<Seconds>>,
    #[serde(default)]
    size_max: Option<Spanned<Bytes>>,
}

impl GroupFile {
    fn judge(
        self,
        source: &Source,
        before: &[GroupConfig],
        segment: Bytes,
    ) -> Result<GroupConfig, ConfigError> {
        let span = self.name.span();
        let name = self.name.into_inner();
        if before.iter().any(|other| other.name == name) {
            return Err(source.fault(span, format!("the group '{name}' is there twice")));
        }
        let window = match self.window {
            Some(window) if *window.get_ref() > WINDOW_MAX => {
                let sentence = "a window has at most 100 years, 36500 d";
                return Err(source.fault(window.span(), sentence));
            }
            Some(window) => window.into_inner(),
            None => WINDOW,
        };
        let window_min = match self.window_min {
            Some(least) if *least.get_ref() > window => {
                let sentence = format!("window_min is longer than the window, {window}");
                return Err(source.fault(least.span(), sentence));
            }
            Some(least) => least.into_inner(),
            None => WINDOW_MIN.min(window),
        };
        let least = Bytes(4 * segment.0);
        let size_max = match self.size_max {
            Some(size) if *size.get_ref() < least => {
                let sentence = format!("size_max must hold at least four segments, {least}");
                return Err(source.fault(size.span(), sentence));
            }
            Some(size) => size.into_inner(),
            None => SIZE_MAX,
        };
        let GroupFile { node, readers, branch_writers, .. } = self;
        Ok(GroupConfig { name, node, readers, branch_writers, window, window_min, size_max })
    }
}

/// Whether two listeners cannot be there together.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let any = one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && (any || one.ip() == other.ip())
}

fn segment_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let bytes = Bytes::deserialize(deserializer)?;
    if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&bytes.0) {
        return Err(de::Error::custom("a segment has between 1 MiB and 2 GiB"));
    }
    Ok(bytes)
}

fn scrub_rate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let bytes = Bytes::deserialize(deserializer)?;
    if bytes.0 < 1 << 20 {
        return Err(de::Error::custom("a scrub reads at least 1 MiB in a second"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        data_dir = "/d"
        [link]
        listen = "127.0.0.1:0"
        ca = "/ca"
        certificate = "/c"
        key = "/k"
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
        assert!(group.readers.is_empty() && group.branch_writers.is_empty(), "nobody by itself");
        assert_eq!(config.store.segment.to_string(), "64 MiB");
    }

    #[test]
    fn mistakes_are_shown_with_their_line() {
        for (change, by, expected) in [
            ("window =", "windw =", "windw"),
            ("\"1 d\"", "\"1 dei\"", "1 dei"),
            ("\"64 MiB\"", "\"64 MO\"", "64 MO"),
            ("\"db1\"", "\"db 1\"", "node = \"db 1\""),
            ("\"db1\"", "\"db1\"\nreaders = [\"db 2\"]", "readers = [\"db 2\"]"),
            ("\"db1\"", "\"db1\"\nbranch_writers = \"db2\"", "branch_writers = \"db2\""),
            ("\"db1\"", "\"db1\"\nreader = [\"db2\"]", "reader = [\"db2\"]"),
            ("\"shop\"", "\"a/b\"", "'a/b' is not a name"),
            ("\"shop\"", "\"Shop\"", "'Shop' is not a name"),
            ("\"2TiB\"", "\"255 MiB\"", "256 MiB"),
            ("\"64 MiB\"", "\"4 GiB\"", "2 GiB"),
            ("\"1 d\"", "\"36501 d\"", "at most 100 years"),
            ("window = \"1 d\"", "window_min = \"8 d\"", "longer than the window, 7 d"),
            ("\"2TiB\"", "\"2TiB\"\n[[group]]\nname = \"shop\"\nnode = \"x\"", "twice"),
        ] {
            let error = Config::parse(&GOOD.replace(change, by)).expect_err("bad").to_string();
            assert!(error.contains(expected) && error.contains(", line "), "{error}");
        }
        let relative = Config::parse(&GOOD.replace("\"/ca\"", "\"ca\"")).expect_err("bad");
        assert!(
            relative.to_string().contains("'link.ca' must be a path that begins"),
            "{relative}"
        );
    }

    #[test]
    fn what_listens_does_so_in_a_place_of_its_own() {
        let with = |link: &str, rest: &str| {
            let text = GOOD.replace("127.0.0.1:0", link);
            Config::parse(&text.replace("[store]", &format!("{rest}\n[store]")))
        };
        let nbd = |listen: &str| format!("[nbd]\nlisten = \"{listen}\"");
        for (link, listen) in
            [("127.0.0.1:1", "127.0.0.1:1"), ("0.0.0.0:1", "10.0.0.1:1"), ("10.0.0.1:1", "[::]:1")]
        {
            let error = with(link, &nbd(listen)).expect_err("the same").to_string();
            assert!(error.contains("'nbd.listen' and 'link.listen'"), "{error}");
        }
        for (link, listen) in [
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("0.0.0.0:1", "0.0.0.0:2"),
            ("10.0.0.1:1", "10.0.0.2:1"),
        ] {
            with(link, &nbd(listen)).expect("apart");
        }
        let sockets = "[nbd]\nunix = \"/run/x\"\n[api]\nsocket = \"/run/x\"";
        let error = with("127.0.0.1:0", sockets).expect_err("the same").to_string();
        assert!(error.contains("'nbd.unix' and 'api.socket'"), "{error}");
    }

    #[test]
    fn what_is_not_said_is_safe_and_found() {
        let config = Config::parse(GOOD).expect("good");
        assert!(config.nbd.require_client_certificate, "strangers are not let in");
        assert_eq!(config.api.socket, Path::new("/run/tidemark/target.sock"));
        let short = GOOD.replace("window = \"1 d\"", "window = \"5 min\"");
        let group = Config::parse(&short).expect("good").groups.remove(0);
        assert_eq!(group.window_min, Seconds(300), "never more than the window");
    }
}
