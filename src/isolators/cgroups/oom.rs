//! Lack of memory in a scope that is gone.
//!
//! systemd removes a scope's group as soon as its last process has ended, so the group's own count of kills is lost before anyone
//! can ask. The slice above counts what happened below it and stays: what it has more than the groups in it happened in groups
//! that are gone. How much that was when a container was placed stands in a note on the slice; the rest is the container's own.
//! Kills that were told of one container are added to the notes of its neighbours, so that they are told once.
//!
//! v1 counts in each group alone: there nothing replaces a group that is gone.

use crate::cgroups::Manager;
use crate::model::ContainerId;
use crate::model::error::Result;

/// Follows a count that has been told.
const TOLD: &str = " told";

fn note_of(id: &ContainerId) -> String {
    format!("oom.{id}")
}

fn parse(note: &str) -> Option<(u64, bool)> {
    let told = note.strip_suffix(TOLD);
    Some((told.unwrap_or(note).parse().ok()?, told.is_some()))
}

fn format((count, told): (u64, bool)) -> String {
    format!("{count}{}", if told { TOLD } else { "" })
}

/// Kills in groups of the slice that are gone.
fn gone(slice: &Manager) -> Option<u64> {
    // The groups first: one that goes between the two readings would count as gone with all its kills.
    let present: u64 = slice.children().ok()?.iter().filter_map(|name| slice.below(name).ok()?.oom_kills()).sum();
    Some(slice.oom_kills()?.saturating_sub(present))
}

/// Before the container runs.
///
/// # Errors
/// When the note cannot be written.
pub(super) fn begin(slice: &Manager, id: &ContainerId) -> Result<()> {
    gone(slice).map_or(Ok(()), |count| slice.set_note(&note_of(id), &format((count, false))))
}

/// After its end: kills in the container whose group is, or was, `scope`.
pub(super) fn kills(slice: &Manager, scope: &Manager, id: &ContainerId) -> Option<u64> {
    let noted = slice.note(&note_of(id)).and_then(|note| parse(&note));
    let kills = scope.oom_kills().or_else(|| Some(gone(slice)?.saturating_sub(noted?.0)))?;
    if let Some((count, false)) = noted
        && kills > 0
    {
        tell(slice, id, count, kills);
    }
    Some(kills)
}

/// Notes that they are told.
fn tell(slice: &Manager, id: &ContainerId, count: u64, kills: u64) {
    let own = note_of(id);
    for name in slice.notes("oom.") {
        let Some((neighbour, told)) = slice.note(&name).and_then(|note| parse(&note)) else { continue };
        let note = if name == own { (count, true) } else { (neighbour.saturating_add(kills), told) };
        // A neighbour that is told of them too is a wrong reason for its end, nothing worse.
        if let Err(error) = slice.set_note(&name, &format(note)) {
            tracing::debug!(%error, "kills for lack of memory may be told twice");
        }
    }
}

/// The container is gone for good.
///
/// # Errors
/// When the note cannot be taken away.
pub(super) fn end(slice: &Manager, id: &ContainerId) -> Result<()> {
    slice.remove_note(&note_of(id))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cgroups::Host;
    use crate::cgroups::host::{Controller, Hierarchy, Version};

    /// A slice in a scratch directory that takes extended attributes, with groups and their counts.
    struct Case {
        dir: tempfile::TempDir,
        host: Arc<Host>,
    }

    impl Case {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let hierarchy = Hierarchy { root: dir.path().to_owned(), version: Version::V2, controllers: vec![Controller::Memory] };
            Self { host: Arc::new(Host::from_hierarchies(vec![hierarchy])), dir }
        }

        fn count(&self, path: &str, kills: u64) -> Manager {
            let dir = self.dir.path().join(path);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("memory.events"), format!("low 0\noom_kill {kills}\n")).unwrap();
            Manager::open_on(self.host.clone(), &format!("/{path}")).unwrap()
        }

        fn vanish(&self, path: &str) {
            std::fs::remove_dir_all(self.dir.path().join(path)).unwrap();
        }
    }

    #[test]
    fn kills_in_scopes_that_are_gone_are_told_once() {
        let case = Case::new();
        let id = ContainerId::from_string;
        let slice = case.count("s", 3);
        let (a, b, c) = (case.count("s/a", 0), case.count("s/b", 0), case.count("s/c", 0));
        for name in ["a", "b", "c"] {
            begin(&slice, &id(name)).unwrap();
        }
        // One in `c`, which lives on; two in `a`, which goes.
        case.count("s/c", 1);
        case.count("s", 6);
        case.vanish("s/a");
        assert_eq!(kills(&slice, &a, &id("a")), Some(2));
        assert_eq!(kills(&slice, &a, &id("a")), Some(2), "a restarted daemon asks again");
        // `b` ends by another's signal.
        case.vanish("s/b");
        assert_eq!(kills(&slice, &b, &id("b")), Some(0));
        // `c` is asked while its group is there, and after it has gone.
        assert_eq!(kills(&slice, &c, &id("c")), Some(1));
        case.vanish("s/c");
        assert_eq!(kills(&slice, &c, &id("c")), Some(1));
        assert_eq!(kills(&slice, &b, &id("b")), Some(0));
        // One that came later.
        let d = case.count("s/d", 0);
        begin(&slice, &id("d")).unwrap();
        case.vanish("s/d");
        assert_eq!(kills(&slice, &d, &id("d")), Some(0));
        for name in ["a", "b", "c", "d"] {
            end(&slice, &id(name)).unwrap();
        }
        assert_eq!(kills(&slice, &a, &id("a")), None, "nobody knows any more");
        assert!(slice.notes("").is_empty());
    }
}
