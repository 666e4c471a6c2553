//! Tests of `appc/runtime`: what a manifest comes to, and what the caller's word does to it.

use super::super::tests::Bench;
use super::*;
use crate::model::Kind;
use crate::model::container::Mount;
use crate::model::image::ImageConfig;

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

fn bench(appc: AppcConfig) -> (Bench, Box<dyn Isolator>) {
    let mut bench = Bench::new();
    bench.image.config = ImageConfig {
        entrypoint: words(&["/bin/app"]),
        cmd: words(&["--quiet"]),
        env: words(&["A=1"]),
        working_dir: "/opt".into(),
        user: "7:8".into(),
        appc: Some(Box::new(AppcConfig { app: true, ..appc })),
        ..ImageConfig::default()
    };
    bench.spec.metadata.name = "web".into();
    let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
    (bench, isolator)
}

#[tokio::test]
async fn the_manifest_makes_the_process_and_the_caller_has_the_last_word() {
    let (mut bench, isolator) = bench(AppcConfig { supplementary_gids: vec![9, 10], ..AppcConfig::default() });
    let patch = bench.prepare(&*isolator).await.unwrap();
    assert_eq!((patch.args.unwrap(), patch.cwd.unwrap()), (words(&["/bin/app", "--quiet"]), "/opt".to_owned()));
    let user = patch.user.unwrap();
    assert_eq!((user.uid(), user.gid(), user.additional_gids().clone().unwrap()), (7, 8, vec![8, 9, 10]));
    let env: Vec<_> = patch.env.iter().map(|(n, v)| format!("{n}={}", String::from_utf8_lossy(v))).collect();
    assert!(env.contains(&"A=1".to_owned()) && env.contains(&"AC_APP_NAME=web".to_owned()), "{env:?}");

    // Mesos: arguments without a command go behind the first word (mesos.md §7.3).
    bench.spec.args = words(&["--loud"]);
    assert_eq!(bench.prepare(&*isolator).await.unwrap().args.unwrap(), words(&["/bin/app", "--loud"]));
    bench.spec.command = words(&["/bin/sh"]);
    bench.spec.security.user.uid = Some(5);
    let patch = bench.prepare(&*isolator).await.unwrap();
    let user = patch.user.unwrap();
    assert_eq!((patch.args.unwrap(), user.uid(), user.gid(), user.additional_gids().clone().unwrap()), (words(&["/bin/sh", "--loud"]), 5, 0, vec![0]));

    bench.image.config.appc.as_mut().unwrap().app = false;
    bench.prepare(&*isolator).await.unwrap();
    bench.spec.command.clear();
    assert_eq!(bench.prepare(&*isolator).await.unwrap_err().kind, Kind::InvalidArgument);
}

#[tokio::test]
async fn each_runtime_keeps_to_its_own_images() {
    let (mut bench, appc) = bench(AppcConfig::default());
    let docker = (super::super::docker_runtime::ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
    assert_eq!(bench.prepare(&*docker).await.unwrap(), LaunchPatch::default());
    bench.image.config.appc = None;
    assert_eq!(bench.prepare(&*appc).await.unwrap(), LaunchPatch::default());
    assert_ne!(bench.prepare(&*docker).await.unwrap(), LaunchPatch::default());
    let mut spec = ContainerSpec::default();
    appc.complete(&mut spec, &bench.image).unwrap();
    assert_eq!(spec, ContainerSpec::default());
}

#[tokio::test]
async fn users_may_be_the_owners_of_files() {
    let (mut bench, isolator) = bench(AppcConfig::default());
    let file = bench.rootfs.lookup[0].join("data");
    std::fs::write(&file, "").unwrap();
    std::os::unix::fs::symlink("/data", bench.rootfs.lookup[0].join("link")).unwrap();
    if std::os::unix::fs::chown(&file, Some(1234), Some(4321)).is_err() {
        // Without the right to give files away they are ours, which is as good an owner.
        assert!(!nix::unistd::geteuid().is_root());
    }
    let stat = rustix::fs::stat(&file).unwrap();
    for user in ["/data:/data", "/link:/link"] {
        bench.image.config.user = user.into();
        let user = bench.prepare(&*isolator).await.unwrap().user.unwrap();
        assert_eq!((user.uid(), user.gid()), (stat.st_uid, stat.st_gid));
    }
    bench.image.config.user = "/missing:0".into();
    assert!(bench.prepare(&*isolator).await.unwrap_err().to_string().contains("/missing"));
}

#[tokio::test]
async fn mount_points_are_volumes_unless_the_caller_mounts_there() {
    let (mut bench, isolator) = bench(AppcConfig { read_only: words(&["/etc/app"]), ..AppcConfig::default() });
    bench.image.config.volumes = words(&["/work", "/etc/app", "/given"]);
    std::fs::create_dir_all(bench.rootfs.lookup[0].join("work/seed")).unwrap();
    bench.spec.mounts = vec![Mount { container_path: "/given".into(), host_path: "/tmp".into(), ..Mount::default() }];
    let mounts = bench.prepare(&*isolator).await.unwrap().mounts;
    let shown: Vec<_> = mounts.iter().map(|m| (m.destination().display().to_string(), m.options().clone().unwrap().pop().unwrap())).collect();
    assert_eq!(shown, [("/work".to_owned(), "rw".to_owned()), ("/etc/app".to_owned(), "ro".to_owned())]);
    let host = mounts[0].source().clone().unwrap();
    assert!(host.join("seed").is_dir());
    isolator.cleanup(&bench.pod_id, &bench.pod, Some(&bench.id)).await.unwrap();
    assert!(!host.exists());
    bench.image.config.volumes = words(&["/a/../../etc"]);
    assert_eq!(bench.prepare(&*isolator).await.unwrap_err().kind, Kind::InvalidArgument);
}

#[test]
fn limits_fill_gaps_and_nothing_else() {
    let resources = AppcResources { cpu_request: Some(250), cpu_limit: Some(1500), memory_limit: Some(64 << 20) };
    let (bench, isolator) = bench(AppcConfig { resources, ..AppcConfig::default() });
    let mut spec = ContainerSpec::default();
    isolator.complete(&mut spec, &bench.image).unwrap();
    let r = &spec.resources;
    assert_eq!((r.memory_limit, r.cpu_quota, r.cpu_period, r.cpu_shares), (Some(64 << 20), Some(150_000), Some(100_000), Some(256)));

    let own = Resources { memory_limit: Some(1 << 30), cpu_quota: Some(-1), cpu_shares: Some(2), ..Resources::default() };
    let mut spec = ContainerSpec { resources: own.clone(), ..ContainerSpec::default() };
    isolator.complete(&mut spec, &bench.image).unwrap();
    assert_eq!(spec.resources, own);
}

#[test]
fn an_image_can_only_give_privileges_up() {
    let complete = |appc: AppcConfig, spec: &mut ContainerSpec| {
        let (bench, isolator) = bench(appc);
        isolator.complete(spec, &bench.image).unwrap();
    };
    let own: std::collections::HashSet<_> = DEFAULT.into_iter().chain([oci_spec::runtime::Capability::SysAdmin]).collect();
    let granted = |spec: &ContainerSpec| super::super::linux_capabilities::granted(&spec.security, &own).unwrap();
    let retain = |set: &[&str]| AppcConfig { retain_capabilities: Some(words(set)), ..AppcConfig::default() };

    let mut spec = ContainerSpec::default();
    complete(retain(&["CAP_KILL", "CAP_SYS_ADMIN"]), &mut spec);
    assert_eq!(granted(&spec), [oci_spec::runtime::Capability::Kill].into());
    let mut spec = ContainerSpec::default();
    complete(AppcConfig { remove_capabilities: words(&["CAP_KILL"]), no_new_privileges: true, ..AppcConfig::default() }, &mut spec);
    assert!(granted(&spec).len() == DEFAULT.len() - 1 && spec.security.no_new_privs);

    // The caller's own choice stands, and a privileged container is one.
    let mut spec = ContainerSpec::default();
    spec.security.capabilities.add = words(&["SYS_ADMIN"]);
    complete(retain(&["CAP_KILL"]), &mut spec);
    assert_eq!(granted(&spec).len(), DEFAULT.len() + 1);
    let mut spec = ContainerSpec::default();
    spec.security.privileged = true;
    complete(AppcConfig { no_new_privileges: true, ..retain(&["CAP_KILL"]) }, &mut spec);
    assert!(!spec.security.no_new_privs && granted(&spec).len() == own.len());
}
