//! The agent's configuration: `agent.toml` for the node, `agent.d/GROUP.toml` for each group.
//!
//! ```toml
//! # /etc/tidemark/agent.toml
//! node = "db1"
//!
//! [tls]                                      # these are the defaults
//! ca = "/etc/tidemark/pki/ca.pem"
//! certificate = "/etc/tidemark/pki/node.pem"
//! key = "/etc/tidemark/pki/node.key"
//!
//! [spool]                                    # there is none unless this is here
//! directory = "/var/spool/tidemark"
//! bytes_max = "64 GiB"                       # of each group
//! ```
//!
//! ```toml
//! # /etc/tidemark/agent.d/shop.toml
//! id = "5f0c3a9be1d24c7f8a6b0d9e2c4f1a37"
//! ring_bytes = "256 MiB"
//!
//! [target]
//! address = "recovery.example.com:7410"
//! name = "recovery"
//!
//! [[volume]]
//! id = 1
//! name = "data"
//! backing = "/dev/disk/by-id/wwn-0x5000c500a1b2c3d4"
//! ```
//!
//! A group's name is its file's. Reading is apart from judging: [`NodeConfig::parse`] and
//! [`GroupConfig::parse`] are pure, [`AgentConfig::load`] reads the directory.

mod group;
mod node;
mod values;

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tidemark_control::config::{ConfigError, Name, Source, files_in};

pub use group::{GroupConfig, TargetConfig, VolumeConfig};
pub use node::{NodeConfig, SpoolConfig, TlsConfig, TlsError};
pub use values::{CompressionSetting, FrontChoice, HostPort, RingBytes, SpoolBytes, SyncTimeout};

/// Where the configuration lies unless told otherwise.
pub const DIRECTORY: &str = "/etc/tidemark";
/// The node's file in it.
pub const NODE_FILE: &str = "agent.toml";
/// The groups' directory in it.
pub const GROUP_DIRECTORY: &str = "agent.d";

/// The whole configuration.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Of this node.
    pub node: NodeConfig,
    /// The groups, in the order of their names.
    pub groups: Vec<GroupConfig>,
}

/// A configuration and what is wrong in it. One broken group file leaves the others in force.
#[derive(Debug)]
pub struct Loaded {
    /// What can be used.
    pub config: AgentConfig,
    /// The files that cannot, each with its group's name.
    pub faults: Vec<Fault>,
    /// The directory of the groups' files is not there, so nothing is said of any group.
    pub missing: Option<ConfigError>,
}

/// A group's file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Fault {
    /// The group, as far as the file's name says.
    pub group: String,
    /// What is wrong.
    pub error: ConfigError,
}

impl Loaded {
    /// The same, if it says something of groups.
    ///
    /// # Errors
    /// What is [missing](Self::missing).
    pub fn whole(mut self) -> Result<Loaded, ConfigError> {
        self.missing.take().map_or(Ok(self), Err)
    }
}

impl From<AgentConfig> for Loaded {
    /// A configuration in which nothing is wrong.
    fn from(config: AgentConfig) -> Loaded {
        Loaded { config, faults: Vec::new(), missing: None }
    }
}

impl AgentConfig {
    /// Reads `agent.toml` and `agent.d/*.toml` below `directory`.
    ///
    /// # Errors
    /// The node's own file cannot be used. Groups' files that cannot are told in [`Loaded::faults`].
    pub fn load(directory: &Path) -> Result<Loaded, ConfigError> {
        let config = AgentConfig::of_node(&Source::read(&directory.join(NODE_FILE))?)?;
        let mut loaded = Loaded::from(config);
        let files = match files_in(&directory.join(GROUP_DIRECTORY)) {
            Err(error) if error.is_missing() => {
                loaded.missing = Some(error);
                return Ok(loaded);
            }
            files => files?,
        };
        for path in files {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            let added = Source::read(&path).and_then(|source| loaded.config.add(&source));
            if let Err(error) = added {
                loaded.faults.push(Fault { group: stem.unwrap_or_default(), error });
            }
        }
        Ok(loaded)
    }

    /// A node's configuration without any group.
    ///
    /// # Errors
    /// A sentence with the line concerned.
    pub fn of_node(source: &Source) -> Result<AgentConfig, ConfigError> {
        Ok(AgentConfig { node: NodeConfig::parse(source)?, groups: Vec::new() })
    }

    /// Reads a group's file and adds it.
    ///
    /// # Errors
    /// It cannot be used, or does not go together with the groups that are there.
    pub fn add(&mut self, source: &Source) -> Result<(), ConfigError> {
        self.admit(source.path(), GroupConfig::parse(source)?)
    }

    /// The groups' names.
    pub fn names(&self) -> Vec<String> {
        self.groups.iter().map(|group| group.name.as_str().to_owned()).collect()
    }

    /// The group of this name.
    pub fn group(&self, name: &str) -> Option<&GroupConfig> {
        self.groups.iter().find(|group| group.name.as_str() == name)
    }

    /// Adds a group that goes together with the others.
    fn admit(&mut self, path: &Path, group: GroupConfig) -> Result<(), ConfigError> {
        let refuse = |sentence: String| Err(ConfigError::file(path, sentence));
        for (index, volume) in group.volumes.iter().enumerate() {
            let before = group.volumes.iter().take(index);
            if let Some(other) = before.clone().find(|other| same_disk(volume, other)) {
                let (one, other) = (other.backing.display(), volume.backing.display());
                return refuse(format!("{one} and {other} are the same disk"));
            }
            let socket = self.node.socket_of(&group.name, volume);
            if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
                return refuse(format!(
                    "the socket path {} is longer than the {SOCKET_PATH_BYTES_MAX} bytes that a \
                     Unix socket may have; set a shorter 'socket' or 'runtime_dir'",
                    socket.display()
                ));
            }
            let taken = |other: &VolumeConfig| self.node.socket_of(&group.name, other) == socket;
            if socket == self.node.api_socket || before.clone().any(taken) {
                let socket = socket.display();
                return refuse(format!("the socket {socket} is there twice; each needs its own"));
            }
        }
        for other in &self.groups {
            if other.id == group.id {
                return refuse(format!(
                    "the id {} is that of the group '{}' too; every group needs its own",
                    group.id, other.name
                ));
            }
            for volume in &group.volumes {
                if other.volumes.iter().any(|taken| same_disk(volume, taken)) {
                    return refuse(format!(
                        "{} is protected by the group '{}' already; a disk belongs to one group",
                        volume.backing.display(),
                        other.name
                    ));
                }
                let socket = self.node.socket_of(&group.name, volume);
                let of = |taken| self.node.socket_of(&other.name, taken);
                if other.volumes.iter().any(|taken| of(taken) == socket) {
                    return refuse(format!(
                        "the socket {} is one of the group '{}' too; each volume needs its own",
                        socket.display(),
                        other.name
                    ));
                }
            }
        }
        self.groups.push(group);
        Ok(())
    }
}

/// Whether two volumes mean one disk: by the same path, or by what lies behind the paths now.
fn same_disk(one: &VolumeConfig, other: &VolumeConfig) -> bool {
    one.backing == other.backing
        || identity(&one.backing).is_some_and(|disk| identity(&other.backing) == Some(disk))
}

/// What the kernel tells a disk or an image apart by; none if it cannot be looked at now.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    // Several nodes may lead to one device. No file is on a device 0.
    let device = metadata.file_type().is_block_device();
    Some(if device { (0, metadata.rdev()) } else { (metadata.dev(), metadata.ino()) })
}

/// The longest path of a Unix socket (`sun_path` without its final zero).
const SOCKET_PATH_BYTES_MAX: usize = 107;

impl NodeConfig {
    /// Where the state of a group is kept.
    pub fn state_of(&self, group: &Name) -> PathBuf {
        self.state_dir.join(group.as_str())
    }

    /// The directory of a group's spool, and the most that it may take.
    pub fn spool_of(&self, group: &Name) -> Option<(PathBuf, u64)> {
        let spool = self.spool.as_ref()?;
        Some((spool.directory.join(group.as_str()), spool.bytes_max.get()))
    }

    /// The Unix socket of a volume's plain NBD front.
    pub fn socket_of(&self, group: &Name, volume: &VolumeConfig) -> PathBuf {
        volume.socket.clone().unwrap_or_else(|| {
            self.runtime_dir.join("nbd").join(group.as_str()).join(format!("{}.sock", volume.name))
        })
    }
}

#[cfg(test)]
mod tests;
