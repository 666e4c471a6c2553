//! Images of the bench: a pause for the peers, and generated ones for cold pulls, pushed to the bench's registry.

use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};

use crate::common::{REGISTRY, host};
use crate::engines::Bench;
use crate::pulls::Names;

/// A generated image.
pub struct Shape {
    /// Rows of the table.
    pub rows: Names,
    layers: usize,
    files: usize,
    bytes: usize,
    zstd: bool,
    /// Part of every run.
    small: bool,
}

/// All generated images.
pub const SHAPES: &[Shape] = &[
    Shape {
        rows: Names {
            time: "cold pull, 1 MB, one layer",
            written: "– its bytes written",
            memory: "– the daemon's peak",
            disk: "– disk used afterwards",
            together: None,
        },
        layers: 1,
        files: 10,
        bytes: 100_000,
        zstd: false,
        small: true,
    },
    Shape {
        rows: Names {
            time: "cold pull, 230 MB, 30 layers, 59,000 files",
            written: "– 30 layers, bytes written",
            memory: "– 30 layers, the daemon's peak",
            disk: "– 30 layers, disk used afterwards",
            together: Some("– 30 layers, 20 callers at once"),
        },
        layers: 30,
        files: 1_966,
        bytes: 3_900,
        zstd: false,
        small: false,
    },
    Shape {
        rows: Names {
            time: "cold pull, 1.2 GB (640 MB gzip), 3 layers, 55,000 files",
            written: "– gzip, bytes written",
            memory: "– gzip, the daemon's peak",
            disk: "– gzip, disk used afterwards",
            together: None,
        },
        layers: 3,
        files: 18_333,
        bytes: 22_000,
        zstd: false,
        small: false,
    },
    Shape {
        rows: Names {
            time: "the same as zstd",
            written: "– zstd, bytes written",
            memory: "– zstd, the daemon's peak",
            disk: "– zstd, disk used afterwards",
            together: None,
        },
        layers: 3,
        files: 18_333,
        bytes: 22_000,
        zstd: true,
        small: false,
    },
];

/// Images that are measured.
pub fn shapes(all: bool) -> impl Iterator<Item = &'static Shape> {
    SHAPES.iter().filter(move |s| all || s.small)
}

/// Reference of an image.
pub fn reference(shape: &Shape) -> String {
    let index = SHAPES.iter().position(|s| s.rows.time == shape.rows.time).unwrap();
    format!("{REGISTRY}/bench/pull{index}:x")
}

/// Builds and pushes what is needed.
pub fn push(bench: &Bench, all: bool) {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/dist");
    let init = std::fs::read(dist.join("mesocri-init")).expect("hack/dev build was run");
    let layer = layer_of([("pause".to_owned(), 0o755, init)]);
    push_image(bench, "library/pause:bench", &[layer], &["/pause", "pause"], false);
    for (index, shape) in SHAPES.iter().enumerate().filter(|(_, s)| all || s.small) {
        let mut random = 0x1234_5678_9abc_def1 ^ index as u64;
        let layers: Vec<Vec<u8>> = (0..shape.layers)
            .map(|l| layer_of((0..shape.files).map(|f| (format!("layer{l}/dir{}/file{f}", f / 200), 0o644, content(&mut random, shape.bytes)))))
            .collect();
        push_image(bench, &format!("bench/pull{index}:x"), &layers, &["/none"], shape.zstd);
    }
}

/// Bytes that compress to about half, as programs and libraries do.
fn content(random: &mut u64, bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        out.extend_from_slice(&random.to_le_bytes());
        out.extend_from_slice(b"sameword");
    }
    out.truncate(bytes);
    out
}

fn layer_of(files: impl IntoIterator<Item = (String, u32, Vec<u8>)>) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, mode, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        tar.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Writes an OCI layout and lets skopeo push it.
fn push_image(bench: &Bench, name: &str, layers: &[Vec<u8>], entrypoint: &[&str], zstd: bool) {
    let dir = tempfile::tempdir_in(bench.node.dir.path()).unwrap();
    let blobs = dir.path().join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        std::fs::write(blobs.join(&hex), bytes).unwrap();
        (format!("sha256:{hex}"), bytes.len())
    };
    let mut diff_ids = Vec::new();
    let mut descriptors = Vec::new();
    for layer in layers {
        let hex: String = Sha256::digest(layer).iter().map(|b| format!("{b:02x}")).collect();
        diff_ids.push(format!("sha256:{hex}"));
        let packed = if zstd {
            zstd::encode_all(layer.as_slice(), 3).unwrap()
        } else {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
            encoder.write_all(layer).unwrap();
            encoder.finish().unwrap()
        };
        let (digest, size) = put(&packed);
        let media = if zstd { "application/vnd.oci.image.layer.v1.tar+zstd" } else { "application/vnd.oci.image.layer.v1.tar+gzip" };
        descriptors.push(serde_json::json!({"mediaType": media, "digest": digest, "size": size}));
    }
    let config =
        serde_json::json!({"architecture": "amd64", "os": "linux", "config": {"Entrypoint": entrypoint}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let (config_digest, config_size) = put(&serde_json::to_vec(&config).unwrap());
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config_size}, "layers": descriptors});
    let (digest, size) = put(&serde_json::to_vec(&manifest).unwrap());
    let index =
        serde_json::json!({"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size}]});
    std::fs::write(dir.path().join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    host::run(
        "skopeo",
        &["copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false", &format!("oci:{}", dir.path().display()), &format!("docker://{REGISTRY}/{name}")],
    );
}
