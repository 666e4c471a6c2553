//! `linux/seccomp`: the system call filter, compiled once per profile and set of capabilities, kept as BPF (design §1.15).
//!
//! Our own init loads the BPF file raw; the OCI form of the same rules goes into the spec for other runtimes.

mod compile;
mod profile;

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use oci_spec::runtime::{Capabilities, LinuxSeccomp};
use sha2::{Digest, Sha256};

use self::profile::Profile;
use super::parts::{NoConfig, config, options};
use super::{Cx, Entry, Isolator, linux_capabilities};
use crate::disk::{Layout, record};
use crate::model::PodId;
use crate::model::container::{Security, SecurityProfile};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::plan::LaunchPatch;
use crate::stdx::blocking;

const NAME: &str = "linux/seccomp";
/// The runtime's own profile. Its default is `ENOSYS`, so programs fall back where a call is too new for the list.
const RUNTIME_DEFAULT: &[u8] = include_bytes!("../seccomp-default.json");
/// Bytes of a profile file; the largest real ones have some ten kilobytes.
const MAX_PROFILE: u64 = 1 << 20;
/// Changes when the compiler does, so that a file of an older daemon is not taken for ours.
const COMPILER: &str = "mesocri seccomp 1";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["linux/capabilities"],
    options: |table| options::<NoConfig>(NAME, table),
    create: |deps, table| {
        let NoConfig {} = config(NAME, table)?;
        let own = linux_capabilities::own()?;
        Ok(Box::new(Seccomp { filters: Arc::new(Filters { layout: deps.layout.clone(), done: Mutex::default(), compiling: Mutex::new(()) }), own }))
    },
};

struct Seccomp {
    filters: Arc<Filters>,
    own: Capabilities,
}

#[async_trait]
impl Isolator for Seccomp {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let Some(container) = cx.container else { return Ok(LaunchPatch::default()) };
        let security = &container.spec.security;
        let bytes = match &security.seccomp {
            _ if security.privileged => return Ok(LaunchPatch::default()),
            SecurityProfile::Unconfined => return Ok(LaunchPatch::default()),
            SecurityProfile::RuntimeDefault => RUNTIME_DEFAULT.to_vec(),
            SecurityProfile::Localhost(name) => read_profile(name)?,
        };
        let granted = linux_capabilities::granted(security, &self.own)?;
        let filter = Filters::get(&self.filters, bytes, granted).await?;
        Ok(LaunchPatch { seccomp: Some(filter.oci.clone()), seccomp_bpf: Some(filter.path.clone()), ..LaunchPatch::default() })
    }

    /// Compiling takes tens of milliseconds (libseccomp copies its tables for each rule). The filter that nearly every container
    /// wants is made in the background now, so that the first one after a boot need not wait for it.
    async fn recover(&self, _: &[PodId]) -> Result<()> {
        let granted = linux_capabilities::granted(&Security::default(), &self.own)?;
        let filters = self.filters.clone();
        tokio::spawn(async move {
            if let Err(e) = Filters::get(&filters, RUNTIME_DEFAULT.to_vec(), granted).await {
                tracing::warn!(error = %e, "the default seccomp profile could not be compiled ahead");
            }
        });
        Ok(())
    }
}

/// A compiled filter.
struct Filter {
    path: PathBuf,
    oci: LinuxSeccomp,
}

/// What decides on a filter: digest of the profile, and the capabilities in order.
type Key = (String, Vec<String>);

/// All filters of this daemon.
struct Filters {
    layout: Layout,
    done: Mutex<HashMap<Key, Arc<Filter>>>,
    /// Held while compiling: containers that start at once want the same filter.
    compiling: Mutex<()>,
}

impl Filters {
    async fn get(this: &Arc<Self>, bytes: Vec<u8>, granted: Capabilities) -> Result<Arc<Filter>> {
        let mut names: Vec<String> = granted.iter().map(ToString::to_string).collect();
        names.sort_unstable();
        let key = (hex(&Sha256::digest(&bytes)), names);
        if let Some(filter) = this.known(&key) {
            return Ok(filter);
        }
        let this = this.clone();
        blocking::run("compile seccomp profile", move || {
            let _one_at_a_time = this.compiling.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(filter) = this.known(&key) {
                return Ok(filter);
            }
            let filter = Arc::new(this.make(&bytes, &granted)?);
            this.done.lock().unwrap_or_else(PoisonError::into_inner).insert(key, filter.clone());
            Ok(filter)
        })
        .await
    }

    /// A filter that was made before and whose file nobody has cleaned away.
    fn known(&self, key: &Key) -> Option<Arc<Filter>> {
        let filter = self.done.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()?;
        filter.path.exists().then_some(filter)
    }

    /// Takes the file of an earlier daemon, else compiles. The name says what is in it: the rules that hold for these
    /// capabilities.
    fn make(&self, bytes: &[u8], granted: &Capabilities) -> Result<Filter> {
        let oci = Profile::parse(bytes)?.resolve(granted)?;
        let rules = serde_json::to_vec(&oci).act("encode", "seccomp rules")?;
        let name = hex(&Sha256::new().chain_update(COMPILER).chain_update(compile::library_version()).chain_update(rules).finalize());
        let dir = self.layout.seccomp();
        let path = dir.join(format!("{name}.bpf"));
        if !path.exists() {
            std::fs::create_dir_all(&dir).act("create", dir.display())?;
            record::write_bytes(&path, &compile::compile(&oci)?, record::Durability::Atomic)?;
        }
        Ok(Filter { path, oci })
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// Reads the profile `localhost/<absolute path>` (the prefix is optional).
fn read_profile(name: &str) -> Result<Vec<u8>> {
    let path = Path::new(name.strip_prefix("localhost/").unwrap_or(name));
    if !path.is_absolute() {
        return Err(Error::invalid(format!("seccomp profile {name:?} is not an absolute path")));
    }
    let read = || -> std::io::Result<(bool, Vec<u8>)> {
        // Not blocking on a FIFO; what is no regular file is refused below.
        let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
        let regular = file.metadata()?.is_file();
        let mut bytes = Vec::new();
        if regular {
            file.take(MAX_PROFILE + 1).read_to_end(&mut bytes)?;
        }
        Ok((regular, bytes))
    };
    match read() {
        Ok((true, bytes)) if bytes.len() as u64 <= MAX_PROFILE => Ok(bytes),
        Ok((regular, _)) => Err(Error::invalid(format!("seccomp profile {}: {}", path.display(), if regular { "too large" } else { "not a regular file" }))),
        Err(e) => Err(Error::with(Kind::InvalidArgument, format!("read seccomp profile {}", path.display()), e)),
    }
}

#[cfg(test)]
mod tests;
