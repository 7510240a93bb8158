//! The programs people use, against a real target's points and a real agent's front.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use tidemark_tests::site::{GROUP, Plan, Site};

const SIZE: u64 = 64 << 20;

/// A program's standard output; its failure, or its absence, is the test's.
fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {command:?}: 'cargo xtask setup' installs it"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The ways to an export: a local socket, and TLS with both sides' certificates.
struct Ways {
    socket: PathBuf,
    address: std::net::SocketAddr,
    certificates: PathBuf,
}

impl Ways {
    fn of(site: &Site) -> Result<Ways> {
        let certificates = site.dir().join("libnbd");
        fs::create_dir(&certificates)?;
        for (from, to) in [
            ("ca.pem", "ca-cert.pem"),
            ("source.pem", "client-cert.pem"),
            ("source.key", "client-key.pem"),
        ] {
            fs::copy(site.dir().join(from), certificates.join(to))?;
        }
        let address = site.target()?.nbd_addr().context("the target has no TCP listener")?;
        Ok(Ways { socket: site.exports(), address, certificates })
    }

    fn uris(&self, export: &str) -> [String; 2] {
        let name = export.replace('/', "%2F");
        [
            format!("nbd+unix:///{name}?socket={}", self.socket.display()),
            format!(
                "nbds://{}/{name}?tls-certificates={}",
                self.address,
                self.certificates.display()
            ),
        ]
    }

    /// QEMU names its certificates apart from the place.
    fn qemu(&self, export: &str) -> [Vec<String>; 2] {
        let dir = self.certificates.display();
        let host = self.address.ip();
        [
            vec![
                "--image-opts".into(),
                format!(
                    "driver=nbd,server.type=unix,server.path={},export={export}",
                    self.socket.display()
                ),
            ],
            vec![
                "--object".into(),
                format!("tls-creds-x509,id=tls,endpoint=client,dir={dir}"),
                "--image-opts".into(),
                format!(
                    "driver=nbd,server.type=inet,server.host={host},server.port={},export={export},tls-creds=tls",
                    self.address.port()
                ),
            ],
        ]
    }
}

fn copy(uri: &str, to: &Path) -> Result<Vec<u8>> {
    run(Command::new("nbdcopy").args(["--threads=4", "--connections=4", uri]).arg(to))?;
    Ok(fs::read(to)?)
}

#[test]
fn a_point_is_the_same_disk_to_every_client() -> Result<()> {
    let site = Site::started(Plan::new(&[SIZE]))?;
    site.wait_in_sync()?;
    let disk = site.open_front(0)?;
    site.runtime().block_on(async {
        for index in 0..64u64 {
            let content = vec![index as u8 + 1; 20 << 10];
            disk.write(index * (768 << 10), Bytes::from(content), false).await?;
        }
        disk.flush().await
    })?;
    let seq = site.mark("here")?;
    let expected = fs::read(site.image(0))?;
    site.runtime().block_on(disk.write(0, Bytes::from(vec![0xff; 4096]), true))?;
    site.wait_in_sync()?;

    let ways = Ways::of(&site)?;
    let point = format!("{GROUP}/v0@seq:{seq}");
    for (way, uri) in ways.uris(&point).iter().enumerate() {
        let server = ways.uris("")[way].clone();
        let list = run(Command::new("nbdinfo").args(["--list", &server]))?;
        // Some versions of its URI library escape the colon.
        let list = list.replace("%3A", ":");
        for name in ["the newest point", "v0@mark:here"] {
            ensure!(list.contains(name), "{name} is not listed: {list}");
        }
        let size = run(Command::new("nbdinfo").args(["--size", uri]))?;
        ensure!(size.trim() == SIZE.to_string(), "another size: {size}");

        let map = run(Command::new("nbdinfo").args(["--map", "--json", uri]))?;
        let map: serde_json::Value = serde_json::from_str(&map)?;
        let extents = map.as_array().context("the map is no list")?;
        let number = |extent: &serde_json::Value, key: &str| extent[key].as_u64().unwrap_or(0);
        let covered: u64 = extents.iter().map(|extent| number(extent, "length")).sum();
        ensure!(covered == SIZE, "the map covers {covered} bytes");
        for extent in extents.iter().filter(|extent| number(extent, "type") & 2 != 0) {
            let (from, bytes) =
                (number(extent, "offset") as usize, number(extent, "length") as usize);
            ensure!(expected[from..from + bytes].iter().all(|b| *b == 0), "no zeros: {extent}");
        }
        ensure!(extents.len() > 64, "the map knows no holes: {map}");

        ensure!(
            copy(uri, &site.dir().join("copy.img"))? == expected,
            "nbdcopy read something else"
        );

        // The address names a directory of certificates, which libnbd takes only where told so.
        let connect = format!("h.set_uri_allow_local_file(True); h.connect_uri('{uri}')");
        let script = "print(h.is_read_only(), h.pread(4, 0).hex(), h.pread(4, 768 * 1024).hex())";
        let shell = run(Command::new("/usr/bin/nbdsh")
            .env("PATH", "/usr/bin:/bin")
            .args(["-c", &connect, "-c", script]))?;
        ensure!(shell.trim() == "True 01010101 02020202", "nbdsh read {shell}");
    }
    fs::write(site.dir().join("expected.img"), &expected)?;
    for options in ways.qemu(&point) {
        let image =
            format!("driver=raw,file.filename={}", site.dir().join("expected.img").display());
        let compared = run(Command::new("qemu-img").arg("compare").args(&options).arg(image))?;
        ensure!(compared.contains("identical"), "qemu-img: {compared}");
        let read = run(Command::new("qemu-io")
            .arg("-r")
            .args(&options)
            .args(["-c", "read -P 3 1536k 20k"]))?;
        ensure!(!read.contains("failed"), "qemu-io: {read}");
    }
    Ok(())
}

/// The writer puts the round's number on each of so many places, one after the other. So every
/// moment shows a round up to some place and the round before behind it; two moments mixed do not.
#[test]
fn four_connections_to_the_latest_point_see_one_moment_under_load() -> Result<()> {
    const PLACES: u64 = 64;
    let site = Site::started(Plan::new(&[SIZE]))?;
    site.wait_in_sync()?;
    let disk = site.open_front(0)?;
    let ways = Ways::of(&site)?;
    let stop = AtomicBool::new(false);
    let at = |place: u64| place * (SIZE / PLACES);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| -> Result<u64> {
            let mut round = 0u64;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                for place in 0..PLACES {
                    let content = Bytes::from(round.to_le_bytes().repeat(512));
                    site.runtime().block_on(disk.write(at(place), content, false))?;
                }
            }
            Ok(round)
        });
        let judged = (|| {
            for uri in ways.uris(&format!("{GROUP}/v0@latest")) {
                std::thread::sleep(Duration::from_millis(300));
                let content = copy(&uri, &site.dir().join("latest.img"))?;
                let rounds: Vec<u64> = (0..PLACES)
                    .map(|place| {
                        content[at(place) as usize..][..8].try_into().map(u64::from_le_bytes)
                    })
                    .collect::<Result<_, _>>()?;
                let (first, last) = (rounds[0], rounds[PLACES as usize - 1]);
                ensure!(first > 1, "the writer has not begun: {rounds:?}");
                ensure!(
                    rounds.is_sorted_by(|a, b| a >= b) && first - last <= 1,
                    "mixed: {rounds:?}"
                );
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let rounds = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        ensure!(rounds > 2, "hardly any load: {rounds} rounds");
        judged
    })
}

#[test]
fn fio_verifies_through_the_front() -> Result<()> {
    let site = Site::started(Plan::new(&[SIZE]))?;
    let uri = format!("nbd+unix:///?socket={}", site.front(0).display());
    run(Command::new("fio").current_dir(site.dir()).args([
        "--name=verify",
        "--ioengine=nbd",
        &format!("--uri={uri}"),
        "--rw=randwrite",
        "--bssplit=4k/60:16k/20:64k/10:256k/10",
        "--size=64m",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--randrepeat=1",
    ]))?;
    site.wait_in_sync()?;
    ensure!(site.read_export("/v0@latest")? == fs::read(site.image(0))?, "the replica differs");
    Ok(())
}
