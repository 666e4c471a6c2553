//! Containers (cri-behaviour §6, §7, §9, §12).

use std::time::Duration;

use super::convert::{choice, container as convert, required, resources, selected, status as show};
use super::{Front, named};
use crate::containerizer::Pod;
use crate::model::error::{Error, Result};
use crate::model::phase::{ContainerPhase, PodPhase};
use crate::model::pod::NamespaceMode;
use crate::wire::cri as wire;

pub(super) async fn create(front: &Front, request: wire::CreateContainerRequest) -> Result<wire::CreateContainerResponse> {
    let config = required(request.config, "config")?;
    let pod = front.pod(&request.pod_sandbox_id)?;
    if pod.phase != PodPhase::Ready {
        let name = config.metadata.map(|m| m.name).unwrap_or_default();
        return Err(Error::precondition(format!("create container {name}: pod {} is not ready: it was stopped or its sandbox ended", pod.id.short())));
    }
    let mut spec = convert::from_wire(config, &pod, front.config.recursive_read_only)?;
    if let NamespaceMode::Target(target) = &mut spec.security.namespaces.pid {
        *target = process_target(front, &pod, target)?;
    }
    let what = format!("create container {}", spec.metadata.name);
    let id = front.engine.create_container(pod.id.as_str(), spec).await.map_err(|e| e.within(what))?;
    Ok(wire::CreateContainerResponse { container_id: id.to_string() })
}

/// Full id of the container whose process namespace is to be shared: it runs, in the same pod. Looked at again at the start.
fn process_target(front: &Front, pod: &Pod, target: &str) -> Result<String> {
    let container = front.container(target).map_err(|e| e.within("find the target of the process namespace"))?;
    if container.pod != pod.id {
        return Err(Error::invalid(format!("container {} is in another pod: its process namespace cannot be shared", container.id.short())));
    }
    match container.phase {
        ContainerPhase::Running { .. } => Ok(container.id.to_string()),
        _ => Err(Error::precondition(format!("container {} does not run: its process namespace cannot be shared", container.id.short()))),
    }
}

pub(super) async fn start(front: &Front, request: wire::StartContainerRequest) -> Result<wire::StartContainerResponse> {
    front.engine.start_container(named(&request.container_id)?).await?;
    Ok(wire::StartContainerResponse {})
}

pub(super) async fn stop(front: &Front, request: wire::StopContainerRequest) -> Result<wire::StopContainerResponse> {
    // Awaited here and not in a task of its own: when the caller leaves, the wait ends and nothing escalates.
    let grace = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
    front.engine.stop_container(named(&request.container_id)?, grace).await?;
    Ok(wire::StopContainerResponse {})
}

pub(super) async fn remove(front: &Front, request: wire::RemoveContainerRequest) -> Result<wire::RemoveContainerResponse> {
    front.engine.remove_container(named(&request.container_id)?).await?;
    Ok(wire::RemoveContainerResponse {})
}

pub(super) async fn status(front: &Front, request: wire::ContainerStatusRequest) -> Result<wire::ContainerStatusResponse> {
    let container = front.container(&request.container_id)?;
    let info = if request.verbose {
        let info = show::container_info(&container, front.engine.runtime_spec(&container));
        [("info".to_owned(), info.to_string())].into()
    } else {
        Default::default()
    };
    Ok(wire::ContainerStatusResponse { status: Some(show::container_status(&container)), info })
}

pub(super) async fn list(front: &Front, request: wire::ListContainersRequest) -> Result<wire::ListContainersResponse> {
    Ok(wire::ListContainersResponse { containers: matching(front, request.filter)? })
}

/// Containers that a filter asks for.
pub(super) fn matching(front: &Front, filter: Option<wire::ContainerFilter>) -> Result<Vec<wire::Container>> {
    let filter = filter.unwrap_or_default();
    let state = filter.state.map(|s| choice::<wire::ContainerState>(s.state, "filter.state")).transpose()?;
    let wanted = front.containers().filter(|c| {
        selected(c.id.as_str(), &c.spec.labels, &filter.id, &filter.label_selector)
            && c.pod.as_str().starts_with(&filter.pod_sandbox_id)
            && state.is_none_or(|s| s == show::container_state(&c.phase))
    });
    Ok(wanted.map(|c| show::container_item(&c)).collect())
}

pub(super) async fn update_resources(front: &Front, request: wire::UpdateContainerResourcesRequest) -> Result<wire::UpdateContainerResourcesResponse> {
    let container = front.container(&request.container_id)?;
    if let Some(linux) = request.linux {
        front.engine.update_container(container.id.as_str(), resources::from_wire(linux)?).await?;
    }
    Ok(wire::UpdateContainerResourcesResponse {})
}

pub(super) async fn reopen_log(front: &Front, request: wire::ReopenContainerLogRequest) -> Result<wire::ReopenContainerLogResponse> {
    front.engine.reopen_log(named(&request.container_id)?).await?;
    Ok(wire::ReopenContainerLogResponse {})
}
