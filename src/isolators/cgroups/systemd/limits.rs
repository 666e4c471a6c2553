//! Limits as systemd says them. It writes what it knows of a unit again when it reloads its configuration, and what it does not
//! know as "none"; so it is told everything that it has a property for. Exact values are written to the group afterwards.

use zbus::zvariant::Value;

use super::Properties;
use crate::cgroups::controllers::cpu::weight_of_shares;
use crate::model::resources::Resources;

/// Numbers of processors or memory nodes above this are not ones.
const MAX_SET: usize = 1 << 13;
/// Raw v2 files that are a property: a number, or `max`.
const RAW: &[(&str, &str)] = &[
    ("cpu.weight", "CPUWeight"),
    ("memory.min", "MemoryMin"),
    ("memory.low", "MemoryLow"),
    ("memory.high", "MemoryHigh"),
    ("memory.max", "MemoryMax"),
    ("memory.swap.max", "MemorySwapMax"),
    ("pids.max", "TasksMax"),
];

/// The properties of a scope. A later one of the same name wins.
pub(super) fn limits(r: &Resources, v2: bool) -> Properties {
    let mut out = memory(r, v2);
    if let Some(shares) = r.cpu_shares {
        out.push(if v2 { ("CPUWeight", Value::from(weight_of_shares(shares))) } else { ("CPUShares", Value::from(shares)) });
    }
    let period = r.cpu_period.filter(|p| *p > 0);
    if let Some(quota) = r.cpu_quota {
        // systemd rounds to 10 ms per second; rounded up here, so that the exact value written afterwards is never above it.
        let scaled = |q: u64| (q.saturating_mul(1_000_000) / period.unwrap_or(100_000)).next_multiple_of(10_000);
        out.push(("CPUQuotaPerSecUSec", Value::from(u64::try_from(quota).map_or(u64::MAX, scaled))));
    }
    // Said always: systemd would put its own default there.
    out.push(("TasksMax", Value::from(r.pids_limit.map_or(u64::MAX, bytes))));
    if !v2 {
        return out;
    }
    if let Some(period) = period {
        out.push(("CPUQuotaPeriodUSec", Value::from(period)));
    }
    for (name, list) in [("AllowedCPUs", &r.cpuset_cpus), ("AllowedMemoryNodes", &r.cpuset_mems)] {
        if let Some(mask) = list.as_deref().and_then(mask) {
            out.push((name, Value::from(mask)));
        }
    }
    for (file, name) in RAW {
        // What is neither is for the kernel to refuse.
        let value = r.unified.get(*file).and_then(|v| if v.trim() == "max" { Some(u64::MAX) } else { v.trim().parse().ok() });
        out.extend(value.map(|v| (*name, Value::from(v))));
    }
    out
}

fn bytes(limit: i64) -> u64 {
    u64::try_from(limit).unwrap_or(u64::MAX)
}

fn memory(r: &Resources, v2: bool) -> Properties {
    let Some(limit) = r.memory_limit else { return Vec::new() };
    if !v2 {
        return vec![("MemoryLimit", Value::from(bytes(limit)))];
    }
    let swap = match r.memory_swap {
        Some(s) if s < 0 || limit < 0 => u64::MAX,
        Some(s) => bytes(s - limit),
        None if limit < 0 => u64::MAX,
        None => 0,
    };
    vec![("MemoryMax", Value::from(bytes(limit))), ("MemorySwapMax", Value::from(swap))]
}

/// `0-2,5` as bits, the lowest number in the lowest bit of the first byte. `None` for what is no list: the kernel refuses it.
fn mask(list: &str) -> Option<Vec<u8>> {
    let mut mask = Vec::new();
    for part in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MAX_SET {
            return None;
        }
        for n in first..=last {
            mask.resize(mask.len().max(n / 8 + 1), 0);
            mask[n / 8] |= 1 << (n % 8);
        }
    }
    Some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_masks() {
        assert_eq!(mask("0-2,5").unwrap(), [0b10_0111]);
        assert_eq!(mask("9").unwrap(), [0, 0b10]);
        assert_eq!(mask("").unwrap(), Vec::<u8>::new());
        assert!(mask("a").is_none() && mask("0-99999").is_none());
    }

    #[test]
    fn raw_files_are_said_last() {
        let unified = [("memory.high", "max"), ("pids.max", "7"), ("cpu.weight", "x"), ("memory.oom.group", "1")];
        let r = Resources { pids_limit: Some(3), unified: unified.map(|(k, v)| (k.to_owned(), v.to_owned())).into(), ..Resources::default() };
        let found: Vec<_> = limits(&r, true).into_iter().map(|(name, v)| (name, u64::try_from(v).unwrap())).collect();
        assert_eq!(found, [("TasksMax", 3), ("MemoryHigh", u64::MAX), ("TasksMax", 7)]);
        assert_eq!(limits(&r, false).len(), 1);
    }
}
