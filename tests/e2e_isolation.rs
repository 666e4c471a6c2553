//! End to end: what a container may and may not see and do, each with its negative control.

#![allow(clippy::unwrap_used)]

mod common;

use common::cri::{code, host_pod, pod, shell};
use common::{Node, host};
use mesocri::wire::cri as api;
use tonic::Code;

async fn with_pod(node: &Node, name: &str, privileged: bool) -> (String, api::PodSandboxConfig) {
    node.pull().await;
    let mut config = host_pod(node, name);
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = privileged;
    (node.run_pod(&config).await.unwrap(), config)
}

fn security(config: &mut api::ContainerConfig) -> &mut api::LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

async fn output(node: &Node, pod: &str, pod_config: &api::PodSandboxConfig, config: &api::ContainerConfig) -> String {
    let id = node.launch(pod, pod_config, config).await;
    node.wait_exit(&id).await;
    let (out, err) = node.log(&id).await;
    format!("{out}{err}")
}

#[tokio::test(flavor = "current_thread")]
async fn capabilities_seccomp_and_privileges() {
    let node = Node::start().await;
    let (pod, pc) = with_pod(&node, "caps", true).await;
    let status = "grep -E '^(CapEff|CapBnd|Seccomp|NoNewPrivs):' /proc/self/status | tr '\\t' ' '";
    let plain = output(&node, &pod, &pc, &shell("plain", status)).await;
    assert!(plain.contains("CapBnd: 00000000a80425fb"), "the default set: {plain}");
    assert!(plain.contains("Seccomp: 0") && plain.contains("NoNewPrivs: 0"), "{plain}");

    let mut config = shell("tight", status);
    let context = security(&mut config);
    context.seccomp = Some(api::SecurityProfile::default());
    context.no_new_privs = true;
    context.capabilities =
        Some(api::Capability { drop_capabilities: vec!["all".into()], add_capabilities: vec!["net_bind_service".into()], ..Default::default() });
    let tight = output(&node, &pod, &pc, &config).await;
    assert!(tight.contains("CapBnd: 0000000000000400") && tight.contains("Seccomp: 2") && tight.contains("NoNewPrivs: 1"), "{tight}");

    let mut config = shell("user", "id -u; id -g; id -G; grep CapEff /proc/self/status | tr '\\t' ' '");
    let context = security(&mut config);
    context.run_as_user = Some(api::Int64Value { value: 1001 });
    context.run_as_group = Some(api::Int64Value { value: 1002 });
    context.supplemental_groups = vec![1234];
    assert_eq!(output(&node, &pod, &pc, &config).await, "1001\n1002\n1002 1234\nCapEff: 0000000000000000\n");

    let mut config = shell("group-alone", "true");
    security(&mut config).run_as_group = Some(api::Int64Value { value: 1 });
    assert_eq!(code(node.create(&pod, &pc, &config).await), Code::InvalidArgument);
    let mut config = shell("unknown-cap", "true");
    security(&mut config).capabilities = Some(api::Capability { add_capabilities: vec!["FLY".into()], ..Default::default() });
    assert!(node.create(&pod, &pc, &config).await.unwrap_err().message().contains("FLY"));

    let mut config = shell("god", status);
    security(&mut config).privileged = true;
    security(&mut config).seccomp = Some(api::SecurityProfile::default());
    let god = output(&node, &pod, &pc, &config).await;
    assert!(god.contains("Seccomp: 0") && !god.contains("a80425fb"), "{god}");
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn files_are_masked_and_read_only_where_asked() {
    let node = Node::start().await;
    node.pull().await;
    // With a host name of its own: the control writes it.
    let pc = pod(&node, "files");
    let pod = node.run_pod(&pc).await.unwrap();
    let script = "grep -c Linux /proc/version; ls /proc/tty | wc -l; ls /root/../proc/tty/driver >/dev/null && echo listed; \
                  echo x >/proc/sys/kernel/hostname && echo renamed; touch /root/x && echo written; touch /proc/tty/x 2>&1 | grep -c Read-only";
    let mut config = shell("guarded", script);
    let context = security(&mut config);
    context.masked_paths = vec!["/proc/version".into(), "/proc/tty".into(), "/no/such".into()];
    context.readonly_paths = vec!["/proc/sys".into()];
    context.readonly_rootfs = true;
    let text = output(&node, &pod, &pc, &config).await;
    // The masked file is empty, the masked directory too, and nothing can be put into it.
    assert!(text.starts_with("0\n0\n1\n"), "{text}");
    assert!(text.matches("Read-only file system").count() == 2, "{text}");
    assert!(["listed", "renamed", "written"].iter().all(|word| !text.contains(word)), "{text}");
    // The control: without the guards all of it works.
    let text = output(&node, &pod, &pc, &shell("open", script)).await;
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("1"), "{text}");
    assert!(lines.next().unwrap().parse::<u32>().unwrap() > 0, "{text}");
    assert_eq!(lines.collect::<Vec<_>>(), ["listed", "renamed", "written", "0"], "{text}");
    node.remove_all_pods().await;
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn volumes_propagate_as_asked_and_stay_inside() {
    let node = Node::start().await;
    let (pod, pc) = with_pod(&node, "volumes", true).await;
    let volume = node.dir.path().join("volume");
    std::fs::create_dir_all(volume.join("sub")).unwrap();
    std::fs::write(volume.join("file"), "from the host\n").unwrap();
    host::run("mount", &["--bind", &volume.display().to_string(), &volume.display().to_string()]);
    host::run("mount", &["--make-rshared", &volume.display().to_string()]);
    let mount = |readonly: bool, propagation: api::MountPropagation| api::Mount {
        host_path: volume.display().to_string(),
        container_path: "/mnt/v".into(),
        readonly,
        propagation: propagation.into(),
        ..Default::default()
    };
    let script = "cat /mnt/v/file; touch /mnt/v/w && echo rw; while [ ! -e /tmp/go ]; do sleep 0.02; done; ls /mnt/v/sub";
    let mut slave = shell("slave", script);
    slave.mounts = vec![mount(false, api::MountPropagation::PropagationHostToContainer)];
    let mut private = shell("private", script);
    private.mounts = vec![mount(true, api::MountPropagation::PropagationPrivate)];
    let slave_id = node.launch(&pod, &pc, &slave).await;
    let private_id = node.launch(&pod, &pc, &private).await;
    host::run("mount", &["-t", "tmpfs", "tmpfs", &volume.join("sub").display().to_string()]);
    std::fs::write(volume.join("sub/late"), "").unwrap();
    for id in [&slave_id, &private_id] {
        assert_eq!(node.exec(id, "touch /tmp/go", 5).await.unwrap().0, 0);
        node.wait_exit(id).await;
    }
    assert_eq!(node.log(&slave_id).await.0, "from the host\nrw\nlate\n");
    let (out, err) = node.log(&private_id).await;
    assert_eq!(out, "from the host\n", "a private mount does not see what came later");
    assert!(err.contains("Read-only file system"));
    let status = node.status(&slave_id).await.unwrap();
    assert_eq!(status.mounts, slave.mounts, "mounts are echoed verbatim");

    // A link in the image must not lead a mount out onto the host.
    let canary = node.dir.path().join("canary");
    std::fs::create_dir(&canary).unwrap();
    let mut escape = shell("escape", "ls -la /");
    escape.mounts =
        vec![api::Mount { container_path: format!("/proc/self/root/../..{}", canary.display()), ..mount(false, api::MountPropagation::PropagationPrivate) }];
    let refused = node.create(&pod, &pc, &escape).await;
    assert_ne!(code(refused), Code::Ok);
    assert!(common::entries(&canary).is_empty());
    host::run("umount", &[&volume.join("sub").display().to_string()]);
    host::run("umount", &[&volume.display().to_string()]);
    node.remove_all_pods().await;
    node.finish();
}
