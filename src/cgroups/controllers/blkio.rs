//! Block devices: weight and throttling.

use std::fmt::Write;

use oci_spec::runtime::{LinuxBlockIo, LinuxResources, LinuxThrottleDevice};

use super::{Row, none};
use crate::cgroups::file::Group;
use crate::cgroups::host::Controller;
use crate::model::error::Result;

pub(super) const BLKIO: Row = Row { controller: Controller::Blkio, wanted, required: true, apply_v1, apply_v2, stats_v1: none::stats, stats_v2: none::stats };

/// v1 file, key in the v2 file `io.max`, and the list in the specification.
type Throttle<'a> = (&'static str, &'static str, &'a Option<Vec<LinuxThrottleDevice>>);

fn throttles(io: &LinuxBlockIo) -> [Throttle<'_>; 4] {
    [
        ("blkio.throttle.read_bps_device", "rbps", io.throttle_read_bps_device()),
        ("blkio.throttle.write_bps_device", "wbps", io.throttle_write_bps_device()),
        ("blkio.throttle.read_iops_device", "riops", io.throttle_read_iops_device()),
        ("blkio.throttle.write_iops_device", "wiops", io.throttle_write_iops_device()),
    ]
}

fn weight(io: &LinuxBlockIo) -> Option<u64> {
    io.weight().map(u64::from).filter(|w| *w != 0)
}

fn wanted(r: &LinuxResources) -> bool {
    r.block_io().as_ref().is_some_and(|io| {
        weight(io).is_some()
            || io.weight_device().as_ref().is_some_and(|w| !w.is_empty())
            || throttles(io).iter().any(|(_, _, l)| l.iter().flatten().next().is_some())
    })
}

/// The weight file has one name with the BFQ scheduler and another with older ones or io.cost; neither exists without such a
/// scheduler, and then the error names the one of BFQ.
fn write_weight(group: &Group, plain: &str, bfq: &str, value: &str) -> Result<()> {
    if group.write_if_there(plain, value)? { Ok(()) } else { group.write(bfq, value) }
}

fn apply_v1(group: &Group, r: &LinuxResources) -> Result<()> {
    let Some(io) = r.block_io() else { return Ok(()) };
    if let Some(weight) = weight(io) {
        write_weight(group, "blkio.weight", "blkio.bfq.weight", &weight.to_string())?;
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight() {
            write_weight(group, "blkio.weight_device", "blkio.bfq.weight_device", &format!("{}:{} {weight}", device.major(), device.minor()))?;
        }
    }
    for (file, _, devices) in throttles(io) {
        for device in devices.iter().flatten() {
            group.write(file, &format!("{}:{} {}", device.major(), device.minor(), device.rate()))?;
        }
    }
    Ok(())
}

/// v1 weights are 10..=1000, v2 weights 1..=10000.
fn weight_v2(weight: u64) -> u64 {
    1 + weight.clamp(10, 1000).saturating_sub(10) * 9999 / 990
}

fn apply_v2(group: &Group, r: &LinuxResources) -> Result<()> {
    let Some(io) = r.block_io() else { return Ok(()) };
    if let Some(weight) = weight(io) {
        // BFQ takes v1's numbers on v2 as well.
        if !group.write_if_there("io.bfq.weight", &weight.to_string())? {
            group.write("io.weight", &format!("default {}", weight_v2(weight)))?;
        }
    }
    for device in io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight() {
            let number = format!("{}:{}", device.major(), device.minor());
            if !group.write_if_there("io.bfq.weight", &format!("{number} {weight}"))? {
                group.write("io.weight", &format!("{number} {}", weight_v2(weight.into())))?;
            }
        }
    }
    for (_, key, devices) in throttles(io) {
        for device in devices.iter().flatten() {
            let mut line = format!("{}:{} {key}=", device.major(), device.minor());
            // Zero takes a v1 limit away; v2 says "max" for it.
            let _ = if device.rate() == 0 { line.write_str("max") } else { write!(line, "{}", device.rate()) };
            group.write("io.max", &line)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights() {
        assert_eq!([10, 500, 1000, 5].map(weight_v2), [1, 4950, 10_000, 1]);
    }
}
