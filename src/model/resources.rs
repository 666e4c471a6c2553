//! Limits of a container, in the kernel's units. `None` and empty mean "not said": on create no limit, on update unchanged
//! (cri-behaviour §12: zero in UpdateContainerResources keeps what is set).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Limits and weights. Fronts turn wire zeros into `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// CFS period, microseconds.
    pub cpu_period: Option<u64>,
    /// CFS quota, microseconds per period; -1 is unlimited.
    pub cpu_quota: Option<i64>,
    /// Relative weight, cgroup v1 scale (2..=262144).
    pub cpu_shares: Option<u64>,
    /// Memory limit, bytes; -1 is unlimited.
    pub memory_limit: Option<i64>,
    /// Memory plus swap limit, bytes; -1 is unlimited. `None` with a memory limit means equal to it (no swap).
    pub memory_swap: Option<i64>,
    /// `oom_score_adj` of the first process, -1000..=1000.
    pub oom_score_adj: Option<i64>,
    /// CPU list, `0-3,7`.
    pub cpuset_cpus: Option<String>,
    /// NUMA node list.
    pub cpuset_mems: Option<String>,
    /// Processes and threads; -1 is unlimited.
    pub pids_limit: Option<i64>,
    /// Page size as the kernel names it (`2MB`) to bytes.
    pub hugepage_limits: BTreeMap<String, u64>,
    /// Raw cgroup v2 files; ignored on v1.
    pub unified: BTreeMap<String, String>,
}

impl Resources {
    /// What holds after `update` was applied on top of `self`: set fields replace, unset ones stay; a memory limit without a
    /// swap limit takes swap along (cri-behaviour §12).
    #[must_use]
    pub fn updated_by(&self, update: &Resources) -> Resources {
        let mut merged = self.clone();
        macro_rules! take {
            ($($field:ident),*) => { $( if update.$field.is_some() { merged.$field = update.$field.clone(); } )* };
        }
        take!(cpu_period, cpu_quota, cpu_shares, memory_limit, memory_swap, oom_score_adj, cpuset_cpus, cpuset_mems, pids_limit);
        if update.memory_limit.is_some() && update.memory_swap.is_none() {
            merged.memory_swap = None;
        }
        merged.hugepage_limits.extend(update.hugepage_limits.clone());
        merged.unified.extend(update.unified.clone());
        merged
    }

    /// What brings `self` back after `update` was applied: limits of which nothing was said before are lifted. Weights, lists and
    /// raw files that nothing was said of have no value that means so, and stay.
    #[must_use]
    pub fn taking_back(&self, update: &Resources) -> Resources {
        let mut former = self.clone();
        let lift = |former: &mut Option<i64>, now: Option<i64>| {
            if former.is_none() && now.is_some() {
                *former = Some(-1);
            }
        };
        lift(&mut former.cpu_quota, update.cpu_quota);
        lift(&mut former.memory_limit, update.memory_limit);
        lift(&mut former.memory_swap, update.memory_swap.or(update.memory_limit).filter(|_| self.memory_limit.is_none()));
        lift(&mut former.pids_limit, update.pids_limit);
        former
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_back_is_as_before_or_lifted() {
        let old = Resources { memory_limit: Some(5), cpu_shares: Some(7), ..Resources::default() };
        let update = Resources { memory_limit: Some(9), cpu_quota: Some(3), pids_limit: Some(4), ..Resources::default() };
        let back = old.taking_back(&update);
        assert_eq!(back, Resources { cpu_quota: Some(-1), pids_limit: Some(-1), ..old });
        let back = Resources::default().taking_back(&update);
        assert_eq!((back.memory_limit, back.memory_swap), (Some(-1), Some(-1)));
    }
}
