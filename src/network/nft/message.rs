//! Messages of nf_tables: attributes, expressions and batches (transactions: all of a batch happens, or nothing).

use crate::network::netlink::{HEADER, Refusal, Socket, align};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const NESTED: u16 = 0x8000;
/// `NFPROTO_INET`: tables for IPv4 and IPv6 together.
const INET: u8 = 1;

/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;
/// `NFT_MSG_…`.
pub const NEW_TABLE: u16 = 0;
/// `NFT_MSG_DELTABLE`.
pub const DELETE_TABLE: u16 = 2;
/// `NFT_MSG_NEWCHAIN`.
pub const NEW_CHAIN: u16 = 3;
/// `NFT_MSG_NEWRULE`.
pub const NEW_RULE: u16 = 6;
/// `NFT_MSG_NEWSET`.
pub const NEW_SET: u16 = 9;
/// `NFT_MSG_NEWSETELEM`.
pub const NEW_ELEMENT: u16 = 12;
/// `NFT_MSG_DELSETELEM`.
pub const DELETE_ELEMENT: u16 = 14;

/// Attributes being written. Numbers are big endian in nf_tables, registers' contents as on the wire.
#[derive(Default)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// Bytes as they are.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        // Nothing here comes near 64 KiB: names are short, values are registers.
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(align(self.0.len()), 0);
        self
    }

    /// A number.
    pub fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// A name, with the terminating zero that the kernel wants.
    pub fn name(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Attributes inside an attribute.
    pub fn nested(&mut self, kind: u16, write: impl FnOnce(&mut Attributes)) -> &mut Self {
        let mut inner = Attributes::default();
        write(&mut inner);
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// A transaction being written.
pub struct Batch<'a> {
    socket: &'a mut Socket,
    bytes: Vec<u8>,
    last: u32,
}

impl<'a> Batch<'a> {
    /// An empty one for `socket`.
    pub fn new(socket: &'a mut Socket) -> Self {
        let mut batch = Self { socket, bytes: Vec::with_capacity(2048), last: 0 };
        batch.message(BATCH_BEGIN, REQUEST, 0, SUBSYSTEM, &[]);
        batch
    }

    /// Adds a request of nf_tables.
    pub fn add(&mut self, message: u16, flags: u16, write: impl FnOnce(&mut Attributes)) {
        let mut attributes = Attributes::default();
        write(&mut attributes);
        self.message(SUBSYSTEM << 8 | message, REQUEST | ACK | flags, INET, 0, &attributes.0);
    }

    /// Lets it happen. The first refusal comes back: then nothing happened.
    ///
    /// # Errors
    /// When the socket itself fails.
    pub fn commit(mut self) -> crate::model::Result<Option<Refusal>> {
        let last = self.last;
        self.message(BATCH_END, REQUEST, 0, SUBSYSTEM, &[]);
        let (refusals, acknowledged) = self.socket.exchange(&self.bytes, last)?;
        let first = refusals.into_iter().next();
        // Silence would be a kernel that dropped the batch (out of memory for the answers).
        Ok(first.or_else(|| (!acknowledged).then_some(Refusal { sequence: last, errno: libc::ENOBUFS, text: None })))
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) {
        self.last = self.socket.sequence(1);
        let length = HEADER + 4 + attributes.len();
        self.bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(self.last.to_ne_bytes());
        self.bytes.extend([0; 4]);
        // struct nfgenmsg: family, version 0, resource id.
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(attributes);
    }
}
