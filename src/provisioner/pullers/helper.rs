//! Credential helpers: programs `docker-credential-NAME` that print user and secret for a registry. The secret comes by a pipe
//! and stays in memory; whatever a helper prints is in no error and no log line.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::child::Group;
use super::docker_config::from_user;
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::Credentials;

/// Time a helper may take: some ask a cloud for a token.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Most bytes read of its answer.
const LONGEST_ANSWER: u64 = 1 << 20;
/// What helpers say when they know nothing of a registry (the protocol has no other way).
const NOT_FOUND: &str = "credentials not found in native keychain";

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username", default)]
    username: String,
    #[serde(rename = "Secret", default)]
    secret: String,
}

/// Helpers and how long they may take.
#[derive(Clone, Debug)]
pub struct Helpers {
    /// Where to look for them; empty: where the daemon's `PATH` says.
    pub dirs: Vec<PathBuf>,
    /// For one answer.
    pub deadline: Duration,
}

impl Default for Helpers {
    fn default() -> Self {
        Self { dirs: Vec::new(), deadline: DEADLINE }
    }
}

impl Helpers {
    /// Asks helper `name` for the credentials of `server`; `None` when it has none.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is no file name, `DeadlineExceeded` after killing the helper and all it started,
    /// `Unauthenticated` when it fails.
    pub async fn get(&self, name: &str, server: &str) -> Result<Option<Credentials>> {
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
            return Err(Error::invalid(format!("run credential helper {:?}: no name of a program", name.chars().take(80).collect::<String>())));
        }
        let program = format!("docker-credential-{name}");
        let act = format!("ask {program} for {server}");
        let path = self.dirs.iter().map(|dir| dir.join(&program)).find(|path| path.is_file()).unwrap_or_else(|| program.clone().into());
        if !self.dirs.is_empty() && !path.is_absolute() {
            return Err(Error::precondition(format!("find {program} in {:?}", self.dirs)));
        }
        let mut command = Command::new(&path);
        // Its complaints may hold secrets and go nowhere.
        command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut running = Group::start(&mut command).act("start", path.display())?;
        let Ok(result) = tokio::time::timeout(self.deadline, talk(&mut running, server)).await else {
            return Err(Error::new(Kind::DeadlineExceeded, format!("{act}: no answer within {} s, killed", self.deadline.as_secs())));
        };
        let (success, output) = result.act("talk to", &program)?;
        if !success {
            return if String::from_utf8_lossy(&output).trim() == NOT_FOUND {
                Ok(None)
            } else {
                Err(Error::new(Kind::Unauthenticated, format!("{act}: it failed")))
            };
        }
        let answer: Answer =
            serde_json::from_slice(&output).map_err(|_| Error::new(Kind::Unauthenticated, format!("{act}: its answer is not of the protocol")))?;
        if answer.username.is_empty() && answer.secret.is_empty() {
            return Ok(None);
        }
        Ok(Some(from_user(Credentials { username: answer.username, password: answer.secret, ..Credentials::default() })))
    }
}

/// Asks and hears the answer.
async fn talk(running: &mut Group, server: &str) -> std::io::Result<(bool, Vec<u8>)> {
    if let Some(mut stdin) = running.child.stdin.take() {
        // A helper that does not read may answer all the same.
        let _ = stdin.write_all(server.as_bytes()).await;
    }
    let mut output = Vec::new();
    if let Some(stdout) = running.child.stdout.take() {
        stdout.take(LONGEST_ANSWER).read_to_end(&mut output).await?;
    }
    Ok((running.wait().await?.success(), output))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use super::*;

    fn helpers(script: &str) -> (tempfile::TempDir, Helpers) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker-credential-x");
        // Written under another name first: a concurrent fork may hold the descriptor, and then execve says "text file busy".
        std::fs::write(dir.path().join("body"), format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::copy(dir.path().join("body"), &path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let helpers = Helpers { dirs: vec![dir.path().to_owned()], ..Helpers::default() };
        (dir, helpers)
    }

    #[tokio::test]
    async fn the_protocol() {
        let (_dir, helpers) = helpers(
            r#"read server; [ "$1" = get ] || exit 3; case $server in
            a) echo '{"ServerURL":"a","Username":"u","Secret":"s"}';;
            t) echo '{"Username":"<token>","Secret":"s"}';;
            e) echo '{}';;
            n) echo 'credentials not found in native keychain'; exit 1;;
            b) echo 'hunter2';;
            *) echo hunter2; echo hunter2 >&2; exit 1;; esac"#,
        );
        let get = async |server: &str| helpers.get("x", server).await.map(|c| c.map(|c| (c.username, c.password, c.identity_token)));
        assert_eq!(get("a").await.unwrap(), Some(("u".into(), "s".into(), String::new())));
        assert_eq!(get("t").await.unwrap(), Some((String::new(), String::new(), "s".into())));
        assert_eq!(get("e").await.unwrap(), None);
        assert_eq!(get("n").await.unwrap(), None);
        for server in ["b", "z"] {
            let error = get(server).await.unwrap_err();
            assert_eq!(error.kind, Kind::Unauthenticated);
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
        for name in ["", "../x", "a b", "x/y"] {
            assert_eq!(helpers.get(name, "a").await.err().unwrap().kind, Kind::InvalidArgument);
        }
        assert_eq!(helpers.get("missing", "a").await.err().unwrap().kind, Kind::FailedPrecondition);
    }

    #[tokio::test]
    async fn a_helper_that_hangs_is_killed_with_its_children() {
        let (dir, mut helpers) = helpers("sleep 1000 & echo $! > \"$(dirname \"$0\")/child\"; wait");
        // Long enough for the script to come to its wait.
        helpers.deadline = Duration::from_secs(5);
        let began = Instant::now();
        assert_eq!(helpers.get("x", "a").await.err().unwrap().kind, Kind::DeadlineExceeded);
        assert!(began.elapsed() < Duration::from_secs(60));
        let child: i32 = std::fs::read_to_string(dir.path().join("child")).unwrap().trim().parse().unwrap();
        // It is dead: gone, or a zombie that its new parent has not met yet.
        let end = Instant::now() + Duration::from_secs(10);
        let state =
            || std::fs::read_to_string(format!("/proc/{child}/stat")).ok().and_then(|s| s.rsplit(") ").next().map(|r| r.starts_with('Z'))).unwrap_or(true);
        while !state() {
            assert!(Instant::now() < end);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
