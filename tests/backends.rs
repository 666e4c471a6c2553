//! End to end: containers on every backend, and a store whose backend changes between two lives of the daemon.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::MetadataExt;

use common::Node;
use common::cri::{host_pod, shell};
use mesocri::wire::cri as api;

fn with(backend: &str) -> String {
    format!("[provisioner]\nbackend = {backend:?}\n")
}

/// Mounts of the test's own namespace that come from the store.
fn mounts(node: &Node) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let store = node.root().display().to_string();
    table.lines().filter(|l| l.contains(&store) || l.contains(" erofs ")).map(str::to_owned).collect()
}

async fn runs(node: &Node, pod: (&str, &api::PodSandboxConfig), name: &str, writable: bool) {
    let id = node.launch(pod.0, pod.1, &shell(name, "while :; do sleep 0.1; done")).await;
    let (exit, out, err) = node
        .exec(&id, "echo x >/written && cat /written; touch /bin/again 2>/dev/null && echo again; grep -c . /etc/hosts; ls /bin/busybox", 10)
        .await
        .unwrap();
    let expected = if writable { "x\nagain\n" } else { "" };
    assert!(exit == 0 && out.starts_with(expected) && out.ends_with("/bin/busybox\n"), "{name}: {exit} {out:?} {err:?}");
    assert_eq!(err.contains("Read-only file system"), !writable, "{name}: {err}");
    // A user by name is looked up in the image's own files, without the container.
    let mut named = shell(&format!("{name}-user"), "id -u");
    named.linux.as_mut().unwrap().security_context.as_mut().unwrap().run_as_username = "root".to_owned();
    let user = node.launch(pod.0, pod.1, &named).await;
    assert_eq!(node.wait_exit(&user).await.exit_code, 0);
    assert_eq!(node.log(&user).await.0, "0\n");
    assert_eq!(mounts(node), Vec::<String>::new(), "{name}: nothing is mounted on the host");
    node.remove_container(&user).await.unwrap();
    node.stop_container(&id, 0).await.unwrap();
    node.remove_container(&id).await.unwrap();
}

/// Names of what the layers are kept as.
fn forms(node: &Node) -> Vec<String> {
    let layers = node.root().join("store/layers");
    let mut forms: Vec<_> = common::entries(&layers).iter().flat_map(|layer| common::entries(&layers.join(layer))).filter(|n| n != "layer.json").collect();
    forms.sort();
    forms.dedup();
    forms
}

#[tokio::test(flavor = "current_thread")]
async fn every_backend_runs_containers_from_layers_in_either_form() {
    let mut node = Node::prepare("");
    node.start_registry();
    for (first, form, others) in [("overlay", "fs", ["erofs", "bind", "copy"]), ("erofs", "fs.erofs", ["copy", "overlay", "bind"])] {
        node.extra_config = with(first);
        node.start_daemon(&[]);
        let image = node.pull().await;
        assert_eq!(forms(&node), [form]);
        let config = host_pod(&node, first);
        let pod = node.run_pod(&config).await.unwrap();
        runs(&node, (&pod, &config), first, true).await;
        // What runs goes on over a change of backend, and so does what is stored.
        let kept = node.launch(&pod, &config, &shell("kept", "echo kept >/kept; while :; do sleep 0.1; done")).await;
        for backend in others {
            node.terminate_daemon();
            node.extra_config = with(backend);
            node.start_daemon(&[]);
            assert_eq!(forms(&node), [form]);
            runs(&node, (&pod, &config), backend, backend != "bind").await;
            assert_eq!(node.exec(&kept, "cat /kept; ls /bin/busybox", 10).await.unwrap().1, "kept\n/bin/busybox\n");
        }
        node.remove_pod(&pod).await.unwrap();
        node.images().remove_image(api::RemoveImageRequest { image: Some(api::ImageSpec { image, ..Default::default() }) }).await.unwrap();
        assert!(common::entries(&node.root().join("store/layers")).is_empty());
        node.terminate_daemon();
    }
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn one_file_a_layer_is_what_the_store_counts() {
    let mut node = Node::prepare(&with("erofs"));
    node.start_registry();
    node.start_daemon(&[]);
    node.pull().await;
    let info = node.images().image_fs_info(api::ImageFsInfoRequest::default()).await.unwrap().into_inner();
    let used = info.image_filesystems[0].inodes_used.as_ref().unwrap().value;
    let mut inodes = 0;
    let mut todo = vec![node.root().join("store")];
    while let Some(path) = todo.pop() {
        inodes += 1;
        if std::fs::symlink_metadata(&path).unwrap().mode() & 0o170_000 == 0o040_000 {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    assert_eq!(used, inodes);
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn a_wrong_choice_does_not_start_and_says_why() {
    let node = Node::prepare("");
    let config = node.dir.path().join("wrong.toml");
    for (backend, why) in [("aufs", "this kernel has no file system aufs"), ("devicemapper", "only overlay, aufs, copy, bind, erofs")] {
        let text = format!("root = {:?}\nstate = {:?}\n{}", node.root(), node.state(), with(backend));
        std::fs::write(&config, text).unwrap();
        let said = node.refused_daemon(&config);
        assert!(said.contains(why), "{said}");
    }
    node.finish();
}
