//! Huge pages. The kubelet sends a limit of 0 for every page size of the host, so a host without the controller is no error.

use oci_spec::runtime::LinuxResources;

use super::{Row, none};
use crate::cgroups::file::Group;
use crate::cgroups::host::Controller;
use crate::model::error::{Error, Result};

pub(super) const HUGETLB: Row =
    Row { controller: Controller::Hugetlb, wanted, required: false, apply_v1, apply_v2, stats_v1: none::stats, stats_v2: none::stats };

fn wanted(r: &LinuxResources) -> bool {
    r.hugepage_limits().as_ref().is_some_and(|l| !l.is_empty())
}

/// A page size becomes part of a file name: `2MB`, `1GB`, `64KB`.
fn valid_size(size: &str) -> bool {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_uppercase());
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) && matches!(&size[digits.len()..], "KB" | "MB" | "GB")
}

fn apply(group: &Group, r: &LinuxResources, suffix: &str) -> Result<()> {
    for limit in r.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if !valid_size(size) {
            return Err(Error::invalid(format!("limit huge pages of size {size:?}: not of the form 2MB")));
        }
        let value = if limit.limit() < 0 && suffix == "max" { "max".to_owned() } else { limit.limit().to_string() };
        let file = format!("hugetlb.{size}.{suffix}");
        // No page of a size that the kernel does not know: nothing to limit to 0.
        if !group.write_if_there(&file, &value)? && limit.limit() > 0 {
            return Err(Error::invalid(format!("limit huge pages of size {size}: this host has none, {} does not exist", group.dir().join(file).display())));
        }
        // Pages promised by mmap but not touched yet; absent before kernel 5.7.
        group.write_if_there(&format!("hugetlb.{size}.rsvd.{suffix}"), &value)?;
    }
    Ok(())
}

fn apply_v1(group: &Group, r: &LinuxResources) -> Result<()> {
    apply(group, r, "limit_in_bytes")
}

fn apply_v2(group: &Group, r: &LinuxResources) -> Result<()> {
    apply(group, r, "max")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for good in ["2MB", "1GB", "64KB"] {
            assert!(valid_size(good));
        }
        for bad in ["", "MB", "2", "2mb", "../2MB", "2TB", "2MB/x", "2 MB"] {
            assert!(!valid_size(bad), "{bad}");
        }
    }
}
