//! Chooses the network of each new pod, and finds the one that attached an old pod.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;

use super::bridge::Bridge;
use super::cni::Cni;
use super::cni::conf::{Found, List};
use super::record::{Record, Records};
use super::rtnl::Rtnl;
use super::subnet::Subnet;
use super::{Attachment, Choice, Config, Network, Readiness, netns, rtnl};
use crate::disk::Layout;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::pod::NamespaceMode;
use crate::model::stats::InterfaceStats;
use crate::model::{PodId, PodSpec};
use crate::stdx::blocking;

/// All networks of a node.
pub struct Switch {
    choice: Choice,
    layout: Layout,
    records: Records,
    bridge: Bridge,
    cni: Cni,
}

/// The network of new pods.
enum Chosen {
    None,
    Bridge,
    Cni(Arc<List>),
}

/// Name in [`Attachment::network`] of pods with a loopback only.
const NONE: &str = "none";

impl Switch {
    /// See [`super::build`].
    ///
    /// # Errors
    /// See [`super::build`].
    pub async fn open(config: Config, layout: Layout) -> Result<Self> {
        blocking::run("open networks", move || {
            let records = Records::open(layout.clone())?;
            let all = records.all()?;
            let bridge = Bridge::open(config.bridge, layout.clone(), records.clone(), &all)?;
            let cni = Cni::new(&config.cni, layout.clone(), records.clone());
            Ok(Self { choice: config.network, layout, records, bridge, cni })
        })
        .await
    }

    /// Removes what idle networks leave on the host.
    ///
    /// # Errors
    /// `FailedPrecondition` when pods are attached.
    pub async fn teardown(&self) -> Result<()> {
        self.bridge.teardown().await
    }

    async fn attach_none(&self, pod: &PodId) -> Result<Attachment> {
        let (records, pin, pod) = (self.records.clone(), self.layout.netns(pod), pod.clone());
        netns::on_thread(move || {
            records.put(&pod, &Record::None)?;
            let made = netns::unshare_and_pin(&pin).and_then(|()| rtnl::loopback_up(&mut Rtnl::open()?));
            if let Err(e) = made {
                // A pin that was there before us is not ours to remove.
                if e.kind != Kind::AlreadyExists {
                    netns::remove(&pin)?;
                }
                records.remove(&pod)?;
                return Err(e);
            }
            Ok(Attachment { ips: Vec::new(), network: NONE.into(), result: None })
        })
        .await
    }

    /// The network of new pods, by the configuration as it is now.
    async fn choose(&self) -> Result<Chosen> {
        match self.choice {
            Choice::None => return Ok(Chosen::None),
            Choice::Bridge => return Ok(Chosen::Bridge),
            Choice::Cni | Choice::Auto => {}
        }
        match self.cni.found().await? {
            Found::Network(list) => Ok(Chosen::Cni(list)),
            Found::Nothing if self.choice == Choice::Auto => Ok(Chosen::Bridge),
            Found::Nothing => Err(Error::precondition("no CNI configuration found")),
            Found::Bad(why) => Err(Error::precondition(format!("no usable CNI configuration: {why}"))),
        }
    }

    async fn record(&self, pod: &PodId) -> Result<Option<Record>> {
        let (records, pod) = (self.records.clone(), pod.clone());
        blocking::run("read network record", move || records.get(&pod)).await
    }

    async fn detach_by(&self, pod: &PodId, record: Option<Record>) -> Result<()> {
        match record {
            // Without a record there is at most a namespace.
            Some(Record::None) | None => {
                let (records, pin, pod) = (self.records.clone(), self.layout.netns(pod), pod.clone());
                blocking::run("remove network namespace", move || netns::remove(&pin).and_then(|()| records.remove(&pod))).await
            }
            Some(Record::Bridge(_)) => self.bridge.detach(pod).await,
            Some(Record::Cni(attempt)) => self.cni.detach(pod, &attempt).await,
        }
    }
}

#[async_trait]
impl Network for Switch {
    async fn attach(&self, pod: &PodId, spec: &PodSpec) -> Result<Attachment> {
        if spec.namespaces.network == NamespaceMode::Node {
            return Ok(Attachment::default());
        }
        match self.choose().await? {
            Chosen::None => self.attach_none(pod).await,
            Chosen::Bridge => self.bridge.attach(pod, spec).await,
            Chosen::Cni(list) => self.cni.attach(pod, spec, &list).await,
        }
    }

    async fn detach(&self, pod: &PodId, _spec: &PodSpec) -> Result<()> {
        let record = self.record(pod).await?;
        self.detach_by(pod, record).await
    }

    async fn readiness(&self) -> Readiness {
        match self.choose().await {
            Ok(Chosen::Cni(list)) => self.cni.readiness(&list).await,
            Ok(Chosen::Bridge | Chosen::None) => Readiness::Ready,
            Err(e) => Readiness::NotReady(e.to_string()),
        }
    }

    async fn stats(&self, pod: &PodId) -> Result<Vec<InterfaceStats>> {
        netns::inside(&self.layout.netns(pod), || {
            // Not /proc/net: that is the namespace of the process's first thread.
            let path = "/proc/thread-self/net/dev";
            Ok(parse_dev(&std::fs::read_to_string(path).act("read", path)?))
        })
        .await
    }

    async fn set_pod_cidr(&self, cidr: &str) -> Result<()> {
        let subnets = cidr.split(',').map(|c| c.trim().parse()).collect::<Result<Vec<Subnet>>>()?;
        self.bridge.set_subnets(subnets).await
    }

    async fn recover(&self, known: &[PodId]) -> Result<()> {
        let records = self.records.clone();
        let all = blocking::run("list network records", move || records.all()).await?;
        let known: HashSet<&PodId> = known.iter().collect();
        let (kept, lost): (Vec<_>, Vec<_>) = all.into_iter().partition(|(pod, _)| known.contains(pod));
        let mut failures = Vec::new();
        for (pod, record) in lost {
            if let Err(e) = self.detach_by(&pod, Some(record)).await {
                failures.push(format!("pod {}: {e}", pod.short()));
            }
        }
        self.collect_garbage(kept).await.unwrap_or_else(|e| failures.push(e.to_string()));
        self.remove_stray_pins(&known).await.unwrap_or_else(|e| failures.push(e.to_string()));
        if failures.is_empty() { Ok(()) } else { Err(Error::internal(format!("recover networks: {}", failures.join("; ")))) }
    }
}

impl Switch {
    /// Tells the plugins of the present CNI network which of its pods there are.
    async fn collect_garbage(&self, kept: Vec<(PodId, Record)>) -> Result<()> {
        // A configuration that is missing or broken is a matter of readiness.
        let Ok(Chosen::Cni(list)) = self.choose().await else { return Ok(()) };
        let pods: Vec<PodId> =
            kept.into_iter().filter(|(_, record)| matches!(record, Record::Cni(attempt) if attempt.network() == list.name)).map(|(pod, _)| pod).collect();
        self.cni.collect_garbage(&list, &pods).await
    }

    /// Removes our pins without a known pod: a record is written before the pin, so these are left from a lost tree.
    async fn remove_stray_pins(&self, known: &HashSet<&PodId>) -> Result<()> {
        let kept: HashSet<_> = known.iter().map(|pod| self.layout.netns(pod)).collect();
        let dir = self.layout.netns.clone();
        blocking::run("remove stray network namespaces", move || {
            let entries = match std::fs::read_dir(&dir) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                other => other.act("list", dir.display())?,
            };
            for entry in entries {
                let path = entry.act("list", dir.display())?.path();
                let ours = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"mesocri-"));
                if ours && !kept.contains(&path) {
                    netns::remove(&path)?;
                }
            }
            Ok(())
        })
        .await
    }
}

/// Reads the table of `/proc/net/dev`, `lo` left out. Lines that are not understood are skipped.
fn parse_dev(text: &str) -> Vec<InterfaceStats> {
    text.lines()
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let n: Vec<u64> = numbers.split_whitespace().map_while(|n| n.parse().ok()).collect();
            // Receive: bytes packets errs drop fifo frame compressed multicast; transmit: bytes packets errs drop …
            let [rx_bytes, rx_packets, rx_errors, rx_dropped, _, _, _, _, tx_bytes, tx_packets, tx_errors, tx_dropped, ..] = n[..] else {
                return None;
            };
            let name = name.trim().to_owned();
            (name != "lo").then_some(InterfaceStats { name, rx_bytes, rx_errors, rx_packets, rx_dropped, tx_bytes, tx_errors, tx_packets, tx_dropped })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_table() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
                    lo:       9       9    0    0    0     0          0         0        9       9    0    0    0     0       0          0\n  \
                    eth0:    1       2    3    4    5     6          7         8        9       10    11    12    13     14       15          16\n bad: 1 2\n";
        let stats = parse_dev(text);
        assert_eq!(stats.len(), 1);
        let s = &stats[0];
        assert_eq!((s.name.as_str(), s.rx_bytes, s.rx_packets, s.rx_errors, s.rx_dropped), ("eth0", 1, 2, 3, 4));
        assert_eq!((s.tx_bytes, s.tx_packets, s.tx_errors, s.tx_dropped), (9, 10, 11, 12));
    }
}
