//! Host ports and masquerading for real, each test on a host of its own; `nft` reads what we wrote.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::model::error::Kind;
use crate::model::pod::PortMapping;
use crate::model::{PodId, PodSpec};
use crate::network::rtnl::Rtnl;
use crate::network::switch::Switch;
use crate::network::testbed::{Bed, attach, host, spec};
use crate::network::{Config, Network, netns};

fn with_port(protocol: Protocol, host_ip: &str, host_port: u16, container_port: u16) -> PodSpec {
    PodSpec { port_mappings: vec![PortMapping { protocol, container_port, host_port, host_ip: host_ip.into() }], ..PodSpec::default() }
}

/// Answers everyone who connects to `address` with who they are, as long as the test runs.
fn serve(address: &str) {
    serve_times(address, usize::MAX);
}

/// The same for `times` callers; then the thread goes, and with it what it keeps alive.
fn serve_times(address: &str, times: usize) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for _ in 0..times {
            let (mut stream, peer) = listener.accept().unwrap();
            stream.write_all(peer.ip().to_string().as_bytes()).unwrap();
        }
    });
}

fn ask(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address.parse::<SocketAddr>().unwrap(), Duration::from_secs(1))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

async fn pod_with(bed: &Bed, network: &Switch, spec: &PodSpec) -> PodId {
    let pod = PodId::random();
    network.attach(&pod, spec).await.unwrap();
    bed.inside(&pod, || serve("0.0.0.0:80")).await;
    pod
}

#[test]
fn host_ports_lead_to_the_pod_from_everywhere() {
    host(|bed: Arc<Bed>| async move {
        let mut config = Config::default();
        config.bridge.cleanup_when_idle = true;
        let network = bed.open(config).await;
        let before = bed.traces();
        let spec = with_port(Protocol::Tcp, "", 8080, 80);
        let pod = PodId::random();
        network.attach(&pod, &spec).await.unwrap();
        bed.inside(&pod, || serve_times("0.0.0.0:80", 4)).await;
        let other = attach(&network, 1).await;

        // From the host by the bridge's address and by the loopback.
        assert_eq!(ask("10.88.0.1:8080").unwrap(), "10.88.0.1");
        assert_eq!(ask("127.0.0.1:8080").unwrap(), "10.88.0.1");
        assert!(ask("10.88.0.1:8081").is_err());
        // From another pod, and from itself.
        assert_eq!(bed.inside(&other[0].0, || ask("10.88.0.1:8080").unwrap()).await, "10.88.0.1");
        assert_eq!(bed.inside(&pod, || ask("10.88.0.1:8080").unwrap()).await, "10.88.0.1");
        // What is not addressed to this host is not touched.
        assert!(bed.inside(&other[0].0, || ask("10.88.0.9:8080")).await.is_err());

        let rules = bed.run("nft list table inet mesocri0");
        assert!(rules.contains("elements = { tcp . 8080 : 10.88.0.2 . 80 }"), "{rules}");
        network.detach(&pod, &spec).await.unwrap();
        assert!(ask("10.88.0.1:8080").is_err());
        assert!(!bed.run("nft list table inet mesocri0").contains("8080"));
        network.detach(&other[0].0, &spec).await.unwrap();
        bed.settle(&before).await;
    });
}

#[test]
fn datagrams_and_single_addresses() {
    host(|bed| async move {
        bed.run("ip addr add 192.0.2.1/32 dev lo; ip addr add 192.0.2.2/32 dev lo");
        let network = bed.open(Config::default()).await;
        let (first, second) = (with_port(Protocol::Tcp, "192.0.2.1", 90, 80), with_port(Protocol::Tcp, "192.0.2.2", 90, 81));
        let a = pod_with(&bed, &network, &first).await;
        let b = PodId::random();
        network.attach(&b, &second).await.unwrap();
        bed.inside(&b, || serve("0.0.0.0:81")).await;
        assert!(ask("192.0.2.1:90").is_ok() && ask("192.0.2.2:90").is_ok());
        assert!(ask("10.88.0.1:90").is_err() && ask("127.0.0.1:90").is_err());

        let udp = with_port(Protocol::Udp, "", 90, 53);
        let c = PodId::random();
        network.attach(&c, &udp).await.unwrap();
        bed.inside(&c, || {
            let socket = UdpSocket::bind("0.0.0.0:53").unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 16];
                let (length, peer) = socket.recv_from(&mut buffer).unwrap();
                socket.send_to(&buffer[..length], peer).unwrap();
            });
        })
        .await;
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client.connect("10.88.0.1:90").unwrap();
        client.send(b"hello").unwrap();
        let mut buffer = [0; 16];
        assert_eq!(client.recv(&mut buffer).unwrap(), 5);
        for pod in [a, b, c] {
            network.detach(&pod, &spec()).await.unwrap();
        }
        network.teardown().await.unwrap();
        assert_eq!(bed.run("nft list ruleset"), "");
    });
}

#[test]
fn ipv6_host_ports() {
    host(|bed| async move {
        let mut config = Config::default();
        config.bridge.subnets = vec!["10.9.0.0/24".parse().unwrap(), "fd09::/64".parse().unwrap()];
        let network = bed.open(config).await;
        let spec = with_port(Protocol::Tcp, "", 8080, 80);
        let pod = PodId::random();
        network.attach(&pod, &spec).await.unwrap();
        bed.inside(&pod, || serve("[::]:80")).await;
        assert_eq!(ask("[fd09::1]:8080").unwrap(), "fd09::1");
        assert!(ask("10.9.0.1:8080").is_ok());
        // Refused at once, not lost.
        assert_eq!(ask("[::1]:8080").unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        let at = with_port(Protocol::Tcp, "fd09::1", 8081, 80);
        let second = PodId::random();
        network.attach(&second, &at).await.unwrap();
        bed.inside(&second, || serve("[::]:80")).await;
        assert_eq!(ask("[fd09::1]:8081").unwrap(), "fd09::1");
        network.recover(&[]).await.unwrap();
        network.teardown().await.unwrap();
    });
}

#[test]
fn one_port_has_one_pod() {
    host(|bed| async move {
        let network = bed.open(Config::default()).await;
        let spec = with_port(Protocol::Tcp, "", 8080, 80);
        let holder = pod_with(&bed, &network, &spec).await;
        // A restart does not forget who has it.
        let network = bed.open(Config::default()).await;
        let late = PodId::random();
        for ip in ["", "127.0.0.1"] {
            let error = network.attach(&late, &with_port(Protocol::Tcp, ip, 8080, 81)).await.unwrap_err();
            assert_eq!(error.kind, Kind::FailedPrecondition);
            assert_eq!(error.to_string(), format!("take host port 8080/tcp for pod {late}: pod {holder} has it"));
        }
        assert_eq!(network.attach(&late, &with_port(Protocol::Tcp, "what", 1, 1)).await.unwrap_err().kind, Kind::InvalidArgument);
        assert!(!bed.layout.netns(&late).exists() && !bed.layout.network_record(&late).exists());
        assert!(ask("10.88.0.1:8080").is_ok());
        network.attach(&late, &with_port(Protocol::Udp, "", 8080, 80)).await.unwrap();
        assert!(ask("10.88.0.1:8080").is_ok(), "the table made again holds the old pod's port");
        network.detach(&holder, &spec).await.unwrap();
        let new = pod_with(&bed, &network, &spec).await;
        // Someone flushes all rules: the next host port brings all of them back.
        bed.run("nft flush ruleset");
        let other = pod_with(&bed, &network, &with_port(Protocol::Tcp, "", 8081, 80)).await;
        assert!(ask("10.88.0.1:8080").is_ok() && ask("10.88.0.1:8081").is_ok());
        bed.run("nft delete table inet mesocri0");
        for pod in [late, new, other] {
            network.detach(&pod, &spec).await.unwrap();
        }
        network.teardown().await.unwrap();
    });
}

#[test]
fn pods_leave_with_the_hosts_address() {
    host(|bed| async move {
        // A machine outside that has no route to pods.
        let outside = PodId::random();
        let pin = bed.layout.netns(&outside);
        netns::on_thread(move || netns::unshare_and_pin(&pin)).await.unwrap();
        bed.run(&format!(
            "ip link add out0 type veth peer name out1; ip link set out1 netns {}; ip addr add 198.51.100.1/24 dev out0; ip link set out0 up",
            bed.layout.netns(&outside).display()
        ));
        bed.inside(&outside, || {
            let script = "ip link set lo up; ip addr add 198.51.100.2/24 dev out1; ip link set out1 up";
            assert!(std::process::Command::new("sh").args(["-c", script]).status().unwrap().success());
            Rtnl::open().unwrap().carrying("out1").unwrap();
            serve("198.51.100.2:80");
        })
        .await;
        Rtnl::open().unwrap().carrying("out0").unwrap();
        let network = bed.open(Config::default()).await;
        let pod = attach(&network, 1).await;
        assert_eq!(bed.inside(&pod[0].0, || ask("198.51.100.2:80").unwrap()).await, "198.51.100.1");
        // From outside to a host port, the pod sees who it is.
        let spec = with_port(Protocol::Tcp, "", 8080, 80);
        let server = pod_with(&bed, &network, &spec).await;
        assert_eq!(bed.inside(&outside, || ask("198.51.100.1:8080").unwrap()).await, "198.51.100.2");
        // With masquerading off there is no way back.
        network.recover(&[]).await.unwrap();
        network.teardown().await.unwrap();
        assert!(!bed.layout.netns(&server).exists());
    });
}

#[test]
fn pods_do_not_reach_the_hosts_loopback() {
    host(|bed| async move {
        let network = bed.open(Config::default()).await;
        // A host port, so that route_localnet is on.
        let pod = pod_with(&bed, &network, &with_port(Protocol::Tcp, "", 8080, 80)).await;
        serve("127.0.0.1:7000");
        bed.inside(&pod, || {
            // What a pod with NET_ADMIN could do: its own 127.0.0.0/8 leads out to the host.
            let script = "set -ex; ip addr flush dev lo;
                          echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; ip route add 127.0.0.1/32 via 10.88.0.1 src 10.88.0.2";
            assert!(std::process::Command::new("sh").args(["-c", script]).status().unwrap().success());
        })
        .await;
        assert!(bed.inside(&pod, || ask("127.0.0.1:7000")).await.is_err());
        // The control: it is the guard that keeps them out.
        bed.run("nft flush chain inet mesocri0 guard");
        assert_eq!(bed.inside(&pod, || ask("127.0.0.1:7000").unwrap()).await, "10.88.0.2");
        network.detach(&pod, &spec()).await.unwrap();
        network.teardown().await.unwrap();
    });
}

#[test]
fn the_rules_are_what_nft_would_have_made() {
    host(|bed| async move {
        let subnets: Vec<Subnet> = vec!["10.88.0.0/16".parse().unwrap(), "fd88::/64".parse().unwrap()];
        let plan = Plan { bridge: "br0", subnets: &subnets, masquerade: true };
        let mut nft = Nft::open().unwrap();
        let target: IpAddr = "10.88.0.2".parse().unwrap();
        let one = Forward { protocol: Protocol::Sctp, host_ip: Some("192.0.2.1".parse().unwrap()), host_port: 9, target, port: 10 };
        for _ in 0..2 {
            nft.install(&plan, std::slice::from_ref(&one)).unwrap();
        }
        let rules = bed.run("nft list table inet br0");
        for line in [
            "type inet_proto . inet_service : ipv4_addr . inet_service",
            "type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service",
            "elements = { 192.0.2.1 . sctp . 9 : 10.88.0.2 . 10 }",
            "type nat hook prerouting priority dstnat; policy accept;",
            "type filter hook prerouting priority raw; policy accept;",
            "iifname \"br0\" ip daddr 127.0.0.0/8 drop",
            "fib daddr type local dnat ip to ip daddr . meta l4proto . th dport map @ports4_at",
            "fib daddr type local dnat ip to meta l4proto . th dport map @ports4",
            "ip saddr 10.88.0.0/16 oifname != \"br0\" ip daddr != 224.0.0.0/4 masquerade",
            "ip saddr 10.88.0.0/16 oifname \"br0\" ct status dnat masquerade",
            "ip6 saddr fd88::/64 oifname != \"br0\" ip6 daddr != ff00::/8 masquerade",
            "oifname \"br0\" ip saddr 127.0.0.0/8 masquerade",
        ] {
            assert!(rules.contains(line), "{line} is not in\n{rules}");
        }
        assert!(nft.add("br0", std::slice::from_ref(&one)).unwrap(), "the same again is fine");
        let missing = Forward { host_port: 11, ..one.clone() };
        nft.remove("br0", &[missing, one.clone()]).unwrap();
        assert!(!bed.run("nft list table inet br0").contains("elements"));
        nft.delete("br0").unwrap();
        nft.delete("br0").unwrap();
        assert!(!nft.add("br0", std::slice::from_ref(&one)).unwrap());
        nft.remove("br0", &[one]).unwrap();
    });
}

/// The kernel switches a new interface on in its own time (link watch). A pod whose network is not carrying yet when it is told
/// ready loses its first packet, and TCP then waits a whole second.
#[test]
fn the_first_packets_of_a_pod_are_not_lost() {
    host(|bed| async move {
        let mut config = Config::default();
        config.bridge.cleanup_when_idle = true;
        let network = bed.open(config).await;
        for round in 0..20 {
            let pod = PodId::random();
            network.attach(&pod, &spec()).await.unwrap();
            let server = UdpSocket::bind("10.88.0.1:7").unwrap();
            server.set_read_timeout(Some(Duration::from_millis(900))).unwrap();
            bed.inside(&pod, move || UdpSocket::bind("0.0.0.0:7").unwrap().send_to(&[round], "10.88.0.1:7").unwrap()).await;
            assert_eq!(server.recv(&mut [0; 2]).map_err(|e| format!("round {round}: {e}")), Ok(1));
            network.detach(&pod, &spec()).await.unwrap();
        }
        network.teardown().await.unwrap();
    });
}
