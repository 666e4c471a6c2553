//! Links, addresses and routes: requests of the rtnetlink crates, sent in batches over [`super::netlink`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage as Message;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage, State as LinkState};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::{AddressMessageBuilder, LinkUnspec, RouteMessageBuilder};

use super::netlink::{Refusal, Socket};
use crate::model::error::{Error, Kind, Result};

/// Index of the loopback in every network namespace.
pub const LOOPBACK: u32 = 1;
/// How long a link may take to carry. The kernel's link watch runs at least once a second; the rest is for its work queue.
const CARRIER: Duration = Duration::from_secs(5);

/// Requests in the order in which the kernel shall run them. A request that fails does not stop those behind it.
#[derive(Default)]
pub struct Batch {
    steps: Vec<Step>,
}

struct Step {
    what: String,
    message: Message,
    flags: u16,
    /// Errnos that mean "already so".
    fine: &'static [i32],
}

impl Batch {
    /// Creates a link; `EEXIST` is an error.
    pub fn create_link(self, what: String, link: LinkMessage) -> Self {
        self.push(what, Message::NewLink(link), NLM_F_CREATE | NLM_F_EXCL, &[])
    }

    /// Creates a link unless one of that name exists.
    pub fn ensure_link(self, what: String, link: LinkMessage) -> Self {
        self.push(what, Message::NewLink(link), NLM_F_CREATE | NLM_F_EXCL, &[libc::EEXIST])
    }

    /// Changes a link, found by index or, with index 0, by name.
    pub fn set_link(self, what: String, link: LinkMessage) -> Self {
        self.push(what, Message::NewLink(link), 0, &[])
    }

    /// Brings up the link with this index.
    pub fn link_up(self, name: &str, index: u32) -> Self {
        self.set_link(format!("bring up {name}"), LinkUnspec::new_with_index(index).up().build())
    }

    /// Deletes a link by name; a missing one is fine.
    pub fn delete_link(self, name: &str) -> Self {
        self.push(format!("delete link {name}"), Message::DelLink(LinkUnspec::new_with_name(name).build()), 0, &[libc::ENODEV])
    }

    /// Adds an address, in use at once: no duplicate address detection, the leases are what keeps addresses apart.
    pub fn add_address(self, link: u32, address: IpAddr, prefix: u8) -> Self {
        let mut message: AddressMessage = match address {
            IpAddr::V4(a) => AddressMessageBuilder::<Ipv4Addr>::new().index(link).address(a, prefix).build(),
            IpAddr::V6(a) => AddressMessageBuilder::<Ipv6Addr>::new().index(link).address(a, prefix).build(),
        };
        if address.is_ipv6() {
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        self.push(format!("add address {address}/{prefix} to link {link}"), Message::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE, &[])
    }

    /// Adds a default route.
    pub fn add_default_route(self, link: u32, gateway: IpAddr) -> Self {
        let route = match gateway {
            IpAddr::V4(a) => RouteMessageBuilder::<Ipv4Addr>::new().gateway(a).output_interface(link).build(),
            IpAddr::V6(a) => RouteMessageBuilder::<Ipv6Addr>::new().gateway(a).output_interface(link).build(),
        };
        self.push(format!("add default route by {gateway}"), Message::NewRoute(route), NLM_F_CREATE | NLM_F_EXCL, &[])
    }

    fn push(mut self, what: String, message: Message, flags: u16, fine: &'static [i32]) -> Self {
        self.steps.push(Step { what, message, flags, fine });
        self
    }
}

/// An rtnetlink socket.
pub struct Rtnl(Socket);

impl Rtnl {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// When descriptors have run out.
    pub fn open() -> Result<Self> {
        Socket::open(NETLINK_ROUTE).map(Self)
    }

    /// Runs all requests of `batch`.
    ///
    /// # Errors
    /// The first refusal, with the kernel's words.
    pub fn run(&mut self, batch: Batch) -> Result<()> {
        let count = u32::try_from(batch.steps.len()).unwrap_or(u32::MAX);
        let first = self.0.sequence(count);
        let mut bytes = Vec::with_capacity(1024);
        let mut steps = Vec::with_capacity(batch.steps.len());
        for (number, step) in (first..).zip(batch.steps) {
            append(&mut bytes, step.message, step.flags, number);
            steps.push((step.what, step.fine));
        }
        let refusals = self.0.transact(&bytes, steps.len(), |_, _| {})?;
        for refusal in refusals {
            let Some((what, fine)) = steps.get(refusal.sequence.wrapping_sub(first) as usize) else { continue };
            if !fine.contains(&refusal.errno) {
                return Err(refusal.into_error(what));
            }
        }
        Ok(())
    }

    /// The link of this name, if there is one.
    ///
    /// # Errors
    /// When the kernel refuses for another reason, or answers what cannot be read.
    pub fn link(&mut self, name: &str) -> Result<Option<LinkMessage>> {
        let number = self.0.sequence(1);
        let mut bytes = Vec::with_capacity(64);
        append(&mut bytes, Message::GetLink(LinkUnspec::new_with_name(name).build()), 0, number);
        let mut found = None;
        let refusals = self.0.transact(&bytes, 1, |kind, payload| found = parse_link(kind, payload))?;
        match refusals.into_iter().next() {
            None => found.map(Some).ok_or_else(|| Error::internal(format!("read link {name}: answer cannot be read"))),
            Some(Refusal { errno: libc::ENODEV, .. }) => Ok(None),
            Some(refusal) => Err(refusal.into_error(&format!("read link {name}"))),
        }
    }

    /// Waits until packets pass the link of this name. An interface that was brought up drops what it is given until the kernel's
    /// link watch has run, which on a busy machine is milliseconds later; whoever connects meanwhile waits a second for TCP to try
    /// again. Since Linux 6.8 asking for a link runs the watch for it, so that the first answer is the last; older kernels
    /// are asked until it has run by itself.
    ///
    /// # Errors
    /// `NotFound` when there is none; `DeadlineExceeded` when it does not carry within [`CARRIER`].
    pub fn carrying(&mut self, name: &str) -> Result<()> {
        let deadline = Instant::now() + CARRIER;
        loop {
            let link = self.link(name)?.ok_or_else(|| Error::not_found(format!("link {name}")))?;
            let state = link.attributes.iter().find_map(|a| match a {
                LinkAttribute::OperState(state) => Some(*state),
                _ => None,
            });
            // Links that do not tell are never waited for: the kernel uses them at once.
            if matches!(state, Some(LinkState::Up | LinkState::Unknown) | None) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::new(Kind::DeadlineExceeded, format!("wait for link {name} to carry: it is {state:?}")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Index of the link of this name.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn index(&mut self, name: &str) -> Result<u32> {
        self.link(name)?.map(|l| l.header.index).ok_or_else(|| Error::not_found(format!("link {name}")))
    }
}

/// Brings up the loopback of the namespace that `inside` speaks to.
///
/// # Errors
/// The kernel's refusal.
pub fn loopback_up(inside: &mut Rtnl) -> Result<()> {
    inside.run(Batch::default().link_up("lo", LOOPBACK))
}

/// The kind (`bridge`, `veth`) of a link.
pub fn link_kind(link: &LinkMessage) -> Option<String> {
    use rtnetlink::packet_route::link::LinkInfo;
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|i| match i {
            LinkInfo::Kind(kind) => Some(kind.to_string()),
            _ => None,
        }),
        _ => None,
    })
}

/// The errno below a refusal.
pub fn errno(error: &Error) -> Option<i32> {
    error.source.as_ref().and_then(|s| s.downcast_ref::<std::io::Error>()).and_then(std::io::Error::raw_os_error)
}

fn append(bytes: &mut Vec<u8>, message: Message, flags: u16, number: u32) {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    message.header.sequence_number = number;
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + super::netlink::align(message.buffer_len()), 0);
    if let Some(room) = bytes.get_mut(start..) {
        message.serialize(room);
    }
}

fn parse_link(kind: u16, payload: &[u8]) -> Option<LinkMessage> {
    let mut bytes = Vec::with_capacity(super::netlink::HEADER + payload.len());
    bytes.extend(u32::try_from(super::netlink::HEADER + payload.len()).ok()?.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend([0; 10]);
    bytes.extend(payload);
    match NetlinkMessage::<Message>::deserialize(&bytes).ok()?.payload {
        NetlinkPayload::InnerMessage(Message::NewLink(link)) => Some(link),
        _ => None,
    }
}
