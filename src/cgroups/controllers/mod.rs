//! The controllers: one file and one row each.
//!
//! To add one: write `controllers/<name>.rs` with a [`Row`], add its `mod` line and the row to [`ROWS`]. Rows are applied in
//! order; statistics are gathered in order.

pub mod blkio;
pub mod cpu;
pub mod cpuset;
pub mod devices;
pub mod freezer;
pub mod hugetlb;
pub mod memory;
pub mod pids;
pub mod pressure;
mod to_oci;
pub mod unified;

use oci_spec::runtime::LinuxResources;

use super::file::{Group, Journal, Reader};
use super::host::{Controller, Version};
use super::manager::Manager;
use crate::model::error::{Error, Kind, Result};
use crate::model::stats::CgroupStats;

pub use to_oci::to_oci;

/// How much of a sample is wanted. Each file costs some ten microseconds, and lists ask for hundreds of samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// What a kubelet asks for every few seconds: use of CPU, memory, swap and processes, the memory limit that holds, pressure.
    Summary,
    /// Everything in [`CgroupStats`].
    Full,
}

/// What one controller can do. `group` is the group's directory on the hierarchy where the controller lives.
pub(super) struct Row {
    /// Where it lives.
    controller: Controller,
    /// Whether `resources` ask anything of it.
    wanted: fn(&LinuxResources) -> bool,
    /// Whether a host without it is an error when it is wanted.
    required: bool,
    /// Writes the settings through the v1 files.
    apply_v1: fn(&Group, &LinuxResources) -> Result<()>,
    /// Writes the settings through the v2 files.
    apply_v2: fn(&Group, &LinuxResources) -> Result<()>,
    /// Reads what v1 counts.
    stats_v1: fn(&Group, &mut Reader, Detail, &mut CgroupStats),
    /// Reads what v2 counts.
    stats_v2: fn(&Group, &mut Reader, Detail, &mut CgroupStats),
}

/// A place for the verbs that a controller does not have.
mod none {
    use super::{CgroupStats, Group, LinuxResources, Reader, Result};

    pub fn wanted(_: &LinuxResources) -> bool {
        false
    }

    #[allow(clippy::unnecessary_wraps)]
    pub fn apply(_: &Group, _: &LinuxResources) -> Result<()> {
        Ok(())
    }

    pub fn stats(_: &Group, _: &mut Reader, _: super::Detail, _: &mut CgroupStats) {}
}

/// All controllers, in the order of their writes.
const ROWS: &[Row] = &[cpu::CPU, cpu::CPUACCT, cpuset::CPUSET, memory::MEMORY, pids::PIDS, hugetlb::HUGETLB, blkio::BLKIO, devices::DEVICES, freezer::FREEZER];

/// See [`Manager::apply`].
pub(super) fn apply(manager: &Manager, resources: &LinuxResources, journal: Option<&Journal>) -> Result<()> {
    for row in ROWS.iter().filter(|row| (row.wanted)(resources)) {
        match manager.host.locate(row.controller) {
            Some(hierarchy) => {
                let apply = if hierarchy.version == Version::V1 { row.apply_v1 } else { row.apply_v2 };
                apply(&manager.group(hierarchy).noting(journal), resources)?;
            }
            None if row.required => {
                let what = format!("limit cgroup {}: this host has no {} controller", manager.path, row.controller.name());
                return Err(Error::new(Kind::Unimplemented, what));
            }
            None => {}
        }
    }
    // Last, so that raw values win. On v1 and hybrid hosts these files do not exist or belong to no controller: ignored.
    if manager.host.is_pure_v2()
        && let (Some(v2), Some(files)) = (manager.host.v2(), resources.unified())
    {
        unified::apply(&manager.group(v2).noting(journal), files)?;
    }
    Ok(())
}

/// See [`Manager::stats`].
pub(super) fn stats(manager: &Manager, detail: Detail) -> Result<CgroupStats> {
    let mut stats = CgroupStats { at: crate::stdx::clock::now_ns(), ..CgroupStats::default() };
    let mut reader = Reader::default();
    for row in ROWS {
        if let Some(hierarchy) = manager.host.locate(row.controller) {
            let gather = if hierarchy.version == Version::V1 { row.stats_v1 } else { row.stats_v2 };
            gather(&manager.group(hierarchy), &mut reader, detail, &mut stats);
        }
    }
    if let Some(v2) = manager.host.v2() {
        pressure::stats(&manager.group(v2), &mut reader, &mut stats);
    }
    if stats.cpu_usage.is_none() && stats.memory_usage.is_none() && stats.pids.is_none() && !manager.exists() {
        return Err(Error::not_found(format!("read statistics of cgroup {}", manager.path)));
    }
    Ok(stats)
}
