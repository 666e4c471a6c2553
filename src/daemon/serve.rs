//! The daemon, wired top to bottom in one readable function: directories and lock, components, socket, recovery, serving.
//!
//! There is no clean-shutdown path: on SIGTERM the daemon stops listening and leaves; shims and containers stay. A start after
//! SIGTERM and one after SIGKILL are the same.

use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::config::Config;
use crate::containerizer::{Containerizer, Engine};
use crate::disk::{Layout, version};
use crate::isolators::{Deps, Isolators};
use crate::launcher::ShimLauncher;
use crate::model::error::{Act as _, Error, Kind, Result};
use crate::provisioner::{Images, Provisioner};

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting, or the socket's failure.
pub async fn run(config: Config) -> Result<()> {
    config.check()?;
    let layout = config.layout();
    prepare_tree(&layout)?;
    let _lock = lock(&layout)?;

    let provisioner = Provisioner::open(config.provisioner.clone(), layout.clone()).await?;
    let images: Arc<dyn Images> = provisioner.clone();
    let launcher = ShimLauncher::new(config.launcher.clone(), layout.clone())?;
    let network = crate::network::build(config.network.clone(), layout.clone()).await?;
    let deps = Deps { layout: layout.clone(), network: network.clone() };
    let isolators = Isolators::build(&config.isolation, &config.isolator, &deps)?;
    tracing::info!(isolators = ?isolators.names(), root = %layout.root.display(), "components are built");
    let containerizer = Containerizer::new(config.containerizer.clone(), layout.clone(), images, launcher, isolators, network);

    let listener = listen(&config.socket())?;
    let shutdown = CancellationToken::new();
    let engine: Arc<dyn Engine> = containerizer.clone();
    let operator = crate::operator::service(engine.clone(), provisioner.clone());
    let server = tokio::spawn(crate::cri::serve(cri_config(&config)?, engine, listener, shutdown.clone(), move |routes| {
        routes.add_service(operator);
    }));
    tracing::info!(socket = %config.socket().display(), "listening; calls answer Unavailable until recovery is done");

    let mut terminate = signal(SignalKind::terminate()).act("watch", "SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).act("watch", "SIGINT")?;
    let recovery = async {
        containerizer.recover().await?;
        tracing::info!("ready");
        notify_systemd();
        // Best effort: it is only memory.
        let _ = crate::sys::pages::forget_text();
        Ok::<_, Error>(())
    };
    tokio::select! {
        done = recovery => done?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    tokio::spawn(provisioner.watch(shutdown.clone()));
    tokio::spawn(super::quiet::give_back(containerizer.events(), shutdown.clone()));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = server => return ended.unwrap_or_else(|e| Err(Error::with(Kind::Internal, "serve the CRI", e))),
    }
    tracing::info!("stopping; containers keep running");
    shutdown.cancel();
    Ok(())
}

/// Removes what the built-in network leaves on the host when no pod is attached (`mesocri network prune`).
///
/// # Errors
/// `FailedPrecondition` while a daemon runs on these directories or pods are attached.
pub async fn prune_network(config: Config) -> Result<()> {
    config.check()?;
    let layout = config.layout();
    // Without a root nothing was ever recorded; without a state directory (a reboot) no daemon can be running.
    if !layout.root.is_dir() {
        return Err(Error::precondition(format!("prune network: there is no mesocri tree at {}; --work_dir names another", layout.root.display())));
    }
    let _lock = if layout.state.is_dir() { Some(lock(&layout)?) } else { None };
    version::check(&layout)?;
    crate::network::prune(config.network, layout).await
}

/// What the CRI front announces of other components is taken from their own configuration.
fn cri_config(config: &Config) -> Result<crate::cri::Config> {
    let mut cri = config.cri.clone();
    cri.state_dir.clone_from(&config.state);
    cri.recursive_read_only &= crate::sys::mount::can_set_attributes();
    if let Some(driver) = config.isolator.get("cgroups").and_then(|t| t.get("driver")) {
        cri.cgroup_driver = driver.clone().try_into().map_err(|e| Error::invalid(format!("read isolator.cgroups.driver: {e}")))?;
    }
    Ok(cri)
}

/// Checks the tree's version and makes what is missing, both roots owner-only.
fn prepare_tree(layout: &Layout) -> Result<()> {
    for dir in [&layout.root, &layout.state] {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).act("create directory", dir.display())?;
        // It may have existed with another mode (attack case 24: world-readable state).
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).act("set the mode of", dir.display())?;
    }
    version::check(layout)?;
    for dir in [layout.store(), layout.layers(), layout.images(), layout.staging(), layout.leases(), layout.rootfs_all(), layout.pods(), layout.networks()] {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).act("create directory", dir.display())?;
    }
    for dir in [layout.shims(), layout.run_pods(), layout.seccomp()] {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).act("create directory", dir.display())?;
    }
    Ok(())
}

/// One daemon per state directory and per root; held by an open file, so it ends with the process however that ends.
fn lock(layout: &Layout) -> Result<[nix::fcntl::Flock<std::fs::File>; 2]> {
    let take = |path: std::path::PathBuf| {
        let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path).act("open", path.display())?;
        nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| Error::with(Kind::FailedPrecondition, format!("lock {}: another mesocri daemon uses this directory", path.display()), errno))
    };
    Ok([take(layout.lock())?, take(layout.root.join("lock"))?])
}

/// Binds the socket 0660. A stale one is replaced: the lock says that nobody serves it.
fn listen(path: &Path) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).act("create directory", dir.display())?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(format!("remove stale socket {}", path.display()), e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).act("listen on", path.display())?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).act("set the mode of", path.display())?;
    Ok(listener)
}

/// Tells systemd that the service is up (sd_notify(3)); does nothing elsewhere.
fn notify_systemd() {
    use std::os::linux::net::SocketAddrExt as _;
    let Ok(address) = std::env::var("NOTIFY_SOCKET") else { return };
    let Ok(socket) = std::os::unix::net::UnixDatagram::unbound() else { return };
    let sent = match address.strip_prefix('@') {
        Some(name) => std::os::unix::net::SocketAddr::from_abstract_name(name).and_then(|to| socket.send_to_addr(b"READY=1", &to)),
        None => socket.send_to(b"READY=1", &address),
    };
    if let Err(e) = sent {
        tracing::warn!(error = %e, "could not notify systemd");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unknown_isolator_or_option_is_refused_before_anything_is_made() {
        let scratch = tempfile::tempdir().unwrap();
        let good = Config { root: scratch.path().join("root"), state: scratch.path().join("state"), ..Config::default() };
        let config = Config { isolation: vec!["filesystem/linux".into(), "docker/runtime".into(), "typo/linux".into()], ..good.clone() };
        let error = run(config).await.unwrap_err().to_string();
        assert!(error.starts_with("unknown isolator \"typo/linux\"; there are "), "{error}");
        let config = Config { isolator: "[\"linux/nnp\"]\ncolour = 1".parse().unwrap(), ..good };
        let error = run(config).await.unwrap_err().to_string();
        assert!(error.starts_with("configuration of isolator linux/nnp: ") && error.contains("colour"), "{error}");
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
    }
}
