//! Limits (cri-behaviour §12). Zero on the wire is "not said".

use crate::model::error::{Error, Result};
use crate::model::resources::Resources;
use crate::wire::cri as wire;

/// Limits of a request.
///
/// # Errors
/// `InvalidArgument` for numbers that mean nothing.
pub fn from_wire(wire: wire::LinuxContainerResources) -> Result<Resources> {
    let unsigned = |value: i64, field: &str| match value {
        0 => Ok(None),
        _ => u64::try_from(value).map(Some).map_err(|_| Error::invalid(format!("{field} is negative: {value}"))),
    };
    // -1 is "unlimited"; nothing else below zero has a meaning.
    let limit = |value: i64, field: &str| match value {
        0 => Ok(None),
        -1.. => Ok(Some(value)),
        _ => Err(Error::invalid(format!("{field} is negative: {value}"))),
    };
    if !(-1000..=1000).contains(&wire.oom_score_adj) {
        return Err(Error::invalid(format!("oom_score_adj is not within -1000 and 1000: {}", wire.oom_score_adj)));
    }
    let memory_limit = limit(wire.memory_limit_in_bytes, "memory_limit_in_bytes")?;
    let memory_swap = limit(wire.memory_swap_limit_in_bytes, "memory_swap_limit_in_bytes")?;
    if let (Some(memory @ 1..), Some(swap @ 1..)) = (memory_limit, memory_swap)
        && swap < memory
    {
        return Err(Error::invalid(format!("memory_swap_limit_in_bytes {swap} includes memory and is below memory_limit_in_bytes {memory}")));
    }
    Ok(Resources {
        cpu_period: unsigned(wire.cpu_period, "cpu_period")?,
        cpu_quota: limit(wire.cpu_quota, "cpu_quota")?,
        cpu_shares: unsigned(wire.cpu_shares, "cpu_shares")?,
        memory_limit,
        memory_swap,
        oom_score_adj: Some(wire.oom_score_adj).filter(|adj| *adj != 0),
        cpuset_cpus: Some(wire.cpuset_cpus).filter(|list| !list.is_empty()),
        cpuset_mems: Some(wire.cpuset_mems).filter(|list| !list.is_empty()),
        pids_limit: None,
        // A zero entry is kept: the kubelet sends one per page size of the host, and it means none may be used.
        hugepage_limits: wire.hugepage_limits.into_iter().map(|h| (h.page_size, h.limit)).collect(),
        unified: wire.unified,
    })
}

/// Limits of a new container: as [`from_wire`], and the OOM score is always given, or the daemon's own would be inherited.
///
/// # Errors
/// As [`from_wire`].
pub fn for_create(wire: Option<wire::LinuxContainerResources>) -> Result<Resources> {
    let mut resources = from_wire(wire.unwrap_or_default())?;
    resources.oom_score_adj.get_or_insert(0);
    Ok(resources)
}

/// Limits in force, for status.
pub fn to_wire(resources: &Resources) -> wire::LinuxContainerResources {
    let signed = |value: Option<u64>| value.map_or(0, |v| i64::try_from(v).unwrap_or(i64::MAX));
    wire::LinuxContainerResources {
        cpu_period: signed(resources.cpu_period),
        cpu_quota: resources.cpu_quota.unwrap_or_default(),
        cpu_shares: signed(resources.cpu_shares),
        memory_limit_in_bytes: resources.memory_limit.unwrap_or_default(),
        oom_score_adj: resources.oom_score_adj.unwrap_or_default(),
        cpuset_cpus: resources.cpuset_cpus.clone().unwrap_or_default(),
        cpuset_mems: resources.cpuset_mems.clone().unwrap_or_default(),
        hugepage_limits: resources.hugepage_limits.iter().map(|(size, limit)| wire::HugepageLimit { page_size: size.clone(), limit: *limit }).collect(),
        unified: resources.unified.clone(),
        memory_swap_limit_in_bytes: resources.memory_swap.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> wire::LinuxContainerResources {
        wire::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: -1,
            cpu_shares: 512,
            memory_limit_in_bytes: 1 << 30,
            oom_score_adj: -997,
            cpuset_cpus: "0-1".into(),
            cpuset_mems: "0".into(),
            hugepage_limits: vec![wire::HugepageLimit { page_size: "2MB".into(), limit: 0 }],
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            memory_swap_limit_in_bytes: 1 << 31,
        }
    }

    #[test]
    fn round_trips() {
        assert_eq!(to_wire(&from_wire(full()).unwrap()), full());
    }

    #[test]
    fn zero_is_not_said() {
        assert_eq!(from_wire(wire::LinuxContainerResources::default()).unwrap(), Resources::default());
        assert_eq!(for_create(None).unwrap(), Resources { oom_score_adj: Some(0), ..Resources::default() });
    }

    #[test]
    fn nonsense_is_refused() {
        type Resources = wire::LinuxContainerResources;
        for (what, bad) in [
            ("shares", Resources { cpu_shares: -1, ..full() }),
            ("period", Resources { cpu_period: -5, ..full() }),
            ("quota", Resources { cpu_quota: -2, ..full() }),
            ("memory", Resources { memory_limit_in_bytes: i64::MIN, ..full() }),
            ("swap", Resources { memory_swap_limit_in_bytes: (1 << 30) - 1, ..full() }),
            ("oom", Resources { oom_score_adj: 1001, ..full() }),
        ] {
            assert_eq!(from_wire(bad).unwrap_err().kind, crate::model::Kind::InvalidArgument, "{what}");
        }
    }
}
