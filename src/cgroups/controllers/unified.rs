//! Raw v2 files (`linux.resources.unified`), as the kubelet and users give them.

use std::collections::HashMap;

use crate::cgroups::file::Group;
use crate::model::error::{Error, Result};

/// Files of the core that would move processes, kill, freeze or change the shape of the tree instead of limiting.
const REFUSED: &[&str] = &["cgroup.procs", "cgroup.threads", "cgroup.kill", "cgroup.freeze", "cgroup.type", "cgroup.subtree_control"];

/// A name must be `controller.something`, directly in the group.
fn check(name: &str) -> Result<()> {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    let shaped = name.split_once('.').is_some_and(|(controller, file)| !controller.is_empty() && !file.is_empty() && !file.starts_with('.'));
    if plain && shaped && !REFUSED.contains(&name) { Ok(()) } else { Err(Error::invalid(format!("set cgroup file {name:?}: not a name that may be set"))) }
}

/// Checks all names, then writes, in the order of the names.
pub(super) fn apply(group: &Group, files: &HashMap<String, String>) -> Result<()> {
    let mut files: Vec<_> = files.iter().collect();
    files.sort_unstable();
    for (name, _) in &files {
        check(name)?;
    }
    for (name, value) in files {
        group.write(name, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["memory.oom.group", "memory.high", "cpu.max", "hugetlb.2MB.max", "cgroup.max.depth"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "memory", ".", "..", "a/b.c", "../memory.max", "memory.max/..", "memory..x", "cgroup.kill", "cgroup.procs", "a.b\0", ".x"] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }
}
