//! Tests of the merge: nothing is lost, nothing is reordered, disagreement names both.

use proptest::prelude::*;

use super::*;

fn mount(destination: &str, source: &str) -> oci::Mount {
    let mut mount = oci::Mount::default();
    mount.set_destination(PathBuf::from(destination)).set_source(Some(PathBuf::from(source)));
    mount
}

fn namespace(typ: oci::LinuxNamespaceType, path: Option<&str>) -> oci::LinuxNamespace {
    let mut namespace = oci::LinuxNamespace::default();
    namespace.set_typ(typ).set_path(path.map(PathBuf::from));
    namespace
}

#[test]
fn the_empty_plans_hold_nothing_of_the_crates_defaults() {
    let container = serde_json::to_value(LaunchPlan::for_cx(true).spec).unwrap();
    assert_eq!(
        container,
        serde_json::json!({
            "ociVersion": OCI_VERSION,
            "root": {"path": "rootfs", "readonly": false},
            "mounts": [],
            "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/"},
            "linux": {"namespaces": []},
        })
    );
    let mut sandbox = LaunchPlan::for_cx(false);
    sandbox.finish();
    assert_eq!(serde_json::to_value(sandbox.spec).unwrap(), serde_json::json!({"ociVersion": OCI_VERSION, "linux": {"namespaces": []}}));
}

#[test]
fn a_sandbox_plan_takes_what_it_can_have() {
    let mut plan = LaunchPlan::for_cx(false);
    let patch = LaunchPatch {
        hostname: Some("web".into()),
        namespaces: vec![namespace(oci::LinuxNamespaceType::Ipc, None)],
        sysctl: BTreeMap::from([("net.ipv4.ip_forward".into(), "1".into())]),
        cgroups_path: Some("/kubepods/pod1/x".into()),
        ips: vec!["10.0.0.2".into()],
        ..LaunchPatch::default()
    };
    plan.apply("a", patch).unwrap();
    plan.finish();
    assert_eq!(
        serde_json::to_value(&plan.spec).unwrap(),
        serde_json::json!({
            "ociVersion": OCI_VERSION,
            "hostname": "web",
            "linux": {"namespaces": [{"type": "ipc"}], "sysctl": {"net.ipv4.ip_forward": "1"}, "cgroupsPath": "/kubepods/pod1/x"},
        })
    );
    assert_eq!(plan.ips, ["10.0.0.2"]);
}

#[test]
fn scalars_conflict_unless_equal_and_both_are_named() {
    let cwd = |d: &str| LaunchPatch { cwd: Some(d.into()), ..LaunchPatch::default() };
    let mut plan = LaunchPlan::for_cx(true);
    plan.apply("docker/runtime", cwd("/srv")).unwrap();
    plan.apply("other", cwd("/srv")).unwrap();
    let conflict = plan.apply("third", cwd("/")).unwrap_err();
    assert_eq!(conflict, Conflict { field: "process.cwd".into(), first: "docker/runtime".into(), second: "third".into() });
    assert!(conflict.to_string().contains("docker/runtime") && conflict.to_string().contains("third"));
}

#[test]
fn the_value_that_is_the_default_is_owned_too() {
    let mut plan = LaunchPlan::for_cx(true);
    plan.apply("a", LaunchPatch { root_readonly: Some(false), cwd: Some("/".into()), ..LaunchPatch::default() }).unwrap();
    assert!(plan.clone().apply("b", LaunchPatch { root_readonly: Some(true), ..LaunchPatch::default() }).is_err());
    assert!(plan.apply("b", LaunchPatch { cwd: Some("/x".into()), ..LaunchPatch::default() }).is_err());
}

#[test]
fn maps_and_namespaces_conflict_by_key() {
    let sysctl = |v: &str| LaunchPatch { sysctl: BTreeMap::from([("k".into(), v.into())]), ..LaunchPatch::default() };
    let mut plan = LaunchPlan::for_cx(false);
    plan.apply("a", sysctl("1")).unwrap();
    plan.apply("b", sysctl("1")).unwrap();
    assert_eq!(plan.apply("c", sysctl("2")).unwrap_err().field, "linux.sysctl[k]");

    let ns = |path| LaunchPatch { namespaces: vec![namespace(oci::LinuxNamespaceType::Pid, path)], ..LaunchPatch::default() };
    let mut plan = LaunchPlan::for_cx(true);
    plan.apply("a", ns(Some("/proc/7/ns/pid"))).unwrap();
    plan.apply("b", ns(Some("/proc/7/ns/pid"))).unwrap();
    assert_eq!(plan.apply("c", ns(None)).unwrap_err().first, "a");
    assert_eq!(plan.spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap().len(), 1);
}

#[test]
fn device_rules_survive_resources_and_keep_their_order() {
    let rule = |access: &str| {
        let mut rule = oci::LinuxDeviceCgroup::default();
        rule.set_access(Some(access.into()));
        rule
    };
    let rules = |r: &[&str]| LaunchPatch { device_rules: r.iter().map(|a| rule(a)).collect(), ..LaunchPatch::default() };
    let mut pids = oci::LinuxResources::default();
    pids.set_pids(Some(oci::LinuxPids::default())).set_devices(Some(vec![rule("m")]));
    let mut plan = LaunchPlan::for_cx(true);
    plan.apply("linux/devices", rules(&["r", "w"])).unwrap();
    plan.apply("cgroups", LaunchPatch { resources: Some(pids), ..LaunchPatch::default() }).unwrap();
    plan.apply("gpu", rules(&["rw"])).unwrap();
    let resources = plan.spec.linux().as_ref().unwrap().resources().clone().unwrap();
    let got: Vec<_> = resources.devices().as_ref().unwrap().iter().map(|r| r.access().clone().unwrap()).collect();
    assert_eq!(got, ["r", "w", "m", "rw"]);
    assert!(resources.pids().is_some());
}

#[test]
fn mounts_replace_are_removed_and_sorted() {
    let mut plan = LaunchPlan::for_cx(true);
    let defaults = ["/proc", "/dev", "/dev/pts", "/dev/shm", "/sys", "/etc/hosts", "/devices"];
    plan.apply("fs", LaunchPatch { mounts: defaults.map(|d| mount(d, "default")).to_vec(), ..LaunchPatch::default() }).unwrap();
    let patch = LaunchPatch {
        remove_mounts: vec!["/dev/".into()],
        mounts: vec![mount("/a/b/c", "v"), mount("/dev", "v"), mount("/etc/hosts/", "v"), mount("/a", "v"), mount("/dev/shm", "v")],
        ..LaunchPatch::default()
    };
    plan.apply("volume", patch).unwrap();
    plan.finish();
    let got: Vec<_> =
        plan.spec.mounts().as_ref().unwrap().iter().map(|m| format!("{}={}", m.destination().display(), m.source().as_ref().unwrap().display())).collect();
    assert_eq!(got, ["/proc=default", "/sys=default", "/devices=default", "/dev=v", "/a=v", "/etc/hosts/=v", "/dev/shm=v", "/a/b/c=v"]);
}

#[test]
fn environment_replaces_in_place_whatever_its_bytes() {
    let env = |pairs: &[(&str, &[u8])]| LaunchPatch { env: pairs.iter().map(|(n, v)| ((*n).to_owned(), v.to_vec())).collect(), ..LaunchPatch::default() };
    let mut plan = LaunchPlan::for_cx(true);
    plan.apply("a", env(&[("PATH", b"/bin"), ("RAW", b"\xff"), ("TEXT", b"1")])).unwrap();
    plan.apply("b", env(&[("RAW", b"now text"), ("TEXT", b"\xfe"), ("PATH", b"/sbin")])).unwrap();
    for _ in 0..2 {
        plan.finish();
        assert_eq!(plan.spec.process().as_ref().unwrap().env().as_ref().unwrap(), &["PATH=/sbin", "RAW=now text"]);
        assert_eq!(plan.extras.env_bytes, [b"TEXT=\xfe".to_vec()]);
    }
}

proptest! {
    #![proptest_config(crate::stdx::testing::cases(256))]
    /// However the same requests are spread over isolators, all arrive, in the order of asking.
    #[test]
    fn apply_never_loses_or_reorders(sizes in prop::collection::vec(0usize..5, 1..8), depths in prop::collection::vec(1usize..4, 40)) {
        let mut plan = LaunchPlan::for_cx(true);
        let mut asked = Vec::new();
        for (i, size) in sizes.iter().enumerate() {
            let from = asked.len();
            asked.extend(from..from + size);
            let mut patch = LaunchPatch::default();
            for (n, depth) in depths.iter().enumerate().skip(from).take(*size) {
                patch.env.push((format!("E{n}"), n.to_string().into_bytes()));
                patch.mounts.push(mount(&format!("{}/m{n}", "/d".repeat(depth - 1)), "s"));
                let mut device = oci::LinuxDevice::default();
                device.set_minor(n as i64);
                patch.devices.push(device);
                let mut rule = oci::LinuxDeviceCgroup::default();
                rule.set_minor(Some(n as i64));
                patch.device_rules.push(rule);
                patch.annotations.insert(format!("a{n}"), n.to_string());
                patch.ips.push(n.to_string());
            }
            plan.apply(&format!("isolator {i}"), patch).unwrap();
        }
        plan.finish();
        let spec = &plan.spec;
        let linux = spec.linux().as_ref().unwrap();
        let env: Vec<_> = asked.iter().map(|n| format!("E{n}={n}")).collect();
        prop_assert_eq!(spec.process().as_ref().unwrap().env().clone().unwrap_or_default(), env);
        let devices: Vec<_> = linux.devices().iter().flatten().map(|d| d.minor() as usize).collect();
        prop_assert_eq!(&devices, &asked);
        let rules: Vec<_> = linux.resources().iter().flat_map(|r| r.devices().iter().flatten()).filter_map(|r| r.minor()).map(|n| n as usize).collect();
        prop_assert_eq!(&rules, &asked);
        prop_assert_eq!(spec.annotations().as_ref().map_or(0, |a| a.len()), asked.len());
        prop_assert_eq!(plan.ips.len(), asked.len());
        let mut mounts = asked.clone();
        mounts.sort_by_key(|n| depths[*n]);
        let got: Vec<usize> = spec.mounts().iter().flatten().map(|m| m.destination().file_name().unwrap().to_str().unwrap()[1..].parse().unwrap()).collect();
        prop_assert_eq!(got, mounts);
    }
}
