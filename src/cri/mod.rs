//! F7: the Kubernetes CRI v1 front. Validates, converts, calls the containerizer, converts back; keeps no state that a restart
//! could miss.
//!
//! | file | what |
//! |---|---|
//! | [`rpc`] | the table of calls: which handler answers what; the one place where a call gets its span and its failure is logged |
//! | [`sandbox`], [`container`], [`exec`], [`image`], [`stats`], [`runtime`], [`events`], [`lists`] | the handlers, by topic |
//! | [`convert`] | wire types to plain data and back; everything that can be refused without looking at the machine |
//! | [`status`] | the one table from error class to gRPC code |
//! | [`readiness`], [`v1alpha2`] | layers before all of it |

pub mod container;
pub mod convert;
pub mod events;
pub mod exec;
pub mod image;
pub mod lists;
pub mod readiness;
pub mod rpc;
pub mod runtime;
pub mod sandbox;
pub mod stats;
pub mod status;
#[cfg(test)]
mod tests;
pub mod v1alpha2;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::sync::OnceCell;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::RoutesBuilder;
use tonic::transport::Server;

use crate::containerizer::{Container, Engine, Pod};
use crate::model::error::{Error, Kind, Result};
use crate::model::phase::{ContainerPhase, PodPhase};
use crate::wire::cri::image_service_server::ImageServiceServer;
use crate::wire::cri::runtime_service_server::RuntimeServiceServer;

/// Largest message in either direction; what clients of the CRI take (cri-behaviour §1).
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// How long calls in flight may go on after the daemon was told to end. Whatever they wait for goes on without them.
const CLOSING_TIME: Duration = Duration::from_secs(2);

/// Who makes cgroups. The kubelet must be configured alike and asks for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// The runtime writes to the cgroup file systems.
    #[default]
    Cgroupfs,
    /// systemd, asked over D-Bus.
    Systemd,
}

/// Settings of the front.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name in Version; becomes the scheme of container ids in pod status.
    pub runtime_name: String,
    /// Announced to the kubelet; the daemon takes it from the cgroups isolator, so that there is one place to set it.
    #[serde(skip)]
    pub cgroup_driver: CgroupDriver,
    /// Whether read-only mounts can be made so with everything below them (Linux 5.12): announced, and required for requests. The
    /// daemon turns it off on older kernels.
    pub recursive_read_only: bool,
    /// State directory of the daemon; verbose Status names it and conformance tests probe its file system.
    #[serde(skip)]
    pub state_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self { runtime_name: "mesocri".to_owned(), cgroup_driver: CgroupDriver::default(), recursive_read_only: true, state_dir: PathBuf::from("/run/mesocri") }
    }
}

/// What all handlers share.
pub struct Front {
    engine: Arc<dyn Engine>,
    config: Config,
    /// Last CPU samples, for rates.
    rates: stats::Rates,
    /// Directory on the file system of images and writable layers, asked for once.
    image_dir: OnceCell<PathBuf>,
    /// Ends streams that have no end of their own.
    closing: CancellationToken,
}

impl Front {
    fn new(config: Config, engine: Arc<dyn Engine>, closing: CancellationToken) -> Self {
        Self { engine, config, rates: stats::Rates::default(), image_dir: OnceCell::new(), closing }
    }

    /// The pod that `id` or a unique prefix of it names. Pods in the making are not there yet.
    fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        let pod = self.engine.pod(named(id)?)?;
        if pod.phase == PodPhase::Creating { Err(Error::not_found(format!("pod {id}"))) } else { Ok(pod) }
    }

    /// The container that `id` or a unique prefix of it names. Containers in the making are not there yet.
    fn container(&self, id: &str) -> Result<Arc<Container>> {
        let container = self.engine.container(named(id)?)?;
        if container.phase == ContainerPhase::Creating { Err(Error::not_found(format!("container {id}"))) } else { Ok(container) }
    }

    fn pods(&self) -> impl Iterator<Item = Arc<Pod>> {
        self.engine.pods().into_iter().filter(|p| p.phase != PodPhase::Creating)
    }

    fn containers(&self) -> impl Iterator<Item = Arc<Container>> {
        self.engine.containers().into_iter().filter(|c| c.phase != ContainerPhase::Creating)
    }
}

/// Refuses the empty id: as a prefix it would match whatever happens to be alone.
fn named(id: &str) -> Result<&str> {
    if id.is_empty() { Err(Error::invalid("the request names no id")) } else { Ok(id) }
}

/// Answers the CRI on `listener` until `shutdown`. `beside` may add services of other fronts to the same socket.
///
/// # Errors
/// When the transport fails.
pub async fn serve(
    config: Config,
    engine: Arc<dyn Engine>,
    listener: UnixListener,
    shutdown: CancellationToken,
    beside: impl FnOnce(&mut RoutesBuilder),
) -> Result<()> {
    let gate = readiness::Gate::new(engine.clone());
    let front = Arc::new(Front::new(config, engine, shutdown.clone()));
    let runtime = RuntimeServiceServer::from_arc(front.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let images = ImageServiceServer::from_arc(front).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let mut routes = RoutesBuilder::default();
    routes.add_service(runtime).add_service(images);
    beside(&mut routes);
    let server = Server::builder()
        .layer(v1alpha2::Rename)
        .layer(gate)
        .add_routes(routes.routes())
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown.clone().cancelled_owned());
    let bounded = async {
        shutdown.cancelled().await;
        tokio::time::sleep(CLOSING_TIME).await;
    };
    tokio::select! {
        ended = server => ended.map_err(|e| Error::with(Kind::Internal, "serve the CRI", e)),
        () = bounded => Ok(()),
    }
}
