//! The runtime as such: Version, Status, RuntimeConfig, UpdateRuntimeConfig (cri-behaviour §4).

use serde_json::json;

use super::{CgroupDriver, Front};
use crate::model::error::Result;
use crate::network::Readiness;
use crate::wire::cri as wire;

/// The kubelet starts with exactly this version of its runtime API.
const KUBELET_API_VERSION: &str = "0.1.0";
/// Version of the protocol package.
const RUNTIME_API_VERSION: &str = "v1";

pub(super) async fn version(front: &Front, _: wire::VersionRequest) -> Result<wire::VersionResponse> {
    Ok(wire::VersionResponse {
        version: KUBELET_API_VERSION.to_owned(),
        runtime_name: front.config.runtime_name.clone(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: RUNTIME_API_VERSION.to_owned(),
    })
}

pub(super) async fn status(front: &Front, request: wire::StatusRequest) -> Result<wire::StatusResponse> {
    let condition = |kind: &str, failure: Option<(&str, String)>| {
        let status = failure.is_none();
        let (reason, message) = failure.map(|(reason, message)| (reason.to_owned(), message)).unwrap_or_default();
        wire::RuntimeCondition { r#type: kind.to_owned(), status, reason, message }
    };
    let network = match front.engine.network_readiness().await {
        Readiness::Ready => None,
        Readiness::NotReady(why) => Some(("NetworkPluginNotReady", why)),
    };
    let mut info = std::collections::BTreeMap::new();
    if request.verbose {
        // The store says how much of it it cannot explain; anything but zeros is a fault that `mesocri df` shows.
        let unexplained = front.engine.images().unexplained().await?;
        info.insert("config".to_owned(), config_json(front));
        info.insert("store".to_owned(), json!({"unexplainedBytes": unexplained.bytes, "unexplainedInodes": unexplained.inodes}).to_string());
    }
    // Who is answered at all has passed the gate: the runtime is ready.
    let conditions = vec![condition("RuntimeReady", None), condition("NetworkReady", network)];
    Ok(wire::StatusResponse {
        status: Some(wire::RuntimeStatus { conditions }),
        info,
        runtime_handlers: handlers(front),
        features: Some(wire::RuntimeFeatures { supplemental_groups_policy: true, user_namespaces_host_network: false }),
    })
}

/// The default handler goes first under the empty name, by which clients look it up.
fn handlers(front: &Front) -> Vec<wire::RuntimeHandler> {
    let features = wire::RuntimeHandlerFeatures { recursive_read_only_mounts: front.config.recursive_read_only, user_namespaces: false };
    std::iter::once(String::new()).chain(front.engine.handlers()).map(|name| wire::RuntimeHandler { name, features: Some(features) }).collect()
}

fn config_json(front: &Front) -> String {
    let config = &front.config;
    json!({
        "runtimeName": config.runtime_name,
        "cgroupDriver": config.cgroup_driver,
        "recursiveReadOnly": config.recursive_read_only,
        "stateDir": config.state_dir,
        "runtimeHandlers": front.engine.handlers(),
    })
    .to_string()
}

pub(super) async fn config(front: &Front, _: wire::RuntimeConfigRequest) -> Result<wire::RuntimeConfigResponse> {
    let driver = match front.config.cgroup_driver {
        CgroupDriver::Cgroupfs => wire::CgroupDriver::Cgroupfs,
        CgroupDriver::Systemd => wire::CgroupDriver::Systemd,
    };
    Ok(wire::RuntimeConfigResponse { linux: Some(wire::LinuxRuntimeConfiguration { cgroup_driver: driver.into() }) })
}

pub(super) async fn update_config(front: &Front, request: wire::UpdateRuntimeConfigRequest) -> Result<wire::UpdateRuntimeConfigResponse> {
    let cidr = request.runtime_config.and_then(|c| c.network_config).map(|n| n.pod_cidr).unwrap_or_default();
    if !cidr.is_empty() {
        front.engine.set_pod_cidr(&cidr).await?;
    }
    Ok(wire::UpdateRuntimeConfigResponse {})
}
