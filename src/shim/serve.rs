//! Serving: one thread, one runtime, all services on one socket.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::asynchronous::Server;
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;

use super::args::Args;
use super::extra;
use super::sandbox::SandboxService;
use super::supervisor::Supervisor;
use super::task::TaskService;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::shim::{TASK_V2, TASK_V3};

/// Turns of the event loop granted to the answer of the request that ends the shim: handler, writer task and socket need
/// about four. Nothing else may keep it; callers take a broken connection for the answer too.
const LAST_TURNS: usize = 32;

/// Serves until it is told to shut down, then removes the socket.
pub fn serve(listener: UnixListener, socket: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().act("build", "runtime")?;
    let result = runtime.block_on(until_shutdown(listener));
    let _ = std::fs::remove_file(socket);
    result?;
    // Destructors would only wait for connections that have nothing more to say.
    std::process::exit(0)
}

/// Serves on the socket of the `-socket` flag, for debugging.
pub fn foreground(args: &Args) -> Result<()> {
    let socket = args.socket.as_deref().ok_or_else(|| Error::invalid("a verb (start, delete) or the flag -socket is needed"))?;
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).act("bind", socket.display())?;
    serve(listener, socket)
}

async fn until_shutdown(listener: UnixListener) -> Result<()> {
    let supervisor = Arc::new(Supervisor::default());
    let listener = Listener::try_from(listener).act("listen on", "the shim's socket")?;
    let mut server = Server::new().add_listener(listener).register_service(extra::service(supervisor.clone()));
    // The messages of both versions are the same, only the name differs.
    let task = Arc::new(TaskService::new(supervisor.clone()));
    for name in [TASK_V2, TASK_V3] {
        let service = create_task(task.clone()).into_values().map(|service| (name.to_owned(), service)).collect();
        server = server.register_service(service);
    }
    server = server.register_service(create_sandbox(Arc::new(SandboxService::new(supervisor.clone()))));
    server.start().await.map_err(|e| Error::with(Kind::Internal, "serve", e))?;
    supervisor.shutdown_requested().await;
    for _ in 0..LAST_TURNS {
        tokio::task::yield_now().await;
    }
    Ok(())
}
