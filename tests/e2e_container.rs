//! End to end: parts of a container's configuration that change what its process finds: kernel parameters, message queues, devices,
//! recursive read-only and shared mounts, a terminal, input. Each with its control.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::cri::{parse_log, pod, shell};
use common::{Node, host};
use mesocri::wire::cri as api;

fn privileged(config: &mut api::ContainerConfig) {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
}

async fn output(node: &Node, pod: &str, pc: &api::PodSandboxConfig, config: &api::ContainerConfig) -> String {
    let id = node.launch(pod, pc, config).await;
    node.wait_exit(&id).await;
    let (out, err) = node.log(&id).await;
    format!("{out}{err}")
}

/// Waits until the container's log, headers and all, is as wanted.
async fn log_until(node: &Node, id: &str, wanted: impl Fn(&str) -> bool) -> String {
    let path = node.status(id).await.unwrap().log_path;
    let start = std::time::Instant::now();
    loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if wanted(&text) {
            return text;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain for more in the log: {text:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "current_thread")]
async fn kernel_parameters_and_message_queues_are_the_pods_own() {
    let node = Node::start().await;
    node.pull().await;
    let files = ["kernel/shm_rmid_forced", "fs/mqueue/msg_max", "net/ipv4/ip_unprivileged_port_start"].map(|f| format!("/proc/sys/{f}"));
    let of_host = || files.iter().map(|f| std::fs::read_to_string(f).unwrap()).collect::<String>();
    let before = of_host();
    let show = format!("cat {}", files.join(" "));
    let mut pc = pod(&node, "tuned");
    let sysctls = [("kernel.shm_rmid_forced", "1"), ("fs.mqueue.msg_max", "77"), ("net.ipv4.ip_unprivileged_port_start", "4321")];
    pc.linux.as_mut().unwrap().sysctls = sysctls.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    let tuned = node.run_pod(&pc).await.unwrap();
    assert_eq!(output(&node, &tuned, &pc, &shell("show", &show)).await, "1\n77\n4321\n");
    assert_eq!(of_host(), before, "the host's parameters have changed");

    let other_pc = pod(&node, "plain");
    let other = node.run_pod(&other_pc).await.unwrap();
    let plain = output(&node, &other, &other_pc, &shell("show", &show)).await;
    assert!(plain.starts_with("0\n") && plain.ends_with("\n0\n") && !plain.contains("77"), "{plain}");

    // A queue is seen in its pod and in no other.
    let make = "grep -c ' /dev/mqueue mqueue ' /proc/mounts; touch /dev/mqueue/q && cut -c 1-6 /dev/mqueue/q";
    assert_eq!(output(&node, &tuned, &pc, &shell("makes", make)).await, "1\nQSIZE:\n");
    assert_eq!(output(&node, &tuned, &pc, &shell("sees", "ls /dev/mqueue")).await, "q\n");
    assert_eq!(output(&node, &other, &other_pc, &shell("sees", "ls /dev/mqueue")).await, "");
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn devices_that_were_asked_for_open_and_others_do_not() {
    let node = Node::start().await;
    node.pull().await;
    let pc = pod(&node, "devices");
    let pod = node.run_pod(&pc).await.unwrap();
    // 10:237 is none of the standard nodes, and opening it does nothing.
    let script = "(: </dev/mine) && echo 'opened <'; (: >/dev/mine) && echo 'opened >'";
    let with = |name: &str, permissions: &str| {
        let mut config = shell(name, script);
        config.devices = vec![api::Device { host_path: "/dev/loop-control".into(), container_path: "/dev/mine".into(), permissions: permissions.into() }];
        config
    };
    assert_eq!(output(&node, &pod, &pc, &with("all", "rwm")).await, "opened <\nopened >\n");
    let read = output(&node, &pod, &pc, &with("read", "r")).await;
    assert!(read.starts_with("opened <\n") && read.contains("Operation not permitted"), "{read}");
    // The control: a node may be made, and still does not open.
    let none = output(&node, &pod, &pc, &shell("none", &format!("ls /dev/mine; mknod /dev/mine c 10 237; {script}"))).await;
    assert!(none.matches("Operation not permitted").count() == 2 && none.contains("No such file") && !none.contains("opened"), "{none}");
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn mounts_below_mounts_are_read_only_or_shared_as_asked() {
    let node = Node::start().await;
    node.pull().await;
    let mut pc = pod(&node, "mounts");
    pc.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let pod = node.run_pod(&pc).await.unwrap();
    let volume = node.dir.path().join("volume");
    let (sub, late) = (volume.join("sub"), volume.join("late"));
    let path = volume.display().to_string();
    std::fs::create_dir_all(&sub).unwrap();
    std::fs::create_dir_all(&late).unwrap();
    host::run("mount", &["--bind", &path, &path]);
    host::run("mount", &["--make-rshared", &path]);
    host::run("mount", &["-t", "tmpfs", "tmpfs", &sub.display().to_string()]);
    let with = |name: &str, script: &str, mount: api::Mount| {
        let mut config = shell(name, script);
        config.mounts = vec![api::Mount { host_path: path.clone(), container_path: "/v".into(), ..mount }];
        config
    };

    let write = "for f in /v/x /v/sub/x; do touch $f && echo wrote $f; done";
    let recursive = with("rro", write, api::Mount { readonly: true, recursive_read_only: true, ..Default::default() });
    let text = output(&node, &pod, &pc, &recursive).await;
    assert!(text.matches("Read-only file system").count() == 2 && !text.contains("wrote"), "{text}");
    let shallow = output(&node, &pod, &pc, &with("ro", write, api::Mount { readonly: true, ..Default::default() })).await;
    assert!(shallow.starts_with("wrote /v/sub/x\n") && shallow.contains("/v/x: Read-only"), "{shallow}");

    let mounts = "mount -t tmpfs tmpfs /v/late && touch /v/late/inside && echo mounted";
    for (propagation, seen) in [(api::MountPropagation::PropagationHostToContainer, false), (api::MountPropagation::PropagationBidirectional, true)] {
        let mut config = with(propagation.as_str_name(), mounts, api::Mount { propagation: propagation.into(), ..Default::default() });
        privileged(&mut config);
        assert_eq!(output(&node, &pod, &pc, &config).await, "mounted\n");
        assert_eq!(late.join("inside").exists(), seen, "{propagation:?}");
    }
    // What a container shares with the host stays until the host takes it away.
    host::run("umount", &[&late.display().to_string()]);
    host::run("umount", &[&sub.display().to_string()]);
    host::run("umount", &[&path]);
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn a_terminal_and_input() {
    let node = Node::start().await;
    node.pull().await;
    let pc = pod(&node, "streams");
    let pod = node.run_pod(&pc).await.unwrap();
    let look = "for n in 0 1 2; do test -t $n && echo $n is; done; echo err >&2; echo $TERM; tty";
    let mut config = shell("terminal", look);
    config.tty = true;
    let id = node.launch(&pod, &pc, &config).await;
    node.wait_exit(&id).await;
    let text = std::fs::read_to_string(node.status(&id).await.unwrap().log_path).unwrap();
    // One stream; the terminal's carriage returns are not in the log.
    assert!(text.lines().all(|line| line.contains(" stdout F ")) && !text.contains('\r'), "{text:?}");
    assert_eq!(parse_log(&text).0, "0 is\n1 is\n2 is\nerr\nxterm\n/dev/pts/0\n");
    let (out, err) = {
        let id = node.launch(&pod, &pc, &shell("none", look)).await;
        node.wait_exit(&id).await;
        node.log(&id).await
    };
    assert_eq!((out.as_str(), err.as_str()), ("\nnot a tty\n", "err\n"));

    // Without input there is an end of it at once; with it there is none until somebody says so.
    let echo = "echo up; while read line; do echo \"got $line\"; done; echo end";
    assert_eq!(output(&node, &pod, &pc, &shell("closed", echo)).await, "up\nend\n");
    let mut config = shell("open", echo);
    config.stdin = true;
    let id = node.launch(&pod, &pc, &config).await;
    log_until(&node, &id, |text| text.ends_with(" up\n")).await;
    let bundle = node.state().join("pods").join(&pod).join("containers").join(&id);
    std::fs::write(bundle.join("stdin"), "one\ntwo\n").unwrap();
    let text = log_until(&node, &id, |text| text.contains(" got two\n")).await;
    assert_eq!(parse_log(&text).0, "up\ngot one\ngot two\n");
    assert_eq!(node.status(&id).await.unwrap().state(), api::ContainerState::ContainerRunning, "a writer that leaves is no end of input");
    node.remove_all_pods().await;
    node.finish();
}

/// The first process ends, another one holds its output until the container is deleted, or even longer; nothing of what was written
/// is lost then.
#[tokio::test(flavor = "current_thread")]
async fn an_unfinished_last_line_is_in_the_log_of_a_container_that_leaves_processes_behind() {
    let node = Node::start().await;
    node.pull().await;
    let mut config = pod(&node, "line");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut().unwrap().pid = api::NamespaceMode::Pod.into();
    let id = node.run_pod(&config).await.unwrap();
    for held in [false, true] {
        let script = "trap 'exit 0' TERM; sleep 1000 & printf done; printf error >&2; touch /tmp/ready; while :; do sleep 0.02; done";
        let mut container = shell(if held { "held" } else { "free" }, script);
        container.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut().unwrap().pid = api::NamespaceMode::Pod.into();
        let container = node.launch(&id, &config, &container).await;
        let pid = node.process_of(&container).await.unwrap().0;
        host::wait_until("both lines are begun", || std::path::Path::new(&format!("/proc/{pid}/root/tmp/ready")).exists());
        // Somebody whom the container's end does not end has them open: there is no end of file.
        let holders: Vec<_> = (1..=2).filter(|_| held).map(|fd| std::fs::File::options().append(true).open(format!("/proc/{pid}/fd/{fd}")).unwrap()).collect();
        node.stop_container(&container, 20).await.unwrap();
        let status = node.wait_exit(&container).await;
        assert_eq!(status.exit_code, 0, "{status:?}");
        node.remove_container(&container).await.unwrap();
        let text = std::fs::read_to_string(&status.log_path).unwrap();
        let mut lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
        lines.sort_unstable();
        assert_eq!(lines, ["stderr P error", "stdout P done"], "held: {held}; {text:?}");
        drop(holders);
    }
    node.remove_all_pods().await;
    node.finish();
}
