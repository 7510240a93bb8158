//! Other people's NBD servers.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// How long one may take to listen.
const START_MAX: Duration = Duration::from_secs(20);

/// A server in a process of its own, which ends with this.
pub struct Server {
    child: Child,
}

impl Server {
    /// `nbdkit` with its file plugin, as it is by default.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn nbdkit(file: &Path, socket: &Path) -> Result<Server> {
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(socket);
        command.arg("file").arg(file);
        Server::start(command, socket)
    }

    /// `nbdkit` with its null plugin: a disk of so many bytes that takes everything in and keeps nothing.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn nbdkit_null(size_bytes: u64, socket: &Path) -> Result<Server> {
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(socket);
        command.arg("null").arg(size_bytes.to_string());
        Server::start(command, socket)
    }

    /// `nbdkit` with its file plugin over TCP, for clients with a certificate only. `certificates` is a directory as
    /// nbdkit-tls(1) has it; `ready` is a file that it makes once it listens.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn nbdkit_tls(
        file: &Path,
        address: SocketAddr,
        certificates: &Path,
        ready: &Path,
    ) -> Result<Server> {
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--tls=require", "--tls-verify-peer"]);
        command.arg(format!("--tls-certificates={}", certificates.display()));
        command.arg(format!("--ipaddr={}", address.ip())).arg(format!("--port={}", address.port()));
        command.arg("--pidfile").arg(ready).arg("file").arg(file);
        Server::start(command, ready)
    }

    /// `qemu-nbd` with io_uring and direct I/O.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn qemu_nbd(file: &Path, socket: &Path) -> Result<Server> {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=0", "--format=raw", "--aio=io_uring"]);
        command.args(["--cache=none", "--socket"]).arg(socket).arg(file);
        Server::start(command, socket)
    }

    /// Waits for `ready`, which it makes when it listens.
    fn start(mut command: Command, ready: &Path) -> Result<Server> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.stdin(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot start {program}"))?;
        let mut server = Server { child };
        let start = Instant::now();
        while !ready.exists() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{program} has ended: {status}");
            }
            if start.elapsed() > START_MAX {
                bail!("{program} does not listen");
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }
}

/// Megabytes per second of fio, which writes so many random blocks of 4 KiB to a file, so many at a time, with io_uring
/// and direct I/O, until they are on the disk.
///
/// # Errors
/// It cannot be started, or fails.
pub fn fio(file: &Path, written_bytes: u64, depth: usize) -> Result<f64> {
    let mut command = Command::new("fio");
    command.args(["--name=load", "--ioengine=io_uring", "--direct=1", "--rw=randwrite", "--bs=4k"]);
    command.args(["--norandommap", "--randrepeat=0", "--end_fsync=1", "--output-format=json"]);
    command.arg(format!("--filename={}", file.display()));
    command.arg(format!("--io_size={written_bytes}")).arg(format!("--iodepth={depth}"));
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output().context("cannot start fio")?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    Ok(written_bytes as f64 / 1e6 / seconds)
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
