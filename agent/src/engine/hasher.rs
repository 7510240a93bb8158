//! The thread that looks at content for catch-up, so that the engine's thread does not: it finds out where an image has
//! nothing, which then need not be read, and hashes what was read.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek64},
};
use tidemark_journal::record::{OFFER_BLOCK_BYTES, OFFER_HASH_BYTES};

use crate::{
    capture::OpId,
    kernel::memfd::{Region, RegionError},
};

/// Something to be looked at for a read.
pub struct Job {
    /// The read.
    pub op: OpId,
    /// Where its content is.
    pub at: Place,
    /// Its length.
    pub bytes: u64,
}

/// Where a read's content is.
pub enum Place {
    /// It has been read, to this offset of the region of buffers; its blocks may be to be hashed.
    Buffer { offset: u64, hash: bool },
    /// In an image at this byte, if anywhere.
    Image(Arc<File>, u64),
}

/// What was seen.
pub enum Seen {
    /// The content.
    Content(Hashed),
    /// That the image has something there: it is to be read.
    Data(OpId),
}

/// Content that was looked at.
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
    done: impl Fn(Seen) + Send + 'static,
) -> std::io::Result<(mpsc::Sender<Job>, JoinHandle<()>)> {
    let (jobs, inbox) = mpsc::channel::<Job>();
    let handle = std::thread::Builder::new().name("tm-hasher".into()).spawn(move || {
        for job in inbox {
            done(look(&region, &job).expect("a buffer inside the region"));
        }
    })?;
    Ok((jobs, handle))
}

fn look(region: &Region, job: &Job) -> Result<Seen, RegionError> {
    let (zeros, hashes) = match &job.at {
        Place::Buffer { offset, hash } => {
            // SAFETY: the read that filled the buffer has completed, and the engine starts no other there
            // before it has taken this job's answer.
            let content = unsafe { region.slice(*offset, job.bytes) }?;
            digest(content, *hash)
        }
        Place::Image(image, position) if is_hole(image, *position, job.bytes) => (true, Vec::new()),
        Place::Image(..) => return Ok(Seen::Data(job.op)),
    };
    Ok(Seen::Content(Hashed { op: job.op, zeros, hashes }))
}

/// Whether an image has nothing at a place. One whose file system does not know has something everywhere.
fn is_hole(image: &File, position: u64, bytes: u64) -> bool {
    let Ok(from) = i64::try_from(position) else { return false };
    match lseek64(image.as_fd(), from, Whence::SeekData) {
        Ok(data) => u64::try_from(data).is_ok_and(|data| data >= position + bytes),
        // There is none up to the end. Beyond it is no hole: somebody has cut the image short.
        Err(Errno::ENXIO) => image.metadata().is_ok_and(|found| found.len() >= position + bytes),
        Err(_) => false,
    }
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_an_image_has_nothing_of_is_zeros_unread_and_the_rest_is_to_be_read() {
        const MIB: u64 = 1 << 20;
        let image = tempfile::tempfile().expect("a file");
        image.set_len(9 * MIB - 512).expect("sparse");
        // The end of one region and the begin of another.
        image.write_all_at(&[1; 4096], 3 * MIB - 4096).expect("written");
        image.write_all_at(&[0; 4096], 5 * MIB).expect("written");
        let (image, region) = (Arc::new(image), Region::anonymous(MIB).expect("memory"));
        for number in 0..10 {
            let job =
                Job { op: OpId(7), at: Place::Image(Arc::clone(&image), number * MIB), bytes: MIB };
            match look(&region, &job).expect("looked at") {
                Seen::Data(op) => {
                    assert!(op == OpId(7) && [2, 5, 8, 9].contains(&number), "{number}");
                }
                Seen::Content(seen) => {
                    assert!(seen.op == OpId(7) && seen.zeros && ![2, 5, 8, 9].contains(&number));
                    assert_eq!(seen.hashes, digest(&vec![0; MIB as usize], false).1);
                    assert!(seen.hashes.is_empty());
                }
            }
        }
    }
}
