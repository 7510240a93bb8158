//! A target in this process, a source driven by hand over mutual TLS, and a model of its disks.
#![allow(dead_code, reason = "each test takes what it needs")]

pub mod model;
pub mod source;

use std::{
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tempfile::TempDir;
use tidemark_journal::{GapReason, Seq, VolumeId};
use tidemark_link::pki::{Authority, Identity, Trust};
use tidemark_nbd::client::{Client, ConnectError, Options};
use tidemark_target::{Config, Target};

use model::difference;
use source::Source;

/// A source with one disk of zeros, whose first sync is through.
pub async fn synced(lab: &Lab, bytes: usize) -> Source {
    let mut source = Source::new(&[bytes]);
    source.connect(lab).await;
    source.gap_begin(0, GapReason::FirstSync);
    source.gap_end(0);
    source.send().await;
    source.acknowledged().await;
    source
}

/// The first disk's point at a position is what the model says.
pub async fn equals(lab: &Lab, source: &Source, seq: Seq) {
    let client = lab.open(&format!("shop/disk0@seq:{seq}")).await.expect("it opens");
    let model = source.model.at(VolumeId(0), seq);
    let read = client.read(0, model.len() as u32).await.expect("it reads");
    assert_eq!(difference(&read, &model), None, "at {seq}");
    client.disconnect().await;
}

/// A directory with certificates, and the target that is configured in it.
pub struct Lab {
    pub dir: TempDir,
    authority: Authority,
    pub config: Config,
    target: Option<Target>,
}

impl Lab {
    /// A running target that takes the group `shop` from the node `db1`. `more` is added to the
    /// group's configuration, `store` replaces the store's.
    pub fn new(store: &str, more: &str) -> Lab {
        Lab::at(TempDir::new().expect("a directory"), None, store, more)
    }

    /// The same with its data in another place.
    pub fn at(dir: TempDir, data: Option<PathBuf>, store: &str, more: &str) -> Lab {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let authority = Authority::create("test").expect("an authority");
        let path = |name: &str| dir.path().join(name);
        let node = authority.issue(&"dr1".parse().expect("a name")).expect("a certificate");
        std::fs::write(path("ca.pem"), &authority.pem().certificate_pem).expect("written");
        std::fs::write(path("node.pem"), &node.certificate_pem).expect("written");
        std::fs::write(path("node.key"), &node.key_pem).expect("written");
        let data = data.unwrap_or_else(|| path("data"));
        let (here, data) = (dir.path().display(), data.display());
        let text = format!(
            r#"
            data_dir = "{data}"
            [link]
            listen = "127.0.0.1:0"
            ca = "{here}/ca.pem"
            certificate = "{here}/node.pem"
            key = "{here}/node.key"
            [nbd]
            unix = "{here}/nbd.sock"
            latest_linger = "1 s"
            [api]
            socket = "{here}/api.sock"
            [store]
            {store}
            [[group]]
            name = "shop"
            node = "db1"
            {more}
            "#
        );
        let config = Config::parse(&text).expect("a good configuration");
        let mut lab = Lab { dir, authority, config, target: None };
        lab.start();
        lab
    }

    pub fn start(&mut self) {
        let config = self.config.clone();
        let started = std::thread::spawn(move || Target::start(&config)).join().expect("no panic");
        self.target = Some(started.expect("the target starts"));
    }

    pub fn target(&self) -> &Target {
        self.target.as_ref().expect("it runs")
    }

    pub fn link_addr(&self) -> SocketAddr {
        self.target().link_addr()
    }

    /// A clean stop.
    pub fn stop(&mut self) {
        if let Some(target) = self.target.take() {
            std::thread::spawn(move || target.shutdown()).join().expect("no panic");
        }
    }

    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// The identity of a node, and whom it trusts.
    pub fn identity(&self, name: &str) -> (Identity, Trust) {
        let pem = self.authority.issue(&name.parse().expect("a name")).expect("a certificate");
        let identity = Identity::from_pem(pem.certificate_pem.as_bytes(), pem.key_pem.as_bytes());
        let trust = Trust::from_pem(self.authority.pem().certificate_pem.as_bytes());
        (identity.expect("good"), trust.expect("good"))
    }

    /// How NBD clients connect over TCP: as a node, or without a certificate.
    pub fn nbd_options(&self, node: Option<&str>) -> Options {
        self.nbd_options_by(&self.authority, node)
    }

    /// The same with a certificate of any authority.
    pub fn nbd_options_by(&self, authority: &Authority, node: Option<&str>) -> Options {
        let path = |name: &str| self.dir.path().join(name);
        let identity = node.map(|node| {
            let pem = authority.issue(&node.parse().expect("a name")).expect("a certificate");
            let (certificate, key) = (path("client.pem"), path("client.key"));
            std::fs::write(&certificate, pem.certificate_pem).expect("written");
            std::fs::write(&key, pem.key_pem).expect("written");
            (certificate, key)
        });
        let identity = identity.as_ref().map(|(certificate, key)| (&**certificate, &**key));
        let config = tidemark_nbd::tls::client_config(&path("ca.pem"), identity);
        let server = "dr1.tidemark.internal".try_into().expect("a name");
        Options { tls: Some((config.expect("good certificates"), server)), ..Options::default() }
    }

    /// Opens an export over the Unix socket.
    pub async fn open(&self, export: &str) -> Result<Client, ConnectError> {
        let path = self.target().nbd_unix().expect("configured");
        Client::connect(path, export, &Options::default()).await
    }

    /// The sentence with which opening an export is refused.
    pub async fn refusal(&self, export: &str) -> String {
        match self.open(export).await {
            Err(ConnectError::Refused { message, .. }) => message,
            Err(other) => panic!("{export}: {other}"),
            Ok(_) => panic!("{export} was opened"),
        }
    }

    /// The replica of the group `shop`.
    pub fn replica(&self) -> Arc<tidemark_target::replica::Replica> {
        self.target().groups().replica("shop").expect("it has been received")
    }

    pub fn log_dir(&self) -> PathBuf {
        self.config.data_dir.join("groups/shop/log")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A small file system of its own, unmounted when dropped.
pub struct Small(pub PathBuf);

impl Small {
    /// Mounts one of so many bytes.
    pub fn mount(at: &Path, bytes: usize) -> Small {
        use nix::mount::{MsFlags, mount};
        std::fs::create_dir_all(at).expect("made");
        let options = format!("size={bytes}");
        let options = Some(options.as_str());
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), options)
            .expect("mounted as root");
        Small(at.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Takes all the room there is on a file system, until the file is removed.
pub fn fill(path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).expect("made");
    let mut at = 0;
    while file.write_all_at(&[1; 4096], at).is_ok() {
        at += 4096;
    }
}

/// Sends writes until the target says that it has no room.
pub async fn send_until_full(source: &mut Source) {
    let full = |source: &Source| source.ack().is_some_and(|ack| ack.flags.full);
    for _ in 0..400 {
        if full(source) {
            break;
        }
        source.random();
        source.send().await;
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    eventually("it says so", || full(source)).await;
}

/// Runs a test on the link's runtime, on which the source lives.
pub fn run<F: Future>(test: impl FnOnce() -> F) -> F::Output {
    tidemark_link::seam::run(async { test().await }).expect("an io_uring")
}

/// Waits until something is so.
pub async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..600 {
        if so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it never was so: {what}");
}
