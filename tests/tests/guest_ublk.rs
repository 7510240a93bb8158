//! A ublk device in front of a guest's disk, with real units and udev: its name, its first sync, exactness of
//! what the target logs, a filesystem from fstab, and a replica equal to the disk.

use anyhow::{Result, ensure};
use tidemark_tests::pair::{Pair, Plan};
use tidemark_tests::vm::Lab;

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 256 * MIB;

#[test]
fn a_disk_behind_ublk_is_captured_exactly_and_replicated() -> Result<()> {
    Lab::run("ublk", 2, |lab| {
        let plan = Plan::new(&[("raw", SIZE_BYTES), ("data", SIZE_BYTES)]);
        Pair::run(lab, plan, |pair| {
            let status = pair.wait_in_sync()?;
            ensure!(status.volumes.len() == 2, "{status:#?}");
            names_are_as_promised(pair)?;
            pair.check_exactness("raw", 6_000, 90)?;
            a_filesystem_lives_on_it(pair)?;
            pair.compare_latest("raw")?;
            pair.compare_latest("data")?;
            pair.check_given_up("data")
        })
    })
}

/// Stable names are ublk devices; the raw disks are hidden from those who look for content.
fn names_are_as_promised(pair: &Pair) -> Result<()> {
    let source = &pair.source;
    for volume in ["raw", "data"] {
        let (device, raw) = (pair.device(volume), pair.raw_disk(volume));
        let real = source.sh(&format!("readlink -f {device}"))?;
        ensure!(real.starts_with("/dev/ublkb"), "{device} is {real}");
        let sizes = source.sh(&format!("blockdev --getsize64 {device} {raw}"))?;
        ensure!(sizes == format!("{SIZE_BYTES}\n{SIZE_BYTES}\n"), "{sizes}");
        let refused = source.run(&format!("mount {raw} /mnt"))?;
        ensure!(!refused.success(), "the raw disk below {device} can be mounted");
    }
    Ok(())
}

/// Its UUID leads to the device, never to the disk below it.
fn a_filesystem_lives_on_it(pair: &Pair) -> Result<()> {
    pair.check_filesystem("data")?;
    let device = pair.device("data");
    let by_uuid = format!("readlink -f /dev/disk/by-uuid/$(blkid -o value -s UUID {device})");
    let found = pair.source.sh(&by_uuid)?;
    ensure!(found.starts_with("/dev/ublkb"), "by its UUID the filesystem is {found}");
    Ok(())
}
