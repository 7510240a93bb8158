//! What the tests share: an export whose every reply the test lets go, servers, certificates.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tidemark_nbd::{
    BoxFuture, Buffer, Chunk, ClientInfo, Errno, Error, Export, ExportEntry, ExportInfo, Exports,
    Features, Limits, Listener, OpenError, Purpose, Reply, Server, Tls, tls,
};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Longest wait for something that must happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// All features, 4 GiB.
pub fn everything() -> ExportInfo {
    let features = Features {
        flush: true,
        fua: true,
        trim: true,
        write_zeroes: true,
        fast_zero: true,
        cache: true,
        multi_conn: true,
        ..Features::default()
    };
    ExportInfo { size: 4 << 30, features, ..ExportInfo::default() }
}

/// An export that writes down its calls and answers when the test says so.
#[derive(Default)]
pub struct Scripted {
    pub info: ExportInfo,
    /// Replies wait in `waiting`.
    pub hold: bool,
    /// What every request fails with.
    pub error: Option<Errno>,
    /// What reads return instead of zeros.
    pub read: Option<Vec<Chunk>>,
    pub calls: Mutex<Vec<String>>,
    pub waiting: Mutex<Vec<oneshot::Sender<()>>>,
    pub opened: AtomicUsize,
    pub closed: AtomicUsize,
    pub clients: Mutex<Vec<ClientInfo>>,
    /// Give out this export's own memory for payloads.
    pub own_memory: bool,
}

impl Scripted {
    pub fn new(info: ExportInfo) -> Arc<Self> {
        Arc::new(Self { info, ..Self::default() })
    }

    pub fn holding(info: ExportInfo) -> Arc<Self> {
        Arc::new(Self { info, hold: true, ..Self::default() })
    }

    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    /// Lets go the replies that wait, newest first.
    pub fn release(&self) -> usize {
        let mut waiting = self.waiting.lock().unwrap();
        let count = waiting.len();
        while let Some(sender) = waiting.pop() {
            sender.send(()).ok();
        }
        count
    }

    /// Waits until a condition on this export holds.
    pub async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let wait = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    fn reply<T: Send + Unpin + 'static>(&self, call: String, value: T) -> Reply<T> {
        self.calls.lock().unwrap().push(call);
        if let Some(errno) = self.error {
            return Reply::error(Error::new(errno, "as told"));
        }
        if !self.hold {
            return Reply::ready(value);
        }
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap().push(sender);
        Reply::future(async move {
            receiver.await.map_err(|_| Error::new(Errno::Io, "dropped"))?;
            Ok(value)
        })
    }
}

/// A payload buffer of the export's own.
pub struct OwnMemory(Vec<u8>);

impl AsRef<[u8]> for OwnMemory {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for OwnMemory {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Export for Scripted {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn buffer(&self, length: u32) -> Buffer {
        if self.own_memory {
            return Buffer::from_memory(Box::new(OwnMemory(vec![0xee; length as usize])));
        }
        Buffer::with_capacity(length as usize)
    }

    fn read(self: Arc<Self>, offset: u64, length: u32) -> Reply<Vec<Chunk>> {
        let chunks = self.read.clone();
        let chunks = chunks.unwrap_or_else(|| vec![Chunk::Data(vec![0; length as usize].into())]);
        self.reply(format!("read {offset}+{length}"), chunks)
    }

    fn write(self: Arc<Self>, offset: u64, data: Buffer, fua: bool) -> Reply<()> {
        let sum: u64 = data.iter().map(|byte| u64::from(*byte)).sum();
        let call = format!("write {offset}+{} sum {sum} fua {fua}", data.len());
        if self.own_memory {
            assert!(data.into_memory::<OwnMemory>().is_ok(), "the export's own memory comes back");
        }
        self.reply(call, ())
    }

    fn write_zeroes(
        self: Arc<Self>,
        offset: u64,
        length: u64,
        how: tidemark_nbd::Zeroing,
    ) -> Reply<()> {
        if how.fast_only {
            return Reply::error(Error::new(Errno::NotSup, "not fast"));
        }
        self.reply(format!("zero {offset}+{length} no_hole {}", how.no_hole), ())
    }

    fn trim(self: Arc<Self>, offset: u64, length: u64, _: bool) -> Reply<()> {
        self.reply(format!("trim {offset}+{length}"), ())
    }

    fn flush(self: Arc<Self>) -> Reply<()> {
        self.reply("flush".into(), ())
    }

    fn cache(self: Arc<Self>, offset: u64, length: u64) -> Reply<()> {
        self.reply(format!("cache {offset}+{length}"), ())
    }

    fn close(self: Arc<Self>) -> Reply<()> {
        self.closed.fetch_add(1, SeqCst);
        Reply::ready(())
    }
}

/// Serves one export as `disk`.
pub struct One(pub Arc<Scripted>);

impl Exports for One {
    fn list<'a>(&'a self, _: &'a ClientInfo) -> BoxFuture<'a, Vec<ExportEntry>> {
        let entry = ExportEntry { name: "disk".into(), description: "for tests".into() };
        Box::pin(async { vec![entry] })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _: Purpose,
        client: &'a ClientInfo,
    ) -> BoxFuture<'a, Result<Arc<dyn Export>, OpenError>> {
        Box::pin(async move {
            self.0.clients.lock().unwrap().push(client.clone());
            match name {
                "disk" => {
                    self.0.opened.fetch_add(1, SeqCst);
                    Ok(Arc::clone(&self.0) as Arc<dyn Export>)
                }
                "secret" => Err(OpenError::denied("only the operator may open this export")),
                _ => Err(OpenError::unavailable(format!("{name} lies inside a gap"))),
            }
        })
    }
}

/// A server on a Unix socket in a directory of its own.
pub struct OnUnix {
    pub server: Server,
    pub path: PathBuf,
    pub serving: JoinHandle<std::io::Result<()>>,
    _directory: TempDir,
}

impl OnUnix {
    pub async fn start(exports: impl Exports, limits: Limits) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("nbd.sock");
        let server = Server::new(Arc::new(exports), limits);
        let listener = Listener::unix(&path, 0o600).await.unwrap();
        let serving = {
            let server = server.clone();
            tokio::spawn(async move { server.serve(listener).await })
        };
        Self { server, path, serving, _directory: directory }
    }

    pub fn address(&self) -> &Path {
        &self.path
    }
}

/// An authority, a server certificate for `localhost` and a client certificate named
/// `client.example`, as libnbd and QEMU name the files.
pub struct Certificates(TempDir);

impl Certificates {
    pub fn make() -> Self {
        let directory = TempDir::new().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.distinguished_name.push(DnType::CommonName, "test authority");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let ca_key = KeyPair::generate().unwrap();
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let issuer = Issuer::new(ca, ca_key);
        std::fs::write(directory.path().join("ca-cert.pem"), ca_pem).unwrap();
        for (who, names) in [
            ("server", vec!["localhost".to_owned(), "127.0.0.1".to_owned()]),
            ("client", vec!["client.example".to_owned()]),
        ] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(names).unwrap();
            params.distinguished_name.push(DnType::CommonName, format!("the {who}"));
            // QEMU insists on key encipherment, though TLS 1.3 has no use for it.
            params.key_usages = vec![
                rcgen::KeyUsagePurpose::DigitalSignature,
                rcgen::KeyUsagePurpose::KeyEncipherment,
            ];
            params.extended_key_usages = vec![match who {
                "server" => rcgen::ExtendedKeyUsagePurpose::ServerAuth,
                _ => rcgen::ExtendedKeyUsagePurpose::ClientAuth,
            }];
            let certificate = params.signed_by(&key, &issuer).unwrap();
            let file = |kind| directory.path().join(format!("{who}-{kind}.pem"));
            std::fs::write(file("cert"), certificate.pem()).unwrap();
            std::fs::write(file("key"), key.serialize_pem()).unwrap();
        }
        Self(directory)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What a listener needs; with `mutual`, clients must show a certificate.
    pub fn required(&self, mutual: bool) -> Tls {
        let ca = self.file("ca-cert.pem");
        let (certificate, key) = (self.file("server-cert.pem"), self.file("server-key.pem"));
        Tls::Required(tls::server_config(&certificate, &key, mutual.then_some(&*ca)).unwrap())
    }
}

/// A pattern that differs at each offset.
pub fn pattern(seed: u64, length: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    });
    bytes.take(length).collect::<Vec<u8>>().into()
}
