//! Starting a shim: the `start` verb with a deadline. Ours runs from a sealed copy in memory, so that no container can reach
//! the program on disk through `/proc/PID/exe` and overwrite it (attack case 26).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags};
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::client::NAMESPACE;
use crate::model::PodId;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::shim::{SOCKET_VARIABLE, TASK_V2, TASK_V3};
use crate::stdx::failpoint;

/// Bytes of what a shim printed that are worth showing.
const SHOWN: usize = 2000;

/// A program to start shims from.
#[derive(Debug)]
pub enum Program {
    /// Our own: an unchangeable copy.
    Sealed(OwnedFd),
    /// Somebody else's.
    Path(PathBuf),
}

impl Program {
    /// Copies the program at `path` into memory and seals it.
    ///
    /// # Errors
    /// I/O errors with the path.
    pub fn seal(path: &Path) -> Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // MFD_EXEC (kernel 6.3) says that it is meant to be executed; older kernels do not know the flag and need none.
        let memory = rustix::fs::memfd_create(c"mesocri-shim", flags | MemfdFlags::EXEC).or_else(|_| rustix::fs::memfd_create(c"mesocri-shim", flags));
        let mut memory = File::from(memory.act("create", "memory file for the shim")?);
        let mut program = File::open(path).act("open shim", path.display())?;
        std::io::copy(&mut program, &mut memory).act("copy shim", path.display())?;
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&memory, seals).act("seal copy of", path.display())?;
        Ok(Self::Sealed(memory.into()))
    }

    fn executable(&self) -> PathBuf {
        match self {
            // Resolved in the child before its descriptors marked close-on-exec are closed.
            Self::Sealed(fd) => PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())),
            Self::Path(path) => path.clone(),
        }
    }
}

/// What the `start` verb said.
#[derive(Debug, PartialEq, Eq)]
pub struct Started {
    /// `unix://...`
    pub address: String,
    /// Task service it speaks.
    pub task: &'static str,
}

/// Runs the `start` verb in `bundle`. `socket` is where our shim is to listen; foreign ones choose themselves.
///
/// # Errors
/// `DeadlineExceeded`; what the shim wrote when it failed.
pub async fn start(program: &Program, pod: &PodId, bundle: &Path, socket: &Path, limit: Duration) -> Result<Started> {
    let what = || format!("start shim of pod {}", pod.short());
    let output = match program {
        Program::Path(_) => run(program, pod.as_str(), bundle, socket, limit, "start").await?,
        // Ours is the shim itself, and has no more to say once it serves.
        Program::Sealed(_) => match tokio::time::timeout(limit, serve(program, pod, bundle, socket)).await {
            Ok(output) => output.map_err(|e| e.within(what()))?,
            Err(_) => return Err(Error::new(Kind::DeadlineExceeded, what())),
        },
    };
    parse(&String::from_utf8_lossy(&output))
}

/// Starts our shim and hears it out. It goes on when the daemon ends; while the daemon runs, tokio reaps what it left.
async fn serve(program: &Program, pod: &PodId, bundle: &Path, socket: &Path) -> Result<Vec<u8>> {
    let mut command = command(program, pod.as_str(), bundle, socket);
    command.arg("start").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().act("run", program.executable().display())?;
    let mut shim = Unheard(Some(child));
    let Some(child) = shim.0.as_mut() else { return Err(Error::internal("run shim: no process")) };
    let (mut output, mut said) = (Vec::new(), Vec::new());
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (Some(mut out), Some(mut err)) = (out, err) else { return Err(Error::internal("run shim: no pipes")) };
    tokio::try_join!(out.read_to_end(&mut output), err.read_to_end(&mut said)).act("read", "what the shim prints")?;
    if output.is_empty() {
        let status = child.wait().await.act("wait for", "shim")?;
        return Err(failure(status, &said));
    }
    shim.0 = None;
    Ok(output)
}

/// A shim that nobody knows of yet: it ends with whoever waits for its word.
struct Unheard(Option<tokio::process::Child>);

impl Drop for Unheard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It may have ended by itself.
            let _ = child.start_kill();
        }
    }
}

/// Runs the `delete` verb for the container `id` in its `bundle`: the cleaning up that only the runtime of a lost shim can do.
///
/// # Errors
/// As [`start`].
pub async fn delete(program: &Program, id: &str, bundle: &Path, limit: Duration) -> Result<()> {
    // containerd's shims look for the bundle beside their working directory, by the id, and ours of a sandbox has another name.
    let named = bundle.with_file_name(id);
    let alias = named != bundle && std::os::unix::fs::symlink(bundle, &named).is_ok();
    let result = run(program, id, bundle, Path::new(""), limit, "delete").await.map(drop);
    if alias {
        // What is left of it goes with the pod's directory.
        let _ = std::fs::remove_file(&named);
    }
    result
}

fn command(program: &Program, id: &str, bundle: &Path, socket: &Path) -> Command {
    let mut command = Command::new(program.executable());
    command.current_dir(bundle).args(["-namespace", NAMESPACE, "-id", id, "-address", ""]);
    match program {
        Program::Sealed(_) => {
            command.arg0("containerd-shim-mesocri-v1").env_clear().env(SOCKET_VARIABLE, socket);
            command.envs(failpoint::for_shims().map(|armed| (failpoint::VARIABLE, armed)));
        }
        // containerd's shims insist on a publisher; /bin/true takes their events and forgets them.
        Program::Path(_) => {
            command.args(["-publish-binary", "/bin/true"]);
        }
    }
    command
}

async fn run(program: &Program, id: &str, bundle: &Path, socket: &Path, limit: Duration, verb: &str) -> Result<Vec<u8>> {
    let mut command = command(program, id, bundle, socket);
    if verb == "delete" {
        command.arg("-bundle").arg(bundle);
    }
    command.arg(verb).stdin(Stdio::null()).kill_on_drop(true);
    let what = || format!("{verb} shim of {id}");
    let output = match tokio::time::timeout(limit, command.output()).await {
        Ok(output) => output.act("run", program.executable().display()).map_err(|e| e.within(what()))?,
        Err(_) => return Err(Error::new(Kind::DeadlineExceeded, what())),
    };
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(failure(output.status, &output.stderr).within(what()))
}

/// A shim that ended without an address, with what it said.
fn failure(status: std::process::ExitStatus, said: &[u8]) -> Error {
    let said = String::from_utf8_lossy(said);
    let said = if said.trim().is_empty() { "it said nothing" } else { said.trim() };
    Error::internal(format!("{status}: {}", said.get(..SHOWN).unwrap_or(said)))
}

/// A plain address, or (containerd 2) a JSON object with the version of the task service.
fn parse(text: &str) -> Result<Started> {
    #[derive(Deserialize)]
    struct Bootstrap {
        version: u32,
        address: String,
        #[serde(default)]
        protocol: String,
    }
    let text = text.trim();
    let (address, task) = if text.starts_with('{') {
        let said: Bootstrap = serde_json::from_str(text).act("decode", "what the shim printed")?;
        if !matches!(said.protocol.as_str(), "" | "ttrpc") {
            return Err(Error::new(Kind::Unimplemented, format!("shim speaks {}, only ttrpc is supported", said.protocol)));
        }
        (said.address, if said.version >= 3 { TASK_V3 } else { TASK_V2 })
    } else {
        (text.to_owned(), TASK_V2)
    };
    if !address.starts_with("unix:///") {
        return Err(Error::internal(format!("the shim printed {:?} in place of an address", address.get(..SHOWN).unwrap_or(&address))));
    }
    Ok(Started { address, task })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_an_address_are_read() {
        assert_eq!(parse("unix:///run/s\n").unwrap(), Started { address: "unix:///run/s".to_owned(), task: TASK_V2 });
        let json = r#"{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}"#;
        assert_eq!(parse(json).unwrap().task, TASK_V3);
        for bad in ["", "oops", r#"{"version":3,"address":"unix:///s","protocol":"grpc"}"#, "unix://@abstract"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_sealed_program_runs_and_cannot_be_written() {
        let program = Program::seal(Path::new("/bin/true")).unwrap();
        let executable = program.executable();
        assert!(std::process::Command::new(&executable).status().unwrap().success());
        assert!(std::fs::OpenOptions::new().write(true).open(&executable).and_then(|mut f| std::io::Write::write(&mut f, b"x")).is_err());
    }
}
