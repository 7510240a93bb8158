//! Frames out of the spool, read where waiting for its disk holds nobody up.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use tidemark_journal::Seq;

use crate::{
    outbox::Outbox,
    spool::{Index, ReadError, Reader, Spooled},
};

/// Reads that fail one after the other until what is in the spool is given up.
const FAILURES_MAX: u32 = 5;

/// The sender's place in the spool.
#[derive(Default)]
pub(super) struct SpoolEnd {
    reader: Option<Reader>,
    failures: u32,
}

impl SpoolEnd {
    /// The first frame that reaches over `after`, in `buffer`. If it cannot be had, the link ends; if that is so
    /// for good, the next greeting finds that it is not kept any more, and everything is compared.
    pub async fn read(
        &mut self,
        outbox: &Outbox,
        after: Seq,
        index: Arc<Index>,
        mut buffer: Vec<u8>,
    ) -> anyhow::Result<(Spooled, Vec<u8>)> {
        loop {
            let mut reader = self.reader.take().unwrap_or_else(|| Reader::new(Arc::clone(&index)));
            // A thread of its own, since the disk may hang while acknowledgements come in.
            let work = move || {
                let frame = reader.next(after, &mut buffer);
                (frame, reader, buffer)
            };
            let (frame, reader, back) =
                tokio::task::spawn_blocking(work).await.map_err(|error| anyhow!("{error}"))?;
            (self.reader, buffer) = (Some(reader), back);
            match frame {
                Ok(frame) => {
                    self.failures = 0;
                    return Ok((frame, buffer));
                }
                Err(error) => {
                    self.failures += 1;
                    let for_good = matches!(error, ReadError::Damage(_));
                    if for_good || self.failures >= FAILURES_MAX {
                        outbox.spool_lost(error.to_string());
                        return Err(error).context("what is in the spool is given up");
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                }
            }
        }
    }
}
