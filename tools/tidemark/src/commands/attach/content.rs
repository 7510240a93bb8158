//! What is on a device, for hints about mounting it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Serialize;

/// What the first bytes of a device look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// A partition table.
    Partitions,
    /// An LVM physical volume.
    Lvm,
    /// Something else, or nothing.
    Unknown,
}

/// How many bytes tell it.
const HEAD_BYTES: usize = 4096;

impl Content {
    /// Looks at a device.
    pub fn of(device: &str) -> Content {
        let mut head = [0; HEAD_BYTES];
        match File::open(device).and_then(|file| file.read_exact_at(&mut head, 0)) {
            Ok(()) => Content::judge(&head),
            Err(_) => Content::Unknown,
        }
    }

    fn judge(head: &[u8; HEAD_BYTES]) -> Content {
        let at =
            |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|h| h.starts_with(magic));
        if at(0, b"XFSB") {
            Content::Xfs
        } else if at(1080, &[0x53, 0xef]) {
            Content::Ext
        } else if (0..4).any(|sector| at(sector * 512, b"LABELONE")) {
            Content::Lvm
        } else if at(510, &[0x55, 0xaa]) {
            Content::Partitions
        } else {
            Content::Unknown
        }
    }

    /// Commands to use it with.
    pub fn hints(self, device: &str, volume: &str, read_only: bool) -> Vec<String> {
        let at = format!("/mnt/{volume}");
        let mount = |options: &str| match options {
            "" => format!("mount {device} {at}"),
            _ => format!("mount -o {options} {device} {at}"),
        };
        match (self, read_only) {
            // A read-only device cannot have its journal replayed.
            (Content::Ext, true) => vec![mount("ro,noload")],
            (Content::Ext, false) => vec![mount("")],
            (Content::Xfs, true) => vec![mount("ro,norecovery,nouuid")],
            (Content::Xfs, false) => vec![mount("nouuid")],
            (Content::Partitions, _) => {
                vec![format!("lsblk -f {device}   # its partitions are {device}p1 and so on")]
            }
            (Content::Lvm, _) => vec![format!(
                "vgimportclone --basevgname {volume}-recovered {device}   # then vgchange -ay"
            )],
            (Content::Unknown, _) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_recognised_and_mounted_safely() {
        let with = |offset: usize, magic: &[u8]| {
            let mut head = [0; HEAD_BYTES];
            head[offset..offset + magic.len()].copy_from_slice(magic);
            Content::judge(&head)
        };
        assert_eq!(with(0, b"XFSB"), Content::Xfs);
        assert_eq!(with(1080, &[0x53, 0xef]), Content::Ext);
        assert_eq!(with(512, b"LABELONE"), Content::Lvm);
        assert_eq!(with(510, &[0x55, 0xaa]), Content::Partitions);
        assert_eq!(with(0, b""), Content::Unknown);
        let hint = |content: Content, ro| content.hints("/dev/nbd0", "data", ro).join("");
        assert_eq!(hint(Content::Xfs, true), "mount -o ro,norecovery,nouuid /dev/nbd0 /mnt/data");
        assert_eq!(hint(Content::Ext, false), "mount /dev/nbd0 /mnt/data");
    }
}
