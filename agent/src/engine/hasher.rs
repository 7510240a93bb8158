//! The thread that hashes content read for catch-up, so that the engine's thread does not.

use std::{
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use tidemark_journal::record::{OFFER_BLOCK_BYTES, OFFER_HASH_BYTES};

use crate::{
    capture::OpId,
    kernel::memfd::{Region, RegionError},
};

/// Content to be looked at.
pub struct Job {
    /// The read it came from.
    pub op: OpId,
    /// Its place in the region.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// Hash its blocks too.
    pub hash: bool,
}

/// What was seen.
pub struct Hashed {
    /// The read it came from.
    pub op: OpId,
    /// Whether all bytes are zero.
    pub zeros: bool,
    /// The blocks' hashes, if asked for.
    pub hashes: Vec<u8>,
}

/// Starts the thread over a region of buffers; it ends when the sender is dropped.
///
/// # Errors
/// The thread cannot be started.
pub fn start(
    region: Arc<Region>,
    done: impl Fn(Hashed) + Send + 'static,
) -> std::io::Result<(mpsc::Sender<Job>, JoinHandle<()>)> {
    let (jobs, inbox) = mpsc::channel::<Job>();
    let handle = std::thread::Builder::new().name("tm-hasher".into()).spawn(move || {
        for job in inbox {
            done(look(&region, &job).expect("a buffer inside the region"));
        }
    })?;
    Ok((jobs, handle))
}

fn look(region: &Region, job: &Job) -> Result<Hashed, RegionError> {
    // SAFETY: the read that filled the buffer has completed, and the engine starts no other there
    // before it has taken this job's answer.
    let content = unsafe { region.slice(job.offset, job.bytes) }?;
    let (zeros, hashes) = digest(content, job.hash);
    Ok(Hashed { op: job.op, zeros, hashes })
}

/// Whether all of the content is zero and, if that is asked for and it is not, its blocks' hashes.
pub fn digest(content: &[u8], hash: bool) -> (bool, Vec<u8>) {
    let zeros = is_zero(content);
    let mut hashes = Vec::new();
    if hash {
        let mut of_zeros = None;
        for block in content.chunks(OFFER_BLOCK_BYTES as usize) {
            let hash = match of_zeros {
                // Only the last block may be shorter than the first.
                Some((bytes, hash)) if zeros && bytes == block.len() => hash,
                _ => blake3::hash(block),
            };
            of_zeros = Some((block.len(), hash));
            hashes.extend_from_slice(&hash.as_bytes()[..OFFER_HASH_BYTES]);
        }
    }
    (zeros, hashes)
}

fn is_zero(content: &[u8]) -> bool {
    let (words, tail) = content.as_chunks::<16>();
    tail.iter().all(|byte| *byte == 0) && words.iter().all(|word| *word == [0; 16])
}
