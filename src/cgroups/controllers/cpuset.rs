//! Which CPUs and memory nodes may be used. A new v1 group has none and takes no process until it is given its parent's.

use std::path::Path;

use oci_spec::runtime::{LinuxCpu, LinuxResources};

use super::{Row, none};
use crate::cgroups::file::{Group, Reader};
use crate::cgroups::host::{Controller, Hierarchy};
use crate::model::error::Result;

pub(super) const CPUSET: Row =
    Row { controller: Controller::Cpuset, wanted, required: true, apply_v1: apply, apply_v2: apply, stats_v1: none::stats, stats_v2: none::stats };

fn said(list: Option<&String>) -> Option<&str> {
    list.map(String::as_str).filter(|l| !l.is_empty())
}

fn lists(cpu: &LinuxCpu) -> [(&'static str, Option<&str>); 2] {
    [("cpuset.cpus", said(cpu.cpus().as_ref())), ("cpuset.mems", said(cpu.mems().as_ref()))]
}

fn wanted(r: &LinuxResources) -> bool {
    r.cpu().as_ref().is_some_and(|c| lists(c).iter().any(|(_, l)| l.is_some()))
}

fn apply(group: &Group, r: &LinuxResources) -> Result<()> {
    let Some(cpu) = r.cpu() else { return Ok(()) };
    for (file, list) in lists(cpu) {
        if let Some(list) = list {
            group.write(file, list)?;
        }
    }
    Ok(())
}

/// v1: gives an empty group at `dir` the lists of its parent, and the parent those of its own when it is empty too.
pub(in crate::cgroups) fn inherit(hierarchy: &Hierarchy, dir: &Path, reader: &mut Reader) -> Result<()> {
    if !hierarchy.holds(dir) {
        return Ok(());
    }
    let group = Group::new(dir.to_owned());
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if !reader.must(&group, file)?.trim().is_empty() {
            continue;
        }
        let Some(parent) = dir.parent() else { continue };
        let above = Group::new(parent.to_owned());
        let mut list = reader.must(&above, file)?.trim().to_owned();
        if list.is_empty() {
            inherit(hierarchy, parent, reader)?;
            reader.must(&above, file)?.trim().clone_into(&mut list);
        }
        group.write(file, &list)?;
    }
    Ok(())
}
