//! `hdfs://` without Hadoop: the WebHDFS protocol. A name node says how long the file is and sends us on to a data node, which has
//! the bytes; a broken transfer is taken up where it stopped. Of several name nodes one is active; the others say so and are
//! passed over.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::too_long;
use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::config::Config;
use crate::provisioner::pullers::registry::Shared;
use crate::provisioner::pullers::registry::answer::{bounded, broken, unavailable};
use crate::provisioner::pullers::registry::exchange::{Outgoing, send};
use crate::provisioner::pullers::registry::hosts::{self, Host, authority};
use crate::provisioner::pullers::registry::retry::{Again, Failure, Tries, retry_after};
use crate::provisioner::pullers::registry::transfer::Pace;
use crate::stdx::blocking;

/// Path of the protocol on a name node.
const PREFIX: &str = "/webhdfs/v1";
/// Bytes of an answer that is no file.
const MAX_ANSWER: u64 = 64 << 10;
/// Characters of a server's message that are shown.
const SHOWN: usize = 300;
/// Pieces between network and disk.
const PIECES: usize = 8;
/// Progress that earns new patience.
const PROGRESS: u64 = 1 << 20;

/// One file at a cluster.
pub(super) struct WebHdfs<'a> {
    shared: &'a Shared,
    /// Name nodes, and the file at each.
    nodes: Vec<(Host, Url)>,
    retries: u32,
    stall: Duration,
}

/// What a name node says of a file.
#[derive(Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
struct Status {
    length: u64,
    #[serde(rename = "type")]
    kind: String,
    modification_time: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct StatusAnswer {
    file_status: Status,
}

/// What goes wrong, in the words of the server.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Refusal {
    remote_exception: RemoteException,
}

#[derive(Default, Deserialize)]
struct RemoteException {
    #[serde(default)]
    exception: String,
    #[serde(default)]
    message: String,
}

/// Where the bytes go: a thread that writes them.
struct Sink {
    to: mpsc::Sender<Bytes>,
    done: u64,
    earned: u64,
}

impl<'a> WebHdfs<'a> {
    /// The file `path` at the cluster whose name nodes are `bases`.
    pub(super) async fn open(config: &Config, shared: &'a Shared, bases: &[String], path: &str) -> Result<Self> {
        let (settings, bases, path, user) = (config.clone(), bases.to_vec(), path.to_owned(), config.hdfs.user.clone());
        let nodes =
            blocking::run("read settings of name nodes", move || bases.iter().map(|base| node(&settings, base, &path, &user)).collect::<Result<_>>()).await?;
        Ok(Self { shared, nodes, retries: config.pull_retries, stall: Duration::from_secs(config.stall_timeout_seconds.max(1)) })
    }

    /// Writes it to `part`, which must not exist.
    pub(super) async fn fetch(&self, part: &Path, limit: u64) -> Result<u64> {
        let status = self.status().await?;
        if status.kind != "FILE" {
            return Err(Error::invalid(format!("it is a {}, not a file", shown(&status.kind.to_lowercase()))));
        }
        if status.length > limit {
            return Err(too_long(status.length, limit));
        }
        let (to, mut pieces) = mpsc::channel::<Bytes>(PIECES);
        let part = part.to_owned();
        let writing = tokio::spawn(blocking::run("write fetched file", move || {
            let mut file = std::fs::File::create_new(&part).act("create", part.display())?;
            while let Some(piece) = pieces.blocking_recv() {
                std::io::Write::write_all(&mut file, &piece).act("write", part.display())?;
            }
            Ok::<_, Error>(())
        }));
        let mut sink = Sink { to, done: 0, earned: 0 };
        let read = self.read(&status, &mut sink).await;
        drop(sink);
        // A disk that is full ends the reading too; its word says more.
        writing.await.map_err(|e| Error::with(Kind::Internal, "write fetched file", e))??;
        let resumed = read?;
        if resumed && self.status().await? != status {
            return Err(Error::new(Kind::DataLoss, "the file changed while it was fetched"));
        }
        Ok(status.length)
    }

    async fn status(&self) -> Result<Status> {
        let mut tries = self.tries();
        while let Some((host, url)) = tries.next().await.and_then(|n| self.nodes.get(n)) {
            let act = act("ask for status", host);
            let asked = async {
                let response = self.ask(host, url, "GETFILESTATUS", None, &act).await?;
                let bytes = bounded(response, MAX_ANSWER, &act).await?;
                let answer = serde_json::from_slice::<StatusAnswer>(&bytes);
                answer.map_err(|e| Failure::lasting(Error::with(Kind::DataLoss, format!("{act}: no answer of WebHDFS"), e)))
            };
            match self.timed(&act, asked).await {
                Ok(answer) => return Ok(answer.file_status),
                Err(failure) => self.failed(&mut tries, host, failure)?,
            }
        }
        self.give_up(tries)
    }

    /// Reads all of it; whether it took more than one connection.
    async fn read(&self, status: &Status, sink: &mut Sink) -> Result<bool> {
        let _leave = self.shared.throttle.transfer().await?;
        if status.length == 0 {
            return Ok(false);
        }
        let mut tries = self.tries();
        let mut resumed = false;
        while let Some((host, url)) = tries.next().await.and_then(|n| self.nodes.get(n)) {
            let act = act("read", host);
            resumed |= sink.done > 0;
            match self.go_on(host, url, status.length, sink, &act).await {
                Ok(()) => return Ok(resumed),
                Err(failure) => {
                    if sink.done >= sink.earned + PROGRESS {
                        sink.earned = sink.done;
                        tries.renew();
                    }
                    self.failed(&mut tries, host, failure)?;
                }
            }
        }
        self.give_up(tries)
    }

    /// One attempt, from where the last one stopped.
    async fn go_on(&self, host: &Host, url: &Url, length: u64, sink: &mut Sink, act: &str) -> Result<(), Failure> {
        let mut response = self.timed(act, self.ask(host, url, "OPEN", Some(sink.done), act)).await?;
        let changed = || Failure::lasting(Error::new(Kind::DataLoss, format!("{act}: more bytes than the name node said, {length}")));
        if response.content_length().is_some_and(|n| n > length - sink.done) {
            return Err(changed());
        }
        let mut pace = Pace::new(self.stall);
        loop {
            let began = Instant::now();
            let Some(piece) = self.timed(act, async { response.chunk().await.map_err(|e| broken(act, e)) }).await? else { break };
            pace.took(began.elapsed(), piece.len(), act)?;
            self.shared.throttle.took(piece.len()).await;
            if piece.len() as u64 > length - sink.done {
                return Err(changed());
            }
            sink.done += piece.len() as u64;
            if sink.to.send(piece).await.is_err() {
                return Err(Failure::lasting(Error::internal("the writer left")));
            }
        }
        if sink.done < length { Err(unavailable(format!("{act}: the answer ended after {} of {length} bytes", sink.done)).into()) } else { Ok(()) }
    }

    /// Asks one name node, and goes where it sends us.
    async fn ask(&self, host: &Host, url: &Url, op: &str, offset: Option<u64>, act: &str) -> Result<Response, Failure> {
        let mut url = url.clone();
        url.query_pairs_mut().append_pair("op", op);
        if let Some(offset) = offset.filter(|o| *o > 0) {
            url.query_pairs_mut().append_pair("offset", &offset.to_string());
        }
        let clients = &self.shared.clients;
        let client = clients.get(&host.trust, &url)?;
        let out = Outgoing { method: Method::GET, url, own: host.headers.clone(), common: HeaderMap::new(), body: None, client, trust: &host.trust };
        let response = send(clients, out, act).await?.response;
        if response.status().is_success() { Ok(response) } else { Err(refused(response, act).await) }
    }

    fn tries(&self) -> Tries {
        Tries::new((0..self.nodes.len()).collect(), self.retries)
    }

    /// What lasts is the cluster's answer, whichever node gave it.
    fn failed(&self, tries: &mut Tries, host: &Host, failure: Failure) -> Result<()> {
        tracing::debug!(error = %failure.error, again = ?failure.again, "a name node did not answer as hoped");
        if failure.again == Again::Never {
            return Err(failure.error);
        }
        tries.failed(self.nodes.iter().position(|(h, _)| h.base == host.base).unwrap_or(0), failure);
        Ok(())
    }

    fn give_up<T>(&self, tries: Tries) -> Result<T> {
        tries.give_up("read by WebHDFS", |n| self.nodes.get(n).map(|(host, _)| format!("name node {}", host.name())).unwrap_or_default())
    }

    async fn timed<T>(&self, act: &str, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        match tokio::time::timeout(self.stall, work).await {
            Ok(result) => result,
            Err(_) => Err(unavailable(format!("{act}: nothing for {} s", self.stall.as_secs())).into()),
        }
    }
}

fn act(what: &str, host: &Host) -> String {
    format!("{what} by WebHDFS of {}", host.name())
}

/// A name node and the file there. Whom to trust is what the settings say of a registry of that name.
fn node(config: &Config, base: &str, path: &str, user: &str) -> Result<(Host, Url)> {
    let mut host = Host::new(base, true)?;
    if let Some(known) = hosts::find(config, &authority(&host.base))?.pop() {
        (host.trust, host.headers) = (known.trust, known.headers);
    }
    let mut url = host.base.clone();
    if !url.path().ends_with(PREFIX) {
        let prefix = format!("{}{PREFIX}", url.path().trim_end_matches('/'));
        url.set_path(&prefix);
    }
    // Percent signs in an HDFS path mean themselves; so does every other character.
    url.path_segments_mut().map_err(|()| Error::invalid(format!("read URL {base:?}: it has no path")))?.extend(path.split('/').filter(|p| !p.is_empty()));
    if !user.is_empty() {
        url.query_pairs_mut().append_pair("user.name", user);
    }
    Ok((host, url))
}

/// What an answer other than success means.
async fn refused(response: Response, act: &str) -> Failure {
    let status = response.status();
    let wait = retry_after(response.headers().get(RETRY_AFTER), SystemTime::now());
    let said = bounded(response, MAX_ANSWER, act).await.ok().and_then(|body| serde_json::from_slice::<Refusal>(&body).ok());
    let said = said.map(|r| r.remote_exception).unwrap_or_default();
    let (kind, meaning) = meaning(status, &said.exception);
    let words = [&said.exception, &said.message].into_iter().filter(|s| !s.is_empty()).map(|s| format!(", {}", shown(s))).collect::<String>();
    let text = format!("{act}: {meaning} ({status}{words})");
    if kind == Kind::Unavailable {
        return Failure { error: unavailable(text), again: wait.map_or(Again::Soon, Again::After) };
    }
    Failure::lasting(Error::new(kind, text))
}

/// Class and words. The class of the exception is part of the protocol; its message is not.
fn meaning(status: StatusCode, exception: &str) -> (Kind, &'static str) {
    match (exception, status) {
        ("FileNotFoundException", _) => (Kind::NotFound, "there is no such file"),
        ("StandbyException" | "RetriableException" | "SafeModeException", _) => (Kind::Unavailable, "this name node does not serve now"),
        ("AccessControlException", _) => (Kind::PermissionDenied, "this user may not read it (hdfs.user)"),
        (_, StatusCode::NOT_FOUND) => (Kind::NotFound, "it does not have it (or is no WebHDFS server)"),
        (_, StatusCode::UNAUTHORIZED) => (Kind::Unauthenticated, "it wants Kerberos, which the hadoop command can (hadoop_home)"),
        (_, StatusCode::FORBIDDEN) => (Kind::PermissionDenied, "reading it is not allowed"),
        (_, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT) => (Kind::Unavailable, "it is busy"),
        (_, StatusCode::BAD_REQUEST) => (Kind::InvalidArgument, "it does not take the request"),
        (_, s) if s.is_server_error() => (Kind::Unavailable, "it has failed"),
        _ => (Kind::Internal, "unexpected answer"),
    }
}

fn shown(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(SHOWN).collect()
}
