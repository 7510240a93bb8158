//! Whether a chunk is compressed.

/// Whether and how hard chunks are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    /// Every chunk stays raw.
    Off,
    /// zstd at this level; a chunk that shrinks by less than a sixteenth stays raw.
    Zstd(i32),
}

/// After a chunk that did not shrink, so many pieces of the next one are tried first, of so many bytes each: most of what
/// does not shrink comes in long runs, and trying it is the dearest thing that is done to it.
const SAMPLE_PIECES: usize = 8;
const SAMPLE_PIECE_BYTES: usize = 1 << 10;
/// The shortest chunk of which that is less than all.
const SAMPLED_BYTES_MIN: usize = 8 * SAMPLE_PIECES * SAMPLE_PIECE_BYTES;

/// Compresses chunks that are worth it.
pub struct Shrinker {
    compression: Compression,
    compressor: Option<zstd::bulk::Compressor<'static>>,
    scratch: Vec<u8>,
    sample: Vec<u8>,
    /// The last chunk that was tried did not shrink.
    shrank_not: bool,
}

impl Shrinker {
    pub fn new(compression: Compression) -> Shrinker {
        let compressor = match compression {
            Compression::Off => None,
            // Without a compressor (no memory for its tables) chunks stay raw, which is correct.
            Compression::Zstd(level) => zstd::bulk::Compressor::new(level).ok(),
        };
        let (scratch, sample) = (Vec::new(), Vec::new());
        Shrinker { compression, compressor, scratch, sample, shrank_not: false }
    }

    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// The chunk compressed, if it is shorter by a sixteenth at least.
    pub fn shrink(&mut self, raw: &[u8]) -> Option<&[u8]> {
        let compressor = self.compressor.as_mut()?;
        let sampled = self.shrank_not && raw.len() >= SAMPLED_BYTES_MIN;
        let worth = !sampled || {
            take_sample(raw, &mut self.sample);
            shrink(compressor, &self.sample, &mut self.scratch).is_some()
        };
        let shrunk = worth.then(|| shrink(compressor, raw, &mut self.scratch)).flatten();
        self.shrank_not = shrunk.is_none();
        shrunk.map(|bytes| &self.scratch[..bytes])
    }
}

/// Compresses into `scratch`; the number of bytes, if they are fewer by a sixteenth at least.
fn shrink(
    compressor: &mut zstd::bulk::Compressor<'static>,
    raw: &[u8],
    scratch: &mut Vec<u8>,
) -> Option<usize> {
    scratch.resize(raw.len() - raw.len().div_ceil(16), 0);
    // An error means that the result is longer than that.
    compressor.compress_to_buffer(raw, scratch.as_mut_slice()).ok()
}

/// Takes pieces of a chunk at equal distances, in turn from the four quarters of a block of 4 KiB: records' blocks often
/// begin alike.
fn take_sample(raw: &[u8], sample: &mut Vec<u8>) {
    sample.clear();
    for piece in 0..SAMPLE_PIECES {
        let at = raw.len() / SAMPLE_PIECES * piece + piece % 4 * SAMPLE_PIECE_BYTES;
        sample.extend_from_slice(&raw[at..at + SAMPLE_PIECE_BYTES]);
    }
}
