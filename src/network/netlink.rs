//! A blocking netlink socket that sends many requests with one system call and reads all the answers.
//!
//! The kernel runs netlink requests inside `sendmsg`, in order, and has queued every answer when it returns; so one batch costs two
//! system calls and no wake-up. That is why pods are attached through this and not through an event-driven handle, which
//! pays two wake-ups and a round trip for each request. Messages of rtnetlink are built and read by the rtnetlink crates.
//!
//! A socket belongs to the network namespace of the thread that opened it, for ever, wherever it is used from.

use std::io;

use rtnetlink::sys::{Socket as RawSocket, SocketAddr};

use crate::model::error::{Act, Error, Result};

/// Length of `struct nlmsghdr`.
pub const HEADER: usize = 16;
/// `NLMSG_ERROR`: an acknowledgement (errno 0) or a refusal.
const ERROR: u16 = 2;
/// `NLMSG_DONE`: end of a dump.
const DONE: u16 = 3;
/// `NLM_F_CAPPED`: the request is not repeated in the acknowledgement.
const CAPPED: u16 = 0x100;
/// `NLM_F_ACK_TLVS`: attributes with the kernel's own words follow.
const ACK_TLVS: u16 = 0x200;
/// `NLMSGERR_ATTR_MSG`: the kernel's words.
const ATTRIBUTE_MESSAGE: u16 = 1;
/// One datagram of answers is at most this long (the kernel sizes dumps by the reader's buffer, 32 KiB at most).
const DATAGRAM: usize = 32 * 1024;

/// One refused request.
#[derive(Debug)]
pub struct Refusal {
    /// Sequence number of the request.
    pub sequence: u32,
    /// Positive errno.
    pub errno: i32,
    /// What the kernel said beyond the errno.
    pub text: Option<String>,
}

impl Refusal {
    /// As an error of `what` (act and object).
    pub fn into_error(self, what: &str) -> Error {
        let what = match &self.text {
            Some(text) => format!("{what} ({text})"),
            None => what.to_owned(),
        };
        Error::io(what, io::Error::from_raw_os_error(self.errno))
    }
}

/// An open socket of one protocol.
pub struct Socket {
    raw: RawSocket,
    buffer: Vec<u8>,
    next: u32,
}

impl Socket {
    /// Opens a socket of `protocol` (`NETLINK_…`) in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel lacks the protocol or descriptors have run out.
    pub fn open(protocol: isize) -> Result<Self> {
        let open = || -> io::Result<RawSocket> {
            let mut raw = RawSocket::new(protocol)?;
            raw.bind_auto()?;
            raw.connect(&SocketAddr::new(0, 0))?;
            // Both only make answers better; kernels since 4.12 know them.
            raw.set_ext_ack(true)?;
            raw.set_cap_ack(true)?;
            Ok(raw)
        };
        Ok(Self { raw: open().act("open netlink socket", protocol)?, buffer: Vec::new(), next: 1 })
    }

    /// Reserves the next `count` sequence numbers and returns the first.
    pub fn sequence(&mut self, count: u32) -> u32 {
        let first = self.next;
        self.next = self.next.wrapping_add(count).max(1);
        first
    }

    /// Sends `requests` (whole messages, padded, numbered by [`Self::sequence`]) and reads until `answers` of them were
    /// acknowledged or refused. Data messages go to `each` as (type, payload).
    ///
    /// # Errors
    /// When the socket itself fails; refusals are the inner value.
    pub fn transact(&mut self, requests: &[u8], answers: usize, mut each: impl FnMut(u16, &[u8])) -> Result<Vec<Refusal>> {
        self.raw.send(requests, 0).act("send", "netlink request")?;
        let mut refusals = Vec::new();
        let mut left = answers;
        while left > 0 {
            self.buffer.clear();
            self.buffer.reserve(DATAGRAM);
            self.raw.recv(&mut self.buffer, 0).act("receive", "netlink answer")?;
            for answer in Answers(&self.buffer) {
                match answer.kind {
                    ERROR => {
                        left = left.saturating_sub(1);
                        refusals.extend(answer.refusal());
                    }
                    DONE => left = left.saturating_sub(1),
                    kind => each(kind, answer.payload),
                }
            }
        }
        Ok(refusals)
    }
}

impl Socket {
    /// Sends `requests` and reads all answers there are, however many; says whether request `last` was acknowledged. For
    /// transactions, which the kernel answers with one error for all when it fails at the end.
    ///
    /// # Errors
    /// When the socket itself fails.
    pub fn exchange(&mut self, requests: &[u8], last: u32) -> Result<(Vec<Refusal>, bool)> {
        self.raw.send(requests, 0).act("send", "netlink batch")?;
        let (mut refusals, mut acknowledged) = (Vec::new(), false);
        loop {
            self.buffer.clear();
            self.buffer.reserve(DATAGRAM);
            // Everything was queued when send returned.
            match self.raw.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok((refusals, acknowledged)),
                Err(e) => return Err(Error::io("receive netlink answer", e)),
            }
            for answer in Answers(&self.buffer).filter(|a| a.kind == ERROR) {
                match answer.refusal() {
                    Some(refusal) => refusals.push(refusal),
                    None => acknowledged |= answer.sequence == last,
                }
            }
        }
    }
}

/// One message of a datagram.
struct Answer<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Answer<'_> {
    /// The refusal in an `NLMSG_ERROR`; `None` when it is a mere acknowledgement.
    fn refusal(&self) -> Option<Refusal> {
        let errno = -i32::from_ne_bytes(self.payload.get(..4)?.try_into().ok()?);
        if errno == 0 {
            return None;
        }
        Some(Refusal { sequence: self.sequence, errno, text: self.text() })
    }

    fn text(&self) -> Option<String> {
        if self.flags & ACK_TLVS == 0 {
            return None;
        }
        // After the errno comes the request: its header alone when capped, else all of it.
        let request = self.payload.get(4..)?;
        let skip = if self.flags & CAPPED == 0 { align(u32_at(request, 0)? as usize) } else { HEADER };
        let text = attributes(request.get(skip..)?).find(|(kind, _)| *kind == ATTRIBUTE_MESSAGE)?.1;
        Some(String::from_utf8_lossy(text).trim_end_matches('\0').to_owned())
    }
}

/// Walks the messages of a datagram; stops at the first that is malformed.
struct Answers<'a>(&'a [u8]);

impl<'a> Iterator for Answers<'a> {
    type Item = Answer<'a>;

    fn next(&mut self) -> Option<Answer<'a>> {
        let bytes = self.0;
        let length = u32_at(bytes, 0)? as usize;
        let payload = bytes.get(HEADER..length)?;
        self.0 = bytes.get(align(length)..).unwrap_or_default();
        Some(Answer { kind: u16_at(bytes, 4)?, flags: u16_at(bytes, 6)?, sequence: u32_at(bytes, 8)?, payload })
    }
}

/// The attributes in `bytes` as (type without flag bits, value); stops at the first that is malformed.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let value = bytes.get(4..length)?;
        let kind = u16_at(bytes, 2)? & 0x3fff;
        bytes = bytes.get(align(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Rounds up to the alignment of messages and attributes.
pub fn align(length: usize) -> usize {
    (length + 3) & !3
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_errno_and_the_kernels_words() {
        // errno -19, capped request header, then NLMSGERR_ATTR_MSG "no such".
        let mut payload = (-19i32).to_ne_bytes().to_vec();
        payload.extend([0; HEADER]);
        payload.extend([12, 0, 1, 0]);
        payload.extend(b"no such\0");
        let mut bytes = u32::try_from(HEADER + payload.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(ERROR.to_ne_bytes());
        bytes.extend((CAPPED | ACK_TLVS).to_ne_bytes());
        bytes.extend([7, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        let refusal = Answers(&bytes).next().unwrap().refusal().unwrap();
        assert_eq!((refusal.sequence, refusal.errno, refusal.text.as_deref()), (7, 19, Some("no such")));
        // Every truncation ends quietly.
        for n in 0..bytes.len() {
            assert!(Answers(&bytes[..n]).count() == 0);
        }
    }
}
