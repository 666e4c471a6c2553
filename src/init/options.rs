//! Mount options of the OCI spec: flags of the mount, its propagation, and what is left for the file system.

use super::fault::{Fault, Result};
use crate::sys::mount::Attributes;

/// Parsed options of one mount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// Flags of the mount itself.
    pub(super) attributes: Attributes,
    /// Flags of the mount and of everything below it (`rro` and the like).
    pub(super) recursive: Attributes,
    /// `bind` (false) or `rbind` (true).
    pub(super) bind: Option<bool>,
    /// `MS_*` propagation types in order, and whether each goes down the tree.
    pub(super) propagation: Vec<(u64, bool)>,
    /// The rest, for the file system.
    pub(super) data: Vec<String>,
}

const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
const NOATIME: u64 = libc::MOUNT_ATTR_NOATIME;
const STRICTATIME: u64 = libc::MOUNT_ATTR_STRICTATIME;
const NODIRATIME: u64 = libc::MOUNT_ATTR_NODIRATIME;
const NOSYMFOLLOW: u64 = libc::MOUNT_ATTR_NOSYMFOLLOW;

/// Name, bits to set, bits to clear. The access time modes are one field, cleared before it is set.
const FLAGS: &[(&str, u64, u64)] = &[
    ("ro", RDONLY, 0),
    ("rw", 0, RDONLY),
    ("nosuid", NOSUID, 0),
    ("suid", 0, NOSUID),
    ("nodev", NODEV, 0),
    ("dev", 0, NODEV),
    ("noexec", NOEXEC, 0),
    ("exec", 0, NOEXEC),
    ("noatime", NOATIME, ATIME),
    ("atime", 0, ATIME),
    ("relatime", 0, ATIME),
    ("norelatime", 0, ATIME),
    ("strictatime", STRICTATIME, ATIME),
    ("nostrictatime", 0, ATIME),
    ("nodiratime", NODIRATIME, 0),
    ("diratime", 0, NODIRATIME),
    ("nosymfollow", NOSYMFOLLOW, 0),
    ("symfollow", 0, NOSYMFOLLOW),
];

const PROPAGATION: &[(&str, u64)] =
    &[("private", libc::MS_PRIVATE), ("slave", libc::MS_SLAVE), ("shared", libc::MS_SHARED), ("unbindable", libc::MS_UNBINDABLE)];

/// Words that change nothing: the default, or without meaning for mounts made by descriptor.
const IGNORED: &[&str] = &["defaults", "async", "nomand", "silent", "loud", "nolazytime", "nofail", "auto", "noauto"];

/// Words of other runtimes that change what a mount shows; taking them for file system options would give a puzzling error.
const REFUSED: &[&str] = &["tmpcopyup", "idmap", "ridmap"];

impl Options {
    pub(super) fn parse<S: AsRef<str>>(options: &[S]) -> Result<Self> {
        let mut parsed = Self::default();
        for option in options.iter().map(AsRef::as_ref).filter(|o| !o.is_empty()) {
            parsed.word(option)?;
        }
        Ok(parsed)
    }

    fn word(&mut self, option: &str) -> Result {
        let below = option.strip_prefix('r');
        if let Some((_, set, clear)) = FLAGS.iter().find(|f| f.0 == option) {
            merge(&mut self.attributes, *set, *clear);
        } else if let Some((_, set, clear)) = FLAGS.iter().find(|f| Some(f.0) == below) {
            merge(&mut self.recursive, *set, *clear);
        } else if let Some(propagation) = propagation(option) {
            self.propagation.push(propagation);
        } else if option == "bind" || option == "rbind" {
            self.bind = Some(self.bind == Some(true) || option == "rbind");
        } else if REFUSED.contains(&option) {
            return Err(Fault::new(format_args!("mount option {option}"), libc::EOPNOTSUPP));
        } else if !IGNORED.contains(&option) {
            self.data.push(option.to_owned());
        }
        Ok(())
    }
}

/// The later word wins, bit by bit.
fn merge(attributes: &mut Attributes, set: u64, clear: u64) {
    attributes.set = (attributes.set & !clear) | set;
    attributes.clear = (attributes.clear & !set) | clear | if set & ATIME != 0 { ATIME } else { 0 };
}

/// A word such as `rslave`: its `MS_*` type and whether it goes down the tree.
pub(super) fn propagation(word: &str) -> Option<(u64, bool)> {
    let find = |w: &str| PROPAGATION.iter().find(|p| p.0 == w).map(|p| p.1);
    find(word).map(|p| (p, false)).or_else(|| word.strip_prefix('r').and_then(find).map(|p| (p, true)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_go_where_they_belong_and_the_later_one_wins() {
        let o = Options::parse(&["rbind", "ro", "rw", "nosuid", "rro", "rslave", "size=64k", "defaults"]).unwrap();
        assert_eq!(o.attributes, Attributes { set: NOSUID, clear: RDONLY, propagation: 0 });
        assert_eq!(o.recursive, Attributes { set: RDONLY, clear: 0, propagation: 0 });
        assert_eq!(o.bind, Some(true));
        assert_eq!(o.propagation, [(libc::MS_SLAVE, true)]);
        assert_eq!(o.data, ["size=64k"]);
    }

    #[test]
    fn access_time_modes_are_one_field() {
        let o = Options::parse(&["noatime", "strictatime"]).unwrap();
        assert_eq!(o.attributes, Attributes { set: STRICTATIME, clear: ATIME, propagation: 0 });
        assert!(Options::parse(&["tmpcopyup"]).is_err());
        // "relatime" itself begins with an r and is no recursive "elatime".
        assert!(Options::parse(&["relatime"]).unwrap().recursive.is_empty());
    }
}
