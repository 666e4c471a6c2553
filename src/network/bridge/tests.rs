//! The built-in bridge for real, each test on a host of its own (network and mount namespaces).

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::model::error::Kind;
use crate::model::{PodId, PodSpec};
use crate::network::testbed::{Bed, attach, host, spec};
use crate::network::{Choice, Config, Network, netns};

/// Names itself `text` to everyone who connects to `address` inside `pod`, once per entry of `times`.
async fn serve(bed: &Bed, pod: &PodId, port: u16, times: usize, text: &'static str) {
    bed.inside(pod, move || {
        let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
        std::thread::spawn(move || {
            for _ in 0..times {
                listener.accept().unwrap().0.write_all(text.as_bytes()).unwrap();
            }
        });
    })
    .await;
}

fn ask(address: &str, port: u16) -> std::io::Result<String> {
    let address = (address.parse::<IpAddr>().unwrap(), port).into();
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn pods_reach_each_other_and_the_gateway_and_leave_nothing() {
    host(|bed| async move {
        let mut config = Config::default();
        config.bridge.cleanup_when_idle = true;
        let network = bed.open(config).await;
        let before = bed.traces();
        let pods = attach(&network, 2).await;
        assert_eq!(pods[0].1, "10.88.0.2");
        assert_eq!(pods[1].1, "10.88.0.3");

        serve(&bed, &pods[1].0, 80, 2, "second").await;
        let (gateway, target) = ("10.88.0.1", pods[1].1.clone());
        let listener = TcpListener::bind((gateway, 81)).unwrap();
        std::thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            stream.write_all(peer.ip().to_string().as_bytes()).unwrap();
        });
        let (from_pod, from_gateway) = bed.inside(&pods[0].0, move || (ask(&target, 80).unwrap(), ask(gateway, 81).unwrap())).await;
        assert_eq!((from_pod.as_str(), from_gateway.as_str()), ("second", "10.88.0.2"));
        assert_eq!(ask(&pods[1].1, 80).unwrap(), "second");
        // The loopback works inside, and is up.
        bed.inside(&pods[0].0, || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        })
        .await;

        let stats = network.stats(&pods[1].0).await.unwrap();
        assert_eq!(stats.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["eth0"]);
        assert!(stats[0].rx_packets > 5 && stats[0].tx_bytes > 100, "{stats:?}");

        for (pod, _) in &pods {
            network.detach(pod, &spec()).await.unwrap();
            network.detach(pod, &spec()).await.unwrap();
        }
        bed.settle(&before).await;
        assert_eq!(network.stats(&pods[0].0).await.unwrap_err().kind, Kind::NotFound);
    });
}

#[test]
fn both_families_without_waiting_for_address_detection() {
    host(|bed| async move {
        let mut config = Config::default();
        config.bridge.subnets = vec!["10.9.0.0/24".parse().unwrap(), "fd09::/64".parse().unwrap()];
        config.bridge.mtu = 1400;
        let network = bed.open(config).await;
        let before = bed.traces();
        let (a, b) = (PodId::random(), PodId::random());
        network.attach(&a, &spec()).await.unwrap();
        let got = network.attach(&b, &spec()).await.unwrap();
        assert_eq!(got.ips, ["10.9.0.3", "fd09::3"]);
        assert_eq!(got.network, "mesocri");
        bed.inside(&b, || {
            let listener = TcpListener::bind("[fd09::3]:80").unwrap();
            std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"six").unwrap());
        })
        .await;
        let (text, mtu) =
            bed.inside(&a, || (ask("fd09::3", 80).unwrap(), std::process::Command::new("ip").args(["link", "show", "eth0"]).output().unwrap())).await;
        assert_eq!(text, "six");
        assert!(String::from_utf8(mtu.stdout).unwrap().contains("mtu 1400"));
        for pod in [&a, &b] {
            network.detach(pod, &spec()).await.unwrap();
        }
        network.teardown().await.unwrap();
        bed.settle(&before).await;
    });
}

#[test]
fn many_at_once_get_addresses_of_their_own() {
    host(|bed| async move {
        let network = bed.open(Config::default()).await;
        let before = bed.traces();
        let tasks: Vec<_> = (0..20)
            .map(|_| {
                let network = network.clone();
                tokio::spawn(async move {
                    let pod = PodId::random();
                    let attachment = network.attach(&pod, &spec()).await.unwrap();
                    (pod, attachment.ips[0].clone())
                })
            })
            .collect();
        let mut pods = Vec::new();
        for task in tasks {
            pods.push(task.await.unwrap());
        }
        let mut addresses: Vec<_> = pods.iter().map(|(_, a)| a.clone()).collect();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len(), 20);
        assert_eq!(bed.run("ip -br link show master mesocri0 | wc -l").trim(), "20");
        let tasks: Vec<_> = pods
            .into_iter()
            .map(|(pod, _)| {
                let network = network.clone();
                tokio::spawn(async move { network.detach(&pod, &spec()).await.unwrap() })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        network.teardown().await.unwrap();
        bed.settle(&before).await;
    });
}

#[test]
fn leases_outlive_the_daemon_and_strays_are_freed() {
    host(|bed| async move {
        let pods = attach(&*bed.open(Config::default()).await, 3).await;
        let network = bed.open(Config::default()).await;
        // Not given again, though this daemon never saw them attached.
        let new = attach(&network, 1).await;
        assert_eq!(new[0].1, "10.88.0.5");
        assert_eq!(network.teardown().await.unwrap_err().kind, Kind::FailedPrecondition);
        // A crash between the record and the namespace, and one between the namespace and the interfaces.
        netns::remove(&bed.layout.netns(&pods[0].0)).unwrap();
        bed.run("ip link del mesocri0");
        let stray = bed.layout.netns(&PodId::random());
        netns::on_thread(move || netns::unshare_and_pin(&stray)).await.unwrap();
        std::fs::write(bed.layout.netns(&PodId::random()), "").unwrap();

        network.recover(std::slice::from_ref(&pods[2].0)).await.unwrap();
        let left = bed.traces();
        assert!(left.contains(pods[2].0.as_str()) && !left.contains(pods[1].0.as_str()), "{left}");
        assert_eq!(std::fs::read_dir(&bed.layout.netns).unwrap().count(), 1);
        // Someone removed the bridge: the next pod gets a new one.
        let new = attach(&network, 1).await;
        assert_eq!(bed.run("ip -br link show master mesocri0 | wc -l").trim(), "1");
        network.recover(&[]).await.unwrap();
        network.teardown().await.unwrap();
        assert_eq!(std::fs::read_dir(&bed.layout.netns).unwrap().count(), 0);
        assert!(!bed.traces().contains(new[0].0.as_str()));
    });
}

#[test]
fn a_failed_attach_is_undone_and_says_why() {
    host(|bed| async move {
        let before_all = bed.traces();
        bed.run("ip link add mesocri0 type veth peer name other0");
        let before = bed.traces();
        let network = bed.open(Config::default()).await;
        let error = network.attach(&PodId::random(), &spec()).await.unwrap_err();
        assert_eq!(error.to_string(), "use bridge mesocri0: a link of that name exists and is no bridge");
        assert_eq!(bed.traces(), before);
        bed.run("ip link del mesocri0");

        // A pin that is not ours stays.
        let pod = PodId::random();
        let pin = bed.layout.netns(&pod);
        std::fs::create_dir_all(pin.parent().unwrap()).unwrap();
        std::fs::write(&pin, "foreign").unwrap();
        assert_eq!(network.attach(&pod, &spec()).await.unwrap_err().kind, Kind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&pin).unwrap(), "foreign");
        std::fs::remove_file(&pin).unwrap();

        // The kernel's own words come back and nothing stays.
        let mut config = Config::default();
        config.bridge.mtu = 70_000;
        config.bridge.bridge = "mesocri1".into();
        let narrow = bed.open(config).await;
        let error = narrow.attach(&pod, &spec()).await.unwrap_err().to_string();
        assert!(error.starts_with("create bridge mesocri1 (mtu greater than device maximum): Invalid argument"), "{error}");
        assert!(!bed.traces().contains(pod.as_str()) && !pin.exists());
        network.attach(&pod, &spec()).await.unwrap();
        assert_eq!(network.attach(&pod, &spec()).await.unwrap_err().kind, Kind::AlreadyExists);
        assert!(pin.exists());
        network.detach(&pod, &spec()).await.unwrap();
        network.teardown().await.unwrap();
        bed.settle(&before_all).await;
    });
}

#[test]
fn an_address_is_taken_from_a_holder_that_will_not_go() {
    host(|bed| async move {
        let mut config = Config::default();
        // Room for one pod, so that the address comes back at once.
        config.bridge.subnets = vec!["10.9.0.0/30".parse().unwrap()];
        let network = bed.open(config).await;
        let old = attach(&network, 1).await;
        let (stay, stayed) = std::sync::mpsc::channel::<()>();
        bed.inside(&old[0].0, || std::thread::spawn(move || stayed.recv())).await;
        network.detach(&old[0].0, &spec()).await.unwrap();
        assert!(bed.traces().contains("mc0a090002"), "the thread keeps the namespace and its interface");

        let new = attach(&network, 1).await;
        assert_eq!(new[0].1, old[0].1);
        serve(&bed, &new[0].0, 80, 1, "new").await;
        assert_eq!(ask(&new[0].1, 80).unwrap(), "new");
        drop(stay);
        network.detach(&new[0].0, &spec()).await.unwrap();
        network.teardown().await.unwrap();
    });
}

#[test]
fn the_pod_range_can_be_given_and_outlives_the_daemon() {
    host(|bed| async move {
        let network = bed.open(Config::default()).await;
        let old = attach(&network, 1).await;
        for bad in ["", "10.0.0.0", "10.1.0.0/24,10.2.0.0/24", "10.1.0.0/24,", "nonsense/8"] {
            assert_eq!(network.set_pod_cidr(bad).await.unwrap_err().kind, Kind::InvalidArgument, "{bad}");
        }
        network.set_pod_cidr("10.77.1.0/24").await.unwrap();
        let network = bed.open(Config::default()).await;
        let new = attach(&network, 1).await;
        assert_eq!(new[0].1, "10.77.1.2");
        // The old pod still has its gateway, and by it reaches the new one.
        serve(&bed, &new[0].0, 80, 1, "new").await;
        assert_eq!(bed.inside(&old[0].0, || ask("10.77.1.2", 80).unwrap()).await, "new");
        network.recover(&[]).await.unwrap();
        network.teardown().await.unwrap();
    });
}

#[test]
fn without_a_network_there_is_a_loopback_only() {
    host(|bed| async move {
        let network = bed.open(Config { network: Choice::None, ..Config::default() }).await;
        let before = bed.traces();
        let pod = PodId::random();
        assert!(network.attach(&pod, &spec()).await.unwrap().ips.is_empty());
        bed.inside(&pod, || TcpListener::bind("127.0.0.1:0").map(|l| TcpStream::connect(l.local_addr().unwrap()).unwrap()).unwrap()).await;
        assert!(network.stats(&pod).await.unwrap().is_empty());
        // Another configuration later does not confuse the detach.
        let network = bed.open(Config::default()).await;
        network.detach(&pod, &spec()).await.unwrap();
        assert_eq!(bed.traces(), before);
        // The host's own network is nothing to attach.
        let mut node = PodSpec::default();
        node.namespaces.network = crate::model::pod::NamespaceMode::Node;
        network.attach(&pod, &node).await.unwrap();
        network.detach(&pod, &node).await.unwrap();
        assert_eq!(bed.traces(), before);
    });
}

#[test]
fn an_attach_and_detach_is_cheap() {
    host(|bed| async move {
        let network = bed.open(Config::default()).await;
        let keep = attach(&network, 1).await;
        let (mut attaches, mut detaches) = (Vec::new(), Vec::new());
        for _ in 0..40 {
            let pod = PodId::random();
            let start = Instant::now();
            network.attach(&pod, &spec()).await.unwrap();
            attaches.push(start.elapsed());
            let start = Instant::now();
            network.detach(&pod, &spec()).await.unwrap();
            detaches.push(start.elapsed());
        }
        attaches.sort();
        detaches.sort();
        println!("attach median {:?}, detach median {:?}", attaches[20], detaches[20]);
        // Budgets are for the benchmark. Here only what no busy machine does: half a second for one of forty.
        assert!(attaches[20] < Duration::from_millis(500), "{attaches:?}");
        network.detach(&keep[0].0, &spec()).await.unwrap();
        network.teardown().await.unwrap();
    });
}
