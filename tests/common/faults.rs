//! What the tests of sudden death share: the fail points of the sources, seeded chance, and what may not be left afterwards.

use std::collections::BTreeSet;
use std::path::Path;

use super::ledger::{Ledger, life};
use super::{Node, entries, host};

/// Fail points of the sources, the string literals given to `failpoint::hit`: the shim's or the daemon's.
pub fn fail_points(of_shims: bool) -> BTreeSet<String> {
    fn walk(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.extend(text.split("failpoint::hit(\"").skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned));
            }
        }
    }
    let mut found = BTreeSet::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found.retain(|name| name.starts_with("shim.") == of_shims);
    found
}

/// xorshift64*: small, seeded, the same on every machine.
pub struct Random(u64);

impl Random {
    /// The numbers of one seed.
    pub fn of(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next, below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n
    }
}

/// The range of seeds that the variable `name` gives as `FROM..TO`.
pub fn seeds(name: &str, default: &str) -> std::ops::Range<u64> {
    let range = std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let (from, to) = range.split_once("..").unwrap_or_else(|| panic!("{name}=FROM..TO"));
    from.parse().unwrap()..to.parse().unwrap()
}

impl Node {
    /// What the host looks like after one life: the first pod makes the bridge and its table, which stay. No daemon runs then.
    pub async fn baseline(&mut self) -> host::Snapshot {
        self.start_daemon(&[]);
        life(self, "first", true, &Ledger::default()).await.unwrap();
        self.kill_daemon();
        host::Snapshot::take(&self.cgroup)
    }

    /// With every pod and image removed, the host is what it was `before` and no file of theirs is left. The daemon runs on.
    pub fn nothing_is_left(&self, what: &str, before: &host::Snapshot) {
        let left = before.left_but(&self.cgroup, |line| line.starts_with("process") && line.contains("mesocri daemon"));
        assert!(left.is_empty(), "{what}: left behind: {left:#?}\n{}", self.daemon_log());
        for dir in ["root/pods", "root/store/rootfs", "root/store/staging", "root/store/layers", "root/store/damaged", "state/pods", "state/shims"] {
            let names = entries(&self.dir.path().join(dir));
            assert!(names.is_empty(), "{what}: left in {dir}: {names:?}\n{}", self.daemon_log());
        }
    }
}
