//! Starting a shim: the `start` verb with a deadline. Ours runs from a sealed copy in memory, so that no container can reach
//! the program on disk through `/proc/PID/exe` and overwrite it (attack case 26).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags};
use serde::Deserialize;

use super::client::NAMESPACE;
use crate::model::PodId;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::shim::{SOCKET_VARIABLE, TASK_V2, TASK_V3};

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
    let output = run(program, pod, bundle, socket, limit, "start").await?;
    parse(&String::from_utf8_lossy(&output))
}

/// Runs the `delete` verb in `bundle`: the cleaning up that only the runtime of a lost shim can do.
///
/// # Errors
/// As [`start`].
pub async fn delete(program: &Program, pod: &PodId, bundle: &Path, limit: Duration) -> Result<()> {
    run(program, pod, bundle, Path::new(""), limit, "delete").await.map(drop)
}

async fn run(program: &Program, pod: &PodId, bundle: &Path, socket: &Path, limit: Duration, verb: &str) -> Result<Vec<u8>> {
    let executable = program.executable();
    let mut command = tokio::process::Command::new(&executable);
    command.current_dir(bundle).args(["-namespace", NAMESPACE, "-id", pod.as_str(), "-address", ""]);
    match program {
        Program::Sealed(_) => {
            command.arg0("containerd-shim-mesocri-v1").env_clear().env(SOCKET_VARIABLE, socket);
        }
        // containerd's shims insist on a publisher; /bin/true takes their events and forgets them.
        Program::Path(_) => {
            command.args(["-publish-binary", "/bin/true"]);
        }
    }
    if verb == "delete" {
        command.arg("-bundle").arg(bundle);
    }
    command.arg(verb).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let what = || format!("{verb} shim of pod {}", pod.short());
    let output = match tokio::time::timeout(limit, command.output()).await {
        Ok(output) => output.act("run", executable.display()).map_err(|e| e.within(what()))?,
        Err(_) => return Err(Error::new(Kind::DeadlineExceeded, what())),
    };
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::internal(format!("{}: {}: {}", what(), output.status, said.trim().get(..SHOWN).unwrap_or(said.trim()))))
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
