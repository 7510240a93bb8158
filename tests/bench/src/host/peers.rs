//! Other people's NBD servers.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

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

    /// The same over TCP, for clients with a certificate only. `certificates` is a directory as nbdkit-tls(1) has it;
    /// `ready` is a file that it makes once it listens.
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

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
