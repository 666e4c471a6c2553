//! `network/cni`: the pod's network namespace and addresses. Thin: [`crate::network`] does the work.

use std::sync::Arc;

use async_trait::async_trait;
use oci_spec::runtime::LinuxNamespaceType;

use super::parts::{NoConfig, config, namespace, options};
use super::{Cx, Entry, Isolator};
use crate::disk::Layout;
use crate::model::error::Result;
use crate::model::plan::LaunchPatch;
use crate::model::pod::NamespaceMode;
use crate::model::{ContainerId, PodId, PodSpec};
use crate::network::Network;

const NAME: &str = "network/cni";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["namespaces/uts"],
    options: |table| options::<NoConfig>(NAME, table),
    create: |deps, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(PodNetwork { layout: deps.layout.clone(), network: deps.network.clone() }))
    },
};

struct PodNetwork {
    layout: Layout,
    network: Arc<dyn Network>,
}

#[async_trait]
impl Isolator for PodNetwork {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let mut patch = LaunchPatch::default();
        if cx.pod.namespaces.network == NamespaceMode::Node {
            return Ok(patch);
        }
        let mut path = self.layout.netns(cx.pod_id);
        match &cx.container {
            None => {
                let attachment = self.network.attach(cx.pod_id, cx.pod).await?;
                patch.network = Some(attachment.result.unwrap_or_else(|| serde_json::json!({ "name": attachment.network, "ips": attachment.ips })));
                patch.ips = attachment.ips;
            }
            // A foreign runtime's sandbox may hold it elsewhere (a virtual machine).
            Some(container) => path = container.sandbox.namespaces.get("network").cloned().unwrap_or(path),
        }
        patch.namespaces.push(namespace(LinuxNamespaceType::Network, Some(path)));
        Ok(patch)
    }

    async fn cleanup(&self, pod_id: &PodId, pod: &PodSpec, container: Option<&ContainerId>) -> Result<()> {
        if container.is_some() || pod.namespaces.network == NamespaceMode::Node {
            return Ok(());
        }
        self.network.detach(pod_id, pod).await
    }

    // No `recover`: the engine has the network itself take up after a restart, whichever isolators are configured.
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;

    #[tokio::test]
    async fn attaches_pods_joins_containers_detaches_pods() {
        let bench = Bench::new();
        let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
        let netns = bench.deps.layout.netns(&bench.pod_id);
        let patch = bench.prepare_sandbox(&*isolator).await.unwrap();
        assert_eq!(patch.ips, ["10.1.2.3"]);
        assert_eq!(patch.namespaces, [namespace(LinuxNamespaceType::Network, Some(netns.clone()))]);
        assert!(patch.network.is_some());
        let patch = bench.prepare(&*isolator).await.unwrap();
        assert_eq!(patch.namespaces, [namespace(LinuxNamespaceType::Network, Some(netns))]);
        isolator.cleanup(&bench.pod_id, &bench.pod, Some(&bench.id)).await.unwrap();
        assert_eq!(bench.network.calls(), ["attach"]);
        isolator.cleanup(&bench.pod_id, &bench.pod, None).await.unwrap();
        isolator.recover(&[]).await.unwrap();
        assert_eq!(bench.network.calls(), ["attach", "detach"], "recovery is the engine's call, once a start");
    }

    #[tokio::test]
    async fn leaves_the_host_network_alone() {
        let mut bench = Bench::new();
        let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
        bench.pod.namespaces.network = NamespaceMode::Node;
        assert_eq!(bench.prepare_sandbox(&*isolator).await.unwrap(), LaunchPatch::default());
        assert_eq!(bench.prepare(&*isolator).await.unwrap(), LaunchPatch::default());
        isolator.cleanup(&bench.pod_id, &bench.pod, None).await.unwrap();
        assert!(bench.network.calls().is_empty());
    }
}
