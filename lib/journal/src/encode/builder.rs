//! Building a frame of payloads that are gone before it is finished.

use super::{Compression, FrameMeta, FramePlan, FrameWriter};
use crate::{ids::Seq, record::Record};

/// A finished frame.
#[derive(Clone, Copy, Debug)]
pub struct EncodedFrame<'a> {
    /// The frame.
    pub bytes: &'a [u8],
    /// Raw bytes of its payload.
    pub raw_bytes: u64,
    /// Its last sequence.
    pub last: Seq,
}

impl EncodedFrame<'_> {
    /// A copy of the frame.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }
}

/// Collects records with their payloads and encodes them together.
pub struct FrameBuilder {
    plan: FramePlan,
    writer: FrameWriter,
    payload: Vec<u8>,
    frame: Vec<u8>,
}

impl FrameBuilder {
    /// An empty builder.
    pub fn new(compression: Compression) -> FrameBuilder {
        FrameBuilder {
            plan: FramePlan::default(),
            writer: FrameWriter::new(compression),
            payload: Vec::new(),
            frame: Vec::new(),
        }
    }

    /// Whether nothing has been pushed.
    pub fn is_empty(&self) -> bool {
        self.plan.is_empty()
    }

    /// Records pushed so far.
    pub fn records(&self) -> usize {
        self.plan.descriptors().len()
    }

    /// Raw payload bytes pushed so far.
    pub fn raw_bytes(&self) -> u64 {
        self.plan.raw_bytes()
    }

    /// Whether a record with so much payload, at this sequence and time, may still join.
    pub fn fits(&self, record: &Record) -> bool {
        self.plan.fits(record)
    }

    /// Adds a record with its payload, given in pieces.
    ///
    /// # Panics
    /// As [`FramePlan::push`], or when the pieces are not as long as the record says.
    pub fn push<'p>(&mut self, record: &Record, payload: impl IntoIterator<Item = &'p [u8]>) {
        self.plan.push(record);
        payload.into_iter().for_each(|piece| self.payload.extend_from_slice(piece));
        let (has, says) = (self.payload.len() as u64, self.plan.raw_bytes());
        assert_eq!(has, says, "a payload of another length than its record says");
    }

    /// Closes the frame. It is valid until the builder is used again; call [`clear`](Self::clear) before the next.
    ///
    /// # Panics
    /// On an empty builder, or a position before that is not below the first record.
    pub fn finish(&mut self, about: &FrameMeta) -> EncodedFrame<'_> {
        self.frame.resize(self.plan.frame_bytes_max(), 0);
        let payloads = [self.payload.as_slice()];
        let bytes = self.writer.write(&self.plan, about, payloads, &mut self.frame);
        let (raw_bytes, last) = (self.plan.raw_bytes(), self.plan.last_seq());
        EncodedFrame { bytes: &self.frame[..bytes], raw_bytes, last }
    }

    /// Forgets the frame and keeps the buffers.
    pub fn clear(&mut self) {
        self.plan.clear();
        self.payload.clear();
    }
}
