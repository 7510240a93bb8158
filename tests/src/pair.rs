//! Two Debian guests as two machines of one site: a source whose disks are protected, and a target.
//!
//! Everything is installed as on real machines: programs in `/usr/bin`, the packaged units, udev rules and
//! system users, certificates from `tidemark init`, the source's configuration by `tidemark protect`. The
//! source's disks are files of this machine, so that a test can read them past all that it tests.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tidemark_control::agent::{AgentStatus, GroupStatus, Marked};
use tidemark_control::target::{ReplicaStatus, TargetStatus};
use tidemark_journal::checksum::crc64_of;
use tidemark_journal::{Kind, Seq};

use crate::journal;
use crate::vm::{Disk, Guest, GuestBuilder, Hardware, Lab, boot_both, program};
use crate::volatile::VolatileDisks;
use crate::workload::history::History;
use crate::workload::{Job, Shape, order};

mod drives;

use drives::Drive;
pub use drives::MKFS;

/// The group's name.
pub const GROUP: &str = "shop";
/// How long a replica may take to be in sync, in an emulated machine on a busy one.
const SYNC_TIMEOUT: Duration = Duration::from_secs(300);
/// Between two looks at a status; each look costs the guest a program's start.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The least room on a guest's disk for the installation, and for what it gives out.
const TRANSFER_BYTES_MIN: u64 = 1 << 30;
/// The serial number of that disk.
const TRANSFER: &str = "transfer";
/// The serial number of the disk that the target keeps its replicas on.
const STORE: &str = "store";
/// What a pair is to look like.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The protected volumes: names, which are also the disks' serial numbers, and sizes in bytes.
    pub volumes: Vec<(&'static str, u64)>,
    /// What more the source has: serial numbers and sizes of disks that are not protected.
    pub spare_disks: Vec<(&'static str, u64)>,
    /// The same of the target.
    pub target_spare_disks: Vec<(&'static str, u64)>,
    /// Whether the source's disks, and the spare ones, have all their blocks from the start, full of zeros.
    pub filled: bool,
    /// The kind of the source's disks and cards.
    pub hardware: Hardware,
    /// How the volumes are presented.
    pub front: &'static str,
    /// The agent's ring.
    pub ring: &'static str,
    /// More lines for the group's file at the source, before its tables.
    pub group_lines: String,
    /// More tables for the target's file.
    pub target_tables: String,
    /// The disk that the target keeps its replicas on, in bytes.
    pub store_bytes: u64,
    /// The source's processors.
    pub processors: u32,
    /// The source's memory.
    pub memory_mib: u32,
    /// Whether all data is on disks with a volatile cache, which lose what was not flushed when the power is
    /// cut. All that is random about them follows from this seed.
    pub volatile_seed: Option<u64>,
}

impl Plan {
    /// These volumes under virtio, presented by ublk, with a ring that holds all of a short test's load.
    pub fn new(volumes: &[(&'static str, u64)]) -> Plan {
        Plan {
            volumes: volumes.to_vec(),
            spare_disks: Vec::new(),
            target_spare_disks: Vec::new(),
            filled: false,
            hardware: Hardware::Virtio,
            front: "ublk",
            ring: "256 MiB",
            group_lines: String::new(),
            target_tables: String::new(),
            store_bytes: 8 << 30,
            processors: 1,
            memory_mib: 1280,
            volatile_seed: None,
        }
    }
}

/// A source and a target that run.
pub struct Pair {
    /// The machine whose disks are protected.
    pub source: Guest,
    /// The machine that keeps the replica.
    pub target: Guest,
    /// The target's address.
    pub target_address: String,
    disks: Option<VolatileDisks>,
    plan: Plan,
    images: Vec<PathBuf>,
    transfer: PathBuf,
    directory: PathBuf,
}

/// What `tidemark status --json` says.
#[derive(Deserialize)]
struct Seen {
    agent: Option<AgentStatus>,
    target: Option<TargetStatus>,
}

impl Pair {
    /// Boots and installs both and protects the volumes, then runs the test; if that fails, the error holds
    /// what the daemons logged.
    pub fn run(lab: &Lab, plan: Plan, test: impl FnOnce(&mut Pair) -> Result<()>) -> Result<()> {
        let mut pair = Pair::boot(lab, plan)?;
        let result = pair.install().and_then(|()| test(&mut pair));
        let result = result.and_then(|()| pair.check_daemons());
        result.map_err(|error| error.context(pair.logs()))
    }

    fn boot<'a>(lab: &'a Lab, plan: Plan) -> Result<Pair> {
        let [source_end, target_end] = lab.network()?.ends();
        let packages = [
            package(lab, "source", &["tidemark", "tidemark-agent", "workload"])?,
            package(lab, "target", &["tidemark", "tidemark-target"])?,
        ];
        let largest = plan.volumes.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        for path in &packages {
            let bytes = fs::metadata(path)?.len().max(largest).max(TRANSFER_BYTES_MIN);
            File::options().write(true).open(path)?.set_len(bytes)?;
        }
        let [source_package, transfer] = packages;
        let mut images = Vec::new();
        let mut source = lab
            .guest("source")
            .debian()
            .hardware(plan.hardware)
            .processors(plan.processors)
            .memory_mib(plan.memory_mib)
            .network(&source_end)
            .disk(Disk::file(&source_package, TRANSFER));
        let mut target =
            lab.guest("target").debian().network(&target_end).disk(Disk::file(&transfer, TRANSFER));
        let disks = plan.volatile_seed.map(|seed| drives::start(lab, &plan, seed)).transpose()?;
        if let Some(disks) = &disks {
            for (volume, _) in &plan.volumes {
                source = source.disk(disks.drive(volume));
                images.push(disks.file(volume)?.to_owned());
            }
            let add =
                |guest: GuestBuilder<'a>, drive: &Drive| guest.disk(disks.drive(drive.serial));
            source = drives::SOURCE.iter().fold(source, add);
            target = drives::TARGET.iter().fold(target, add);
        } else {
            let image = |name: String, bytes: u64| -> Result<PathBuf> {
                let image = lab.disk_file(&name, bytes)?;
                if plan.filled {
                    fill(&image, bytes)?;
                }
                Ok(image)
            };
            for (serial, bytes) in plan.volumes.iter().chain(&plan.spare_disks) {
                let image = image(format!("{serial}.img"), *bytes)?;
                source = source.disk(Disk::file(&image, serial));
                images.push(image);
            }
            for (serial, bytes) in &plan.target_spare_disks {
                let image = image(format!("target-{serial}.img"), *bytes)?;
                target = target.disk(Disk::file(&image, serial));
            }
            let store = lab.disk_file("store.img", plan.store_bytes)?;
            target = target.disk(Disk::file(&store, STORE));
        }
        let (source, target) = boot_both(source, target)?;
        let directory = lab.directory().to_owned();
        let target_address = target_end.address();
        Ok(Pair { source, target, target_address, disks, plan, images, transfer, directory })
    }

    fn install(&self) -> Result<()> {
        let certificates = self.directory.join("pki");
        let mut init = Command::new(program("tidemark")?);
        init.args(["init", "--node", "source", "--node", "target", "--dir"]);
        run(init.arg(&certificates))?;
        for (guest, node) in [(&self.source, "source"), (&self.target, "target")] {
            for name in ["ca.pem", "node.pem", "node.key"] {
                let file = certificates.join("nodes").join(node).join(name);
                guest.copy_in(&file, &format!("/etc/tidemark/pki/{name}"))?;
            }
        }
        self.start_target()?;
        self.start_source()
    }

    fn start_target(&self) -> Result<()> {
        unpack(&self.target, Hardware::Virtio)?;
        if self.disks.is_some() {
            drives::mount(&self.target, &drives::TARGET)?;
        } else {
            drives::mount_at(&self.target, STORE, "/var/lib/tidemark/target")?;
        }
        let config = format!(
            "data_dir = \"/var/lib/tidemark/target\"\n\
             [link]\nlisten = \"0.0.0.0:7410\"\nca = \"/etc/tidemark/pki/ca.pem\"\n\
             certificate = \"/etc/tidemark/pki/node.pem\"\nkey = \"/etc/tidemark/pki/node.key\"\n\
             [nbd]\nunix = \"/run/tidemark/nbd.sock\"\nlisten = \"0.0.0.0:10809\"\n\
             [api]\nsocket = \"/run/tidemark/target.sock\"\n\
             {}\n\
             [[group]]\nname = \"{GROUP}\"\nnode = \"source\"\n",
            self.plan.target_tables
        );
        self.target.write("/etc/tidemark/target.toml", 0o644, config.as_bytes())?;
        self.target.sh("tidemark config check && systemctl enable --now tidemark-target")?;
        Ok(())
    }

    fn start_source(&self) -> Result<()> {
        unpack(&self.source, self.plan.hardware)?;
        if self.disks.is_some() {
            drives::mount(&self.source, &drives::SOURCE)?;
            drives::divert_map(&self.source)?;
        }
        let mut command = format!(
            "tidemark protect {GROUP} --target {} --target-name target --front {} \
             --ring-bytes '{}'",
            self.target_address, self.plan.front, self.plan.ring
        );
        for (volume, _) in &self.plan.volumes {
            command += &format!(" --volume {volume}={}", disk_path(self.plan.hardware, volume));
        }
        self.source.sh(&command)?;
        if self.disks.is_some() {
            let file = "/etc/tidemark/agent.toml";
            let mut text = self.source.read(file)?;
            text.extend(drives::SPOOL_TABLE.as_bytes());
            self.source.write(file, 0o644, &text)?;
        }
        if !self.plan.group_lines.is_empty() {
            let file = format!("/etc/tidemark/agent.d/{GROUP}.toml");
            let text = String::from_utf8(self.source.read(&file)?)?;
            let text = format!("{}\n{text}", self.plan.group_lines);
            self.source.write(&file, 0o644, text.as_bytes())?;
        }
        self.source.sh("tidemark config check && systemctl enable --now tidemark-agent")?;
        for (volume, _) in &self.plan.volumes {
            // Units that want the device wait for it as long.
            let device = self.device(volume);
            self.source.sh(&format!("udevadm wait --timeout=60 --settle {device}"))?;
        }
        Ok(())
    }

    /// Where the source finds a volume.
    pub fn device(&self, volume: &str) -> String {
        format!("/dev/tidemark/{GROUP}/{volume}")
    }

    /// Where the source finds the raw disk of a volume, or a spare disk.
    pub fn raw_disk(&self, serial: &str) -> String {
        disk_path(self.plan.hardware, serial)
    }

    /// The file of this machine that is a volume's disk.
    pub fn image(&self, volume: &str) -> Result<&Path> {
        let index = self.plan.volumes.iter().position(|(name, _)| *name == volume);
        let image = index.and_then(|index| self.images.get(index));
        Ok(image.with_context(|| format!("there is no volume {volume}"))?)
    }

    /// The group's status at the source.
    pub fn status(&self) -> Result<GroupStatus> {
        let seen: Seen = tidemark(&self.source, "status")?;
        let agent = seen.agent.context("the agent does not answer")?;
        agent.groups.into_iter().next().context("the agent has no group")
    }

    /// The replica's status at the target.
    pub fn replica_status(&self) -> Result<ReplicaStatus> {
        let seen: Seen = tidemark(&self.target, "status")?;
        let target = seen.target.context("the target does not answer")?;
        target.groups.into_iter().next().context("the target has no group")
    }

    /// Waits until a look at the source's status says yes, and gives that status.
    pub fn wait(
        &self,
        what: &str,
        mut until: impl FnMut(&GroupStatus) -> bool,
    ) -> Result<GroupStatus> {
        let deadline = Instant::now() + SYNC_TIMEOUT;
        loop {
            // An agent that is being restarted does not answer.
            let status = self.status();
            if let Ok(status) = &status
                && until(status)
            {
                return Ok(status.clone());
            }
            if Instant::now() > deadline {
                bail!("waited in vain for {what}: {status:#?}");
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until no volume is in a gap and everything is final-durable.
    pub fn wait_in_sync(&self) -> Result<GroupStatus> {
        self.wait("the replica to be in sync", GroupStatus::is_in_sync)
    }

    /// Sets a mark; its sequence.
    pub fn mark(&self, name: &str) -> Result<u64> {
        let marked: Marked = tidemark(&self.source, &format!("mark {GROUP} {name}"))?;
        Ok(marked.position.seq.0)
    }

    /// Copies the target's log, as far as it is durable, into a directory of this machine.
    pub fn fetch_log(&self) -> Result<PathBuf> {
        let directory = self.directory.join("log");
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::create_dir(&directory)?;
        let disk = disk_path(Hardware::Virtio, TRANSFER);
        // Its files may grow meanwhile, which is no error here: they only do so behind what is wanted.
        self.target.sh(&format!(
            "tar -c --sparse --warning=no-file-changed -f {disk} \
             -C /var/lib/tidemark/target/groups/{GROUP}/log . || [ $? = 1 ]; sync {disk}"
        ))?;
        let mut tar = Command::new("tar");
        run(tar.args(["-x", "-f"]).arg(&self.transfer).arg("-C").arg(&directory))?;
        Ok(directory)
    }

    /// Puts a recorded load on one volume, on which nobody else writes, and proves that the target's log has
    /// each operation once in an order that its user could have seen, and that the disk is what follows.
    pub fn check_exactness(&self, volume: &str, operations: usize, seconds_max: u64) -> Result<()> {
        let index = self.plan.volumes.iter().position(|(name, _)| *name == volume);
        let index = index.with_context(|| format!("there is no volume {volume}"))?;
        let size_bytes = self.plan.volumes[index].1;
        let start = self.mark("load")?;
        let shape = Shape {
            seed: 20_261_124,
            operations,
            sizes_bytes: vec![size_bytes],
            block_bytes: 512,
            blocks_max: 128,
            zeroes_percent: 6,
            discards_percent: 6,
            flushes_percent: 4,
            hot_bytes: 4 << 20,
        };
        let disks = vec![self.device(volume).into()];
        let job = Job { shape, disks, depth: 16, seconds_max: Some(seconds_max) };
        let timeout = Duration::from_secs(seconds_max) + SYNC_TIMEOUT;
        let log = job.run_in(&self.source, "/usr/bin/workload", timeout)?;
        ensure!(log.error().is_none(), "{:?}", log.error());
        ensure!(log.entries.len() > operations / 2, "only {} operations", log.entries.len());
        let status = self.wait_in_sync()?;
        ensure!(status.gaps_total == 0, "the load was to fit the ring: {status:#?}");

        // The group's first volume is number 1.
        let mut records = Vec::new();
        for (_, record) in journal::of_load(&self.fetch_log()?, Seq(start))? {
            ensure!(record.disk == index + 1, "a record of another disk: {record:?}");
            records.push(order::Record { disk: 0, ..record });
        }
        let operations = job.shape.operations()?;
        let parts = order::of_block_journal(&log, &records)?;
        let model = History::of_parts(&job.shape.sizes_bytes, &operations, &parts);
        let content = fs::read(self.image(volume)?)?;
        match model.difference(0, model.steps(), 0, &content) {
            None => Ok(()),
            Some(difference) => bail!("the disk of {volume}: {difference}"),
        }
    }

    /// Makes a file system on a volume, mounts it at `/srv/VOLUME` by its fstab line, fills it, and proves that
    /// it is clean. It is not mounted afterwards.
    pub fn check_filesystem(&self, volume: &str) -> Result<()> {
        let (device, at) = (self.device(volume), format!("/srv/{volume}"));
        self.source.sh(&format!(
            "mkfs.ext4 -q {device} && mkdir -p {at} && \
             echo '{device} {at} ext4 _netdev,noauto 0 2' >>/etc/fstab && \
             systemctl daemon-reload && mount {at} && cp -a /usr/sbin /etc {at}/ && umount {at} && \
             e2fsck -fn {device} && mount {at} && diff -r /usr/sbin {at}/sbin && umount {at}"
        ))?;
        Ok(())
    }

    /// Proves that the target's log after a sequence is of one term, with no gap and nothing read off the disk.
    pub fn check_unbroken(&self, after: u64) -> Result<()> {
        let mut terms = Vec::new();
        journal::walk(&self.fetch_log()?, |logged| {
            let record = logged.record;
            if record.seq <= Seq(after) {
                return Ok(());
            }
            if !terms.contains(&logged.term) {
                terms.push(logged.term);
            }
            let kept = matches!(
                record.kind,
                Kind::Write | Kind::Zero | Kind::Discard | Kind::Flush | Kind::Mark | Kind::Void
            );
            ensure!(kept, "a break of the order after sequence {after}: {record:?}");
            Ok(())
        })?;
        ensure!(terms.len() == 1, "the log after sequence {after} is of the terms {terms:?}");
        Ok(())
    }

    /// Compares a volume's latest point, byte for byte, with the disk below it. Nobody may write meanwhile.
    pub fn compare_latest(&self, volume: &str) -> Result<()> {
        self.source.sh("sync")?;
        // Not `@latest`, which stays where it is for a while after a client has looked at it.
        let seq = self.wait_in_sync()?.position.seq;
        self.fetch_point(volume, &format!("seq:{seq}"))?;
        match difference(self.image(volume)?, &self.transfer)? {
            None => Ok(()),
            Some(at) => bail!("the replica of {volume} differs from its disk at byte {at}"),
        }
    }

    /// A checksum of a volume's content at a point.
    pub fn checksum_of(&self, volume: &str, point: &str) -> Result<u64> {
        self.fetch_point(volume, point)?;
        let mut content =
            File::open(&self.transfer)?.take(fs::metadata(self.image(volume)?)?.len());
        let (mut sum, mut piece) = (0, vec![0; 1 << 20]);
        loop {
            match content.read(&mut piece)? {
                0 => return Ok(sum),
                bytes => sum = crc64_of([&u64::to_le_bytes(sum)[..], &piece[..bytes]]),
            }
        }
    }

    /// Copies a volume's content at a point to the target's transfer disk.
    fn fetch_point(&self, volume: &str, point: &str) -> Result<()> {
        let disk = disk_path(Hardware::Virtio, TRANSFER);
        let export = format!("nbd+unix:///{GROUP}/{volume}@{point}?socket=/run/tidemark/nbd.sock");
        let copy = format!("blkdiscard -z {disk} && nbdcopy '{export}' {disk} && sync {disk}");
        let output = self.target.spawn_for(&copy, SYNC_TIMEOUT)?.wait()?;
        ensure!(output.success(), "{copy}: {}", output.error_text());
        Ok(())
    }

    /// Ends protection. While a volume is mounted that is refused, also if no agent runs, for which its user would
    /// wait; then its device and name go, and the disk is one like any other.
    pub fn check_given_up(&self, volume: &str) -> Result<()> {
        let (source, device, raw) = (&self.source, self.device(volume), self.raw_disk(volume));
        let real = source.sh(&format!("readlink -f {device}"))?.trim().to_owned();
        source.sh(&format!("mount {device} /srv/{volume}"))?;
        for agent in ["start", "stop"] {
            let ask = format!("systemctl {agent} tidemark-agent; tidemark unprotect {GROUP}");
            let refused = source.run(&ask)?;
            let said = refused.error_text();
            let as_wanted = !refused.success() && said.contains(&format!("on /srv/{volume}"));
            ensure!(as_wanted, "{ask}: {}{said}", refused.text());
        }
        source.sh(&format!("systemctl start tidemark-agent; umount /srv/{volume}"))?;
        source.sh(&format!("tidemark unprotect {GROUP}; udevadm settle"))?;
        let bytes = format!("test ! -e {real} || blockdev --getsize64 {real}");
        let left = source.sh(&format!("ls -A /dev/tidemark/{GROUP} 2>/dev/null; {bytes}"))?;
        ensure!(["", "0"].contains(&left.trim()), "{real} is left: {left}");
        source.sh(&format!("mount {raw} /srv/{volume} && umount /srv/{volume}"))?;
        Ok(())
    }

    /// Proves that the agent has started and protects its group.
    pub fn check_protected(&self) -> Result<()> {
        let seen: Seen = tidemark(&self.source, "status")?;
        let agent = seen.agent.context("the agent does not answer")?;
        let reasons: Vec<&str> = agent.unprotected.iter().map(|group| &*group.error).collect();
        ensure!(reasons.is_empty(), "the group is not protected: {}", reasons.join(", "));
        Ok(())
    }

    /// Proves that no daemon has died of a fault of its own since its machine was started: its manager makes that
    /// good, and so it shows nowhere else.
    pub fn check_daemons(&self) -> Result<()> {
        let faults = "panicked at|segfault|traps:|status=[0-9]+/(SEGV|ABRT|BUS|ILL|FPE|TRAP)";
        let ask = format!("journalctl --no-pager --quiet --boot | grep -E '{faults}'");
        for guest in [&self.source, &self.target] {
            // One that is off has nothing to say.
            let found = guest.run(&ask).map(|output| output.text()).unwrap_or_default();
            ensure!(found.trim().is_empty(), "a daemon has died:\n{found}");
        }
        Ok(())
    }

    /// What the daemons logged lately, and what the kernel says of their deaths.
    fn logs(&self) -> String {
        let of = |guest: &Guest, unit: &str| {
            let show = "journalctl --no-pager --output=short-monotonic";
            let ask = format!(
                "{show} --lines=60 -u {unit}; {show} --dmesg | grep -E 'segfault|traps:|^Code:'"
            );
            // A guest that is off has nothing to say.
            let text = guest.run(&ask).map(|output| output.text());
            format!("--- {unit}\n{}", text.unwrap_or_else(|error| error.to_string()))
        };
        of(&self.source, "tidemark-agent") + &of(&self.target, "tidemark-target")
    }
}

/// Asks a guest's `tidemark` for an answer in JSON.
pub fn tidemark<T: DeserializeOwned>(guest: &Guest, arguments: &str) -> Result<T> {
    let answer = guest.sh(&format!("tidemark --json {arguments}"))?;
    serde_json::from_str(&answer).with_context(|| format!("tidemark {arguments}: {answer}"))
}

/// Where a guest finds the disk with a serial number.
pub fn disk_path(hardware: Hardware, serial: &str) -> String {
    match hardware {
        Hardware::Virtio => format!("/dev/disk/by-id/virtio-{serial}"),
        Hardware::Vmware => format!("/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_{serial}"),
    }
}

/// A tar file with these programs and all of `systemd/`, to be given to a guest as a disk.
pub fn package(lab: &Lab, name: &str, programs: &[&str]) -> Result<PathBuf> {
    let stage = tempfile::tempdir_in(lab.directory())?;
    let add = |from: &Path, to: &str| -> Result<()> {
        let to = stage.path().join(to);
        fs::create_dir_all(to.parent().context("a path below the stage")?)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    };
    fs::create_dir_all(stage.path().join("usr/bin"))?;
    for name in programs {
        // As packages do, and a third of the size.
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg(program(name)?).arg("-o");
        run(strip.arg(stage.path().join("usr/bin").join(name)))?;
    }
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd");
    for (from, to) in [
        ("tidemark-agent.service", "usr/lib/systemd/system/tidemark-agent.service"),
        ("tidemark-target.service", "usr/lib/systemd/system/tidemark-target.service"),
        ("61-tidemark.rules", "usr/lib/udev/rules.d/61-tidemark.rules"),
        ("tidemark.sysusers.conf", "usr/lib/sysusers.d/tidemark.conf"),
        ("tidemark.tmpfiles.conf", "usr/lib/tmpfiles.d/tidemark.conf"),
    ] {
        add(&units.join(from), to)?;
    }
    let path = lab.directory().join(format!("{name}.tar"));
    let mut tar = Command::new("tar");
    tar.args(["-c", "--owner=0", "--group=0", "-f"]).arg(&path);
    run(tar.arg("-C").arg(stage.path()).arg("usr"))?;
    Ok(path)
}

fn unpack(guest: &Guest, hardware: Hardware) -> Result<()> {
    let disk = disk_path(hardware, TRANSFER);
    guest.sh(&format!(
        "tar -C / --no-overwrite-dir -xf {disk} && systemd-sysusers tidemark.conf && \
         systemd-tmpfiles --create tidemark.conf && udevadm control --reload && \
         systemctl daemon-reload"
    ))?;
    Ok(())
}

/// Writes zeros to all of a file.
fn fill(path: &Path, bytes: u64) -> Result<()> {
    let (mut file, piece) = (File::options().write(true).open(path)?, vec![0; 4 << 20]);
    for at in (0..bytes).step_by(piece.len()) {
        let rest = usize::try_from(bytes - at).unwrap_or(usize::MAX);
        file.write_all(&piece[..rest.min(piece.len())])?;
    }
    Ok(())
}

/// Runs a program of this machine, which must end well.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {name}"))?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The first byte at which a file differs from another that may be longer.
fn difference(one: &Path, longer: &Path) -> Result<Option<u64>> {
    let (mut one, mut other) = (File::open(one)?, File::open(longer)?);
    let length = one.metadata()?.len();
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < length {
        let piece = usize::try_from((length - at).min(1 << 20))?;
        one.seek(SeekFrom::Start(at))?;
        other.seek(SeekFrom::Start(at))?;
        one.read_exact(&mut a[..piece])?;
        other.read_exact(&mut b[..piece])?;
        if let Some(first) = a[..piece].iter().zip(&b[..piece]).position(|(a, b)| a != b) {
            return Ok(Some(at + first as u64));
        }
        at += piece as u64;
    }
    Ok(None)
}
