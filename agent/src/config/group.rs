//! `agent.d/GROUP.toml`.

use std::num::NonZeroU64;
use std::path::PathBuf;

use serde::Deserialize;
use tidemark_control::config::{Bytes, ConfigError, Name, Seconds, Source};
use tidemark_journal::{GroupId, VolumeId};
use tidemark_link::NodeName;
use tidemark_link::throttle::Schedule;
use toml::Spanned;

use super::values::{
    ActiveRegions, CompressionSetting, FrontChoice, HostPort, RingBytes, SyncTimeout,
};

/// The most volumes in a group, as the link has it.
const VOLUMES_MAX: usize = crate::capture::ring::VOLUMES_MAX;

/// A group to protect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GroupConfig {
    /// Its name: that of the file.
    pub name: Name,
    /// Its id, drawn when it was made and the same for ever.
    pub id: GroupId,
    /// Where it is sent.
    pub target: TargetConfig,
    /// Memory for writes that are on their way.
    pub ring_bytes: RingBytes,
    /// How many regions may be active at once: what is compared after a power cut.
    pub active_regions: ActiveRegions,
    /// How hard frames are compressed.
    pub compression: CompressionSetting,
    /// The most that first sync, catch-up and verify read in a second; none means unlimited.
    pub catch_up_bytes_per_s: Option<NonZeroU64>,
    /// How fast frames may be sent, by the time of day.
    pub throttle: Schedule,
    /// How much the target may lag before somebody should know.
    pub rpo_target_s: Option<Seconds>,
    /// How often everything is compared with the target; none: only when somebody asks for it.
    pub verify_every_s: Option<Seconds>,
    /// How long an answer waits for the target before the group falls back to async; none if it is not
    /// to be in sync at all.
    pub sync_timeout: Option<SyncTimeout>,
    /// How volumes are presented unless they say otherwise.
    pub front: FrontChoice,
    /// The volumes, at least one, in the order of their ids.
    pub volumes: Vec<VolumeConfig>,
}

/// Where a group is sent.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// Where the target listens.
    pub address: HostPort,
    /// The name in its certificate.
    pub name: NodeName,
}

/// A disk to protect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeConfig {
    /// Its number in the group, the same for ever.
    pub id: VolumeId,
    /// Its name.
    pub name: Name,
    /// The disk or image.
    pub backing: PathBuf,
    /// How it is presented.
    pub front: FrontChoice,
    /// The socket of a plain NBD front, if not the usual one.
    pub socket: Option<PathBuf>,
}

impl GroupConfig {
    /// Reads and judges a group's file. Its name is the group's.
    ///
    /// # Errors
    /// A sentence with the line concerned.
    pub fn parse(source: &Source) -> Result<GroupConfig, ConfigError> {
        let stem = source.path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = Name::try_from(stem).map_err(|error| {
            ConfigError::file(source.path(), format!("the file's name is the group's, and {error}"))
        })?;
        let file: GroupFile = source.parse()?;
        if file.id.get_ref().is_nil() {
            return Err(
                source.fault(file.id.span(), "an id of zeros means none; draw a random one")
            );
        }
        let mut volumes: Vec<VolumeConfig> = Vec::new();
        if file.volumes.len() > VOLUMES_MAX {
            let sentence = format!("a group has at most {VOLUMES_MAX} volumes");
            return Err(ConfigError::file(source.path(), sentence));
        }
        for volume in file.volumes {
            let volume = volume.judge(source, &volumes, file.front)?;
            volumes.push(volume);
        }
        if volumes.is_empty() {
            let sentence = "the group has no volume: add a [[volume]] with id, name and backing";
            return Err(ConfigError::file(source.path(), sentence));
        }
        volumes.sort_by_key(|volume| volume.id);
        let positive = |key: &str, bytes: Spanned<Bytes>| {
            NonZeroU64::new(bytes.get_ref().0).ok_or_else(|| {
                let sentence =
                    format!("'{key}' of 0 would stop it; leave the key out for no limit");
                source.fault(bytes.span(), sentence)
            })
        };
        Ok(GroupConfig {
            name,
            id: file.id.into_inner(),
            target: file.target,
            ring_bytes: file.ring_bytes,
            active_regions: file.active_regions,
            compression: file.compression,
            catch_up_bytes_per_s: file
                .catch_up_bytes_per_s
                .map(|bytes| positive("catch_up_bytes_per_s", bytes))
                .transpose()?,
            throttle: file.throttle,
            rpo_target_s: file.rpo_target_s,
            verify_every_s: match file.verify.every {
                Some(every) if every.get_ref().0 == 0 => {
                    let sentence = "an interval of 0 would never end; leave 'every' out for none";
                    return Err(source.fault(every.span(), sentence));
                }
                every => every.map(Spanned::into_inner),
            },
            sync_timeout: match (file.sync, file.sync_timeout) {
                (true, timeout) => Some(timeout.map(Spanned::into_inner).unwrap_or_default()),
                (false, None) => None,
                (false, Some(timeout)) => {
                    let sentence = "a time to wait is of use with sync = true only";
                    return Err(source.fault(timeout.span(), sentence));
                }
            },
            front: file.front,
            volumes,
        })
    }
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupFile {
    id: Spanned<GroupId>,
    target: TargetConfig,
    #[serde(default)]
    ring_bytes: RingBytes,
    #[serde(default)]
    active_regions: ActiveRegions,
    #[serde(default)]
    compression: CompressionSetting,
    catch_up_bytes_per_s: Option<Spanned<Bytes>>,
    #[serde(default)]
    throttle: Schedule,
    rpo_target_s: Option<Seconds>,
    #[serde(default)]
    sync: bool,
    sync_timeout: Option<Spanned<SyncTimeout>>,
    #[serde(default)]
    verify: VerifyFile,
    #[serde(default)]
    front: FrontChoice,
    #[serde(default, rename = "volume")]
    volumes: Vec<VolumeFile>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct VerifyFile {
    every: Option<Spanned<Seconds>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VolumeFile {
    id: Spanned<VolumeId>,
    name: Spanned<Name>,
    backing: Spanned<PathBuf>,
    front: Option<FrontChoice>,
    socket: Option<Spanned<PathBuf>>,
}

impl VolumeFile {
    fn judge(
        self,
        source: &Source,
        before: &[VolumeConfig],
        front: FrontChoice,
    ) -> Result<VolumeConfig, ConfigError> {
        let twice = |span, what: &str| {
            Err(source.fault(span, format!("another volume of the group has this {what}")))
        };
        if before.iter().any(|other| other.id == *self.id.get_ref()) {
            return twice(self.id.span(), "id");
        }
        if before.iter().any(|other| other.name == *self.name.get_ref()) {
            return twice(self.name.span(), "name");
        }
        if before.iter().any(|other| other.backing == *self.backing.get_ref()) {
            return twice(self.backing.span(), "backing");
        }
        for path in [Some(&self.backing), self.socket.as_ref()].into_iter().flatten() {
            if !path.get_ref().is_absolute() {
                let sentence = "this must be a path that begins with '/'";
                return Err(source.fault(path.span(), sentence));
            }
        }
        let front = self.front.unwrap_or(front);
        if let Some(socket) = &self.socket
            && !matches!(front, FrontChoice::NbdSocket | FrontChoice::Auto)
        {
            let sentence = "a socket is of use with front = \"nbd-socket\" only";
            return Err(source.fault(socket.span(), sentence));
        }
        Ok(VolumeConfig {
            id: self.id.into_inner(),
            name: self.name.into_inner(),
            backing: self.backing.into_inner(),
            front,
            socket: self.socket.map(Spanned::into_inner),
        })
    }
}
