//! Who has which address. Kept in memory, rebuilt from the pods' records at start; one daemon per tree is assured by its lock.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use crate::model::PodId;
use crate::model::error::{Error, Kind, Result};
use crate::network::subnet::Subnet;

/// Address leases of all pods.
#[derive(Debug, Default)]
pub struct Leases {
    pools: Vec<Pool>,
    used: HashSet<IpAddr>,
    by_pod: HashMap<PodId, Vec<IpAddr>>,
}

#[derive(Debug)]
struct Pool {
    subnet: Subnet,
    /// Offset at which the next search starts: one behind the last lease, so that a freed address rests as long as possible and
    /// late packets for a dead pod do not reach a new one.
    next: u128,
}

/// First offset that pods get: 0 names the network, 1 is the gateway.
const FIRST: u128 = 2;

impl Leases {
    /// No leases yet, addresses from `subnets` (one per family).
    pub fn new(subnets: &[Subnet]) -> Self {
        let mut leases = Self::default();
        leases.set_subnets(subnets);
        leases
    }

    /// Takes new leases from `subnets` from now on. Old ones stay as they are.
    pub fn set_subnets(&mut self, subnets: &[Subnet]) {
        self.pools = subnets.iter().map(|&subnet| Pool { subnet, next: FIRST }).collect();
        let used: Vec<IpAddr> = self.used.iter().copied().collect();
        for address in used {
            self.move_behind(address);
        }
    }

    /// Where addresses come from.
    pub fn subnets(&self) -> Vec<Subnet> {
        self.pools.iter().map(|p| p.subnet).collect()
    }

    /// Remembers leases that a record holds.
    pub fn restore(&mut self, pod: &PodId, addresses: &[IpAddr]) {
        self.used.extend(addresses);
        self.by_pod.insert(pod.clone(), addresses.to_vec());
        for &address in addresses {
            self.move_behind(address);
        }
    }

    /// Leases one address of each subnet.
    ///
    /// # Errors
    /// `AlreadyExists` when the pod holds some, `ResourceExhausted` when a subnet is full.
    pub fn lease(&mut self, pod: &PodId) -> Result<Vec<(IpAddr, Subnet)>> {
        if self.by_pod.contains_key(pod) {
            return Err(Error::new(Kind::AlreadyExists, format!("lease addresses for pod {pod}: it has some")));
        }
        let mut taken = Vec::with_capacity(self.pools.len());
        for pool in &mut self.pools {
            let Some(address) = pool.take(&self.used) else {
                return Err(Error::new(Kind::ResourceExhausted, format!("lease an address of {}: all are in use", pool.subnet)));
            };
            taken.push((address, pool.subnet));
        }
        self.used.extend(taken.iter().map(|(a, _)| a));
        self.by_pod.insert(pod.clone(), taken.iter().map(|(a, _)| *a).collect());
        Ok(taken)
    }

    /// Frees the pod's addresses; fine when it has none.
    pub fn release(&mut self, pod: &PodId) {
        for address in self.by_pod.remove(pod).unwrap_or_default() {
            self.used.remove(&address);
        }
    }

    /// Whether no pod holds an address.
    pub fn is_empty(&self) -> bool {
        self.by_pod.is_empty()
    }

    /// Pods that hold addresses.
    pub fn pods(&self) -> impl Iterator<Item = &PodId> {
        self.by_pod.keys()
    }

    fn move_behind(&mut self, address: IpAddr) {
        for pool in &mut self.pools {
            if let Some(offset) = pool.subnet.offset(address) {
                pool.next = pool.next.max(offset + 1);
            }
        }
    }
}

impl Pool {
    fn take(&mut self, used: &HashSet<IpAddr>) -> Option<IpAddr> {
        // The last address of an IPv4 subnet is its broadcast address; leaving it out of IPv6 too costs nothing.
        let end = self.subnet.last();
        let mut offset = self.next;
        // One more than all that can be in use (as many as there are leases, or the whole subnet).
        let tries = (used.len() as u128 + 1).min(end - FIRST) + 1;
        for _ in 0..tries {
            if offset >= end {
                offset = FIRST;
            }
            let address = self.subnet.nth(offset);
            offset += 1;
            if !used.contains(&address) {
                self.next = offset;
                return Some(address);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(n: usize) -> PodId {
        PodId::from_string(format!("p{n}"))
    }

    fn first(leases: &mut Leases, n: usize) -> Result<String> {
        leases.lease(&pod(n)).map(|l| l[0].0.to_string())
    }

    #[test]
    fn freed_addresses_come_back_last_and_full_is_an_error() {
        let mut leases = Leases::new(&["10.0.0.0/29".parse().unwrap()]);
        let all: Vec<String> = (0..5).map(|n| first(&mut leases, n).unwrap()).collect();
        assert_eq!(all, ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        let full = first(&mut leases, 9).unwrap_err();
        assert_eq!(full.kind, Kind::ResourceExhausted);
        leases.release(&pod(3));
        leases.release(&pod(0));
        assert_eq!(first(&mut leases, 10).unwrap(), "10.0.0.2");
        assert_eq!(first(&mut leases, 11).unwrap(), "10.0.0.5");
        assert_eq!(first(&mut leases, 11).unwrap_err().kind, Kind::AlreadyExists);
    }

    #[test]
    fn restored_leases_are_not_given_again() {
        let mut leases = Leases::new(&["10.0.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()]);
        leases.restore(&pod(0), &["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]);
        leases.restore(&pod(1), &["10.0.0.7".parse().unwrap()]);
        let taken = leases.lease(&pod(2)).unwrap();
        assert_eq!(taken[0].0.to_string(), "10.0.0.8");
        assert_eq!(taken[1].0.to_string(), "fd00::3");
        // A change of range keeps what is held and avoids it where the ranges overlap.
        leases.set_subnets(&["10.0.0.0/28".parse().unwrap()]);
        assert_eq!(first(&mut leases, 3).unwrap(), "10.0.0.9");
    }

    #[test]
    fn a_half_failed_lease_takes_nothing() {
        let mut leases = Leases::new(&["fd00::/64".parse().unwrap(), "10.0.0.0/30".parse().unwrap()]);
        leases.lease(&pod(0)).unwrap();
        assert!(leases.lease(&pod(1)).is_err());
        assert_eq!(leases.used.len(), 2);
        assert_eq!(leases.pods().count(), 1);
        leases.release(&pod(0));
        assert!(leases.is_empty() && leases.used.is_empty());
        leases.lease(&pod(1)).unwrap();
    }
}
