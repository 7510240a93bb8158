//! An NBD server before a client that sends anything: greeting, options and requests.
//!
//! With the first byte odd, the client is in the transmission phase from the start.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use tidemark_fuzz::stream::{Sent, runtime};
use tidemark_nbd::{
    BoxFuture, Buffer, Chunk, ClientInfo, Export, ExportEntry, ExportInfo, Exports, Extent,
    Features, Limits, OpenError, Origin, Purpose, Reply, Server, Tls, Zeroing,
};

/// Bytes of the disk.
const SIZE: u64 = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Some((mode, bytes)) = bytes.split_first() else { return };
    let limits = Limits { in_flight_requests: 8, in_flight_bytes: 1 << 20, ..Limits::default() };
    let server = Server::new(Arc::new(OneDisk), limits);
    let stream = Sent::new(bytes);
    runtime().block_on(async {
        let _ = match mode % 2 {
            0 => server.serve_stream(stream, Origin::Other, &Tls::Off).await,
            _ => server.serve_entered(stream, "disk", Arc::new(Disk)).await,
        };
    });
});

struct OneDisk;

impl Exports for OneDisk {
    fn list<'a>(&'a self, _: &'a ClientInfo) -> BoxFuture<'a, Vec<ExportEntry>> {
        let entry = ExportEntry { name: "disk".into(), description: "a disk".into() };
        Box::pin(async { vec![entry] })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _: Purpose,
        _: &'a ClientInfo,
    ) -> BoxFuture<'a, Result<Arc<dyn Export>, OpenError>> {
        Box::pin(async move {
            match name {
                "" | "disk" => Ok(Arc::new(Disk) as Arc<dyn Export>),
                _ => Err(OpenError::unavailable(format!("there is no {name:?}"))),
            }
        })
    }
}

/// A disk of zeros that checks what a server promises its exports.
struct Disk;

/// An export is never asked for what lies beyond its end, for nothing, or for more than it takes.
fn check(offset: u64, length: u64) {
    assert!(length > 0 && offset.checked_add(length).is_some_and(|end| end <= SIZE));
}

impl Export for Disk {
    fn info(&self) -> ExportInfo {
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
        ExportInfo { size: SIZE, features, ..ExportInfo::default() }
    }

    fn read(self: Arc<Self>, offset: u64, length: u32) -> Reply<Vec<Chunk>> {
        check(offset, length.into());
        Reply::ready(vec![Chunk::Hole(length)])
    }

    fn write(self: Arc<Self>, offset: u64, data: Buffer, _: bool) -> Reply<()> {
        check(offset, data.len() as u64);
        Reply::ready(())
    }

    fn write_zeroes(self: Arc<Self>, offset: u64, length: u64, _: Zeroing) -> Reply<()> {
        check(offset, length);
        Reply::ready(())
    }

    fn trim(self: Arc<Self>, offset: u64, length: u64, _: bool) -> Reply<()> {
        check(offset, length);
        Reply::ready(())
    }

    fn cache(self: Arc<Self>, offset: u64, length: u64) -> Reply<()> {
        check(offset, length);
        Reply::ready(())
    }

    fn flush(self: Arc<Self>) -> Reply<()> {
        Reply::ready(())
    }

    fn block_status(self: Arc<Self>, offset: u64, length: u64, _: bool) -> Reply<Vec<Extent>> {
        check(offset, length);
        Reply::ready(vec![Extent { length, hole: true, zero: true }])
    }
}
