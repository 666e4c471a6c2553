//! `namespaces/pid`: whose processes a container sees: the pod's, its own, the host's, or another container's.

use std::path::PathBuf;

use async_trait::async_trait;
use oci_spec::runtime::LinuxNamespaceType::Pid;

use super::parts::{NoConfig, config, namespace, options};
use super::{ContainerCx, Cx, Entry, Isolator};
use crate::model::error::{Error, Result};
use crate::model::plan::LaunchPatch;
use crate::model::pod::NamespaceMode;

const NAME: &str = "namespaces/pid";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["filesystem/linux"],
    options: |table| options::<NoConfig>(NAME, table),
    create: |_, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(PidNamespace))
    },
};

struct PidNamespace;

#[async_trait]
impl Isolator for PidNamespace {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let wanted = match &cx.container {
            // Only a shared namespace needs a process of the pod to hold it.
            None => (cx.pod.namespaces.pid == NamespaceMode::Pod).then_some(None),
            Some(container) => of_container(container, &cx.pod.namespaces.pid)?,
        };
        let namespaces = wanted.map(|path| namespace(Pid, path)).into_iter().collect();
        Ok(LaunchPatch { namespaces, ..LaunchPatch::default() })
    }
}

/// `None`: stays in the host's; `Some(None)`: its own; `Some(path)`: joins that one. `pod` is the pod's own mode.
fn of_container(container: &ContainerCx<'_>, pod: &NamespaceMode) -> Result<Option<Option<PathBuf>>> {
    match &container.spec.security.namespaces.pid {
        NamespaceMode::Node => Ok(None),
        NamespaceMode::Container => Ok(Some(None)),
        NamespaceMode::Pod => match container.sandbox.namespaces.get("pid") {
            Some(path) => Ok(Some(Some(path.clone()))),
            // The pod's namespace is the host's.
            None if *pod == NamespaceMode::Node => Ok(None),
            None => Err(Error::precondition(
                "join the pod's process namespace: the pod was made without one; set pid of the container's namespace_options to CONTAINER, or make the pod with POD",
            )),
        },
        NamespaceMode::Target(id) => match container.target_pid {
            Some(pid) => Ok(Some(Some(PathBuf::from(format!("/proc/{pid}/ns/pid"))))),
            None => Err(Error::precondition(format!("join the process namespace of container {id}: it does not run"))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;
    use crate::model::Kind;

    #[tokio::test]
    async fn the_sandbox_holds_one_only_when_it_is_shared() {
        let mut bench = Bench::new();
        for (mode, lists) in [(NamespaceMode::Pod, true), (NamespaceMode::Container, false), (NamespaceMode::Node, false)] {
            bench.pod.namespaces.pid = mode;
            let patch = bench.prepare_sandbox(&PidNamespace).await.unwrap();
            assert_eq!(patch.namespaces.len(), usize::from(lists));
            assert!(patch.namespaces.iter().all(|n| n.path().is_none()));
        }
    }

    #[tokio::test]
    async fn containers_join_make_or_leave_it() {
        let mut bench = Bench::new();
        bench.sandbox.namespaces.insert("pid".into(), "/proc/7/ns/pid".into());
        let path = |patch: LaunchPatch| patch.namespaces.first().map(|n| n.path().clone());
        let target = NamespaceMode::Target("other".into());
        for (mode, target_pid, wanted) in [
            (NamespaceMode::Pod, None, Some(Some("/proc/7/ns/pid".into()))),
            (NamespaceMode::Container, None, Some(None)),
            (NamespaceMode::Node, None, None),
            (target.clone(), Some(42), Some(Some("/proc/42/ns/pid".into()))),
        ] {
            bench.spec.security.namespaces.pid = mode;
            bench.target_pid = target_pid;
            assert_eq!(path(bench.prepare(&PidNamespace).await.unwrap()), wanted);
        }
        bench.spec.security.namespaces.pid = target;
        bench.target_pid = None;
        assert_eq!(bench.prepare(&PidNamespace).await.unwrap_err().kind, Kind::FailedPrecondition);
        bench.spec.security.namespaces.pid = NamespaceMode::Pod;
        bench.sandbox.namespaces.clear();
        bench.pod.namespaces.pid = NamespaceMode::Container;
        let error = bench.prepare(&PidNamespace).await.unwrap_err();
        assert_eq!(error.kind, Kind::FailedPrecondition);
        assert!(error.to_string().contains("CONTAINER"), "says what to set: {error}");
        bench.pod.namespaces.pid = NamespaceMode::Node;
        assert_eq!(path(bench.prepare(&PidNamespace).await.unwrap()), None, "the host's namespace is the pod's");
    }
}
