//! The first sync of a disk, half of which was never written, against `nbdcopy` of the same disk from `nbdkit`. Both over
//! TLS, with certificates on both ends, and durable at the end; what is read is in no cache.
//!
//! What was written is content as data often is: half of it compresses, half does not. Written and unwritten stretches
//! take turns.

use std::{
    fs::{self, File},
    io::{BufWriter, Seek, SeekFrom, Write},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tempfile::TempDir;
use tidemark_tests::{
    proxy::Proxy,
    site::{Plan, SOURCE, Site, TARGET},
    workload::content,
};

use super::{node, peers::Server, wait_in_sync};
use crate::figures::{Bar, Bound, Comparison, in_rounds, in_turn};

/// Each takes minutes, and moves gigabytes.
const ROUNDS_MAX: usize = 5;
const STRETCH_BYTES: u64 = 64 << 20;
const PIECE_BYTES: usize = 1 << 20;

/// Megabytes of the disk per second, and megabytes on the wire. The latter are counted in a round of its own, since what
/// counts costs time.
///
/// # Errors
/// A side or a program that cannot be started, a copy that is not the disk.
pub fn measure(rounds: usize, short: bool) -> Result<Vec<Comparison>> {
    let size_bytes = if short { 1 << 30 } else { 20 << 30 };
    let dir = tempfile::Builder::new().prefix("tidemark-sync-").tempdir()?;
    let disk = Disk { path: dir.path().join("disk.img"), size_bytes };
    disk.make()?;
    let names = ["first sync", "nbdcopy from nbdkit"].map(str::to_owned).to_vec();
    let gib = size_bytes >> 30;

    let wire = in_rounds(1, |_| {
        let (_, ours) = first_sync(&disk, true)?;
        let (_, theirs) = copy(&disk, dir.path(), true)?;
        Ok(vec![ours as f64 / 1e6, theirs as f64 / 1e6])
    })?;
    let speed = in_turn(2, rounds.min(ROUNDS_MAX), |which| {
        let (duration, _) =
            if which == 0 { first_sync(&disk, false) } else { copy(&disk, dir.path(), false) }?;
        Ok(size_bytes as f64 / 1e6 / duration.as_secs_f64())
    })?;
    Ok(vec![
        Comparison {
            what: format!("a disk of {gib} GiB, half of it written, over TLS"),
            unit: "MB/s",
            names: names.clone(),
            rounds: speed,
            bars: vec![Bar::ratio(0, 1, Bound::AtLeast(1.0))],
        },
        Comparison {
            what: "on the wire, both directions".to_owned(),
            unit: "MB",
            names,
            rounds: wire,
            bars: vec![Bar::ratio(0, 1, Bound::AtMost(1.0))],
        },
    ])
}

/// What is copied.
struct Disk {
    path: PathBuf,
    size_bytes: u64,
}

impl Disk {
    fn make(&self) -> Result<()> {
        let mut file = BufWriter::with_capacity(PIECE_BYTES, File::create(&self.path)?);
        let mut piece = vec![0; PIECE_BYTES];
        for stretch in (0..self.size_bytes).step_by(2 * STRETCH_BYTES as usize) {
            file.seek(SeekFrom::Start(stretch))?;
            for offset in (stretch..stretch + STRETCH_BYTES).step_by(PIECE_BYTES) {
                content::fill(1, offset, &mut piece);
                file.write_all(&piece)?;
            }
        }
        let file = file.into_inner()?;
        file.set_len(self.size_bytes)?;
        file.sync_all()?;
        Ok(())
    }

    /// Takes it out of the page cache.
    fn forget(&self) -> Result<()> {
        let file = File::open(&self.path)?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        Ok(())
    }
}

/// From the start of the agent until the target, a new one, has everything durably. How long that took, and if they
/// were counted, the bytes.
fn first_sync(disk: &Disk, counted: bool) -> Result<(Duration, u64)> {
    let mut plan = Plan::new(&[disk.size_bytes]);
    plan.ring_bytes = 256 << 20;
    plan.through_network = counted;
    let mut site = Site::new(plan)?;
    let program = node()?;
    fs::remove_file(site.image(0))?;
    fs::hard_link(&disk.path, site.image(0)).context("one file system for all is needed")?;
    site.spawn_target(&program)?;
    disk.forget()?;
    let start = Instant::now();
    site.spawn_agent(&program)?;
    wait_in_sync(&site)?;
    let duration = start.elapsed();
    let client = site.open_export("/v0@latest")?;
    for at in [0, disk.size_bytes - PIECE_BYTES as u64] {
        let expected = read(&disk.path, at)?;
        ensure!(site.read(&client, at, PIECE_BYTES as u64)? == expected, "the replica differs");
    }
    ensure!(site.stop_agent()?, "the agent did not end cleanly");
    Ok((duration, site.network().passed_bytes()))
}

/// The same by `nbdcopy`, to a new file.
fn copy(disk: &Disk, dir: &Path, counted: bool) -> Result<(Duration, u64)> {
    let work = tempfile::tempdir_in(dir)?;
    let certificates = certificates(work.path())?;
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let ready = work.path().join("ready");
    let _server = Server::nbdkit_tls(&disk.path, address, certificates.path(), &ready)?;
    let proxy = Proxy::start(address)?;
    let to = work.path().join("copy.img");
    disk.forget()?;
    let start = Instant::now();
    let uri = uri(if counted { proxy.address() } else { address }, certificates.path());
    let status = Command::new("nbdcopy").arg("--flush").arg(uri).arg(&to).status();
    let status = status.context("cannot start nbdcopy")?;
    let duration = start.elapsed();
    ensure!(status.success(), "nbdcopy failed: {status}");
    for at in [0, disk.size_bytes - PIECE_BYTES as u64] {
        ensure!(read(&to, at)? == read(&disk.path, at)?, "the copy differs");
    }
    Ok((duration, proxy.passed_bytes()))
}

fn uri(address: SocketAddr, certificates: &Path) -> String {
    format!("nbds://{address}/?tls-certificates={}", certificates.display())
}

fn read(path: &Path, at: u64) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut piece = vec![0; PIECE_BYTES];
    File::open(path)?.read_exact_at(&mut piece, at)?;
    Ok(piece)
}

/// Certificates for both ends, named as nbdkit and libnbd expect them.
fn certificates(dir: &Path) -> Result<TempDir> {
    use tidemark_link::pki::{Authority, NodeName};
    let certificates = tempfile::tempdir_in(dir)?;
    let authority = Authority::create("test")?;
    fs::write(certificates.path().join("ca-cert.pem"), &authority.pem().certificate_pem)?;
    for (end, node) in [("client", SOURCE), ("server", TARGET)] {
        let issued = authority.issue_for(&node.parse::<NodeName>()?, &["127.0.0.1".parse()?])?;
        fs::write(certificates.path().join(format!("{end}-cert.pem")), &issued.certificate_pem)?;
        fs::write(certificates.path().join(format!("{end}-key.pem")), &issued.key_pem)?;
    }
    Ok(certificates)
}
