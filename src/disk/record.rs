//! Records: versioned JSON envelopes written by atomic rename, read with quarantine.
//!
//! A record is either the old or the new one, never half of each. Pod and container records are not synced: after a power cut
//! their containers are gone anyway, and an empty record is quarantined. Image records are synced, because they are the
//! commit point of a pull ([`Durability::Synced`]).

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::model::error::{Act, Error, Kind, Result};

/// Version written into every envelope. A higher one is refused, a lower one would be migrated.
pub const VERSION: u32 = 1;

/// Whether the bytes must survive a power cut when [`write`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Survives a crash of the daemon, not of the machine.
    Atomic,
    /// Survives a power cut: file and directory are synced.
    Synced,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    record: T,
}

/// Writes `record` to `path`, atomically replacing what was there. The directory must exist.
///
/// # Errors
/// I/O errors with the act and the path.
pub fn write<T: Serialize>(path: &Path, record: &T, durability: Durability) -> Result<()> {
    write_bytes(path, &encode(record).act("encode record", path.display())?, durability)
}

/// The bytes that [`write`] writes.
///
/// # Errors
/// Those of JSON.
pub fn encode<T: Serialize>(record: &T) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec(&Envelope { version: VERSION, record })
}

/// Atomically replaces the file at `path` with `bytes`, mode 0600.
///
/// # Errors
/// I/O errors with the act and the path.
pub fn write_bytes(path: &Path, bytes: &[u8], durability: Durability) -> Result<()> {
    let dir = path.parent().ok_or_else(|| Error::internal(format!("write {}: no parent directory", path.display())))?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    // One writer per record (its actor), so a fixed temporary name is enough and a crash leaves at most one behind.
    name.push(".new");
    let temporary = dir.join(name);
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary).act("create", temporary.display())?;
    file.write_all(bytes).act("write", temporary.display())?;
    if durability == Durability::Synced {
        file.sync_data().act("sync", temporary.display())?;
    }
    drop(file);
    std::fs::rename(&temporary, path).act("rename into place", path.display())?;
    if durability == Durability::Synced {
        sync_dir(dir)?;
    }
    Ok(())
}

/// Syncs a directory, so that names in it survive a power cut.
///
/// # Errors
/// I/O errors with the act and the path.
pub fn sync_dir(dir: &Path) -> Result<()> {
    std::fs::File::open(dir).and_then(|d| d.sync_all()).act("sync directory", dir.display())
}

/// Reads the record at `path`.
///
/// # Errors
/// `NotFound` when there is none; `DataLoss` when it cannot be read or is from a newer version.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(Error::not_found(format!("read record {}", path.display()))),
        Err(e) => return Err(Error::io(format!("read record {}", path.display()), e)),
    };
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let lost = |e: serde_json::Error| Error::with(Kind::DataLoss, format!("decode record {}", path.display()), e);
    let version = serde_json::from_slice::<Version>(&bytes).map_err(lost)?.version;
    if version > VERSION {
        return Err(Error::new(
            Kind::DataLoss,
            format!("decode record {}: written by a newer mesocri (record version {version}, this one reads up to {VERSION})", path.display()),
        ));
    }
    Ok(serde_json::from_slice::<Envelope<T>>(&bytes).map_err(lost)?.record)
}

/// Moves an unreadable record (file or whole directory) out of the way, with the reason beside it. Never fails upwards:
/// a record that cannot even be moved stays where it is and is reported by the returned text.
pub fn quarantine(quarantine_dir: &Path, path: &Path, reason: &Error) -> String {
    let stamp = crate::stdx::clock::now_ns();
    let name = path.file_name().map_or_else(|| "record".into(), |n| n.to_string_lossy().into_owned());
    let target = quarantine_dir.join(format!("{stamp}-{name}"));
    let moved = std::fs::create_dir_all(quarantine_dir).and_then(|()| std::fs::rename(path, &target));
    match moved {
        Ok(()) => {
            // Best effort: the text is a courtesy, the log has it too.
            let _ = std::fs::write(target.with_extension("reason"), format!("{}: {reason}\n", path.display()));
            format!("{} moved to {}", path.display(), target.display())
        }
        Err(e) => format!("{} could not be moved to {}: {e}", path.display(), target.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_replaces_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        for n in 0..3u32 {
            write(&path, &n, Durability::Synced).unwrap();
            assert_eq!(read::<u32>(&path).unwrap(), n);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn truncated_and_future_records_are_data_loss() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        assert_eq!(read::<u32>(&path).unwrap_err().kind, Kind::NotFound);
        for text in ["", "{", "{\"version\":1}", "{\"version\":99,\"record\":1}"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read::<u32>(&path).unwrap_err().kind, Kind::DataLoss, "{text}");
        }
        let text = quarantine(&dir.path().join("q"), &path, &Error::internal("why"));
        assert!(text.contains("moved to"));
        assert!(!path.exists());
    }
}
