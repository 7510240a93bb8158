//! Checking a segment against everything that was written down of it.
//!
//! A sealed segment is read once from its beginning to its end: the BLAKE3 of its bytes and the chain
//! that it continues say whether they are those that were sealed, a checksum says the same of the
//! index. Only if the frames are not, what is damaged of them is looked for: by the checksum of each
//! frame's meta, and of each chunk. Of a segment that is still written the frames and chunks are
//! checked one by one.

use std::io;

use tidemark_journal::{
    FrameView, GroupId,
    checksum::crc64,
    segment::{BLOCK_BYTES, SegmentEnd, SegmentStart},
};

use super::{
    ReadError,
    index::{ChunkRow, FrameRow},
    rebuild,
    recover::KnownSegment,
    segment::Segment,
};

/// Bytes that are read at once.
pub const STEP_BYTES: usize = 1 << 20;

/// Something that is not as it was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What.
    pub what: What,
    /// The same, as a clause.
    pub text: String,
}

/// What of a segment is damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// The header. No point needs it.
    Header,
    /// The meta of the frame that begins at this byte. Content is found by the index without it;
    /// the times in it are lost.
    Frame(u64),
    /// A chunk, by its number.
    Chunk(u32),
    /// Bytes between the frames. No point needs them.
    Padding,
    /// The index.
    Index,
    /// The trailer. No point needs it.
    End,
}

/// Whoever has a segment checked is told of the bytes read, and may hold it up or end it.
pub type Pace<'a> = dyn FnMut(u64) -> io::Result<()> + 'a;

/// Checks a segment. `known` is what the catalogue has of it, if it is sealed; `chain_before` the
/// chain hash of the segment before, if that is known.
///
/// # Errors
/// When the file cannot be read, or `pace` ends it.
pub fn check(
    segment: &Segment,
    group: GroupId,
    known: Option<&KnownSegment>,
    chain_before: Option<[u8; 32]>,
    pace: &mut Pace<'_>,
) -> Result<Vec<Finding>, ReadError> {
    let known = known.filter(|_| segment.is_sealed());
    let mut check = Check { segment, findings: Vec::new(), pace };
    match known {
        Some(known) => check.sealed(group, known, chain_before)?,
        None => check.rows()?,
    }
    Ok(check.findings)
}

struct Check<'a> {
    segment: &'a Segment,
    findings: Vec<Finding>,
    pace: &'a mut Pace<'a>,
}

impl Check<'_> {
    fn sealed(
        &mut self,
        group: GroupId,
        known: &KnownSegment,
        chain_before: Option<[u8; 32]>,
    ) -> Result<(), ReadError> {
        let number = self.segment.number();
        let mut block = vec![0; BLOCK_BYTES as usize];
        let bytes = self.io(|segment| segment.file()?.length())?;
        self.fresh(0, &mut block)?;
        let start = SegmentStart::decode(&block).ok().filter(|start| {
            (start.number, start.group, start.before) == (number, group, known.summary.before)
        });
        if start.is_none() {
            self.find(What::Header, "its header is not the one that was written".to_owned());
        }
        self.fresh(bytes.saturating_sub(BLOCK_BYTES), &mut block)?;
        let end = SegmentEnd::decode(&block).ok().filter(|end| {
            (end.number, end.index_at, end.last, end.chain)
                == (number, known.index_at, known.summary.last, known.chain)
                && end.index_at.checked_add(end.index_bytes) == bytes.checked_sub(BLOCK_BYTES)
        });
        if end.is_none() {
            self.find(What::End, "its end is not the one that was written".to_owned());
        }
        let data_hash = self.hash(known.index_at)?;
        let chain_before = chain_before.or(start.map(|start| start.chain_before));
        let chained = chain_before.map(|chain| SegmentEnd::chain_hash(&chain, &data_hash));
        let whole = match (chained, end) {
            (Some(chain), _) => chain == known.chain,
            (None, Some(end)) => end.data_hash == data_hash,
            (None, None) => false,
        };
        let index_good = match end {
            Some(end) => {
                let mut index = vec![0; end.index_bytes as usize];
                self.fresh(end.index_at, &mut index)?;
                crc64(&index) == end.index_crc
            }
            // What it says has to agree with the frames.
            None => self.segment.for_each(|_, _| ()).is_ok() && self.segment.frames().is_ok(),
        };
        if !index_good {
            self.find(What::Index, "its index does not match its checksum".to_owned());
        }
        if !whole {
            let before = self.findings.len();
            self.rows_of(group, index_good)?;
            if self.findings.len() == before && start.is_some() {
                let text = "its bytes are not those that were sealed, between its frames";
                self.find(What::Padding, text.to_owned());
            }
        }
        Ok(())
    }

    /// Hashes the bytes before the index.
    fn hash(&mut self, index_at: u64) -> Result<[u8; 32], ReadError> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; STEP_BYTES];
        let mut at = 0;
        while at < index_at {
            let step = (index_at - at).min(STEP_BYTES as u64) as usize;
            self.fresh(at, &mut buffer[..step])?;
            hasher.update(&buffer[..step]);
            at += step as u64;
        }
        Ok(*hasher.finalize().as_bytes())
    }

    /// Checks frames and chunks by the index, or by what the frames say if that is damaged.
    fn rows_of(&mut self, group: GroupId, index_good: bool) -> Result<(), ReadError> {
        if index_good {
            return self.rows();
        }
        let scanned = rebuild::scan(self.segment, group)?;
        for at in &scanned.missing {
            self.find(What::Frame(*at), format!("there is no whole frame at byte {at}"));
        }
        for (number, row) in scanned.index.chunks().iter().enumerate() {
            self.chunk(number as u32, row)?;
        }
        Ok(())
    }

    fn rows(&mut self) -> Result<(), ReadError> {
        for number in 0..self.segment.frames()? {
            if let Some(row) = self.segment.frame(number)? {
                self.frame(&row)?;
            }
        }
        for number in 0..self.segment.chunks()? {
            let row = self.segment.chunk_row(number)?;
            self.chunk(number, &row)?;
        }
        Ok(())
    }

    fn frame(&mut self, row: &FrameRow) -> Result<(), ReadError> {
        let mut meta = vec![0; row.meta_bytes as usize];
        self.fresh(row.offset.into(), &mut meta)?;
        if let Err(error) = FrameView::parse_meta(&meta) {
            let at = u64::from(row.offset);
            self.find(What::Frame(at), format!("the frame at byte {at}: {error}"));
        }
        Ok(())
    }

    fn chunk(&mut self, number: u32, row: &ChunkRow) -> Result<(), ReadError> {
        let mut stored = vec![0; row.stored_bytes as usize];
        self.fresh(row.offset.into(), &mut stored)?;
        if crc64(&stored) != row.crc {
            let text = format!(
                "chunk {number} at byte {} ({} bytes) does not match its checksum",
                row.offset, row.stored_bytes
            );
            self.find(What::Chunk(number), text);
        }
        Ok(())
    }

    /// Reads from the disk, not from the kernel's memory of it.
    fn fresh(&mut self, at: u64, out: &mut [u8]) -> Result<(), ReadError> {
        self.io(|segment| {
            let file = segment.file()?;
            file.drop_cached(at, out.len() as u64);
            file.read_up_to(out, at)?;
            file.drop_cached(at, out.len() as u64);
            Ok(())
        })?;
        (self.pace)(out.len() as u64).map_err(|error| ReadError::io("the scrub", error))
    }

    fn io<T>(&self, work: impl FnOnce(&Segment) -> io::Result<T>) -> Result<T, ReadError> {
        work(self.segment).map_err(|error| ReadError::io(self.segment.name(), error))
    }

    fn find(&mut self, what: What, clause: String) {
        let text = format!("{}: {clause}", self.segment.name());
        self.findings.push(Finding { what, text });
    }
}
