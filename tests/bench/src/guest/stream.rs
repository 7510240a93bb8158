//! A TLS stream of as many bytes as are written to a disk, from the source guest to the target, where it is thrown away.
//! What it leaves of a device is what no replication over TLS between these machines can exceed.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use tidemark_tests::{pair::Pair, vm};

const PROGRAM: &str = "tls-stream";
const PORT: u16 = 7499;
/// Longer than any load.
const STREAM_MAX: Duration = Duration::from_secs(300);

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

/// Runs a load with the stream of a disk beside it, and says how far that was behind at the end.
///
/// # Errors
/// A guest that fails, the stream, or the load.
pub fn beside<T>(pair: &Pair, disk: &str, load: impl FnOnce() -> Result<T>) -> Result<T> {
    let (stop, to) = ("/run/tls-stream.stop", &pair.target_address);
    let send = format!("rm -f {stop}; exec {PROGRAM} send {to}:{PORT} {disk} {stop}");
    let stream = pair.source.spawn_for(&send, STREAM_MAX)?;
    let result = load()?;
    pair.source.sh(&format!("touch {stop}"))?;
    let output = stream.wait()?;
    ensure!(output.success(), "the stream has failed: {}", output.error_text());
    let text = output.text();
    let (sent, behind) = text.trim().split_once(' ').context("the stream says nothing")?;
    eprintln!("the stream has sent {sent} bytes and was {behind} behind");
    Ok(result)
}
