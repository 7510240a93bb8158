//! An in-memory disk over NBD.
//!
//! ```text
//! memory --size 64M --unix /tmp/disk.sock
//! memory --size 1G --tcp 127.0.0.1:10809 --certificate cert.pem --key key.pem [--client-ca ca.pem]
//! memory --size 1G --tcp 127.0.0.1:10809 --plain
//! memory --size 64M --activated
//! ```
//!
//! The disk is called `disk` and is the default export. It ends on Ctrl-C or SIGTERM, after the
//! requests under way. It is sparse: blocks never written, zeroed or trimmed are holes.

mod disk;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use disk::MemoryExports;

use tidemark_nbd::{Limits, Listener, Server, Tls, tls};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Default)]
struct Arguments {
    size: u64,
    unix: Option<PathBuf>,
    tcp: Option<String>,
    activated: bool,
    plain: bool,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    client_ca: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = parse(std::env::args().skip(1))?;
    let tls = match (&arguments.certificate, &arguments.key) {
        (Some(certificate), Some(key)) => {
            Tls::Required(tls::server_config(certificate, key, arguments.client_ca.as_deref())?)
        }
        (None, None) => Tls::Off,
        _ => bail!("--certificate and --key go together"),
    };
    let mut listeners = Vec::new();
    if let Some(path) = &arguments.unix {
        listeners.push(Listener::unix(path, 0o600).await.context("--unix")?);
    }
    if let Some(address) = &arguments.tcp {
        listeners.push(Listener::tcp(address).await.context("--tcp")?);
    }
    if arguments.activated {
        listeners.extend(Listener::activated()?);
    }
    if listeners.is_empty() {
        bail!("nowhere to listen: give --unix PATH, --tcp ADDRESS or --activated");
    }

    let server = Server::new(Arc::new(MemoryExports::new(arguments.size)), Limits::default());
    for listener in listeners {
        let listener = listener.with_tls(tls.clone());
        let listener = if arguments.plain { listener.allow_plain_tcp() } else { listener };
        let server = server.clone();
        tokio::spawn(async move {
            if let Err(error) = server.serve(listener).await {
                eprintln!("memory: {error}");
                std::process::exit(1);
            }
        });
    }
    println!("ready");
    let mut term = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = term.recv() => {}
    }
    server.shutdown(Duration::from_secs(10)).await;
    Ok(())
}

fn parse(mut words: impl Iterator<Item = String>) -> anyhow::Result<Arguments> {
    let mut arguments = Arguments { size: 64 << 20, ..Arguments::default() };
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--size" => arguments.size = size(&value()?)?,
            "--unix" => arguments.unix = Some(value()?.into()),
            "--tcp" => arguments.tcp = Some(value()?),
            "--activated" => arguments.activated = true,
            "--plain" => arguments.plain = true,
            "--certificate" => arguments.certificate = Some(value()?.into()),
            "--key" => arguments.key = Some(value()?.into()),
            "--client-ca" => arguments.client_ca = Some(value()?.into()),
            other => bail!("unknown argument {other}; see the head of examples/memory.rs"),
        }
    }
    Ok(arguments)
}

/// A size such as 512, 64K, 64M or 1G, in bytes.
fn size(text: &str) -> anyhow::Result<u64> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().with_context(|| format!("{text} is not a size"))?;
    number.checked_mul(1 << shift).context("the size is too large")
}
