//! `appc/runtime`: what the manifest of an Appc image and the request together say about the process (App Container specification,
//! `app`; mesos.md §7.3): exec, directory, environment, user and groups, mount points; limits and privileges where the request has none.
//!
//! | manifest | becomes |
//! |---|---|
//! | `exec` | the command; a container's arguments alone replace all but its first word |
//! | `workingDirectory`, `environment` | as of any image; `AC_APP_NAME` is the container's name |
//! | `user`, `group` | names, numbers, or the owner of the file at a path; `supplementaryGIDs` with them, unless the request names a user |
//! | `mountPoints` | what the request mounts there, else a volume with the image's content, read-only if it says so |
//! | `resource/cpu`, `resource/memory` | limits, for requests without |
//! | `os/linux/capabilities-*`, `os/linux/no-new-privileges` | privileges less than the usual, never more |
//! | event handlers, other isolators | nothing; a warning names them |

use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::docker_runtime::lookup::{self, Target};
use super::docker_runtime::{args, cwd, env, stop_signal, user, volumes};
use super::linux_capabilities::DEFAULT;
use super::parts::{NoConfig, config, options};
use super::{ContainerCx, Cx, Entry, Isolator};
use crate::disk::Layout;
use crate::model::container::{CapabilityChange, UserSpec};
use crate::model::error::{Error, Result};
use crate::model::image::{AppcConfig, AppcResources, Image};
use crate::model::plan::LaunchPatch;
use crate::model::resources::Resources;
use crate::model::{ContainerId, ContainerSpec, PodId, PodSpec};

const NAME: &str = "appc/runtime";
/// CFS period for processor limits, microseconds: the kernel's own choice.
const PERIOD: u64 = 100_000;
/// Shortest CFS quota that the kernel takes, microseconds.
const MIN_QUOTA: u64 = 1000;
/// Smallest weight.
const MIN_SHARES: u64 = 2;

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["filesystem/linux"],
    options: |table| options::<NoConfig>(NAME, table),
    create: |deps, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(AppcRuntime { layout: deps.layout.clone() }))
    },
};

struct AppcRuntime {
    layout: Layout,
}

#[async_trait]
impl Isolator for AppcRuntime {
    fn name(&self) -> &'static str {
        NAME
    }

    fn complete(&self, spec: &mut ContainerSpec, image: &Image) -> Result<()> {
        let Some(appc) = &image.config.appc else { return Ok(()) };
        limit(&mut spec.resources, &appc.resources);
        let security = &mut spec.security;
        if !security.privileged {
            security.no_new_privs |= appc.no_new_privileges;
            if security.capabilities == CapabilityChange::default() {
                security.capabilities.drop = dropped(appc);
            }
        }
        Ok(())
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let Some(container) = &cx.container else { return Ok(LaunchPatch::default()) };
        let (spec, image) = (container.spec, &container.image.config);
        let Some(appc) = &image.appc else { return Ok(LaunchPatch::default()) };
        if !appc.app && spec.command.is_empty() {
            return Err(Error::invalid(format!("image {} has no app: it is for building upon, and no command is given", container.image.id)));
        }
        if !appc.ignored.is_empty() {
            tracing::warn!(container = container.id.short(), ignored = appc.ignored.join(", "), "parts of the image's manifest are not acted upon");
        }
        let mut env = env(cx.pod, spec, image)?;
        env.insert(0, ("AC_APP_NAME".to_owned(), spec.metadata.name.clone().into_bytes()));
        let (asked, from_image) = users(container, appc)?;
        Ok(LaunchPatch {
            args: Some(args(spec, image)?),
            cwd: Some(cwd(spec, image)?),
            env,
            terminal: Some(spec.tty),
            user: Some(user::resolve(&asked, &from_image, &container.rootfs.lookup)?),
            stop_signal: Some(stop_signal(container)),
            mounts: self.volumes(cx.pod_id, container, appc).await?,
            ..LaunchPatch::default()
        })
    }

    async fn cleanup(&self, pod_id: &PodId, _: &PodSpec, container: Option<&ContainerId>) -> Result<()> {
        match container {
            Some(id) => volumes::remove(self.layout.volumes(pod_id, id)).await,
            None => Ok(()),
        }
    }
}

impl AppcRuntime {
    async fn volumes(&self, pod_id: &PodId, container: &ContainerCx<'_>, appc: &AppcConfig) -> Result<Vec<oci_spec::runtime::Mount>> {
        let mut mounts = volumes::prepare(&self.layout.volumes(pod_id, container.id), container).await?;
        let read_only: Vec<&Path> = appc.read_only.iter().map(Path::new).collect();
        for mount in mounts.iter_mut().filter(|m| read_only.contains(&m.destination().as_path())) {
            mount.set_options(Some(["rbind", "rprivate", "ro"].map(str::to_owned).to_vec()));
        }
        Ok(mounts)
    }
}

/// The image's limits, where there are none.
fn limit(resources: &mut Resources, image: &AppcResources) {
    if resources.memory_limit.is_none() {
        resources.memory_limit = image.memory_limit.and_then(|bytes| i64::try_from(bytes).ok());
    }
    if let Some(limit) = image.cpu_limit
        && resources.cpu_quota.is_none()
        && resources.cpu_period.is_none()
    {
        resources.cpu_period = Some(PERIOD);
        resources.cpu_quota = i64::try_from((limit.saturating_mul(PERIOD) / 1000).max(MIN_QUOTA)).ok();
    }
    if resources.cpu_shares.is_none() {
        resources.cpu_shares = image.cpu_request.map(|request| (request.saturating_mul(1024) / 1000).max(MIN_SHARES));
    }
}

/// Capabilities that the image wants to be without. What it wants to keep can only be of those that every container has: a stranger
/// gives nobody privileges.
fn dropped(appc: &AppcConfig) -> Vec<String> {
    match &appc.retain_capabilities {
        Some(kept) => DEFAULT.iter().map(ToString::to_string).filter(|name| !kept.iter().any(|k| plain(k) == plain(name))).collect(),
        None => appc.remove_capabilities.clone(),
    }
}

fn plain(capability: &str) -> String {
    let upper = capability.to_ascii_uppercase();
    upper.strip_prefix("CAP_").unwrap_or(&upper).to_owned()
}

/// Who is asked for, and who the image's user is: paths become numbers, and the image's groups go with its user.
fn users(container: &ContainerCx<'_>, appc: &AppcConfig) -> Result<(UserSpec, String)> {
    let mut asked = container.spec.security.user.clone();
    if asked.uid.is_some() || asked.username.as_ref().is_some_and(|name| !name.is_empty()) {
        return Ok((asked, String::new()));
    }
    asked.supplemental_groups.extend(&appc.supplementary_gids);
    let (user, group) = container.image.config.user.split_once(':').unwrap_or((&container.image.config.user, ""));
    let layers = &container.rootfs.lookup;
    let user = if user.starts_with('/') { owner(layers, user)?.0.to_string() } else { user.to_owned() };
    let group = if group.starts_with('/') { owner(layers, group)?.1.to_string() } else { group.to_owned() };
    Ok((asked, format!("{user}:{group}")))
}

/// User and group of a file of the image.
fn owner(layers: &[PathBuf], path: &str) -> Result<(u32, u32)> {
    let stat = match lookup::resolve(layers, Path::new(path))? {
        Some(Target::Dir(dir)) => rustix::fs::fstat(dir.top()?).map_err(|e| Error::io(format!("look at {path} of the image"), e.into()))?,
        Some(Target::Other { stat, .. }) => stat,
        None => return Err(Error::invalid(format!("the image's user is the owner of {path:?}, which it does not have"))),
    };
    Ok((stat.st_uid, stat.st_gid))
}

#[cfg(test)]
mod tests;
