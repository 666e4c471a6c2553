//! Which host ports lead to which pod. Kept in memory, rebuilt from the pods' records at start.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::model::PodId;
use crate::model::error::{Error, Result};
use crate::model::pod::PortMapping;
use crate::network::nft::Forward;

/// Host ports of all pods.
#[derive(Debug, Default)]
pub struct Ports(HashMap<PodId, Vec<Forward>>);

impl Ports {
    /// Takes ports for a pod.
    ///
    /// # Errors
    /// `FailedPrecondition` when another pod has one of them.
    pub fn take(&mut self, pod: &PodId, forwards: Vec<Forward>) -> Result<()> {
        for forward in &forwards {
            let holder = self.0.iter().find(|(_, held)| held.iter().any(|other| overlap(forward, other)));
            if let Some((holder, _)) = holder {
                return Err(Error::precondition(format!(
                    "take host port {}/{} for pod {pod}: pod {holder} has it",
                    forward.host_port,
                    forward.protocol.name()
                )));
            }
        }
        self.restore(pod, forwards);
        Ok(())
    }

    /// Remembers ports that a record holds.
    pub fn restore(&mut self, pod: &PodId, forwards: Vec<Forward>) {
        if !forwards.is_empty() {
            self.0.insert(pod.clone(), forwards);
        }
    }

    /// The pod's ports.
    pub fn of(&self, pod: &PodId) -> Vec<Forward> {
        self.0.get(pod).cloned().unwrap_or_default()
    }

    /// Frees the pod's ports; fine when it has none.
    pub fn release(&mut self, pod: &PodId) {
        self.0.remove(pod);
    }

    /// All ports.
    pub fn all(&self) -> Vec<Forward> {
        self.0.values().flatten().cloned().collect()
    }
}

/// What the mappings of a pod with these addresses mean. Those without a host port mean nothing.
///
/// # Errors
/// `InvalidArgument`: no address, a family that the pod does not have, port 0, two meanings for one port.
pub fn forwards(mappings: &[PortMapping], addresses: &[IpAddr]) -> Result<Vec<Forward>> {
    let mut all: Vec<Forward> = Vec::new();
    for mapping in mappings.iter().filter(|m| m.host_port > 0) {
        let bad = |why: &str| Error::invalid(format!("host port {}/{} on {:?}: {why}", mapping.host_port, mapping.protocol.name(), mapping.host_ip));
        if mapping.container_port == 0 {
            return Err(bad("container port 0"));
        }
        let given = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| bad("no IP address"))?),
        };
        let (before, mut known) = (all.len(), false);
        for &target in addresses.iter().filter(|target| given.is_none_or(|ip| ip.is_ipv6() == target.is_ipv6())) {
            let forward = Forward {
                protocol: mapping.protocol,
                // 0.0.0.0 and :: are all addresses of their family.
                host_ip: given.filter(|ip| !ip.is_unspecified()),
                host_port: mapping.host_port,
                target,
                port: mapping.container_port,
            };
            known |= all.contains(&forward);
            if !all.contains(&forward) {
                if all.iter().any(|other| overlap(&forward, other)) {
                    return Err(bad("mapped twice"));
                }
                all.push(forward);
            }
        }
        if all.len() == before && !known {
            return Err(bad("the pod has no address of this family"));
        }
    }
    Ok(all)
}

/// Whether one packet could mean both.
fn overlap(a: &Forward, b: &Forward) -> bool {
    let address = a.host_ip.is_none() || b.host_ip.is_none() || a.host_ip == b.host_ip;
    a.protocol == b.protocol && a.host_port == b.host_port && a.target.is_ipv6() == b.target.is_ipv6() && address
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::error::Kind;
    use crate::model::pod::Protocol;

    fn map(host_ip: &str, host_port: u16, container_port: u16) -> PortMapping {
        PortMapping { protocol: Protocol::Tcp, container_port, host_port, host_ip: host_ip.into() }
    }

    fn both() -> [IpAddr; 2] {
        ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]
    }

    #[test]
    fn mappings_mean_one_forward_per_family() {
        let count = |mappings: &[PortMapping]| forwards(mappings, &both()).unwrap().len();
        assert_eq!(count(&[map("", 80, 8080)]), 2);
        assert_eq!(count(&[map("", 0, 8080)]), 0);
        assert_eq!(count(&[map("0.0.0.0", 80, 8080), map("::", 80, 81)]), 2);
        assert_eq!(count(&[map("1.2.3.4", 80, 8080), map("1.2.3.5", 80, 81)]), 2);
        assert_eq!(count(&[map("1.2.3.4", 80, 8080), map("1.2.3.4", 80, 8080), map("", 81, 1)]), 3);
        for bad in [&[map("x", 80, 80)][..], &[map("", 80, 0)], &[map("1.2.3.4", 80, 80), map("", 80, 81)]] {
            assert_eq!(forwards(bad, &both()).unwrap_err().kind, Kind::InvalidArgument);
        }
        assert!(forwards(&[map("::1", 80, 80)], &both()[..1]).unwrap_err().to_string().contains("no address of this family"));
    }

    #[test]
    fn a_port_has_one_pod() {
        let (a, b) = (PodId::from_string("a"), PodId::from_string("b"));
        let mut ports = Ports::default();
        let one = |ip: &str| forwards(&[map(ip, 80, 80)], &both()).unwrap();
        ports.take(&a, one("1.2.3.4")).unwrap();
        let error = ports.take(&b, one("")).unwrap_err();
        assert_eq!((error.kind, error.to_string().as_str()), (Kind::FailedPrecondition, "take host port 80/tcp for pod b: pod a has it"));
        ports.take(&b, one("1.2.3.5")).unwrap();
        ports.release(&a);
        ports.release(&b);
        ports.take(&b, one("")).unwrap();
        assert_eq!(ports.all().len(), 2);
    }
}
