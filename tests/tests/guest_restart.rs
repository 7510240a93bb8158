//! Restarts under a mounted file system with a load on it: the source's, the agent's and the target's for new
//! programs, and an agent that is killed. The load sees a pause at most, and everything goes on where it was: the ring
//! outlives its agent with the service manager.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use tidemark_tests::pair::{Pair, Plan};
use tidemark_tests::vm::{Guest, Job, Lab};

const MIB: u64 = 1 << 20;
/// How long the load runs between two disturbances.
const STRETCH: Duration = Duration::from_secs(4);

#[test]
fn restarts_and_a_killed_agent_leave_no_gap_and_no_error() -> Result<()> {
    Lab::run("restart", 2, |lab| {
        Pair::run(lab, Plan::new(&[("data", 192 * MIB)]), |pair| {
            mount(pair)?;
            pair.wait_in_sync()?;
            let before = pair.mark("before")?;
            services_are_upgraded_under_load(pair)?;
            pair.check_unbroken(before)?;
            the_source_restarts(pair)?;
            pair.check_unbroken(before)?;
            an_agent_is_killed(pair)?;
            pair.check_unbroken(before)?;
            pair.source.sh("umount /srv/data")?;
            pair.compare_latest("data")
        })
    })
}

fn mount(pair: &Pair) -> Result<()> {
    let device = pair.device("data");
    pair.source.sh(&format!(
        "mkfs.ext4 -q {device} && mkdir -p /srv/data && \
         echo '{device} /srv/data ext4 _netdev 0 2' >>/etc/fstab && systemctl daemon-reload && \
         mount /srv/data"
    ))?;
    Ok(())
}

/// Random writes past the page cache, each soon read back and compared, until interrupted.
fn start_load(pair: &Pair) -> Result<Job<'_>> {
    pair.source.sh("rm -f /run/fio.out")?;
    pair.source.spawn_for(
        "fio --name=load --filename=/srv/data/load --filesize=32m --rw=randwrite --bs=4k --direct=1 \
         --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_backlog=32 \
         --rate_iops=150 --fsync=64 --time_based --runtime=600 --output=/run/fio.out",
        Duration::from_secs(700),
    )
}

/// Interrupts the load, which must have gone well so far.
fn end_load(pair: &Pair, load: Job<'_>) -> Result<()> {
    // It writes and reads after the last disturbance as well.
    thread::sleep(STRETCH);
    load.signal(nix::sys::signal::Signal::SIGINT)?;
    load.wait()?;
    let report = pair.source.sh("cat /run/fio.out")?;
    ensure!(report.contains("err= 0"), "the load saw an error: {report}");
    let complaints =
        pair.source.run("dmesg --notime | grep -E 'EXT4-fs (error|warning)|I/O error'")?;
    ensure!(!complaints.success(), "the source's kernel says {}", complaints.text());
    Ok(())
}

fn services_are_upgraded_under_load(pair: &Pair) -> Result<()> {
    let load = start_load(pair)?;
    thread::sleep(STRETCH);
    upgrade(&pair.source, "tidemark-agent")?;
    thread::sleep(STRETCH);
    upgrade(&pair.target, "tidemark-target")?;
    thread::sleep(STRETCH);
    end_load(pair, load)?;
    let status = pair.wait_in_sync()?;
    ensure!(status.gaps_total == 0, "{status:#?}");
    Ok(())
}

/// Puts another program in the place of a service's, as a package does, and has it restarted, as the machine's owner
/// does afterwards.
fn upgrade(guest: &Guest, service: &str) -> Result<()> {
    let program = format!("/usr/bin/{service}");
    guest.sh(&format!(
        "cp -p {program} {program}.new && echo another >>{program}.new && mv {program}.new {program}"
    ))?;
    let runs = format!("readlink /proc/$(systemctl show --property=MainPID --value {service})/exe");
    let before = guest.sh(&runs)?;
    ensure!(before.trim().ends_with("(deleted)"), "{service} runs {before}");
    guest.sh(&format!("systemctl restart {service}"))?;
    let after = guest.sh(&runs)?;
    ensure!(!after.contains("deleted"), "after its upgrade {service} runs {after}");
    Ok(())
}

fn the_source_restarts(pair: &Pair) -> Result<()> {
    let source = &pair.source;
    source.sh("sync && md5sum /srv/data/load >/root/load.md5")?;
    source.reboot()?;
    // Mounted by its stable name, on the device, with what was on it.
    let real = source.sh("readlink -f /dev/tidemark/shop/data")?;
    let mounted = source.sh("findmnt -n -o SOURCE /srv/data")?;
    ensure!(real.starts_with("/dev/ublkb"), "after the restart the device is {real}");
    ensure!(real == mounted, "/srv/data is a mount of {mounted}, not of {real}");
    source.sh("md5sum --check --quiet /root/load.md5 && echo back >/srv/data/back && sync")?;
    pair.wait_in_sync()?;
    Ok(())
}

fn an_agent_is_killed(pair: &Pair) -> Result<()> {
    let load = start_load(pair)?;
    thread::sleep(STRETCH);
    pair.source.sh("systemctl kill --signal=KILL tidemark-agent")?;
    thread::sleep(STRETCH);
    end_load(pair, load)?;
    let restarts = pair.source.sh("systemctl show --property=NRestarts --value tidemark-agent")?;
    ensure!(restarts.trim() == "1", "the agent was started again {} times", restarts.trim());
    pair.wait_in_sync()?;
    Ok(())
}
