//! Pinned network namespaces: made, entered and removed here.
//!
//! A namespace is pinned by a bind mount of `/proc/thread-self/ns/net` on an empty file, so it lives without any process, is
//! found by `ip netns`, and survives the daemon. Only the file is mounted on: nothing is changed about the propagation of the
//! directory or of `/run`, so the pin spreads (or not) as the host decided for them, and removal spreads the same way.
//!
//! Namespaces belong to threads. Work in one is done on a thread of its own that ends afterwards, so that no
//! pooled thread is ever left in the wrong place. Such a thread costs about 50 µs.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::model::error::{Act, Error, Kind, Result};

/// Moves the calling thread into a new network namespace and pins that at `pin`. Only for threads made by [`on_thread`].
///
/// # Errors
/// `AlreadyExists` when something is at `pin`; nothing is left behind on failure.
pub fn unshare_and_pin(pin: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o444).open(pin);
    match file {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let dir = pin.parent().unwrap_or(Path::new("/"));
            // 0755 as other tools make it: names of namespaces are no secret and `ip netns` lists them.
            DirBuilder::new().recursive(true).mode(0o755).create(dir).act("create directory", dir.display())?;
            OpenOptions::new().write(true).create_new(true).mode(0o444).open(pin).act("create", pin.display())?;
        }
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(Error::with(Kind::AlreadyExists, format!("create network namespace {}", pin.display()), e));
        }
        Err(e) => return Err(Error::io(format!("create {}", pin.display()), e)),
    }
    let made = unshare(CloneFlags::CLONE_NEWNET).act("unshare", "network namespace").and_then(|()| {
        mount(Some("/proc/thread-self/ns/net"), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>).act("bind network namespace to", pin.display())
    });
    if made.is_err() {
        // The file is ours and empty; the error that counts is the one above.
        let _ = std::fs::remove_file(pin);
    }
    made
}

/// Unpins a namespace: it goes as soon as no process is in it. Fine when there is none.
///
/// # Errors
/// When the mount or the file cannot be removed.
pub fn remove(pin: &Path) -> Result<()> {
    // Detached: a process that looks at the file must not keep the pod from going.
    match umount2(pin, MntFlags::MNT_DETACH) {
        // EINVAL: the file is there and nothing is mounted on it (a crash between the two steps).
        Ok(()) | Err(nix::errno::Errno::ENOENT | nix::errno::Errno::EINVAL) => {}
        Err(e) => return Err(e).act("unmount", pin.display()),
    }
    match std::fs::remove_file(pin) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("remove {}", pin.display()), e)),
        _ => Ok(()),
    }
}

/// Whether a namespace is pinned at `pin` (and not merely an empty file there).
pub fn is_pinned(pin: &Path) -> bool {
    rustix::fs::statfs(pin).is_ok_and(|fs| fs.f_type == libc::NSFS_MAGIC)
}

/// Runs `work` inside the namespace pinned at `pin`, on a thread of its own.
///
/// # Errors
/// `NotFound` when there is no namespace; what `work` returned.
pub async fn inside<T: Send + 'static>(pin: &Path, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let pin = pin.to_owned();
    on_thread(move || {
        let namespace = match File::open(&pin) {
            Ok(file) if is_pinned(&pin) => file,
            Ok(_) => return Err(Error::not_found(format!("network namespace {}", pin.display()))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::not_found(format!("network namespace {}", pin.display())));
            }
            Err(e) => return Err(Error::io(format!("open {}", pin.display()), e)),
        };
        setns(namespace, CloneFlags::CLONE_NEWNET).act("enter network namespace", pin.display())?;
        work()
    })
    .await
}

/// Runs `work` on a new thread that may change its namespaces, and waits for it. The work goes on when the caller leaves.
///
/// # Errors
/// What `work` returned; `Internal` when it panicked; `ResourceExhausted` when no thread can be made.
pub async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // The stack is touched as needed; netlink messages and paths are all that lies on it.
    std::thread::Builder::new()
        .name("netns".into())
        .stack_size(256 * 1024)
        .spawn(move || {
            // Nobody waits any more when this fails: the caller was dropped.
            let _ = sender.send(work());
        })
        .act("start thread", "netns")?;
    receiver.await.map_err(|_| Error::internal("network namespace thread panicked"))?
}
