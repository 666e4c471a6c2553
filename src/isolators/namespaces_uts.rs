//! `namespaces/uts`: the pod's host name. CRI has no UTS mode: it follows the network (cri-behaviour §5).

use async_trait::async_trait;
use oci_spec::runtime::LinuxNamespaceType::Uts;

use super::parts::{NoConfig, config, host_name, namespace, options};
use super::{Cx, Entry, Isolator};
use crate::model::error::{Error, Result};
use crate::model::plan::LaunchPatch;
use crate::model::pod::NamespaceMode;

const NAME: &str = "namespaces/uts";
/// Longest host name the kernel keeps (`uname(2)`, `__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &[],
    options: |table| options::<NoConfig>(NAME, table),
    create: |_, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(UtsNamespace))
    },
};

struct UtsNamespace;

#[async_trait]
impl Isolator for UtsNamespace {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        if cx.pod.namespaces.network == NamespaceMode::Node {
            return Ok(LaunchPatch::default());
        }
        let mut patch = LaunchPatch::default();
        match &cx.container {
            None => {
                let name = &cx.pod.hostname;
                if name.len() > MAX_HOSTNAME || name.bytes().any(|b| b == 0 || b == b'\n' || b == b'\r') {
                    return Err(Error::invalid(format!("host name {name:?}: longer than {MAX_HOSTNAME} bytes, or with NUL or a line break")));
                }
                patch.hostname = Some(if name.is_empty() { host_name() } else { name.clone() });
                patch.namespaces.push(namespace(Uts, None));
            }
            // The name is the namespace's: containers only join it.
            Some(container) => {
                let path = container.sandbox.namespaces.get("uts");
                let path = path.ok_or_else(|| Error::internal("join the pod's UTS namespace: the sandbox names none"))?;
                patch.namespaces.push(namespace(Uts, Some(path.clone())));
            }
        }
        Ok(patch)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;

    #[tokio::test]
    async fn the_sandbox_sets_the_name_and_containers_join() {
        let mut bench = Bench::new();
        bench.pod.hostname = "web-0".into();
        let patch = bench.prepare_sandbox(&UtsNamespace).await.unwrap();
        assert_eq!(patch.hostname.as_deref(), Some("web-0"));
        assert_eq!(patch.namespaces, [namespace(Uts, None)]);

        bench.sandbox.namespaces.insert("uts".into(), "/proc/7/ns/uts".into());
        let patch = bench.prepare(&UtsNamespace).await.unwrap();
        assert_eq!(patch.hostname, None);
        assert_eq!(patch.namespaces, [namespace(Uts, Some("/proc/7/ns/uts".into()))]);
    }

    #[tokio::test]
    async fn with_the_host_network_comes_the_host_name() {
        let mut bench = Bench::new();
        bench.pod.namespaces.network = NamespaceMode::Node;
        assert_eq!(bench.prepare_sandbox(&UtsNamespace).await.unwrap(), LaunchPatch::default());
        assert_eq!(bench.prepare(&UtsNamespace).await.unwrap(), LaunchPatch::default());
    }

    #[tokio::test]
    async fn refuses_what_the_kernel_or_a_file_could_misread() {
        let mut bench = Bench::new();
        for bad in ["a\nb", "a\0", &"a".repeat(65)] {
            bench.pod.hostname = bad.into();
            assert!(bench.prepare_sandbox(&UtsNamespace).await.is_err(), "{bad:?}");
        }
    }
}
