//! The format number of the whole tree. Older trees open; a newer one is refused before anything in it is touched.
//!
//! # When it rises
//! A field that older versions may ignore, with a default for records that lack it, changes nothing. What an older version would
//! misread raises the number here and in [`record::VERSION`](super::record::VERSION), which are one: a record that claims more than
//! the tree it lies in is damaged, not new.

use super::Layout;
use super::record::{self, Durability, VERSION};
use crate::model::error::{Error, Result};

/// Checks the number of the tree at `layout`, writing it where there is none or an older one.
///
/// # Errors
/// `FailedPrecondition` for a tree of a newer version; I/O errors.
pub fn check(layout: &Layout) -> Result<()> {
    let path = layout.version();
    let found = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse::<u32>().ok(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(Error::io(format!("read {}", path.display()), e)),
    };
    match found {
        Some(VERSION) => Ok(()),
        Some(newer) if newer > VERSION => Err(Error::precondition(format!(
            "open {}: it was written by a newer mesocri (format {newer}, this one reads up to {VERSION}); install that version again, or use another directory",
            layout.root.display()
        ))),
        // Older, missing, or torn by a power cut at its very first write: the records carry their own versions.
        _ => record::write_bytes(&path, format!("{VERSION}\n").as_bytes(), Durability::Synced),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::error::Kind;

    #[test]
    fn older_trees_open_and_newer_ones_are_refused_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path(), dir.path().join("state"));
        let text = || std::fs::read_to_string(layout.version()).unwrap();
        check(&layout).unwrap();
        assert_eq!(text(), format!("{VERSION}\n"));
        for older in ["0\n", "", "torn"] {
            std::fs::write(layout.version(), older).unwrap();
            check(&layout).unwrap();
            assert_eq!(text(), format!("{VERSION}\n"), "{older:?}");
        }
        let newer = format!("{}\n", VERSION + 1);
        std::fs::write(layout.version(), &newer).unwrap();
        let error = check(&layout).unwrap_err();
        assert_eq!(error.kind, Kind::FailedPrecondition);
        assert!(error.to_string().contains("newer mesocri"), "{error}");
        assert_eq!(text(), newer);
    }
}
