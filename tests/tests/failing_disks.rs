//! Disks of the source that are full or fail: the application sees what its own disk says and nothing
//! else, the agent says what is wrong, and the replica is the disk in the end.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use tidemark_control::agent::Rung;
use tidemark_nbd::Errno;
use tidemark_nbd::client::Client;
use tidemark_tests::site::{Plan, Site};
use tidemark_tests::small_disk::SmallDisk;
use tidemark_tests::workload::{self, Shape};

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 32 * MIB;
const BLOCK_BYTES: usize = 4096;

fn shape(seed: u64, operations: usize) -> Shape {
    Shape {
        seed,
        operations,
        sizes_bytes: vec![SIZE_BYTES],
        block_bytes: BLOCK_BYTES as u64,
        blocks_max: 32,
        zeroes_percent: 2,
        discards_percent: 2,
        flushes_percent: 2,
        hot_bytes: 0,
    }
}

/// Writes all over the first volume; all of it succeeds.
fn load(site: &Site, seed: u64, operations: usize) -> Result<()> {
    let (disk, never) = (site.disk(0, 1)?, AtomicBool::new(false));
    let log = workload::run(&[&disk], &shape(seed, operations).operations()?, 8, &never);
    ensure!(log.error().is_none(), "{:?}", log.error());
    ensure!(log.entries.len() == operations, "a part of the load was left out");
    Ok(())
}

fn write(site: &Site, front: &Client, block: u64, value: u8) -> Result<(), Errno> {
    let bytes = Bytes::from(vec![value; BLOCK_BYTES]);
    let write = front.write(block * BLOCK_BYTES as u64, bytes, false);
    site.runtime().block_on(write).map_err(|error| error.errno)
}

fn read(site: &Site, front: &Client, block: u64) -> Result<Bytes, Errno> {
    let read = front.read(block * BLOCK_BYTES as u64, BLOCK_BYTES as u32);
    site.runtime().block_on(read).map_err(|error| error.errno)
}

/// The replica is in sync, and is `disk`.
fn expect_replica(site: &Site, disk: &[u8]) -> Result<()> {
    site.wait_in_sync()?;
    let now = format!("/v0@seq:{}", site.status()?.position.seq);
    ensure!(site.read_export(&now)? == disk, "the replica differs at {now}");
    Ok(())
}

/// A disk that fails on request, in place of a volume's image.
struct Faulty {
    real: PathBuf,
    processes: Vec<Child>,
    triggers: [PathBuf; 2],
}

impl Faulty {
    fn mount(site: &Site) -> Result<Faulty> {
        let path = |name: &str| site.dir().join(name);
        let (real, socket) = (path("real.img"), path("faulty.sock"));
        File::create(&real)?.set_len(SIZE_BYTES)?;
        let triggers = [path("fail-reads"), path("fail-writes")];
        let mut server = Command::new("nbdkit");
        server.args(["--foreground", "--exit-with-parent", "--filter=error", "--unix"]);
        server.arg(&socket).arg("file").arg(&real).arg("error=EIO");
        for (operations, file) in [("pread", &triggers[0]), ("pwrite zero trim", &triggers[1])] {
            for operation in operations.split(' ') {
                server.arg(format!("error-{operation}-rate=100%"));
                server.arg(format!("error-{operation}-file={}", file.display()));
            }
        }
        let mut faulty = Faulty { real, processes: Vec::new(), triggers };
        faulty.start(server).context("nbdkit")?;
        faulty.wait(|| socket.exists())?;
        let mut mount = Command::new("nbdfuse");
        mount.arg(site.image(0)).arg("--unix").arg(&socket);
        let inode = inode(&site.image(0))?;
        faulty.start(mount).context("nbdfuse")?;
        faulty.wait(|| inode != self::inode(&site.image(0)).unwrap_or(inode))?;
        Ok(faulty)
    }

    fn start(&mut self, mut command: Command) -> Result<()> {
        self.processes.push(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?);
        Ok(())
    }

    fn wait(&self, until: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !until() {
            ensure!(Instant::now() < deadline, "the disk that fails on request is not there");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn fail(&self, reads: bool, writes: bool) -> Result<()> {
        for (trigger, failing) in self.triggers.iter().zip([reads, writes]) {
            match failing {
                true => drop(File::create(trigger)?),
                false if trigger.exists() => fs::remove_file(trigger)?,
                false => {}
            }
        }
        Ok(())
    }
}

/// What tells a mounted file from the one below.
fn inode(path: &std::path::Path) -> Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

impl Drop for Faulty {
    fn drop(&mut self) {
        // The mount first: it ends in order at a signal.
        while let Some(mut process) = self.processes.pop() {
            let pid = nix::unistd::Pid::from_raw(process.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = process.wait();
        }
    }
}

#[test]
fn a_disk_that_fails_is_heard_by_the_application_and_the_replica_has_what_it_has() -> Result<()> {
    let mut site = Site::new(Plan::new(&[SIZE_BYTES]))?;
    let faulty = Faulty::mount(&site)?;
    site.start_target()?;
    site.start_agent()?;
    site.wait_in_sync()?;
    let front = site.open_front(0)?;
    let ok = |result: Result<(), Errno>| result.map_err(|errno| anyhow::anyhow!("{errno:?}"));
    for block in 0..64 {
        ok(write(&site, &front, block, 1))?;
    }
    site.wait_in_sync()?;
    let mark = site.mark("before")?;
    let before = fs::read(&faulty.real)?;
    expect_replica(&site, &before)?;
    let gaps = site.status()?.gaps_total;

    // Writes fail: that is what the application hears, and what it reads is what is there.
    faulty.fail(false, true)?;
    for block in 0..16 {
        ensure!(write(&site, &front, block, 2) == Err(Errno::Io), "block {block}");
        ensure!(read(&site, &front, block).as_deref() == Ok(&[1; BLOCK_BYTES][..]));
    }
    faulty.fail(false, false)?;
    expect_replica(&site, &fs::read(&faulty.real)?)?;
    ensure!(site.status()?.gaps_total == gaps, "a disk's error is no gap");

    // Reads fail.
    faulty.fail(true, false)?;
    ensure!(read(&site, &front, 3) == Err(Errno::Io));
    ok(write(&site, &front, 4, 3))?;
    faulty.fail(false, false)?;
    ensure!(read(&site, &front, 3).as_deref() == Ok(&[1; BLOCK_BYTES][..]));
    expect_replica(&site, &fs::read(&faulty.real)?)?;

    // Both: nobody knows what the disk holds, and the newest point says so rather than guess.
    faulty.fail(true, true)?;
    ensure!(write(&site, &front, 5, 4) == Err(Errno::Io));
    site.wait_in_sync()?;
    let newest = format!("/v0@seq:{}", site.status()?.position.seq);
    let export = site.open_export(&newest)?;
    ensure!(read(&site, &export, 5).is_err(), "something was made up");
    faulty.fail(false, false)?;
    for block in 0..64 {
        ok(write(&site, &front, block, 5))?;
    }
    site.wait_in_sync()?;
    let status = site.status()?;
    ensure!(status.gaps_total == gaps, "{status:#?}");
    let now = fs::read(&faulty.real)?;
    let newest = site.open_export(&format!("/v0@seq:{}", status.position.seq))?;
    ensure!(site.read(&newest, 0, 64 * BLOCK_BYTES as u64)? == now[..64 * BLOCK_BYTES]);
    ensure!(site.read_export(&format!("/v0@seq:{mark}"))? == before, "the older point");
    drop(front);
    site.stop_agent()?;
    drop(site);
    Ok(())
}

#[test]
fn a_write_for_which_the_disk_has_no_room_says_so_and_changes_nothing() -> Result<()> {
    let mut site = Site::new(Plan::new(&[SIZE_BYTES]))?;
    let small = SmallDisk::mount(&site.dir().join("small"), 8 * MIB)?;
    let image = site.dir().join("small/v0.img");
    fs::rename(site.image(0), site.dir().join("unused.img"))?;
    File::create(&image)?.set_len(SIZE_BYTES)?;
    std::os::unix::fs::symlink(&image, site.image(0))?;
    site.start_target()?;
    site.start_agent()?;
    site.wait_in_sync()?;
    let front = site.open_front(0)?;
    ensure!(write(&site, &front, 0, 1) == Ok(()));
    site.wait_in_sync()?;
    let gaps = site.status()?.gaps_total;
    small.fill()?;
    for block in 8..40 {
        ensure!(write(&site, &front, block, 2) == Err(Errno::NoSpc), "block {block}");
        ensure!(read(&site, &front, block).as_deref() == Ok(&[0; BLOCK_BYTES][..]));
    }
    ensure!(write(&site, &front, 0, 3) == Ok(()), "where it has room, it goes on");
    expect_replica(&site, &fs::read(&image)?)?;
    small.clear()?;
    for block in 8..40 {
        ensure!(write(&site, &front, block, 4) == Ok(()));
    }
    expect_replica(&site, &fs::read(&image)?)?;
    let status = site.status()?;
    ensure!(status.gaps_total == gaps && status.problems.is_empty(), "{status:#?}");
    drop(front);
    site.stop_agent()?;
    site.stop_target()
}

#[test]
fn a_full_state_disk_costs_nothing_while_the_agent_runs() -> Result<()> {
    let mut site = Site::new(Plan::new(&[SIZE_BYTES]))?;
    let small = SmallDisk::mount(&site.dir().join("state"), 8 * MIB)?;
    site.start_target()?;
    site.start_agent()?;
    load(&site, 1, 100)?;
    site.wait_in_sync()?;
    let gaps = site.status()?.gaps_total;
    small.fill()?;
    // All that is written while it runs has its place already.
    load(&site, 2, 300)?;
    site.mark("full")?;
    expect_replica(&site, &fs::read(site.image(0))?)?;
    let status = site.status()?;
    ensure!(status.gaps_total == gaps && status.problems.is_empty(), "{status:#?}");
    // A start has to write anew what it finds: it says what is missing, and goes on with room.
    site.stop_agent()?;
    let Err(error) = site.start_agent() else { bail!("it started without room for its state") };
    let text = format!("{error:#}");
    ensure!(text.contains("disks.json") && text.contains("No space left"), "{text}");
    small.clear()?;
    site.start_agent()?;
    load(&site, 3, 100)?;
    expect_replica(&site, &fs::read(site.image(0))?)?;
    site.stop_agent()?;
    site.stop_target()
}

#[test]
fn a_full_spool_disk_is_said_and_costs_a_gap_at_most() -> Result<()> {
    let mut plan = Plan::new(&[SIZE_BYTES]);
    plan.ring_bytes = 16 * MIB;
    plan.compression = "off";
    plan.spool_bytes_max = Some(512 * MIB);
    let mut site = Site::new(plan)?;
    let small = SmallDisk::mount(&site.spool_dir(), 48 * MIB)?;
    site.start_target()?;
    site.start_agent()?;
    load(&site, 1, 100)?;
    site.wait_in_sync()?;
    let (mark, before) = (site.mark("before")?, fs::read(site.image(0))?);
    site.wait_in_sync()?;
    site.network().stall(true);
    small.fill()?;
    let mut seed = 2;
    let deadline = Instant::now() + Duration::from_secs(100);
    let said = |problems: &[String]| {
        problems.iter().any(|problem| problem.contains("spool") && problem.contains("space"))
    };
    // Nothing of all that fails.
    while !said(&site.status()?.problems) || site.status()?.volumes[0].gap.is_none() {
        ensure!(Instant::now() < deadline, "{:#?}", site.status()?);
        load(&site, seed, 60)?;
        seed += 1;
    }
    site.network().stall(false);
    small.clear()?;
    expect_replica(&site, &fs::read(site.image(0))?)?;
    ensure!(site.read_export(&format!("/v0@seq:{mark}"))? == before, "the older point");
    // With room it is used again, by itself.
    site.network().stall(true);
    let deadline = Instant::now() + Duration::from_secs(100);
    while said(&site.status()?.problems) || site.status()?.rung != Rung::Spool {
        ensure!(Instant::now() < deadline, "{:#?}", site.status()?);
        load(&site, seed, 20)?;
        seed += 1;
        site.wait("room in the ring", |status| status.ring_fill_permille < 700)?;
    }
    site.network().stall(false);
    expect_replica(&site, &fs::read(site.image(0))?)?;
    site.stop_agent()?;
    site.stop_target()
}
