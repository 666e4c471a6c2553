//! Pods and containers as they are (cri-behaviour §5, §6), for lists, status and events.

use serde_json::{Value, json};

use crate::containerizer::{Container, Pod};
use crate::model::container::ContainerMetadata;
use crate::model::phase::{ContainerPhase, PodPhase};
use crate::model::pod::PodMetadata;
use crate::wire::cri as wire;

use super::{mounts, resources, security, signal};

fn pod_metadata(metadata: &PodMetadata) -> wire::PodSandboxMetadata {
    wire::PodSandboxMetadata { name: metadata.name.clone(), uid: metadata.uid.clone(), namespace: metadata.namespace.clone(), attempt: metadata.attempt }
}

fn container_metadata(metadata: &ContainerMetadata) -> wire::ContainerMetadata {
    wire::ContainerMetadata { name: metadata.name.clone(), attempt: metadata.attempt }
}

/// State of a pod. One in the making is never shown; it would not be ready.
pub fn pod_state(phase: PodPhase) -> wire::PodSandboxState {
    match phase {
        PodPhase::Ready => wire::PodSandboxState::SandboxReady,
        PodPhase::Creating | PodPhase::NotReady => wire::PodSandboxState::SandboxNotready,
    }
}

/// State of a container. One in the making is never shown; only removal would be possible.
pub fn container_state(phase: &ContainerPhase) -> wire::ContainerState {
    match phase {
        ContainerPhase::Created { .. } => wire::ContainerState::ContainerCreated,
        ContainerPhase::Running { .. } => wire::ContainerState::ContainerRunning,
        ContainerPhase::Exited { .. } => wire::ContainerState::ContainerExited,
        ContainerPhase::Creating | ContainerPhase::Unknown { .. } => wire::ContainerState::ContainerUnknown,
    }
}

/// A pod in a list.
pub fn pod_item(pod: &Pod) -> wire::PodSandbox {
    wire::PodSandbox {
        id: pod.id.to_string(),
        metadata: Some(pod_metadata(&pod.spec.metadata)),
        state: pod_state(pod.phase).into(),
        created_at: pod.created_at,
        labels: pod.spec.labels.clone(),
        annotations: pod.spec.annotations.clone(),
        runtime_handler: pod.spec.runtime_handler.clone(),
    }
}

/// A pod's status.
pub fn pod_status(pod: &Pod) -> wire::PodSandboxStatus {
    let (ip, further) = pod.ips.split_first().map_or((String::new(), &[][..]), |(first, rest)| (first.clone(), rest));
    wire::PodSandboxStatus {
        id: pod.id.to_string(),
        metadata: Some(pod_metadata(&pod.spec.metadata)),
        state: pod_state(pod.phase).into(),
        created_at: pod.created_at,
        network: Some(wire::PodSandboxNetworkStatus { ip, additional_ips: further.iter().map(|ip| wire::PodIp { ip: ip.clone() }).collect() }),
        linux: Some(wire::LinuxPodSandboxStatus { namespaces: Some(wire::Namespace { options: Some(security::namespaces_to_wire(&pod.spec.namespaces)) }) }),
        labels: pod.spec.labels.clone(),
        annotations: pod.spec.annotations.clone(),
        runtime_handler: pod.spec.runtime_handler.clone(),
    }
}

/// A pod's verbose information.
pub fn pod_info(pod: &Pod) -> Value {
    let sandbox = pod.sandbox.clone().unwrap_or_default();
    let namespaces: Vec<Value> = sandbox.namespaces.iter().map(|(kind, path)| json!({ "type": kind, "path": path })).collect();
    json!({
        "sandboxID": pod.id,
        "pid": sandbox.pid,
        "shimPid": sandbox.shim_pid,
        "shimAddress": sandbox.address,
        "netns": pod.netns,
        "cniResult": pod.network,
        "runtimeHandler": pod.spec.runtime_handler,
        "config": pod.spec,
        "overhead": pod.spec.overhead,
        "resources": pod.spec.resources,
        "leftovers": pod.leftovers,
        // There is no pause process with a specification of its own: these are the namespaces that containers join.
        "runtimeSpec": { "hostname": pod.spec.hostname, "linux": { "namespaces": namespaces } },
    })
}

/// A container in a list.
pub fn container_item(container: &Container) -> wire::Container {
    wire::Container {
        id: container.id.to_string(),
        pod_sandbox_id: container.pod.to_string(),
        metadata: Some(container_metadata(&container.spec.metadata)),
        image: Some(image_spec(container, &container.spec.image)),
        image_ref: container.image_ref.clone(),
        state: container_state(&container.phase).into(),
        created_at: container.created_at,
        labels: container.spec.labels.clone(),
        annotations: container.spec.annotations.clone(),
        image_id: container.image_id.to_string(),
    }
}

fn image_spec(container: &Container, name: &str) -> wire::ImageSpec {
    wire::ImageSpec {
        image: name.to_owned(),
        annotations: container.spec.image_annotations.clone(),
        user_specified_image: container.spec.user_specified_image.clone(),
        runtime_handler: container.spec.image_runtime_handler.clone(),
        image_ref: String::new(),
    }
}

/// A container's status.
pub fn container_status(container: &Container) -> wire::ContainerStatus {
    let spec = &container.spec;
    let (uid, gid, groups) = &container.user;
    let mut status = wire::ContainerStatus {
        id: container.id.to_string(),
        metadata: Some(container_metadata(&spec.metadata)),
        state: container_state(&container.phase).into(),
        created_at: container.created_at,
        image: Some(image_spec(container, &container.image_name)),
        image_ref: container.image_ref.clone(),
        image_id: container.image_id.to_string(),
        message: container.message.clone(),
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        mounts: spec.mounts.iter().map(|m| mounts::to_wire(m, &container.image_volumes)).collect(),
        log_path: container.log_path.as_ref().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default(),
        resources: Some(wire::ContainerResources { linux: Some(resources::to_wire(&spec.resources)), windows: None }),
        user: Some(wire::ContainerUser {
            linux: Some(wire::LinuxContainerUser {
                uid: i64::from(*uid),
                gid: i64::from(*gid),
                supplemental_groups: groups.iter().copied().map(i64::from).collect(),
            }),
        }),
        stop_signal: signal::from_number(container.stop_signal).into(),
        ..Default::default()
    };
    match &container.phase {
        ContainerPhase::Creating | ContainerPhase::Created { .. } => {}
        ContainerPhase::Running { started_at, .. } | ContainerPhase::Unknown { started_at } => status.started_at = *started_at,
        ContainerPhase::Exited { started_at, exit } => {
            status.started_at = *started_at;
            status.finished_at = exit.at;
            status.exit_code = exit.code;
            status.reason.clone_from(&exit.reason);
            if !exit.message.is_empty() {
                status.message.clone_from(&exit.message);
            }
        }
    }
    status
}

/// A container's verbose information; `runtime_spec` as it was launched.
pub fn container_info(container: &Container, runtime_spec: Option<Value>) -> Value {
    let pid = match container.phase {
        ContainerPhase::Created { pid } | ContainerPhase::Running { pid, .. } => pid,
        _ => 0,
    };
    let mut config = json!(container.spec);
    // Values are bytes; as numbers nobody could read them.
    config["envs"] = container.spec.envs.iter().map(|e| json!({ "name": e.name, "value": String::from_utf8_lossy(&e.value) })).collect();
    json!({
        "sandboxID": container.pod,
        "pid": pid,
        "privileged": container.spec.security.privileged,
        "config": config,
        "runtimeSpec": runtime_spec,
    })
}
