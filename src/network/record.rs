//! What is kept on disk about a pod's network: which one attached it and what undoing that needs.
//!
//! Written before the first act of an attach and removed after the last act of a detach, so a pod without a record has
//! nothing outside its namespace. Address leases are these records and nothing else: the allocator is rebuilt from them.

use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;

use serde::{Deserialize, Serialize};

use super::cni::Attempt;
use crate::disk::Layout;
use crate::disk::record::{self, Durability};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::{PodId, pod::PortMapping};

/// Which network attached the pod, and its facts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "network", rename_all = "lowercase")]
pub enum Record {
    /// A loopback and nothing else.
    None,
    /// The built-in bridge.
    Bridge(Lease),
    /// A CNI network.
    Cni(Box<Attempt>),
}

/// What a pod holds of the built-in bridge.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lease {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports on the host.
    pub ports: Vec<PortMapping>,
}

/// The records of one tree.
#[derive(Clone, Debug)]
pub struct Records {
    layout: Layout,
}

impl Records {
    /// Opens (and makes) the directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(layout: Layout) -> Result<Self> {
        let dir = layout.network_records();
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).act("create directory", dir.display())?;
        Ok(Self { layout })
    }

    /// Writes the pod's record.
    ///
    /// # Errors
    /// I/O errors.
    pub fn put(&self, pod: &PodId, value: &Record) -> Result<()> {
        record::write(&self.layout.network_record(pod), value, Durability::Atomic)
    }

    /// Reads the pod's record; `None` when it was never attached or is detached. An unreadable one (a power cut) is moved
    /// to the quarantine and counts as none: what it described went with the power.
    ///
    /// # Errors
    /// I/O errors.
    pub fn get(&self, pod: &PodId) -> Result<Option<Record>> {
        let path = self.layout.network_record(pod);
        match record::read(&path) {
            Ok(found) => Ok(Some(found)),
            Err(e) if e.kind == Kind::NotFound => Ok(None),
            Err(e) if e.kind == Kind::DataLoss => {
                let text = record::quarantine(&self.layout.quarantine(), &path, &e);
                tracing::warn!(pod = %pod, "unreadable network record: {text}: {e}");
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Removes the pod's record; fine when there is none.
    ///
    /// # Errors
    /// I/O errors.
    pub fn remove(&self, pod: &PodId) -> Result<()> {
        let path = self.layout.network_record(pod);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(format!("remove {}", path.display()), e)),
            _ => Ok(()),
        }
    }

    /// All records.
    ///
    /// # Errors
    /// I/O errors.
    pub fn all(&self) -> Result<Vec<(PodId, Record)>> {
        let dir = self.layout.network_records();
        let mut all = Vec::new();
        for entry in std::fs::read_dir(&dir).act("list", dir.display())? {
            let name = entry.act("list", dir.display())?.file_name();
            // Temporary files of the record writer start with a dot.
            let Some(id) = name.to_str().filter(|n| !n.starts_with('.')).and_then(|n| n.strip_suffix(".json")) else { continue };
            let pod = PodId::from_string(id);
            if let Some(found) = self.get(&pod)? {
                all.push((pod, found));
            }
        }
        Ok(all)
    }
}
