//! Small files that are replaced as a whole.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

/// Replaces `dir/name` durably: whoever reads it finds the old content or the new, at any time.
///
/// # Errors
/// The disk's; the old content is then still there.
pub fn replace_file(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let new = dir.join(format!("{name}.new"));
    fs::create_dir_all(dir)?;
    let file = File::create(&new)?;
    file.write_all_at(content, 0)?;
    file.sync_all()?;
    fs::rename(&new, dir.join(name))?;
    File::open(dir)?.sync_all()
}
