//! One pull: resolve, fetch and unpack layers at once, make durable, commit. And the sharing of identical pulls.
//!
//! The work runs in a task of its own; callers wait for it. When the last one leaves, it is cancelled: the network futures are
//! dropped, which breaks the streams off under the unpacking threads, and when those have ended, staging is swept.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::engine::Inner;
use super::layers::{self, Hold, Staged};
use super::pullers::appc;
use super::pullers::archive::local::{self, Shelf};
use super::pullers::artifact;
use super::pullers::manifest::{self, Configuration, Descriptor, Document};
use super::pullers::registry::{Endpoint, Served};
use super::pullers::schema1;
use super::unpack::{Expected, Hasher, Source};
use super::{Credentials, PullEvent, PullRequest};
use crate::model::error::{Error, Kind, Result};
use crate::model::image::{Image, Layer};
use crate::model::{Digest, ImageId, Reference};
use crate::stdx::{blocking, failpoint};

/// Pieces of a blob between network and unpacking; a piece is what one read of a socket gives (up to some 400 KiB).
const PIECES: usize = 4;
/// Nested indexes followed: an index of an index is allowed by the specification and used by nobody.
const MAX_INDEX_DEPTH: usize = 2;
/// Stack of an unpacking thread; decoders keep their state on the heap.
const STACK: usize = 512 << 10;

/// Identical pulls are those of one reference, from one source, with the same credentials.
type Key = (Reference, Option<Shelf>, Option<Credentials>);

/// Running pulls.
#[derive(Default)]
pub(super) struct Pulls {
    map: Mutex<HashMap<Key, Arc<Flight>>>,
}

/// A running pull.
struct Flight {
    cancel: CancellationToken,
    watchers: Mutex<Watchers>,
    done: watch::Receiver<Option<Outcome>>,
}

/// What became of a pull, in a form that many can have.
type Outcome = std::result::Result<ImageId, (Kind, String)>;

#[derive(Default)]
struct Watchers {
    waiting: usize,
    senders: Vec<mpsc::UnboundedSender<PullEvent>>,
    /// Kept for those who join later.
    resolved: Option<PullEvent>,
}

impl Flight {
    fn watchers(&self) -> MutexGuard<'_, Watchers> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: &PullEvent) {
        let mut watchers = self.watchers();
        watchers.senders.retain(|s| s.send(event.clone()).is_ok());
        if matches!(event, PullEvent::Resolved { .. }) {
            watchers.resolved = Some(event.clone());
        }
    }
}

/// One caller; dropping it is leaving.
struct Waiter<'a> {
    pulls: &'a Pulls,
    key: Key,
    flight: Arc<Flight>,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut map = self.pulls.lock();
        let mut watchers = self.flight.watchers();
        watchers.waiting -= 1;
        if watchers.waiting == 0 {
            self.flight.cancel.cancel();
            // Whoever comes now starts afresh.
            if map.get(&self.key).is_some_and(|f| Arc::ptr_eq(f, &self.flight)) {
                map.remove(&self.key);
            }
        }
    }
}

impl Pulls {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<Flight>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Joins the running pull of the same image, or starts one, and waits.
pub(super) async fn pull(
    inner: &Arc<Inner>,
    mut request: PullRequest,
    progress: Option<mpsc::UnboundedSender<PullEvent>>,
    cancel: CancellationToken,
) -> Result<ImageId> {
    let shelf = inner.config.shelf(&request.reference);
    request.reference = inner.config.qualify(&request.reference)?;
    if request.cached
        && let Some(image) = inner.images.resolve(&request.reference.to_string())
        && image.layers.iter().all(|l| inner.layers.contains(&l.diff_id))
    {
        return Ok(image.id.clone());
    }
    let key: Key = (request.reference.clone(), shelf, request.credentials.clone());
    let flight = join(inner, &key, request, progress);
    let mut done = flight.done.clone();
    let waiter = Waiter { pulls: &inner.pulls, key, flight: flight.clone() };
    tokio::select! {
        outcome = outcome(&mut done) => outcome,
        () = cancel.cancelled() => {
            drop(waiter);
            if flight.cancel.is_cancelled() {
                // We were the last: come back when nothing is left behind.
                let _ = outcome(&mut done).await;
            }
            Err(Error::new(Kind::Cancelled, "pull image: cancelled"))
        }
    }
}

async fn outcome(done: &mut watch::Receiver<Option<Outcome>>) -> Result<ImageId> {
    match done.wait_for(Option::is_some).await {
        Ok(value) => match value.as_ref() {
            Some(Ok(id)) => Ok(id.clone()),
            Some(Err((kind, what))) => Err(Error::new(*kind, what.clone())),
            None => Err(Error::internal("pull image: no outcome")),
        },
        Err(_) => Err(Error::internal("pull image: its task ended")),
    }
}

fn join(inner: &Arc<Inner>, key: &Key, request: PullRequest, progress: Option<mpsc::UnboundedSender<PullEvent>>) -> Arc<Flight> {
    let mut map = inner.pulls.lock();
    if let Some(flight) = map.get(key) {
        let mut watchers = flight.watchers();
        watchers.waiting += 1;
        if let Some(sender) = progress {
            if let Some(event) = &watchers.resolved {
                // A receiver that is gone is noticed at the next event.
                let _ = sender.send(event.clone());
            }
            watchers.senders.push(sender);
        }
        return flight.clone();
    }
    let (finished, done) = watch::channel(None);
    let watchers = Watchers { waiting: 1, senders: progress.into_iter().collect(), resolved: None };
    let flight = Arc::new(Flight { cancel: CancellationToken::new(), watchers: Mutex::new(watchers), done });
    map.insert(key.clone(), flight.clone());
    drop(map);
    let (inner, key, running) = (inner.clone(), key.clone(), flight.clone());
    tokio::spawn(async move {
        let outcome = run(&inner, &request, key.1.as_ref(), &running).await;
        let mut map = inner.pulls.lock();
        if map.get(&key).is_some_and(|f| Arc::ptr_eq(f, &running)) {
            map.remove(&key);
        }
        drop(map);
        // Nobody may be waiting any more.
        let _ = finished.send(Some(outcome.map_err(|e| (e.kind, e.to_string()))));
    });
    flight
}

/// The work with its cleaning up.
async fn run(inner: &Arc<Inner>, request: &PullRequest, shelf: Option<&Shelf>, flight: &Flight) -> Result<ImageId> {
    // Counts unpacking threads; they outlive the futures that started them.
    let threads = TaskTracker::new();
    let result = tokio::select! {
        result = work(inner, request, shelf, flight, &threads) => result,
        () = flight.cancel.cancelled() => Err(Error::new(Kind::Cancelled, "pull image: cancelled")),
    };
    threads.close();
    threads.wait().await;
    if result.is_err() {
        let inner = inner.clone();
        // Best effort: recovery and the next collection do the same.
        if let Err(e) = blocking::run("collect garbage", move || inner.collect()).await {
            tracing::warn!(error = %e, "cleaning up after a failed pull");
        }
    } else {
        flight.tell(&PullEvent::Committed);
    }
    result
}

async fn work(inner: &Arc<Inner>, request: &PullRequest, shelf: Option<&Shelf>, flight: &Flight, threads: &TaskTracker) -> Result<ImageId> {
    let reference = &request.reference;
    let within = |e: Error| {
        // The prefix that users look for stays in front.
        let (kind, text) = (e.kind, e.to_string());
        match text.strip_prefix("RegistryUnavailable: ") {
            Some(rest) => Error::new(kind, format!("RegistryUnavailable: pull image {reference}: {rest}")),
            None => e.within(format!("pull image {reference}")),
        }
    };
    let _permit = inner.pull_permits.acquire().await.map_err(|_| Error::internal("pull image: shutting down"))?;
    if let Some(shelf) = shelf {
        let tell = |event| flight.tell(&event);
        return local::pull(inner, (shelf, reference), (threads, &flight.cancel), &tell).await.map_err(within);
    }
    if let Some(name) = reference.appc() {
        let tell = |event: &PullEvent| flight.tell(event);
        let order = appc::Order { inner, credentials: request.credentials.as_ref(), cancel: &flight.cancel, threads, tell: &tell };
        return appc::pull(&order, name).await.map_err(within);
    }
    let resolved = resolve(inner, request).await.map_err(within)?;
    flight.tell(&PullEvent::Resolved { layers: resolved.layers.iter().map(|d| (d.digest.to_string(), d.size)).collect() });
    // From here on no collection takes layers away that were found or made for this image.
    let known = resolved.known_diff_ids(inner);
    let _found = inner.layers.hold(known.iter().flatten().cloned());
    let (diff_ids, staged) = fetch_layers(inner, &resolved, &known, flight, threads).await.map_err(within)?;
    let hold = inner.layers.hold(diff_ids.iter().cloned());
    let image = resolved.image(inner, reference, &diff_ids).map_err(within)?;
    commit(inner, image, staged, hold).await.map_err(within)
}

/// A chosen image with its documents, verified.
struct Resolved {
    endpoint: Endpoint,
    /// Digest of what the reference named.
    digest: Digest,
    identity: Identity,
    layers: Vec<Descriptor>,
}

/// What makes the image the one it is.
enum Identity {
    /// A configuration, its digest and the diff ids it promises.
    Configured { id: Digest, json: String, parsed: Box<Configuration> },
    /// Files of any kind, and the manifest that names them.
    Artifact { id: Digest, manifest: String },
    /// Nothing but blobs and their history: diff ids come out of unpacking, and the configuration is made of both.
    Legacy(schema1::Manifest),
}

impl Resolved {
    /// The diff id of each layer, as far as it is known before unpacking: promised by the configuration, or remembered from
    /// when the same blob was unpacked for another image.
    fn known_diff_ids(&self, inner: &Inner) -> Vec<Option<Digest>> {
        match &self.identity {
            Identity::Configured { parsed, .. } => parsed.diff_ids.iter().cloned().map(Some).collect(),
            // The same artifact may be here under another name.
            Identity::Artifact { id, .. } => match inner.images.look_up(id.as_str()).filter(|i| i.layers.len() == self.layers.len()) {
                Some(image) => image.layers.iter().map(|l| Some(l.diff_id.clone())).collect(),
                None => vec![None; self.layers.len()],
            },
            Identity::Legacy(_) => {
                let images = inner.images.list();
                let layers: HashMap<&Digest, &Digest> =
                    images.iter().flat_map(|i| &i.layers).filter_map(|l| l.blob.as_ref().map(|b| (b, &l.diff_id))).collect();
                self.layers.iter().map(|l| layers.get(&l.digest).map(|d| (*d).clone())).collect()
            }
        }
    }

    /// The name of the file that a layer is; `None`: it is an archive.
    fn file_name(&self, layer: &Descriptor) -> Result<Option<String>> {
        if matches!(self.identity, Identity::Artifact { .. }) { artifact::file_name(layer) } else { Ok(None) }
    }

    fn image(&self, inner: &Inner, reference: &Reference, diff_ids: &[Digest]) -> Result<Image> {
        // What became of a file is not what a blob of this digest is elsewhere.
        let is_image = !matches!(self.identity, Identity::Artifact { .. });
        let layer =
            |(diff_id, blob): (&Digest, &Descriptor)| Layer { diff_id: diff_id.clone(), blob: is_image.then(|| blob.digest.clone()), blob_size: blob.size };
        let (id, json, config) = match &self.identity {
            Identity::Configured { id, json, parsed } => (id.clone(), json.clone(), parsed.config.clone()),
            Identity::Artifact { id, manifest } => (id.clone(), manifest.clone(), artifact::config(manifest.as_bytes())?),
            Identity::Legacy(legacy) => {
                let json = schema1::configuration(legacy, diff_ids)?;
                let config = manifest::configuration(json.as_bytes(), diff_ids.len(), &inner.platform)?.config;
                (Hasher::of(json.as_bytes(), None)?, json, config)
            }
        };
        Ok(Image {
            id: ImageId::from_string(id.as_str()),
            repo_tags: reference.repo_tag().into_iter().collect(),
            repo_digests: vec![reference.repo_digest(&self.digest)],
            layers: diff_ids.iter().zip(&self.layers).map(layer).collect(),
            config,
            config_json: json,
            size: 0,
            pinned: false,
        })
    }
}

async fn resolve(inner: &Inner, request: &PullRequest) -> Result<Resolved> {
    let reference = &request.reference;
    let endpoint = inner.registries.endpoint(reference, request.credentials.as_ref()).await?;
    let limits = &inner.config.limits;
    let name = reference.digest().map(Digest::as_str).or(reference.tag()).unwrap_or("latest");
    let Served { mut bytes, digest, mut media_type } = endpoint.manifest(name, reference.digest(), limits.manifest_bytes).await?;
    let mut depth = 0;
    let (config, layers) = loop {
        match manifest::parse(&bytes, media_type.as_deref(), limits)? {
            Document::Manifest { config, layers } => break (config, layers),
            Document::Legacy(legacy) => return resolve_legacy(inner, endpoint, digest, legacy).await,
            Document::Index(_) if depth == MAX_INDEX_DEPTH => return Err(Error::new(Kind::DataLoss, "read manifest: indexes nested too deeply")),
            Document::Index(entries) => {
                depth += 1;
                let chosen = manifest::choose(&entries, &inner.platform)?;
                let served = endpoint.manifest(chosen.digest.as_str(), Some(&chosen.digest), limits.manifest_bytes).await?;
                if served.bytes.len() as u64 != chosen.size {
                    return Err(Error::new(Kind::DataLoss, format!("read manifest: {} bytes, the index says {}", served.bytes.len(), chosen.size)));
                }
                (bytes, media_type) = (served.bytes, served.media_type);
            }
        }
    };
    if artifact::is_config_of_artifact(&config) {
        let id = Hasher::of(&bytes, None)?;
        let manifest = String::from_utf8(bytes.to_vec()).map_err(|e| Error::with(Kind::DataLoss, "read manifest", e))?;
        return Ok(Resolved { endpoint, digest, identity: Identity::Artifact { id, manifest }, layers: artifact::layers(layers) });
    }
    let document = endpoint.small_blob(&config, limits.manifest_bytes).await?;
    let parsed = manifest::configuration(&document, layers.len(), &inner.platform)?;
    let json = String::from_utf8(document.to_vec()).map_err(|e| Error::with(Kind::DataLoss, "read image configuration", e))?;
    Ok(Resolved { endpoint, digest, identity: Identity::Configured { id: config.digest, json, parsed: Box::new(parsed) }, layers })
}

/// Finds out how long the layers are, and before all that the image is for this machine.
async fn resolve_legacy(inner: &Inner, endpoint: Endpoint, digest: Digest, legacy: schema1::Manifest) -> Result<Resolved> {
    // Any digests do to see what the configuration will be.
    let draft = schema1::configuration(&legacy, &legacy.layers)?;
    manifest::configuration(draft.as_bytes(), legacy.layers.len(), &inner.platform)?;
    let asked = &endpoint;
    let sizes: Vec<u64> = futures_util::stream::iter(legacy.layers.clone())
        .map(|blob| async move { asked.size(&blob).await })
        .buffered(inner.config.max_parallel_layers.max(1))
        .try_collect()
        .await?;
    let describe = |(digest, size): (&Digest, u64)| Descriptor { media_type: String::new(), digest: digest.clone(), size, platform: None, annotations: None };
    let layers = legacy.layers.iter().zip(sizes).map(describe).collect();
    Ok(Resolved { endpoint, digest, identity: Identity::Legacy(legacy), layers })
}

/// Brings every layer into the store or into staging; one that occurs twice is done once. Returns the diff id of each layer.
async fn fetch_layers(
    inner: &Arc<Inner>,
    resolved: &Resolved,
    known: &[Option<Digest>],
    flight: &Flight,
    threads: &TaskTracker,
) -> Result<(Vec<Digest>, Vec<Arc<layers::Flight>>)> {
    // By diff id where that is known, else by blob.
    let key = |(blob, diff_id): (&Descriptor, &Option<Digest>)| match (diff_id, resolved.file_name(blob)?) {
        (Some(diff_id), _) => Ok(diff_id.clone()),
        (None, Some(name)) => artifact::key(&name, &blob.digest),
        (None, None) => Ok(blob.digest.clone()),
    };
    let keys: Vec<Digest> = resolved.layers.iter().zip(known).map(key).collect::<Result<_>>()?;
    let mut seen = HashSet::new();
    let distinct: Vec<(usize, Digest)> = keys.iter().cloned().enumerate().filter(|(_, key)| seen.insert(key.clone())).collect();
    let fetched: Vec<(usize, Digest, Option<Arc<layers::Flight>>)> = futures_util::stream::iter(distinct)
        .map(|(index, key)| async move {
            let (Some(blob), Some(diff_id)) = (resolved.layers.get(index), known.get(index)) else { return Err(Error::internal("fetch layer: no such layer")) };
            let (diff_id, staged) = fetch_layer(inner, resolved, (index, &key), (blob, diff_id.as_ref()), flight, threads).await?;
            Ok((index, diff_id, staged))
        })
        .buffer_unordered(inner.config.max_parallel_layers.max(1))
        .try_collect()
        .await?;
    let found: HashMap<&Digest, &Digest> = fetched.iter().filter_map(|(index, diff_id, _)| Some((keys.get(*index)?, diff_id))).collect();
    let diff_ids = keys.iter().filter_map(|key| found.get(key).map(|d| (*d).clone())).collect();
    Ok((diff_ids, fetched.into_iter().filter_map(|(.., staged)| staged).collect()))
}

async fn fetch_layer(
    inner: &Arc<Inner>,
    resolved: &Resolved,
    (index, key): (usize, &Digest),
    (blob, diff_id): (&Descriptor, Option<&Digest>),
    flight: &Flight,
    threads: &TaskTracker,
) -> Result<(Digest, Option<Arc<layers::Flight>>)> {
    if let Some(present) = diff_id.filter(|d| inner.layers.contains(d)) {
        flight.tell(&PullEvent::Exists { layer: index });
        return Ok((present.clone(), None));
    }
    // A blob and an archive of one digest are the same bytes, so the two kinds of key do not get in each other's way.
    let shared = inner.layers.flight(key);
    let name = resolved.file_name(blob)?;
    let staged = shared
        .get_or_try_init(|| async {
            let _permit = inner.layer_permits.acquire().await.map_err(|_| Error::internal("fetch layer: shutting down"))?;
            let told = |bytes| flight.tell(&PullEvent::Downloaded { layer: index, bytes });
            download(inner, &resolved.endpoint, (blob, name.as_deref()), diff_id, told, threads).await.map(Arc::new)
        })
        .await?;
    let found = staged.record.diff_id.clone();
    flight.tell(&PullEvent::Unpacked { layer: index });
    // The flight, not only what it brought: until the commit, other pulls find the layer through it.
    Ok((found, Some(shared)))
}

/// Network on this task, unpacking on threads, a bounded channel between.
async fn download(
    inner: &Arc<Inner>,
    endpoint: &Endpoint,
    (blob, name): (&Descriptor, Option<&str>),
    diff_id: Option<&Digest>,
    progress: impl FnMut(u64),
    threads: &TaskTracker,
) -> Result<Staged> {
    let (to, mut pieces) = mpsc::channel::<Bytes>(PIECES);
    let (ended, end) = oneshot::channel::<()>();
    let (answer, staged) = oneshot::channel();
    // A file is verified on its way into the archive that is made of it.
    let expected = match name {
        Some(_) => Expected { diff_id: diff_id.cloned(), ..Expected::default() },
        None => Expected { blob: Some(blob.digest.clone()), size: Some(blob.size), diff_id: diff_id.cloned() },
    };
    let file = name.map(|name| (name.to_owned(), blob.clone()));
    let (store, limits, token) = (inner.layers.clone(), inner.config.limits, threads.token());
    let mut end = Some(end);
    std::thread::Builder::new()
        .name("layer-inflate".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            let _token = token;
            let source: Source<'_> = Box::new(move || match pieces.blocking_recv() {
                Some(piece) => Ok(Some(piece)),
                // The channel closes both at the end and when the transfer is given up; only the former says so.
                None => match end.take().map(oneshot::Receiver::blocking_recv) {
                    Some(Err(_)) => Err(std::io::Error::other(Error::new(Kind::Cancelled, "fetch layer: given up"))),
                    _ => Ok(None),
                },
            });
            // Whoever asked may be gone; then the staged layer is dropped here.
            let source = match file {
                Some((name, blob)) => artifact::archive(&name, &blob, source),
                None => Ok(source),
            };
            let _ = answer.send(source.and_then(|source| store.stage(source, &expected, limits)));
        })
        .map_err(|e| Error::io("start thread", e))?;
    match endpoint.blob(blob, to, progress).await {
        Ok(()) => {
            let _ = ended.send(());
        }
        Err(e) => {
            drop(ended);
            return Err(e);
        }
    }
    staged.await.map_err(|_| Error::internal("unpack layer: its thread panicked"))?
}

/// Layers become durable, then visible, then the image does.
pub(super) async fn commit(inner: &Arc<Inner>, mut image: Image, flights: Vec<Arc<layers::Flight>>, hold: Hold) -> Result<ImageId> {
    let inner = inner.clone();
    blocking::run("commit image", move || {
        let _hold = hold;
        failpoint::hit("pull.unpacked");
        let staged: Vec<Arc<Staged>> = flights.iter().filter_map(|f| f.get().cloned()).collect();
        let mut bytes: HashMap<&Digest, u64> = staged.iter().map(|s| (&s.record.diff_id, s.record.bytes)).collect();
        for id in image.layers.iter().map(|l| &l.diff_id) {
            let record = inner.layers.get(id).map(|r| r.bytes).or(bytes.get(id).copied());
            bytes.insert(id, record.ok_or_else(|| Error::internal(format!("commit image: layer {id} vanished")))?);
        }
        // An image of empty layers still is something: its record takes a block.
        image.size = image.layers.iter().map(|l| &l.diff_id).collect::<HashSet<_>>().iter().filter_map(|id| bytes.get(*id)).sum::<u64>().max(1);
        // Written before the layers' sync, which makes it durable along with them; without layers nothing would.
        let draft = if staged.is_empty() { None } else { Some(inner.layers.draft(inner.images.encode(&image, |i| inner.is_pinned(i))?)?) };
        inner.layers.commit(&staged)?;
        failpoint::hit("pull.layers-in");
        let image = inner.images.add_drafted(image, draft, |i| inner.is_pinned(i))?;
        let made: Vec<Digest> = staged.iter().map(|s| s.record.diff_id.clone()).collect();
        drop((staged, flights));
        inner.recount_later(made);
        Ok(image.id.clone())
    })
    .await
}
