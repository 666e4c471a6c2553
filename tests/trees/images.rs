//! Images of the corpus as registries and tools take them: an OCI layout in a directory and as a tar, and a registry in the
//! test's own process which sends blobs in the order it is told.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use mesocri::provisioner::unpack::Hasher;
use serde_json::{Value, json};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// An image, packed.
pub struct Packed {
    /// Its name; the repository in registries.
    pub name: String,
    manifest: Vec<u8>,
    config: Vec<u8>,
    blobs: Vec<(String, Vec<u8>)>,
}

fn sha256(bytes: &[u8]) -> String {
    Hasher::of(bytes, None).unwrap().to_string()
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": sha256(bytes), "size": bytes.len()})
}

impl Packed {
    /// Compresses the archives of an image.
    pub fn new(name: &str, archives: &[Vec<u8>]) -> Self {
        let diff_ids: Vec<String> = archives.iter().map(|a| sha256(a)).collect();
        let gzip = |archive: &Vec<u8>| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(archive).unwrap();
            encoder.finish().unwrap()
        };
        let blobs: Vec<Vec<u8>> = archives.iter().map(gzip).collect();
        let history: Vec<Value> = archives.iter().map(|_| json!({"created_by": "trees"})).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {}, "history": history,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string().into_bytes();
        let layers: Vec<Value> = blobs.iter().map(|b| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", b)).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "layers": layers,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        });
        let blobs = blobs.into_iter().map(|b| (sha256(&b), b)).collect();
        Self { name: name.to_owned(), manifest: manifest.to_string().into_bytes(), config, blobs }
    }

    /// Digests of the blobs, lowest layer first.
    pub fn digests(&self) -> Vec<String> {
        self.blobs.iter().map(|(digest, _)| digest.clone()).collect()
    }

    /// Writes an OCI layout whose image is tagged `1`, and for containerd is called [`Packed::full_name`].
    pub fn layout(&self, dir: &Path) {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        for bytes in self.blobs.iter().map(|(_, b)| b).chain([&self.config, &self.manifest]) {
            std::fs::write(blobs.join(sha256(bytes).trim_start_matches("sha256:")), bytes).unwrap();
        }
        let mut entry = descriptor(MANIFEST, &self.manifest);
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": "1", "io.containerd.image.name": self.full_name()});
        std::fs::write(dir.join("index.json"), json!({"schemaVersion": 2, "manifests": [entry]}).to_string()).unwrap();
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    }

    /// Its name for containerd.
    pub fn full_name(&self) -> String {
        format!("trees.test/{}:1", self.name)
    }
}

/// The order in which a registry sends blobs: each waits until those before it are sent. What is not in it is sent at once.
#[derive(Default)]
struct Order {
    blobs: Mutex<Vec<String>>,
    sent: Condvar,
}

/// A registry; serves until the process ends.
pub struct Registry {
    host: String,
    order: Arc<Order>,
}

impl Registry {
    /// Serves these images.
    pub fn start(images: &[&Packed]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let mut served: HashMap<String, Vec<u8>> = HashMap::new();
        for image in images {
            let name = &image.name;
            for reference in ["1".to_owned(), sha256(&image.manifest)] {
                served.insert(format!("/v2/{name}/manifests/{reference}"), image.manifest.clone());
            }
            for (digest, bytes) in image.blobs.iter().chain([&(sha256(&image.config), image.config.clone())]) {
                served.insert(format!("/v2/{name}/blobs/{digest}"), bytes.clone());
            }
        }
        let order = Arc::new(Order::default());
        let (served, ordered) = (Arc::new(served), order.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (served, order) = (served.clone(), ordered.clone());
                std::thread::spawn(move || serve(stream, &served, &order));
            }
        });
        Self { host, order }
    }

    /// Sends these blobs one after the other from now on.
    pub fn send_in_order(&self, digests: Vec<String>) {
        *self.order.blobs.lock().unwrap() = digests;
        // What waited for its turn in the last order may have none in this one.
        self.order.sent.notify_all();
    }

    /// The reference of an image.
    pub fn reference(&self, image: &Packed) -> mesocri::model::Reference {
        format!("{}/{}:1", self.host, image.name).parse().unwrap()
    }
}

fn serve(mut stream: TcpStream, served: &HashMap<String, Vec<u8>>, order: &Order) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else { return };
    while lines.next().is_some_and(|line| line.is_ok_and(|l| !l.is_empty())) {}
    let path = first.split(' ').nth(1).unwrap_or_default();
    let digest = path.rsplit('/').next().unwrap_or_default();
    let first_of = |blobs: &Vec<String>| blobs.iter().position(|b| b == digest);
    let waited = order.sent.wait_while(order.blobs.lock().unwrap(), |blobs| first_of(blobs).is_some_and(|at| at > 0));
    drop(waited.unwrap());
    let (status, kind, body) = match served.get(path) {
        Some(body) => (200, if path.contains("/manifests/") { MANIFEST } else { "application/octet-stream" }, body.as_slice()),
        None => (404, "text/plain", &[][..]),
    };
    let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n", body.len());
    // A client that gave up is no concern of the registry.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    order.blobs.lock().unwrap().retain(|b| b != digest);
    order.sent.notify_all();
}

/// A tar of an OCI layout, for tools that take a file.
pub fn tar_of(layout: &Path) -> PathBuf {
    let path = layout.with_extension("tar");
    let mut archive = tar::Builder::new(std::fs::File::create(&path).unwrap());
    archive.append_dir_all(".", layout).unwrap();
    archive.finish().unwrap();
    path
}
