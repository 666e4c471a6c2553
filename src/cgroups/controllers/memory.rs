//! Memory and swap.
//!
//! v1 limits memory and memory+swap (`memsw`) and insists on memory <= memsw at every moment; v2 limits memory and swap apart.
//! OCI and CRI give memory+swap, so v2 gets the difference.

use oci_spec::runtime::{LinuxMemory, LinuxResources};

use super::{Detail, Row};
use crate::cgroups::file::{Group, Reader, keys};
use crate::cgroups::host::{Controller, Version};
use crate::model::error::{Error, Result};
use crate::model::stats::CgroupStats;

pub(super) const MEMORY: Row = Row { controller: Controller::Memory, wanted, required: true, apply_v1, apply_v2, stats_v1, stats_v2 };

const LIMIT: &str = "memory.limit_in_bytes";
const MEMSW: &str = "memory.memsw.limit_in_bytes";

/// A v1 limit at or above this is "none": the kernel rounds `-1` to the largest multiple of the page size (cri-behaviour §15).
const UNLIMITED: u64 = 1 << 62;

fn set(value: Option<i64>) -> Option<i64> {
    value.filter(|v| *v != 0)
}

fn wanted(r: &LinuxResources) -> bool {
    r.memory().as_ref().is_some_and(|m| {
        set(m.limit()).is_some() || set(m.swap()).is_some() || set(m.reservation()).is_some() || m.swappiness().is_some() || m.disable_oom_killer().is_some()
    })
}

/// OCI `checkBeforeUpdate`: refuse a limit below what is used, instead of letting the kernel reclaim or kill.
fn check_use(group: &Group, memory: &LinuxMemory, usage_file: &str) -> Result<()> {
    if memory.check_before_update() != Some(true) {
        return Ok(());
    }
    match (memory.limit(), Reader::default().number(group, usage_file)) {
        (Some(limit), Some(used)) if limit > 0 && limit.unsigned_abs() < used => {
            Err(Error::precondition(format!("limit memory of {} to {limit} bytes: {used} are in use", group.dir().display())))
        }
        _ => Ok(()),
    }
}

fn apply_v1(group: &Group, r: &LinuxResources) -> Result<()> {
    let Some(memory) = r.memory() else { return Ok(()) };
    check_use(group, memory, "memory.usage_in_bytes")?;
    write_limits_v1(group, set(memory.limit()), set(memory.swap()))?;
    if let Some(reservation) = set(memory.reservation()) {
        group.write("memory.soft_limit_in_bytes", &reservation.to_string())?;
    }
    if let Some(swappiness) = memory.swappiness() {
        group.write("memory.swappiness", &swappiness.to_string())?;
    }
    if let Some(disable) = memory.disable_oom_killer() {
        group.write("memory.oom_control", if disable { "1" } else { "0" })?;
    }
    Ok(())
}

/// Which of the two v1 files is written first so that memory <= memsw holds in between: memsw, when the new memory limit would
/// not fit below the present memsw.
fn memsw_first(limit: Option<i64>, memsw_now: Option<u64>) -> bool {
    match (limit, memsw_now) {
        (Some(limit), Some(now)) if now < UNLIMITED => limit < 0 || limit.unsigned_abs() > now,
        _ => false,
    }
}

fn write_limits_v1(group: &Group, limit: Option<i64>, swap: Option<i64>) -> Result<()> {
    // No number there: this kernel does not account swap, and the swap limit is skipped.
    let memsw_now = Reader::default().number(group, MEMSW);
    let first = memsw_first(limit, memsw_now);
    // A limit above the present memsw without a word on swap can only be had by raising memsw too.
    let memsw = swap.or(limit.filter(|_| first)).filter(|_| memsw_now.is_some());
    let write_memsw = || memsw.map_or(Ok(()), |v| group.write(MEMSW, &v.to_string()));
    if first {
        write_memsw()?;
    }
    if let Some(limit) = limit {
        group.write(LIMIT, &limit.to_string())?;
    }
    if first { Ok(()) } else { write_memsw() }
}

/// v2 swap limit for OCI's memory+swap.
fn swap_max(limit: Option<i64>, swap: i64) -> Result<String> {
    match limit {
        _ if swap < 0 => Ok("max".to_owned()),
        Some(limit) if limit < 0 => Ok("max".to_owned()),
        Some(limit) if swap >= limit => Ok((swap - limit).to_string()),
        Some(limit) => Err(Error::invalid(format!("limit memory and swap to {swap} bytes: less than the memory limit of {limit}"))),
        None => Err(Error::invalid(format!("limit memory and swap to {swap} bytes: needs a memory limit"))),
    }
}

fn bytes_or_max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn apply_v2(group: &Group, r: &LinuxResources) -> Result<()> {
    let Some(memory) = r.memory() else { return Ok(()) };
    check_use(group, memory, "memory.current")?;
    let limit = set(memory.limit());
    if let Some(swap) = set(memory.swap()) {
        // Swap first: lowering memory while swap is still open would push pages out that must come back.
        group.write_if_there("memory.swap.max", &swap_max(limit, swap)?)?;
    }
    if let Some(limit) = limit {
        group.write("memory.max", &bytes_or_max(limit))?;
    }
    if let Some(reservation) = set(memory.reservation()) {
        group.write("memory.low", &bytes_or_max(reservation))?;
    }
    Ok(())
}

/// Processes killed for lack of memory; `None` when the group does not exist.
pub(in crate::cgroups) fn oom_kills(group: &Group, version: Version, reader: &mut Reader) -> Option<u64> {
    // Kernels before 4.13 do not count on v1.
    let file = if version == Version::V1 { "memory.oom_control" } else { "memory.events" };
    reader.keyed(group, file, "oom_kill")
}

fn limit_of(value: Option<u64>) -> Option<u64> {
    value.filter(|v| *v < UNLIMITED)
}

fn stats_v1(group: &Group, reader: &mut Reader, detail: Detail, stats: &mut CgroupStats) {
    let usage = reader.number(group, "memory.usage_in_bytes");
    stats.memory_usage = usage;
    if detail == Detail::Full {
        stats_v1_rest(group, reader, stats);
    }
    let (mut limit, mut limit_with_swap) = (None, None);
    if let Ok(Some(text)) = reader.read(group, "memory.stat") {
        for (key, value) in keys(text) {
            let field = match key {
                "total_rss" => &mut stats.memory_rss,
                "total_cache" => &mut stats.memory_cache,
                "total_mapped_file" => &mut stats.memory_mapped_file,
                "total_pgfault" => &mut stats.page_faults,
                "total_pgmajfault" => &mut stats.major_page_faults,
                // Missing where the kernel does not account for swap.
                "total_swap" => &mut stats.swap_usage,
                "hierarchical_memory_limit" => &mut limit,
                "hierarchical_memsw_limit" => &mut limit_with_swap,
                "total_inactive_file" => {
                    stats.memory_working_set = usage.map(|u| u.saturating_sub(value));
                    continue;
                }
                _ => continue,
            };
            *field = Some(value);
        }
    }
    stats.memory_limit = limit_of(limit);
    if let Some(used) = stats.swap_usage {
        let room = limit_of(limit_with_swap).zip(stats.memory_limit).map(|(both, memory)| both.saturating_sub(memory));
        stats.swap_available = room.map(|room| room.saturating_sub(used));
    }
}

/// What has a file of its own.
fn stats_v1_rest(group: &Group, reader: &mut Reader, stats: &mut CgroupStats) {
    stats.memory_peak = reader.number(group, "memory.max_usage_in_bytes");
    stats.memory_failcnt = reader.number(group, "memory.failcnt");
    stats.memory_kernel = reader.number(group, "memory.kmem.usage_in_bytes");
    stats.oom_kills = oom_kills(group, Version::V1, reader);
}

fn stats_v2(group: &Group, reader: &mut Reader, detail: Detail, stats: &mut CgroupStats) {
    let usage = reader.number(group, "memory.current");
    stats.memory_usage = usage;
    stats.memory_limit = reader.number(group, "memory.max");
    stats.swap_usage = reader.number(group, "memory.swap.current");
    stats.swap_available = stats.swap_usage.and_then(|used| Some(reader.number(group, "memory.swap.max")?.saturating_sub(used)));
    if detail == Detail::Full {
        stats.memory_peak = reader.number(group, "memory.peak");
    }
    if detail == Detail::Full
        && let Ok(Some(text)) = reader.read(group, "memory.events")
    {
        for (key, value) in keys(text) {
            match key {
                "max" => stats.memory_failcnt = Some(value),
                "oom_kill" => stats.oom_kills = Some(value),
                _ => {}
            }
        }
    }
    if let Ok(Some(text)) = reader.read(group, "memory.stat") {
        for (key, value) in keys(text) {
            let field = match key {
                "anon" => &mut stats.memory_rss,
                "file" => &mut stats.memory_cache,
                "file_mapped" => &mut stats.memory_mapped_file,
                "kernel" => &mut stats.memory_kernel,
                "pgfault" => &mut stats.page_faults,
                "pgmajfault" => &mut stats.major_page_faults,
                "inactive_file" => {
                    stats.memory_working_set = usage.map(|u| u.saturating_sub(value));
                    continue;
                }
                _ => continue,
            };
            *field = Some(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn swap_is_the_difference() {
        assert_eq!(swap_max(Some(100), 150).unwrap(), "50");
        assert_eq!(swap_max(Some(100), 100).unwrap(), "0");
        assert_eq!(swap_max(Some(100), -1).unwrap(), "max");
        assert_eq!(swap_max(Some(-1), 5).unwrap(), "max");
        assert!(swap_max(Some(100), 99).is_err());
        assert!(swap_max(None, 99).is_err());
    }

    /// A model of the kernel's check: every single write must keep memory <= memsw.
    fn legal(limit: u64, memsw: u64, new_limit: u64, new_memsw: u64) -> bool {
        let first = memsw_first(Some(i64::try_from(new_limit).unwrap()), Some(memsw));
        if first { limit <= new_memsw && new_limit <= new_memsw } else { new_limit <= memsw && new_limit <= new_memsw }
    }

    proptest! {
        #![proptest_config(crate::stdx::testing::cases(256))]
        #[test]
        fn memory_never_exceeds_memsw_in_between(a in 1u64..1000, b in 0u64..1000, c in 1u64..1000, d in 0u64..1000) {
            prop_assert!(legal(a, a + b, c, c + d));
        }
    }
}
