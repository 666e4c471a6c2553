//! A registry in the test's own process: a dozen images over a dozen small layers, the same for every seed.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)] // each test binary uses its part

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use mesocri::model::Reference;
use mesocri::provisioner::unpack::Hasher;
use serde_json::json;

/// Images there are.
pub const IMAGES: usize = 12;
const LAYERS: usize = 12;
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// The registry, or its client's knowledge of it.
pub struct Registry {
    /// Host and port.
    pub host: String,
    dir: PathBuf,
    images: Vec<Image>,
    seen: Arc<Mutex<Vec<String>>>,
}

struct Image {
    id: String,
    layers: Vec<usize>,
    diff_ids: Vec<String>,
}

/// Layers of an image: a base that half of them share, some of their own, some of their neighbours'.
fn layers_of(image: usize) -> Vec<usize> {
    let mut layers = vec![image % 2, 2 + image % 5, 7 + image % 3];
    if image.is_multiple_of(3) {
        layers.push(10);
    }
    if image > 8 {
        layers.push(11);
    }
    layers
}

/// Files of a layer; `common` is in all of them.
fn files_of(layer: usize) -> Vec<(String, String)> {
    let mut files: Vec<_> = (0..1 + layer % 4).map(|n| (format!("l{layer}/f{n}"), format!("{layer} {n} ").repeat(200 + 900 * n))).collect();
    files.push(("common".to_owned(), format!("of layer {layer}")));
    files
}

fn pack(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    add_files(&mut builder, members);
    builder.into_inner().unwrap()
}

fn add_files(builder: &mut tar::Builder<Vec<u8>>, members: &[(String, Vec<u8>)]) {
    for (name, data) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append_data(&mut header, name, data.as_slice()).unwrap();
    }
}

/// The archive of a layer: its files, and one of each kind besides.
fn layer(n: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    // Listed, so that its time is that of the archive.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    header.set_mode(0o755);
    header.set_mtime(2_000_000 + n as u64);
    builder.append_data(&mut header, format!("l{n}/"), std::io::empty()).unwrap();
    add_files(&mut builder, &files_of(n).into_iter().map(|(name, text)| (name, text.into_bytes())).collect::<Vec<_>>());
    let mut add = |kind: tar::EntryType, name: &str, mode: u32, target: Option<&str>| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(mode);
        header.set_mtime(1_000_000 + n as u64);
        match target {
            Some(target) => builder.append_link(&mut header, name, target).unwrap(),
            None => builder.append_data(&mut header, name, std::io::empty()).unwrap(),
        }
    };
    add(tar::EntryType::Directory, &format!("l{n}/empty/"), 0o711, None);
    add(tar::EntryType::Symlink, &format!("l{n}/link"), 0o777, Some("f0"));
    add(tar::EntryType::Link, &format!("l{n}/same"), 0o644, Some(&format!("l{n}/f0")));
    if n == 10 {
        add_files(&mut builder, &[(format!("l{n}/large"), (0..400_000u32).flat_map(u32::to_le_bytes).collect())]);
    }
    builder.into_inner().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Hasher::of(bytes, None).unwrap().to_string()
}

fn config(image: usize, diff_ids: &[String]) -> String {
    json!({"os": "linux", "config": {"Labels": {"n": image.to_string()}}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string()
}

impl Registry {
    /// Serves until the process ends; writes an archive of each image into `dir`.
    pub fn start(dir: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let this = Self::at(dir, &listener.local_addr().unwrap().to_string());
        let blobs: Vec<Vec<u8>> = (0..LAYERS).map(layer).collect();
        let mut served: HashMap<String, (&'static str, Vec<u8>)> = HashMap::new();
        for (n, image) in this.images.iter().enumerate() {
            let document = config(n, &image.diff_ids);
            std::fs::write(this.archive(n), this.archived(n, &this.reference(n).to_string())).unwrap();
            let descriptor = |bytes: &[u8]| json!({"mediaType": "application/octet-stream", "digest": sha256(bytes), "size": bytes.len()});
            let layers: Vec<_> = image.layers.iter().map(|l| descriptor(&blobs[*l])).collect();
            let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(document.as_bytes()), "layers": layers}).to_string();
            for name in ["1".to_owned(), sha256(manifest.as_bytes())] {
                served.insert(format!("/v2/i{n}/manifests/{name}"), (MANIFEST, manifest.clone().into_bytes()));
            }
            served.insert(format!("/v2/i{n}/blobs/{}", image.id), ("application/octet-stream", document.into_bytes()));
            for (l, id) in image.layers.iter().zip(&image.diff_ids) {
                served.insert(format!("/v2/i{n}/blobs/{id}"), ("application/octet-stream", blobs[*l].clone()));
            }
        }
        let (served, seen) = (Arc::new(served), this.seen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (served, seen) = (served.clone(), seen.clone());
                std::thread::spawn(move || serve(stream, &served, &seen));
            }
        });
        this
    }

    /// What is known of a registry at `host`.
    pub fn at(dir: &Path, host: &str) -> Self {
        let diff_ids: Vec<String> = (0..LAYERS).map(|n| sha256(&layer(n))).collect();
        let image = |n: usize| {
            let layers = layers_of(n);
            let diff_ids: Vec<String> = layers.iter().map(|l| diff_ids[*l].clone()).collect();
            Image { id: sha256(config(n, &diff_ids).as_bytes()), layers, diff_ids }
        };
        Self { host: host.to_owned(), dir: dir.to_owned(), images: (0..IMAGES).map(image).collect(), seen: Arc::default() }
    }

    /// Paths asked for since the last [`Registry::forget_requests`].
    pub fn requests(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    /// Forgets what was asked for so far.
    pub fn forget_requests(&self) {
        self.seen.lock().unwrap().clear();
    }

    /// Its name.
    pub fn reference(&self, image: usize) -> Reference {
        format!("{}/i{image}:1", self.host).parse().unwrap()
    }

    /// Its id.
    pub fn id(&self, image: usize) -> String {
        self.images[image].id.clone()
    }

    /// A `docker save` archive of it.
    pub fn archive(&self, image: usize) -> PathBuf {
        self.dir.join(format!("i{image}.tar"))
    }

    /// The same with another name in it.
    pub fn archive_as(&self, image: usize, name: &str) -> PathBuf {
        let path = self.dir.join(format!("i{image}-as-{}.tar", name.replace(['/', ':'], "-")));
        std::fs::write(&path, self.archived(image, name)).unwrap();
        path
    }

    fn archived(&self, image: usize, name: &str) -> Vec<u8> {
        let Image { layers, diff_ids, .. } = &self.images[image];
        let mut members: Vec<(String, Vec<u8>)> = layers.iter().map(|l| (format!("{l}.tar"), layer(*l))).collect();
        let names: Vec<String> = members.iter().map(|(name, _)| name.clone()).collect();
        members.push(("config.json".into(), config(image, diff_ids).into_bytes()));
        let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": names}]);
        members.push(("manifest.json".into(), manifest.to_string().into_bytes()));
        pack(&members)
    }

    /// Diff ids of its layers.
    pub fn layers(&self, image: usize) -> Vec<String> {
        self.images[image].diff_ids.clone()
    }

    /// Every file that a root filesystem of it shows.
    pub fn files(&self, image: usize) -> BTreeMap<String, String> {
        self.images[image].layers.iter().flat_map(|l| files_of(*l)).collect()
    }
}

fn serve(mut stream: TcpStream, served: &HashMap<String, (&'static str, Vec<u8>)>, seen: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut first = String::new();
    let mut line = String::new();
    // A client that died is no concern of the registry.
    while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
        if first.is_empty() {
            first.clone_from(&line);
        }
        line.clear();
    }
    let path = first.split(' ').nth(1).unwrap_or_default();
    seen.lock().unwrap().push(path.to_owned());
    let missing = ("text/plain", Vec::new());
    let (status, (kind, body)) = served.get(path).map_or((404, &missing), |found| (200, found));
    let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n", body.len());
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}
