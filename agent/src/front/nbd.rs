//! The NBD front: a volume as an export of lib/nbd.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tidemark_journal::{Sector, VolumeId};
use tidemark_nbd::{
    BlockSizes, BoxFuture, Buffer, Chunk, ClientInfo, Errno, Error, Export, ExportEntry,
    ExportInfo, Exports, Features, Limits, Listener, OpenError, Purpose, Reply, Server, Zeroing,
};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    engine::{Answer, Command, Engine, FrontAsk, FrontRequest, READ_BYTES_MAX, Range},
    kernel::blockdev::Backing,
};

/// The longest write in one request.
const WRITE_BYTES_MAX: u32 = 32 << 20;
/// How long a stop waits for requests under way.
const GRACE: Duration = Duration::from_secs(10);

/// A volume as an NBD export.
pub struct VolumeExport {
    engine: Engine,
    volume: VolumeId,
    name: String,
    info: ExportInfo,
    /// What an engine that has ended does not answer any more.
    unanswered: Unanswered,
}

/// What a client is told of a request that nobody answers any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unanswered {
    /// That it has failed: it may try again elsewhere.
    Refused,
    /// Nothing: it sends the request again to the next agent, over its next connection.
    Waits,
}

impl VolumeExport {
    /// A volume of an engine, with the sizes and abilities of its backing.
    pub fn new(
        engine: Engine,
        (volume, name): (VolumeId, &str),
        backing: &Backing,
        unanswered: Unanswered,
    ) -> Arc<VolumeExport> {
        let (geometry, abilities) = (backing.geometry(), backing.abilities());
        let info = ExportInfo {
            size: geometry.size_bytes,
            block_sizes: BlockSizes {
                minimum: geometry.logical_block_bytes.max(512),
                preferred: geometry.physical_block_bytes.clamp(4096, 65536),
                maximum: WRITE_BYTES_MAX,
            },
            features: Features {
                read_only: abilities.read_only,
                flush: true,
                fua: true,
                rotational: abilities.rotational,
                trim: abilities.unmap.is_some(),
                write_zeroes: true,
                fast_zero: false,
                cache: false,
                // One engine serves all connections, and a flush covers what it has answered.
                multi_conn: true,
            },
            canonical_name: Some(name.to_owned()),
            description: None,
        };
        Arc::new(VolumeExport { engine, volume, name: name.to_owned(), info, unanswered })
    }

    /// Hands a request over at once, so that requests keep the order of their arrival.
    fn ask(&self, ask: FrontAsk, offset: u64, bytes: u64) -> oneshot::Receiver<Answer> {
        let (answer, receiver) = oneshot::channel();
        let range = Range { start: Sector(offset / 512), sectors: bytes / 512 };
        let request = FrontRequest { volume: self.volume, ask, range, answer };
        self.engine.tell(Command::Request(request));
        receiver
    }

    fn done(&self, ask: FrontAsk, offset: u64, bytes: u64) -> Reply<()> {
        let (answer, unanswered) = (self.ask(ask, offset, bytes), self.unanswered);
        Reply::future(async move { wait(answer, unanswered).await.map(|_| ()) })
    }
}

async fn wait(
    answer: oneshot::Receiver<Answer>,
    unanswered: Unanswered,
) -> Result<bytes::Bytes, Error> {
    match (answer.await, unanswered) {
        (Ok(Ok(content)), _) => Ok(content),
        (Ok(Err(errno)), _) => Err(io::Error::from_raw_os_error(errno).into()),
        (Err(_), Unanswered::Refused) => Err(Error::new(Errno::Shutdown, "the agent is stopping")),
        (Err(_), Unanswered::Waits) => std::future::pending().await,
    }
}

impl Export for VolumeExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn read(self: Arc<Self>, offset: u64, length: u32) -> Reply<Vec<Chunk>> {
        let end = offset + u64::from(length);
        let pieces: Vec<_> = (offset..end)
            .step_by(READ_BYTES_MAX as usize)
            .map(|at| self.ask(FrontAsk::Read, at, READ_BYTES_MAX.min(end - at)))
            .collect();
        Reply::future(async move {
            let mut chunks = Vec::with_capacity(pieces.len());
            for piece in pieces {
                chunks.push(Chunk::Data(wait(piece, self.unanswered).await?));
            }
            Ok(chunks)
        })
    }

    fn write(self: Arc<Self>, offset: u64, data: Buffer, fua: bool) -> Reply<()> {
        let bytes = data.len() as u64;
        self.done(FrontAsk::Write { payload: data, fua }, offset, bytes)
    }

    fn write_zeroes(self: Arc<Self>, offset: u64, length: u64, how: Zeroing) -> Reply<()> {
        self.done(FrontAsk::Zero { unmap: !how.no_hole, fua: how.fua }, offset, length)
    }

    fn trim(self: Arc<Self>, offset: u64, length: u64, fua: bool) -> Reply<()> {
        let discarded = self.ask(FrontAsk::Discard, offset, length);
        Reply::future(async move {
            wait(discarded, self.unanswered).await?;
            if fua {
                wait(self.ask(FrontAsk::Flush, 0, 0), self.unanswered).await?;
            }
            Ok(())
        })
    }

    fn flush(self: Arc<Self>) -> Reply<()> {
        self.done(FrontAsk::Flush, 0, 0)
    }
}

/// The only export of a server: by its name, or as the default.
struct One {
    name: String,
    export: Arc<dyn Export>,
}

impl Exports for One {
    fn list<'a>(&'a self, _: &'a ClientInfo) -> BoxFuture<'a, Vec<ExportEntry>> {
        let entry = ExportEntry { name: self.name.clone(), description: String::new() };
        Box::pin(async move { vec![entry] })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _: Purpose,
        _: &'a ClientInfo,
    ) -> BoxFuture<'a, Result<Arc<dyn Export>, OpenError>> {
        Box::pin(async move {
            let own = &self.name;
            if name.is_empty() || name == own {
                return Ok(self.export.clone());
            }
            Err(OpenError::unavailable(format!("this socket serves '{own}', not '{name}'")))
        })
    }
}

/// A server for one volume. Nothing is listened on yet.
pub fn server(name: &str, export: Arc<dyn Export>) -> Server {
    Server::new(Arc::new(One { name: name.to_owned(), export }), Limits::default())
}

/// A volume on a Unix socket.
pub struct SocketFront {
    path: PathBuf,
    server: Server,
    serving: JoinHandle<io::Result<()>>,
}

impl SocketFront {
    /// Listens on `path`, whose directory is made.
    ///
    /// # Errors
    /// The socket cannot be made, or somebody listens there.
    pub async fn start(export: Arc<VolumeExport>, path: &Path) -> io::Result<SocketFront> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let listener = Listener::unix(path, 0o600).await?;
        let server = server(&export.name.clone(), export);
        let serving = tokio::spawn({
            let server = server.clone();
            async move { server.serve(listener).await }
        });
        Ok(SocketFront { path: path.to_owned(), server, serving })
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Clients that are connected.
    pub fn clients(&self) -> usize {
        self.server.connections()
    }

    /// Ends it when the requests under way are answered. To be called once.
    pub async fn stop(&mut self) {
        if !self.server.shutdown(GRACE).await {
            tracing::warn!(socket = %self.path.display(), "clients did not leave in time");
        }
        // Accepting ends with the shutdown; an error there was the reason to stop, if there was one.
        let _ = (&mut self.serving).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn an_engine_that_has_ended_refuses_those_alone_who_would_not_ask_again() {
        for (unanswered, refused) in [(Unanswered::Refused, true), (Unanswered::Waits, false)] {
            let (answer, receiver) = oneshot::channel();
            drop(answer);
            let waited = timeout(Duration::from_millis(50), wait(receiver, unanswered)).await;
            assert_eq!(waited.is_ok_and(|answered| answered.is_err()), refused, "{unanswered:?}");
        }
    }
}
