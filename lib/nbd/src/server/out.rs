//! Replies on their way out: many gathered into one vectored write.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;

/// Slices given to one write.
const SLICES_MAX: usize = 64;
/// Payloads up to this many bytes are copied next to their headers: cheaper than a slice each.
const COPY_BYTES_MAX: usize = 512;

/// A queue of bytes in which each reply carries a charge, given back once it is written.
#[derive(Default)]
pub(crate) struct OutQueue {
    queue: VecDeque<Bytes>,
    /// The end of the queue, still growing.
    tail: BytesMut,
    queued_bytes: usize,
    /// Stream position at which each reply ends, and its charge.
    marks: VecDeque<(u64, usize)>,
    position: u64,
}

impl OutQueue {
    /// Where headers are appended.
    pub(crate) fn head(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    /// Appends a payload, without copying it unless it is short.
    pub(crate) fn payload(&mut self, bytes: Bytes) {
        if bytes.len() <= COPY_BYTES_MAX {
            self.tail.extend_from_slice(&bytes);
            return;
        }
        self.seal_tail();
        self.queued_bytes += bytes.len();
        self.queue.push_back(bytes);
    }

    /// Ends a reply that was charged with `charge` bytes.
    pub(crate) fn end_reply(&mut self, charge: usize) {
        let end = self.position + (self.queued_bytes + self.tail.len()) as u64;
        self.marks.push_back((end, charge));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.tail.is_empty()
    }

    /// Charges of the replies written since the last call: how many, and their sum.
    pub(crate) fn released(&mut self) -> (usize, usize) {
        let (mut count, mut sum) = (0, 0);
        while let Some((end, charge)) = self.marks.front()
            && *end <= self.position
        {
            (count, sum) = (count + 1, sum + charge);
            self.marks.pop_front();
        }
        (count, sum)
    }

    /// Drops everything unsent, as if written.
    pub(crate) fn discard(&mut self) {
        self.seal_tail();
        self.position += self.queued_bytes as u64;
        self.queue.clear();
        self.queued_bytes = 0;
    }

    /// Writes once; returns the bytes written.
    pub(crate) fn poll_write<S: AsyncWrite>(
        &mut self,
        stream: Pin<&mut S>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        self.seal_tail();
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let mut count = 0;
        for (slice, bytes) in slices.iter_mut().zip(&self.queue) {
            *slice = IoSlice::new(bytes);
            count += 1;
        }
        let slices = slices.get(..count).unwrap_or_default();
        let written = ready!(stream.poll_write_vectored(cx, slices))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.consume(written);
        Poll::Ready(Ok(written))
    }

    fn consume(&mut self, mut written: usize) {
        self.position += written as u64;
        self.queued_bytes -= written.min(self.queued_bytes);
        while let Some(front) = self.queue.front_mut() {
            if written < front.len() {
                front.advance(written);
                return;
            }
            written -= front.len();
            self.queue.pop_front();
        }
    }

    fn seal_tail(&mut self) {
        if !self.tail.is_empty() {
            self.queued_bytes += self.tail.len();
            self.queue.push_back(self.tail.split().freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn gives_charges_back_as_replies_leave_and_keeps_every_byte_in_order() {
        let (mut near, mut far) = tokio::io::duplex(700);
        let mut out = OutQueue::default();
        let mut expected = Vec::new();
        for reply in 0..100u8 {
            out.head().extend_from_slice(&[reply; 16]);
            expected.extend_from_slice(&[reply; 16]);
            if reply % 3 == 0 {
                let payload = vec![reply; usize::from(reply) * 20];
                expected.extend_from_slice(&payload);
                out.payload(payload.into());
            }
            out.end_reply(usize::from(reply));
        }
        let length = expected.len();
        let reader = tokio::spawn(async move {
            let mut seen = vec![0; length];
            far.read_exact(&mut seen).await.expect("all of it");
            seen
        });
        let (mut count, mut sum) = (0, 0);
        while !out.is_empty() {
            std::future::poll_fn(|cx| out.poll_write(Pin::new(&mut near), cx)).await.expect("sent");
            let (more, charge) = out.released();
            (count, sum) = (count + more, sum + charge);
        }
        assert_eq!((count, sum), (100, (0..100).sum()));
        assert_eq!(reader.await.expect("joined"), expected);
    }

    #[test]
    fn discarding_releases_what_was_queued() {
        let mut out = OutQueue::default();
        out.head().extend_from_slice(b"head");
        out.payload(Bytes::from(vec![1; 4096]));
        out.end_reply(7);
        assert_eq!(out.released(), (0, 0));
        out.discard();
        assert!(out.is_empty());
        assert_eq!(out.released(), (1, 7));
    }
}
