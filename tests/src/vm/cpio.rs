//! Writes initramfs archives ("newc" cpio, as in the kernel's `Documentation/driver-api/early-userspace`).
//! Archives may follow one another in one file: the kernel unpacks them in order.

use std::collections::BTreeSet;
use std::path::{Component, Path};

const DIRECTORY: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const REGULAR: u32 = 0o100_000;

/// An archive in memory. Directories that a path needs are added by themselves.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// Adds a directory, and those above it.
    pub fn directory(&mut self, path: &str) {
        let mut whole = String::new();
        for part in Path::new(path).components() {
            let Component::Normal(part) = part else { continue };
            if !whole.is_empty() {
                whole.push('/');
            }
            whole.push_str(&part.to_string_lossy());
            if self.directories.insert(whole.clone()) {
                self.entry(&whole, DIRECTORY, &[]);
            }
        }
    }

    /// Adds a file with the given permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path, REGULAR | mode, content);
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, SYMLINK, target.as_bytes());
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some(parent) = Path::new(path).parent() {
            self.directory(&parent.to_string_lossy());
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        let path = path.trim_start_matches('/');
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        // inode, mode, uid, gid, links, time, size, device major and minor (own and special), name size, check
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn an_archive_has_the_documented_shape() {
        let mut archive = Archive::default();
        archive.file("/a/b", 0o644, b"hello");
        archive.file("/a/c", 0o755, b"");
        let bytes = archive.finish();
        // Per entry: a header of 110 bytes, the name with its NUL, the content, each padded to four bytes.
        let field = |entry: usize, number: usize| &bytes[entry + 6 + 8 * number..][..8];
        let (directory, file) = (0, 112);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(field(directory, 1), b"000041ed", "the directory comes first");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[file..file + 6], b"070701");
        assert_eq!(field(file, 1), b"000081a4");
        assert_eq!(field(file, 6), b"00000005");
        assert_eq!(field(file, 11), b"00000004");
        assert_eq!(&bytes[file + 110..file + 116], b"a/b\0\0\0");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }
}
