//! Number of processes and threads.

use oci_spec::runtime::LinuxResources;

use super::{Detail, Row};
use crate::cgroups::file::{Group, Reader};
use crate::cgroups::host::Controller;
use crate::model::error::Result;
use crate::model::stats::CgroupStats;

pub(super) const PIDS: Row = Row { controller: Controller::Pids, wanted, required: true, apply_v1: apply, apply_v2: apply, stats_v1: stats, stats_v2: stats };

/// Zero is "not said", as everywhere; the specification gives it no meaning of its own.
fn wanted(r: &LinuxResources) -> bool {
    r.pids().as_ref().is_some_and(|p| p.limit() != 0)
}

fn apply(group: &Group, r: &LinuxResources) -> Result<()> {
    let Some(pids) = r.pids() else { return Ok(()) };
    let limit = if pids.limit() < 0 { "max".to_owned() } else { pids.limit().to_string() };
    group.write("pids.max", &limit)
}

fn stats(group: &Group, reader: &mut Reader, detail: Detail, stats: &mut CgroupStats) {
    stats.pids = reader.number(group, "pids.current");
    if detail == Detail::Full {
        stats.pids_limit = reader.number(group, "pids.max");
    }
}
