//! DRBD 8.4, which Debian's kernel has as a module, between the two guests: protocol A, where a write is done when it
//! is on the local disk and in the send buffer.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context, Result, bail};
use tidemark_tests::{pair::Pair, vm::Guest};

/// Where the source finds the device.
pub const DEVICE: &str = "/dev/drbd0";

const PORT: u16 = 7789;
/// Of 4 MiB each; a prime, as DRBD wants it. As much may be active as for the protected device.
const ACTIVE_EXTENTS: u32 = 257;
/// Where Debian's releases have what sets up the kernel's version of it.
const SETUP: [&str; 2] = ["/lib/drbd/drbdsetup-84", "/usr/lib/drbd/drbdsetup-84"];
const META: [&str; 2] = ["/sbin/drbdmeta", "/usr/sbin/drbdmeta"];

/// Makes the device on both guests, connected and equal, and the source the one that writes.
///
/// # Errors
/// drbd-utils is not installed here; a guest without the module.
pub fn start(pair: &Pair) -> Result<()> {
    let source_address = address(&pair.source)?;
    let ends = [
        (&pair.source, &source_address, &pair.target_address),
        (&pair.target, &pair.target_address, &source_address),
    ];
    for (guest, own, other) in ends {
        guest.copy_in(find(&META)?, "/usr/sbin/drbdmeta")?;
        guest.copy_in(find(&SETUP)?, "/usr/sbin/drbdsetup-84")?;
        let disk = pair.raw_disk("drbd");
        guest.sh(&format!(
            "modprobe drbd && mkdir -p /var/lib/drbd /run/lock && \
             drbdmeta --force 0 v08 {disk} internal create-md && \
             drbdsetup-84 new-resource r0 && drbdsetup-84 new-minor r0 0 0 && \
             drbdsetup-84 attach 0 {disk} {disk} internal --al-extents={ACTIVE_EXTENTS} && \
             drbdsetup-84 connect r0 ipv4:{own}:{PORT} ipv4:{other}:{PORT} --protocol=A"
        ))?;
    }
    wait_for(&pair.source, "cs:Connected")?;
    // Both disks are full of zeros: there is nothing to copy.
    pair.source.sh("drbdsetup-84 new-current-uuid 0 --clear-bitmap && drbdsetup-84 primary 0")?;
    wait_for(&pair.source, "ds:UpToDate/UpToDate")
}

/// Waits until the other side has answered for everything.
///
/// # Errors
/// It takes more than a minute.
pub fn wait_in_sync(pair: &Pair) -> Result<()> {
    wait_for(&pair.source, "pe:0 ua:0")
}

fn wait_for(guest: &Guest, text: &str) -> Result<()> {
    let mut state = String::new();
    for _ in 0..600 {
        state = guest.sh("cat /proc/drbd")?;
        if state.contains(text) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    bail!("DRBD does not come to {text}:\n{state}")
}

fn address(guest: &Guest) -> Result<String> {
    let text = guest.sh("ip -4 -o addr show scope global")?;
    let address = text.split_whitespace().skip_while(|word| *word != "inet").nth(1);
    let address = address.and_then(|address| address.split('/').next());
    Ok(address.with_context(|| format!("the guest has no address: {text}"))?.to_owned())
}

fn find(places: &'static [&'static str]) -> Result<&'static Path> {
    let found = places.iter().map(Path::new).find(|path| fs::exists(path).unwrap_or(false));
    found.with_context(|| format!("no {}: install drbd-utils", places[0]))
}
