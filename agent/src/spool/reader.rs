//! Reading a spool's frames for the sender, from any position on.

use std::{io, sync::Arc};

use tidemark_journal::{FrameView, Position, Seq};

use super::{
    recover::follows,
    store::{Index, name},
    walk::{Step, Walk},
};

/// Why a frame that should be there cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk refuses. It may do better another time.
    #[error("the spool cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It is not there, or not what was written.
    #[error("the spool is damaged: {0}")]
    Damage(String),
}

/// A place in a spool.
pub struct Reader {
    index: Arc<Index>,
    at: Option<At>,
}

struct At {
    walk: Walk,
    number: u64,
    /// The position after the frame that was read last.
    position: Position,
}

/// A frame of the spool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spooled {
    /// The position it continues.
    pub before: Position,
    /// Its last position.
    pub last: Position,
    /// Journal time of its first record.
    pub time_ns: u64,
}

impl Reader {
    /// At no place yet.
    pub fn new(index: Arc<Index>) -> Reader {
        Reader { index, at: None }
    }

    /// Reads the first frame that reaches over `after` into `into`. It waits for the disk.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn next(&mut self, after: Seq, into: &mut Vec<u8>) -> Result<Spooled, ReadError> {
        let found = self.read(after, into);
        if found.is_err() {
            self.at = None;
        }
        found
    }

    fn read(&mut self, after: Seq, into: &mut Vec<u8>) -> Result<Spooled, ReadError> {
        let gone = || ReadError::Damage(format!("what follows {after} is not there"));
        loop {
            let at = match &mut self.at {
                Some(at) if at.position.seq <= after => at,
                _ => {
                    let segment = self.index.find(after).ok_or_else(gone)?;
                    let walk = Walk::new(self.index.media().open(&name(segment.number))?);
                    let (number, position) = (segment.number, segment.before);
                    self.at.insert(At { walk, number, position })
                }
            };
            let Some(segment) = self.index.get(at.number) else {
                // It was removed meanwhile, since all of it is final-durable.
                self.at = None;
                self.index.find(after).ok_or_else(gone)?;
                continue;
            };
            let ended = at.position == segment.last;
            match if ended { Step::End } else { at.walk.step(segment.end)? } {
                Step::Frame(view) => {
                    if !follows(at.position, &view) {
                        let (found, before) = (view.header().before(), at.position);
                        let sentence = format!("a frame continues {found} after {before}");
                        return Err(ReadError::Damage(sentence));
                    }
                    at.position = view.header().last();
                    if at.position.seq > after {
                        return Ok(take(&view, into));
                    }
                }
                Step::End => {
                    let next = self.index.get(at.number + 1).ok_or_else(gone)?;
                    let walk = Walk::new(self.index.media().open(&name(next.number))?);
                    // Whether its first frame follows is seen when that is read.
                    self.at = Some(At { walk, number: next.number, position: at.position });
                }
                Step::Bad(sentence) => return Err(ReadError::Damage(sentence)),
            }
        }
    }
}

fn take(view: &FrameView<'_>, into: &mut Vec<u8>) -> Spooled {
    into.clear();
    into.extend_from_slice(view.bytes());
    let header = view.header();
    Spooled { before: header.before(), last: header.last(), time_ns: header.time_ns.get() }
}
