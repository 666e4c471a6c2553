//! The bridge and its ports as netlink requests.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkUnspec, LinkVeth};

use super::Config;
use crate::model::error::{Act, Error, Kind, Result};
use crate::network::rtnl::{self, Batch, LOOPBACK, Rtnl, link_kind};
use crate::network::subnet::Subnet;

/// Name of the pod's interface inside.
pub const INSIDE: &str = "eth0";
/// How long the kernel may take to listen for neighbours; what delays it is the work queue of a busy machine.
const JOIN: Duration = Duration::from_secs(5);
/// Name of the host-side interface of the pod with this (first) address: `mc0a580002` for 10.88.0.2. By the address and not by
/// the pod, so that an interface that outlived its pod cannot be missed when the address is leased again.
pub fn host_name(address: IpAddr) -> String {
    let [.., a, b, c, d] = hardware(address);
    format!("mc{a:02x}{b:02x}{c:02x}{d:02x}")
}

/// Makes the bridge unless it exists, gives it the gateway addresses and brings it up. Returns its index.
///
/// # Errors
/// `FailedPrecondition` when a link of that name is no bridge.
pub fn ensure_bridge(host: &mut Rtnl, config: &Config, subnets: &[Subnet]) -> Result<u32> {
    let name = config.bridge.as_str();
    // A fixed hardware address: otherwise the bridge takes that of its lowest port and changes it as pods come and go.
    let mut link = LinkBridge::new(name).up();
    if let Some(subnet) = subnets.first() {
        link = link.address(hardware(subnet.gateway()).to_vec());
    }
    if config.mtu > 0 {
        link = link.mtu(config.mtu);
    }
    host.run(Batch::default().ensure_link(format!("create bridge {name}"), link.build()))?;
    let found = host.link(name)?.ok_or_else(|| Error::not_found(format!("bridge {name}")))?;
    if link_kind(&found).as_deref() != Some("bridge") {
        return Err(Error::precondition(format!("use bridge {name}: a link of that name exists and is no bridge")));
    }
    let index = found.header.index;
    let mut batch = Batch::default().link_up(name, index);
    for subnet in subnets {
        batch = batch.add_address(index, subnet.gateway(), subnet.prefix());
    }
    host.run(batch)?;
    solicitable(name, subnets.iter().map(Subnet::gateway))?;
    for family in ["ipv4", "ipv6"] {
        if subnets.iter().any(|s| s.is_ipv6() == (family == "ipv6")) {
            enable(if family == "ipv4" { "ipv4/ip_forward" } else { "ipv6/conf/all/forwarding" })?;
        }
    }
    Ok(index)
}

/// Makes the pair of interfaces: the host's in the bridge, the pod's directly in `namespace` (never in the host's).
///
/// # Errors
/// The kernel's refusal.
pub fn create_pair(host: &mut Rtnl, config: &Config, bridge: u32, namespace: BorrowedFd<'_>, address: IpAddr) -> Result<()> {
    let outside = host_name(address);
    match host.run(pair(config, bridge, namespace, address)) {
        // The address had another holder before, and something (a process in its namespace) keeps that alive. The
        // interface is not its any more.
        Err(e) if rtnl::errno(&e) == Some(libc::EEXIST) => {
            host.run(Batch::default().delete_link(&outside))?;
            host.run(pair(config, bridge, namespace, address))
        }
        other => other,
    }
}

fn pair(config: &Config, bridge: u32, namespace: BorrowedFd<'_>, address: IpAddr) -> Batch {
    let outside = host_name(address);
    let mut peer = LinkUnspec::new_with_name(INSIDE).setns_by_fd(namespace.as_raw_fd()).address(hardware(address).to_vec());
    let mut pair = LinkVeth::new(&outside, INSIDE).up().controller(bridge);
    if config.mtu > 0 {
        peer = peer.mtu(config.mtu);
        pair = pair.mtu(config.mtu);
    }
    let pair = pair.set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build()))).build();
    let batch = Batch::default().create_link(format!("create interface {outside}"), pair);
    if !config.hairpin {
        return batch;
    }
    // Index 0 and a name: the index is not known yet, and one batch is one system call.
    let mut port = LinkBridgePort::new(0).hairpin(true).build();
    port.attributes.push(LinkAttribute::IfName(outside.clone()));
    batch.set_link(format!("set hairpin mode of {outside}"), port)
}

/// Brings up the loopback and the pod's interface, with its addresses and default routes.
///
/// # Errors
/// The kernel's refusal.
pub fn configure_inside(inside: &mut Rtnl, addresses: &[(IpAddr, Subnet)]) -> Result<()> {
    let index = inside.index(INSIDE)?;
    let mut batch = Batch::default().link_up("lo", LOOPBACK).link_up(INSIDE, index);
    for (address, subnet) in addresses {
        batch = batch.add_address(index, *address, subnet.prefix()).add_default_route(index, subnet.gateway());
    }
    inside.run(batch)?;
    solicitable(INSIDE, addresses.iter().map(|(a, _)| *a))
}

/// Waits until the calling thread's namespace answers neighbours that ask for these IPv6 addresses of `link`: the kernel joins the
/// group in which they ask (RFC 4291 2.7.1) from a work queue, after it has acknowledged the address. Who asks before
/// that asks again a second later. There is no event for the join; it takes well under a millisecond on an idle machine.
///
/// # Errors
/// `DeadlineExceeded` after [`JOIN`].
fn solicitable(link: &str, addresses: impl Iterator<Item = IpAddr>) -> Result<()> {
    let groups: Vec<String> = addresses.filter_map(solicited_group).collect();
    let deadline = Instant::now() + JOIN;
    while !groups.is_empty() {
        let path = "/proc/thread-self/net/igmp6";
        let joined = std::fs::read_to_string(path).act("read", path)?;
        // Columns: index, interface, group, users, flags, timer.
        let member = |group: &String| joined.lines().map(|l| l.split_ascii_whitespace().skip(1)).any(|mut c| c.next() == Some(link) && c.next() == Some(group));
        if groups.iter().all(member) {
            break;
        }
        if Instant::now() > deadline {
            return Err(Error::new(Kind::DeadlineExceeded, format!("wait for link {link} to join {groups:?}")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The solicited-node group of an IPv6 address, as the kernel prints it.
fn solicited_group(address: IpAddr) -> Option<String> {
    let IpAddr::V6(v6) = address else { return None };
    let [.., a, b, c] = v6.octets();
    Some(format!("ff0200000000000000000001ff{a:02x}{b:02x}{c:02x}"))
}

/// A locally administered hardware address made from an IP address: when an address is leased again, neighbours that remember
/// its last holder are not wrong.
fn hardware(address: IpAddr) -> [u8; 6] {
    let [a, b, c, d] = match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => {
            let [.., a, b, c, d] = v6.octets();
            [a, b, c, d]
        }
    };
    [0x02, 0x6d, a, b, c, d]
}

/// Switches a kernel parameter below `net` on, unless it is. What it was before is not put back: others may rely on it by then.
///
/// # Errors
/// I/O errors with the path.
pub fn enable(name: &str) -> Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    if std::fs::read(&path).is_ok_and(|now| now.first() != Some(&b'0')) {
        return Ok(());
    }
    std::fs::write(&path, "1").act("write 1 to", path.display())
}
