//! What a front asks for when it asks for a pod, free of any wire protocol.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::resources::Resources;

/// Whose namespace a pod or container uses (CRI `NamespaceMode`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamespaceMode {
    /// The pod's.
    #[default]
    Pod,
    /// Its own.
    Container,
    /// The host's.
    Node,
    /// That of the container with this id (process namespace only).
    Target(String),
}

/// Namespace choices of a pod or container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespaces {
    /// Network: `Pod` or `Node`.
    pub network: NamespaceMode,
    /// Processes: any mode.
    pub pid: NamespaceMode,
    /// SysV IPC and POSIX queues: `Pod` or `Node`.
    pub ipc: NamespaceMode,
}

/// Name of a pod. The four parts together are unique among live pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodMetadata {
    /// Pod name.
    pub name: String,
    /// Unique id given by the orchestrator.
    pub uid: String,
    /// Namespace of the orchestrator (not a kernel one).
    pub namespace: String,
    /// How often the orchestrator made it before.
    pub attempt: u32,
}

/// DNS configuration. All empty: the host's file is copied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// The `search` line.
    pub searches: Vec<String>,
    /// The `options` line.
    pub options: Vec<String>,
}

/// Transport of a port mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Lower-case name, as CNI's portMappings capability writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// A port of the pod that is reachable on the host. Only made for `host_port` > 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Transport.
    pub protocol: Protocol,
    /// Port inside the pod.
    pub container_port: u16,
    /// Port on the host; 0 is none.
    pub host_port: u16,
    /// Host address to bind, empty for all.
    pub host_ip: String,
}

/// A pod, as asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodSpec {
    /// Name.
    pub metadata: PodMetadata,
    /// Host name inside; empty with the host network.
    pub hostname: String,
    /// Directory of the container logs; `None` turns logs off.
    pub log_directory: Option<PathBuf>,
    /// DNS configuration; `None` copies the host's.
    pub dns: Option<Dns>,
    /// Ports on the host.
    pub port_mappings: Vec<PortMapping>,
    /// Labels, kept byte for byte.
    pub labels: BTreeMap<String, String>,
    /// Annotations, kept byte for byte.
    pub annotations: BTreeMap<String, String>,
    /// Parent cgroup as the caller names it (`/kubepods/…` or `….slice`); empty: the daemon's default.
    pub cgroup_parent: String,
    /// Namespaces.
    pub namespaces: Namespaces,
    /// Kernel parameters of the pod's own namespaces, `net.ipv4.x` form.
    pub sysctls: BTreeMap<String, String>,
    /// Allows privileged containers in it.
    pub privileged: bool,
    /// Root file system of helper processes is read-only (sandbox security context).
    pub readonly_rootfs: bool,
    /// Handler name as requested, verbatim; empty is the default.
    pub runtime_handler: String,
    /// Resources of the pod as a whole, informative (cri: UpdatePodSandboxResources).
    pub resources: Option<Resources>,
    /// Overhead of the pod, informative.
    pub overhead: Option<Resources>,
}
