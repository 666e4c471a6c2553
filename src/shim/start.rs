//! The `start` verb: socket, fork, address. Nothing of tokio exists before the fork.
//!
//! The caller reads standard output to its end, so whoever serves must have closed it. One shim serves a whole pod:
//! when the socket answers already, its address is all there is to print.
//!
//! containerd waits for the process that it started, so that the serving one is a child of that. mesocri's own launcher names the
//! socket and waits for the end of the output only: the process that it started serves, which saves a fork for each pod.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::Deserialize;

use super::args::Args;
use super::serve;
use crate::disk::bundle::{self, Made, Of, Recorded};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::shim::SOCKET_VARIABLE;
use crate::stdx::failpoint;
use crate::sys::daemon::{Side, fork};
use crate::sys::process::close_range;

/// Where sockets lie when the caller named no place: containerd's own directory for them.
const SOCKETS: &str = "/run/containerd/s";
/// Descriptors 0, 1 and 2 are the streams.
const FIRST_AFTER_STREAMS: i32 = 3;
/// Annotations by which Kubernetes fronts say to which pod a container belongs, so that pods share a shim.
const GROUP_LABELS: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// Runs the verb. Returns when there is nothing to serve in this process.
pub fn start(args: &Args) -> Result<()> {
    let socket = socket_path(args)?;
    let address = format!("unix://{}", socket.display());
    let alone = std::env::var_os(SOCKET_VARIABLE).is_some();
    if UnixStream::connect(&socket).is_err() {
        let listener = listen(&socket)?;
        if alone {
            failpoint::hit("shim.start.listens");
            leave_word()?;
            failpoint::hit("shim.start.recorded");
            announce(&address)?;
            detach(&listener)?;
            failpoint::hit("shim.start.announced");
            // Nobody reads errors any more.
            let _ = serve::serve(listener, &socket);
            std::process::exit(1);
        }
        match fork().act("fork", "shim")? {
            Side::Parent(_) => {}
            Side::Child => {
                // From here on nobody reads errors; a child that cannot serve ends, and the caller's connect fails.
                let _ = leave_word().and_then(|()| detach(&listener)).and_then(|()| serve::serve(listener, &socket));
                std::process::exit(1);
            }
        }
    }
    announce(&address)
}

/// Prints the address, and leaves it in the bundle, which is the working directory: containerd finds the shim again by this file.
fn announce(address: &str) -> Result<()> {
    bundle::put(Path::new(bundle::ADDRESS), address.as_bytes())?;
    let mut out = std::io::stdout();
    out.write_all(address.as_bytes()).and_then(|()| out.flush()).act("write", "address")
}

/// The daemon may die before it hears of this shim: its successor finds the process by this record. No bundle any more means
/// that it has looked already; then this shim must not live either.
fn leave_word() -> Result<()> {
    let own = Recorded::of(std::process::id())?;
    bundle::write(Path::new("."), Of::Shim, &Made { process: Some(own), cgroup: None })
}

fn socket_path(args: &Args) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(SOCKET_VARIABLE).map(PathBuf::from).or_else(|| args.socket.clone()) {
        return Ok(path);
    }
    if args.id.is_empty() || args.namespace.is_empty() {
        return Err(Error::invalid("flags -id and -namespace are needed"));
    }
    let group = group(Path::new(bundle::CONFIG)).unwrap_or_else(|| args.id.clone());
    let name = fingerprint(&[&args.address, &args.namespace, &group]);
    Ok(Path::new(SOCKETS).join(format!("mesocri-{name:032x}")))
}

/// The pod named by the annotations of the bundle in the working directory.
fn group(config: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: std::collections::BTreeMap<String, String>,
    }
    let text = std::fs::read(config).ok()?;
    let mut spec: Annotated = serde_json::from_slice(&text).ok()?;
    GROUP_LABELS.iter().find_map(|label| spec.annotations.remove(*label))
}

/// FNV-1a, 128 bits: a short name for long parts. Not a secret and not a defence: the parts come from containerd.
fn fingerprint(parts: &[&str]) -> u128 {
    parts
        .iter()
        .flat_map(|part| part.bytes().chain([0]))
        .fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash: u128, byte| (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b))
}

fn listen(socket: &Path) -> Result<UnixListener> {
    if let Some(dir) = socket.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).act("create", dir.display())?;
    }
    // Nobody answered on it: it is what a killed shim left behind.
    match std::fs::remove_file(socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(format!("remove stale socket {}", socket.display()), e)),
        _ => {}
    }
    // The mode is right from the first moment, not after a chmod.
    let umask = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(socket);
    rustix::process::umask(umask);
    listener.act("bind", socket.display())
}

/// Own session, no terminal, no inherited descriptor but the socket (a caller's pipe would never end), a name for `ps` (the program may have been started from a sealed copy,
/// whose name is a number).
fn detach(listener: &UnixListener) -> Result<()> {
    let socket = listener.as_raw_fd();
    for (first, last) in [(FIRST_AFTER_STREAMS, socket - 1), (socket + 1, i32::MAX)] {
        if first <= last {
            close_range(first, last, false).act("close", "inherited descriptors")?;
        }
    }
    rustix::process::setsid().act("setsid", "shim")?;
    rustix::process::chdir("/").act("chdir", "/")?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).act("open", "/dev/null")?;
    rustix::stdio::dup2_stdin(&null).act("replace", "standard input")?;
    rustix::stdio::dup2_stdout(&null).act("replace", "standard output")?;
    rustix::stdio::dup2_stderr(&null).act("replace", "standard error")?;
    rustix::thread::set_name(c"mesocri-shim").act("name", "shim")?;
    crate::sys::daemon::keep_zombies().map_err(|e| Error::with(Kind::Internal, "reset SIGCHLD", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_fingerprint_do_not_run_together() {
        assert_ne!(fingerprint(&["ab", "c"]), fingerprint(&["a", "bc"]));
        assert_eq!(fingerprint(&["a"]), fingerprint(&["a"]));
    }

    #[test]
    fn pods_share_a_shim_by_annotation() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        assert_eq!(group(&config), None);
        std::fs::write(&config, r#"{"ociVersion":"1.0","annotations":{"io.kubernetes.cri.sandbox-id":"p1"}}"#).unwrap();
        assert_eq!(group(&config), Some("p1".to_owned()));
    }

    #[test]
    fn the_socket_is_for_its_owner_and_replaces_a_dead_one() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("deep/s.sock");
        drop(listen(&socket).unwrap());
        assert!(UnixStream::connect(&socket).is_err());
        let _listener = listen(&socket).unwrap();
        UnixStream::connect(&socket).unwrap();
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
