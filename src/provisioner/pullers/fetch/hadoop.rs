//! `hdfs://` by Hadoop's own command: `hadoop fs -copyToLocal`, as Mesos does it.
//!
//! The command says why it failed in words alone, with one exit code for everything. Whether the file is missing is therefore
//! asked for in a second run, and whether the cluster answers at all in a third, on failure only: each costs the start of a Java
//! machine.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::sync::OnceCell;

use super::{Hdfs, too_long};
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::pullers::child::Group;
use crate::provisioner::pullers::registry::answer::unavailable;
use crate::stdx::blocking;

/// Bytes of what it says that are kept: the last ones.
const SAID: usize = 4 << 10;
/// Characters of that which are shown.
const SHOWN: usize = 400;
/// How often the growth of the file is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Time for an answer without data. A Java machine starts in some seconds even on a busy node.
const ANSWER: Duration = Duration::from_secs(60);

/// The command, looked for once.
pub(super) struct Hadoop {
    home: PathBuf,
    user: String,
    stall: Duration,
    found: OnceCell<Option<Cli>>,
}

/// A command that works.
#[derive(Clone)]
pub(super) struct Cli {
    program: PathBuf,
    user: String,
    stall: Duration,
}

impl Hadoop {
    pub(super) fn new(settings: &Hdfs, stall: Duration) -> Self {
        Self { home: settings.hadoop_home.clone(), user: settings.user.clone(), stall, found: OnceCell::new() }
    }

    /// The command, if this machine has it.
    ///
    /// # Errors
    /// `FailedPrecondition` when `hadoop_home` is set and has none that runs.
    pub(super) async fn command(&self) -> Result<Option<&Cli>> {
        let found = self.found.get_or_try_init(|| async {
            let named = !self.home.as_os_str().is_empty();
            let program = if named { self.home.join("bin/hadoop") } else { "hadoop".into() };
            let cli = Cli { program, user: self.user.clone(), stall: self.stall };
            match cli.run(&["version"]).await {
                Ok(ended) if ended.status.success() => Ok(Some(cli)),
                Ok(ended) if named => Err(Error::precondition(format!("{} version: {}", cli.program.display(), ended.said()))),
                Err(e) if named => Err(Error::with(Kind::FailedPrecondition, "use hadoop_home", e)),
                Ok(ended) => {
                    tracing::warn!(said = ended.said(), "the hadoop command of PATH does not run, WebHDFS is used");
                    Ok(None)
                }
                Err(_) => Ok(None),
            }
        });
        Ok(found.await?.as_ref())
    }
}

impl Cli {
    /// Copies `uri` to `part`, whose directory is ours alone.
    pub(super) async fn fetch(&self, uri: &str, part: &Path, limit: u64) -> Result<u64> {
        let target = part.to_str().ok_or_else(|| Error::invalid(format!("{}: not text", part.display())))?;
        let dir = part.parent().unwrap_or(Path::new("/"));
        let mut growth = tokio::time::interval(LOOK);
        let (mut before, mut still) = (0, Duration::ZERO);
        let args = ["fs", "-copyToLocal", uri, target];
        let mut copying = std::pin::pin!(self.complete(&args));
        let ended = loop {
            tokio::select! {
                ended = &mut copying => break ended?,
                _ = growth.tick() => {
                    let dir = dir.to_owned();
                    let now = blocking::run("look at fetched file", move || Ok::<_, Error>(length(&dir))).await?;
                    still = if now > before { Duration::ZERO } else { still + LOOK };
                    before = now;
                    if now > limit {
                        return Err(too_long(now, limit));
                    }
                    if still > self.stall.max(ANSWER) {
                        return Err(unavailable(format!("hadoop fs -copyToLocal: nothing for {} s, killed", still.as_secs())));
                    }
                }
            }
        };
        if !ended.status.success() {
            return Err(self.why(uri, &ended).await);
        }
        let meta = tokio::fs::symlink_metadata(part).await.act("look at", part.display())?;
        if !meta.is_file() {
            return Err(Error::invalid("it is a directory"));
        }
        if meta.len() > limit { Err(too_long(meta.len(), limit)) } else { Ok(meta.len()) }
    }

    async fn why(&self, uri: &str, ended: &Ended) -> Error {
        let succeeds = async |args: &[&str]| self.run(args).await.is_ok_and(|e| e.status.success());
        let root = uri.split_once("://").map(|(scheme, rest)| format!("{scheme}://{}/", rest.split('/').next().unwrap_or_default())).unwrap_or_default();
        if !succeeds(&["fs", "-test", "-e", uri]).await && succeeds(&["fs", "-test", "-d", &root]).await {
            return Error::not_found(format!("hadoop does not find it: {}", ended.said()));
        }
        unavailable(format!("hadoop fs -copyToLocal: {}", ended.said()))
    }

    /// Runs it for an answer without data.
    async fn run(&self, args: &[&str]) -> Result<Ended> {
        match tokio::time::timeout(ANSWER, self.complete(args)).await {
            Ok(ended) => ended,
            Err(_) => Err(unavailable(format!("run {} {}: no answer within {} s, killed", self.program.display(), args.join(" "), ANSWER.as_secs()))),
        }
    }

    async fn complete(&self, args: &[&str]) -> Result<Ended> {
        let mut command = Command::new(&self.program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        if !self.user.is_empty() {
            command.env("HADOOP_USER_NAME", &self.user);
        }
        let mut group = Group::start(&mut command).act("start", self.program.display())?;
        let mut said = Vec::new();
        if let Some(mut stderr) = group.child.stderr.take() {
            let mut piece = [0; 1024];
            while let Ok(n @ 1..) = stderr.read(&mut piece).await {
                said.extend_from_slice(&piece[..n]);
                let extra = said.len().saturating_sub(SAID);
                said.drain(..extra);
            }
        }
        let status = group.wait().await.act("wait for", self.program.display())?;
        Ok(Ended { status, said })
    }
}

/// How it ended and the last it said.
struct Ended {
    status: ExitStatus,
    said: Vec<u8>,
}

impl Ended {
    /// The last line that says something, and the exit code.
    fn said(&self) -> String {
        let text = String::from_utf8_lossy(&self.said);
        let line = text.lines().map(str::trim).rfind(|l| !l.is_empty()).unwrap_or("no word of why");
        let line: String = line.chars().filter(|c| !c.is_control()).take(SHOWN).collect();
        format!("{line} ({})", self.status)
    }
}

/// Bytes of the files in `dir`: the command writes under a name of its own and renames.
fn length(dir: &Path) -> u64 {
    std::fs::read_dir(dir).map(|entries| entries.flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()).unwrap_or(0)
}
