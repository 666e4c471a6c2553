//! CPU time: weight, quota, and how much was used.
//!
//! Shares (v1, 2..=262144, default 1024) become a weight (v2, 1..=10000, default 100) by the curve that maps 2 to 1, 1024 to
//! 100 and 262144 to 10000: `10^((log2(s)^2 + 125 log2(s)) / 612 - 7/34)`, rounded up. The older straight line
//! `1 + (s - 2) * 9999 / 262142` maps the default 1024 to 39, so that a pod with one CPU loses against every host service that
//! has the default weight; CRI tests accept both (512 gives 59 here, 20 there).

use oci_spec::runtime::{LinuxCpu, LinuxResources};

use super::{Detail, Row, none};
use crate::cgroups::file::{Group, Reader, keys};
use crate::cgroups::host::Controller;
use crate::model::error::Result;
use crate::model::stats::CgroupStats;

pub(super) const CPU: Row = Row { controller: Controller::Cpu, wanted, required: true, apply_v1, apply_v2, stats_v1, stats_v2: none::stats };

/// Only counts; on v2 it is the core's `cpu.stat`, which exists without the cpu controller.
pub(super) const CPUACCT: Row = Row {
    controller: Controller::Cpuacct,
    wanted: none::wanted,
    required: false,
    apply_v1: none::apply,
    apply_v2: none::apply,
    stats_v1: stats_cpuacct,
    stats_v2,
};

fn wanted(r: &LinuxResources) -> bool {
    r.cpu().as_ref().is_some_and(|c| {
        shares(c).is_some()
            || quota(c).is_some()
            || period(c).is_some()
            || c.burst().is_some()
            || c.idle().is_some()
            || c.realtime_period().is_some()
            || c.realtime_runtime().is_some()
    })
}

// Zero stands for "not said" in specs and CRI alike.
fn shares(c: &LinuxCpu) -> Option<u64> {
    c.shares().filter(|s| *s != 0)
}

fn quota(c: &LinuxCpu) -> Option<i64> {
    c.quota().filter(|q| *q != 0)
}

fn period(c: &LinuxCpu) -> Option<u64> {
    c.period().filter(|p| *p != 0)
}

/// v2 weight for v1 shares; see the top of the file.
pub fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        s => {
            let l = (s as f64).log2();
            let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
            // Less than the error of the arithmetic away from a whole number is that number.
            ((10f64.powf(exponent) - 1e-9).ceil() as u64).clamp(1, 10_000)
        }
    }
}

fn apply_v1(group: &Group, r: &LinuxResources) -> Result<()> {
    let Some(cpu) = r.cpu() else { return Ok(()) };
    if let Some(idle) = cpu.idle() {
        group.write_if_there("cpu.idle", &idle.to_string())?;
    }
    if let Some(shares) = shares(cpu) {
        group.write("cpu.shares", &shares.to_string())?;
    }
    write_bandwidth_v1(group, period(cpu), quota(cpu))?;
    if let Some(burst) = cpu.burst() {
        group.write("cpu.cfs_burst_us", &burst.to_string())?;
    }
    if let Some(period) = cpu.realtime_period() {
        group.write("cpu.rt_period_us", &period.to_string())?;
    }
    if let Some(runtime) = cpu.realtime_runtime() {
        group.write("cpu.rt_runtime_us", &runtime.to_string())?;
    }
    Ok(())
}

/// The kernel checks the ratio quota / period against the parent's and the children's at each write, so the state between the
/// two writes must be allowed as well. Period first; when that is refused the quota comes first.
fn write_bandwidth_v1(group: &Group, period: Option<u64>, quota: Option<i64>) -> Result<()> {
    let (period_file, quota_file) = ("cpu.cfs_period_us", "cpu.cfs_quota_us");
    let quota = quota.map(|q| q.max(-1).to_string());
    if let Some(period) = period.map(|p| p.to_string()) {
        match group.try_write(period_file, &period) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && quota.is_some() => {
                if let Some(quota) = &quota {
                    group.write(quota_file, quota)?;
                }
                return group.write(period_file, &period);
            }
            Err(e) => return Err(group.refused(period_file, &period, e)),
        }
    }
    quota.map_or(Ok(()), |quota| group.write(quota_file, &quota))
}

fn apply_v2(group: &Group, r: &LinuxResources) -> Result<()> {
    let Some(cpu) = r.cpu() else { return Ok(()) };
    if let Some(idle) = cpu.idle() {
        group.write_if_there("cpu.idle", &idle.to_string())?;
    }
    // An idle group has no weight: the kernel refuses one.
    if let Some(shares) = shares(cpu).filter(|_| cpu.idle() != Some(1)) {
        group.write("cpu.weight", &weight_of_shares(shares).to_string())?;
    }
    if quota(cpu).is_some() || period(cpu).is_some() {
        let now = Reader::default().must(group, "cpu.max")?.trim().to_owned();
        group.write("cpu.max", &cpu_max(&now, quota(cpu), period(cpu)))?;
    }
    if let Some(burst) = cpu.burst() {
        group.write("cpu.max.burst", &burst.to_string())?;
    }
    Ok(())
}

/// `cpu.max` holds both values, `max 100000`: what is not said stays as it is in `now`.
fn cpu_max(now: &str, quota: Option<i64>, period: Option<u64>) -> String {
    let (old_quota, old_period) = now.split_once(' ').unwrap_or((now, "100000"));
    let quota = match quota {
        Some(q) if q > 0 => q.to_string(),
        Some(_) => "max".to_owned(),
        None => old_quota.to_owned(),
    };
    let period = period.map_or_else(|| old_period.to_owned(), |p| p.to_string());
    format!("{quota} {period}")
}

fn stats_v1(group: &Group, reader: &mut Reader, detail: Detail, stats: &mut CgroupStats) {
    if detail == Detail::Full
        && let Ok(Some(text)) = reader.read(group, "cpu.stat")
    {
        stats.cpu_throttling = throttling(text, "throttled_time", 1);
    }
}

fn stats_cpuacct(group: &Group, reader: &mut Reader, detail: Detail, stats: &mut CgroupStats) {
    stats.cpu_usage = reader.number(group, "cpuacct.usage");
    if detail == Detail::Full {
        stats.cpu_user = reader.number(group, "cpuacct.usage_user");
        stats.cpu_system = reader.number(group, "cpuacct.usage_sys");
    }
}

fn stats_v2(group: &Group, reader: &mut Reader, _: Detail, stats: &mut CgroupStats) {
    let Ok(Some(text)) = reader.read(group, "cpu.stat") else { return };
    for (key, micros) in keys(text) {
        let nanos = Some(micros.saturating_mul(1000));
        match key {
            "usage_usec" => stats.cpu_usage = nanos,
            "user_usec" => stats.cpu_user = nanos,
            "system_usec" => stats.cpu_system = nanos,
            _ => {}
        }
    }
    stats.cpu_throttling = throttling(text, "throttled_usec", 1000);
}

fn throttling(text: &str, time: &str, to_nanos: u64) -> Option<(u64, u64, u64)> {
    let value = |key: &str| keys(text).find(|(k, _)| *k == key).map(|(_, v)| v);
    Some((value("nr_periods")?, value("nr_throttled")?, value(time)?.saturating_mul(to_nanos)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn weights() {
        for (shares, weight) in [(0, 1), (2, 1), (512, 59), (1024, 100), (262_144, 10_000), (1 << 40, 10_000)] {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
    }

    proptest! {
        #![proptest_config(crate::stdx::testing::cases(256))]
        #[test]
        fn more_shares_never_weigh_less(a in 0u64..300_000, b in 0u64..300_000) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(weight_of_shares(low) <= weight_of_shares(high));
        }
    }

    #[test]
    fn quota_and_period_keep_each_other() {
        assert_eq!(cpu_max("max 100000", Some(5000), None), "5000 100000");
        assert_eq!(cpu_max("5000 100000", None, Some(20_000)), "5000 20000");
        assert_eq!(cpu_max("5000 100000", Some(-1), None), "max 100000");
    }

    #[test]
    fn throttling_needs_all_three() {
        assert_eq!(throttling("nr_periods 4\nnr_throttled 2\nthrottled_usec 7\n", "throttled_usec", 1000), Some((4, 2, 7000)));
        assert_eq!(throttling("usage_usec 4\n", "throttled_usec", 1000), None);
    }
}
