//! `docker/runtime`: what an image's configuration and the request together say about the process: words, directory,
//! environment, user, terminal, stop signal, anonymous volumes (cri-behaviour §10, §11; image-spec config.md).
//!
//! Everything here comes from an image, so from a stranger: it is checked as such (attack cases 13 to 18).

pub(super) mod lookup;
mod signal;
pub(super) mod user;
pub(super) mod volumes;

use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::parts::{NoConfig, config, host_name, options};
use super::{ContainerCx, Cx, Entry, Isolator};
use crate::disk::Layout;
use crate::model::error::{Error, Result};
use crate::model::image::ImageConfig;
use crate::model::plan::LaunchPatch;
use crate::model::{ContainerId, ContainerSpec, PodId, PodSpec};

const NAME: &str = "docker/runtime";
/// `PATH` of images that set none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["filesystem/linux"],
    options: |table| options::<NoConfig>(NAME, table),
    create: |deps, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(DockerRuntime { layout: deps.layout.clone() }))
    },
};

struct DockerRuntime {
    layout: Layout,
}

#[async_trait]
impl Isolator for DockerRuntime {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let Some(container) = &cx.container else { return Ok(LaunchPatch::default()) };
        let (spec, image) = (container.spec, &container.image.config);
        if image.appc.is_some() {
            // `appc/runtime` has the word.
            return Ok(LaunchPatch::default());
        }
        Ok(LaunchPatch {
            args: Some(args(spec, image)?),
            cwd: Some(cwd(spec, image)?),
            env: env(cx.pod, spec, image)?,
            terminal: Some(spec.tty),
            user: Some(user::resolve(&spec.security.user, &image.user, &container.rootfs.lookup)?),
            stop_signal: Some(stop_signal(container)),
            mounts: volumes::prepare(&self.layout.volumes(cx.pod_id, container.id), container).await?,
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

/// The command: what the container says replaces what the image says, its arguments alone replace the image's.
///
/// # Errors
/// `InvalidArgument` when there is none.
pub(super) fn args(spec: &ContainerSpec, image: &ImageConfig) -> Result<Vec<String>> {
    let (first, rest) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (false, _) => (&spec.command, &spec.args),
        (true, false) => (&image.entrypoint, &spec.args),
        (true, true) => (&image.entrypoint, &image.cmd),
    };
    let args: Vec<String> = first.iter().chain(rest).cloned().collect();
    if args.is_empty() {
        return Err(Error::invalid("no command specified, neither by the container nor by its image"));
    }
    match args.iter().find(|word| word.contains('\0')) {
        Some(word) => Err(Error::invalid(format!("command word {word:?} holds a NUL byte"))),
        None => Ok(args),
    }
}

/// The working directory.
///
/// # Errors
/// `InvalidArgument` for one that no path can be.
pub(super) fn cwd(spec: &ContainerSpec, image: &ImageConfig) -> Result<String> {
    let asked = spec.working_dir.as_deref().filter(|d| !d.is_empty()).unwrap_or(&image.working_dir);
    if asked.bytes().any(|b| b == 0 || b == b'\n' || b == b'\r') {
        return Err(Error::invalid(format!("working directory {asked:?} holds a NUL byte or a line break")));
    }
    // A relative one counts from the root; an empty one is the root.
    let joined: PathBuf = Path::new("/").join(asked);
    Ok(joined.to_string_lossy().into_owned())
}

/// In this order, a later value of a name replacing an earlier one: defaults, the image's, the container's.
///
/// # Errors
/// `InvalidArgument` for what no environment can hold.
pub(super) fn env(pod: &PodSpec, spec: &ContainerSpec, image: &ImageConfig) -> Result<Vec<(String, Vec<u8>)>> {
    let mut env: Vec<(String, Vec<u8>)> = vec![("PATH".into(), PATH.into())];
    if spec.tty {
        env.push(("TERM".into(), "xterm".into()));
    }
    let host = if pod.hostname.is_empty() { host_name() } else { pod.hostname.clone() };
    env.push(("HOSTNAME".into(), host.into()));
    // An entry without `=` sets nothing, as in Docker.
    env.extend(image.env.iter().filter_map(|e| e.split_once('=')).map(|(n, v)| (n.to_owned(), v.into())));
    env.extend(spec.envs.iter().map(|e| (e.name.clone(), e.value.clone())));
    for (name, value) in &env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains(&0) {
            return Err(Error::invalid(format!("environment variable {name:?}: empty name, or a NUL byte or = where none can be")));
        }
        // Programs, and the lookup of home directories, take it for a line of a file (attack case 18).
        if name == "HOME" && value.iter().any(|b| matches!(b, b'\n' | b'\r')) {
            return Err(Error::invalid("environment variable HOME holds a line break"));
        }
    }
    Ok(env)
}

/// The signal that asks the first process to end.
pub(super) fn stop_signal(container: &ContainerCx<'_>) -> i32 {
    let image = &container.image.config.stop_signal;
    container
        .spec
        .stop_signal
        .or_else(|| {
            let parsed = signal::parse(image);
            if parsed.is_none() && !image.is_empty() {
                tracing::warn!(container = container.id.short(), signal = image, "the image's stop signal is none; SIGTERM is used");
            }
            parsed
        })
        .unwrap_or(libc::SIGTERM)
}

#[cfg(test)]
mod tests;
