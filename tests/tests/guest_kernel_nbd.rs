//! The front for kernels without ublk: the kernel's own NBD client.

use anyhow::{Result, ensure};
use tidemark_tests::pair::{Pair, Plan};
use tidemark_tests::vm::Lab;

const MIB: u64 = 1 << 20;

#[test]
fn a_disk_behind_the_kernels_nbd_client_is_captured_exactly_and_replicated() -> Result<()> {
    Lab::run("kernel-nbd", 2, |lab| {
        let mut plan = Plan::new(&[("data", 128 * MIB)]);
        plan.front = "nbd-kernel";
        Pair::run(lab, plan, |pair| {
            pair.wait_in_sync()?;
            let device = pair.device("data");
            let real = pair.source.sh(&format!("readlink -f {device}"))?;
            ensure!(real.starts_with("/dev/nbd"), "{device} is {real}");
            pair.check_exactness("data", 2_000, 60)?;
            pair.check_filesystem("data")?;
            // The kernel keeps the device and its requests while no agent serves it.
            pair.source.sh(&format!("mount {device} /srv/data"))?;
            let load = pair.source.spawn(
                "fio --name=load --directory=/srv/data --filesize=16m --rw=randwrite --bs=4k \
                 --direct=1 --verify=crc32c --verify_fatal=1 --verify_backlog=32 --rate_iops=100 \
                 --time_based --runtime=15",
            )?;
            pair.source.sh("sleep 4; systemctl restart tidemark-agent; sleep 3")?;
            pair.source.sh("systemctl kill --signal=KILL tidemark-agent")?;
            let ended = load.wait()?;
            ensure!(ended.success(), "{}{}", ended.text(), ended.error_text());
            pair.source.sh("umount /srv/data")?;
            pair.compare_latest("data")?;
            pair.check_given_up("data")
        })
    })
}
