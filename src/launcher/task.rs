//! Containers inside a pod's shim.

use std::path::Path;
use std::sync::Arc;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;

use super::pod::{Pod, Whose};
use super::shims::ShimLauncher;
use super::{TaskLaunch, TaskState, bundle, foreign};
use crate::cgroups::Manager;
use crate::disk::Layout;
use crate::model::error::{Error, Kind, Result};
use crate::model::image::RootMount;
use crate::model::resources::Resources;
use crate::model::shim::{EXTRA_SERVICE, REOPEN_LOG};
use crate::model::{ContainerId, PodId};
use crate::stdx::blocking;
use crate::stdx::crilog::SCHEME;

/// Name of the fifo in a bundle through which a container's input comes.
const STDIN: &str = "stdin";

impl ShimLauncher {
    pub(super) async fn create(&self, pod: &Pod, id: &ContainerId, launch: &TaskLaunch) -> Result<u32> {
        if pod.whose == Whose::Foreign && launch.rootfs.iter().any(needs_images) {
            return Err(Error::precondition(
                "start container under another runtime's shim: its root filesystem is made of layer images, which only our own shim mounts; \
                 use the default runtime handler, or image_provisioner_backend=copy",
            ));
        }
        let dir = self.layout.bundle(&pod.id, id);
        bundle::write(&dir, &launch.plan)?;
        let created = self.create_in(pod, id, launch, &dir).await;
        if created.is_err() {
            foreign::end_pumps(pod, id);
            if pod.whose == Whose::Foreign {
                // The group made for the runtime; what else it made it removed.
                let _ = bundle::made(&dir).and_then(|made| end_made(&made));
            }
            let _ = bundle::remove(&dir);
        }
        created
    }

    async fn create_in(&self, pod: &Pod, id: &ContainerId, launch: &TaskLaunch, dir: &Path) -> Result<u32> {
        let mut request = api::CreateTaskRequest::new();
        request.id = id.as_str().to_owned();
        request.bundle = dir.to_string_lossy().into_owned();
        request.rootfs = launch.rootfs.iter().map(mount).collect();
        request.terminal = launch.io.terminal;
        if launch.io.stdin {
            let fifo = dir.join(STDIN);
            super::exec::make_fifo(&fifo)?;
            request.stdin = fifo.to_string_lossy().into_owned();
        }
        match pod.whose {
            Whose::Ours => {
                if let Some(log) = &launch.io.log {
                    request.stdout = format!("{SCHEME}{}", log.display());
                    request.stderr = if launch.io.terminal { String::new() } else { request.stdout.clone() };
                }
            }
            Whose::Foreign => {
                foreign::make_cgroup(dir)?;
                (request.stdout, request.stderr) = foreign::attach_log(pod, id, dir, &launch.io)?;
                request.options = self.foreign_options(pod)?.into();
            }
        }
        pod.client.task::<api::CreateTaskResponse>("Create", &request).await.map(|answer| answer.pid)
    }

    pub(super) async fn start(&self, pod: &Pod, id: &ContainerId) -> Result<()> {
        let mut request = api::StartRequest::new();
        request.id = id.as_str().to_owned();
        pod.client.task::<api::StartResponse>("Start", &request).await.map(drop)
    }

    pub(super) async fn kill(&self, pod: &Pod, id: &ContainerId, signal: i32, all: bool) -> Result<()> {
        let mut request = api::KillRequest::new();
        request.id = id.as_str().to_owned();
        request.signal = u32::try_from(signal).map_err(|_| Error::invalid(format!("signal {signal}")))?;
        request.all = all;
        // Also after a broken connection: a signal that comes twice does no harm that one lost would not do.
        match pod.shim.ask(|| pod.client.task::<api::Empty>("Kill", &request)).await {
            // runc's shim says "not found" of an ended process too.
            Err(e) if e.kind == Kind::NotFound && pod.whose == Whose::Foreign => match self.state(pod, id).await? {
                TaskState::Gone => Err(e),
                _ => Ok(()),
            },
            result => result.map(drop),
        }
    }

    pub(super) async fn wait(&self, pod: &Pod, id: &ContainerId) -> Result<(i32, i64)> {
        let mut request = api::WaitRequest::new();
        request.id = id.as_str().to_owned();
        let answer: api::WaitResponse = pod.shim.ask(|| pod.client.task_unbounded("Wait", &request)).await?;
        if pod.whose == Whose::Foreign {
            foreign::drain(pod, id).await;
        }
        Ok((code(answer.exit_status), nanoseconds(answer.exited_at.as_ref())))
    }

    pub(super) async fn state(&self, pod: &Pod, id: &ContainerId) -> Result<TaskState> {
        let mut request = api::StateRequest::new();
        request.id = id.as_str().to_owned();
        let answer: api::StateResponse = match pod.shim.ask(|| pod.client.task("State", &request)).await {
            Err(e) if e.kind == Kind::NotFound => return Ok(TaskState::Gone),
            answer => answer?,
        };
        Ok(match answer.status.enum_value_or_default() {
            api::Status::CREATED => TaskState::Created { pid: answer.pid },
            api::Status::RUNNING | api::Status::PAUSED | api::Status::PAUSING => TaskState::Running { pid: answer.pid },
            api::Status::STOPPED => TaskState::Exited { code: code(answer.exit_status), at: nanoseconds(answer.exited_at.as_ref()) },
            api::Status::UNKNOWN => return Err(Error::internal(format!("shim does not know the state of container {}", id.short()))),
        })
    }

    pub(super) async fn delete(&self, pod: &PodId, id: &ContainerId) -> Result<()> {
        let dir = self.layout.bundle(pod, id);
        let mut foreign = false;
        let asked = match self.known(pod) {
            Some(pod) => {
                foreign = pod.whose == Whose::Foreign;
                let asked = delete_or_kill(self, &pod, id).await;
                foreign::end_pumps(&pod, id);
                asked
            }
            None => Err(Error::new(Kind::Unavailable, format!("pod {} has no shim", pod.short()))),
        };
        match asked {
            Err(e) if e.kind == Kind::Unavailable => {
                // The shim is gone: kill what it recorded, remove the cgroup, ourselves.
                self.forget_lost(pod, id.as_str(), &dir).await;
                let dir = dir.clone();
                blocking::run("clean up lost container", move || end_made(&bundle::made(&dir)?)).await?;
            }
            Err(e) if e.kind == Kind::NotFound => {}
            result => result?,
        }
        let end = move || {
            if foreign {
                end_made(&bundle::made(&dir)?)?;
            }
            bundle::remove(&dir)
        };
        blocking::run("remove bundle", end).await
    }

    pub(super) async fn update(&self, pod: &Pod, id: &ContainerId, resources: &Resources) -> Result<()> {
        match pod.whose {
            // The cgroup is reached as well from here; the shim needs no work.
            Whose::Ours => {
                let made = bundle::made(&self.layout.bundle(&pod.id, id))?;
                let path = made.cgroup.ok_or_else(|| Error::precondition(format!("container {} has no cgroup of the shim's", id.short())))?;
                let resources = resources.clone();
                blocking::run("update cgroup", move || Manager::open(&path)?.update(&resources)).await
            }
            Whose::Foreign => foreign::update(pod, id, resources).await,
        }
    }

    pub(super) async fn reopen(&self, pod: &Pod, id: &ContainerId) -> Result<()> {
        match pod.whose {
            Whose::Ours => {
                let mut request = api::StateRequest::new();
                request.id = id.as_str().to_owned();
                pod.client.call::<api::Empty>(EXTRA_SERVICE, REOPEN_LOG, &request, Some(self.config.request_limit())).await.map(drop)
            }
            Whose::Foreign => foreign::reopen(pod, id),
        }
    }

    /// Containers that have a bundle.
    pub(super) fn bundled_containers(&self, pod: &PodId) -> Result<Vec<ContainerId>> {
        Self::containers_with_bundle(&self.layout, pod)
    }

    pub(super) fn containers_with_bundle(layout: &Layout, pod: &PodId) -> Result<Vec<ContainerId>> {
        let dir = layout.run_pod(pod).join("containers");
        let entries = match std::fs::read_dir(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| Error::io(format!("read {}", dir.display()), e))?,
        };
        Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).map(ContainerId::from_string).collect())
    }
}

async fn delete_or_kill(launcher: &ShimLauncher, pod: &Arc<Pod>, id: &ContainerId) -> Result<()> {
    let mut request = api::DeleteRequest::new();
    request.id = id.as_str().to_owned();
    let delete = async || pod.shim.ask(|| pod.client.task::<api::DeleteResponse>("Delete", &request)).await;
    match delete().await {
        // It runs still (runc's shim and ours word it differently, so the state is asked for).
        Err(e) if !matches!(e.kind, Kind::NotFound | Kind::Unavailable) => {
            tracing::debug!(container = %id, error = %e, "delete again");
            if matches!(launcher.state(pod, id).await?, TaskState::Running { .. } | TaskState::Created { .. }) {
                launcher.kill(pod, id, libc::SIGKILL, true).await?;
            }
            // Also for one that was ending just then.
            launcher.wait(pod, id).await?;
            delete().await.map(drop)
        }
        result => result.map(drop),
    }
}

/// Kills and removes what a shim that is gone had made.
pub(super) fn end_made(made: &crate::disk::bundle::Made) -> Result<()> {
    if let Some(process) = &made.process {
        process.kill()?;
    }
    match &made.cgroup {
        Some(path) => {
            let manager = Manager::open(path)?;
            manager.kill()?;
            manager.delete()
        }
        None => Ok(()),
    }
}

fn mount(mount: &RootMount) -> api::Mount {
    let mut wire = api::Mount::new();
    wire.type_ = mount.fstype.clone();
    wire.source = mount.source.clone();
    wire.options = mount.options.clone();
    wire
}

pub(super) fn code(status: u32) -> i32 {
    i32::try_from(status).unwrap_or(255)
}

fn nanoseconds(time: Option<&Timestamp>) -> i64 {
    time.map_or(0, |t| t.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(t.nanos)))
}

/// Whether layers are kept as images that the mount itself must mount first: an extension of ours to containerd's mounts.
fn needs_images(mount: &RootMount) -> bool {
    let lower = mount.options.iter().filter_map(|o| o.strip_prefix("lowerdir="));
    mount.fstype == "erofs" || lower.flat_map(|l| l.split(':')).any(|layer| crate::disk::layer::is_image(Path::new(layer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_below_an_overlay_are_seen() {
        let mount = |fstype: &str, option: &str| RootMount { fstype: fstype.into(), source: "overlay".into(), options: vec![option.into()] };
        assert!(needs_images(&mount("overlay", "lowerdir=/s/1/fs:/s/2/fs.erofs")));
        assert!(needs_images(&mount("erofs", "ro")));
        assert!(!needs_images(&mount("overlay", "lowerdir=/s/1.erofs/fs:/s/2/fs")));
        assert!(!needs_images(&mount("bind", "rw")));
    }
}
