//! Packet rules of the built-in bridge: one nftables table, written over netlink, no program is run.
//!
//! ```text
//! table inet <bridge> {
//!   map ports4    { proto . port -> address . port }          host ports on all addresses
//!   map ports4_at { address . proto . port -> address . port } host ports on one address (ports6, ports6_at alike)
//!   chain prerouting, output   to an address of this host: look up both maps, translate
//!   chain postrouting          from a pod to elsewhere, to a pod by a host port, to a pod from 127.0.0.1: masquerade
//!   chain guard                from a pod to 127.0.0.0/8: drop
//! }
//! ```
//!
//! Host ports are map elements, so a pod's come and go without touching a rule, and lookup time does not grow. The guard is
//! what makes `route_localnet` (needed for 127.0.0.1:port) safe: without it pods could reach services that
//! listen on the host's loopback only.
//!
//! The whole table is replaced in one transaction when the daemon first needs it; established connections do not notice.

mod message;
mod rule;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv6Addr};

use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use self::message::{Attributes, Batch, CREATE, DELETE_ELEMENT, DELETE_TABLE, NEW_CHAIN, NEW_ELEMENT, NEW_RULE, NEW_SET, NEW_TABLE};
use self::rule::{Base, Meta, Rule};
use super::netlink::{Refusal, Socket};
use super::subnet::Subnet;
use crate::model::error::Result;
use crate::model::pod::Protocol;

const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const POSTROUTING: &str = "postrouting";
const GUARD: &str = "guard";
/// Chains: name, type, hook number, priority (those that nft calls dstnat, srcnat and raw).
const CHAINS: [(&str, &str, u32, i32); 4] = [(PREROUTING, "nat", 0, -100), (OUTPUT, "nat", 3, -100), (POSTROUTING, "nat", 4, 100), (GUARD, "filter", 0, -300)];

/// What the table is made of, apart from host ports.
pub struct Plan<'a> {
    /// Name of the bridge and of the table.
    pub bridge: &'a str,
    /// Where pods' addresses are from.
    pub subnets: &'a [Subnet],
    /// Pods leave with the host's address.
    pub masquerade: bool,
}

/// A port of the host that leads to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Transport.
    pub protocol: Protocol,
    /// The host's address; none is all of the target's family.
    pub host_ip: Option<IpAddr>,
    /// The host's port.
    pub host_port: u16,
    /// The pod's address.
    pub target: IpAddr,
    /// The pod's port.
    pub port: u16,
}

/// A socket to nf_tables.
pub struct Nft(Socket);

impl Nft {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel has no nf_tables.
    pub fn open() -> Result<Self> {
        Socket::open(NETLINK_NETFILTER).map(Self)
    }

    /// Makes or replaces the table, with these host ports.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn install(&mut self, plan: &Plan<'_>, forwards: &[Forward]) -> Result<()> {
        let table = plan.bridge;
        let mut batch = Batch::new(&mut self.0);
        // Made first, because one that is not there cannot be deleted.
        for (message, flags) in [(NEW_TABLE, CREATE), (DELETE_TABLE, 0), (NEW_TABLE, CREATE)] {
            batch.add(message, flags, |a| {
                a.name(1, table);
            });
        }
        for map in &MAPS {
            map.create(&mut batch, table);
        }
        for (name, kind, hook, priority) in CHAINS {
            batch.add(NEW_CHAIN, CREATE, |a| {
                a.name(1, table).name(3, name).name(7, kind);
                a.nested(4, |h| {
                    h.number(1, hook).number(2, priority.cast_unsigned());
                });
            });
        }
        for (chain, rule) in rules(plan) {
            batch.add(NEW_RULE, CREATE | APPEND, |a| {
                a.name(1, table).name(2, chain).nested(4, |list| rule.write(list));
            });
        }
        for forward in forwards {
            element(&mut batch, NEW_ELEMENT, table, forward);
        }
        told(batch.commit()?, &format!("make nftables table {table}"))
    }

    /// Adds host ports. `false`: there is no such table (any more), nothing was done.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn add(&mut self, table: &str, forwards: &[Forward]) -> Result<bool> {
        let refusal = self.elements(NEW_ELEMENT, table, forwards)?;
        if refusal.as_ref().is_some_and(|r| r.errno == libc::ENOENT) {
            return Ok(false);
        }
        told(refusal, &format!("add host ports to nftables table {table}")).map(|()| true)
    }

    /// Removes host ports; those that are not there are fine.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn remove(&mut self, table: &str, forwards: &[Forward]) -> Result<()> {
        if self.elements(DELETE_ELEMENT, table, forwards)?.is_none() {
            return Ok(());
        }
        // A transaction fails as a whole if one element is missing: one by one then.
        for forward in forwards {
            let refusal = self.elements(DELETE_ELEMENT, table, std::slice::from_ref(forward))?;
            told(refusal.filter(|r| r.errno != libc::ENOENT), &format!("remove host port {} from nftables table {table}", forward.host_port))?;
        }
        Ok(())
    }

    /// Removes the table; fine when there is none.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete(&mut self, table: &str) -> Result<()> {
        let mut batch = Batch::new(&mut self.0);
        batch.add(DELETE_TABLE, 0, |a| {
            a.name(1, table);
        });
        told(batch.commit()?.filter(|r| r.errno != libc::ENOENT), &format!("delete nftables table {table}"))
    }

    fn elements(&mut self, message: u16, table: &str, forwards: &[Forward]) -> Result<Option<Refusal>> {
        if forwards.is_empty() {
            return Ok(None);
        }
        let mut batch = Batch::new(&mut self.0);
        for forward in forwards {
            element(&mut batch, message, table, forward);
        }
        batch.commit()
    }
}

/// `NLM_F_APPEND`: behind the rules that are there.
const APPEND: u16 = 0x800;
/// Names of nft's data types, for its listings only: the kernel sees bytes.
const ADDRESS4: u32 = 7;
const ADDRESS6: u32 = 8;
const PROTOCOL: u32 = 12;
const PORT: u32 = 13;

/// A map of host ports. Fields are padded to 4 bytes each.
struct Map {
    name: &'static str,
    key: &'static [(u32, u32)],
    value: &'static [(u32, u32)],
}

/// All maps: v4, v4 with host address, v6, v6 with host address.
const MAPS: [Map; 4] = [
    Map { name: "ports4", key: &[(PROTOCOL, 4), (PORT, 4)], value: &[(ADDRESS4, 4), (PORT, 4)] },
    Map { name: "ports4_at", key: &[(ADDRESS4, 4), (PROTOCOL, 4), (PORT, 4)], value: &[(ADDRESS4, 4), (PORT, 4)] },
    Map { name: "ports6", key: &[(PROTOCOL, 4), (PORT, 4)], value: &[(ADDRESS6, 16), (PORT, 4)] },
    Map { name: "ports6_at", key: &[(ADDRESS6, 16), (PROTOCOL, 4), (PORT, 4)], value: &[(ADDRESS6, 16), (PORT, 4)] },
];

impl Map {
    /// The map that holds `forward`.
    fn of(forward: &Forward) -> &'static Map {
        let [v4, v4_at, v6, v6_at] = &MAPS;
        match (forward.target.is_ipv6(), forward.host_ip.is_some()) {
            (false, false) => v4,
            (false, true) => v4_at,
            (true, false) => v6,
            (true, true) => v6_at,
        }
    }

    fn create(&self, batch: &mut Batch<'_>, table: &str) {
        const IS_MAP: u32 = 8;
        // nft writes a concatenation as six bits per type.
        let kind = |fields: &[(u32, u32)]| fields.iter().fold(0, |all, (kind, _)| all << 6 | kind);
        let length = |fields: &[(u32, u32)]| fields.iter().map(|(_, bytes)| bytes).sum::<u32>();
        batch.add(NEW_SET, CREATE, |a| {
            a.name(1, table).name(2, self.name).number(3, IS_MAP).number(4, kind(self.key)).number(5, length(self.key));
            a.number(6, kind(self.value)).number(7, length(self.value)).number(10, 1);
        });
    }
}

fn element(batch: &mut Batch<'_>, message: u16, table: &str, forward: &Forward) {
    let mut key = Vec::with_capacity(24);
    if let Some(address) = forward.host_ip {
        key.extend(octets(address));
    }
    key.extend([number(forward.protocol), 0, 0, 0]);
    key.extend(forward.host_port.to_be_bytes());
    key.extend([0; 2]);
    let mut value = octets(forward.target);
    value.extend(forward.port.to_be_bytes());
    value.extend([0; 2]);
    let data = |a: &mut Attributes, kind: u16, bytes: &[u8]| {
        a.nested(kind, |d| {
            d.bytes(1, bytes);
        });
    };
    batch.add(message, CREATE, |a| {
        a.name(1, table).name(2, Map::of(forward).name).nested(3, |list| {
            list.nested(1, |element| {
                data(element, 1, &key);
                if message == NEW_ELEMENT {
                    data(element, 2, &value);
                }
            });
        });
    });
}

/// All rules with their chains, in order.
fn rules(plan: &Plan<'_>) -> Vec<(&'static str, Rule)> {
    let mut rules = vec![(GUARD, family(4).bridge(Meta::InName, plan.bridge, true).network(16, &[127, 0, 0, 0], &[255, 0, 0, 0]).drop())];
    for chain in [PREROUTING, OUTPUT] {
        for bits in [4, 6] {
            rules.extend([(chain, host_ports(bits, true)), (chain, host_ports(bits, false))]);
        }
    }
    for subnet in plan.subnets {
        let bits = if subnet.is_ipv6() { 6 } else { 4 };
        let from_pod = || family(bits).network(if bits == 4 { 12 } else { 8 }, &octets(subnet.base()), &mask(subnet));
        if plan.masquerade {
            // Not what stays on the bridge, and not multicast, whose receivers look at the source.
            let (offset, multicast, prefix) = if bits == 4 { (16, vec![0xe0, 0, 0, 0], vec![0xf0, 0, 0, 0]) } else { (24, high(0xff), high(0xff)) };
            let rule = from_pod().bridge(Meta::OutName, plan.bridge, false);
            let rule = rule.payload(Base::Network, offset, prefix.len() as u32, 0).mask(&prefix).differ(&multicast);
            rules.push((POSTROUTING, rule.masquerade()));
        }
        // From a pod to a pod (or itself) by a host port: answers must come back this way to be translated.
        rules.push((POSTROUTING, from_pod().bridge(Meta::OutName, plan.bridge, true).translated().masquerade()));
    }
    // From 127.0.0.1 by a host port: pods cannot answer to that.
    rules.push((POSTROUTING, family(4).bridge(Meta::OutName, plan.bridge, true).network(12, &[127, 0, 0, 0], &[255, 0, 0, 0]).masquerade()));
    rules
}

/// To an address of this host: looks up a map of host ports, translates.
fn host_ports(bits: u8, with_address: bool) -> Rule {
    let [v4, v4_at, v6, v6_at] = &MAPS;
    let (offset, length) = if bits == 4 { (16, 4) } else { (24, 16) };
    let mut rule = family(bits).for_this_host();
    if bits == 6 {
        // The kernel has no route_localnet for IPv6: translated packets from ::1 would vanish, untranslated ones are refused.
        rule = rule.payload(Base::Network, offset, length, 0).differ(&Ipv6Addr::LOCALHOST.octets());
    }
    let mut register = 0;
    if with_address {
        rule = rule.payload(Base::Network, offset, length, 0);
        register = length / 4;
    }
    let map = match (bits, with_address) {
        (4, false) => v4,
        (4, true) => v4_at,
        (_, false) => v6,
        (_, true) => v6_at,
    };
    let rule = rule.meta(Meta::Protocol, register).payload(Base::Transport, 2, 2, register + 1).look_up(map.name);
    rule.destination(nfproto(bits), length / 4)
}

fn family(bits: u8) -> Rule {
    Rule::default().meta(Meta::Family, 0).equal(&[nfproto(bits)])
}

impl Rule {
    /// Goes on only if the interface is (or is not) the bridge.
    fn bridge(self, key: Meta, bridge: &str, is: bool) -> Self {
        let mut name = [0u8; 16];
        name.iter_mut().zip(bridge.bytes()).for_each(|(to, from)| *to = from);
        let rule = self.meta(key, 0);
        if is { rule.equal(&name) } else { rule.differ(&name) }
    }

    /// Goes on only if the address at `offset` of the layer 3 header is in a network.
    fn network(self, offset: u32, base: &[u8], mask: &[u8]) -> Self {
        self.payload(Base::Network, offset, base.len() as u32, 0).mask(mask).equal(base)
    }
}

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
fn nfproto(bits: u8) -> u8 {
    if bits == 4 { 2 } else { 10 }
}

/// An IPv6 address or mask that begins with `byte` and has zeros behind.
fn high(byte: u8) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    bytes.splice(..1, [byte]);
    bytes
}

fn mask(subnet: &Subnet) -> Vec<u8> {
    let bits = u32::from(subnet.prefix());
    if subnet.is_ipv6() {
        (u128::MAX.checked_shl(128 - bits).unwrap_or(0)).to_be_bytes().to_vec()
    } else {
        (u32::MAX.checked_shl(32 - bits).unwrap_or(0)).to_be_bytes().to_vec()
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

fn told(refusal: Option<Refusal>, what: &str) -> Result<()> {
    refusal.map_or(Ok(()), |r| Err(r.into_error(what)))
}
