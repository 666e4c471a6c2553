//! Samples of use (cri-behaviour §15). Numbers are wrapped: what this host cannot say stays unset, which is not zero.

use std::path::Path;

use crate::containerizer::{Container, Pod};
use crate::model::image::FsUsage;
use crate::model::stats::{CgroupStats, InterfaceStats, Pressure, PressureLine};
use crate::wire::cri as wire;

/// Name of the interface that carries a pod's primary address (CNI convention).
const DEFAULT_INTERFACE: &str = "eth0";

fn some(value: u64) -> Option<wire::UInt64Value> {
    Some(wire::UInt64Value { value })
}

fn known(value: Option<u64>) -> Option<wire::UInt64Value> {
    value.map(|value| wire::UInt64Value { value })
}

fn pressure(pressure: Option<Pressure>) -> Option<wire::PsiStats> {
    let line = |line: PressureLine| Some(wire::PsiData { total: line.total, avg10: line.avg10, avg60: line.avg60, avg300: line.avg300 });
    pressure.map(|p| wire::PsiStats { full: line(p.full), some: line(p.some) })
}

/// CPU; `rate` in nanoseconds per second, once there are two samples.
pub fn cpu(stats: &CgroupStats, rate: Option<u64>) -> wire::CpuUsage {
    wire::CpuUsage { timestamp: stats.at, usage_core_nano_seconds: known(stats.cpu_usage), usage_nano_cores: known(rate), psi: pressure(stats.cpu_pressure) }
}

/// Memory.
pub fn memory(stats: &CgroupStats) -> wire::MemoryUsage {
    let available = stats.memory_limit.zip(stats.memory_working_set).map(|(limit, used)| limit.saturating_sub(used));
    wire::MemoryUsage {
        timestamp: stats.at,
        working_set_bytes: known(stats.memory_working_set),
        available_bytes: known(available),
        usage_bytes: known(stats.memory_usage),
        rss_bytes: known(stats.memory_rss),
        page_faults: known(stats.page_faults),
        major_page_faults: known(stats.major_page_faults),
        psi: pressure(stats.memory_pressure),
    }
}

/// Swap; unset where the kernel does not account for it.
pub fn swap(stats: &CgroupStats) -> Option<wire::SwapUsage> {
    stats.swap_usage.map(|used| wire::SwapUsage {
        timestamp: stats.at,
        swap_available_bytes: some(stats.swap_available.unwrap_or_default()),
        swap_usage_bytes: some(used),
    })
}

/// Input and output; only its pressure is known.
pub fn io(stats: &CgroupStats) -> wire::IoUsage {
    wire::IoUsage { timestamp: stats.at, psi: pressure(stats.io_pressure) }
}

/// Space on the file system of `dir`, counted at `at`.
pub fn filesystem(dir: &Path, usage: FsUsage, at: i64) -> wire::FilesystemUsage {
    wire::FilesystemUsage {
        timestamp: at,
        fs_id: Some(wire::FilesystemIdentifier { mountpoint: dir.to_string_lossy().into_owned() }),
        used_bytes: some(usage.bytes),
        inodes_used: some(usage.inodes),
    }
}

/// Interfaces of a pod: the default one apart from the others. `None` without any.
pub fn network(interfaces: &[InterfaceStats], at: i64) -> Option<wire::NetworkUsage> {
    let default = interfaces.iter().position(|i| i.name == DEFAULT_INTERFACE).unwrap_or(0);
    let mut all: Vec<_> = interfaces.iter().map(interface).collect();
    (!all.is_empty()).then(|| {
        let default_interface = Some(all.remove(default));
        wire::NetworkUsage { timestamp: at, default_interface, interfaces: all }
    })
}

fn interface(stats: &InterfaceStats) -> wire::NetworkInterfaceUsage {
    wire::NetworkInterfaceUsage {
        name: stats.name.clone(),
        rx_bytes: some(stats.rx_bytes),
        rx_errors: some(stats.rx_errors),
        tx_bytes: some(stats.tx_bytes),
        tx_errors: some(stats.tx_errors),
    }
}

/// Processes of a pod.
pub fn processes(stats: &CgroupStats) -> wire::ProcessUsage {
    wire::ProcessUsage { timestamp: stats.at, process_count: known(stats.pids) }
}

/// Whose sample it is. Clients read it without looking whether it is there.
pub fn container_attributes(container: &Container) -> wire::ContainerAttributes {
    let metadata = &container.spec.metadata;
    wire::ContainerAttributes {
        id: container.id.to_string(),
        metadata: Some(wire::ContainerMetadata { name: metadata.name.clone(), attempt: metadata.attempt }),
        labels: container.spec.labels.clone(),
        annotations: container.spec.annotations.clone(),
    }
}

/// The same for a pod.
pub fn pod_attributes(pod: &Pod) -> wire::PodSandboxAttributes {
    let item = super::status::pod_item(pod);
    wire::PodSandboxAttributes { id: item.id, metadata: item.metadata, labels: item.labels, annotations: item.annotations }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_is_unset_and_limits_give_what_is_left() {
        let stats = CgroupStats { at: 5, memory_working_set: Some(30), memory_limit: Some(100), ..Default::default() };
        let memory = memory(&stats);
        assert_eq!((memory.available_bytes, memory.usage_bytes, memory.psi), (some(70), None, None));
        assert_eq!(super::memory(&CgroupStats { memory_limit: None, ..stats.clone() }).available_bytes, None);
        assert_eq!(swap(&stats), None);
        assert_eq!(cpu(&stats, None).usage_nano_cores, None);
    }

    #[test]
    fn the_default_interface_stands_alone() {
        let named = |name: &str| InterfaceStats { name: name.into(), ..Default::default() };
        let usage = network(&[named("net1"), named("eth0")], 1).unwrap();
        assert_eq!(usage.default_interface.unwrap().name, "eth0");
        assert_eq!(usage.interfaces.iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["net1"]);
        assert_eq!(network(&[], 1), None);
    }
}
