//! End to end on a pure cgroup v2 host, with the cgroupfs and with the systemd driver.
//!
//! The machines that run these tests may have cgroup v1 or no systemd, so each test boots one that has: Debian's cloud kernel in
//! an emulated machine, with this build's programs on its disk. Inside, the same test of the same program runs again and does the
//! checks; outside it judges the reports. The kernel there is older than most others, which tests the fallbacks as well.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;
mod checks;
#[path = "../common/mod.rs"]
mod common;
mod image;
mod machine;

use bench::{Bench, Check};

/// Outside: boots a machine. Inside: does the checks.
fn test(name: &str, systemd: bool, checks: &[(&'static str, Check)]) {
    if std::env::var_os(machine::INSIDE).is_some() {
        Bench::run(systemd, checks);
    } else {
        let names: Vec<_> = checks.iter().map(|(name, _)| *name).chain(["nothing_left"]).collect();
        machine::run(name, systemd, &names);
    }
}

#[test]
fn cgroupfs_driver() {
    test("cgroupfs_driver", false, checks::ALL);
}

#[test]
fn systemd_driver() {
    test("systemd_driver", true, &[checks::ALL, checks::SYSTEMD].concat());
}
