//! Pods as asked for (cri-behaviour §5).

use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use crate::model::PodSpec;
use crate::model::error::{Error, Result};
use crate::model::pod::{Dns, NamespaceMode, PodMetadata, PortMapping, Protocol};
use crate::wire::cri as wire;

use super::{choice, filled, one_line, required, resources, security};

/// Longest host name the kernel takes (`HOST_NAME_MAX`, `sethostname(2)`).
const MAX_HOSTNAME: usize = 64;

/// A pod from its request.
///
/// # Errors
/// `InvalidArgument`; `Unimplemented` for user namespaces.
pub fn from_wire(config: wire::PodSandboxConfig, runtime_handler: String) -> Result<PodSpec> {
    let metadata = metadata(required(config.metadata, "config.metadata")?)?;
    let linux = config.linux.unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    let (privileged, readonly_rootfs) = (context.privileged, context.readonly_rootfs);
    let namespaces = security::of_pod(context)?;
    check_hostname(&config.hostname, &namespaces.network)?;
    check_cgroup_parent(&linux.cgroup_parent)?;
    Ok(PodSpec {
        metadata,
        hostname: config.hostname,
        log_directory: log_directory(config.log_directory)?,
        dns: config.dns_config.map(dns).transpose()?.filter(|dns| *dns != Dns::default()),
        port_mappings: config.port_mappings.into_iter().map(port_mapping).collect::<Result<_>>()?,
        labels: config.labels,
        annotations: config.annotations,
        cgroup_parent: linux.cgroup_parent,
        namespaces,
        sysctls: linux.sysctls,
        privileged,
        readonly_rootfs,
        runtime_handler,
        resources: linux.resources.map(resources::from_wire).transpose()?,
        overhead: linux.overhead.map(resources::from_wire).transpose()?,
    })
}

/// Clients refuse a pod whose status lacks one of the three, so it must not come into being.
fn metadata(wire: wire::PodSandboxMetadata) -> Result<PodMetadata> {
    Ok(PodMetadata {
        name: filled(wire.name, "metadata.name")?,
        uid: filled(wire.uid, "metadata.uid")?,
        namespace: filled(wire.namespace, "metadata.namespace")?,
        attempt: wire.attempt,
    })
}

fn check_hostname(hostname: &str, network: &NamespaceMode) -> Result<()> {
    if hostname.is_empty() {
        return Ok(());
    }
    if *network == NamespaceMode::Node {
        return Err(Error::invalid("a pod in the host's network cannot have a hostname of its own"));
    }
    if hostname.len() > MAX_HOSTNAME || hostname.contains(|c: char| c.is_control() || c.is_whitespace() || c == '/') {
        return Err(Error::invalid(format!("malformed hostname {hostname:?}")));
    }
    Ok(())
}

fn check_cgroup_parent(parent: &str) -> Result<()> {
    one_line(parent, "cgroup_parent")?;
    if Path::new(parent).components().any(|c| c == Component::ParentDir) {
        return Err(Error::invalid(format!("cgroup_parent must not contain \"..\": {parent:?}")));
    }
    Ok(())
}

fn log_directory(path: String) -> Result<Option<PathBuf>> {
    if path.is_empty() {
        return Ok(None);
    }
    one_line(&path, "log_directory")?;
    if path.starts_with('/') { Ok(Some(PathBuf::from(path))) } else { Err(Error::invalid(format!("log_directory is not absolute: {path:?}"))) }
}

fn dns(wire: wire::DnsConfig) -> Result<Dns> {
    for text in wire.servers.iter().chain(&wire.searches).chain(&wire.options) {
        // Each becomes part of a line of resolv.conf.
        one_line(text, "dns_config")?;
    }
    Ok(Dns { servers: wire.servers, searches: wire.searches, options: wire.options })
}

fn port_mapping(wire: wire::PortMapping) -> Result<PortMapping> {
    let port = |value: i32, field: &str| u16::try_from(value).map_err(|_| Error::invalid(format!("port_mappings: {field} is no port: {value}")));
    if !wire.host_ip.is_empty() && wire.host_ip.parse::<IpAddr>().is_err() {
        return Err(Error::invalid(format!("port_mappings: host_ip is no address: {:?}", wire.host_ip)));
    }
    let protocol = match choice(wire.protocol, "port_mappings: protocol")? {
        wire::Protocol::Tcp => Protocol::Tcp,
        wire::Protocol::Udp => Protocol::Udp,
        wire::Protocol::Sctp => Protocol::Sctp,
    };
    Ok(PortMapping {
        protocol,
        container_port: port(wire.container_port, "container_port")?,
        host_port: port(wire.host_port, "host_port")?,
        host_ip: wire.host_ip,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    fn config() -> wire::PodSandboxConfig {
        wire::PodSandboxConfig {
            metadata: Some(wire::PodSandboxMetadata { name: "n".into(), uid: "u".into(), namespace: "ns".into(), attempt: 2 }),
            hostname: "web-0".into(),
            log_directory: "/var/log/pods/x".into(),
            dns_config: Some(wire::DnsConfig::default()),
            port_mappings: vec![wire::PortMapping { protocol: 1, container_port: 53, host_port: 0, host_ip: "::1".into() }],
            labels: [("a".to_owned(), "b".to_owned())].into(),
            annotations: [("c".to_owned(), String::new())].into(),
            linux: Some(wire::LinuxPodSandboxConfig { cgroup_parent: "/kubepods/podu".into(), ..Default::default() }),
            windows: None,
        }
    }

    fn network_node(config: &mut wire::PodSandboxConfig) {
        let options = wire::NamespaceOption { network: wire::NamespaceMode::Node.into(), ..Default::default() };
        let context = wire::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        config.linux = Some(wire::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() });
    }

    #[test]
    fn takes_everything_over() {
        let spec = from_wire(config(), "kata".into()).unwrap();
        assert_eq!(spec.metadata, PodMetadata { name: "n".into(), uid: "u".into(), namespace: "ns".into(), attempt: 2 });
        assert_eq!(spec.dns, None, "an empty one means the host's");
        assert_eq!(spec.port_mappings, [PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 0, host_ip: "::1".into() }]);
        assert_eq!((spec.labels, spec.annotations), (config().labels, config().annotations));
        assert_eq!((spec.cgroup_parent.as_str(), spec.runtime_handler.as_str()), ("/kubepods/podu", "kata"));
    }

    #[test]
    fn refuses_what_means_nothing() {
        type Change = fn(&mut wire::PodSandboxConfig);
        let changes: &[(&str, Change)] = &[
            ("no metadata", |c| c.metadata = None),
            ("no name", |c| c.metadata = Some(wire::PodSandboxMetadata { name: String::new(), ..c.metadata.clone().unwrap() })),
            ("no uid", |c| c.metadata = Some(wire::PodSandboxMetadata { uid: String::new(), ..c.metadata.clone().unwrap() })),
            ("hostname in the host's network", network_node),
            ("hostname of two lines", |c| c.hostname = "a\nb".into()),
            ("port", |c| c.port_mappings[0].host_port = 65536),
            ("negative port", |c| c.port_mappings[0].container_port = -1),
            ("protocol", |c| c.port_mappings[0].protocol = 7),
            ("host ip", |c| c.port_mappings[0].host_ip = "localhost".into()),
            ("log directory", |c| c.log_directory = "logs".into()),
            ("dns", |c| c.dns_config = Some(wire::DnsConfig { servers: vec!["1.1.1.1\noptions x".into()], ..Default::default() })),
            ("cgroup parent", |c| c.linux.as_mut().unwrap().cgroup_parent = "/kubepods/../..".into()),
        ];
        for (what, change) in changes {
            let mut config = config();
            change(&mut config);
            assert_eq!(from_wire(config, String::new()).expect_err(what).kind, Kind::InvalidArgument, "{what}");
        }
    }
}
