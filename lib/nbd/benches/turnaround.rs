//! How long a request of 4 KiB takes from the client to a disk in memory and back, over a pair of sockets: one after the
//! other, and 32 at a time. Client and server share a thread, so this is what both take together.

use std::{
    hint::black_box,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tidemark_nbd::{
    BoxFuture, Buffer, Chunk, ClientInfo, Export, ExportEntry, ExportInfo, Exports, Features,
    Limits, OpenError, Origin, Purpose, Reply, Server, Tls,
    client::{Client, Options},
};
use tokio::{
    net::UnixStream,
    runtime::{Builder, Runtime},
    task::JoinSet,
};

const SIZE_BYTES: u64 = 16 << 20;
const BLOCK_BYTES: u32 = 4096;

/// A disk in memory, which every name stands for.
#[derive(Clone)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn with<T>(&self, offset: u64, length: usize, use_it: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).expect("within the disk");
        use_it(&mut bytes[start..start + length])
    }
}

impl Exports for Memory {
    fn list<'a>(&'a self, _: &'a ClientInfo) -> BoxFuture<'a, Vec<ExportEntry>> {
        Box::pin(async { Vec::new() })
    }

    fn open<'a>(
        &'a self,
        _: &'a str,
        _: Purpose,
        _: &'a ClientInfo,
    ) -> BoxFuture<'a, Result<Arc<dyn Export>, OpenError>> {
        Box::pin(async { Ok(Arc::new(self.clone()) as Arc<dyn Export>) })
    }
}

impl Export for Memory {
    fn info(&self) -> ExportInfo {
        let features = Features { flush: true, ..Features::default() };
        ExportInfo { size: SIZE_BYTES, features, ..ExportInfo::default() }
    }

    fn read(self: Arc<Self>, offset: u64, length: u32) -> Reply<Vec<Chunk>> {
        let bytes = self.with(offset, length as usize, |bytes| Bytes::copy_from_slice(bytes));
        Reply::ready(vec![Chunk::Data(bytes)])
    }

    fn write(self: Arc<Self>, offset: u64, data: Buffer, _: bool) -> Reply<()> {
        self.with(offset, data.len(), |bytes| bytes.copy_from_slice(&data));
        Reply::ready(())
    }
}

/// A client whose server runs beside it.
fn connect(runtime: &Runtime) -> Client {
    let disk = Memory(Arc::new(Mutex::new(vec![0; SIZE_BYTES as usize])));
    let server = Server::new(Arc::new(disk), Limits::default());
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        tokio::spawn(async move {
            server.serve_stream(theirs, Origin::Other, &Tls::Off).await.expect("served to its end");
        });
        Client::over(Box::new(ours), "", &Options::default()).await.expect("connected")
    })
}

/// So many requests at a time, until all are answered.
async fn at_once<F>(depth: u32, request: impl Fn(u64) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let offset = |number: u32| u64::from(number * BLOCK_BYTES);
    if depth == 1 {
        return request(offset(1)).await;
    }
    let mut under_way: JoinSet<()> = (0..depth).map(|number| request(offset(number))).collect();
    while let Some(ended) = under_way.join_next().await {
        ended.expect("answered");
    }
}

fn turnaround(criterion: &mut Criterion) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let client = connect(&runtime);
    let data = Bytes::from(vec![0x5a; BLOCK_BYTES as usize]);
    for depth in [1, 32] {
        let mut group = criterion.benchmark_group(format!("requests of 4 KiB, {depth} at a time"));
        group.throughput(Throughput::Elements(depth.into()));
        group.bench_function("read", |bench| {
            let read = |offset| {
                let client = client.clone();
                async move {
                    black_box(client.read(offset, BLOCK_BYTES).await.expect("read"));
                }
            };
            bench.iter(|| runtime.block_on(at_once(depth, read)));
        });
        group.bench_function("write", |bench| {
            let write = |offset| {
                let (client, data) = (client.clone(), data.clone());
                async move { client.write(offset, data, false).await.expect("written") }
            };
            bench.iter(|| runtime.block_on(at_once(depth, write)));
        });
    }
}

criterion_group!(all, turnaround);
criterion_main!(all);
