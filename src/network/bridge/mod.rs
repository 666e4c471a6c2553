//! The built-in network: a bridge on the host, one interface pair per pod, addresses from a subnet, masquerading and ports on the
//! host by nftables. No process is started for any of it.
//!
//! One thread does a whole attach: it opens a netlink socket on the host, leaves for the new namespace, opens a second socket
//! there, and so reaches both sides. Kernel state is made only after the pod's record is on disk.
//!
//! The bridge and the nftables table stay when the last pod goes, unless `cleanup_when_idle`; `mesocri network prune` removes
//! them. IP forwarding is switched on and not off again: others on the host may rely on it by then.

mod ipam;
mod link;
mod ports;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use self::ipam::Leases;
use self::ports::Ports;
use super::nft::{Nft, Plan};
use super::record::{Lease, Record, Records};
use super::rtnl::{Batch, Rtnl};
use super::subnet::Subnet;
use super::{Attachment, netns};
use crate::disk::Layout;
use crate::disk::record::{self as file, Durability};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::{PodId, PodSpec};

/// Name in [`Attachment::network`].
pub const NAME: &str = "mesocri";

/// The built-in bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of the bridge, at most 15 bytes.
    pub bridge: String,
    /// Where addresses come from: one subnet, or one of each family. The first address of each is the gateway. The range that
    /// the kubelet gives (UpdateRuntimeConfig) goes before these.
    pub subnets: Vec<Subnet>,
    /// Bytes of the largest packet; 0 leaves the kernel's default.
    pub mtu: u32,
    /// Pods reach the outside world by the host's address.
    pub ip_masq: bool,
    /// A pod may reach itself by way of the bridge (by its service's or host port's address).
    pub hairpin: bool,
    /// Removes bridge and nftables table when the last pod goes. Costs the next pod their making.
    pub cleanup_when_idle: bool,
}

impl Default for Config {
    fn default() -> Self {
        let subnet = "10.88.0.0/16".parse::<Subnet>();
        Self { bridge: "mesocri0".into(), subnets: subnet.into_iter().collect(), mtu: 0, ip_masq: true, hairpin: true, cleanup_when_idle: false }
    }
}

/// The built-in bridge network.
#[derive(Clone)]
pub struct Bridge(Arc<Inner>);

struct Inner {
    config: Config,
    layout: Layout,
    records: Records,
    leases: Mutex<Leases>,
    ports: Mutex<Ports>,
    made: Mutex<Made>,
}

/// What is on the host by our doing. The lock is held while that changes.
#[derive(Default)]
struct Made {
    /// Index of the bridge.
    bridge: Option<u32>,
    /// The nftables table is up to date.
    table: bool,
    /// Host ports work for 127.0.0.1.
    localnet: bool,
}

/// Sockets that speak to the host's network, wherever the thread that holds them goes.
struct Host {
    rtnl: Rtnl,
    /// Opened when first needed, which is before a thread leaves for a new namespace.
    nft: Option<Nft>,
}

impl Host {
    fn open() -> Result<Self> {
        Ok(Self { rtnl: Rtnl::open()?, nft: None })
    }

    fn nft(&mut self) -> Result<&mut Nft> {
        let nft = match self.nft.take() {
            Some(nft) => nft,
            None => Nft::open()?,
        };
        Ok(self.nft.insert(nft))
    }
}

impl Bridge {
    /// Opens the network: checks the configuration and reads the leases. Touches no kernel state.
    ///
    /// # Errors
    /// `InvalidArgument` on a bad configuration, I/O errors.
    pub fn open(config: Config, layout: Layout, records: Records, all: &[(PodId, Record)]) -> Result<Self> {
        if config.bridge.is_empty() || config.bridge.len() > 15 || config.bridge.contains(['/', ' ']) {
            return Err(Error::invalid(format!("network.bridge.bridge: {:?} is no name of a link", config.bridge)));
        }
        let subnets = match file::read::<Vec<Subnet>>(&layout.pod_cidr()) {
            Ok(given) => given,
            Err(e) if matches!(e.kind, Kind::NotFound | Kind::DataLoss) => config.subnets.clone(),
            Err(e) => return Err(e),
        };
        check_subnets(&subnets)?;
        let mut leases = Leases::new(&subnets);
        let mut ports = Ports::default();
        for (pod, record) in all {
            if let Record::Bridge(lease) = record {
                leases.restore(pod, &lease.addresses);
                ports.restore(pod, ports::forwards(&lease.ports, &lease.addresses)?);
            }
        }
        let (leases, ports, made) = (Mutex::new(leases), Mutex::new(ports), Mutex::default());
        Ok(Self(Arc::new(Inner { config, layout, records, leases, ports, made })))
    }

    /// Attaches a pod, see [`super::Network::attach`].
    ///
    /// # Errors
    /// What failed; everything is undone then.
    pub async fn attach(&self, pod: &PodId, spec: &PodSpec) -> Result<Attachment> {
        let (inner, pod, spec) = (self.0.clone(), pod.clone(), spec.clone());
        netns::on_thread(move || inner.attach(&pod, &spec)).await
    }

    /// Detaches a pod, see [`super::Network::detach`].
    ///
    /// # Errors
    /// What could not be removed.
    pub async fn detach(&self, pod: &PodId) -> Result<()> {
        let (inner, pod) = (self.0.clone(), pod.clone());
        crate::stdx::blocking::run("detach pod from bridge", move || inner.detach(&mut Host::open()?, &pod)).await
    }

    /// Leases come from `subnets` from now on, also after a restart. Pods that run keep their addresses, and the bridge
    /// keeps the gateway they use.
    ///
    /// # Errors
    /// `InvalidArgument` when there are two of one family.
    pub async fn set_subnets(&self, subnets: Vec<Subnet>) -> Result<()> {
        check_subnets(&subnets)?;
        let inner = self.0.clone();
        crate::stdx::blocking::run("set pod subnets", move || {
            let mut made = lock(&inner.made);
            if lock(&inner.leases).subnets() == subnets {
                return Ok(());
            }
            file::write(&inner.layout.pod_cidr(), &subnets, Durability::Synced)?;
            lock(&inner.leases).set_subnets(&subnets);
            // The next attach gives the bridge its new address and the table its new rules.
            *made = Made::default();
            Ok(())
        })
        .await
    }

    /// Removes bridge and table, if no pod is attached.
    ///
    /// # Errors
    /// `FailedPrecondition` when pods are attached.
    pub async fn teardown(&self) -> Result<()> {
        let inner = self.0.clone();
        crate::stdx::blocking::run("remove bridge", move || {
            if inner.remove_if_idle(&mut Host::open()?)? {
                return Ok(());
            }
            let pods: Vec<String> = lock(&inner.leases).pods().map(|p| p.short().to_owned()).collect();
            Err(Error::precondition(format!("remove bridge {}: pods are attached: {}", inner.config.bridge, pods.join(", "))))
        })
        .await
    }
}

impl Inner {
    fn attach(&self, pod: &PodId, spec: &PodSpec) -> Result<Attachment> {
        // Opened before this thread leaves for the new namespace: whatever comes, these sockets speak to the host.
        let mut host = Host::open()?;
        let addresses = lock(&self.leases).lease(pod)?;
        let made = self.record(pod, spec, &addresses).and_then(|()| self.make(&mut host, pod, &addresses));
        let Err(e) = made else {
            return Ok(Attachment { ips: addresses.iter().map(|(a, _)| a.to_string()).collect(), network: NAME.into(), result: None });
        };
        // A pin that was there before us is not ours to remove.
        let undone = if e.kind == Kind::AlreadyExists { self.forget(&mut host, pod) } else { self.detach(&mut host, pod) };
        match undone {
            Ok(()) => Err(e),
            // The record is still there: detach or recovery goes on from it.
            Err(undo) => Err(e.within(format!("attach pod {pod} (undoing it failed as well: {undo})"))),
        }
    }

    /// Takes the host ports and writes the record.
    fn record(&self, pod: &PodId, spec: &PodSpec, leased: &[(IpAddr, Subnet)]) -> Result<()> {
        let addresses: Vec<IpAddr> = leased.iter().map(|(a, _)| *a).collect();
        let ports: Vec<_> = spec.port_mappings.iter().filter(|m| m.host_port > 0).cloned().collect();
        lock(&self.ports).take(pod, ports::forwards(&ports, &addresses)?)?;
        self.records.put(pod, &Record::Bridge(Lease { addresses, ports }))
    }

    /// The kernel's part: rules, namespace, interfaces, addresses.
    fn make(&self, host: &mut Host, pod: &PodId, addresses: &[(IpAddr, Subnet)]) -> Result<()> {
        let bridge = self.ensure_host(host, pod)?;
        let pin = self.layout.netns(pod);
        netns::unshare_and_pin(&pin)?;
        let mut inside = Rtnl::open()?;
        let namespace = std::fs::File::open(&pin).act("open", pin.display())?;
        let first = addresses.first().map(|(a, _)| *a).ok_or_else(|| Error::internal("bridge has no subnet"))?;
        link::create_pair(&mut host.rtnl, &self.config, bridge, namespace.as_fd(), first)?;
        link::configure_inside(&mut inside, addresses)?;
        host.rtnl.carrying(&link::host_name(first))?;
        host.rtnl.carrying(&self.config.bridge)?;
        inside.carrying(link::INSIDE)
    }

    /// Bridge, table and the pod's host ports. Returns the index of the bridge.
    fn ensure_host(&self, host: &mut Host, pod: &PodId) -> Result<u32> {
        let mut made = lock(&self.made);
        let name = self.config.bridge.as_str();
        let index = match made.bridge {
            // Asked each time (20 µs), because someone may have removed it behind our back.
            Some(index) if host.rtnl.link(name)?.is_some_and(|l| l.header.index == index) => index,
            _ => {
                made.localnet = false;
                let subnets = lock(&self.leases).subnets();
                link::ensure_bridge(&mut host.rtnl, &self.config, &subnets)?
            }
        };
        made.bridge = Some(index);
        let forwards = lock(&self.ports).of(pod);
        // A table that went behind our back (`nft flush ruleset`) is noticed and made again when a pod has host ports.
        if !made.table || (!forwards.is_empty() && !host.nft()?.add(name, &forwards)?) {
            let subnets = lock(&self.leases).subnets();
            let plan = Plan { bridge: name, subnets: &subnets, masquerade: self.config.ip_masq };
            let all = lock(&self.ports).all();
            host.nft()?.install(&plan, &all)?;
            made.table = true;
        }
        if !made.localnet && forwards.iter().any(|f| !f.target.is_ipv6()) {
            // Only behind the table's guard.
            link::enable(&format!("ipv4/conf/{name}/route_localnet"))?;
            made.localnet = true;
        }
        Ok(index)
    }

    /// Unpins the namespace; its end of the interface pair goes with it and takes the host's along. Asking for that explicitly
    /// would wait 30 ms for the kernel's grace periods, which it otherwise spends once for many namespaces and behind our back.
    fn detach(&self, host: &mut Host, pod: &PodId) -> Result<()> {
        netns::remove(&self.layout.netns(pod))?;
        self.forget(host, pod)
    }

    /// Frees ports and addresses.
    fn forget(&self, host: &mut Host, pod: &PodId) -> Result<()> {
        let forwards = lock(&self.ports).of(pod);
        if !forwards.is_empty() {
            host.nft()?.remove(&self.config.bridge, &forwards)?;
        }
        self.records.remove(pod)?;
        lock(&self.ports).release(pod);
        lock(&self.leases).release(pod);
        if self.config.cleanup_when_idle {
            self.remove_if_idle(host)?;
        }
        Ok(())
    }

    /// Removes bridge and table if no pod holds a lease; says whether it did.
    fn remove_if_idle(&self, host: &mut Host) -> Result<bool> {
        // An attach leases first and then takes this lock, so a bridge is never removed under it.
        let mut made = lock(&self.made);
        if !lock(&self.leases).is_empty() {
            return Ok(false);
        }
        *made = Made::default();
        host.nft()?.delete(&self.config.bridge)?;
        host.rtnl.run(Batch::default().delete_link(&self.config.bridge))?;
        Ok(true)
    }
}

fn check_subnets(subnets: &[Subnet]) -> Result<()> {
    let v6 = subnets.iter().filter(|s| s.is_ipv6()).count();
    if subnets.is_empty() || v6 > 1 || subnets.len() - v6 > 1 {
        return Err(Error::invalid(format!("pod subnets: one, or one of each family, not {}", subnets.len())));
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in these sections can leave half a value behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
