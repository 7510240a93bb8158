//! Generic netlink messages: a netlink header (16 bytes), a generic header (4 bytes) and attributes
//! of length, type and value, padded to 4 bytes (`linux/netlink.h`, `linux/genetlink.h`). Native
//! endian.
//!
//! Written here, for it is this short: the crates for it bring a framework of their own.

/// Header of a message: `nlmsghdr` followed by `genlmsghdr`.
const HEADERS: usize = 20;
/// Attribute holds attributes.
const NESTED: u16 = 1 << 15;
const TYPE_MASK: u16 = 0x3fff;

/// Message type of errors and acknowledgements.
pub(super) const NLMSG_ERROR: u16 = 2;
/// Flags: a request, to be acknowledged.
pub(super) const REQUEST_ACK: u16 = 1 | 4;

/// A message being written.
#[derive(Debug)]
pub(super) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// A request to a family.
    pub(super) fn request(family: u16, command: u8, version: u8, sequence: u32) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&0u32.to_ne_bytes()); // length, set by `finish`
        bytes.extend_from_slice(&family.to_ne_bytes());
        bytes.extend_from_slice(&REQUEST_ACK.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&0u32.to_ne_bytes()); // port: the kernel fills it in
        bytes.extend_from_slice(&[command, version, 0, 0]);
        Self { bytes }
    }

    pub(super) fn u32(&mut self, kind: u16, value: u32) {
        self.raw(kind, &value.to_ne_bytes());
    }

    pub(super) fn u64(&mut self, kind: u16, value: u64) {
        self.raw(kind, &value.to_ne_bytes());
    }

    /// A string with its terminating zero. It must be short; names of families and devices are.
    pub(super) fn string(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.raw(kind, &bytes);
    }

    /// An attribute of the attributes that `fill` writes.
    pub(super) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.raw(kind | NESTED, &[]);
        fill(self);
        let len = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    }

    /// The whole message.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes
    }

    fn raw(&mut self, kind: u16, value: &[u8]) {
        let len = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A message that was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) sequence: u32,
    /// What follows the netlink header.
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The error number of an [`NLMSG_ERROR`]; 0 is an acknowledgement.
    pub(super) fn error(&self) -> Option<i32> {
        let number = self.body.first_chunk::<4>()?;
        (self.kind == NLMSG_ERROR).then(|| i32::from_ne_bytes(*number).saturating_neg())
    }

    /// Attributes behind the generic header.
    pub(super) fn attributes(&self) -> Attributes<'a> {
        Attributes { rest: self.body.get(HEADERS - 16..).unwrap_or_default() }
    }
}

/// The messages of one datagram. Ends at the first that does not fit in it.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(datagram, 0)? as usize;
        let body = datagram.get(16..len)?;
        let kind = u16_at(datagram, 4)?;
        let sequence = u32_at(datagram, 8)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, sequence, body })
    })
}

/// An attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attribute<'a> {
    pub(super) kind: u16,
    value: &'a [u8],
}

impl<'a> Attribute<'a> {
    pub(super) fn u8(&self) -> Option<u8> {
        self.value.first().copied()
    }

    pub(super) fn u16(&self) -> Option<u16> {
        u16_at(self.value, 0)
    }

    pub(super) fn u32(&self) -> Option<u32> {
        u32_at(self.value, 0)
    }

    pub(super) fn nested(&self) -> Attributes<'a> {
        Attributes { rest: self.value }
    }
}

/// A row of attributes. Ends at the first that does not fit.
#[derive(Clone, Debug)]
pub(super) struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    pub(super) fn find(mut self, kind: u16) -> Option<Attribute<'a>> {
        Iterator::find(&mut self, |attribute| attribute.kind == kind)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let len = usize::from(u16_at(self.rest, 0)?);
        let kind = u16_at(self.rest, 2)? & TYPE_MASK;
        let value = self.rest.get(4..len)?;
        self.rest = self.rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Attribute { kind, value })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_bytes_the_kernel_expects() {
        let mut message = Writer::request(0x1c, 1, 1, 7);
        message.u32(1, 5);
        message.string(10, "ab");
        message.nested(7, |sockets| {
            sockets.nested(1, |socket| socket.u32(1, 9));
        });
        let golden = [
            52, 0, 0, 0, 0x1c, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, // netlink header
            1, 1, 0, 0, // command, version
            8, 0, 1, 0, 5, 0, 0, 0, // index
            7, 0, 10, 0, b'a', b'b', 0, 0, // identifier, padded
            16, 0, 7, 0x80, // sockets
            12, 0, 1, 0x80, 8, 0, 1, 0, 9, 0, 0, 0, // socket, descriptor
        ];
        assert_eq!(message.finish(), golden);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut message = Writer::request(0x1c, 5, 1, 99);
        message.u64(2, 1 << 40);
        message.nested(9, |list| {
            for index in 0..2u32 {
                list.nested(1, |device| device.u32(1, index));
            }
        });
        let bytes = message.finish();
        let all: Vec<Message> = messages(&bytes).collect();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].kind, all[0].sequence, all[0].error()), (0x1c, 99, None));
        let list = all[0].attributes().find(9).unwrap();
        let indexes: Vec<Option<u32>> =
            list.nested().map(|device| device.nested().find(1).and_then(|a| a.u32())).collect();
        assert_eq!(indexes, [Some(0), Some(1)]);
    }

    #[test]
    fn truncated_or_lying_lengths_end_the_reading() {
        let mut message = Writer::request(0x1c, 5, 1, 99);
        message.u32(1, 5);
        let good = message.finish();
        for cut in 0..good.len() {
            let short = &good[..cut];
            assert_eq!(messages(short).count(), 0, "cut at {cut}");
        }
        for (at, value) in [(0, 0u8), (0, 15), (20, 3), (20, 200)] {
            let mut bad = good.clone();
            bad[at] = value;
            let attributes: usize = messages(&bad).map(|m| m.attributes().count()).sum();
            assert_eq!(attributes, 0, "byte {at} = {value}");
        }
    }

    #[test]
    fn errors_and_acknowledgements_are_told_apart() {
        let mut bytes = vec![36, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend_from_slice(&(-16i32).to_ne_bytes());
        bytes.resize(36, 0);
        let error = messages(&bytes).next().unwrap();
        assert_eq!((error.sequence, error.error()), (3, Some(16)));
    }
}
