//! Records, frames, chunks and segments: the one format from the agent's ring to the target's log.
//!
//! A [`record`](record::Record) is one event of a group's total order. Records are encoded together
//! into a [`frame`](frame): a header, one 32-byte descriptor per record, a chunk table and the
//! chunks. A frame is built, compressed and checksummed once, at the source; everything downstream
//! moves its bytes verbatim. A [`segment`](segment) is a file of frames.
//!
//! The way through this crate: [`encode::FrameBuilder`] makes a frame, [`frame::FrameView`] reads
//! and checks one, [`cut::tail`] shortens one for an exact resume, [`segment`] lays frames out in a
//! file and scans them back, [`term`] says which positions continue which, [`dump`] prints for
//! people. All integers are little-endian; all structures have alignment one.

pub mod checksum;
pub mod chunk;
pub mod cut;
pub mod dump;
pub mod encode;
pub mod frame;
pub mod ids;
pub mod record;
pub mod segment;
pub mod term;

pub use encode::{Compression, FrameBuilder, FrameMeta, FramePlan, FrameWriter};
pub use frame::{FrameError, FrameView};
pub use ids::{GroupId, Position, SECTOR_BYTES, Sector, Seq, TermId, VolumeId};
pub use record::{GapReason, Kind, Record};
pub use term::{Ancestry, Term};
