//! Our resources as the OCI says them: one translation for the launch plan and for updates.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxPids, LinuxResources};

use crate::model::resources::Resources;

/// `None` stays unset. A memory limit without a swap limit sets memory+swap to the same, which is: no swap (cri-behaviour §12).
/// `oom_score_adj` is not part of it (it belongs to the process), device rules are nobody's here.
pub fn to_oci(r: &Resources) -> LinuxResources {
    let mut out = LinuxResources::default();
    out.set_devices(None);
    if r.cpu_period.is_some() || r.cpu_quota.is_some() || r.cpu_shares.is_some() || r.cpuset_cpus.is_some() || r.cpuset_mems.is_some() {
        let mut cpu = LinuxCpu::default();
        cpu.set_period(r.cpu_period).set_quota(r.cpu_quota).set_shares(r.cpu_shares);
        cpu.set_cpus(r.cpuset_cpus.clone()).set_mems(r.cpuset_mems.clone());
        out.set_cpu(Some(cpu));
    }
    if r.memory_limit.is_some() || r.memory_swap.is_some() {
        let mut memory = LinuxMemory::default();
        memory.set_limit(r.memory_limit).set_swap(r.memory_swap.or(r.memory_limit));
        out.set_memory(Some(memory));
    }
    if let Some(limit) = r.pids_limit {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        out.set_pids(Some(pids));
    }
    if !r.hugepage_limits.is_empty() {
        let limit = |(size, bytes): (&String, &u64)| {
            let mut l = LinuxHugepageLimit::default();
            l.set_page_size(size.clone()).set_limit(i64::try_from(*bytes).unwrap_or(i64::MAX));
            l
        };
        out.set_hugepage_limits(Some(r.hugepage_limits.iter().map(limit).collect()));
    }
    if !r.unified.is_empty() {
        out.set_unified(Some(r.unified.clone().into_iter().collect()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_said_is_nothing_set() {
        let out = to_oci(&Resources::default());
        assert!(out.cpu().is_none() && out.memory().is_none() && out.pids().is_none() && out.devices().is_none());
        assert!(out.unified().is_none() && out.hugepage_limits().is_none());
    }

    #[test]
    fn swap_follows_memory() {
        let swap = |limit, swap| to_oci(&Resources { memory_limit: limit, memory_swap: swap, ..Resources::default() }).memory().and_then(|m| m.swap());
        assert_eq!(swap(Some(5), None), Some(5));
        assert_eq!(swap(Some(5), Some(9)), Some(9));
        assert_eq!(swap(Some(5), Some(-1)), Some(-1));
    }
}
