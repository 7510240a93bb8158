//! Points as block devices: `tidemark attach` and `detach` with a real kernel, on the target itself and over TLS.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;
use tidemark_tests::vm::{Guest, Job, Lab, program};

/// Daemons end by themselves after this.
const DAEMON_LIMIT: Duration = Duration::from_secs(900);

/// A source and a target in one machine, with a disk of random content.
const SET_UP: &str = r#"
set -e
mkdir -p /etc/tidemark /var/lib /run
cd /etc/tidemark
tidemark init --dir /pki --node both
mkdir pki && cp /pki/nodes/both/* pki/
echo 'node = "both"' > agent.toml
cat > target.toml <<END
data_dir = "/var/lib/target"
[link]
listen = "127.0.0.1:7410"
ca = "/etc/tidemark/pki/ca.pem"
certificate = "/etc/tidemark/pki/node.pem"
key = "/etc/tidemark/pki/node.key"
[nbd]
unix = "/run/nbd.sock"
listen = "127.0.0.1:10809"
[store]
segment = "16 MiB"
[api]
socket = "/run/tidemark/target.sock"
[[group]]
name = "shop"
node = "both"
END
ip link set lo up
dd if=/dev/urandom of=/disk.img bs=1M count=16 2>/dev/null
"#;

#[derive(Deserialize)]
struct Attached {
    temporary_branch: Option<String>,
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    device: String,
}

/// Attaches and returns the one device.
fn attach(guest: &Guest, words: &str) -> Result<(Attached, String)> {
    let said = guest.sh(&format!("tidemark attach --json {words}"))?;
    let attached: Attached = serde_json::from_str(&said).with_context(|| said.clone())?;
    ensure!(attached.devices.len() == 1, "{said}");
    let device = attached.devices[0].device.clone();
    Ok((attached, device))
}

/// The hash of a device's content as the disk has it, not the cache.
fn content(guest: &Guest, path: &str) -> Result<String> {
    let script = format!("echo 3 > /proc/sys/vm/drop_caches; md5sum < {path}");
    Ok(guest.sh(&script)?.trim().to_owned())
}

fn wait_until(guest: &Guest, condition: &str) -> Result<()> {
    guest
        .sh(&format!("for n in $(seq 300); do ({condition}) && exit 0; sleep 0.2; done; exit 1"))
        .with_context(|| format!("it never came true: {condition}"))?;
    Ok(())
}

fn start_target(guest: &Guest) -> Result<Job<'_>> {
    let target = guest.spawn_for("exec tidemark target run 2>>/target.log", DAEMON_LIMIT)?;
    wait_until(guest, "test -S /run/tidemark/target.sock && tidemark points shop >/dev/null 2>&1")?;
    Ok(target)
}

#[test]
fn a_point_is_attached_and_taken_away() -> Result<()> {
    Lab::run("attach", 1, |lab| {
        let mut guest = lab.guest("one").program(&program("tidemark")?).boot()?;
        guest.sh(SET_UP)?;
        let target = start_target_first(&guest)?;
        let agent = guest.spawn_for("exec tidemark agent run 2>>/agent.log", DAEMON_LIMIT)?;
        wait_until(&guest, "test -S /run/tidemark/agent.sock")?;
        guest.sh("tidemark protect shop --volume data=/disk.img --front nbd-kernel \
             --target 127.0.0.1 --target-name both")?;
        wait_until(&guest, "tidemark status | grep -q 'every write is captured'")?;
        let before = content(&guest, "/disk.img")?;
        guest.sh("tidemark mark shop before")?;
        guest.sh("dd if=/dev/urandom of=/dev/tidemark/shop/data bs=64k count=32 conv=fsync")?;
        guest.sh("tidemark mark shop after")?;
        let after = content(&guest, "/dev/tidemark/shop/data")?;
        ensure!(before != after);
        wait_until(&guest, "tidemark points shop | grep -q '@mark:after'")?;

        // A branch of its own: what is written into it is there and nowhere else.
        let (attached, branch) = attach(&guest, "shop@mark:before")?;
        ensure!(attached.temporary_branch.is_some());
        ensure!(content(&guest, &branch)? == before);
        guest.sh(&format!("dd if=/dev/urandom of={branch} bs=4k count=100 seek=77 conv=fsync"))?;
        let written = content(&guest, &branch)?;
        ensure!(written != before);
        let (attached, fixed) = attach(&guest, "shop@mark:before --read-only")?;
        ensure!(attached.temporary_branch.is_none());
        ensure!(content(&guest, &fixed)? == before);
        ensure!(!guest.run(&format!("dd if=/dev/zero of={fixed} bs=4k count=1"))?.success());
        ensure!(content(&guest, &branch)? == written);

        // Over TLS, as another machine would.
        let (_, remote) =
            attach(&guest, "shop@mark:after --read-only --target 127.0.0.1 --target-name both")?;
        ensure!(content(&guest, &remote)? == after);

        // The devices outlive the target, and go on when it is back.
        target.signal(Signal::SIGTERM)?;
        target.wait()?;
        let reader = guest.spawn(&format!(
            "echo 3 > /proc/sys/vm/drop_caches; md5sum < {fixed}; md5sum < {remote}"
        ))?;
        let _target = start_target(&guest)?;
        let read = reader.wait()?;
        ensure!(read.success(), "{read:?}");
        ensure!(read.text().lines().eq([before.as_str(), after.as_str()]), "{read:?}");

        // In use, then not.
        let holder = guest.spawn(&format!("exec sleep 60 3<>{branch}"))?;
        let refused = guest.run("tidemark detach shop")?;
        ensure!(
            refused.status == Some(1) && refused.error_text().contains("is in use"),
            "{refused:?}"
        );
        holder.signal(Signal::SIGKILL)?;
        holder.wait()?;
        let said = guest.sh("tidemark detach shop")?;
        ensure!(said.matches("Detached").count() == 3, "{said}");
        ensure!(guest.sh("tidemark branch list")?.trim() == "There are no branches.");
        for device in [&branch, &fixed, &remote] {
            let name = device.trim_start_matches("/dev/");
            ensure!(guest.sh(&format!("cat /sys/block/{name}/size"))?.trim() == "0", "{device}");
        }
        ensure!(guest.run("pgrep -f attach-worker")?.text().trim().is_empty());
        agent.signal(Signal::SIGTERM)?;
        agent.wait()?;
        guest.shut_down()
    })
}

/// There are no points yet to wait for.
fn start_target_first(guest: &Guest) -> Result<Job<'_>> {
    let target = guest.spawn_for("exec tidemark target run 2>>/target.log", DAEMON_LIMIT)?;
    wait_until(guest, "test -S /run/tidemark/target.sock")?;
    Ok(target)
}
