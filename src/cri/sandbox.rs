//! Pods (cri-behaviour §5).

use super::convert::{choice, pod as convert, required, resources, selected, status as show};
use super::{Front, named};
use crate::model::error::Result;
use crate::wire::cri as wire;

pub(super) async fn run(front: &Front, request: wire::RunPodSandboxRequest) -> Result<wire::RunPodSandboxResponse> {
    let spec = convert::from_wire(required(request.config, "config")?, request.runtime_handler)?;
    let what = format!("run pod {}/{}", spec.metadata.namespace, spec.metadata.name);
    let id = front.engine.run_pod(spec).await.map_err(|e| e.within(what))?;
    Ok(wire::RunPodSandboxResponse { pod_sandbox_id: id.to_string() })
}

pub(super) async fn stop(front: &Front, request: wire::StopPodSandboxRequest) -> Result<wire::StopPodSandboxResponse> {
    front.engine.stop_pod(named(&request.pod_sandbox_id)?).await?;
    Ok(wire::StopPodSandboxResponse {})
}

pub(super) async fn remove(front: &Front, request: wire::RemovePodSandboxRequest) -> Result<wire::RemovePodSandboxResponse> {
    front.engine.remove_pod(named(&request.pod_sandbox_id)?).await?;
    Ok(wire::RemovePodSandboxResponse {})
}

pub(super) async fn status(front: &Front, request: wire::PodSandboxStatusRequest) -> Result<wire::PodSandboxStatusResponse> {
    let pod = front.pod(&request.pod_sandbox_id)?;
    let info = if request.verbose { [("info".to_owned(), show::pod_info(&pod).to_string())].into() } else { Default::default() };
    // The containers and the time stamp are for clients that follow events; others list containers themselves.
    Ok(wire::PodSandboxStatusResponse { status: Some(show::pod_status(&pod)), info, containers_statuses: Vec::new(), timestamp: 0 })
}

pub(super) async fn list(front: &Front, request: wire::ListPodSandboxRequest) -> Result<wire::ListPodSandboxResponse> {
    Ok(wire::ListPodSandboxResponse { items: matching(front, request.filter)? })
}

/// Pods that a filter asks for.
pub(super) fn matching(front: &Front, filter: Option<wire::PodSandboxFilter>) -> Result<Vec<wire::PodSandbox>> {
    let filter = filter.unwrap_or_default();
    let state = filter.state.map(|s| choice::<wire::PodSandboxState>(s.state, "filter.state")).transpose()?;
    let wanted = front
        .pods()
        .filter(|pod| selected(pod.id.as_str(), &pod.spec.labels, &filter.id, &filter.label_selector) && state.is_none_or(|s| s == show::pod_state(pod.phase)));
    Ok(wanted.map(|pod| show::pod_item(&pod)).collect())
}

pub(super) async fn update_resources(front: &Front, request: wire::UpdatePodSandboxResourcesRequest) -> Result<wire::UpdatePodSandboxResourcesResponse> {
    let overhead = request.overhead.map(resources::from_wire).transpose()?;
    let limits = request.resources.map(resources::from_wire).transpose()?;
    front.engine.update_pod_resources(named(&request.pod_sandbox_id)?, overhead, limits).await?;
    Ok(wire::UpdatePodSandboxResourcesResponse {})
}
