//! A source with the hardware of a VMware guest: pvscsi disks and a vmxnet3 card.

use anyhow::{Result, ensure};
use tidemark_tests::pair::{Pair, Plan};
use tidemark_tests::vm::{Hardware, Lab};

const MIB: u64 = 1 << 20;

#[test]
fn a_vmware_guests_disk_is_captured_exactly_and_replicated() -> Result<()> {
    Lab::run("vmware", 2, |lab| {
        let mut plan = Plan::new(&[("data", 128 * MIB)]);
        plan.hardware = Hardware::Vmware;
        Pair::run(lab, plan, |pair| {
            pair.wait_in_sync()?;
            let vendor = pair.source.sh("cat /sys/class/dmi/id/sys_vendor")?;
            ensure!(vendor.trim() == "VMware, Inc.", "{vendor}");
            pair.check_exactness("data", 2_000, 60)?;
            pair.check_filesystem("data")?;
            pair.compare_latest("data")?;
            pair.source.reboot()?;
            let device = pair.device("data");
            let real = pair.source.sh(&format!(
                "udevadm wait --timeout=60 --settle {device} && readlink -f {device}"
            ))?;
            ensure!(real.starts_with("/dev/ublkb"), "after the restart the device is {real}");
            pair.compare_latest("data")
        })
    })
}
