//! The receiving half.

use std::{
    future::Future,
    io::{self, BufRead},
    net::Shutdown,
    pin::Pin,
    rc::Rc,
    time::Duration,
};

use tokio::time::{Instant, timeout_at};

use super::{Closer, LinkError, Shared};
use crate::message::{Decoder, Message};

/// What is asked of the socket at once.
const READ_BYTES: usize = 256 << 10;

type Reading = Pin<Box<dyn Future<Output = (io::Result<usize>, Vec<u8>)>>>;

/// The receiving half of a connection.
pub struct Receiver {
    shared: Rc<Shared>,
    idle: Duration,
    /// When the last bytes came.
    heard: Instant,
    /// Encrypted bytes, of which those before `at` have been taken by rustls.
    encrypted: Vec<u8>,
    at: usize,
    /// A read that the kernel has not answered; it outlives a dropped `recv`.
    reading: Option<Reading>,
    decoder: Decoder,
    /// The peer has ended its direction as planned.
    finished: bool,
    failed: bool,
}

impl Receiver {
    pub(super) fn new(shared: Rc<Shared>, idle: Duration) -> Receiver {
        Receiver {
            shared,
            idle,
            heard: Instant::now(),
            encrypted: Vec::with_capacity(READ_BYTES),
            at: 0,
            reading: None,
            decoder: Decoder::new(),
            finished: false,
            failed: false,
        }
    }

    /// Ends the connection at a message with a longer body than this, whatever its kind allows: the
    /// peer may not make this side remember more before it is known what it may do.
    pub fn set_body_bytes_max(&mut self, most: usize) {
        self.decoder.set_body_bytes_max(most);
    }

    /// The next message, or `None` when the peer has ended its direction as planned. The future may
    /// be dropped and called for again: nothing is lost, and the time of silence goes on counting.
    ///
    /// # Errors
    /// Any [`LinkError`]; the connection has ended then.
    pub async fn recv(&mut self) -> Result<Option<Message>, LinkError> {
        if self.failed {
            return Err(LinkError::Ended);
        }
        let result = self.next().await;
        if result.is_err() {
            self.failed = true;
            self.close();
        }
        result
    }

    async fn next(&mut self) -> Result<Option<Message>, LinkError> {
        loop {
            if let Some(message) = self.take_message()? {
                return Ok(Some(message));
            }
            if self.finished {
                return if self.decoder.in_message() { Err(LinkError::Cut) } else { Ok(None) };
            }
            if !self.fill().await? {
                return Err(LinkError::Cut);
            }
        }
    }

    /// A message out of the bytes at hand.
    fn take_message(&mut self) -> Result<Option<Message>, LinkError> {
        let mut tls = self.shared.tls.borrow_mut();
        loop {
            loop {
                let mut reader = tls.reader();
                let plain = match reader.fill_buf() {
                    Ok([]) => {
                        self.finished = true;
                        return Ok(None);
                    }
                    Ok(plain) => plain,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                };
                let (taken, message) = self.decoder.feed(plain)?;
                reader.consume(taken);
                if message.is_some() {
                    return Ok(message);
                }
            }
            if !decrypt(&mut tls, &self.encrypted, &mut self.at)? {
                return Ok(None);
            }
        }
    }

    /// Takes a handshake's bytes from those at hand; what follows it stays for later.
    pub(super) fn handshake_step(&mut self) -> Result<(), LinkError> {
        let mut tls = self.shared.tls.borrow_mut();
        while tls.is_handshaking() && decrypt(&mut tls, &self.encrypted, &mut self.at)? {}
        Ok(())
    }

    /// Waits for encrypted bytes, when all at hand are taken. `false` means the end.
    pub(super) async fn fill(&mut self) -> Result<bool, LinkError> {
        let reading = self.reading.get_or_insert_with(|| {
            // Until the read is answered there is nothing at hand, should this future be dropped.
            self.at = 0;
            Box::pin(self.shared.stream.read(std::mem::take(&mut self.encrypted)))
        });
        let (read, encrypted) = timeout_at(self.heard + self.idle, reading)
            .await
            .map_err(|_| LinkError::Timeout { did: "has been silent", after: self.idle })?;
        (self.reading, self.encrypted) = (None, encrypted);
        self.heard = Instant::now();
        match read {
            Ok(0) => self.encrypted.clear(),
            Ok(_) => {}
            Err(error) => {
                self.encrypted.clear();
                return Err(error.into());
            }
        }
        Ok(!self.encrypted.is_empty())
    }

    /// Ends the connection at once, for both halves.
    pub fn close(&self) {
        self.shared.stream.shutdown(Shutdown::Both);
    }

    /// What ends the connection from elsewhere.
    pub fn closer(&self) -> Closer {
        Closer(Rc::downgrade(&self.shared))
    }
}

/// Lets rustls take and decrypt some of the bytes from `at` on. `false` when none are left.
fn decrypt(
    tls: &mut rustls::Connection,
    encrypted: &[u8],
    at: &mut usize,
) -> Result<bool, LinkError> {
    let mut rest = &encrypted[*at..];
    if rest.is_empty() {
        return Ok(false);
    }
    let taken = tls.read_tls(&mut rest)?;
    if taken == 0 {
        // After the peer's close_notify rustls takes no more; nothing that follows may count.
        *at = encrypted.len();
        return Ok(false);
    }
    *at += taken;
    tls.process_new_packets()?;
    Ok(true)
}
