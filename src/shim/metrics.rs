//! A cgroup sample as containerd's metrics message (the v1 form: it has a place for all that we count on either version).

use containerd_shim_protos::cgroups::metrics::{CPUStat, CPUUsage, MemoryEntry, MemoryStat, Metrics, PidsStat, Throttle};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};

use crate::model::error::{Error, Kind, Result};
use crate::model::stats::CgroupStats;

/// Name by which containerd's clients know the message.
const TYPE: &str = "io.containerd.cgroups.v1.Metrics";

/// Encodes a sample; what the host cannot say stays zero.
///
/// # Errors
/// None in practice; encoding to memory.
pub fn any(stats: &CgroupStats) -> Result<Any> {
    let mut usage = CPUUsage::new();
    usage.total = stats.cpu_usage.unwrap_or_default();
    usage.user = stats.cpu_user.unwrap_or_default();
    usage.kernel = stats.cpu_system.unwrap_or_default();
    let mut cpu = CPUStat::new();
    cpu.usage = MessageField::some(usage);
    if let Some((periods, throttled, time)) = stats.cpu_throttling {
        let mut throttle = Throttle::new();
        (throttle.periods, throttle.throttled_periods, throttle.throttled_time) = (periods, throttled, time);
        cpu.throttling = MessageField::some(throttle);
    }
    let mut entry = MemoryEntry::new();
    entry.usage = stats.memory_usage.unwrap_or_default();
    entry.limit = stats.memory_limit.unwrap_or(u64::MAX);
    entry.max = stats.memory_peak.unwrap_or_default();
    entry.failcnt = stats.memory_failcnt.unwrap_or_default();
    let mut memory = MemoryStat::new();
    memory.usage = MessageField::some(entry);
    memory.rss = stats.memory_rss.unwrap_or_default();
    memory.cache = stats.memory_cache.unwrap_or_default();
    memory.mapped_file = stats.memory_mapped_file.unwrap_or_default();
    memory.pg_fault = stats.page_faults.unwrap_or_default();
    memory.pg_maj_fault = stats.major_page_faults.unwrap_or_default();
    // Clients compute the working set as usage minus this.
    memory.total_inactive_file = stats.memory_usage.unwrap_or_default().saturating_sub(stats.memory_working_set.unwrap_or_default());
    let mut pids = PidsStat::new();
    pids.current = stats.pids.unwrap_or_default();
    pids.limit = stats.pids_limit.unwrap_or_default();
    let mut metrics = Metrics::new();
    metrics.cpu = MessageField::some(cpu);
    metrics.memory = MessageField::some(memory);
    metrics.pids = MessageField::some(pids);
    let mut any = Any::new();
    any.type_url = TYPE.to_owned();
    any.value = metrics.write_to_bytes().map_err(|e| Error::with(Kind::Internal, "encode metrics", e))?;
    Ok(any)
}
