//! A volume of a branch as an export, which those with the right to may write.

use std::sync::Arc;

use bytes::Bytes;
use tidemark_journal::{SECTOR_BYTES, VolumeId};
use tidemark_nbd::{
    BlockSizes, Buffer, Chunk, Errno, Error, Export, ExportInfo, Extent, Features, Reply, Zeroing,
};

use super::{READ_BYTES_MAX, Share, as_data, extents, failed, pieces, status};
use crate::branch::{Branch, Change, ClientGuard, Content, WriteError};

/// Addresses and lengths are whole sectors.
const SECTOR: u32 = SECTOR_BYTES as u32;

/// An export of a branch.
pub(super) struct BranchExport {
    pub name: String,
    pub branch: Arc<Branch>,
    pub volume: VolumeId,
    pub bytes: u64,
    pub physical_block_bytes: u32,
    /// Whether this client may write it.
    pub writable: bool,
    pub share: Share,
    pub _client: Option<ClientGuard>,
}

impl BranchExport {
    fn change(self: Arc<Self>, offset: u64, content: Content, durable: bool) -> Reply<()> {
        let change = Change { volume: self.volume, start: offset / SECTOR_BYTES, content };
        Reply::future(async move {
            let changed = self.branch.change(change, durable).await;
            changed.map_err(|error| refused(&self.name, &error))
        })
    }
}

impl Export for BranchExport {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: self.bytes,
            block_sizes: BlockSizes {
                minimum: SECTOR,
                preferred: self.physical_block_bytes.clamp(4096, 64 << 10),
                maximum: READ_BYTES_MAX,
            },
            features: Features {
                read_only: !self.writable,
                flush: true,
                fua: true,
                trim: true,
                write_zeroes: true,
                fast_zero: true,
                ..Features::default()
            },
            canonical_name: None,
            description: None,
        }
    }

    fn read(self: Arc<Self>, offset: u64, length: u32) -> Reply<Vec<Chunk>> {
        Reply::future(async move {
            let own = Arc::clone(&self);
            let read = move || {
                let (start, end) = range(offset, u64::from(length));
                let mut out = vec![0; length as usize];
                own.branch.read(own.volume, start, end, &mut out).map(|()| out)
            };
            let bytes = self.share.run(read).await?;
            Ok(pieces(Bytes::from(
                bytes.map_err(|error| failed(&self.name, self.branch.parent(), &error))?,
            )))
        })
    }

    fn write(self: Arc<Self>, offset: u64, data: Buffer, fua: bool) -> Reply<()> {
        self.change(offset, Content::Data(Bytes::from(data)), fua)
    }

    fn write_zeroes(self: Arc<Self>, offset: u64, length: u64, how: Zeroing) -> Reply<()> {
        // Always fast: it is a record without payload. Nothing is ever allocated in advance in a
        // log, so "leave no hole" has nothing to add.
        self.change(offset, Content::Zeros(length / SECTOR_BYTES), how.fua)
    }

    fn trim(self: Arc<Self>, offset: u64, length: u64, fua: bool) -> Reply<()> {
        self.change(offset, Content::Discard(length / SECTOR_BYTES), fua)
    }

    fn flush(self: Arc<Self>) -> Reply<()> {
        Reply::future(async move {
            self.branch.sync().await.map_err(|error| refused(&self.name, &error))
        })
    }

    fn block_status(self: Arc<Self>, offset: u64, length: u64, one: bool) -> Reply<Vec<Extent>> {
        Reply::future(async move {
            let own = Arc::clone(&self);
            let (start, end) = range(offset, length);
            let step = move |from, to| own.branch.stretches(own.volume, from, to);
            let look = move || status::stretches(start, end, one, step);
            let found = self.share.run(look).await?;
            let stretches = found.unwrap_or_else(|error| {
                as_data(&self.name, self.branch.parent(), &error, (start, end))
            });
            Ok(extents(&stretches, offset, length))
        })
    }
}

fn range(offset: u64, length: u64) -> (u64, u64) {
    (offset / SECTOR_BYTES, (offset + length) / SECTOR_BYTES)
}

fn refused(name: &str, error: &WriteError) -> Error {
    tracing::error!(export = name, "a write fails: {error}");
    let errno = match error {
        WriteError::Full(_) => Errno::NoSpc,
        WriteError::Closed(_) => Errno::Shutdown,
    };
    Error::new(errno, error.to_string())
}
