//! Networks made by CNI plugins, run as the CNI specification says (versions 0.1.0 to 1.1.0).
//!
//! Before the first ADD a record says what will be attempted, with the whole configuration; after the last it holds the result. So
//! DEL can be done after a crash, and with the configuration of its ADD even if the file has changed or gone.
//! The loopback is brought up by netlink, no plugin is needed for it.

mod capability;
pub mod conf;
mod exec;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use self::conf::{Directory, Found, List, Version};
use self::exec::{IFNAME, Runner, Target, Verb};
use super::record::{Record, Records};
use super::rtnl::{Rtnl, loopback_up};
use super::{Attachment, Readiness, netns};
use crate::disk::Layout;
use crate::model::error::{Error, Kind, Result};
use crate::model::{PodId, PodSpec};
use crate::stdx::blocking;

/// CNI networks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where network configurations are. The first usable one by file name is the network; changes are seen at once.
    pub conf_dir: PathBuf,
    /// Where plugins are, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// Seconds that one verb of one plugin may take; it is killed then, with all it started.
    pub plugin_timeout: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { conf_dir: "/etc/cni/net.d".into(), bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()], plugin_timeout: 60 }
    }
}

/// What was asked of plugins for a pod, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// The configuration at the time.
    list: List,
    /// `CNI_ARGS`.
    args: String,
    /// Values by capability.
    capabilities: Map<String, Value>,
    /// Result of the last plugin; absent until all ADDs were done.
    result: Option<Value>,
}

impl Attempt {
    /// Name of the network.
    pub fn network(&self) -> &str {
        &self.list.name
    }
}

/// CNI networks of this node.
pub struct Cni {
    directory: Arc<Directory>,
    runner: Runner,
    layout: Layout,
    records: Records,
}

impl Cni {
    /// Reads nothing yet.
    pub fn new(config: &Config, layout: Layout, records: Records) -> Self {
        let runner = Runner { bin_dirs: config.bin_dirs.clone(), deadline: Duration::from_secs(config.plugin_timeout.max(1)) };
        Self { directory: Arc::new(Directory::new(config.conf_dir.clone())), runner, layout, records }
    }

    /// What the configuration directory holds now.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub async fn found(&self) -> Result<Found> {
        let directory = self.directory.clone();
        blocking::run("read CNI configuration", move || directory.network()).await
    }

    /// Attaches a pod, see [`super::Network::attach`].
    ///
    /// # Errors
    /// The plugin's words; what was attempted is undone then.
    pub async fn attach(&self, pod: &PodId, spec: &PodSpec, list: &List) -> Result<Attachment> {
        let attempt = Attempt { list: list.clone(), args: capability::args(pod, spec)?, capabilities: capability::capabilities(spec)?, result: None };
        self.prepare(pod, &attempt).await?;
        let mut attempted = 0;
        let added = match self.add_all(pod, &attempt, &mut attempted).await {
            Ok(result) => self.keep(pod, attempt.clone(), result).await,
            Err(e) => Err(e),
        };
        match added {
            Ok(attachment) => Ok(attachment),
            Err(e) => {
                // An undone ADD is no attachment, whatever DEL says to it; but an operator may want to know.
                if let Err(undo) = self.del_all(pod, &attempt, attempted).await {
                    tracing::warn!(pod = %pod, "CNI DEL after a failed ADD: {undo}");
                }
                self.forget(pod).await?;
                Err(e)
            }
        }
    }

    /// Detaches a pod.
    ///
    /// # Errors
    /// Those of plugins whose ADD had completed; the record stays then and the caller tries again.
    pub async fn detach(&self, pod: &PodId, attempt: &Attempt) -> Result<()> {
        match self.del_all(pod, attempt, attempt.list.plugins.len()).await {
            Err(e) if attempt.result.is_some() => return Err(e),
            Err(e) => tracing::warn!(pod = %pod, "CNI DEL of a network that was never complete: {e}"),
            Ok(()) => {}
        }
        self.forget(pod).await
    }

    /// Asks the plugins whether the pod's network is as they left it. Nothing to ask below version 0.4.0.
    ///
    /// # Errors
    /// The plugin's words.
    pub async fn check(&self, pod: &PodId, attempt: &Attempt) -> Result<()> {
        if attempt.list.version < Version::CHECK || attempt.list.disable_check {
            return Ok(());
        }
        let target = self.target(pod, attempt);
        for plugin in &attempt.list.plugins {
            let config = input(&attempt.list, plugin, &attempt.capabilities, attempt.result.as_ref());
            self.runner.run(List::kind(plugin), Verb::Check, &target, &config).await?;
        }
        Ok(())
    }

    /// Whether pods can be attached: all plugins are there, and say so themselves from version 1.1.0 on.
    pub async fn readiness(&self, list: &List) -> Readiness {
        for plugin in &list.plugins {
            let kind = List::kind(plugin);
            let ready = if list.version < Version::STATUS {
                self.runner.find(kind).map(|_| None)
            } else {
                self.runner.run(kind, Verb::Status, &Target::default(), &input(list, plugin, &Map::new(), None)).await
            };
            if let Err(e) = ready {
                return Readiness::NotReady(format!("network {}: {e}", list.name));
            }
        }
        Readiness::Ready
    }

    /// Tells plugins (version 1.1.0 on) which attachments of the network exist, so that they free what belongs to others.
    ///
    /// # Errors
    /// All that failed.
    pub async fn collect_garbage(&self, list: &List, pods: &[PodId]) -> Result<()> {
        if list.version < Version::STATUS || list.disable_gc {
            return Ok(());
        }
        let valid: Vec<Value> = pods.iter().map(|pod| json!({"containerID": pod.as_str(), "ifname": IFNAME})).collect();
        let mut failures = Vec::new();
        for plugin in &list.plugins {
            let mut config = input(list, plugin, &Map::new(), None);
            if let Value::Object(map) = &mut config {
                map.insert("cni.dev/valid-attachments".into(), valid.clone().into());
            }
            if let Err(e) = self.runner.run(List::kind(plugin), Verb::Gc, &Target::default(), &config).await {
                failures.push(e.to_string());
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(Error::internal(failures.join("; "))) }
    }

    /// Record first, then the namespace with its loopback.
    async fn prepare(&self, pod: &PodId, attempt: &Attempt) -> Result<()> {
        let (records, pin, pod) = (self.records.clone(), self.layout.netns(pod), pod.clone());
        let record = Record::Cni(Box::new(attempt.clone()));
        netns::on_thread(move || {
            if records.get(&pod)?.is_some() {
                return Err(Error::new(Kind::AlreadyExists, format!("attach pod {pod}: it has a network")));
            }
            records.put(&pod, &record)?;
            let made = netns::unshare_and_pin(&pin).and_then(|()| loopback_up(&mut Rtnl::open()?));
            if let Err(e) = &made {
                // A pin that was there before us is not ours to remove.
                if e.kind != Kind::AlreadyExists {
                    netns::remove(&pin)?;
                }
                records.remove(&pod)?;
            }
            made
        })
        .await
    }

    /// ADD of all plugins in order, each given the result of the one before. `attempted` counts those that were started.
    async fn add_all(&self, pod: &PodId, attempt: &Attempt, attempted: &mut usize) -> Result<Value> {
        let target = self.target(pod, attempt);
        let mut result = None;
        for plugin in &attempt.list.plugins {
            *attempted += 1;
            let config = input(&attempt.list, plugin, &attempt.capabilities, result.as_ref());
            let said = self.runner.run(List::kind(plugin), Verb::Add, &target, &config).await?;
            result = Some(said.ok_or_else(|| Error::internal(format!("CNI plugin {} ADD: no result", List::kind(plugin))))?);
        }
        result.ok_or_else(|| Error::internal(format!("network {}: no plugins", attempt.list.name)))
    }

    async fn keep(&self, pod: &PodId, mut attempt: Attempt, result: Value) -> Result<Attachment> {
        let ips = addresses(&result).map_err(|why| Error::internal(format!("read result of network {}: {why}", attempt.list.name)))?;
        let network = attempt.list.name.clone();
        attempt.result = Some(result.clone());
        let (records, pod) = (self.records.clone(), pod.clone());
        blocking::run("keep CNI result", move || records.put(&pod, &Record::Cni(Box::new(attempt)))).await?;
        Ok(Attachment { ips, network, result: Some(result) })
    }

    /// DEL of the first `count` plugins in reverse order. All are tried.
    async fn del_all(&self, pod: &PodId, attempt: &Attempt, count: usize) -> Result<()> {
        let target = self.target(pod, attempt);
        let result = attempt.result.as_ref().filter(|_| attempt.list.version >= Version::CHECK);
        let mut failures: Vec<Error> = Vec::new();
        for plugin in attempt.list.plugins.iter().take(count).rev() {
            let config = input(&attempt.list, plugin, &attempt.capabilities, result);
            if let Err(e) = self.runner.run(List::kind(plugin), Verb::Del, &target, &config).await {
                failures.push(e);
            }
        }
        match failures.len() {
            0 | 1 => failures.pop().map_or(Ok(()), Err),
            _ => Err(Error::internal(failures.iter().map(Error::to_string).collect::<Vec<_>>().join("; "))),
        }
    }

    async fn forget(&self, pod: &PodId) -> Result<()> {
        let (records, pin, pod) = (self.records.clone(), self.layout.netns(pod), pod.clone());
        blocking::run("remove network namespace", move || netns::remove(&pin).and_then(|()| records.remove(&pod))).await
    }

    fn target(&self, pod: &PodId, attempt: &Attempt) -> Target {
        let pin = self.layout.netns(pod);
        // The specification's way to say that the namespace is gone.
        let netns = if netns::is_pinned(&pin) { pin.to_string_lossy().into_owned() } else { String::new() };
        Target { container: pod.as_str().to_owned(), netns, args: attempt.args.clone() }
    }
}

/// What a plugin gets on its standard input.
fn input(list: &List, plugin: &Map<String, Value>, capabilities: &Map<String, Value>, previous: Option<&Value>) -> Value {
    let mut config = plugin.clone();
    config.insert("name".into(), list.name.clone().into());
    config.insert("cniVersion".into(), list.version.as_str().into());
    let declared = |name: &str| plugin.get("capabilities").and_then(|c| c.get(name)) == Some(&Value::Bool(true));
    let runtime: Map<String, Value> = capabilities.iter().filter(|(name, _)| declared(name)).map(|(k, v)| (k.clone(), v.clone())).collect();
    if !runtime.is_empty() {
        config.insert("runtimeConfig".into(), runtime.into());
    }
    if let Some(previous) = previous {
        config.insert("prevResult".into(), previous.clone());
    }
    config.into()
}

/// The pod's addresses in a result, the first of IPv4 first.
fn addresses(result: &Value) -> Result<Vec<String>, String> {
    let bare = |value: &Value| -> Result<String, String> {
        let text = value.as_str().unwrap_or_default();
        let address = text.split('/').next().unwrap_or_default();
        address.parse::<std::net::IpAddr>().map(|ip| ip.to_string()).map_err(|_| format!("{value} is no address"))
    };
    let mut all = Vec::new();
    for ip in result.get("ips").and_then(Value::as_array).into_iter().flatten() {
        if inside(result, ip) {
            all.push(bare(ip.get("address").unwrap_or(&Value::Null))?);
        }
    }
    // Versions before 0.3.0.
    for family in ["ip4", "ip6"] {
        if let Some(ip) = result.get(family).and_then(|f| f.get("ip")) {
            all.push(bare(ip)?);
        }
    }
    // Stable: the plugin's order within a family is kept.
    all.sort_by_key(|a| a.contains(':'));
    Ok(all)
}

/// Whether an address is on an interface inside the pod; one that names no interface is.
fn inside(result: &Value, ip: &Value) -> bool {
    let Some(index) = ip.get("interface").and_then(Value::as_u64).and_then(|i| usize::try_from(i).ok()) else { return true };
    let interface = result.get("interfaces").and_then(|i| i.get(index));
    interface.is_none_or(|i| i.get("sandbox").and_then(Value::as_str).is_some_and(|s| !s.is_empty()))
}
