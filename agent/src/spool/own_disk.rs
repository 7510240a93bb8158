//! Where a spool must not lie: on a disk that this agent protects.
//!
//! What is written to it would be captured as well, and so come back to it; and the disk's own writes
//! would wait for an agent that waits for the disk.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use crate::{
    config::{GroupConfig, NodeConfig},
    kernel::blockdev::{Disk, disks_below},
};

/// A spool on a protected disk.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the spool {} lies on {}, a disk that this agent protects: what is written to it would be captured \
     as well; set 'directory' in [spool] to one on another disk",
    directory.display(),
    backing.display()
)]
pub struct OnProtected {
    /// The spool's directory.
    pub directory: PathBuf,
    /// The protected disk, or the device in front of it.
    pub backing: PathBuf,
}

/// Looks whether the node's spool, or where it would be made, lies on one of these groups' disks or on
/// a device in front of one: through file systems, partitions, device mapper, RAID and loop devices
/// down to whole disks. What cannot be looked at now counts as another disk.
///
/// # Errors
/// [`OnProtected`].
pub fn check<'a>(
    node: &NodeConfig,
    groups: impl IntoIterator<Item = &'a GroupConfig>,
) -> Result<(), OnProtected> {
    let Some(spool) = &node.spool else { return Ok(()) };
    let there = spool.directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    find(&spool.directory, &disks_below(there), groups)
}

fn find<'a>(
    directory: &Path,
    below: &BTreeSet<Disk>,
    groups: impl IntoIterator<Item = &'a GroupConfig>,
) -> Result<(), OnProtected> {
    for group in groups {
        for volume in &group.volumes {
            let device =
                Path::new("/dev/tidemark").join(group.name.as_str()).join(volume.name.as_str());
            for path in [&volume.backing, &device] {
                if Disk::of(path).is_some_and(|disk| below.contains(&disk)) {
                    let (directory, backing) = (directory.to_owned(), path.clone());
                    return Err(OnProtected { directory, backing });
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tidemark_control::config::Source;

    use super::*;

    /// A node with its spool there, and a group with this backing.
    fn config(directory: &Path, backing: &str) -> (NodeConfig, GroupConfig) {
        let node = format!(
            "node = \"a\"\n[spool]\ndirectory = \"{}\"\nbytes_max = \"1 GiB\"\n",
            directory.display()
        );
        let group = format!(
            "id = \"5f0c3a9be1d24c7f8a6b0d9e2c4f1a37\"\n[target]\naddress = \"b\"\nname = \"b\"\n\
             [[volume]]\nid = 1\nname = \"data\"\nbacking = \"{backing}\"\n"
        );
        (
            NodeConfig::parse(&Source::new(Path::new("/agent.toml"), node)).unwrap(),
            GroupConfig::parse(&Source::new(Path::new("/g.toml"), group)).unwrap(),
        )
    }

    #[test]
    fn a_spool_on_a_protected_disk_is_refused() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let directory = image.path().parent().unwrap().join("is/not/made/yet");
        let (node, group) = config(&directory, image.path().to_str().unwrap());
        let (_, other) = config(&directory, "/dev/null");
        assert_eq!(check(&node, [&other, &group]), Ok(()), "the image is beside it, not below");
        let below = [Disk::of(image.path()).unwrap()].into_iter().collect();
        assert_eq!(find(&directory, &below, [&other]), Ok(()));
        let refused = find(&directory, &below, [&other, &group]).unwrap_err().to_string();
        assert!(refused.contains(image.path().to_str().unwrap()), "{refused}");
        assert!(refused.contains("to one on another disk"), "{refused}");
    }

    #[test]
    fn a_spool_that_makes_no_sense_is_refused() {
        let parse = |spool: &str| {
            let text = format!("node = \"a\"\n[spool]\n{spool}\n");
            NodeConfig::parse(&Source::new(Path::new("/agent.toml"), text))
                .map_err(|e| e.to_string())
        };
        let spool = parse("directory = \"/s\"\nbytes_max = \"1 GiB\"").unwrap().spool.unwrap();
        assert_eq!(spool.bytes_max.get(), 1 << 30);
        let small = parse("directory = \"/s\"\nbytes_max = \"63 MiB\"").unwrap_err();
        assert!(small.contains("64 MiB at least"), "{small}");
        let relative = parse("directory = \"s\"\nbytes_max = \"1 GiB\"").unwrap_err();
        assert!(relative.contains("'spool.directory' must be a path"), "{relative}");
    }
}
