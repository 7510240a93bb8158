//! Against a kernel that is played: a device always has a connection, and nobody serves what has failed.

use std::{
    io,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::bail;
use tidemark_nbd::{
    BlockSizes, Buffer, Chunk, ExportInfo, Features, Reply,
    proto::{
        SIMPLE_REPLY_MAGIC,
        transmission::{Command, Request},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Semaphore, mpsc},
    time::timeout,
};

use super::*;

const SOON: Duration = Duration::from_secs(20);
/// No kernel, and no udev, is asked for a name that cannot be one.
const NO_NAME: &str = "no/name";

/// What happens at an attempt to give the device a connection.
enum Attempt {
    Refused,
    Taken,
    NoDevice,
}

/// A kernel, whose ends of the connections go to the test.
struct Played {
    ends: mpsc::UnboundedSender<UnixStream>,
    /// The last first.
    attempts: Mutex<Vec<Attempt>>,
    disconnected: AtomicU32,
}

impl Played {
    fn new(attempts: Vec<Attempt>) -> (Arc<Played>, mpsc::UnboundedReceiver<UnixStream>) {
        let (ends, given) = mpsc::unbounded_channel();
        let disconnected = AtomicU32::new(0);
        (Arc::new(Played { ends, attempts: Mutex::new(attempts), disconnected }), given)
    }

    fn give(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.ends.send(theirs).unwrap();
        ours
    }
}

impl Kernel for Played {
    fn connect(&self) -> anyhow::Result<(u32, UnixStream)> {
        Ok((7, self.give()))
    }

    fn reconnect(&self) -> anyhow::Result<Option<UnixStream>> {
        match self.attempts.lock().unwrap().pop() {
            Some(Attempt::Refused) => bail!("as asked for"),
            Some(Attempt::Taken) => Ok(Some(self.give())),
            Some(Attempt::NoDevice) | None => Ok(None),
        }
    }

    fn disconnect(&self, index: u32) -> anyhow::Result<()> {
        assert_eq!(index, 7);
        self.disconnected.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// A disk whose flushes wait for a permit.
struct Disk(Arc<Semaphore>);

impl Export for Disk {
    fn info(&self) -> ExportInfo {
        let block_sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 };
        let features = Features { flush: true, ..Features::default() };
        ExportInfo { size: 1 << 20, block_sizes, features, ..ExportInfo::default() }
    }

    fn read(self: Arc<Self>, _: u64, length: u32) -> Reply<Vec<Chunk>> {
        Reply::ready(vec![Chunk::Hole(length)])
    }

    fn write(self: Arc<Self>, _: u64, _: Buffer, _: bool) -> Reply<()> {
        Reply::ready(())
    }

    fn flush(self: Arc<Self>) -> Reply<()> {
        let permits = self.0.clone();
        Reply::future(async move {
            permits.acquire().await.expect("never closed").forget();
            Ok(())
        })
    }
}

/// The kernel's end of a connection.
struct End(tokio::net::UnixStream);

impl End {
    async fn of(given: &mut mpsc::UnboundedReceiver<UnixStream>) -> End {
        let end = timeout(SOON, given.recv()).await.expect("a connection").unwrap();
        End(asynchronous(end).unwrap())
    }

    async fn ask(&mut self, command: Command, length: u32) {
        let request = Request { command, flags: 0, cookie: 5, offset: 0, length };
        let mut bytes = bytes::BytesMut::new();
        request.encode(&mut bytes);
        self.0.write_all(&bytes).await.unwrap();
    }

    async fn answer(&mut self, bytes: usize) {
        let mut reply = vec![0; 16 + bytes];
        timeout(SOON, self.0.read_exact(&mut reply)).await.expect("an answer").unwrap();
        assert_eq!(reply[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        assert_eq!(reply[4..8], [0; 4], "it failed");
    }

    async fn hangs_up(mut self) -> io::Result<()> {
        let read =
            timeout(SOON, self.0.read(&mut [0])).await.expect("the end of the connection")?;
        assert_eq!(read, 0);
        Ok(())
    }
}

fn serve(kernel: Arc<Played>, permits: &Arc<Semaphore>, volume: &str) -> KernelNbdFront {
    let (index, stream) = kernel.connect().unwrap();
    let disk = Arc::new(Disk(permits.clone()));
    KernelNbdFront::serve((kernel, index, stream), disk, ("db", volume), PathBuf::new()).unwrap()
}

#[tokio::test]
async fn a_connection_that_the_kernel_gives_up_is_replaced_once_its_requests_have_ended() {
    let attempts = vec![Attempt::Taken, Attempt::Taken, Attempt::Refused, Attempt::Taken];
    let (kernel, mut given) = Played::new(attempts);
    let permits = Arc::new(Semaphore::new(0));
    let front = serve(kernel, &permits, "data");
    let mut end = End::of(&mut given).await;
    end.ask(Command::Read, 4096).await;
    end.answer(4096).await;
    // The flush takes too long, and the kernel hangs up.
    end.ask(Command::Flush, 0).await;
    drop(end);
    tokio::time::sleep(PAUSE + Duration::from_millis(500)).await;
    assert!(given.try_recv().is_err(), "the flush is still under way");
    permits.add_permits(2);
    let mut end = End::of(&mut given).await;
    end.ask(Command::Flush, 0).await;
    end.answer(0).await;
    drop(end);
    // Whoever leaves wants no other.
    let mut last = End::of(&mut given).await;
    last.ask(Command::Read, 512).await;
    last.answer(512).await;
    timeout(SOON, front.leave()).await.expect("the end");
    last.hangs_up().await.unwrap();
    assert!(given.recv().await.is_none());
}

#[tokio::test]
async fn a_device_that_somebody_has_disconnected_gets_no_connection_and_is_not_taken_away() {
    let (kernel, mut given) = Played::new(vec![Attempt::NoDevice]);
    let mut front = serve(kernel.clone(), &Arc::new(Semaphore::new(0)), NO_NAME);
    assert!(front.node().is_some() && !front.is_lost());
    drop(End::of(&mut given).await);
    timeout(SOON, front.serving.as_mut().unwrap()).await.expect("the end").unwrap();
    front.serving = None;
    assert!(given.try_recv().is_err());
    // Its number may be another's.
    assert!(front.node().is_none() && front.is_lost());
    let _ = front.stop(Reserved::default()).await;
    assert_eq!(kernel.disconnected.load(Ordering::Relaxed), 0);
}

#[test]
fn a_device_of_another_size_is_refused() {
    has_size(7, 2048, 2048).unwrap();
    let refused = has_size(7, 2040, 2048).unwrap_err().to_string();
    assert!(refused.contains("has 2040 sectors, and the disk below it has 2048"), "{refused}");
}

#[tokio::test]
async fn a_start_or_a_stop_that_fails_leaves_nothing_served() {
    let (kernel, mut given) = Played::new(Vec::new());
    let disk = Arc::new(Disk(Arc::new(Semaphore::new(0))));
    let refused = KernelNbdFront::start_with(kernel.clone(), disk, "db", NO_NAME).await;
    assert!(refused.is_err(), "the name cannot be published");
    End::of(&mut given).await.hangs_up().await.unwrap();

    let mut front = serve(kernel.clone(), &Arc::new(Semaphore::new(0)), NO_NAME);
    let end = End::of(&mut given).await;
    let stopped = front.stop(Reserved::default()).await;
    assert!(stopped.is_err(), "the name cannot be withdrawn");
    end.hangs_up().await.unwrap();
    assert_eq!(kernel.disconnected.load(Ordering::Relaxed), 1);
}
