//! A range of addresses in CIDR form.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::model::error::Error;

/// A subnet: its first address is the network's name, the next is the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Subnet {
    base: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// The gateway: the address after the first.
    pub fn gateway(&self) -> IpAddr {
        self.nth(1)
    }

    /// The first address: the network itself.
    pub fn base(&self) -> IpAddr {
        self.base
    }

    /// Leading bits that all addresses share.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether the subnet is of IPv6.
    pub fn is_ipv6(&self) -> bool {
        self.base.is_ipv6()
    }

    /// The address `offset` places after the first.
    pub fn nth(&self, offset: u128) -> IpAddr {
        match self.base {
            IpAddr::V4(a) => IpAddr::V4(Ipv4Addr::from(u32::from(a).wrapping_add(offset as u32))),
            IpAddr::V6(a) => IpAddr::V6(Ipv6Addr::from(u128::from(a).wrapping_add(offset))),
        }
    }

    /// The place of `address` in the subnet, if it is in it.
    pub fn offset(&self, address: IpAddr) -> Option<u128> {
        let (base, address) = match (self.base, address) {
            (IpAddr::V4(b), IpAddr::V4(a)) => (u128::from(u32::from(b)), u128::from(u32::from(a))),
            (IpAddr::V6(b), IpAddr::V6(a)) => (u128::from(b), u128::from(a)),
            _ => return None,
        };
        let offset = address.checked_sub(base)?;
        (offset <= self.last()).then_some(offset)
    }

    /// Offset of the last address (IPv4: the broadcast address).
    pub fn last(&self) -> u128 {
        let bits = if self.is_ipv6() { 128 } else { 32 };
        match bits - u32::from(self.prefix) {
            128 => u128::MAX,
            host => (1u128 << host) - 1,
        }
    }
}

impl FromStr for Subnet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::invalid(format!("subnet {text:?}: {why}"));
        let (address, prefix) = text.split_once('/').ok_or_else(|| bad("no /prefix"))?;
        let address: IpAddr = address.parse().map_err(|_| bad("no IP address"))?;
        // u8::from_str takes a leading plus sign.
        let prefix: u8 = prefix.parse().ok().filter(|_| prefix.bytes().all(|b| b.is_ascii_digit())).ok_or_else(|| bad("prefix is no number"))?;
        let bits = if address.is_ipv6() { 128 } else { 32 };
        // Network, gateway, one pod and (IPv4) broadcast need two bits.
        if prefix > bits - 2 {
            return Err(bad("too small for a gateway and a pod"));
        }
        let host = bits - prefix;
        let base = match address {
            IpAddr::V4(a) => IpAddr::V4(Ipv4Addr::from(u32::from(a) & u32::MAX.checked_shl(u32::from(host)).unwrap_or(0))),
            IpAddr::V6(a) => IpAddr::V6(Ipv6Addr::from(u128::from(a) & u128::MAX.checked_shl(u32::from(host)).unwrap_or(0))),
        };
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl Serialize for Subnet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_masks_and_counts() {
        let s: Subnet = "10.88.3.7/16".parse().unwrap();
        assert_eq!(s.to_string(), "10.88.0.0/16");
        assert_eq!(s.gateway().to_string(), "10.88.0.1");
        assert_eq!(s.last(), 65535);
        assert_eq!(s.offset("10.88.1.0".parse().unwrap()), Some(256));
        assert_eq!(s.offset("10.89.0.0".parse().unwrap()), None);
        assert_eq!(s.offset("10.87.255.255".parse().unwrap()), None);
        let s: Subnet = "fd00:1::/64".parse().unwrap();
        assert_eq!(s.nth(0x1_0000).to_string(), "fd00:1::1:0");
        assert_eq!("0.0.0.0/0".parse::<Subnet>().unwrap().last(), u128::from(u32::MAX));
        assert_eq!("::/0".parse::<Subnet>().unwrap().last(), u128::MAX);
    }

    #[test]
    fn refuses_what_is_no_subnet() {
        for text in ["", "10.0.0.0", "10.0.0.0/31", "10.0.0/8", "10.0.0.0/33", "10.0.0.0/+8", "fd00::/127", "a/8", "10.0.0.0/8,"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }
}
