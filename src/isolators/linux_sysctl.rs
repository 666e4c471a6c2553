//! `linux/sysctl`: kernel parameters of the pod's own namespaces (cri-behaviour §5). A parameter that is not namespaced would
//! change the host, so it is refused, whatever its value (attack case 29).

use std::collections::BTreeMap;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::parts::{config, options};
use super::{Cx, Entry, Isolator};
use crate::model::PodSpec;
use crate::model::error::{Error, Result};
use crate::model::plan::LaunchPatch;
use crate::model::pod::NamespaceMode;

const NAME: &str = "linux/sysctl";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["namespaces/ipc"],
    options: |table| options::<Config>(NAME, table),
    create: |_, table| Ok(Box::new(Sysctl { config: config(NAME, table)? })),
};

/// Options of `linux/sysctl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Pods with a network of their own may bind ports below 1024 and send pings without capabilities. True by default.
    pub unprivileged_defaults: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { unprivileged_defaults: true }
    }
}

/// What `unprivileged_defaults` sets: nobody else is in the pod's network, so nothing is protected by the limits.
const UNPRIVILEGED: [(&str, &str); 2] = [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// Parameters of the IPC namespace, exactly (`ipc_namespaces(7)`).
const IPC: [&str; 11] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.msg_next_id",
    "kernel.sem",
    "kernel.sem_next_id",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_next_id",
    "kernel.shm_rmid_forced",
];

struct Sysctl {
    config: Config,
}

#[async_trait]
impl Isolator for Sysctl {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Parameters are the sandbox's: containers join its namespaces.
    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        if cx.container.is_some() {
            return Ok(LaunchPatch::default());
        }
        Ok(LaunchPatch { sysctl: self.wanted(cx.pod)?, ..LaunchPatch::default() })
    }
}

/// Which of the pod's namespaces a parameter belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Namespace {
    Network,
    Ipc,
}

impl Sysctl {
    /// Parameters of a namespace that the pod shares with the host are left out: they are the host's (the other runtimes'
    /// rule, so that a pod specification works with either network).
    fn wanted(&self, pod: &PodSpec) -> Result<BTreeMap<String, String>> {
        let host = |mode: &NamespaceMode| *mode == NamespaceMode::Node;
        let mut wanted = BTreeMap::new();
        if self.config.unprivileged_defaults && !host(&pod.namespaces.network) {
            wanted.extend(UNPRIVILEGED.map(|(name, value)| (name.to_owned(), value.to_owned())));
        }
        for (name, value) in &pod.sysctls {
            let name = dotted(name)?;
            let bad = |why: &str| Error::invalid(format!("sysctl {name:?}: {why}"));
            let mode = match namespace_of(&name).ok_or_else(|| bad("not of a namespace that the pod has for itself"))? {
                Namespace::Network => &pod.namespaces.network,
                Namespace::Ipc => &pod.namespaces.ipc,
            };
            // Values are numbers, words and lists of them. `+` and `=` separate parameters in some tools' input.
            if value.bytes().any(|b| b.is_ascii_control() && b != b'\t' || matches!(b, b'+' | b'=')) {
                return Err(bad("its value holds a control character, + or ="));
            }
            if !host(mode) {
                wanted.insert(name, value.clone());
            }
        }
        Ok(wanted)
    }
}

/// The name with dots. With slashes (`net/ipv4/conf/eth0.1/x`), as sysctl(8) allows, dots are part of names, and such names
/// cannot be said here.
fn dotted(name: &str) -> Result<String> {
    let good = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if name.split('.').all(good) {
        return Ok(name.to_owned());
    }
    Err(Error::invalid(format!("sysctl {name:?}: not words with dots between them")))
}

fn namespace_of(name: &str) -> Option<Namespace> {
    if name.starts_with("net.") {
        Some(Namespace::Network)
    } else if IPC.contains(&name) || name.starts_with("fs.mqueue.") {
        Some(Namespace::Ipc)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;
    use crate::model::Kind;

    fn pod(sysctls: &[(&str, &str)]) -> PodSpec {
        PodSpec { sysctls: sysctls.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(), ..PodSpec::default() }
    }

    fn wanted(pod: &PodSpec) -> Result<BTreeMap<String, String>> {
        Sysctl { config: Config::default() }.wanted(pod)
    }

    #[test]
    fn namespaced_parameters_over_the_defaults() {
        let got = wanted(&pod(&[("kernel.shmmax", "1"), ("net.ipv4.ip_unprivileged_port_start", "100"), ("fs.mqueue.msg_max", "7")])).unwrap();
        let got: Vec<_> = got.iter().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(got, ["fs.mqueue.msg_max=7", "kernel.shmmax=1", "net.ipv4.ip_unprivileged_port_start=100", "net.ipv4.ping_group_range=0 2147483647"]);
        let off = Sysctl { config: Config { unprivileged_defaults: false } };
        assert!(off.wanted(&pod(&[])).unwrap().is_empty());
    }

    #[test]
    fn the_hosts_namespaces_are_left_alone() {
        let mut pod = pod(&[("net.ipv4.ip_forward", "1"), ("kernel.sem", "1 2 3 4")]);
        pod.namespaces.network = NamespaceMode::Node;
        assert_eq!(wanted(&pod).unwrap().into_keys().collect::<Vec<_>>(), ["kernel.sem"]);
        pod.namespaces.ipc = NamespaceMode::Node;
        assert!(wanted(&pod).unwrap().is_empty());
    }

    #[test]
    fn what_could_change_the_host_is_refused() {
        for (name, value) in [
            ("kernel.core_pattern", "|/evil"),
            ("kernel.shm", "1"),
            ("kernel.shmmax_", "1"),
            ("kernel.shm_rmid_forced+kernel.core_pattern", "1"),
            ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil"),
            ("net.ipv4/../../kernel/core_pattern", "1"),
            ("net...kernel.core_pattern", "1"),
            ("net/ipv4/ip_forward", "1"),
            ("net.ipv4.ip_forward", "1\n2"),
            ("net.ipv4.ip_forward", "1\0"),
            ("net.", "1"),
            ("", "1"),
            ("vm.overcommit_memory", "1"),
        ] {
            assert_eq!(wanted(&pod(&[(name, value)])).unwrap_err().kind, Kind::InvalidArgument, "{name:?} {value:?}");
        }
    }

    #[tokio::test]
    async fn containers_have_none() {
        let bench = Bench::new();
        let isolator = Sysctl { config: Config::default() };
        assert!(bench.prepare(&isolator).await.unwrap().sysctl.is_empty());
        assert!(!bench.prepare_sandbox(&isolator).await.unwrap().sysctl.is_empty());
    }
}
