//! How fast frames of 1 MiB go over the link: mutual TLS over the loopback device, each end on a
//! thread of its own.
//!
//! `cargo run --release -p tidemark-link --example throughput [-- GIB [ROUNDS]]`

use std::{net::SocketAddr, sync::mpsc, thread, time::Instant};

use tidemark_link::{
    Connection, Message, NodeName, Timeouts,
    pki::{Authority, Identity, Trust, client_config, server_config},
    seam::{self, Listener},
};

const FRAME_BYTES: usize = 1 << 20;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let gib: usize = arguments.next().map_or(Ok(4), |text| text.parse())?;
    let rounds: usize = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let authority = Authority::create("throughput")?;
    let trust = Trust::from_pem(authority.pem().certificate_pem.as_bytes())?;
    let identity = |name: &str| -> Result<Identity, Failure> {
        let pem = authority.issue(&name.parse()?)?;
        Ok(Identity::from_pem(pem.certificate_pem.as_bytes(), pem.key_pem.as_bytes())?)
    };
    let client = client_config(&identity("source")?, &trust)?;
    let server = server_config(&identity("target")?, &trust)?;
    let target_name: NodeName = "target".parse()?;
    for round in 1..=rounds {
        let (listening, address) = mpsc::channel();
        let server = server.clone();
        let target = thread::spawn(move || {
            seam::run(async move {
                let mut listener = Listener::bind("127.0.0.1:0".parse()?)?;
                listening.send(listener.local_addr()?)?;
                let (stream, _) = listener.accept().await?;
                let connection = Connection::accept(stream, &server, &Timeouts::default()).await?;
                let (mut answers, mut receiver) = connection.split();
                let mut bytes = 0;
                while let Some(message) = receiver.recv().await? {
                    if let Message::Frame(frame) = message {
                        bytes += frame.len();
                    }
                }
                answers.send(&Message::Bye).await?;
                Ok::<usize, Failure>(bytes)
            })?
        });
        let address: SocketAddr = address.recv()?;
        let took = seam::run(async {
            let timeouts = Timeouts::default();
            let address = address.to_string();
            let connection =
                Connection::connect(&address, &client, &target_name, &timeouts).await?;
            let (mut sender, mut receiver) = connection.split();
            let frame: Vec<u8> = (0..FRAME_BYTES).map(|n| (n >> 5) as u8).collect();
            let started = Instant::now();
            for _ in 0..gib << 10 {
                sender.send_frame(&[&frame]).await?;
            }
            sender.finish().await?;
            // The answer comes when the last frame has been read.
            receiver.recv().await?;
            Ok::<_, Failure>(started.elapsed())
        })??;
        let bytes = target.join().map_err(|_| "the target's thread failed")??;
        assert_eq!(bytes, gib << 30, "bytes at the target");
        let rate = bytes as f64 / took.as_secs_f64() / 1e9;
        println!("round {round}: {gib} GiB in {:.2} s, {rate:.2} GB/s", took.as_secs_f64());
    }
    Ok(())
}
