//! Going through the frames of a segment, each read whole and checked.

use std::io;

use tidemark_journal::{
    FrameView,
    frame::{FRAME_BYTES_MAX, HEADER_BYTES},
    segment::{self, BLOCK_BYTES, Next},
};
use tidemark_link::seam::AlignedBuf;

use super::media::MediaFile;

/// Bytes read at a time, if a frame is not longer.
const WINDOW_BYTES: usize = 1 << 20;

/// A place among the frames of an open segment.
pub(super) struct Walk {
    file: Box<dyn MediaFile>,
    /// Where the next frame stands, or the padding before it.
    offset: u64,
    /// What was read last, and from where.
    window: AlignedBuf,
    window_at: u64,
}

/// What stood at a place.
pub(super) enum Step<'a> {
    /// A sound frame.
    Frame(FrameView<'a>),
    /// Nothing more up to the end that was given.
    End,
    /// Something else, in words: the end of what was written, or damage.
    Bad(String),
}

impl Walk {
    /// At the first frame of a segment.
    pub fn new(file: Box<dyn MediaFile>) -> Walk {
        let window = AlignedBuf::new(FRAME_BYTES_MAX + 2 * BLOCK_BYTES as usize);
        Walk { file, offset: BLOCK_BYTES, window, window_at: 0 }
    }

    /// The file.
    pub fn file(&self) -> &dyn MediaFile {
        &*self.file
    }

    /// The byte after the frames that were walked over.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next frame before `end`, a multiple of 4096 up to which the file has been written.
    pub fn step(&mut self, end: u64) -> io::Result<Step<'_>> {
        let frame_bytes = loop {
            if self.offset >= end {
                return Ok(Step::End);
            }
            self.load(HEADER_BYTES, end)?;
            match segment::next(self.offset, self.at_offset()) {
                Next::Frame(bytes) => break bytes,
                Next::Pad(further) => self.offset = further,
                Next::End(error) => return Ok(Step::Bad(error.to_string())),
            }
        };
        if frame_bytes > FRAME_BYTES_MAX {
            return Ok(Step::Bad("a frame that is longer than frames are".into()));
        }
        self.load(frame_bytes, end)?;
        let start = (self.offset - self.window_at) as usize;
        let bytes = self.window.as_slice().get(start..).unwrap_or_default();
        let checked = FrameView::parse(bytes).and_then(|view| view.verify_chunks().map(|()| view));
        Ok(match checked {
            Ok(view) => {
                self.offset += view.bytes().len() as u64;
                Step::Frame(view)
            }
            Err(error) => Step::Bad(error.to_string()),
        })
    }

    fn at_offset(&self) -> &[u8] {
        let start = self.offset.checked_sub(self.window_at).unwrap_or(u64::MAX);
        self.window.as_slice().get(start as usize..).unwrap_or_default()
    }

    /// Has the window hold `bytes` from the offset on, as far as there are so many before `end`.
    fn load(&mut self, bytes: usize, end: u64) -> io::Result<()> {
        if self.at_offset().len() >= bytes {
            return Ok(());
        }
        let from = self.offset / BLOCK_BYTES * BLOCK_BYTES;
        let wanted = bytes.max(WINDOW_BYTES) as u64 + (self.offset - from);
        let length = wanted.next_multiple_of(BLOCK_BYTES).min(end - from);
        self.window.clear();
        self.window.resize(length as usize).map_err(io::Error::other)?;
        self.window_at = from;
        let read = self.file.read(from, self.window.as_mut_slice())?;
        self.window.resize(read).map_err(io::Error::other)
    }
}
