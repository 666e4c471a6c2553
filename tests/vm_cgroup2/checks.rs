//! The checks. Each makes a pod of its own and takes it away again.

use std::path::Path;
use std::time::Duration;

use mesocri::wire::cri as api;
use tonic::Code;

use crate::bench::{Bench, CGROUPS, Check, read};
use crate::common::cri::{code, pod, shell};
use crate::common::host;

const MIB: i64 = 1 << 20;
/// A script that lives until it is told to end.
const WAIT: &str = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";

/// All, in order.
pub const ALL: &[(&str, Check)] = &[
    ("the_tree_is_pure_v2", |b| Box::pin(the_tree_is_pure_v2(b))),
    ("limits_are_written", |b| Box::pin(limits_are_written(b))),
    ("a_container_sees_its_own_group", |b| Box::pin(a_container_sees_its_own_group(b))),
    ("oom_kills_are_told", |b| Box::pin(oom_kills_are_told(b))),
    ("oom_group_takes_all", |b| Box::pin(oom_group_takes_all(b))),
    ("exec_runs_in_the_group", |b| Box::pin(exec_runs_in_the_group(b))),
    ("exec_timeout_leaves_nothing", |b| Box::pin(exec_timeout_leaves_nothing(b))),
    ("stats_are_sane", |b| Box::pin(stats_are_sane(b))),
    ("updates_take_effect", |b| Box::pin(updates_take_effect(b))),
    ("devices_are_guarded", |b| Box::pin(devices_are_guarded(b))),
    ("stop_ends_everything", |b| Box::pin(stop_ends_everything(b))),
    ("a_killed_daemon_finds_its_containers", |b| Box::pin(a_killed_daemon_finds_its_containers(b))),
    ("a_pod_without_parent_gets_one", |b| Box::pin(a_pod_without_parent_gets_one(b))),
    ("the_bridge_carries_packets", |b| Box::pin(the_bridge_carries_packets(b))),
];

/// What only systemd can do to a container.
pub const SYSTEMD: &[(&str, Check)] = &[
    ("containers_are_scopes", |b| Box::pin(containers_are_scopes(b))),
    ("limits_survive_a_reload", |b| Box::pin(limits_survive_a_reload(b))),
    ("a_new_systemd_is_found", |b| Box::pin(a_new_systemd_is_found(b))),
];

/// Groups of containers and pods, at the end. (A slice that systemd made on the way to a pod's slice stays, as slices do.)
pub fn leftovers() -> Vec<String> {
    let has_id = |d: &String| d.split(|c: char| !c.is_ascii_hexdigit()).any(|word| word.len() == 64);
    host::cgroups_below("/").into_iter().filter(has_id).collect()
}

async fn the_tree_is_pure_v2(b: &mut Bench) {
    let host = mesocri::cgroups::Host::detect().unwrap();
    assert!(host.is_pure_v2(), "{host:?}");
    let controllers = read(Path::new(CGROUPS), "cgroup.controllers");
    for controller in ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"] {
        assert!(controllers.split(' ').any(|c| c == controller), "{controllers}");
    }
    let first = std::fs::read_to_string("/proc/1/comm").unwrap();
    assert_eq!(first.trim() == "systemd", b.systemd, "process 1 is {first}");
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    println!("kernel {release}");
}

async fn limits_are_written(b: &mut Bench) {
    let pod = b.pod("limits").await;
    let resources = api::LinuxContainerResources {
        cpu_period: 50_000,
        cpu_quota: 25_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 * MIB,
        memory_swap_limit_in_bytes: 96 * MIB,
        cpuset_cpus: "1".to_owned(),
        cpuset_mems: "0".to_owned(),
        hugepage_limits: vec![api::HugepageLimit { page_size: "2MB".to_owned(), limit: 4 << 20 }],
        unified: [("memory.high".to_owned(), (48 * MIB).to_string()), ("pids.max".to_owned(), "33".to_owned())].into(),
        ..Default::default()
    };
    let id = b.launch(&pod, "c", WAIT, resources).await;
    let group = b.group(&pod, &id);
    let expected = [
        ("cpu.max", "25000 50000"),
        ("cpu.weight", "59"),
        ("memory.max", "67108864"),
        ("memory.swap.max", "33554432"),
        ("memory.high", "50331648"),
        ("pids.max", "33"),
        ("cpuset.cpus", "1"),
        ("cpuset.cpus.effective", "1"),
        ("cpuset.mems", "0"),
        ("hugetlb.2MB.max", "4194304"),
    ];
    let found: Vec<_> = expected.iter().map(|(file, _)| (*file, read(&group, file))).collect();
    let found: Vec<_> = found.iter().map(|(file, value)| (*file, value.as_str())).collect();
    assert_eq!(found, expected);
    // A memory limit alone allows no swap.
    let plain = b.launch(&pod, "plain", WAIT, api::LinuxContainerResources { memory_limit_in_bytes: 32 * MIB, ..Default::default() }).await;
    let group = b.group(&pod, &plain);
    assert_eq!((read(&group, "memory.max"), read(&group, "memory.swap.max")), ((32 * MIB).to_string(), "0".to_owned()));
    b.remove(pod).await;
}

async fn a_container_sees_its_own_group(b: &mut Bench) {
    let pod = b.pod("view").await;
    let id = b.launch(&pod, "c", WAIT, api::LinuxContainerResources { memory_limit_in_bytes: 64 * MIB, ..Default::default() }).await;
    let (_, out, err) = b.node.exec(&id, "cat /proc/1/cgroup /proc/self/cgroup /sys/fs/cgroup/memory.max; mkdir /sys/fs/cgroup/x", 10).await.unwrap();
    assert_eq!(out, format!("0::/\n0::/\n{}\n", 64 * MIB));
    assert!(err.contains("Read-only file system"), "{err}");
    let procs = read(&b.group(&pod, &id), "cgroup.procs");
    assert!(!procs.is_empty());
    b.remove(pod).await;
}

async fn oom_kills_are_told(b: &mut Bench) {
    let pod = b.pod("oom").await;
    let limit = api::LinuxContainerResources { memory_limit_in_bytes: 24 * MIB, ..Default::default() };
    // The same signal from somebody else is no lack of memory, even if a neighbour lacked some meanwhile.
    let other = b.launch(&pod, "other", "trap '' TERM; while :; do sleep 1; done", limit.clone()).await;
    let id = b.launch(&pod, "c", "exec dd if=/dev/zero of=/dev/null bs=100M", limit).await;
    let status = b.node.wait_exit(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
    b.node.stop_container(&other, 0).await.unwrap();
    let status = b.node.wait_exit(&other).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"), "{status:?}");
    b.remove(pod).await;
}

async fn oom_group_takes_all(b: &mut Bench) {
    let pod = b.pod("oomgroup").await;
    let limit = |group: bool| api::LinuxContainerResources {
        memory_limit_in_bytes: 24 * MIB,
        unified: if group { [("memory.oom.group".to_owned(), "1".to_owned())].into() } else { Default::default() },
        ..Default::default()
    };
    let script = "dd if=/dev/zero of=/dev/null bs=100M; echo survived; exit 7";
    let all = b.launch(&pod, "all", script, limit(true)).await;
    let status = b.node.wait_exit(&all).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
    assert_eq!(b.node.log(&all).await.0, "");
    let one = b.launch(&pod, "one", script, limit(false)).await;
    let status = b.node.wait_exit(&one).await;
    assert_eq!(status.exit_code, 7, "{status:?}");
    assert_eq!(b.node.log(&one).await.0, "survived\n");
    b.remove(pod).await;
}

async fn exec_runs_in_the_group(b: &mut Bench) {
    let pod = b.pod("exec").await;
    // One process from its start to its end.
    let id = b.launch(&pod, "c", "exec sleep 1000", api::LinuxContainerResources::default()).await;
    let group = b.group(&pod, &id);
    let processes = || read(&group, "cgroup.procs").lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(processes().len(), 1, "{:?}", processes());
    // What it leaves behind stays in the group too.
    let (exit, out, err) = b.node.exec(&id, "cat /proc/self/cgroup; sleep 1000 >/dev/null 2>&1 & echo err >&2; exit 3", 10).await.unwrap();
    assert_eq!((exit, out.as_str(), err.as_str()), (3, "0::/\n", "err\n"));
    assert_eq!(processes().len(), 2, "{:?}", processes());
    b.remove(pod).await;
}

async fn exec_timeout_leaves_nothing(b: &mut Bench) {
    let pod = b.pod("timeout").await;
    let id = b.launch(&pod, "c", WAIT, api::LinuxContainerResources::default()).await;
    // One that runs away into a session of its own.
    let result = b.node.exec(&id, "setsid sleep 4321 & sleep 4321", 2).await;
    assert_eq!(code(result), Code::DeadlineExceeded);
    let (_, out, _) = b.node.exec(&id, "ps -o args | grep '^sleep 4321' || true", 10).await.unwrap();
    assert_eq!(out, "", "processes of the exec live on");
    b.remove(pod).await;
}

async fn stats_are_sane(b: &mut Bench) {
    let pod = b.pod("stats").await;
    let id = b.launch(&pod, "c", "head -c 4000000 /dev/zero >/tmp/x; while :; do :; done", api::LinuxContainerResources::default()).await;
    let sample = async || {
        let request = api::ContainerStatsRequest { container_id: id.clone() };
        b.node.runtime().container_stats(request).await.unwrap().into_inner().stats.unwrap()
    };
    let value = |v: &Option<api::UInt64Value>| v.as_ref().unwrap().value;
    let first = sample().await;
    tokio::time::sleep(Duration::from_millis(500)).await; // a rate is over a time
    let second = sample().await;
    let (cpu1, cpu2) = (first.cpu.unwrap(), second.cpu.unwrap());
    let (grown, passed) =
        (value(&cpu2.usage_core_nano_seconds) - value(&cpu1.usage_core_nano_seconds), u64::try_from(cpu2.timestamp - cpu1.timestamp).unwrap());
    assert!(grown > 0 && grown <= 2 * passed, "{grown} ns of processor in {passed} ns");
    let memory = second.memory.unwrap();
    let working = value(&memory.working_set_bytes);
    assert!((100_000..200_000_000).contains(&working) && value(&memory.usage_bytes) >= working, "{memory:?}");
    assert!(value(&memory.page_faults) > 0);
    let stats = b.node.runtime().pod_sandbox_stats(api::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() }).await.unwrap().into_inner();
    let linux = stats.stats.unwrap().linux.unwrap();
    assert!(value(&linux.process.unwrap().process_count) >= 1);
    assert!(value(&linux.cpu.unwrap().usage_core_nano_seconds) >= value(&cpu2.usage_core_nano_seconds));
    assert!(linux.containers[0].memory.as_ref().unwrap().psi.is_some(), "this kernel tells pressure");
    b.remove(pod).await;
}

async fn updates_take_effect(b: &mut Bench) {
    let pod = b.pod("update").await;
    let resources = api::LinuxContainerResources { memory_limit_in_bytes: 64 * MIB, cpu_shares: 512, ..Default::default() };
    let id = b.launch(&pod, "c", WAIT, resources).await;
    let group = b.group(&pod, &id);
    let update = async |resources: api::LinuxContainerResources| {
        let request = api::UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(resources), ..Default::default() };
        b.node.runtime().update_container_resources(request).await.map(drop)
    };
    update(api::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 40_000,
        cpu_shares: 1024,
        memory_limit_in_bytes: 32 * MIB,
        cpuset_cpus: "0".to_owned(),
        unified: [("pids.max".to_owned(), "55".to_owned())].into(),
        ..Default::default()
    })
    .await
    .unwrap();
    let expected =
        [("cpu.max", "40000 100000"), ("cpu.weight", "100"), ("memory.max", "33554432"), ("memory.swap.max", "0"), ("cpuset.cpus", "0"), ("pids.max", "55")];
    let found: Vec<_> = expected.iter().map(|(file, _)| (*file, read(&group, file))).collect();
    let found: Vec<_> = found.iter().map(|(file, value)| (*file, value.as_str())).collect();
    assert_eq!(found, expected);
    // What the second does not say stays.
    update(api::LinuxContainerResources { memory_limit_in_bytes: 48 * MIB, ..Default::default() }).await.unwrap();
    assert_eq!((read(&group, "memory.max"), read(&group, "cpu.max")), ((48 * MIB).to_string(), "40000 100000".to_owned()));
    assert_eq!((read(&group, "pids.max"), read(&group, "cpuset.cpus")), ("55".to_owned(), "0".to_owned()));
    let told = b.node.status(&id).await.unwrap().resources.unwrap().linux.unwrap();
    assert_eq!((told.memory_limit_in_bytes, told.cpu_quota, told.cpu_shares), (48 * MIB, 40_000, 1024));
    // A value that the kernel refuses changes nothing.
    let refused = update(api::LinuxContainerResources { cpuset_cpus: "77".to_owned(), ..Default::default() }).await.unwrap_err();
    assert!(refused.message().contains("cpuset"), "{refused}");
    assert_eq!(read(&group, "cpuset.cpus"), "0");
    b.remove(pod).await;
}

async fn devices_are_guarded(b: &mut Bench) {
    // 254:0 is some block device; the disk's own number is read from the machine.
    let disk = std::fs::read_to_string("/sys/block/vda/dev").unwrap();
    let (major, minor) = disk.trim().split_once(':').unwrap();
    let script = format!("mknod /tmp/disk b {major} {minor} && head -c 16 /tmp/disk | wc -c; head -c 8 /dev/zero | wc -c; echo x >/dev/null && echo written");
    let pod = b.pod("devices").await;
    let id = b.launch(&pod, "c", WAIT, api::LinuxContainerResources::default()).await;
    let (_, out, err) = b.node.exec(&id, &script, 10).await.unwrap();
    assert_eq!(out, "0\n8\nwritten\n", "{err}");
    assert!(err.contains("Operation not permitted"), "{err}");
    // The guard holds after an update.
    let request = api::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(api::LinuxContainerResources { cpu_shares: 100, ..Default::default() }),
        ..Default::default()
    };
    b.node.runtime().update_container_resources(request).await.unwrap();
    let (_, out, _) = b.node.exec(&id, "head -c 16 /tmp/disk | wc -c", 10).await.unwrap();
    assert_eq!(out, "0\n");
    b.remove(pod).await;
    // Without the guard the same device can be read.
    let mut pod = b.pod("privileged").await;
    b.node.remove_pod(&pod.id).await.unwrap();
    pod.config.metadata.as_mut().unwrap().attempt = 1;
    pod.config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    pod.id = b.node.run_pod(&pod.config).await.unwrap();
    let mut open = shell("c", WAIT);
    open.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let id = b.node.launch(&pod.id, &pod.config, &open).await;
    let (_, out, err) = b.node.exec(&id, &script, 10).await.unwrap();
    assert_eq!(out, "16\n8\nwritten\n", "{err}");
    b.remove(pod).await;
}

async fn stop_ends_everything(b: &mut Bench) {
    let pod = b.pod("stop").await;
    // Children that hear no SIGTERM, one in a session of its own.
    let script = "trap '' TERM; setsid sleep 5432 & sleep 5432 & exec sleep 5432";
    let id = b.launch(&pod, "c", script, api::LinuxContainerResources::default()).await;
    let group = b.group(&pod, &id);
    host::wait_until("all of them run", || read(&group, "cgroup.procs").lines().count() >= 3);
    b.node.stop_container(&id, 1).await.unwrap();
    assert_eq!(b.node.wait_exit(&id).await.exit_code, 137);
    b.node.remove_container(&id).await.unwrap();
    assert!(!group.exists(), "{} is still there", group.display());
    let polite = b.launch(&pod, "polite", WAIT, api::LinuxContainerResources::default()).await;
    // Its trap is not set before the shell has come to its loop.
    host::wait_until("it waits", || read(&b.group(&pod, &polite), "cgroup.procs").lines().count() >= 2);
    b.node.stop_container(&polite, 20).await.unwrap();
    assert_eq!(b.node.wait_exit(&polite).await.exit_code, 0);
    b.remove(pod).await;
}

async fn a_killed_daemon_finds_its_containers(b: &mut Bench) {
    let pod = b.pod("restart").await;
    let limit = api::LinuxContainerResources { memory_limit_in_bytes: 24 * MIB, ..Default::default() };
    let id = b.launch(&pod, "c", WAIT, limit.clone()).await;
    let doomed = b.launch(&pod, "doomed", "until [ -e /tmp/go ]; do sleep 0.1; done; exec dd if=/dev/zero of=/dev/null bs=100M", limit).await;
    let started = b.node.status(&id).await.unwrap().started_at;
    assert_eq!(b.node.exec(&doomed, "(sleep 1; : >/tmp/go) >/dev/null 2>&1 &", 10).await.unwrap().0, 0);
    b.node.kill_daemon();
    // It dies while nobody looks.
    let group = b.group(&pod, &doomed);
    host::wait_until("memory is short", || std::fs::read_to_string(group.join("cgroup.procs")).map_or(true, |p| p.is_empty()));
    b.node.start_daemon(&[]);
    let status = b.node.status(&id).await.unwrap();
    assert_eq!((status.state, status.started_at), (api::ContainerState::ContainerRunning as i32, started));
    let (exit, out, _) = b.node.exec(&id, "cat /proc/self/cgroup; exit 4", 10).await.unwrap();
    assert_eq!((exit, out.as_str()), (4, "0::/\n"));
    let status = b.node.wait_exit(&doomed).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
    // Limits change without what the daemon had in memory.
    let request = api::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(api::LinuxContainerResources { memory_limit_in_bytes: 32 * MIB, ..Default::default() }),
        ..Default::default()
    };
    b.node.runtime().update_container_resources(request).await.unwrap();
    assert_eq!(read(&b.group(&pod, &id), "memory.max"), (32 * MIB).to_string());
    b.remove(pod).await;
}

async fn a_pod_without_parent_gets_one(b: &mut Bench) {
    let before = host::cgroups_below("/");
    let mut config = pod(&b.node, "orphan");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options.as_mut().unwrap().network = api::NamespaceMode::Node.into();
    config.hostname = String::new();
    let id = b.node.run_pod(&config).await.unwrap();
    let c = b.node.launch(&id, &config, &shell("c", WAIT)).await;
    let now = host::cgroups_below("/");
    assert!(now.iter().any(|d| d.contains(&id) && d.contains(&c)), "{now:?}");
    b.node.remove_pod(&id).await.unwrap();
    let left: Vec<_> = host::cgroups_below("/").into_iter().filter(|d| !before.contains(d)).collect();
    assert!(left.iter().all(|d| !d.contains(&id)), "{left:?}");
}

async fn the_bridge_carries_packets(b: &mut Bench) {
    let config = pod(&b.node, "bridge");
    let id = b.node.run_pod(&config).await.unwrap();
    let c = b.node.launch(&id, &config, &shell("c", WAIT)).await;
    let address = b.node.pod_status(&id).await.unwrap().network.unwrap().ip;
    assert!(!address.is_empty());
    let (exit, out, err) = b.node.exec(&c, "ping -c 1 -W 5 10.88.0.1", 20).await.unwrap();
    assert_eq!(exit, 0, "{out}{err}");
    b.node.remove_pod(&id).await.unwrap();
}

async fn containers_are_scopes(b: &mut Bench) {
    let pod = b.pod("scope").await;
    let id = b.launch(&pod, "c", WAIT, api::LinuxContainerResources::default()).await;
    let unit = format!("mesocri-{id}.scope");
    let show = |unit: &str, property: &str| host::run("systemctl", &["show", "--value", "--property", property, unit]).trim().to_owned();
    assert_eq!((show(&unit, "ActiveState"), show(&unit, "Slice")), ("active".to_owned(), "kubepods-burstable-podscope.slice".to_owned()));
    assert_eq!(show(&unit, "Delegate"), "yes");
    b.node.stop_container(&id, 0).await.unwrap();
    b.node.remove_container(&id).await.unwrap();
    host::wait_until("systemd forgets the scope", || show(&unit, "LoadState") == "not-found");
    b.remove(pod).await;
}

/// systemd writes down again what it knows when it reads its units anew.
async fn limits_survive_a_reload(b: &mut Bench) {
    let pod = b.pod("reload").await;
    let resources = api::LinuxContainerResources {
        cpu_period: 50_000,
        cpu_quota: 25_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 * MIB,
        memory_swap_limit_in_bytes: 96 * MIB,
        cpuset_cpus: "1".to_owned(),
        cpuset_mems: "0".to_owned(),
        unified: [("memory.high".to_owned(), (48 * MIB).to_string()), ("pids.max".to_owned(), "33".to_owned())].into(),
        ..Default::default()
    };
    let id = b.launch(&pod, "c", WAIT, resources).await;
    let group = b.group(&pod, &id);
    let limits =
        || ["cpu.max", "cpu.weight", "memory.max", "memory.swap.max", "memory.high", "pids.max", "cpuset.cpus", "cpuset.mems"].map(|f| (f, read(&group, f)));
    let before = limits();
    host::run("systemctl", &["daemon-reload"]);
    // A neighbour makes systemd go through the slice again.
    b.launch(&pod, "neighbour", WAIT, api::LinuxContainerResources { cpu_shares: 2, ..Default::default() }).await;
    assert_eq!(limits(), before);
    let (_, out, _) = b.node.exec(&id, "mknod /tmp/d b 254 0; head -c 1 /tmp/d | wc -c", 10).await.unwrap();
    assert_eq!(out, "0\n", "devices are not guarded any more");
    b.remove(pod).await;
}

/// An upgrade of systemd breaks every connection to it.
async fn a_new_systemd_is_found(b: &mut Bench) {
    let pod = b.pod("reexec").await;
    let old = b.launch(&pod, "old", WAIT, api::LinuxContainerResources::default()).await;
    host::run("systemctl", &["daemon-reexec"]);
    let new = b.launch(&pod, "new", WAIT, api::LinuxContainerResources { memory_limit_in_bytes: 32 * MIB, ..Default::default() }).await;
    assert_eq!(read(&b.group(&pod, &new), "memory.max"), (32 * MIB).to_string());
    assert_eq!(b.node.exec(&old, "exit 5", 10).await.unwrap().0, 5);
    b.remove(pod).await;
}
