//! The bodies in JSON: what is said at the start of a connection, at its end, and to people.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use tidemark_journal::{Ancestry, GroupId, Position, Seq, VolumeId, record::RECORD_BYTES_MAX};

/// The most volumes in a group.
const VOLUMES_MAX: usize = 1024;
/// The most characters in a name.
const NAME_CHARS_MAX: usize = 255;
/// The most characters of a sentence for people; what is longer is cut.
pub const SENTENCE_CHARS_MAX: usize = 1000;
/// The largest volume, in sectors (128 PiB).
const SECTORS_MAX: u64 = 1 << 48;
/// The highest generation of a dirty map; a source counts on from what a target says.
const GENERATION_MAX: u64 = 1 << 62;
/// The highest sequence at which a replica ends: its source goes on above it.
const END_MAX: Seq = Seq(Seq::MAX.0 / 2);

/// The source greets: who it is, what it holds and what it remembers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The protocols that the source speaks.
    pub protocol: ProtocolRange,
    /// Optional abilities of the source, by name.
    #[serde(default)]
    pub features: Vec<String>,
    /// Version of the source's software, for people.
    pub software: String,
    /// The group.
    pub group: GroupHello,
    /// The path of terms that ends in the one being written.
    pub ancestry: Ancestry,
    /// The volumes of the group.
    pub volumes: Vec<VolumeHello>,
    /// The newest position that the source remembers as final-durable; sequence 0 means none.
    pub acked: Position,
    /// The sequences up to here are reserved durably; nothing above has ever been used.
    pub ceiling: Seq,
    /// Generation of the dirty map; it grows with every change of the map.
    pub map_generation: u64,
}

/// A range of protocol versions, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProtocolRange {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl ProtocolRange {
    /// What this program speaks.
    pub const OWN: ProtocolRange =
        ProtocolRange { min: super::PROTOCOL_MIN, max: super::PROTOCOL_MAX };

    /// The newest protocol that both speak.
    pub fn common(self, other: ProtocolRange) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

/// A group in a greeting.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GroupHello {
    /// Its id.
    pub id: GroupId,
    /// Its name, for people.
    pub name: String,
}

/// A volume in a greeting.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeHello {
    /// Its number in the group.
    pub id: VolumeId,
    /// Its name, part of the names of its points.
    pub name: String,
    /// Its size.
    pub sectors: u64,
    /// Its logical block, in bytes.
    pub logical_block_bytes: u32,
    /// Its physical block, in bytes.
    pub physical_block_bytes: u32,
}

/// The target takes the source on, and says where it stands.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// The protocol chosen for this connection.
    pub protocol: u16,
    /// Optional abilities that both have, by name.
    #[serde(default)]
    pub features: Vec<String>,
    /// Version of the target's software, for people.
    pub software: String,
    /// The durable end of the replica; none when the replica is new.
    pub position: Option<Position>,
    /// The path of terms that ends with the position's: a source whose state is from an earlier time
    /// may not know it. None when the replica is new, or its path is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<Ancestry>,
    /// The newest generation of the source's dirty map that the target has durably seen.
    pub map_generation: u64,
    /// The sizes of the replica's volumes.
    #[serde(default)]
    pub volumes: Vec<VolumeSize>,
}

/// A volume's size as the target holds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeSize {
    /// Its number in the group.
    pub id: VolumeId,
    /// Its size.
    pub sectors: u64,
}

/// One end ends the connection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error, Serialize, Deserialize)]
#[error("{sentence}")]
pub struct Refuse {
    /// Why, for programs.
    pub code: RefuseCode,
    /// Why, for people, and what to do.
    pub sentence: String,
}

/// Why a connection is refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefuseCode {
    /// The target knows no such group.
    UnknownGroup,
    /// The certificate's name may not write this group.
    NotAllowed,
    /// There is no protocol that both speak.
    Version,
    /// A volume has another size than its replica.
    SizeMismatch,
    /// The two histories contradict each other.
    Diverged,
    /// There is no room.
    Full,
    /// Another connection holds the group.
    Busy,
    /// Something else, or a reason that this version does not know.
    #[serde(other)]
    Other,
}

/// How much a notice matters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Somebody should look at it.
    Warning,
    /// Something is broken.
    #[serde(other)]
    Error,
}

/// The target tells the people at the source something.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Notice {
    /// How much it matters.
    pub severity: Severity,
    /// What there is to say.
    pub sentence: String,
}

impl Hello {
    pub(super) fn checked(mut self) -> Result<Hello, String> {
        self.software = clean(&self.software);
        if self.protocol.min > self.protocol.max {
            return Err("its range of protocols is empty".into());
        }
        generation(self.map_generation)?;
        name(&self.group.name)?;
        if self.volumes.len() > VOLUMES_MAX {
            return Err(format!("a group of more than {VOLUMES_MAX} volumes"));
        }
        let (mut ids, mut names) = (HashSet::new(), HashSet::new());
        for volume in &self.volumes {
            volume.check()?;
            if !ids.insert(volume.id) || !names.insert(&volume.name) {
                return Err(format!("volume {} is there twice", volume.id));
            }
        }
        Ok(self)
    }
}

impl VolumeHello {
    fn check(&self) -> Result<(), String> {
        name(&self.name)?;
        size(self.id, self.sectors)?;
        let block = |bytes: u32| {
            bytes.is_power_of_two() && bytes >= 512 && u64::from(bytes) <= RECORD_BYTES_MAX
        };
        if !block(self.logical_block_bytes) || !block(self.physical_block_bytes) {
            return Err(format!("volume {} has impossible block sizes", self.id));
        }
        Ok(())
    }
}

impl Welcome {
    pub(super) fn checked(mut self) -> Result<Welcome, String> {
        self.software = clean(&self.software);
        if self.volumes.len() > VOLUMES_MAX {
            return Err(format!("a group of more than {VOLUMES_MAX} volumes"));
        }
        self.volumes.iter().try_for_each(|volume| size(volume.id, volume.sectors))?;
        generation(self.map_generation)?;
        let begins = self.path.as_ref().map_or(Seq::ZERO, |path| path.current().fork_seq);
        let end = self.position.map_or(begins, |position| position.seq.max(begins));
        if end > END_MAX {
            return Err(format!("no replica ends at sequence {end}"));
        }
        Ok(self)
    }
}

impl Refuse {
    /// A refusal with its sentence.
    pub fn new(code: RefuseCode, sentence: impl Into<String>) -> Refuse {
        Refuse { code, sentence: sentence.into() }
    }

    pub(super) fn cleaned(self) -> Refuse {
        Refuse { sentence: clean(&self.sentence), ..self }
    }
}

impl Notice {
    /// A notice with its sentence.
    pub fn new(severity: Severity, sentence: impl Into<String>) -> Notice {
        Notice { severity, sentence: sentence.into() }
    }

    pub(super) fn cleaned(self) -> Notice {
        Notice { sentence: clean(&self.sentence), ..self }
    }
}

/// A peer's sentence, fit for a terminal and a log: one line, no control characters, bounded.
fn clean(sentence: &str) -> String {
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    sentence.chars().take(SENTENCE_CHARS_MAX).map(printable).collect()
}

fn name(name: &str) -> Result<(), String> {
    let good = |c: char| !c.is_control() && c != '/' && c != '@';
    if name.is_empty() || name.chars().count() > NAME_CHARS_MAX || !name.chars().all(good) {
        return Err(format!(
            "a name must have 1 to {NAME_CHARS_MAX} characters, none of them '/', '@' or a control character"
        ));
    }
    Ok(())
}

/// A generation of a dirty map, if there can be such a one.
pub(super) fn generation(generation: u64) -> Result<u64, String> {
    let sentence = || format!("its dirty map's generation, {generation}, is impossible");
    (generation <= GENERATION_MAX).then_some(generation).ok_or_else(sentence)
}

fn size(id: VolumeId, sectors: u64) -> Result<(), String> {
    if sectors == 0 || sectors > SECTORS_MAX {
        return Err(format!("volume {id} has an impossible size of {sectors} sectors"));
    }
    Ok(())
}
