//! A pod of the real daemon runs an Appc image: what its manifest says is seen from inside, and what the pod says goes before it.

use std::process::Command;

use mesocri::wire::cri as api;
use serde_json::json;
use tonic::Code;

use super::images::{Web, aci, gzip, id, manifest, put, run};
use crate::common::cri::{code, host_pod};
use crate::common::{Node, host};

const SCRIPT: &str = "echo user $(id -u) $(id -g) $(id -G); pwd; echo $GREETING from $AC_APP_NAME; \
    cat /work/seed; echo more >/work/new && echo writable; echo x >/conf/new || echo fixed; cat /conf/file; \
    grep -E '^(CapBnd|NoNewPrivs)' /proc/self/status | tr '\\t' ' '; \
    cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max; echo args $0 $*";

/// The bench's busybox, taken from its docker-archive.
fn busybox(node: &Node) -> impl FnOnce(&std::path::Path) {
    let archive = node.dir.path().join("busybox-docker.tar");
    mesocri::daemon::cli::sample::write_archive(&archive, "busybox:host").unwrap();
    move |root| {
        run(Command::new("tar").arg("-C").arg(root.parent().unwrap()).arg("-xf").arg(&archive).arg("layer.tar"));
        let layer = root.parent().unwrap().join("layer.tar");
        run(Command::new("tar").arg("-C").arg(root).arg("-xf").arg(&layer));
        std::fs::remove_file(layer).unwrap();
    }
}

fn security() -> api::LinuxContainerSecurityContext {
    let namespaces = api::NamespaceOption { pid: api::NamespaceMode::Container.into(), ..Default::default() };
    api::LinuxContainerSecurityContext { namespace_options: Some(namespaces), ..Default::default() }
}

fn container(name: &str, image: &str) -> api::ContainerConfig {
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(api::ImageSpec { image: image.to_owned(), ..Default::default() }),
        log_path: format!("{name}.log"),
        linux: Some(api::LinuxContainerConfig { security_context: Some(security()), ..Default::default() }),
        ..Default::default()
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_pod_runs_an_image_as_its_manifest_says() {
    let mut node = Node::prepare("");
    let web = Web::start();
    let base = aci(&manifest("example.com/busybox", "latest", json!({})), busybox(&node));
    let app = json!({
        "exec": ["/bin/sh", "-c", SCRIPT, "zero", "one"], "user": "worker", "group": "/srv/owned", "supplementaryGIDs": [700, 701],
        "workingDirectory": "/srv", "environment": [{"name": "GREETING", "value": "hello"}],
        "mountPoints": [{"name": "work", "path": "/work"}, {"name": "conf", "path": "/conf", "readOnly": true}],
        "isolators": [
            {"name": "resource/memory", "value": {"limit": "64Mi"}},
            {"name": "os/linux/capabilities-retain-set", "value": {"set": ["CAP_NET_BIND_SERVICE", "CAP_SYS_ADMIN"]}},
            {"name": "os/linux/no-new-privileges", "value": true}
        ]
    });
    let top = aci(&manifest("example.com/app", "1.0", json!({"app": app, "dependencies": [{"imageName": "example.com/busybox"}]})), |root| {
        put(root, "etc/passwd", "root:x:0:0:root:/root:/bin/sh\nworker:x:1500:1500::/srv:/bin/sh\n");
        put(root, "srv/owned", "");
        std::os::unix::fs::chown(root.join("srv/owned"), Some(0), Some(1600)).unwrap();
        put(root, "work/seed", "seed\n");
        std::os::unix::fs::chown(root.join("work"), Some(1500), Some(0)).unwrap();
        put(root, "conf/file", "configured\n");
        std::os::unix::fs::chown(root.join("conf"), Some(1500), Some(0)).unwrap();
    });
    web.serve("example.com/busybox", "latest", &gzip(&base));
    web.serve("example.com/app", "1.0", &gzip(&top));
    let prefix = web.prefix();
    node.start_daemon(&[("MESOCRI_IMAGE_PROVIDERS", "docker,appc"), ("MESOCRI_APPC_SIMPLE_DISCOVERY_URI_PREFIX", &prefix)]);

    let socket = node.socket().display().to_string();
    let pulled = host::run(env!("CARGO_BIN_EXE_mesocri"), &["pull", "--quiet", "--address", &socket, "--appc", "--label", "version=1.0", "example.com/app"]);
    assert_eq!(pulled.trim().replace(':', "-"), id(&top));
    // The form that a kubelet takes for an image, too.
    assert_eq!(node.pull_named("appc.invalid/example.com/app:1.0").await.unwrap(), pulled.trim());
    assert_eq!(code(node.pull_named("appc://example.com/none").await), Code::NotFound);

    let config = host_pod(&node, "appc");
    let pod = node.run_pod(&config).await.unwrap();
    let plain = container("plain", "appc://example.com/app:1.0");
    let container_id = node.launch(&pod, &config, &plain).await;
    let status = node.wait_exit(&container_id).await;
    let (out, err) = node.log(&container_id).await;
    let expected = "user 1500 1600 1600 700 701\n/srv\nhello from plain\nseed\nwritable\nfixed\nconfigured\n\
        CapBnd: 0000000000000400\nNoNewPrivs: 1\n67108864\nargs zero one\n";
    assert_eq!((out.as_str(), status.exit_code), (expected, 0), "{err}\n{}", node.daemon_log());
    assert_eq!(status.resources.unwrap().linux.unwrap().memory_limit_in_bytes, 64 << 20);

    // The pod's own volume, limit, user, arguments.
    let volume = node.dir.path().join("volume");
    put(&volume, "seed", "from the pod\n");
    let mut own = container("own", &id(&top));
    own.args = vec!["-c".to_owned(), SCRIPT.to_owned(), "nought".to_owned()];
    own.mounts = vec![api::Mount { container_path: "/work".to_owned(), host_path: volume.display().to_string(), ..Default::default() }];
    own.linux = Some(api::LinuxContainerConfig {
        resources: Some(api::LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() }),
        security_context: Some(api::LinuxContainerSecurityContext { run_as_user: Some(api::Int64Value { value: 0 }), ..security() }),
    });
    let container_id = node.launch(&pod, &config, &own).await;
    node.wait_exit(&container_id).await;
    let (out, err) = node.log(&container_id).await;
    assert!(out.starts_with("user 0 0 0\n/srv\nhello from own\nfrom the pod\nwritable\nfixed\n") && out.ends_with("100663296\nargs nought\n"), "{out}{err}");
    assert_eq!(std::fs::read_to_string(volume.join("new")).unwrap(), "more\n");

    // A restart keeps it; an image without an app is nothing to run by itself.
    node.kill_daemon();
    node.start_daemon(&[("MESOCRI_IMAGE_PROVIDERS", "docker,appc"), ("MESOCRI_APPC_SIMPLE_DISCOVERY_URI_PREFIX", &prefix)]);
    let bare = container("bare", "appc://example.com/busybox");
    assert!(node.create(&pod, &config, &bare).await.unwrap_err().message().contains("no app"));
    let images = node.images().list_images(api::ListImagesRequest::default()).await.unwrap().into_inner().images;
    let mut tags: Vec<_> = images.into_iter().flat_map(|image| image.repo_tags).collect();
    tags.sort();
    assert_eq!(tags, ["appc://example.com/app:1.0?arch=amd64&os=linux", "appc://example.com/busybox:latest?arch=amd64&os=linux"]);
    node.remove_all_pods().await;
    drop(web);
    node.finish();
}
