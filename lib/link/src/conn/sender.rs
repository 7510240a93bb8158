//! The sending half.

use std::{
    io::{self, IoSlice, Write},
    net::Shutdown,
    rc::Rc,
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};
use zerocopy::IntoBytes;

use super::{Closer, LinkError, Shared};
use crate::{
    message::{Envelope, Message, MessageKind},
    seam::{self, Stream},
    throttle::{Minute, Throttle},
};

/// What is encrypted before it is handed to the socket: large enough to make system calls cheap,
/// small enough to stay in a core's cache until the kernel has copied it.
const BATCH_BYTES: usize = 256 << 10;

/// How much may go to the socket without a wait before others of this thread have their turn: the peer's answers, above
/// all. As much as takes some milliseconds where a cipher is slow.
const TURN_BYTES: usize = 1 << 20;

/// The sending half of a connection.
///
/// A future of this half must not be dropped before it is done: what was sent of a message cannot
/// be taken back, so the connection ends then.
pub struct Sender {
    pub(super) shared: Rc<Shared>,
    stall: Duration,
    /// Bytes of frames that were encrypted since all was last handed to the socket.
    kept_bytes: usize,
    /// Bytes that went to the socket since this last waited for anything.
    turn_bytes: usize,
    /// The message being encoded.
    plain: Vec<u8>,
    /// A message was begun and not finished.
    under_way: bool,
    pace: Option<Pace>,
}

/// A throttle with its clocks.
struct Pace {
    throttle: Throttle,
    started: Instant,
    time_of_day: Box<dyn Fn() -> Minute>,
    /// What it last said, and when it was asked.
    minute: (Minute, Instant),
}

/// How long the time of day is believed: to ask for it may mean to read a file.
const MINUTE_VALID: Duration = Duration::from_secs(1);

impl Pace {
    fn minute(&mut self) -> Minute {
        if self.minute.1.elapsed() >= MINUTE_VALID {
            self.minute = ((self.time_of_day)(), Instant::now());
        }
        self.minute.0
    }
}

impl Sender {
    pub(super) fn new(shared: Rc<Shared>, stall: Duration) -> Sender {
        let (kept_bytes, turn_bytes, plain) = (0, 0, Vec::new());
        Sender { shared, stall, kept_bytes, turn_bytes, plain, under_way: false, pace: None }
    }

    /// Bounds the rate of frames from now on. Other messages are few and do not wait.
    /// `time_of_day` is the local time.
    pub fn set_throttle(&mut self, throttle: Throttle, time_of_day: impl Fn() -> Minute + 'static) {
        let (started, minute) = (Instant::now(), (time_of_day(), Instant::now()));
        self.pace = Some(Pace { throttle, started, time_of_day: Box::new(time_of_day), minute });
    }

    /// Sends a message, after all that was kept back.
    ///
    /// # Errors
    /// Any [`LinkError`]; the connection has ended then, unless the message was too long.
    pub async fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        if let Message::Frame(frame) = message {
            self.send_frame(&[frame]).await?;
            return self.flush().await;
        }
        self.plain.clear();
        message.encode(&mut self.plain)?;
        self.begin()?;
        self.shared.tls.borrow_mut().writer().write_all(&self.plain)?;
        self.write_out().await?;
        self.under_way = false;
        Ok(())
    }

    /// Sends a frame, given in parts. The end of it may be kept back to be sent together with the
    /// next: call [`flush`](Self::flush) when there is no next one yet.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub async fn send_frame(&mut self, parts: &[&[u8]]) -> Result<(), LinkError> {
        let bytes = parts.iter().map(|part| part.len()).sum();
        let envelope = Envelope::new(MessageKind::Frame, bytes)?;
        self.begin()?;
        let mut pieces = Pieces { parts: [&[envelope.as_bytes()], parts].concat(), part: 0, at: 0 };
        loop {
            let minute = self.pace.as_mut().map(Pace::minute);
            let most = match (&self.pace, minute) {
                (Some(pace), Some(minute)) => pace.throttle.piece_bytes(minute).min(BATCH_BYTES),
                _ => BATCH_BYTES,
            };
            let piece = pieces.take(most);
            let bytes = piece.iter().map(|part| part.len()).sum();
            if bytes == 0 {
                break;
            }
            if let (Some(pace), Some(minute)) = (&mut self.pace, minute) {
                let wait = pace.throttle.take(bytes, pace.started.elapsed(), minute);
                if !wait.is_zero() {
                    self.write_out().await?;
                    sleep(wait).await;
                }
            }
            self.encrypt(&piece, bytes)?;
            if self.kept_bytes >= BATCH_BYTES {
                self.write_out().await?;
            }
        }
        self.under_way = false;
        Ok(())
    }

    /// Sends all that was kept back.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub async fn flush(&mut self) -> Result<(), LinkError> {
        self.begin()?;
        self.write_out().await?;
        self.under_way = false;
        Ok(())
    }

    /// Ends this direction as planned: the peer has got everything when its receiver ends. The
    /// other half stays until the peer ends its direction too.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub async fn finish(mut self) -> Result<(), LinkError> {
        self.begin()?;
        self.shared.tls.borrow_mut().send_close_notify();
        self.write_out().await?;
        self.shared.stream.shutdown(Shutdown::Write);
        Ok(())
    }

    /// Ends the connection at once, for both halves.
    pub fn close(&self) {
        self.closer().close();
    }

    /// What ends the connection from elsewhere.
    pub fn closer(&self) -> Closer {
        Closer(Rc::downgrade(&self.shared))
    }

    /// Refuses to go on after a message that was not finished.
    fn begin(&mut self) -> Result<(), LinkError> {
        if self.under_way {
            self.close();
            return Err(LinkError::Ended);
        }
        self.under_way = true;
        Ok(())
    }

    /// Encrypts `bytes` bytes in `piece`, to be sent after what was kept back.
    fn encrypt(&mut self, piece: &[&[u8]], bytes: usize) -> Result<(), LinkError> {
        let slices: Vec<_> = piece.iter().map(|part| IoSlice::new(part)).collect();
        // Without a limit on its buffer rustls takes all of it.
        let taken = self.shared.tls.borrow_mut().writer().write_vectored(&slices)?;
        if taken != bytes {
            return Err(io::Error::from(io::ErrorKind::WriteZero).into());
        }
        self.kept_bytes += bytes;
        Ok(())
    }

    /// Hands all that is encrypted to the socket. Straight out of the buffers of rustls, since the kernel copies it
    /// anyway; an operation of the ring would need it in one piece and wake this thread once more.
    pub(super) async fn write_out(&mut self) -> Result<(), LinkError> {
        let stream = &self.shared.stream;
        loop {
            let written = {
                let mut tls = self.shared.tls.borrow_mut();
                if !tls.wants_write() {
                    break;
                }
                tls.write_tls(&mut Socket(stream))
            };
            match written {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(bytes) => self.turn_bytes += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.turn_bytes = 0;
                    timeout(self.stall, stream.writable()).await.map_err(|_| {
                        self.close();
                        LinkError::Timeout {
                            did: "took nothing of what was sent",
                            after: self.stall,
                        }
                    })??;
                }
                Err(error) => return Err(error.into()),
            }
            if self.turn_bytes >= TURN_BYTES {
                self.turn_bytes = 0;
                seam::submit().await?;
            }
        }
        self.kept_bytes = 0;
        Ok(())
    }
}

/// A socket as rustls writes to it.
struct Socket<'a>(&'a Stream);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_now(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Walks over parts in pieces of a bounded length.
struct Pieces<'a> {
    parts: Vec<&'a [u8]>,
    part: usize,
    at: usize,
}

impl<'a> Pieces<'a> {
    /// The next `most` bytes, as slices of the parts; nothing at the end.
    fn take(&mut self, most: usize) -> Vec<&'a [u8]> {
        let (mut piece, mut left) = (Vec::new(), most);
        while let Some(part) = self.parts.get(self.part).filter(|_| left > 0) {
            let rest = &part[self.at..];
            let taken = &rest[..rest.len().min(left)];
            left -= taken.len();
            self.at += taken.len();
            if self.at == part.len() {
                (self.part, self.at) = (self.part + 1, 0);
            }
            if !taken.is_empty() {
                piece.push(taken);
            }
        }
        piece
    }
}
