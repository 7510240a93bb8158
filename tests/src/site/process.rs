//! Either side of a site in a process of its own.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

/// A running program `node`. Dropping it kills it.
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts the program and waits until it says that it runs.
    pub fn start(program: &str, arguments: &[PathBuf], role: &str) -> Result<Process> {
        Process::start_by(Command::new(program), arguments, role)
    }

    /// Like [`Process::start`], by a command that becomes the program.
    pub fn start_by(mut command: Command, arguments: &[PathBuf], role: &str) -> Result<Process> {
        let mut child = command
            .arg(role)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let mut line = String::new();
        let out = child.stdout.take().context("its standard output")?;
        let process = Process { child };
        BufReader::new(out).read_line(&mut line)?;
        ensure!(line == "running\n", "{role} did not start; its error is above");
        Ok(process)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Has it end in order; says whether it did so cleanly.
    pub fn stop(mut self) -> Result<bool> {
        drop(self.child.stdin.take());
        Ok(self.child.wait()?.success())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail when it has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
