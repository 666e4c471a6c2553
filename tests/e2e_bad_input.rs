//! End to end: what makes no sense is refused in words that help, a disk that is full is survived, and nothing half-made stays.

#![allow(clippy::unwrap_used)]

mod common;

use common::cri::{code, host_pod, pod, shell};
use common::{BUSYBOX, Node, host};
use mesocri::wire::cri as api;
use sha2::{Digest as _, Sha256};
use tonic::Code;

/// One mebibyte.
const MIB: usize = 1 << 20;

#[tokio::test(flavor = "current_thread")]
async fn images_that_cannot_be() {
    let node = Node::start().await;
    for bad in ["", "UPPER/case", "a b", "http://127.0.0.1:5000/x", "-x.y/z", "x:", "x@sha256:zz", "x@md5:00", "../x", "x/../y", "x:t\n", &"x".repeat(5000)] {
        let error = node.pull_named(bad).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{bad:?}: {error}");
        assert!(error.message().len() < 1000, "an error does not echo {} bytes", bad.len());
        let request = api::ImageStatusRequest { image: Some(api::ImageSpec { image: bad.to_owned(), ..Default::default() }), verbose: false };
        assert!(node.images().image_status(request).await.unwrap().into_inner().image.is_none());
    }
    for missing in ["127.0.0.1:5000/library/busybox:nope", "127.0.0.1:5000/no/such:x"] {
        let error = node.pull_named(missing).await.unwrap_err();
        assert!(error.code() == Code::NotFound && error.message().contains(missing), "{error}");
    }
    let nobody = format!("{BUSYBOX}@sha256:{}", "0".repeat(64));
    assert_eq!(code(node.pull_named(&nobody).await), Code::NotFound);
    let error = node.pull_named("127.0.0.1:1/x:y").await.unwrap_err();
    assert!(error.message().starts_with("RegistryUnavailable") && error.message().contains("127.0.0.1:1"), "{error}");
    let config = host_pod(&node, "p");
    let id = node.run_pod(&config).await.unwrap();
    let error = node.create(&id, &config, &shell("c", "true")).await.unwrap_err();
    assert!(error.code() == Code::NotFound && error.message().contains(BUSYBOX), "{error}");
    assert!(node.containers().await.is_empty());
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn pods_and_containers_that_cannot_be() {
    let node = Node::start().await;
    node.pull().await;
    let good = pod(&node, "good");
    let error = node.run_pod_on("nope", &good).await.unwrap_err();
    assert!(error.message().contains("nope") && error.message().contains("mesocri"), "known handlers are named: {error}");
    for parent in ["/kubepods/../../etc", "..", "/a:b", "a\nb", "/cgroup.procs/x"] {
        let mut config = good.clone();
        config.linux.as_mut().unwrap().cgroup_parent = parent.to_owned();
        let error = node.run_pod(&config).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{parent:?}: {error}");
    }
    let mut config = good.clone();
    config.log_directory = "relative/../x".to_owned();
    assert_eq!(code(node.run_pod(&config).await), Code::InvalidArgument);
    let mut config = good.clone();
    config.linux.as_mut().unwrap().sysctls = [("kernel.panic".to_owned(), "1".to_owned())].into();
    let error = node.run_pod(&config).await.unwrap_err();
    assert!(error.message().contains("kernel.panic"), "{error}");
    assert!(node.pods().await.is_empty(), "nothing of them stays");

    // Names are free after every failure.
    let id = node.run_pod(&good).await.unwrap();
    for path in ["../x.log", "a/../../x.log", "/../x.log"] {
        let mut config = shell("c", "true");
        config.log_path = path.to_owned();
        assert_eq!(code(node.create(&id, &good, &config).await), Code::InvalidArgument, "{path:?}");
    }
    let mut config = shell("c", "true");
    config.mounts = vec![api::Mount { host_path: "/no/such/volume".into(), container_path: "relative/../..".into(), ..Default::default() }];
    assert_ne!(code(node.create(&id, &good, &config).await), Code::Ok);
    assert!(node.containers().await.is_empty());
    let c = node.launch(&id, &good, &shell("c", "exec sleep 1000")).await;
    let again = node.create(&id, &good, &shell("c", "true")).await;
    assert!(again.as_ref().is_ok_and(|other| *other == c) || code(again) != Code::Ok, "one name, one container");
    assert_eq!(node.containers().await.len(), 1);
    // Ids that name nothing.
    for gone in ["0123456789abcdef", "../good", "a\0b"] {
        assert_eq!(code(node.pod_status(gone).await), Code::NotFound, "{gone:?}");
        assert_eq!(code(node.status(gone).await), Code::NotFound);
        assert_eq!(code(node.start_container(gone).await), Code::NotFound);
        node.stop_container(gone, 1).await.unwrap();
        node.remove_container(gone).await.unwrap();
        node.remove_pod(gone).await.unwrap();
    }
    let empty = api::ExecSyncRequest { container_id: c.clone(), cmd: vec![], timeout: 5 };
    assert_eq!(code(node.runtime().exec_sync(empty).await), Code::InvalidArgument);
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn requests_of_many_bytes() {
    let node = Node::start().await;
    let mut config = host_pod(&node, "large");
    config.annotations = [("blob".to_owned(), "x".repeat(17 * MIB))].into();
    let error = node.run_pod(&config).await.unwrap_err();
    assert!(matches!(error.code(), Code::OutOfRange | Code::ResourceExhausted), "{error:?}");
    assert!(node.pods().await.is_empty());
    // One that just fits is either served or refused, and either way whole.
    config.annotations = [("blob".to_owned(), "x".repeat(15 * MIB))].into();
    match node.run_pod(&config).await {
        Ok(id) => {
            assert_eq!(node.pod_status(&id).await.unwrap().annotations["blob"].len(), 15 * MIB);
            node.remove_pod(&id).await.unwrap();
        }
        Err(error) => assert!(matches!(error.code(), Code::InvalidArgument | Code::ResourceExhausted), "{error:?}"),
    }
    assert!(node.pods().await.is_empty());
    node.pull().await;
    let config = host_pod(&node, "small");
    let id = node.run_pod(&config).await.unwrap();
    let c = node.launch(&id, &config, &shell("c", "exec sleep 1000")).await;
    // More arguments than the kernel takes: an error of the exec, not of the daemon.
    let huge = api::ExecSyncRequest { container_id: c.clone(), cmd: vec!["true".into(), "x".repeat(8 * MIB)], timeout: 10 };
    assert_ne!(code(node.runtime().exec_sync(huge).await), Code::Ok);
    // More output than an answer holds is cut off, and the caller can read the rest of the stream's worth.
    let (exit, out, _) = node.exec(&c, "head -c 20000000 /dev/zero | tr '\\0' x", 60).await.unwrap();
    assert!(exit == 0 && out.len() >= MIB && out.len() <= 16 * MIB, "{exit} {}", out.len());
    assert_eq!(node.exec(&c, "echo alive", 10).await.unwrap().1, "alive\n");
    node.remove_all_pods().await;
    node.finish();
}

/// Calls each of the named methods with a message in which nothing is set and compares the codes.
macro_rules! nil {
    ($client:expr, $($method:ident($request:ident) $($code:ident)|+;)*) => {
        $({
            let code = $client.$method(api::$request::default()).await.map_or_else(|s| s.code(), |_| Code::Ok);
            assert!(matches!(code, $(Code::$code)|+), "{}: {code:?}", stringify!($method));
        })*
    };
}

#[tokio::test(flavor = "current_thread")]
async fn messages_without_anything_in_them() {
    let mut node = Node::prepare("");
    node.start_daemon(&[]);
    nil! { node.runtime(),
        version(VersionRequest) Ok;
        run_pod_sandbox(RunPodSandboxRequest) InvalidArgument;
        stop_pod_sandbox(StopPodSandboxRequest) InvalidArgument;
        remove_pod_sandbox(RemovePodSandboxRequest) InvalidArgument;
        pod_sandbox_status(PodSandboxStatusRequest) InvalidArgument;
        list_pod_sandbox(ListPodSandboxRequest) Ok;
        stream_pod_sandboxes(StreamPodSandboxesRequest) Ok;
        create_container(CreateContainerRequest) InvalidArgument;
        start_container(StartContainerRequest) InvalidArgument;
        stop_container(StopContainerRequest) InvalidArgument;
        remove_container(RemoveContainerRequest) InvalidArgument;
        list_containers(ListContainersRequest) Ok;
        stream_containers(StreamContainersRequest) Ok;
        container_status(ContainerStatusRequest) InvalidArgument;
        update_container_resources(UpdateContainerResourcesRequest) InvalidArgument;
        reopen_container_log(ReopenContainerLogRequest) InvalidArgument;
        exec_sync(ExecSyncRequest) InvalidArgument;
        exec(ExecRequest) InvalidArgument | Unimplemented;
        attach(AttachRequest) InvalidArgument | Unimplemented;
        port_forward(PortForwardRequest) InvalidArgument | Unimplemented;
        container_stats(ContainerStatsRequest) InvalidArgument;
        list_container_stats(ListContainerStatsRequest) Ok;
        stream_container_stats(StreamContainerStatsRequest) Ok;
        pod_sandbox_stats(PodSandboxStatsRequest) InvalidArgument;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) Ok;
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) Ok;
        update_runtime_config(UpdateRuntimeConfigRequest) Ok;
        status(StatusRequest) Ok;
        checkpoint_container(CheckpointContainerRequest) InvalidArgument | Unimplemented;
        list_metric_descriptors(ListMetricDescriptorsRequest) Ok | Unimplemented;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) Ok | Unimplemented;
        stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest) Ok | Unimplemented;
        runtime_config(RuntimeConfigRequest) Ok;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) InvalidArgument | Unimplemented;
    }
    nil! { node.images(),
        list_images(ListImagesRequest) Ok;
        stream_images(StreamImagesRequest) Ok;
        image_status(ImageStatusRequest) InvalidArgument;
        pull_image(PullImageRequest) InvalidArgument;
        remove_image(RemoveImageRequest) InvalidArgument;
        image_fs_info(ImageFsInfoRequest) Ok;
    }
    // Half a message.
    let half = api::RunPodSandboxRequest { config: Some(api::PodSandboxConfig::default()), ..Default::default() };
    assert_eq!(code(node.runtime().run_pod_sandbox(half).await), Code::InvalidArgument);
    assert_eq!(code(node.runtime().version(api::VersionRequest::default()).await), Code::Ok);
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn daemons_that_cannot_start_say_why() {
    let mut node = Node::prepare("");
    let file = node.dir.path().join("bad.toml");
    let path = file.display().to_string();
    let say = |text: &str, parts: &[&str]| {
        std::fs::write(&file, text).unwrap();
        let said = node.refused_daemon(&file);
        for part in parts {
            assert!(said.contains(part), "{text:?}: {part:?} is not in {said}");
        }
        assert!(said.lines().count() <= 12 && !said.contains("panicked"), "{said}");
    };
    let mut places = format!("root = {:?}\nstate = {:?}\n", node.root(), node.state());
    say("rooot = '/x'\n", &[&path, "rooot"]);
    say("[provisioner]\ncolour = 1\n", &[&path, "colour"]);
    say("root = [\n", &[&path]);
    say("[log]\nlevel = 7\n", &[&path, "level"]);
    say(&format!("{places}isolation = ['filesystem/linux']\nimage_providers = ['docker']\n"), &["image_providers", "docker/runtime"]);
    say(&format!("{places}isolation = ['docker/runtime']\nimage_providers = ['docker']\n"), &["image_providers", "filesystem/linux"]);
    say(&format!("{places}isolation = ['filesystem/linux', 'docker/runtime', 'no/such']\n"), &["no/such"]);
    say(&format!("{places}[isolator.cgroups]\ncolour = 1\n"), &["isolator cgroups", "colour"]);
    say(&format!("{places}[isolator.\"posix/rlimits\".limits]\ncolour = {{ soft = 1, hard = 2 }}\n"), &["isolator posix/rlimits", "colour"]);
    say(&format!("{places}[isolator.\"no/such\"]\n"), &["no/such"]);
    assert!(!node.root().exists() && !node.state().exists(), "what is refused by its configuration has touched nothing");
    let missing = node.dir.path().join("missing.toml");
    assert!(node.refused_daemon(&missing).contains(&missing.display().to_string()));
    assert!(node.refused_daemon(node.dir.path()).contains(&node.dir.path().display().to_string()), "a directory is no file");

    // Two on one directory, whichever of the two it is.
    node.start_daemon(&[]);
    std::fs::write(&file, &places).unwrap();
    assert!(node.refused_daemon(&file).contains("another mesocri daemon"));
    for (root, state) in [(node.root(), node.dir.path().join("state2")), (node.dir.path().join("root2"), node.state())] {
        places = format!("root = {root:?}\nstate = {state:?}\n");
        std::fs::write(&file, &places).unwrap();
        assert!(node.refused_daemon(&file).contains("another mesocri daemon"));
    }
    node.runtime().version(api::VersionRequest::default()).await.unwrap();
    node.finish();
}

/// The bench itself: what a failed test leaves is ended, and nothing else.
#[test]
fn the_bench_ends_what_names_its_directory() {
    let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sleep = |name: &std::path::Path, inside: &std::path::Path, variable: &str| {
        let mut command = std::process::Command::new("sh");
        // Waits for its input, which ends with the test.
        command.args(["-c", "read x"]).arg(name).current_dir(inside).env("BENCH", variable).stdin(std::process::Stdio::piped()).spawn().unwrap()
    };
    let (root, text) = (std::path::Path::new("/"), own.path().to_str().unwrap());
    let ours = [sleep(own.path(), root, ""), sleep(root, own.path(), ""), sleep(root, root, &format!("{text}/state/x.sock"))];
    let mut stranger = sleep(other.path(), other.path(), "");
    // One that is just becoming another program has neither arguments nor variables: so it looks again.
    let ends = |child: &mut std::process::Child, dir: &std::path::Path| {
        let mut status = None;
        host::wait_until("the process is found and dead", || {
            host::kill_processes_of("/mesocri-e2e-no-such-group", dir);
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    };
    for mut child in ours {
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ends(&mut child, own.path())), Some(9));
    }
    assert!(stranger.try_wait().unwrap().is_none(), "somebody else's lives on");
    ends(&mut stranger, other.path());
}

#[test]
fn the_effective_configuration_is_shown_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let show = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_mesocri"))
            .args(["config", "--set", "isolator.\"linux/sysctl\".unprivileged_defaults=false", "--config"])
            .arg(&file)
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, shown, errors) = show("[isolator.cgroups]\ndefault_parent = '/pods'\n");
    assert!(code == 0 && errors.is_empty(), "{code} {errors}");
    for line in [
        &format!("default_parent = \"/pods\"  # file {}", file.display()),
        "driver = \"cgroupfs\"  # default",
        "[isolator.\"namespaces/ipc\"]",
        "shm_size = 67108864  # default",
        "unprivileged_defaults = false  # flag --set",
    ] {
        assert!(shown.lines().any(|l| l == line), "{line:?} is not in {shown}");
    }
    for (text, part) in [("[isolator.cgroups]\ncolour = 1\n", "colour"), ("[isolator.typo]\n", "typo"), ("isolation = ['linux/typo']\n", "linux/typo")] {
        let (code, shown, errors) = show(text);
        assert!(code == 78 && shown.is_empty() && errors.contains(part) && errors.lines().count() == 1, "{text}: {code} {shown} {errors}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_daemon_told_to_leave_keeps_its_pods() {
    let mut node = Node::start().await;
    node.pull().await;
    let config = pod(&node, "stays");
    let id = node.run_pod(&config).await.unwrap();
    let c = node.launch(&id, &config, &shell("c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")).await;
    node.until_printed(&c, "ready").await;
    let before = (node.pod_status(&id).await.unwrap(), node.status(&c).await.unwrap());
    for _ in 0..2 {
        node.terminate_daemon();
        node.start_daemon(&[]);
        assert_eq!((node.pod_status(&id).await.unwrap(), node.status(&c).await.unwrap()), before);
    }
    node.stop_container(&c, 20).await.unwrap();
    assert_eq!(node.status(&c).await.unwrap().exit_code, 3);
    node.remove_all_pods().await;
    node.finish();
}

/// A node whose root is a file system of `mib` MiB of its own; unmount it before `finish`.
fn small_node(mib: usize) -> Node {
    let node = Node::prepare("");
    let image = node.dir.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len((mib * MIB) as u64).unwrap();
    host::run("mkfs.ext4", &["-q", "-F", "-m", "0", &image.display().to_string()]);
    std::fs::create_dir_all(node.root()).unwrap();
    host::run("mount", &["-o", "loop", &image.display().to_string(), &node.root().display().to_string()]);
    node
}

/// The file system hands freed blocks out again after its next commit.
fn free_blocks(node: &Node) {
    host::run("sync", &["--file-system", &node.root().display().to_string()]);
}

/// Ends the daemon, looks at the small file system, takes it away and ends the bench.
fn finish_small(mut node: Node) {
    node.kill_daemon();
    for dir in ["pods", "store/rootfs", "store/staging"] {
        assert_eq!(common::entries(&node.root().join(dir)), [""; 0], "left in {dir}");
    }
    host::run("umount", &[&node.root().display().to_string()]);
    node.finish();
}

/// Puts an image whose one layer holds a file of `bytes` that do not compress into the registry.
fn push_large_image(node: &Node, name: &str, bytes: usize) -> String {
    let mut noise = vec![0; bytes];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut noise).unwrap();
    let add = |tar: &mut tar::Builder<Vec<u8>>, name: &str, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, data).unwrap();
    };
    let hex = |data: &[u8]| Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let mut layer = tar::Builder::new(Vec::new());
    add(&mut layer, "noise", &noise);
    let layer = layer.into_inner().unwrap();
    let config = serde_json::json!({ "architecture": "amd64", "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex(&layer))] } }).to_string();
    let mut archive = tar::Builder::new(Vec::new());
    add(&mut archive, "config.json", config.as_bytes());
    add(&mut archive, "layer.tar", &layer);
    add(&mut archive, "manifest.json", serde_json::json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]).to_string().as_bytes());
    let path = node.dir.path().join("large.tar");
    std::fs::write(&path, archive.into_inner().unwrap()).unwrap();
    let reference = format!("{}/{name}", common::REGISTRY);
    host::run("skopeo", &["copy", "--quiet", "--dest-tls-verify=false", &format!("docker-archive:{}", path.display()), &format!("docker://{reference}")]);
    reference
}

#[tokio::test(flavor = "current_thread")]
async fn a_pull_that_fills_the_disk_leaves_nothing() {
    let mut node = small_node(16);
    node.start_registry();
    let large = push_large_image(&node, "library/large:1", 24 * MIB);
    node.start_daemon(&[]);
    for _ in 0..2 {
        let error = node.pull_named(&large).await.unwrap_err();
        assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
        for part in [large.as_str(), "noise", "No space left on device"] {
            assert!(error.message().contains(part), "{part:?} is not in {error}");
        }
        assert_eq!(common::entries(&node.root().join("store/staging")), [""; 0]);
        assert_eq!(common::entries(&node.root().join("store/layers")), [""; 0]);
        assert!(node.images().list_images(api::ListImagesRequest::default()).await.unwrap().into_inner().images.is_empty());
    }
    free_blocks(&node);
    node.pull().await;
    let config = host_pod(&node, "small");
    let id = node.run_pod(&config).await.unwrap();
    let c = node.launch(&id, &config, &shell("c", "echo works")).await;
    node.wait_exit(&c).await;
    assert_eq!(node.log(&c).await.0, "works\n");
    node.remove_all_pods().await;
    finish_small(node);
}

#[tokio::test(flavor = "current_thread")]
async fn a_full_disk_loses_no_pod() {
    let mut node = small_node(32);
    node.start_registry();
    node.start_daemon(&[]);
    node.pull().await;
    let config = pod(&node, "stays");
    let id = node.run_pod(&config).await.unwrap();
    let runs = node.launch(&id, &config, &shell("runs", "exec sleep 1000")).await;
    let ends = node.launch(&id, &config, &shell("ends", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")).await;
    node.until_printed(&ends, "ready").await;

    // Every block and every byte of slack is taken.
    let ballast = node.root().join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    for size in [MIB, 4096, 1] {
        while std::io::Write::write_all(&mut file, &vec![1; size]).is_ok() {}
    }
    file.sync_all().ok();
    for n in 0..3 {
        let error = node.run_pod(&pod(&node, &format!("late-{n}"))).await.unwrap_err();
        assert!(error.code() == Code::ResourceExhausted && error.message().contains("No space left on device"), "{error}");
        let error = node.create(&id, &config, &shell("late", "true")).await.unwrap_err();
        assert!(error.code() == Code::ResourceExhausted && error.message().contains("No space left on device"), "{error}");
    }
    assert_eq!((node.pods().await.len(), node.containers().await.len()), (1, 2));
    assert_eq!(node.exec(&runs, "echo alive", 10).await.unwrap().1, "alive\n");
    // An exit cannot be written down, and is known all the same: the shim keeps it.
    node.stop_container(&ends, 20).await.unwrap();
    assert_eq!(node.status(&ends).await.unwrap().exit_code, 9);
    node.kill_daemon();
    node.start_daemon(&[]);
    assert_eq!(node.status(&ends).await.unwrap().exit_code, 9);
    assert_eq!(node.status(&runs).await.unwrap().state, api::ContainerState::ContainerRunning as i32);
    assert_eq!(node.exec(&runs, "echo alive", 10).await.unwrap().1, "alive\n");
    // What there is can be removed while the disk is full.
    node.stop_container(&runs, 0).await.unwrap();
    node.remove_container(&runs).await.unwrap();
    drop(file);
    std::fs::remove_file(&ballast).unwrap();
    free_blocks(&node);
    let next = node.launch(&id, &config, &shell("next", "exit 4")).await;
    assert_eq!(node.wait_exit(&next).await.exit_code, 4);
    node.remove_all_pods().await;
    finish_small(node);
}
