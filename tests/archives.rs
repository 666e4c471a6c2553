//! End to end: images from archives that skopeo, umoci and buildah made, archives of ours that they take, images and artifacts as
//! volumes of a pod.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use common::cri::{code, pod, shell};
use common::host::run;
use common::{BUSYBOX, Node, REGISTRY};
use mesocri::wire::cri as api;
use sha2::Digest as _;
use tonic::Code;

/// Runs a shell script; `$M` is our program, `$A` the daemon's socket.
fn sh(node: &Node, script: &str) -> String {
    let script = format!("set -e -o pipefail; M={}; A={}; cd {}; {script}", env!("CARGO_BIN_EXE_mesocri"), node.socket().display(), node.dir.path().display());
    run("bash", &["-c", &script])
}

/// Path to a line that says everything of it but the times of directories.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let content = if meta.is_dir() {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            String::new()
        } else if meta.is_symlink() {
            std::fs::read_link(&path).unwrap().display().to_string()
        } else {
            format!("{:x}", sha2::Sha256::digest(std::fs::read(&path).unwrap()))
        };
        let time = if meta.is_dir() { 0 } else { meta.mtime() };
        let name = path.strip_prefix(root).unwrap().display().to_string();
        out.insert(name, format!("{:o} {}:{} {time} {content}", meta.mode(), meta.uid(), meta.gid()));
    }
    out
}

fn in_volume(image: &str, at: &str, sub_path: &str) -> api::Mount {
    api::Mount {
        container_path: at.to_owned(),
        readonly: true,
        image: Some(api::ImageSpec { image: image.to_owned(), ..Default::default() }),
        image_sub_path: sub_path.to_owned(),
        ..Default::default()
    }
}

#[tokio::test]
async fn tools_take_what_is_saved_and_it_comes_back() {
    let node = Node::start().await;
    let before = node.pull().await;
    sh(
        &node,
        &format!(
            "$M save --address $A -o oci.tar {BUSYBOX}; $M save --address $A --format docker {BUSYBOX} > docker.tar; \
             $M save --address $A --format oci-dir -o layout {BUSYBOX}; \
             skopeo copy -q --src-tls-verify=false docker://{BUSYBOX} oci:original:host"
        ),
    );
    for source in ["oci-archive:oci.tar:host", "docker-archive:docker.tar", "oci:layout:host"] {
        let text = sh(&node, &format!("skopeo inspect {source}"));
        assert!(text.contains("PATH=/usr/local/sbin"), "{source}: {text}");
    }
    // The files are those that the registry's image has, by the word of umoci.
    sh(
        &node,
        "umoci unpack --image original:host a; umoci unpack --image layout:host b; mkdir c; skopeo copy -q docker-archive:docker.tar oci:c/l:x; umoci unpack --image c/l:x d",
    );
    let wanted = tree(&node.dir.path().join("a/rootfs"));
    assert!(wanted.len() > 100);
    for other in ["b", "d"] {
        assert_eq!(wanted, tree(&node.dir.path().join(other).join("rootfs")), "{other}");
    }
    // Another tool that unpacks for itself.
    sh(&node, "id=$(buildah --root b1 --runroot b2 --storage-driver vfs pull -q docker-archive:docker.tar); test -n \"$id\"");
    // Standard input, and what refuses.
    let id = sh(&node, &format!("$M save --address $A {BUSYBOX} | $M load --address $A -")).trim().to_owned();
    assert_ne!(id, before);
    assert_eq!(sh(&node, "gzip < docker.tar | $M load --address $A -").trim(), id);
    assert_eq!(sh(&node, &format!("$M save --address $A {BUSYBOX} | cmp - oci.tar && echo same")).trim(), "same");
    for bad in [
        "head -c 100000 oci.tar | $M load --address $A -",
        "echo nonsense | $M load --address $A -",
        "$M save --address $A -o x.tar nothing:1",
        "$M save --address $A --format oci-dir",
    ] {
        assert_eq!(sh(&node, &format!("if {bad} 2>/dev/null; then echo done; else echo refused; fi; test ! -e x.tar")).trim(), "refused", "{bad}");
    }
    // It runs.
    let config = pod(&node, "saved");
    let sandbox = node.run_pod(&config).await.unwrap();
    let container = node.launch(&sandbox, &config, &shell("c", "echo alive")).await;
    assert_eq!(node.wait_exit(&container).await.exit_code, 0);
    assert_eq!(node.log(&container).await.0, "alive\n");
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test]
async fn a_directory_of_archives_is_the_registry() {
    let mut node = Node::prepare("");
    let shelf = node.dir.path().join("shelf");
    std::fs::create_dir_all(shelf.join("corp")).unwrap();
    node.extra_config = format!("[provisioner]\ndocker_registry = {:?}\n", shelf.display().to_string());
    node.start_registry();
    node.start_daemon(&[]);
    sh(
        &node,
        &format!(
            "S='skopeo copy -q --src-tls-verify=false docker://{BUSYBOX}'; \
             $S docker-archive:one.tar:busybox:1; mv one.tar shelf/busybox:1.tar; \
             $S oci:shelf/corp/app:2; \
             $S oci-archive:packed.tar:3; gzip -k packed.tar; mv packed.tar shelf/corp/packed:3.tar; mv packed.tar.gz shelf/corp/zipped:3.tar.gz; \
             umoci unpack --image shelf/corp/app:2 bundle; echo more > bundle/rootfs/added; umoci repack --image shelf/corp/app:more bundle; \
             cp shelf/busybox:1.tar shelf/wrong:9.tar"
        ),
    );
    for name in ["busybox:1", "corp/app:2", "corp/packed:3", "corp/zipped:3", "corp/app:more"] {
        let id = node.pull_named(name).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        let spec = api::ImageSpec { image: name.to_owned(), ..Default::default() };
        let image = node.images().image_status(api::ImageStatusRequest { image: Some(spec), verbose: false }).await.unwrap().into_inner().image.unwrap();
        assert_eq!(image.id, id, "{name}");
    }
    let refused = node.pull_named("wrong:9").await.unwrap_err();
    assert!(refused.code() == Code::NotFound && refused.message().contains("docker.io/library/busybox:1"), "{refused:?}");
    assert_eq!(code(node.pull_named("missing:1").await), Code::NotFound);
    // A name with a host goes to that host.
    node.pull().await;
    let config = pod(&node, "shelf");
    let sandbox = node.run_pod(&config).await.unwrap();
    let mut from_shelf = shell("c", "cat /added");
    from_shelf.image = Some(api::ImageSpec { image: "corp/app:more".to_owned(), ..Default::default() });
    let container = node.launch(&sandbox, &config, &from_shelf).await;
    assert_eq!(node.wait_exit(&container).await.exit_code, 0);
    assert_eq!(node.log(&container).await.0, "more\n");
    node.remove_all_pods().await;
    node.finish();
}

/// Puts a blob into the registry; its descriptor.
async fn push_blob(repository: &str, bytes: &[u8], media_type: &str, title: Option<&str>) -> serde_json::Value {
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let digest = format!("sha256:{:x}", sha2::Sha256::digest(bytes));
    let begun = client.post(format!("http://{REGISTRY}/v2/{repository}/blobs/uploads/")).header("Content-Length", "0").send().await.unwrap();
    let mut place = reqwest::Url::parse(&format!("http://{REGISTRY}")).unwrap().join(begun.headers()["location"].to_str().unwrap()).unwrap();
    place.query_pairs_mut().append_pair("digest", &digest);
    assert_eq!(client.put(place).body(bytes.to_vec()).send().await.unwrap().status(), 201);
    let mut descriptor = serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
    if let Some(title) = title {
        descriptor["annotations"] = serde_json::json!({"org.opencontainers.image.title": title});
    }
    descriptor
}

/// Puts an artifact of these files into the registry; its name.
async fn push_artifact(repository: &str, files: &[(&str, &[u8])]) -> String {
    let config = push_blob(repository, b"{}", "application/vnd.oci.empty.v1+json", None).await;
    let mut layers = Vec::new();
    for (name, bytes) in files {
        layers.push(push_blob(repository, bytes, "application/vnd.example.file", Some(name)).await);
    }
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "artifactType": "application/vnd.example", "config": config, "layers": layers});
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let put = client.put(format!("http://{REGISTRY}/v2/{repository}/manifests/1")).header("Content-Type", media_type).body(manifest.to_string());
    let answer = put.send().await.unwrap();
    assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
    format!("{REGISTRY}/{repository}:1")
}

async fn a_pod_with_image_volumes(extra: &str) {
    // The process's provider for TLS, though nothing here uses it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut node = Node::prepare(extra);
    node.start_registry();
    node.start_daemon(&[]);
    node.pull().await;
    let weights = vec![7u8; 300_000];
    let artifact = push_artifact("models/tiny", &[("model.bin", &weights), ("docs/read me.md", b"hello\n"), ("same.bin", &weights)]).await;
    let pulled = node.pull_named(&artifact).await.unwrap();
    assert_eq!(node.pull_named(&artifact).await.unwrap(), pulled);

    let config = pod(&node, "volumes");
    let sandbox = node.run_pod(&config).await.unwrap();
    let mut wanted = shell("c", "trap 'exit 0' TERM; while :; do sleep 0.05; done");
    wanted.mounts = vec![
        in_volume(BUSYBOX, "/img", ""),
        in_volume(&artifact, "/art", ""),
        in_volume(BUSYBOX, "/tools", "bin"),
        in_volume(&artifact, "/etc/one.md", "docs/read me.md"),
    ];
    let container = node.launch(&sandbox, &config, &wanted).await;
    let look = async |node: &Node| {
        let script = "/img/bin/busybox echo runs; wc -c < /art/model.bin; cat '/art/docs/read me.md' /etc/one.md; /tools/busybox true && echo tool; \
                      ls /tools/etc 2>/dev/null; cmp /art/model.bin /art/same.bin && echo same; for d in /img /art /tools; do touch $d/x 2>/dev/null || echo refused; done";
        node.exec(&container, script, 20).await.unwrap().1
    };
    let seen = "runs\n300000\nhello\nhello\ntool\nsame\nrefused\nrefused\nrefused\n";
    assert_eq!(look(&node).await, seen);
    // The host does not see them, the status says what they are.
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    assert!(!mounts.contains(".volume-"), "{mounts}");
    let status = node.status(&container).await.unwrap();
    let of = |at: &str| status.mounts.iter().find(|m| m.container_path == at).unwrap().clone();
    assert_eq!((of("/art").image.unwrap().image_ref, of("/art").readonly), (pulled, true), "the image that PullImage named");
    assert_eq!(of("/tools").image_sub_path, "bin");

    // What cannot be is refused, by the name that the kubelet knows, and leaves nothing.
    for (n, (image, sub_path)) in [(BUSYBOX, "not-existing"), (BUSYBOX, "bin/sh/x"), ("127.0.0.1:5000/not/pulled:1", "")].into_iter().enumerate() {
        let mut bad = shell(&format!("bad{n}"), "true");
        bad.mounts = vec![in_volume(&artifact, "/first", ""), in_volume(image, "/v", sub_path)];
        let refused = node.create(&sandbox, &config, &bad).await.unwrap_err();
        assert!(refused.message().starts_with("ImageVolumeMountFailed: "), "{refused:?}");
    }
    let mut no_root = shell("artifact", "true");
    no_root.image = Some(api::ImageSpec { image: artifact.clone(), ..Default::default() });
    assert_eq!(code(node.create(&sandbox, &config, &no_root).await), Code::FailedPrecondition);

    // Images may go; what is mounted stays, over a crash of the daemon too.
    for image in [artifact.as_str(), BUSYBOX] {
        let spec = api::ImageSpec { image: image.to_owned(), ..Default::default() };
        node.images().remove_image(api::RemoveImageRequest { image: Some(spec) }).await.unwrap();
    }
    node.kill_daemon();
    node.start_daemon(&[]);
    assert_eq!(look(&node).await, seen);
    let why = sh(&node, "$M df --address $A --json");
    let report: serde_json::Value = serde_json::from_str(&why).unwrap();
    assert_eq!(report["unexplained"]["inodes"], 0, "{why}");
    node.remove_all_pods().await;
    assert!(common::entries(&node.root().join("store/layers")).is_empty());
    assert!(common::entries(&node.root().join("store/leases")).is_empty());
    node.finish();
}

#[tokio::test]
async fn image_volumes_from_directories() {
    a_pod_with_image_volumes("").await;
}

#[tokio::test]
async fn image_volumes_from_erofs_images() {
    a_pod_with_image_volumes("[provisioner]\nbackend = 'erofs'\n").await;
}

#[tokio::test]
async fn image_volumes_by_copies() {
    a_pod_with_image_volumes("[provisioner]\nbackend = 'copy'\n").await;
}
