//! The disk: blocks in a map, absent ones being holes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tidemark_nbd::{
    BoxFuture, Buffer, Chunk, ClientInfo, Export, ExportEntry, ExportInfo, Exports, Extent,
    Features, OpenError, Purpose, Reply, Zeroing,
};

const BLOCK_BYTES: u64 = 64 * 1024;

/// One sparse disk in memory, under one name.
pub struct MemoryExports(Arc<MemoryDisk>);

impl MemoryExports {
    /// A disk of `size` bytes, all holes.
    pub fn new(size: u64) -> Self {
        Self(Arc::new(MemoryDisk { size, blocks: Mutex::default() }))
    }
}

impl Exports for MemoryExports {
    fn list<'a>(&'a self, _: &'a ClientInfo) -> BoxFuture<'a, Vec<ExportEntry>> {
        let entry = ExportEntry { name: "disk".into(), description: "a disk in memory".into() };
        Box::pin(async { vec![entry] })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
        _: Purpose,
        _: &'a ClientInfo,
    ) -> BoxFuture<'a, Result<Arc<dyn Export>, OpenError>> {
        Box::pin(async move {
            if matches!(name, "" | "disk") {
                return Ok(Arc::clone(&self.0) as Arc<dyn Export>);
            }
            Err(OpenError::unavailable(format!("there is no export {name:?}; try \"disk\"")))
        })
    }
}

/// A sparse disk; every connection sees the same one, so multi-conn is honest.
pub struct MemoryDisk {
    size: u64,
    blocks: Mutex<BTreeMap<u64, Box<[u8]>>>,
}

impl MemoryDisk {
    fn blocks(&self) -> MutexGuard<'_, BTreeMap<u64, Box<[u8]>>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts a range at block boundaries: block number, start within it, length.
fn pieces(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        let within = at % BLOCK_BYTES;
        let count = (BLOCK_BYTES - within).min(end - at);
        let piece = (at / BLOCK_BYTES, within as usize, count as usize);
        at += count;
        (count > 0).then_some(piece)
    })
}

impl Export for MemoryDisk {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            size: self.size,
            features: Features {
                flush: true,
                fua: true,
                trim: true,
                write_zeroes: true,
                fast_zero: true,
                cache: true,
                multi_conn: true,
                ..Features::default()
            },
            canonical_name: Some("disk".into()),
            description: Some("a disk in memory".into()),
            ..ExportInfo::default()
        }
    }

    fn read(self: Arc<Self>, offset: u64, length: u32) -> Reply<Vec<Chunk>> {
        let blocks = self.blocks();
        let chunks = pieces(offset, u64::from(length)).map(|(block, start, count)| {
            match blocks.get(&block) {
                Some(bytes) => Chunk::Data(Bytes::copy_from_slice(&bytes[start..start + count])),
                None => Chunk::Hole(count as u32),
            }
        });
        Reply::ready(chunks.collect())
    }

    fn write(self: Arc<Self>, offset: u64, data: Buffer, _fua: bool) -> Reply<()> {
        let mut blocks = self.blocks();
        let mut rest = &data[..];
        for (block, start, count) in pieces(offset, data.len() as u64) {
            let bytes = blocks
                .entry(block)
                .or_insert_with(|| vec![0; BLOCK_BYTES as usize].into_boxed_slice());
            let (piece, tail) = rest.split_at(count);
            bytes[start..start + count].copy_from_slice(piece);
            rest = tail;
        }
        Reply::ready(())
    }

    fn write_zeroes(self: Arc<Self>, offset: u64, length: u64, how: Zeroing) -> Reply<()> {
        let mut blocks = self.blocks();
        for (block, start, count) in pieces(offset, length) {
            if count as u64 == BLOCK_BYTES && !how.no_hole {
                blocks.remove(&block);
            } else if how.no_hole {
                let bytes = blocks
                    .entry(block)
                    .or_insert_with(|| vec![0; BLOCK_BYTES as usize].into_boxed_slice());
                bytes[start..start + count].fill(0);
            } else if let Some(bytes) = blocks.get_mut(&block) {
                bytes[start..start + count].fill(0);
            }
        }
        Reply::ready(())
    }

    fn trim(self: Arc<Self>, offset: u64, length: u64, fua: bool) -> Reply<()> {
        self.write_zeroes(offset, length, Zeroing { fua, no_hole: false, fast_only: false })
    }

    fn block_status(self: Arc<Self>, offset: u64, length: u64, _: bool) -> Reply<Vec<Extent>> {
        let blocks = self.blocks();
        let extents = pieces(offset, length).map(|(block, _, count)| {
            let hole = !blocks.contains_key(&block);
            Extent { length: count as u64, hole, zero: hole }
        });
        Reply::ready(extents.collect())
    }
}
