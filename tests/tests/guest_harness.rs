//! The harness itself: both kinds of guest, what their kernels have, their networks, power cuts and restarts.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tidemark_tests::vm::{Disk, Guest, Hardware, Lab, boot_both, program};
use tidemark_tests::workload::history::History;
use tidemark_tests::workload::{Job, Shape, order};

const MIB: u64 = 1 << 20;

/// The kernel's doors that agents need, after their modules are loaded.
const DOORS: &str = "test -c /dev/ublk-control && test -b /dev/nbd0 && test -c /dev/mapper/control";

fn report(what: &str, since: Instant) {
    println!("{what}: {:.1} s", since.elapsed().as_secs_f64());
}

#[test]
fn a_fast_guest_has_modules_programs_and_files() -> Result<()> {
    Lab::run("harness-fast", 1, |lab| {
        let start = Instant::now();
        let mut guest = lab.guest("fast").program(Path::new("/usr/bin/sqlite3")).boot()?;
        report("fast guest up", start);
        guest.sh(DOORS)?;
        for target in ["flakey", "delay", "log-writes", "snapshot", "linear"] {
            guest.sh(&format!(
                "test -d /sys/module/dm_{} || [ {target} = linear ]",
                target.replace('-', "_")
            ))?;
        }
        ensure!(guest.sh("sqlite3 :memory: 'select 6 * 7'")?.trim() == "42");
        commands_report_how_they_end(&guest)?;
        files_travel_unchanged(lab, &guest)?;
        guest.reboot()?;
        ensure!(guest.read("/tmp/empty").is_err(), "a fast guest forgets its files");
        guest.shut_down()
    })
}

fn commands_report_how_they_end(guest: &Guest) -> Result<()> {
    let output = guest.run("echo out; echo err >&2; exit 3")?;
    ensure!((output.status, output.success()) == (Some(3), false), "{output:?}");
    ensure!((output.text(), output.error_text()) == ("out\n".into(), "err\n".into()), "{output:?}");
    ensure!(guest.sh("exit 1").is_err());

    let input = b"given".to_vec();
    let copied = guest.start(&["cat"], input.clone(), Duration::from_secs(10))?.wait()?;
    ensure!(copied.stdout.0 == input);

    let overdue = guest.spawn_for("sleep 60", Duration::from_millis(300))?.wait()?;
    ensure!(overdue.timed_out && !overdue.success(), "{overdue:?}");

    // Commands run beside each other, and what one leaves behind does not hold it up.
    let job = guest.spawn("sleep 60")?;
    guest.sh("sleep 60 & echo started")?;
    job.signal(Signal::SIGTERM)?;
    let ended = job.wait()?;
    ensure!(ended.signal == Some(Signal::SIGTERM as i32), "{ended:?}");
    ensure!(
        guest.start(&["/no/such/program"], Vec::new(), Duration::from_secs(1))?.wait().is_err()
    );
    Ok(())
}

fn files_travel_unchanged(lab: &Lab, guest: &Guest) -> Result<()> {
    let content: Vec<u8> = (0..8 * MIB).map(|i| ((i * i) >> 7) as u8).collect();
    let (there, back) = (lab.directory().join("there"), lab.directory().join("back"));
    fs::write(&there, &content)?;
    let start = Instant::now();
    guest.copy_in(&there, "/tmp/deep/er/file")?;
    report("8 MiB into a guest", start);
    let start = Instant::now();
    guest.copy_out("/tmp/deep/er/file", &back)?;
    report("8 MiB out of a guest", start);
    ensure!(fs::read(&back)? == content);
    guest.write("/tmp/empty", 0o600, b"")?;
    ensure!(guest.sh("stat -c '%s %a' /tmp/empty")?.trim() == "0 600");
    ensure!(guest.read("/tmp/missing").is_err());
    Ok(())
}

#[test]
fn a_debian_guest_runs_systemd_and_keeps_its_disk_over_restarts() -> Result<()> {
    Lab::run("harness-debian", 1, |lab| {
        let start = Instant::now();
        let data = lab.disk_file("data.img", 64 * MIB)?;
        let mut guest = lab.guest("debian").debian().disk(Disk::file(&data, "data")).boot()?;
        report("Debian guest up", start);
        ensure!(guest.sh("systemctl is-system-running")?.trim() == "running");
        guest.sh(&format!("modprobe -a ublk_drv nbd dm-mod && udevadm settle && {DOORS}"))?;

        // a unit, an fstab line and a udev name, for the real things
        guest.sh("mkfs.ext4 -q /dev/disk/by-id/virtio-data && mkdir /data")?;
        guest.sh("echo '/dev/disk/by-id/virtio-data /data ext4 defaults 0 2' >>/etc/fstab")?;
        let unit = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'date >>/data/starts'\n\
                    [Unit]\nRequiresMountsFor=/data\n[Install]\nWantedBy=multi-user.target\n";
        guest.write("/etc/systemd/system/stamp.service", 0o644, unit.as_bytes())?;
        guest
            .sh("systemctl daemon-reload && mount /data && systemctl enable --now stamp.service")?;
        let starts = |guest: &Guest| guest.sh("wc -l </data/starts");
        ensure!(starts(&guest)?.trim() == "1");

        let start = Instant::now();
        guest.reboot()?;
        report("restart in the same process", start);
        ensure!(starts(&guest)?.trim() == "2");

        guest.sh("echo kept >/data/kept && sync")?;
        guest.power_cut()?;
        let start = Instant::now();
        guest.power_on()?;
        report("up after a power cut", start);
        ensure!(guest.sh("cat /data/kept")?.trim() == "kept");
        ensure!(starts(&guest)?.trim() == "3");
        guest.sh("umount /data && e2fsck -fn /dev/disk/by-id/virtio-data")?;
        let start = Instant::now();
        guest.shut_down()?;
        report("orderly end", start);
        Ok(())
    })
}

#[test]
fn two_guests_reach_each_other_and_survive_each_others_restarts() -> Result<()> {
    Lab::run("harness-pair", 2, |lab| {
        let [left, right] = lab.network()?.ends();
        let start = Instant::now();
        let (one, mut two) =
            boot_both(lab.guest("one").network(&left), lab.guest("two").network(&right))?;
        report("two fast guests up", start);
        one.sh(&format!("ping -c 3 -W 5 {}", right.address()))?;
        two.sh(&format!("ping -c 3 -W 5 {}", left.address()))?;
        two.power_cut()?;
        ensure!(!one.run(&format!("ping -c 1 -W 2 {}", right.address()))?.success());
        two.power_on()?;
        one.sh(&format!("ping -c 3 -W 5 {}", right.address()))?;

        // some megabytes, with their order and content
        let make = "dd if=/dev/urandom of=/tmp/file bs=1M count=16 2>/dev/null; md5sum </tmp/file";
        let sent = two.sh(&format!("httpd -p 7000 -h /tmp; {make}"))?;
        let got = one.sh(&format!("wget -qO- http://{}:7000/file | md5sum", right.address()))?;
        ensure!(got == sent, "{got} {sent}");
        Ok(())
    })
}

#[test]
fn vmware_hardware_has_its_disks_and_its_network() -> Result<()> {
    Lab::run("harness-vmware", 2, |lab| {
        let [left, right] = lab.network()?.ends();
        let data = lab.disk_file("data.img", 64 * MIB)?;
        fs::OpenOptions::new().write(true).open(&data)?.write_all_at(b"from outside", MIB)?;
        let vmware = lab
            .guest("vmware")
            .debian()
            .hardware(Hardware::Vmware)
            .disk(Disk::file(&data, "data"))
            .network(&right);
        let (vmware, fast) = boot_both(vmware, lab.guest("fast").network(&left))?;
        ensure!(vmware.sh("cat /sys/class/dmi/id/sys_vendor")?.trim() == "VMware, Inc.");
        ensure!(
            vmware.sh("basename $(readlink /sys/class/net/eth0/device/driver)")?.trim()
                == "vmxnet3"
        );
        ensure!(vmware.sh("cat /sys/class/scsi_host/host*/proc_name")?.contains("vmw_pvscsi"));
        // Disks of one controller appear in any order: only their ids tell them apart.
        let seen = vmware.sh(
            "dd if=/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_data bs=12 count=1 skip=1048576 \
             iflag=skip_bytes status=none",
        )?;
        ensure!(seen == "from outside", "{seen:?}");
        fast.sh(&format!("ping -c 3 -W 5 {}", right.address()))?;
        Ok(())
    })
}

#[test]
fn a_disk_can_be_served_over_nbd() -> Result<()> {
    Lab::run("harness-nbd", 1, |lab| {
        let socket = lab.socket_directory().join("disk.sock");
        let mut server = Command::new("nbdkit")
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(&socket)
            .args(["memory", "64M"])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start nbdkit")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !socket.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut guest = lab.guest("guest").disk(Disk::nbd(&socket, "", "served")).boot()?;
        guest.sh("printf served | dd of=/dev/vda bs=1M seek=1 conv=fsync 2>/dev/null")?;
        guest.power_cut()?;
        guest.power_on()?;
        ensure!(
            guest.sh("dd if=/dev/vda bs=1M skip=1 count=1 2>/dev/null | head -c 6")? == "served"
        );
        drop(guest);
        server.kill()?;
        server.wait()?;
        Ok(())
    })
}

#[test]
fn a_recorded_load_runs_on_a_guests_disk() -> Result<()> {
    Lab::run("harness-load", 1, |lab| {
        let image = lab.disk_file("data.img", 16 * MIB)?;
        let mut guest = lab
            .guest("guest")
            .disk(Disk::file(&image, "data"))
            .program(&program("workload")?)
            .boot()?;
        let shape = Shape {
            seed: 1,
            operations: 1000,
            sizes_bytes: vec![16 * MIB],
            block_bytes: 512,
            blocks_max: 64,
            zeroes_percent: 5,
            discards_percent: 5,
            flushes_percent: 5,
            hot_bytes: MIB,
        };
        let job = Job { shape, disks: vec!["/dev/vda".into()], depth: 1, seconds_max: None };
        let log = job.run_in(&guest, "/bin/workload", Duration::from_secs(120))?;
        ensure!(log.error().is_none(), "{:?}", log.error());
        guest.shut_down()?;
        // One at a time, so that the list is the order.
        let operations = job.shape.operations()?;
        ensure!(log.entries.len() == operations.len());
        let order: Vec<usize> = (0..operations.len()).collect();
        order::check(&log, &order)?;
        let history = History::new(&job.shape.sizes_bytes, &operations, &order);
        let content = fs::read(&image)?;
        ensure!(
            history.difference(0, history.steps(), 0, &content).is_none(),
            "{:?}",
            history.difference(0, history.steps(), 0, &content)
        );
        Ok(())
    })
}

#[test]
fn a_kernels_fault_fails_the_test() {
    let result = Lab::run("harness-fault", 1, |lab| {
        let guest = lab.guest("guest").boot()?;
        guest.sh("echo 'BUG: made up' >/dev/console")?;
        Ok(())
    });
    let error = result.expect_err("a reported fault").to_string();
    assert!(error.contains("BUG: made up"), "{error}");
}
