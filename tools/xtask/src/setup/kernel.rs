//! Takes the kernel out of its boot image (`Documentation/arch/x86/boot.rst`), so that QEMU can start it directly
//! and no emulated processor has to decompress it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Offsets in the boot image's header.
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Writes the ELF kernel inside the boot image at `from` to `to`.
pub fn decompress(from: &Path, to: &Path) -> Result<()> {
    let image = fs::read(from)?;
    let mut zstd = Command::new("zstd")
        .args(["-dcq"])
        .stdin(Stdio::piped())
        .stdout(File::create(to)?)
        .spawn()
        .context("cannot start zstd")?;
    let mut input = zstd.stdin.take().context("zstd has no input")?;
    input.write_all(payload(&image)?)?;
    drop(input);
    let status = zstd.wait()?;
    if !status.success() {
        bail!("zstd ended with {status}: is the kernel compressed in another way?");
    }
    Ok(())
}

/// The compressed kernel. The length of the decompressed one follows it as its last four bytes.
fn payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
        bail!("it is no Linux boot image");
    }
    let found = || {
        let start = (usize::from(*image.get(SETUP_SECTORS)?) + 1) * 512 + word(PAYLOAD_OFFSET)?;
        image.get(start..start.checked_add(word(PAYLOAD_LENGTH)?)?.checked_sub(4)?)
    };
    found().context("its header names a payload outside of it")
}

#[cfg(test)]
mod tests {
    use super::{MAGIC, PAYLOAD_LENGTH, PAYLOAD_OFFSET, SETUP_SECTORS, payload};

    #[test]
    fn the_payload_is_where_the_header_says() {
        let mut image = vec![0; 2048];
        image[SETUP_SECTORS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET] = 0x10;
        image[PAYLOAD_LENGTH] = 9;
        image[1040..1045].copy_from_slice(b"zstd!");
        assert_eq!(payload(&image).unwrap(), b"zstd!");
        image[PAYLOAD_LENGTH + 2] = 1;
        assert!(payload(&image).is_err());
        assert!(payload(b"short").is_err());
    }
}
