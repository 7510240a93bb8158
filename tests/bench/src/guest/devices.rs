//! The devices of the source guest that are measured side by side, each on a disk of its own of the same kind.

use std::{env, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use tidemark_tests::pair::Pair;

use super::{drbd, stream};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thing {
    /// A protected device.
    Protected,
    /// Our own device without capture.
    Plain,
    /// `rublk`'s loop.
    Rublk,
    /// The same beside a TLS stream of as many bytes to the second guest.
    Streamed,
    /// A protected device, its own link held, beside such a stream.
    ProtectedStreamed,
    /// The disk itself.
    Bare,
    /// DRBD with protocol A, connected to the same second guest.
    Drbd,
}

impl Thing {
    /// Its name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Thing::Protected => "protected",
            Thing::Plain => "own device without capture",
            Thing::Rublk => "rublk loop",
            Thing::Streamed => "rublk loop beside a TLS stream",
            Thing::ProtectedStreamed => "protected beside a TLS stream",
            Thing::Bare => "bare disk",
            Thing::Drbd => "DRBD protocol A",
        }
    }
}

/// Where the devices of the guest are.
pub struct Devices {
    rublk: String,
}

impl Devices {
    /// Starts what serves them, and what takes a stream in the second guest; DRBD too, if it is asked for.
    ///
    /// # Errors
    /// There is no rublk or DRBD; a guest that fails.
    pub fn start(pair: &Pair, with_drbd: bool) -> Result<Devices> {
        start_plain(pair)?;
        let rublk = start_rublk(pair)?;
        stream::start(pair)?;
        if with_drbd {
            drbd::start(pair)?;
        }
        Ok(Devices { rublk })
    }

    /// The path of a device.
    pub fn path(&self, pair: &Pair, thing: Thing) -> String {
        match thing {
            Thing::Protected | Thing::ProtectedStreamed => pair.device("data"),
            Thing::Plain => "/dev/tidemark/plain/plain".to_owned(),
            Thing::Rublk | Thing::Streamed => self.rublk.clone(),
            Thing::Bare => pair.raw_disk("bare"),
            Thing::Drbd => drbd::DEVICE.to_owned(),
        }
    }
}

/// The node that serves a disk without capture, beside the one that captures.
const PLAIN_NODE: &str = "node = \"source\"\nstate_dir = \"/var/lib/plain\"\nruntime_dir = \"/run/plain\"\n\
                          api_socket = \"/run/plain/agent.sock\"\n";

fn start_plain(pair: &Pair) -> Result<()> {
    let group = format!(
        "id = \"000000000000000000000000000000aa\"\nfront = \"ublk\"\n\
         [target]\naddress = \"{}\"\nname = \"target\"\n\
         [[volume]]\nid = 1\nname = \"plain\"\nbacking = \"{}\"\n",
        pair.target_address,
        pair.raw_disk("plain"),
    );
    let source = &pair.source;
    source.sh("mkdir -p /etc/plain/agent.d /var/lib/plain /run/plain")?;
    source.write("/etc/plain/agent.toml", 0o644, PLAIN_NODE.as_bytes())?;
    source.write("/etc/plain/agent.d/plain.toml", 0o644, group.as_bytes())?;
    source.sh(
        "systemd-run --quiet --unit=plain --property=Type=notify --property=LimitMEMLOCK=infinity \
         tidemark-agent --config /etc/plain --passthrough plain && \
         udevadm wait --timeout=60 --settle /dev/tidemark/plain/plain",
    )?;
    Ok(())
}

/// Starts `rublk` with one queue of the depth that our devices have; the device's path.
fn start_rublk(pair: &Pair) -> Result<String> {
    let source = &pair.source;
    source.copy_in(&rublk()?, "/usr/bin/rublk")?;
    let devices = || source.sh("ls /dev | grep ublkb || true");
    let before = devices()?;
    let disk = pair.raw_disk("loop");
    source.sh(&format!("rublk add loop -f {disk} -q 1 -d 64 && udevadm settle"))?;
    let after = devices()?;
    let new = after.lines().find(|name| !before.lines().any(|other| other == *name));
    Ok(format!("/dev/{}", new.context("rublk made no device")?))
}

fn rublk() -> Result<PathBuf> {
    let named = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo/bin/rublk"));
    let path = named.context("HOME is not set")?;
    ensure!(fs::exists(&path)?, "no {}: run 'cargo install rublk --locked'", path.display());
    Ok(path)
}
