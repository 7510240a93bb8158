//! `agent.toml`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tidemark_control::config::{ConfigError, Source};
use tidemark_link::NodeName;
use tidemark_link::pki::{Identity, PkiError, Trust};

use super::values::SpoolBytes;

/// What concerns the whole node.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// This node's name, as in its certificate.
    pub node: NodeName,
    /// What must survive a restart. It must not lie on a disk that this agent protects.
    #[serde(default = "state_dir")]
    pub state_dir: PathBuf,
    /// Sockets.
    #[serde(default = "runtime_dir")]
    pub runtime_dir: PathBuf,
    /// The local API.
    #[serde(default = "api_socket")]
    pub api_socket: PathBuf,
    /// Certificates.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Where frames wait that the rings cannot hold; none means that writes are then not captured.
    pub spool: Option<SpoolConfig>,
}

/// A place on a disk for what the rings cannot hold.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpoolConfig {
    /// The directory. It must not lie on a disk that this agent protects. Each group has one in it.
    pub directory: PathBuf,
    /// The most that each group's spool may take.
    pub bytes_max: SpoolBytes,
}

/// Where the certificates lie, in PEM.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// The certificate authority's certificate.
    pub ca: PathBuf,
    /// This node's certificate.
    pub certificate: PathBuf,
    /// This node's private key.
    pub key: PathBuf,
}

impl Default for TlsConfig {
    fn default() -> TlsConfig {
        TlsConfig {
            ca: "/etc/tidemark/pki/ca.pem".into(),
            certificate: "/etc/tidemark/pki/node.pem".into(),
            key: "/etc/tidemark/pki/node.key".into(),
        }
    }
}

fn state_dir() -> PathBuf {
    "/var/lib/tidemark/agent".into()
}

fn runtime_dir() -> PathBuf {
    "/run/tidemark".into()
}

fn api_socket() -> PathBuf {
    tidemark_control::agent::SOCKET.into()
}

impl NodeConfig {
    /// Reads and judges a node's file.
    ///
    /// # Errors
    /// A sentence with the line concerned.
    pub fn parse(source: &Source) -> Result<NodeConfig, ConfigError> {
        let config: NodeConfig = source.parse()?;
        let paths = [
            ("state_dir", &config.state_dir),
            ("runtime_dir", &config.runtime_dir),
            ("api_socket", &config.api_socket),
            ("tls.ca", &config.tls.ca),
            ("tls.certificate", &config.tls.certificate),
            ("tls.key", &config.tls.key),
        ];
        let spool = config.spool.as_ref().map(|spool| ("spool.directory", &spool.directory));
        let paths: Vec<_> = paths.into_iter().chain(spool).collect();
        match paths.iter().find(|(_, path)| !path.is_absolute()) {
            None => Ok(config),
            Some((key, path)) => Err(ConfigError::file(
                source.path(),
                format!("'{key}' must be a path that begins with '/', not '{}'", path.display()),
            )),
        }
    }
}

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error(
        "cannot read {}: {source}; 'tidemark init' makes certificates and says where they go",
        path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {source}", path.display())]
    Pki {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: PkiError,
    },
    /// The certificate is another node's.
    #[error(
        "the certificate {} is that of the node '{found}', but the configuration says '{expected}'; \
         put the right certificate there or correct 'node'",
        path.display()
    )]
    OtherNode {
        /// The certificate.
        path: PathBuf,
        /// The name in it.
        found: NodeName,
        /// The name in the configuration.
        expected: NodeName,
    },
}

impl TlsConfig {
    /// Reads the certificates of the node `expected`.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn read(&self, expected: &NodeName) -> Result<(Identity, Trust), TlsError> {
        let pki = |path: &Path| {
            let path = path.to_owned();
            move |source| TlsError::Pki { path, source }
        };
        let trust = Trust::from_pem(&read(&self.ca)?).map_err(pki(&self.ca))?;
        let identity = Identity::from_pem(&read(&self.certificate)?, &read(&self.key)?)
            .map_err(pki(&self.certificate))?;
        if identity.name() != expected {
            return Err(TlsError::OtherNode {
                path: self.certificate.clone(),
                found: identity.name().clone(),
                expected: expected.clone(),
            });
        }
        Ok((identity, trust))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}
