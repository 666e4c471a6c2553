//! What other runtimes' shims are told of pods and containers beyond the OCI spec: the annotations containerd sets, by which
//! virtual machine runtimes tell a sandbox from its containers (cri-behaviour §5). Our own shim has no use for them.

use std::collections::HashMap;

use super::Pod;
use crate::model::ContainerSpec;
use crate::model::image::Image;
use crate::model::plan::LaunchPlan;

/// What all keys begin with.
const PREFIX: &str = "io.kubernetes.cri.";

/// Annotates the plan of a pod's sandbox.
pub(super) fn of_sandbox(plan: &mut LaunchPlan, pod: &Pod) {
    set(plan, "sandbox", pod, &[]);
}

/// Annotates the plan of a container in `pod`.
pub(super) fn of_container(plan: &mut LaunchPlan, pod: &Pod, spec: &ContainerSpec, image: &Image) {
    // A reference, where the image has one: what was asked for is an id more often than not.
    let name = image.repo_tags.first().or(image.repo_digests.first()).unwrap_or(&spec.image);
    set(plan, "container", pod, &[("container-name", &spec.metadata.name), ("image-name", name)]);
}

fn set(plan: &mut LaunchPlan, kind: &str, pod: &Pod, more: &[(&str, &str)]) {
    let named = &pod.spec.metadata;
    let common = [
        ("container-type", kind),
        ("sandbox-id", pod.id.as_str()),
        ("sandbox-name", &named.name),
        ("sandbox-namespace", &named.namespace),
        ("sandbox-uid", &named.uid),
    ];
    let annotations = plan.spec.annotations_mut().get_or_insert_with(HashMap::new);
    annotations.extend(common.iter().chain(more).map(|(key, value)| (format!("{PREFIX}{key}"), (*value).to_owned())));
}
