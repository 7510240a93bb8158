//! The part of a service manager that keeps descriptors from one process to the next (sd_notify(3), `FDSTORE=1`).

use std::ffi::OsString;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Listens to a daemon, and starts the next one with what was to be kept.
pub struct Manager {
    path: PathBuf,
    socket: UnixDatagram,
    kept: Vec<(String, OwnedFd)>,
}

impl Manager {
    /// Listens at `path`.
    pub fn bind(path: &Path) -> Result<Manager> {
        let socket = UnixDatagram::bind(path)?;
        socket.set_nonblocking(true)?;
        Ok(Manager { path: path.to_owned(), socket, kept: Vec::new() })
    }

    /// The names of what is kept.
    pub fn kept(&mut self) -> Result<Vec<String>> {
        self.listen()?;
        Ok(self.kept.iter().map(|(name, _)| name.clone()).collect())
    }

    /// A command that starts `program` as its daemon, with all that is kept.
    pub fn command(&mut self, program: &str) -> Result<Command> {
        self.listen()?;
        // The shell opens what this process holds, then becomes the program, whose process id it knows.
        let mut script = String::new();
        for (index, (_, fd)) in self.kept.iter().enumerate() {
            let (to, own) = (index + 3, std::process::id());
            script += &format!("exec {to}<>/proc/{own}/fd/{}\n", fd.as_raw_fd());
        }
        if !self.kept.is_empty() {
            let names: Vec<&str> = self.kept.iter().map(|(name, _)| name.as_str()).collect();
            script += &format!(
                "export LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={}\n",
                names.len(),
                names.join(":")
            );
        }
        script += "exec \"$0\" \"$@\"\n";
        let mut command = Command::new("sh");
        command.args(["-c", &script, program]);
        command.env("NOTIFY_SOCKET", OsString::from(&self.path));
        Ok(command)
    }

    /// Does what daemons have asked for since.
    fn listen(&mut self) -> Result<()> {
        loop {
            let mut text = [0; 4096];
            let mut space = nix::cmsg_space!([i32; 8]);
            let mut parts = [IoSliceMut::new(&mut text)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let fd = self.socket.as_raw_fd();
            let got = match recvmsg::<()>(fd, &mut parts, Some(&mut space), flags) {
                Ok(got) => got,
                Err(nix::Error::EAGAIN) => return Ok(()),
                Err(error) => return Err(io::Error::from(error).into()),
            };
            let mut passed = Vec::new();
            for control in got.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    // SAFETY: the kernel has just made these for this process, and nobody else knows them.
                    passed.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            let bytes = got.bytes;
            let message = std::str::from_utf8(&text[..bytes])?.to_owned();
            self.obey(&message, passed)?;
        }
    }

    fn obey(&mut self, message: &str, passed: Vec<OwnedFd>) -> Result<()> {
        let field =
            |key: &str| message.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let name =
            || field("FDNAME").with_context(|| format!("a message without a name: {message}"));
        if field("FDSTORE") == Some("1") {
            let name = name()?;
            self.kept.extend(passed.into_iter().map(|fd| (name.to_owned(), fd)));
        } else if field("FDSTOREREMOVE") == Some("1") {
            let name = name()?;
            self.kept.retain(|(kept, _)| kept != name);
        } else if !passed.is_empty() {
            bail!("descriptors that nobody was to keep: {message}");
        }
        Ok(())
    }
}
