//! The wire contract of the CRI: our `protos/cri` against the facts of Kubernetes 1.36 (`tests/data/cri-wire-1.36.tsv`), one by
//! one, and against an independent implementation (the `k8s-cri` crate) by exchanging messages and comparing paths.
#![cfg(feature = "daemon")]
// The deprecated fields are part of the contract; helpers of a test may panic like the test.
#![allow(missing_docs, deprecated, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use k8s_cri::v1 as theirs;
use mesocri::wire::cri as ours;
use prost::Message;
use prost_reflect::{Cardinality, DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor};

const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cri.binpb"));
const FACTS: &str = include_str!("data/cri-wire-1.36.tsv");

fn pool() -> DescriptorPool {
    DescriptorPool::decode(DESCRIPTORS).unwrap()
}

/// One fact in the notation of the table: kind, parent, name, number, type, label, deprecated, option.
fn row(kind: &str, parent: &str, name: &str, rest: [&str; 5]) -> String {
    format!("{kind}\t{parent}\t{name}\t{}", rest.join("\t"))
}

fn option_set(options: &DynamicMessage, name: &str) -> bool {
    options.get_field_by_name(name).is_some_and(|v| v.as_bool() == Some(true))
}

fn field_facts(message: &MessageDescriptor, field: &FieldDescriptor) -> String {
    let name_of = |kind: Kind| match kind {
        Kind::Message(m) => m.name().to_owned(),
        Kind::Enum(e) => e.name().to_owned(),
        scalar => format!("{scalar:?}").to_lowercase(),
    };
    let (kind, label) = match field.kind() {
        Kind::Message(entry) if field.is_map() => {
            (format!("map<{},{}>", name_of(entry.map_entry_key_field().kind()), name_of(entry.map_entry_value_field().kind())), "map")
        }
        kind => (name_of(kind), if field.cardinality() == Cardinality::Repeated { "repeated" } else { "-" }),
    };
    let options = field.options();
    let deprecated = if option_set(&options, "deprecated") { "y" } else { "-" };
    let redact = if option_set(&options, "debug_redact") { "debug_redact" } else { "-" };
    row("field", message.name(), field.name(), [&field.number().to_string(), &kind, label, deprecated, redact])
}

fn enum_facts(parent: &str, e: &EnumDescriptor, facts: &mut Vec<String>) {
    facts.push(row("enum", parent, e.name(), ["-"; 5]));
    let path = if parent == "-" { e.name().to_owned() } else { format!("{parent}.{}", e.name()) };
    for value in e.values() {
        let deprecated = if option_set(&value.options(), "deprecated") { "y" } else { "-" };
        facts.push(row("enumvalue", &path, value.name(), [&value.number().to_string(), "-", "-", deprecated, "-"]));
    }
}

/// Everything our descriptors say.
fn our_facts() -> Vec<String> {
    let pool = pool();
    let mut facts = Vec::new();
    for file in pool.files() {
        let raw = file.file_descriptor_proto();
        let syntax = raw.syntax.clone().unwrap_or_default();
        let go_package = raw.options.as_ref().and_then(|o| o.go_package.clone()).unwrap_or_default();
        for (name, value) in [("syntax", syntax.as_str()), ("package", file.package_name()), ("go_package", go_package.as_str())] {
            facts.push(row("file", "-", name, ["-", value, "-", "-", "-"]));
        }
        for service in file.services() {
            facts.push(row("service", "-", service.name(), ["-"; 5]));
            for rpc in service.methods() {
                assert!(!rpc.is_client_streaming(), "{}", rpc.name());
                let stream = if rpc.is_server_streaming() { "stream " } else { "" };
                let kind = format!("{} -> {stream}{}", rpc.input().name(), rpc.output().name());
                facts.push(row("rpc", service.name(), rpc.name(), ["-", &kind, "-", "-", "-"]));
            }
        }
        for message in file.messages() {
            facts.push(row("message", "-", message.name(), ["-"; 5]));
            assert_eq!(message.oneofs().len() + message.reserved_names().len() + message.reserved_ranges().len(), 0, "{}", message.name());
            facts.extend(message.fields().map(|f| field_facts(&message, &f)));
            message.child_enums().for_each(|e| enum_facts(message.name(), &e, &mut facts));
            assert!(message.child_messages().all(|m| m.is_map_entry()), "{}", message.name());
        }
        file.enums().for_each(|e| enum_facts("-", &e, &mut facts));
    }
    facts
}

#[test]
fn contract_is_complete_and_nothing_is_added() {
    let theirs: Vec<&str> = FACTS.lines().skip(1).filter(|l| !l.is_empty()).collect();
    assert_eq!(theirs.len(), 785, "the table of facts was cut or extended");
    let ours = our_facts();
    let ours: Vec<&str> = ours.iter().map(String::as_str).collect();
    let (theirs_set, ours_set) = (BTreeSet::from_iter(theirs.clone()), BTreeSet::from_iter(ours.clone()));
    let missing: Vec<_> = theirs_set.difference(&ours_set).collect();
    let added: Vec<_> = ours_set.difference(&theirs_set).collect();
    assert!(missing.is_empty() && added.is_empty(), "missing: {missing:#?}\nadded: {added:#?}");
    assert_eq!(theirs.len(), ours.len(), "a fact stands twice");
}

/// Ours encoded, decoded and encoded by them, decoded by us: nothing may be lost.
#[track_caller]
fn exchange<O: Message + Default + PartialEq, T: Message + Default + PartialEq>(message: O) {
    let bytes = message.encode_to_vec();
    assert!(!bytes.is_empty());
    let their_view = T::decode(bytes.as_slice()).unwrap();
    let back = their_view.encode_to_vec();
    assert!(O::decode(back.as_slice()).unwrap() == message, "lost on the way");
    // And once from their side, whose map order differs from ours.
    assert!(T::decode(O::decode(back.as_slice()).unwrap().encode_to_vec().as_slice()).unwrap() == their_view);
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn pod_config() -> ours::PodSandboxConfig {
    ours::PodSandboxConfig {
        metadata: Some(ours::PodSandboxMetadata { name: "web".into(), uid: "u-1".into(), namespace: "default".into(), attempt: 3 }),
        hostname: "web".into(),
        log_directory: "/var/log/pods/x".into(),
        dns_config: Some(ours::DnsConfig { servers: vec!["10.0.0.10".into()], searches: vec!["svc".into()], options: vec!["ndots:5".into()] }),
        port_mappings: vec![ours::PortMapping { protocol: ours::Protocol::Sctp.into(), container_port: 80, host_port: 8080, host_ip: "127.0.0.1".into() }],
        labels: map(&[("a", "1"), ("b", "2"), ("c", "3")]),
        annotations: map(&[("x", ""), ("y", "z")]),
        linux: Some(ours::LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod1".into(),
            security_context: Some(ours::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces()),
                run_as_user: Some(ours::Int64Value { value: 0 }),
                run_as_group: Some(ours::Int64Value { value: 7 }),
                supplemental_groups: vec![1, -1, i64::MAX],
                privileged: true,
                seccomp: Some(ours::SecurityProfile { profile_type: ours::security_profile::ProfileType::Localhost.into(), localhost_ref: "/p".into() }),
                seccomp_profile_path: "localhost//p".into(),
                ..Default::default()
            }),
            sysctls: map(&[("net.ipv4.ip_forward", "1")]),
            overhead: Some(resources()),
            resources: None,
        }),
        windows: None,
    }
}

fn namespaces() -> ours::NamespaceOption {
    let range = ours::IdMapping { host_id: 65536, container_id: 0, length: 65536 };
    ours::NamespaceOption {
        network: ours::NamespaceMode::Node.into(),
        pid: ours::NamespaceMode::Target.into(),
        ipc: ours::NamespaceMode::Pod.into(),
        target_id: "t".into(),
        userns_options: Some(ours::UserNamespace { mode: ours::NamespaceMode::Pod.into(), uids: vec![range], gids: vec![range, range] }),
    }
}

fn resources() -> ours::LinuxContainerResources {
    ours::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: -1,
        cpu_shares: 512,
        memory_limit_in_bytes: 1 << 40,
        oom_score_adj: -997,
        cpuset_cpus: "0-3".into(),
        cpuset_mems: "0".into(),
        hugepage_limits: vec![ours::HugepageLimit { page_size: "2MB".into(), limit: u64::MAX }],
        unified: map(&[("memory.high", "max")]),
        memory_swap_limit_in_bytes: i64::MIN,
    }
}

#[test]
fn a_witness_reads_and_writes_our_messages() {
    exchange::<_, theirs::RunPodSandboxRequest>(ours::RunPodSandboxRequest { config: Some(pod_config()), runtime_handler: "kata".into() });
    let range = ours::IdMapping { host_id: 1, container_id: 2, length: 3 };
    exchange::<_, theirs::CreateContainerRequest>(ours::CreateContainerRequest {
        pod_sandbox_id: "p".into(),
        config: Some(ours::ContainerConfig {
            metadata: Some(ours::ContainerMetadata { name: "c".into(), attempt: u32::MAX }),
            image: Some(ours::ImageSpec {
                image: "sha256:x".into(),
                annotations: map(&[("k", "v")]),
                user_specified_image: "busybox".into(),
                runtime_handler: "r".into(),
                ..Default::default()
            }),
            command: vec!["sh".into(), String::new()],
            envs: vec![ours::KeyValue { key: "K".into(), value: "wört".as_bytes().to_vec() }],
            mounts: vec![ours::Mount {
                container_path: "/a".into(),
                host_path: "/b".into(),
                readonly: true,
                selinux_relabel: true,
                propagation: ours::MountPropagation::PropagationBidirectional.into(),
                uid_mappings: vec![range],
                gid_mappings: vec![range],
                recursive_read_only: true,
                image: Some(ours::ImageSpec { image: "i".into(), ..Default::default() }),
                ..Default::default()
            }],
            cdi_devices: vec![ours::CdiDevice { name: "v/c=n".into() }],
            tty: true,
            linux: Some(ours::LinuxContainerConfig {
                resources: Some(resources()),
                security_context: Some(ours::LinuxContainerSecurityContext {
                    capabilities: Some(ours::Capability {
                        add_capabilities: vec!["ALL".into()],
                        add_ambient_capabilities: vec!["CHOWN".into()],
                        ..Default::default()
                    }),
                    namespace_options: Some(namespaces()),
                    run_as_group: Some(ours::Int64Value { value: 5 }),
                    run_as_username: "nobody".into(),
                    masked_paths: vec!["/proc/acpi".into()],
                    readonly_paths: vec!["/proc/sys".into()],
                    apparmor_profile: "unconfined".into(),
                    no_new_privs: true,
                    ..Default::default()
                }),
            }),
            ..Default::default()
        }),
        sandbox_config: Some(pod_config()),
    });
    exchange::<_, theirs::PullImageRequest>(ours::PullImageRequest {
        image: Some(ours::ImageSpec { image: "a/b:c".into(), ..Default::default() }),
        auth: Some(ours::AuthConfig { username: "u".into(), password: "p".into(), auth: "dTpw".into(), identity_token: "i".into(), ..Default::default() }),
        sandbox_config: None,
    });
}

#[test]
fn a_witness_reads_and_writes_our_answers() {
    let value = |value| Some(ours::UInt64Value { value });
    exchange::<_, theirs::ContainerStatusResponse>(ours::ContainerStatusResponse {
        status: Some(ours::ContainerStatus {
            id: "c".into(),
            state: ours::ContainerState::ContainerUnknown.into(),
            created_at: 1_700_000_000_000_000_001,
            started_at: 2,
            finished_at: i64::MAX,
            exit_code: -1,
            image_ref: "x@sha256:1".into(),
            image_id: "sha256:2".into(),
            reason: "OOMKilled".into(),
            resources: Some(ours::ContainerResources { linux: Some(resources()), windows: None }),
            ..Default::default()
        }),
        info: map(&[("info", "{}")]),
    });
    exchange::<_, theirs::ListContainerStatsResponse>(ours::ListContainerStatsResponse {
        stats: vec![ours::ContainerStats {
            attributes: Some(ours::ContainerAttributes { id: "c".into(), ..Default::default() }),
            cpu: Some(ours::CpuUsage { timestamp: 9, usage_core_nano_seconds: value(u64::MAX), usage_nano_cores: value(0), psi: None }),
            memory: Some(ours::MemoryUsage { timestamp: 9, working_set_bytes: value(1), page_faults: value(3), ..Default::default() }),
            writable_layer: Some(ours::FilesystemUsage {
                timestamp: 9,
                fs_id: Some(ours::FilesystemIdentifier { mountpoint: "/var".into() }),
                used_bytes: value(4096),
                inodes_used: value(2),
            }),
            ..Default::default()
        }],
    });
    exchange::<_, theirs::ImageStatusResponse>(ours::ImageStatusResponse {
        image: Some(ours::Image { id: "sha256:x".into(), size: 5, uid: Some(ours::Int64Value { value: 0 }), pinned: true, ..Default::default() }),
        info: BTreeMap::new(),
    });
}

/// A channel that answers nothing and remembers the paths it was asked for.
#[derive(Clone, Default)]
struct Paths(Arc<Mutex<BTreeSet<String>>>);

impl tower::Service<http::Request<tonic::body::Body>> for Paths {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        self.0.lock().unwrap().insert(request.uri().path().to_owned());
        std::future::ready(Ok(tonic::Status::unimplemented("").into_http()))
    }
}

#[tokio::test]
async fn a_witness_calls_the_same_paths() {
    let (mine, other) = (Paths::default(), Paths::default());
    let mut a = (ours::runtime_service_client::RuntimeServiceClient::new(mine.clone()), ours::image_service_client::ImageServiceClient::new(mine.clone()));
    let mut b =
        (theirs::runtime_service_client::RuntimeServiceClient::new(other.clone()), theirs::image_service_client::ImageServiceClient::new(other.clone()));
    macro_rules! call {
        ($part:tt: $($method:ident($request:ident)),* $(,)?) => { $(
            assert!(a.$part.$method(ours::$request::default()).await.is_err());
            assert!(b.$part.$method(theirs::$request::default()).await.is_err());
        )* };
    }
    call!(0: version(VersionRequest), run_pod_sandbox(RunPodSandboxRequest), stop_pod_sandbox(StopPodSandboxRequest),
        remove_pod_sandbox(RemovePodSandboxRequest), pod_sandbox_status(PodSandboxStatusRequest), list_pod_sandbox(ListPodSandboxRequest),
        create_container(CreateContainerRequest), start_container(StartContainerRequest), stop_container(StopContainerRequest),
        remove_container(RemoveContainerRequest), list_containers(ListContainersRequest), container_status(ContainerStatusRequest),
        update_container_resources(UpdateContainerResourcesRequest), reopen_container_log(ReopenContainerLogRequest),
        exec_sync(ExecSyncRequest), exec(ExecRequest), attach(AttachRequest), port_forward(PortForwardRequest),
        container_stats(ContainerStatsRequest), list_container_stats(ListContainerStatsRequest), pod_sandbox_stats(PodSandboxStatsRequest),
        list_pod_sandbox_stats(ListPodSandboxStatsRequest), update_runtime_config(UpdateRuntimeConfigRequest), status(StatusRequest),
        checkpoint_container(CheckpointContainerRequest), get_container_events(GetEventsRequest),
        list_metric_descriptors(ListMetricDescriptorsRequest), list_pod_sandbox_metrics(ListPodSandboxMetricsRequest),
        runtime_config(RuntimeConfigRequest));
    call!(1: list_images(ListImagesRequest), image_status(ImageStatusRequest), pull_image(PullImageRequest), remove_image(RemoveImageRequest),
        image_fs_info(ImageFsInfoRequest));
    let (mine, other) = (mine.0.lock().unwrap().clone(), other.0.lock().unwrap().clone());
    assert_eq!(mine, other);
    assert_eq!(mine.len(), 34);
    let all: BTreeSet<String> = pool().services().flat_map(|s| s.methods().map(|m| format!("/{}/{}", s.full_name(), m.name())).collect::<Vec<_>>()).collect();
    assert!(mine.is_subset(&all));
    assert_eq!(all.len(), 41, "six streaming lists and UpdatePodSandboxResources are newer than the witness");
}

#[test]
fn credentials_are_not_printed() {
    let auth =
        ours::AuthConfig { username: "me".into(), password: "s3cret".into(), auth: "s3cret".into(), identity_token: "s3cret".into(), ..Default::default() };
    let text = format!("{:?}", ours::PullImageRequest { auth: Some(auth), ..Default::default() });
    assert!(text.contains("me") && !text.contains("s3cret"), "{text}");
}
