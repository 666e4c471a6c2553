//! End to end: what pods reach and who reaches them, on the built-in bridge and with CNI plugins, and what is left of it.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Read as _;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use common::cri::{host_pod, pod, shell};
use common::{Node, host};
use mesocri::wire::cri as api;

/// Answers every caller with the container's host name.
const SERVER: &str = "while :; do hostname | nc -l -p 8080; done";
/// Address of the bench's uplink: the node's own.
const NODE_ADDRESS: &str = "10.99.0.1";

fn host_port(port: i32) -> api::PortMapping {
    api::PortMapping { protocol: api::Protocol::Tcp.into(), container_port: 8080, host_port: port, host_ip: String::new() }
}

/// Connects from the host until someone answers; what was said.
fn says(address: &str) -> String {
    let mut said = String::new();
    host::wait_until(&format!("{address} answers"), || {
        let Ok(mut stream) = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(2)) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        said.clear();
        stream.read_to_string(&mut said).is_ok() && !said.is_empty()
    });
    said
}

/// Whether nobody is there, and somebody says so: no answer in time proves nothing.
fn refuses(address: &str) -> bool {
    match TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(10)) {
        Ok(_) => false,
        Err(e) => {
            assert_eq!(e.kind(), std::io::ErrorKind::ConnectionRefused, "{address}: {e}");
            true
        }
    }
}

async fn network_condition(node: &Node) -> api::RuntimeCondition {
    let status = node.runtime().status(api::StatusRequest::default()).await.unwrap().into_inner().status.unwrap();
    status.conditions.into_iter().find(|c| c.r#type == "NetworkReady").unwrap()
}

async fn ip(node: &Node, pod: &str) -> String {
    node.pod_status(pod).await.unwrap().network.unwrap().ip
}

#[tokio::test(flavor = "current_thread")]
async fn the_bridge_connects_pods_gateway_and_host() {
    let node = Node::start().await;
    node.pull().await;
    let mut config = pod(&node, "one");
    config.dns_config = Some(api::DnsConfig { servers: vec!["192.0.2.53".into()], searches: vec!["svc.test".into()], options: vec!["ndots:5".into()] });
    config.port_mappings = vec![host_port(18080)];
    let one = node.run_pod(&config).await.unwrap();
    let in_one = node.launch(&one, &config, &shell("server", SERVER)).await;
    let other_config = pod(&node, "two");
    let two = node.run_pod(&other_config).await.unwrap();
    let in_two = node.launch(&two, &other_config, &shell("c", "exec sleep 1000")).await;
    let (ip_one, ip_two) = (ip(&node, &one).await, ip(&node, &two).await);
    assert_ne!(ip_one, ip_two);

    for target in [ip_one.as_str(), "10.88.0.1", NODE_ADDRESS] {
        let (exit, out, err) = node.exec(&in_two, &format!("ping -c 1 -W 5 {target}"), 20).await.unwrap();
        assert_eq!(exit, 0, "ping {target}: {out}{err}");
    }
    host::run("busybox", &["ping", "-c", "1", "-W", "5", &ip_one]);
    assert_eq!(says(&format!("{ip_one}:8080")), "one\n");
    assert_eq!(says("127.0.0.1:18080"), "one\n");
    assert_eq!(says(&format!("{NODE_ADDRESS}:18080")), "one\n");
    // From another pod, and from the pod itself, by the node's address.
    for from in [&in_two, &in_one] {
        // The server listens anew after each connection; between two it refuses, or takes a caller along into its end.
        let script = format!("until out=$(nc -w 5 {NODE_ADDRESS} 18080 </dev/null 2>/dev/null) && [ -n \"$out\" ]; do sleep 0.1; done; echo \"$out\"");
        let (exit, out, err) = node.exec(from, &script, 60).await.unwrap();
        assert_eq!((exit, out.as_str()), (0, "one\n"), "{err}");
    }
    let (_, resolv, _) = node.exec(&in_one, "cat /etc/resolv.conf; hostname", 10).await.unwrap();
    assert_eq!(resolv, "search svc.test\nnameserver 192.0.2.53\noptions ndots:5\none\n");
    let (_, hosts, _) = node.exec(&in_one, "cat /etc/hosts", 10).await.unwrap();
    assert!(hosts.contains("127.0.0.1"), "{hosts}");

    // The same host port twice: the second leaves nothing, and works once the port is free.
    let before = host::Snapshot::take(&node.cgroup);
    let mut clash = pod(&node, "clash");
    clash.port_mappings = vec![host_port(18080)];
    let error = node.run_pod(&clash).await.unwrap_err();
    assert!(error.message().contains("18080") && error.message().contains(&one), "{error}");
    assert_eq!(before.left(&node.cgroup), [""; 0]);
    assert_eq!(node.pods().await.len(), 2);
    assert_eq!(says("127.0.0.1:18080"), "one\n", "the first one's port goes on working");
    node.remove_pod(&one).await.unwrap();
    assert!(refuses("127.0.0.1:18080"));
    let three = node.run_pod(&clash).await.unwrap();
    node.launch(&three, &clash, &shell("server", SERVER)).await;
    assert_eq!(says("127.0.0.1:18080"), "clash\n");
    node.remove_all_pods().await;
    assert!(!host::run("nft", &["list", "ruleset"]).contains("18080"));
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn host_ports_outlive_the_daemon() {
    let mut node = Node::start().await;
    node.pull().await;
    let mut config = pod(&node, "stays");
    config.port_mappings = vec![host_port(18081)];
    let id = node.run_pod(&config).await.unwrap();
    node.launch(&id, &config, &shell("server", SERVER)).await;
    node.kill_daemon();
    assert_eq!(says("127.0.0.1:18081"), "stays\n");
    node.start_daemon(&[]);
    let mut clash = pod(&node, "clash");
    clash.port_mappings = vec![host_port(18081)];
    assert!(node.run_pod(&clash).await.unwrap_err().message().contains("18081"));
    node.remove_all_pods().await;
    assert!(refuses("127.0.0.1:18081"));
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn host_network_pods_see_the_host() {
    let node = Node::start().await;
    node.pull().await;
    let config = host_pod(&node, "host");
    let id = node.run_pod(&config).await.unwrap();
    assert_eq!(node.pod_status(&id).await.unwrap().network.map(|n| n.ip).unwrap_or_default(), "");
    let c = node.launch(&id, &config, &shell("c", "exec sleep 1000")).await;
    let (_, seen, _) = node.exec(&c, "readlink /proc/self/ns/net; ip addr show uplink; hostname", 10).await.unwrap();
    assert!(seen.starts_with(&*std::fs::read_link("/proc/thread-self/ns/net").unwrap().to_string_lossy()), "{seen}");
    assert!(seen.contains(NODE_ADDRESS) && seen.ends_with(&host::run("hostname", &[])), "{seen}");
    node.remove_all_pods().await;
    node.finish();
}

/// A daemon whose CNI configuration and (if there are any in `bin`) plugins are the test's own.
fn cni_node() -> Node {
    let mut node = Node::prepare("");
    let (conf, bin) = (node.dir.path().join("cni-conf"), node.dir.path().join("cni-bin"));
    std::fs::create_dir_all(&conf).unwrap();
    std::fs::create_dir_all(&bin).unwrap();
    node.extra_config = format!("[network]\nnetwork = 'cni'\n[network.cni]\nconf_dir = {conf:?}\nbin_dirs = [{bin:?}, '/usr/lib/cni', '/opt/cni/bin']\n");
    node
}

fn write_conf(node: &Node, text: &str) {
    std::fs::write(node.dir.path().join("cni-conf/10-test.conflist"), text).unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn cni_plugins_attach_forward_and_free() {
    let mut node = cni_node();
    let data = node.dir.path().join("cni-data");
    write_conf(
        &node,
        &serde_json::json!({
            "cniVersion": "1.0.0", "name": "testnet",
            "plugins": [
                { "type": "bridge", "bridge": "cnitest0", "isGateway": true, "ipMasq": true,
                  "ipam": { "type": "host-local", "dataDir": data, "ranges": [[{ "subnet": "10.77.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
                { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true },
            ],
        })
        .to_string(),
    );
    node.start_registry();
    node.start_daemon(&[]);
    node.pull().await;
    let condition = network_condition(&node).await;
    assert!(condition.status, "{condition:?}");
    let mut config = pod(&node, "cni");
    config.port_mappings = vec![host_port(18082)];
    let id = node.run_pod(&config).await.unwrap();
    let address = ip(&node, &id).await;
    assert!(address.starts_with("10.77.0."), "{address}");
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: true };
    let info = node.runtime().pod_sandbox_status(request).await.unwrap().into_inner().info.remove("info").unwrap();
    let result = serde_json::from_str::<serde_json::Value>(&info).unwrap()["cniResult"].clone();
    assert!(result["ips"][0]["address"].as_str().unwrap().starts_with(&address), "what the plugins said, whole: {result}");
    assert!(result["interfaces"].as_array().is_some_and(|i| i.iter().any(|i| i["name"] == "eth0")), "{result}");
    let c = node.launch(&id, &config, &shell("server", SERVER)).await;
    let (exit, out, err) = node.exec(&c, "ip addr show eth0; ping -c 1 -W 5 10.77.0.1", 20).await.unwrap();
    assert!(exit == 0 && out.contains(&address), "{out}{err}");
    assert_eq!(says(&format!("{address}:8080")), "cni\n");
    assert_eq!(says(&format!("{NODE_ADDRESS}:18082")), "cni\n");
    let leased = || common::entries(&data.join("testnet")).into_iter().filter(|n| n.starts_with("10.")).collect::<Vec<_>>();
    assert_eq!(leased(), [address]);

    // The pod is detached as it was attached, even if the configuration has gone meanwhile and the daemon was away.
    node.kill_daemon();
    std::fs::remove_file(node.dir.path().join("cni-conf/10-test.conflist")).unwrap();
    node.start_daemon(&[]);
    assert!(!network_condition(&node).await.status);
    node.remove_all_pods().await;
    assert_eq!(leased(), [""; 0]);
    assert!(refuses(&format!("{NODE_ADDRESS}:18082")));
    // The plugin leaves its bridge, as documented.
    host::run("ip", &["link", "del", "cnitest0"]);
    node.finish();
}

/// A plugin that notes what it is asked and fails as told by files beside it.
fn write_fake_plugin(dir: &Path) {
    let dir = dir.display();
    let script = format!(
        "#!/bin/sh\ncat >/dev/null\necho \"$CNI_COMMAND $CNI_CONTAINERID\" >>{dir}/calls\n\
         if [ -e {dir}/fail-$CNI_COMMAND ]; then cat {dir}/fail-$CNI_COMMAND; exit 1; fi\n\
         [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.0.0\",\"ips\":[{{\"address\":\"10.66.0.9/24\"}}]}}'\nexit 0\n"
    );
    let path = format!("{dir}/cni-bin/fake");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn failing_cni_plugins_are_quoted_undone_and_tried_again() {
    let mut node = cni_node();
    let dir = node.dir.path().to_owned();
    write_fake_plugin(&dir);
    let good = r#"{"cniVersion":"1.0.0","name":"testnet","plugins":[{"type":"fake"}]}"#;
    write_conf(&node, good);
    node.start_registry();
    node.start_daemon(&[]);
    let calls = || std::fs::read_to_string(dir.join("calls")).unwrap_or_default().lines().map(|l| l.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>();

    let config = pod(&node, "fails");
    let before = host::Snapshot::take(&node.cgroup);
    std::fs::write(dir.join("fail-ADD"), r#"{"cniVersion":"1.0.0","code":107,"msg":"no address is left","details":"range 10.66.0.0/24 has 254 holders"}"#)
        .unwrap();
    let error = node.run_pod(&config).await.unwrap_err();
    for part in ["fake", "ADD", "no address is left", "range 10.66.0.0/24 has 254 holders"] {
        assert!(error.message().contains(part), "{part:?} in {error}");
    }
    assert_eq!(calls(), ["ADD", "DEL"]);
    assert_eq!(before.left(&node.cgroup), [""; 0]);
    assert!(node.pods().await.is_empty());
    // A plugin that says something else than JSON is quoted too.
    std::fs::write(dir.join("fail-ADD"), "Segmentation fault, kind of").unwrap();
    let error = node.run_pod(&config).await.unwrap_err();
    assert!(error.message().contains("Segmentation fault, kind of"), "{error}");

    std::fs::remove_file(dir.join("fail-ADD")).unwrap();
    let id = node.run_pod(&config).await.unwrap();
    assert_eq!(ip(&node, &id).await, "10.66.0.9");
    std::fs::write(dir.join("fail-DEL"), r#"{"cniVersion":"1.0.0","code":108,"msg":"switch unreachable"}"#).unwrap();
    let error = node.stop_pod(&id).await.unwrap_err();
    assert!(error.message().contains("switch unreachable"), "{error}");
    assert_eq!(node.pod_status(&id).await.unwrap().state, api::PodSandboxState::SandboxNotready as i32);
    assert!(node.remove_pod(&id).await.is_err(), "an address that was not given back is not forgotten");
    // Nor by a restart.
    node.kill_daemon();
    node.start_daemon(&[]);
    assert!(node.stop_pod(&id).await.unwrap_err().message().contains("switch unreachable"));
    std::fs::remove_file(dir.join("fail-DEL")).unwrap();
    node.stop_pod(&id).await.unwrap();
    let done = calls().len();
    node.stop_pod(&id).await.unwrap();
    assert_eq!(calls().len(), done, "what is detached is not detached again");
    node.remove_all_pods().await;

    write_conf(&node, r#"{"cniVersion":"1.0.0","name":"testnet","plugins":"#);
    let condition = network_condition(&node).await;
    assert!(!condition.status && condition.reason == "NetworkPluginNotReady" && condition.message.contains("10-test.conflist"), "{condition:?}");
    let error = node.run_pod(&config).await.unwrap_err();
    assert!(error.message().contains("10-test.conflist"), "{error}");
    write_conf(&node, r#"{"cniVersion":"1.0.0","name":"testnet","plugins":[{"type":"nosuchplugin"}]}"#);
    let condition = network_condition(&node).await;
    assert!(!condition.status && condition.message.contains("nosuchplugin"), "{condition:?}");
    write_conf(&node, good);
    assert!(network_condition(&node).await.status);
    node.finish();
}

#[tokio::test(flavor = "current_thread")]
async fn an_operator_removes_what_the_bridge_leaves() {
    let mut node = Node::start().await;
    let file = node.dir.path().join("config.toml");
    let prune = || {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_mesocri")).args(["network", "prune", "--config"]).arg(&file).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let there = || host::run("ip", &["-o", "link"]).contains("mesocri0") || host::run("nft", &["list", "tables"]).contains("mesocri");
    let id = node.run_pod(&pod(&node, "p")).await.unwrap();
    let (code, said) = prune();
    assert!(code == 78 && said.contains("another mesocri daemon"), "{code} {said}");
    node.kill_daemon();
    let (code, said) = prune();
    assert!(code == 78 && said.contains("pods are attached") && said.contains(&id[..8]), "{code} {said}");
    node.start_daemon(&[]);
    node.remove_all_pods().await;
    node.terminate_daemon();
    assert!(there(), "the bridge stays for the next pod");
    for _ in 0..2 {
        assert_eq!(prune(), (0, String::new()));
        assert!(!there());
    }
    // The next pod has a network all the same.
    node.start_daemon(&[]);
    let id = node.run_pod(&pod(&node, "q")).await.unwrap();
    assert!(there() && !ip(&node, &id).await.is_empty());
    node.remove_all_pods().await;
    node.finish();
}
