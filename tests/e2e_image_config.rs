//! End to end: what an image says about its process, and what a container makes of it (`docker/runtime`): words, environment,
//! directory, user, stop signal, volumes.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use common::cri::{host_pod, shell};
use common::{BUSYBOX, Node};
use mesocri::wire::cri as api;
use sha2::{Digest as _, Sha256};

/// The image of this test.
const IMAGE: &str = "test.invalid/configured:1";
/// Says what it sees, then waits for a signal and tells which one came.
const ENTRY: &str = r#"trap 'exit 41' USR1; trap 'exit 42' TERM
echo "words $*"
echo "in $(pwd)"
echo "as $(id -u) $(id -g) $(id -G)"
echo "env $COLOUR $OVER $HOME ${NEW-unset}"
echo "seed $(cat /data/seed), $(stat -c '%a %u %g' /data), $(ls /data)"
{ echo mine >/data/own; } 2>&1 && echo "volume written"
{ echo mine >/tmp/own; } 2>&1 && echo "root written"
mkfifo /data/f; exec 3<>/data/f
echo ready
while :; do read -t 0.05 x <&3; done
"#;

/// The bench's busybox with one more layer and a configuration.
fn write_image(node: &Node, path: &Path) {
    let mut base = Vec::new();
    let mut archive = tar::Archive::new(std::fs::File::open(node.dir.path().join("busybox.tar")).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().ends_with("layer.tar") {
            entry.read_to_end(&mut base).unwrap();
        }
    }
    let mut layer = tar::Builder::new(Vec::new());
    let mut add = |name: &str, mode: u32, (uid, gid): (u64, u64), text: Option<&str>| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(if text.is_some() { tar::EntryType::Regular } else { tar::EntryType::Directory });
        header.set_mode(mode);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_size(text.map_or(0, |t| t.len() as u64));
        layer.append_data(&mut header, name, text.unwrap_or_default().as_bytes()).unwrap();
    };
    add("work", 0o755, (0, 0), None);
    add("data", 0o750, (1000, 2000), None);
    add("data/seed", 0o640, (1000, 2000), Some("grown"));
    add("entry", 0o755, (0, 0), Some(ENTRY));
    add("etc/passwd", 0o644, (0, 0), Some("root:x:0:0:root:/root:/bin/sh\napp:x:1000:2000::/home/app:/bin/sh\n"));
    add("etc/group", 0o644, (0, 0), Some("root:x:0:\napp:x:2000:\nmore:x:3000:app\n"));
    let layer = layer.into_inner().unwrap();
    let sha = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let config = serde_json::json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": {
            "Entrypoint": ["/bin/sh", "/entry", "first"], "Cmd": ["of the", "image"], "WorkingDir": "/work", "User": "app", "StopSignal": "SIGUSR1",
            "Env": ["PATH=/bin", "COLOUR=blue", "OVER=image"], "Volumes": { "/data": {} },
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", sha(&base)), format!("sha256:{}", sha(&layer))] },
    });
    let config = config.to_string().into_bytes();
    let name = format!("{}.json", sha(&config));
    let manifest = serde_json::json!([{ "Config": name, "RepoTags": [IMAGE], "Layers": ["base.tar", "layer.tar"] }]).to_string().into_bytes();
    let mut archive = tar::Builder::new(std::fs::File::create(path).unwrap());
    for (name, bytes) in [(name.as_str(), &config), ("base.tar", &base), ("layer.tar", &layer), ("manifest.json", &manifest)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    archive.finish().unwrap();
}

/// A container that leaves everything to the image.
fn plain(name: &str) -> api::ContainerConfig {
    let mut config = shell(name, "");
    config.image = Some(api::ImageSpec { image: IMAGE.to_owned(), ..Default::default() });
    config.command.clear();
    config
}

/// Runs it until it is ready, stops it; its output and exit code.
async fn output(node: &Node, pod: &str, pc: &api::PodSandboxConfig, config: &api::ContainerConfig) -> (String, i32) {
    let id = node.launch(pod, pc, config).await;
    let start = std::time::Instant::now();
    while !node.log(&id).await.0.ends_with("ready\n") {
        assert!(start.elapsed() < Duration::from_secs(20), "it is never ready: {:?} {:?}", node.log(&id).await, node.status(&id).await);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.stop_container(&id, 10).await.unwrap();
    let (out, err) = node.log(&id).await;
    assert_eq!(err, "");
    (out, node.status(&id).await.unwrap().exit_code)
}

#[tokio::test(flavor = "current_thread")]
async fn the_image_speaks_and_the_container_overrides() {
    let node = Node::start().await;
    let archive = node.dir.path().join("configured.tar");
    write_image(&node, &archive);
    node.load(&archive);
    let pc = host_pod(&node, "configured");
    let pod = node.run_pod(&pc).await.unwrap();

    // All of it; the root is read-only, the volume is not the root's.
    let mut config = plain("all");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().readonly_rootfs = true;
    let (all, code) = output(&node, &pod, &pc, &config).await;
    let expected = "words first of the image\nin /work\nas 1000 2000 2000 3000\nenv blue image /home/app unset\n\
                    seed grown, 750 1000 2000, seed\nvolume written\n";
    assert!(all.starts_with(expected), "{all}");
    assert!(all.contains("Read-only file system") && !all.contains("root written"), "{all}");
    assert_eq!(code, 41, "the image's stop signal");

    // Each container has a volume of its own: the last one's file is not there. Here the root is writable too.
    let mut config = plain("args");
    config.args = vec!["mine".into(), "two words".into()];
    config.envs = vec![api::KeyValue { key: "OVER".into(), value: "container".into() }, api::KeyValue { key: "NEW".into(), value: "n".into() }];
    config.working_dir = "/data".into();
    config.stop_signal = api::Signal::Sigterm.into();
    let (args, code) = output(&node, &pod, &pc, &config).await;
    let expected = "words first mine two words\nin /data\nas 1000 2000 2000 3000\nenv blue container /home/app n\n\
                    seed grown, 750 1000 2000, seed\nvolume written\nroot written\nready\n";
    assert_eq!((args.as_str(), code), (expected, 42));

    // A command takes the place of entrypoint and words; a user that the container names that of the image's.
    let mut config = plain("command");
    config.command = vec!["/bin/sh".into(), "/entry".into()];
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().run_as_user = Some(api::Int64Value { value: 0 });
    let (command, code) = output(&node, &pod, &pc, &config).await;
    assert!(command.starts_with("words \nin /work\nas 0 0 ") && command.contains("\nenv blue image /root unset\n"), "{command}");
    assert_eq!(code, 41);
    let mut config = plain("both");
    config.command = vec!["/bin/sh".into(), "/entry".into()];
    config.args = vec!["mine".into()];
    // A mount on the volume's path takes its place.
    let host = node.dir.path().join("own");
    std::fs::create_dir(&host).unwrap();
    std::fs::write(host.join("seed"), "host").unwrap();
    std::os::unix::fs::chown(&host, Some(1000), Some(2000)).unwrap();
    config.mounts = vec![api::Mount { host_path: host.display().to_string(), container_path: "/data".into(), ..Default::default() }];
    let (both, code) = output(&node, &pod, &pc, &config).await;
    assert!(both.starts_with("words mine\n") && both.contains("\nseed host, "), "{both}");
    assert_eq!((code, std::fs::read_to_string(host.join("own")).unwrap().as_str()), (41, "mine\n"));

    node.remove_all_pods().await;
    // With the containers their volumes went, the caller's directory did not.
    assert!(host.join("seed").exists());
    let request = api::RemoveImageRequest { image: Some(api::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }) };
    node.images().remove_image(request).await.unwrap();
    assert!(common::entries(&node.root().join("store/layers")).is_empty(), "{BUSYBOX} was never pulled here");
    node.finish();
}
