//! CNI for real: Debian's plugins where they are installed, and shell scripts as plugins that note how they were called.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::model::error::Kind;
use crate::model::pod::{PodMetadata, PortMapping, Protocol};
use crate::network::switch::Switch;
use crate::network::testbed::{Bed, host, spec};
use crate::network::{self, Choice, Network};

/// Result that the scripts give.
const RESULT: &str = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"h"},{"name":"eth0","sandbox":"/x"}],"ips":[{"address":"10.5.0.1/24","interface":0},{"address":"fd05::9/64","interface":1},{"address":"10.5.0.9/24","interface":1}]}"#;

fn config(bed: &Bed) -> network::Config {
    let mut config = network::Config { network: Choice::Cni, ..network::Config::default() };
    config.cni.bin_dirs = vec![bed.dir.join("bin"), "/usr/lib/cni".into()];
    config
}

fn conf(bed: &Bed, value: &Value) {
    std::fs::create_dir_all(bed.dir.join("net.d")).unwrap();
    std::fs::write(bed.dir.join("net.d/10.conflist"), value.to_string()).unwrap();
}

/// A plugin that notes verb, name and input (`<log>/calls`, `<log>/<n>.json`), then runs `then`.
fn script(bed: &Bed, name: &str, then: &str) {
    let dir = bed.dir.display();
    std::fs::create_dir_all(bed.dir.join("bin")).unwrap();
    std::fs::create_dir_all(bed.dir.join("log")).unwrap();
    let text = format!(
        "#!/bin/sh\nset -u\necho \"$CNI_COMMAND {name}\" >> {dir}/log/calls\nn=$(wc -l < {dir}/log/calls)\ncat > {dir}/log/$n.json\nenv > {dir}/log/$n.env\n{then}\n"
    );
    let path = bed.dir.join("bin").join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn calls(bed: &Bed) -> Vec<String> {
    std::fs::read_to_string(bed.dir.join("log/calls")).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn given(bed: &Bed, call: usize) -> Value {
    serde_json::from_str(&std::fs::read_to_string(bed.dir.join(format!("log/{call}.json"))).unwrap()).unwrap()
}

fn two_plugins(bed: &Bed, version: &str) {
    conf(bed, &json!({"cniVersion": version, "name": "net", "plugins": [{"type": "first"}, {"type": "second"}]}));
}

fn nothing_is_left(bed: &Bed, pod: &PodId) {
    assert!(!bed.layout.netns(pod).exists());
    assert!(!bed.layout.network_record(pod).exists());
}

#[test]
fn debians_plugins_attach_and_detach() {
    host(|bed| async move {
        conf(
            &bed,
            &json!({"cniVersion": "1.0.0", "name": "deb", "plugins": [
                {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
                 "ipam": {"type": "host-local", "dataDir": bed.dir.join("ipam"), "ranges": [[{"subnet": "10.6.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
                {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
            ]}),
        );
        let network = bed.open(config(&bed)).await;
        assert_eq!(network.readiness().await, Readiness::Ready);
        let pod = PodId::random();
        let mut spec = spec();
        spec.port_mappings = vec![PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port: 8080, host_ip: String::new() }];
        let got = network.attach(&pod, &spec).await.unwrap();
        assert_eq!((got.network.as_str(), got.ips.as_slice()), ("deb", &["10.6.0.2".to_owned()][..]));
        assert_eq!(got.result.unwrap()["ips"][0]["address"], "10.6.0.2/24");
        bed.inside(&pod, || {
            let listener = TcpListener::bind("10.6.0.2:80").unwrap();
            std::thread::spawn(move || listener.accept().map(drop));
        })
        .await;
        std::net::TcpStream::connect("10.6.0.1:8080").unwrap();
        assert!(bed.run("nft list ruleset").contains("8080"));
        network.detach(&pod, &spec).await.unwrap();
        network.detach(&pod, &spec).await.unwrap();
        nothing_is_left(&bed, &pod);
        assert!(!bed.dir.join("ipam/deb/10.6.0.2").exists());
        assert!(!bed.run("nft list ruleset").contains("8080"));

        // CHECK is for real too; without ports, because portmap 1.1 looks for rules of both families for them.
        let other = PodId::random();
        network.attach(&other, &super::super::testbed::spec()).await.unwrap();
        let Some(Record::Cni(attempt)) = Records::open(bed.layout.clone()).unwrap().get(&other).unwrap() else { panic!("no record") };
        let cni = Cni::new(&Config { conf_dir: bed.dir.clone(), ..config(&bed).cni }, bed.layout.clone(), Records::open(bed.layout.clone()).unwrap());
        cni.check(&other, &attempt).await.unwrap();
        bed.inside(&other, || assert!(std::process::Command::new("ip").args(["addr", "flush", "dev", "eth0"]).status().unwrap().success())).await;
        assert!(cni.check(&other, &attempt).await.unwrap_err().to_string().starts_with("CNI plugin bridge CHECK: "));

        network.detach(&other, &spec).await.unwrap();
        nothing_is_left(&bed, &other);
    });
}

#[test]
fn a_failed_add_is_told_in_full_and_undone() {
    host(|bed| async move {
        two_plugins(&bed, "1.0.0");
        script(&bed, "first", &format!("[ $CNI_COMMAND = DEL ] || echo '{RESULT}'"));
        script(&bed, "second", r#"[ $CNI_COMMAND = DEL ] || { echo '{"code":7,"msg":"no more ranges","details":"10.0.0.0/8 is full"}'; exit 1; }"#);
        let network = bed.open(config(&bed)).await;
        let pod = PodId::random();
        let error = network.attach(&pod, &spec()).await.unwrap_err();
        assert_eq!(error.to_string(), "CNI plugin second ADD: no more ranges; 10.0.0.0/8 is full (code 7)");
        assert_eq!(calls(&bed), ["ADD first", "ADD second", "DEL second", "DEL first"]);
        nothing_is_left(&bed, &pod);

        // What is no CNI error document comes back as printed; an undo that fails does not hide it.
        script(&bed, "first", "echo complaint >&2; exit 3");
        let error = network.attach(&pod, &spec()).await.unwrap_err();
        assert_eq!(error.to_string(), "CNI plugin first ADD: exit status: 3: complaint");
        assert_eq!(calls(&bed)[4..], ["ADD first", "DEL first"]);
        nothing_is_left(&bed, &pod);
        script(&bed, "first", "echo no json");
        assert!(network.attach(&pod, &spec()).await.unwrap_err().to_string().contains("ADD: result is no JSON: no json"));
        script(&bed, "first", "");
        assert!(network.attach(&pod, &spec()).await.unwrap_err().to_string().contains("ADD: no result"));
        nothing_is_left(&bed, &pod);
    });
}

#[test]
fn a_plugin_that_hangs_is_killed_with_its_children() {
    host(|bed| async move {
        conf(&bed, &json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "slow"}]}));
        script(&bed, "slow", &format!("[ $CNI_COMMAND = DEL ] && exit 0; sleep 1000 & echo $! > {}/child; wait", bed.dir.display()));
        let mut config = config(&bed);
        // Long enough for the script to come to its wait.
        config.cni.plugin_timeout = 5;
        let network = bed.open(config).await;
        let pod = PodId::random();
        let error = network.attach(&pod, &spec()).await.unwrap_err();
        assert_eq!((error.kind, error.to_string().as_str()), (Kind::DeadlineExceeded, "CNI plugin slow ADD: no answer within 5s, killed"));
        let child = std::fs::read_to_string(bed.dir.join("child")).unwrap();
        // It was killed with the plugin, and ends when it next runs.
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        let start = std::time::Instant::now();
        while !state().is_empty() && !state().contains(") Z ") {
            assert!(start.elapsed().as_secs() < 20, "{}", state());
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        nothing_is_left(&bed, &pod);
    });
}

#[test]
fn plugins_get_what_they_declare_and_the_result_before_them() {
    host(|bed| async move {
        conf(
            &bed,
            &json!({"cniVersion": "1.0.0", "name": "net", "plugins": [
                {"type": "first", "capabilities": {"portMappings": true, "dns": false}, "own": {"kept": [1]}}, {"type": "second"}]}),
        );
        script(&bed, "first", &format!("[ $CNI_COMMAND = DEL ] || echo '{RESULT}'"));
        script(&bed, "second", &format!("[ $CNI_COMMAND = DEL ] || echo '{RESULT}'"));
        let network = bed.open(config(&bed)).await;
        let pod = PodId::random();
        let mut spec = spec();
        spec.metadata = PodMetadata { name: "web".into(), uid: "u-1".into(), namespace: "prod".into(), attempt: 0 };
        spec.dns = Some(crate::model::pod::Dns::default());
        spec.port_mappings = vec![PortMapping { protocol: Protocol::Sctp, container_port: 1, host_port: 2, host_ip: String::new() }];
        let got = network.attach(&pod, &spec).await.unwrap();
        assert_eq!(got.ips, ["10.5.0.9", "fd05::9"], "addresses on the host's side are not the pod's, IPv4 comes first");

        let mappings = json!({"portMappings": [{"hostPort": 2, "containerPort": 1, "protocol": "sctp", "hostIP": ""}]});
        let first = given(&bed, 1);
        assert_eq!(
            (&first["runtimeConfig"], &first["own"], &first["name"], &first["cniVersion"]),
            (&mappings, &json!({"kept": [1]}), &json!("net"), &json!("1.0.0"))
        );
        assert!(first.get("prevResult").is_none());
        let second = given(&bed, 2);
        assert_eq!(second["prevResult"], serde_json::from_str::<Value>(RESULT).unwrap());
        assert!(second.get("runtimeConfig").is_none());
        let env = std::fs::read_to_string(bed.dir.join("log/1.env")).unwrap();
        for want in [
            "CNI_COMMAND=ADD".to_owned(),
            format!("CNI_CONTAINERID={pod}"),
            format!("CNI_NETNS={}", bed.layout.netns(&pod).display()),
            "CNI_IFNAME=eth0".to_owned(),
            format!("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID={pod};K8S_POD_UID=u-1"),
            format!("CNI_PATH={}:/usr/lib/cni", bed.dir.join("bin").display()),
        ] {
            assert!(env.lines().any(|line| line == want), "{want} is not in {env}");
        }
        network.detach(&pod, &spec).await.unwrap();
    });
}

async fn attached(bed: &Bed) -> (Arc<Switch>, PodId) {
    two_plugins(bed, "1.0.0");
    for name in ["first", "second"] {
        script(bed, name, &format!("[ $CNI_COMMAND = DEL ] || echo '{RESULT}'"));
    }
    let network = bed.open(config(bed)).await;
    let pod = PodId::random();
    network.attach(&pod, &spec()).await.unwrap();
    (network, pod)
}

#[test]
fn a_pod_is_detached_by_the_network_that_attached_it() {
    host(|bed| async move {
        let (_, pod) = attached(&bed).await;
        // Another daemon, another choice, another configuration.
        std::fs::remove_dir_all(bed.dir.join("net.d")).unwrap();
        let network = bed.open(network::Config { network: Choice::Auto, ..config(&bed) }).await;
        network::netns::remove(&bed.layout.netns(&pod)).unwrap();
        network.detach(&pod, &spec()).await.unwrap();
        assert_eq!(calls(&bed), ["ADD first", "ADD second", "DEL second", "DEL first"]);
        assert_eq!(given(&bed, 4)["prevResult"], serde_json::from_str::<Value>(RESULT).unwrap());
        let env = std::fs::read_to_string(bed.dir.join("log/4.env")).unwrap();
        assert!(env.lines().any(|line| line == "CNI_NETNS="), "the namespace is gone: {env}");
        nothing_is_left(&bed, &pod);
    });
}

#[test]
fn a_failed_del_is_an_error_until_it_works() {
    host(|bed| async move {
        let (network, pod) = attached(&bed).await;
        script(&bed, "second", "exit 1");
        let error = network.detach(&pod, &spec()).await.unwrap_err().to_string();
        assert_eq!(error, "CNI plugin second DEL: exit status: 1: no message");
        assert_eq!(calls(&bed)[2..], ["DEL second", "DEL first"], "the others are tried");
        assert!(bed.layout.netns(&pod).exists());
        script(&bed, "second", "");
        network.detach(&pod, &spec()).await.unwrap();
        nothing_is_left(&bed, &pod);
    });
}

#[test]
fn an_add_that_a_crash_cut_off_is_undone_by_recovery() {
    host(|bed| async move {
        let (network, pod) = attached(&bed).await;
        let records = Records::open(bed.layout.clone()).unwrap();
        let Some(Record::Cni(mut attempt)) = records.get(&pod).unwrap() else { panic!("no record") };
        attempt.result = None;
        records.put(&pod, &Record::Cni(attempt)).unwrap();
        // DEL of what was never complete may fail; it is tried all the same.
        script(&bed, "first", "exit 1");
        network.recover(&[]).await.unwrap();
        assert_eq!(calls(&bed)[2..], ["DEL second", "DEL first"]);
        nothing_is_left(&bed, &pod);
    });
}

#[test]
fn readiness_follows_the_configuration() {
    host(|bed| async move {
        let network = bed.open(config(&bed)).await;
        let automatic = bed.open(network::Config { network: Choice::Auto, ..config(&bed) }).await;
        let why = |readiness: Readiness| match readiness {
            Readiness::Ready => String::new(),
            Readiness::NotReady(why) => why,
        };
        assert_eq!(why(network.readiness().await), "no CNI configuration found");
        assert_eq!(automatic.readiness().await, Readiness::Ready, "the built-in bridge");
        conf(&bed, &json!({"name": "net", "plugins": [{}]}));
        for network in [&network, &automatic] {
            assert!(why(network.readiness().await).ends_with("net.d/10.conflist: plugins[0].type: missing"));
            assert_eq!(network.attach(&PodId::random(), &spec()).await.unwrap_err().kind, Kind::FailedPrecondition);
        }
        two_plugins(&bed, "1.1.0");
        assert!(why(network.readiness().await).starts_with("network net: find CNI plugin first in "));
        script(&bed, "first", "");
        script(&bed, "second", r#"echo '{"code":50,"msg":"daemon is not running"}'; exit 1"#);
        assert_eq!(why(automatic.readiness().await), "network net: CNI plugin second STATUS: daemon is not running (code 50)");
        script(&bed, "second", "");
        assert_eq!(automatic.readiness().await, Readiness::Ready);
        assert!(calls(&bed).contains(&"STATUS second".to_owned()));
    });
}

#[test]
fn plugins_are_told_at_recovery_which_pods_there_are() {
    host(|bed| async move {
        let (network, pod) = attached(&bed).await;
        network.recover(std::slice::from_ref(&pod)).await.unwrap();
        assert_eq!(calls(&bed).len(), 2, "no GC before 1.1.0");
        two_plugins(&bed, "1.1.0");
        network.recover(std::slice::from_ref(&pod)).await.unwrap();
        assert_eq!(calls(&bed)[2..], ["GC first", "GC second"]);
        assert_eq!(given(&bed, 3)["cni.dev/valid-attachments"], json!([{"containerID": pod.as_str(), "ifname": "eth0"}]));
        conf(&bed, &json!({"cniVersion": "1.1.0", "name": "net", "disableGC": true, "plugins": [{"type": "first"}]}));
        network.recover(&[]).await.unwrap();
        assert_eq!(calls(&bed)[4..], ["DEL second", "DEL first"]);
    });
}

#[test]
fn results_of_all_versions_are_read() {
    let read = |text: &str| addresses(&serde_json::from_str(text).unwrap());
    assert_eq!(read(r#"{"ip6":{"ip":"fd00::2/64"},"ip4":{"ip":"10.0.0.2/8"}}"#).unwrap(), ["10.0.0.2", "fd00::2"]);
    assert_eq!(read(r#"{"ips":[{"version":"4","address":"10.0.0.2/8"}]}"#).unwrap(), ["10.0.0.2"]);
    assert!(read("{}").unwrap().is_empty());
    assert!(read(r#"{"ips":[{"address":"what"}]}"#).is_err());
}
