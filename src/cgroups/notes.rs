//! Short notes on a v2 group, kept by the kernel as extended attributes until the group goes.

use std::path::PathBuf;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::manager::Manager;
use crate::model::error::{Act, Error, Kind, Result};

/// Root alone may read and write these.
const PREFIX: &str = "trusted.mesocri.";
/// The longest note.
const MAX_NOTE: usize = 64;
/// All names on one group together; the kernel's own limit.
const MAX_NAMES: usize = 1 << 16;

impl Manager {
    fn noted(&self) -> Result<PathBuf> {
        let v2 = self.host.v2().ok_or_else(|| Error::new(Kind::Unimplemented, format!("note on cgroup {}: this host has no v2", self.path)))?;
        Ok(v2.dir(&self.path))
    }

    /// Writes a note, in place of one with that name.
    ///
    /// # Errors
    /// `Unimplemented` without v2, I/O errors with the group.
    pub fn set_note(&self, name: &str, text: &str) -> Result<()> {
        let dir = self.noted()?;
        rustix::fs::setxattr(&dir, format!("{PREFIX}{name}"), text.as_bytes(), XattrFlags::empty()).act("note on", dir.display())
    }

    /// Takes a note away. None of that name is fine, as is no such group.
    ///
    /// # Errors
    /// As [`Manager::set_note`].
    pub fn remove_note(&self, name: &str) -> Result<()> {
        let dir = self.noted()?;
        match rustix::fs::removexattr(&dir, format!("{PREFIX}{name}")) {
            Err(Errno::NODATA | Errno::NOENT) => Ok(()),
            other => other.act("take note from", dir.display()),
        }
    }

    /// The note with this name.
    pub fn note(&self, name: &str) -> Option<String> {
        let mut text = [0u8; MAX_NOTE];
        let n = rustix::fs::getxattr(self.noted().ok()?, format!("{PREFIX}{name}"), &mut text[..]).ok()?;
        String::from_utf8(text[..n].to_vec()).ok()
    }

    /// Names of notes that begin with `start`.
    pub fn notes(&self, start: &str) -> Vec<String> {
        let mut names = vec![0u8; MAX_NAMES];
        let n = self.noted().ok().and_then(|dir| rustix::fs::listxattr(dir, &mut names[..]).ok()).unwrap_or(0);
        let names = names[..n].split(|b| *b == 0).filter_map(|name| std::str::from_utf8(name).ok()?.strip_prefix(PREFIX));
        names.filter(|name| name.starts_with(start)).map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_kept_and_taken_away() {
        let group = Manager::create(&format!("/mesocri-test-{}-notes", std::process::id())).unwrap();
        let result = std::panic::catch_unwind(|| {
            assert_eq!(group.note("oom.a"), None);
            group.set_note("oom.a", "1").unwrap();
            group.set_note("oom.b", "2").unwrap();
            group.set_note("other", "3").unwrap();
            group.set_note("oom.a", "17").unwrap();
            let mut names = group.notes("oom.");
            names.sort();
            assert_eq!((names, group.note("oom.a").unwrap()), (vec!["oom.a".to_owned(), "oom.b".to_owned()], "17".to_owned()));
            group.remove_note("oom.a").unwrap();
            group.remove_note("oom.a").unwrap();
            assert_eq!(group.notes("oom."), ["oom.b"]);
        });
        group.delete().unwrap();
        group.remove_note("oom.b").unwrap();
        assert!(group.notes("").is_empty());
        result.unwrap();
    }
}
