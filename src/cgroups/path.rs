//! Names of groups. A path comes from a caller (`cgroup_parent`, `linux.cgroupsPath`) and is joined to the root of every
//! hierarchy, so it must not be able to leave it.

use std::fmt;

use crate::model::error::{Error, Result};

/// Longest path taken. The kernel refuses components above 255 bytes itself; the whole must leave room for root and file name.
const MAX_LEN: usize = 2048;

/// A checked path below the roots of the hierarchies: `/kubepods/pod1/<id>`. Never `/` itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CgroupPath(String);

impl CgroupPath {
    /// Checks and normalises: one leading `/`, no empty components.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty path, `.` or `..` components, NUL, control characters, `:` (the form
    /// `slice:prefix:name` belongs to the systemd driver) and paths above 2048 bytes.
    pub fn new(path: &str) -> Result<Self> {
        let bad = |why: &str| Err(Error::invalid(format!("check cgroup path {:?}: {why}", path.chars().take(120).collect::<String>())));
        if path.len() > MAX_LEN {
            return bad("too long");
        }
        if path.contains(':') {
            return bad("a colon is only allowed in the systemd form slice:prefix:name");
        }
        // A new line or another control character would forge lines of /proc/PID/cgroup.
        if path.chars().any(char::is_control) {
            return bad("control character");
        }
        let mut clean = String::with_capacity(path.len() + 1);
        for part in path.split('/').filter(|p| !p.is_empty()) {
            if part == "." || part == ".." {
                return bad("'.' and '..' are not allowed");
            }
            if part.starts_with("cgroup.") {
                return bad("a name must not look like a file of the kernel (cgroup.*)");
            }
            clean.push('/');
            clean.push_str(part);
        }
        if clean.is_empty() {
            return bad("it names no group");
        }
        Ok(Self(clean))
    }

    /// The path, beginning with `/`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Without the leading `/`, to join to a root.
    pub(super) fn relative(&self) -> &str {
        self.0.trim_start_matches('/')
    }

    /// The group above, `None` directly below the root.
    pub fn parent(&self) -> Option<CgroupPath> {
        let (parent, _) = self.0.rsplit_once('/')?;
        (!parent.is_empty()).then(|| Self(parent.to_owned()))
    }

    /// A group below this one.
    ///
    /// # Errors
    /// As [`CgroupPath::new`].
    pub fn join(&self, name: &str) -> Result<Self> {
        Self::new(&format!("{}/{name}", self.0))
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn takes_and_normalises() {
        for (given, clean) in [("/a/b", "/a/b"), ("a", "/a"), ("//a///b/", "/a/b"), ("/x.slice/y-1.scope", "/x.slice/y-1.scope"), ("/a..b", "/a..b")] {
            assert_eq!(CgroupPath::new(given).unwrap().as_str(), clean);
        }
        assert_eq!(CgroupPath::new("/a/b").unwrap().parent().unwrap().as_str(), "/a");
        assert!(CgroupPath::new("/a").unwrap().parent().is_none());
    }

    #[test]
    fn refuses_what_leaves_the_root_or_forges_lines() {
        for bad in ["", "/", "///", "/../x", "a/..", "/a/./b", "/a\0b", "/a\nb", "x.slice:p:n", "/cgroup.procs/x"] {
            assert!(CgroupPath::new(bad).is_err(), "{bad:?}");
        }
        assert!(CgroupPath::new(&"a".repeat(MAX_LEN + 1)).is_err());
    }

    proptest! {
        #![proptest_config(crate::stdx::testing::cases(256))]
        #[test]
        fn never_leaves_the_root(s in "\\PC{0,40}") {
            if let Ok(p) = CgroupPath::new(&s) {
                prop_assert!(p.as_str().starts_with('/'));
                prop_assert!(p.relative().split('/').all(|c| !c.is_empty() && c != "." && c != ".."));
                prop_assert_eq!(CgroupPath::new(p.as_str()).unwrap(), p);
            }
        }
    }
}
