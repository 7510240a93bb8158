//! A TLS stream of as many bytes as are written to a disk, from the source guest to the target, where it is thrown away.
//! What it leaves of `rublk`'s loop is what no replication over TLS between these machines can exceed.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use tidemark_tests::{pair::Pair, vm};

const PROGRAM: &str = "tls-stream";
const PORT: u16 = 7499;

/// Installs it in both guests, and starts what receives.
///
/// # Errors
/// It is not built; a guest that fails.
pub fn start(pair: &Pair) -> Result<()> {
    let stripped = tempfile::NamedTempFile::new()?;
    let mut strip = Command::new("strip");
    strip.arg("--strip-all").arg(vm::program(PROGRAM)?).arg("-o").arg(stripped.path());
    ensure!(strip.status()?.success(), "strip has failed");
    let path = format!("/usr/bin/{PROGRAM}");
    for guest in [&pair.source, &pair.target] {
        guest.copy_in(stripped.path(), &path)?;
        guest.sh(&format!("chmod 755 {path}"))?;
    }
    pair.target.sh(&format!("systemd-run --quiet {PROGRAM} receive 0.0.0.0:{PORT}"))?;
    Ok(())
}

/// Runs a load with the stream of a disk beside it.
///
/// # Errors
/// A guest that fails, the stream, or the load.
pub fn beside<T>(pair: &Pair, disk: &str, load: impl FnOnce() -> Result<T>) -> Result<T> {
    let (unit, host) = ("stream", &pair.target_address);
    pair.source
        .sh(&format!("systemd-run --quiet --unit={unit} {PROGRAM} send {host}:{PORT} {disk}"))?;
    let result = load()?;
    let stop = format!(
        "systemctl is-active {unit} && systemctl stop {unit} || {{ journalctl -u {unit} -n 20; false; }}"
    );
    pair.source.sh(&stop).context("the stream has ended by itself")?;
    Ok(result)
}
