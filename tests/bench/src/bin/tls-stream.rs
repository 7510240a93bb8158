//! Sends noise over TLS, as many bytes as are written to a disk meanwhile, or receives it and throws it away: the least
//! that whoever replicates that disk over a secure link has to do.
//!
//! `tls-stream receive ADDRESS` takes one connection after the other; `tls-stream send ADDRESS DISK STOP` goes on until
//! there is a file STOP, and prints how many bytes it has sent and how many it was behind then. Both are the nodes of a
//! measurement between two guests.

use std::{fs, net::SocketAddr, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use tidemark_agent::encoder::{FRAME_RAW_BYTES, Pace};
use tidemark_link::{
    conn::{Connection, Timeouts},
    pki::{self, Identity, Trust},
    seam::{self, Listener},
};
use tidemark_tests::workload::rng::Rng;

/// Where a node keeps its certificate.
const PKI: &str = "/etc/tidemark/pki";
/// How often it is looked at what was written: as often as an agent that has little to send sends it.
const PERIOD: Duration = Duration::from_nanos(Pace::GROUP_NS);
/// The most that is sent in one message: as much as an agent puts in a frame.
const MESSAGE_BYTES: usize = FRAME_RAW_BYTES as usize;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["receive", address] => receive(address),
        ["send", address, disk, stop] => send(address, disk, Path::new(stop)),
        _ => Err(anyhow!("say: tls-stream receive ADDRESS, or tls-stream send ADDRESS DISK STOP")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tls-stream: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn receive(address: &str) -> Result<()> {
    let address: SocketAddr = address.parse().context("an address and a port are wanted")?;
    let tls = pki::server_config(&identity()?, &trust()?)?;
    seam::run(async move {
        let mut listener = Listener::bind(address)?;
        loop {
            let (stream, _) = listener.accept().await?;
            match Connection::accept(stream, &tls, &Timeouts::default()).await {
                Ok(link) => {
                    let (_sender, mut receiver) = link.split();
                    while let Ok(Some(_)) = receiver.recv().await {}
                }
                Err(error) => eprintln!("tls-stream: {error}"),
            }
        }
    })?
}

fn send(address: &str, disk: &str, stop: &Path) -> Result<()> {
    let device = fs::canonicalize(disk).with_context(|| format!("no disk {disk}"))?;
    let name = device.file_name().context("a disk is wanted")?.to_string_lossy();
    let counters = format!("/sys/class/block/{name}/stat");
    let tls = pki::client_config(&identity()?, &trust()?)?;
    let mut rng = Rng::new(1);
    let noise: Vec<u8> = (0..MESSAGE_BYTES / 8).flat_map(|_| rng.draw().to_le_bytes()).collect();
    seam::run(async move {
        let target = "target".parse()?;
        let link = Connection::connect(address, &tls, &target, &Timeouts::default()).await?;
        let (mut sender, _receiver) = link.split();
        let start = written_bytes(&counters)?;
        let mut before = start;
        loop {
            tokio::time::sleep(PERIOD).await;
            let now = written_bytes(&counters)?;
            if stop.exists() {
                println!("{} {}", before - start, now - before);
                return Ok(());
            }
            while before < now {
                let bytes = (now - before).min(MESSAGE_BYTES);
                sender.send_frame(&[&noise[..bytes]]).await?;
                before += bytes;
            }
            sender.flush().await?;
        }
    })?
}

/// What was written to a disk since it is there, by its counters in sysfs.
fn written_bytes(counters: &str) -> Result<usize> {
    let text = fs::read_to_string(counters).with_context(|| format!("cannot read {counters}"))?;
    let Some(sectors) = text.split_whitespace().nth(6) else {
        bail!("{counters} has no seventh number: {text}");
    };
    Ok(sectors.parse::<usize>()? * 512)
}

fn identity() -> Result<Identity> {
    Ok(Identity::from_pem(&read("node.pem")?, &read("node.key")?)?)
}

fn trust() -> Result<Trust> {
    Ok(Trust::from_pem(&read("ca.pem")?)?)
}

fn read(name: &str) -> Result<Vec<u8>> {
    let path = Path::new(PKI).join(name);
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}
