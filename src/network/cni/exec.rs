//! Runs one verb of one plugin: environment, configuration on its standard input, result or error on its standard output.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::model::error::{Act, Error, Kind, Result};

/// Most bytes read of a plugin's result or complaints. Results have a few KiB.
const LONGEST_OUTPUT: u64 = 1 << 20;
/// Most bytes of a plugin's complaints that go into an error message.
const LONGEST_QUOTE: usize = 4096;
/// CNI error code "try again later".
const TRY_AGAIN: u32 = 11;
/// CNI error codes of STATUS: the plugin is not available, or is of limited use.
const NOT_AVAILABLE: [u32; 2] = [50, 51];

/// A verb of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Attach.
    Add,
    /// Detach.
    Del,
    /// Is all as ADD left it?
    Check,
    /// Can ADD be served?
    Status,
    /// Free what belongs to none of the given attachments.
    Gc,
}

impl Verb {
    /// As `CNI_COMMAND` says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
        }
    }
}

/// Parameters of a call that concern a pod; empty for STATUS and GC.
#[derive(Clone, Debug, Default)]
pub struct Target {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_NETNS`; empty when the namespace is gone.
    pub netns: String,
    /// `CNI_ARGS`.
    pub args: String,
}

/// Name of the pod's interface.
pub const IFNAME: &str = "eth0";

/// Where plugins are and how long each may take.
#[derive(Clone, Debug)]
pub struct Runner {
    /// Directories, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// For one verb of one plugin.
    pub deadline: Duration,
}

/// What a plugin that failed says.
#[derive(Deserialize)]
struct Complaint {
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Runner {
    /// The program of a plugin.
    ///
    /// # Errors
    /// `FailedPrecondition` with the directories that were searched.
    pub fn find(&self, plugin: &str) -> Result<PathBuf> {
        let mut paths = self.bin_dirs.iter().map(|dir| dir.join(plugin));
        let executable = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        paths.find(executable).ok_or_else(|| {
            let dirs: Vec<_> = self.bin_dirs.iter().map(|d| d.display().to_string()).collect();
            Error::precondition(format!("find CNI plugin {plugin} in {}", dirs.join(", ")))
        })
    }

    /// Runs `plugin` with `config` as its input. Returns its result, `None` when it says nothing.
    ///
    /// # Errors
    /// The plugin's own words in full; `DeadlineExceeded` after killing it and all it started.
    pub async fn run(&self, plugin: &str, verb: Verb, target: &Target, config: &Value) -> Result<Option<Value>> {
        let what = || format!("CNI plugin {plugin} {}", verb.name());
        let input = serde_json::to_vec(config).act("encode configuration of", what())?;
        let child = self.start(plugin, verb, target)?;
        let (status, stdout, stderr) = self.finish(child, &input, &what).await?;
        if !status.success() {
            return Err(complaint(&what(), &status.to_string(), &stdout, &stderr));
        }
        if stdout.trim_ascii().is_empty() {
            return Ok(None);
        }
        match serde_json::from_slice(&stdout) {
            Ok(result) => Ok(Some(result)),
            Err(e) => Err(Error::with(Kind::Internal, format!("{}: result is no JSON: {}", what(), quote(&stdout)), e)),
        }
    }

    fn start(&self, plugin: &str, verb: Verb, target: &Target) -> Result<Child> {
        let path = self.find(plugin)?;
        let dirs = std::env::join_paths(&self.bin_dirs).map_err(|e| Error::with(Kind::InvalidArgument, "join network.cni.bin_dirs", e))?;
        let mut command = Command::new(&path);
        command.env("CNI_COMMAND", verb.name()).env("CNI_PATH", dirs);
        if matches!(verb, Verb::Add | Verb::Del | Verb::Check) {
            command.env("CNI_CONTAINERID", &target.container).env("CNI_NETNS", &target.netns);
            command.env("CNI_IFNAME", IFNAME).env("CNI_ARGS", &target.args);
        }
        // A group of its own, so that what it starts can be killed with it.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
        command.spawn().act("start", path.display())
    }

    /// Feeds and drains the plugin until it has exited and closed its outputs, or the deadline is over.
    async fn finish(&self, mut child: Child, input: &[u8], what: &impl Fn() -> String) -> Result<(std::process::ExitStatus, Vec<u8>, Vec<u8>)> {
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        let talk = async {
            let feed = async {
                if let Some(mut stdin) = stdin {
                    // A plugin that does not read its input may be right all the same; its exit says so.
                    let _ = stdin.write_all(input).await;
                }
            };
            let (_, out, err) = tokio::join!(feed, drain(stdout), drain(stderr));
            Ok::<_, std::io::Error>((child.wait().await?, out?, err?))
        };
        match tokio::time::timeout(self.deadline, talk).await {
            Ok(result) => result.act("talk to", what()),
            Err(_) => {
                if let Some(group) = group {
                    // ESRCH: it ended this moment.
                    let _ = killpg(group, Signal::SIGKILL);
                }
                child.wait().await.act("wait for", what())?;
                Err(Error::new(Kind::DeadlineExceeded, format!("{}: no answer within {:?}, killed", what(), self.deadline)))
            }
        }
    }
}

async fn drain(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(LONGEST_OUTPUT).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

/// The error a failed plugin reports: its own document if there is one, else everything it printed.
fn complaint(what: &str, status: &str, stdout: &[u8], stderr: &[u8]) -> Error {
    if let Ok(said) = serde_json::from_slice::<Complaint>(stdout) {
        let kind = if said.code == TRY_AGAIN || NOT_AVAILABLE.contains(&said.code) { Kind::Unavailable } else { Kind::Internal };
        let details = if said.details.is_empty() { String::new() } else { format!("; {}", said.details) };
        return Error::new(kind, format!("{what}: {}{details} (code {})", said.msg, said.code));
    }
    let printed = [stderr, stdout].map(quote).into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ");
    Error::internal(format!("{what}: {status}: {}", if printed.is_empty() { "no message" } else { &printed }))
}

fn quote(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes.get(..LONGEST_QUOTE).unwrap_or(bytes));
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_kept_in_full() {
        let e = complaint("p ADD", "exit 1", br#"{"code":7,"msg":"bad range","details":"10.0.0.0/33"}"#, b"noise");
        assert_eq!(e.to_string(), "p ADD: bad range; 10.0.0.0/33 (code 7)");
        assert_eq!(complaint("p", "x", br#"{"code":11,"msg":"later"}"#, b"").kind, Kind::Unavailable);
        assert_eq!(complaint("p ADD", "exit 2", b"out\n", b"err\n").to_string(), "p ADD: exit 2: err; out");
        assert_eq!(complaint("p ADD", "exit 2", b"", b"").to_string(), "p ADD: exit 2: no message");
    }
}
