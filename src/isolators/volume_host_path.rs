//! `volume/host_path`: the request's volumes, bound from the host (cri-behaviour §10, Mounts). Images as volumes have been mounted on the
//! host by the provisioner before, and are bound from there.
//!
//! A volume replaces a default mount of the same destination, and one on or below `/dev`, `/sys`, `/proc` or `/run` takes out the
//! default mounts that it would hide.

use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::parts::{NoConfig, config, container_path, mount, options};
use super::{Cx, Entry, Isolator};
use crate::model::container::{Mount, Propagation};
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::plan::LaunchPatch;
use crate::stdx::blocking;

const NAME: &str = "volume/host_path";
/// Trees whose default mounts give way to a volume at or above them.
const OWN_TREES: [&str; 4] = ["/dev", "/sys", "/proc", "/run"];
/// First kernel with `mount_setattr(2)`, which recursive read-only mounts need.
const RRO_KERNEL: (u32, u32) = (5, 12);

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["filesystem/linux"],
    options: |table| options::<NoConfig>(NAME, table),
    create: |_, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(HostPath { rro: kernel().is_some_and(|k| k >= RRO_KERNEL), selinux: Path::new("/sys/fs/selinux/enforce").exists() }))
    },
};

struct HostPath {
    /// Whether the kernel has recursive read-only mounts.
    rro: bool,
    selinux: bool,
}

#[async_trait]
impl Isolator for HostPath {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let mut patch = LaunchPatch::default();
        let Some(container) = cx.container.filter(|c| !c.spec.mounts.is_empty()) else { return Ok(patch) };
        let volumes = container.spec.mounts.iter().map(|m| self.check(m)).collect::<Result<Vec<_>>>()?;
        // A volume may lie on a file system that does not answer (a dead server): then only this pod waits.
        let sources = blocking::run("look at volumes", {
            let mounts = container.spec.mounts.clone();
            let images = container.image_volumes.to_vec();
            move || sources(&mounts, images)
        })
        .await?;
        for (volume, source) in volumes.into_iter().zip(sources) {
            if OWN_TREES.iter().any(|tree| volume.destination.starts_with(tree)) {
                patch.remove_mounts.push(volume.destination.to_string_lossy().into_owned());
            }
            patch.mounts.push(mount(volume.destination, "bind", source, &volume.options));
        }
        Ok(patch)
    }
}

/// A volume that makes sense.
struct Volume {
    destination: PathBuf,
    options: [&'static str; 3],
}

impl HostPath {
    fn check(&self, m: &Mount) -> Result<Volume> {
        let destination = container_path("mount", &m.container_path)?;
        let bad = |why: &str| Error::invalid(format!("mount {}: {why}", destination.display()));
        if m.image.is_some() {
            return Ok(Volume { destination, options: ["rbind", "rprivate", "ro"] });
        }
        if !Path::new(&m.host_path).is_absolute() || m.host_path.contains('\0') {
            return Err(bad(&format!("host path {:?} is not an absolute path", m.host_path)));
        }
        if m.selinux_relabel && self.selinux {
            return Err(Error::new(Kind::Unimplemented, format!("mount {}: relabelling for SELinux is not built yet", destination.display())));
        }
        if m.recursive_read_only {
            if !m.readonly || m.propagation != Propagation::Private {
                return Err(bad("recursive read-only needs read-only and private propagation"));
            }
            if !self.rro {
                return Err(Error::new(Kind::Unimplemented, format!("RROUnsupported: mount {}: needs Linux 5.12", destination.display())));
            }
        }
        let access = match (m.recursive_read_only, m.readonly) {
            (true, _) => "rro",
            (false, true) => "ro",
            (false, false) => "rw",
        };
        let propagation = match m.propagation {
            Propagation::Private => "rprivate",
            Propagation::HostToContainer => "rslave",
            Propagation::Bidirectional => "rshared",
        };
        Ok(Volume { destination, options: ["rbind", propagation, access] })
    }
}

/// Where the volumes really lie: links resolved, missing directories made, propagation possible.
fn sources(mounts: &[Mount], images: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    let mut images = images.into_iter();
    let mut mountinfo = None;
    let mut sources = Vec::with_capacity(mounts.len());
    for m in mounts {
        if m.image.is_some() {
            sources.push(images.next().ok_or_else(|| Error::internal(format!("mount {}: its image is not mounted", m.container_path)))?);
            continue;
        }
        let source = resolve(Path::new(&m.host_path))?;
        if m.propagation != Propagation::Private {
            if mountinfo.is_none() {
                mountinfo = Some(std::fs::read("/proc/self/mountinfo").act("read", "/proc/self/mountinfo")?);
            }
            check_propagation(&source, m.propagation, mountinfo.as_deref().unwrap_or_default())?;
        }
        sources.push(source);
    }
    Ok(sources)
}

fn resolve(host_path: &Path) -> Result<PathBuf> {
    match std::fs::canonicalize(host_path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(host_path).act("create volume", host_path.display())?;
            std::fs::canonicalize(host_path).act("resolve volume", host_path.display())
        }
        other => other.act("resolve volume", host_path.display()),
    }
}

/// A mount can only pass on what its own parent passes on: mounts from the host need a shared or slave mount, mounts to the
/// host a shared one.
fn check_propagation(source: &Path, wish: Propagation, mountinfo: &[u8]) -> Result<()> {
    let (mount_point, shared, slave) = mount_of(source, mountinfo).ok_or_else(|| Error::internal(format!("find the mount of {}", source.display())))?;
    let (possible, needed) = match wish {
        Propagation::Private => return Ok(()),
        Propagation::HostToContainer => (shared || slave, "a shared or slave mount"),
        Propagation::Bidirectional => (shared, "a shared mount"),
    };
    if possible {
        return Ok(());
    }
    Err(Error::invalid(format!("volume {} lies on {}, which is not {needed}", source.display(), mount_point.display())))
}

/// Mount point that holds `path`, and whether it is shared and slave (proc_pid_mountinfo(5)).
fn mount_of(path: &Path, mountinfo: &[u8]) -> Option<(PathBuf, bool, bool)> {
    let mut best: Option<(PathBuf, bool, bool)> = None;
    for line in mountinfo.split(|b| *b == b'\n') {
        let mut fields = line.split(|b| *b == b' ');
        let Some(point) = fields.nth(4).map(unescape) else { continue };
        // Of two mounts at one place the later hides the earlier.
        if !path.starts_with(&point) || best.as_ref().is_some_and(|(b, ..)| b.components().count() > point.components().count()) {
            continue;
        }
        let (mut shared, mut slave) = (false, false);
        for field in fields.skip(1).take_while(|f| *f != b"-") {
            shared |= field.starts_with(b"shared:");
            slave |= field.starts_with(b"master:");
        }
        best = Some((point, shared, slave));
    }
    best
}

/// `\040` and the like to the bytes they stand for.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\').and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

fn kernel() -> Option<(u32, u32)> {
    let uname = rustix::system::uname();
    let mut parts = uname.release().to_str().ok()?.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, options};
    use super::*;
    use crate::model::container::ImageVolume;
    use std::os::unix::fs::PermissionsExt;

    const ISOLATOR: HostPath = HostPath { rro: true, selinux: false };

    fn volume(host: &Path, inside: &str) -> Mount {
        Mount { host_path: host.to_str().unwrap().into(), container_path: inside.into(), ..Mount::default() }
    }

    #[tokio::test]
    async fn links_are_resolved_missing_directories_made_flags_kept() {
        let mut bench = Bench::new();
        let (real, link, missing) = (bench.path().join("real"), bench.path().join("link"), bench.path().join("a/b"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        bench.spec.mounts = vec![
            Mount { readonly: true, ..volume(&link, "/v") },
            volume(&missing, "/w/"),
            Mount { readonly: true, recursive_read_only: true, ..volume(&real, "/x") },
        ];
        let patch = bench.prepare(&ISOLATOR).await.unwrap();
        let sources: Vec<_> = patch.mounts.iter().map(|m| m.source().clone().unwrap()).collect();
        assert_eq!(sources, [std::fs::canonicalize(&real).unwrap(), std::fs::canonicalize(&missing).unwrap(), std::fs::canonicalize(&real).unwrap()]);
        assert_eq!(std::fs::metadata(&missing).unwrap().permissions().mode() & 0o777, 0o755);
        assert_eq!(options(&patch, "/v"), ["rbind", "rprivate", "ro"]);
        assert_eq!(options(&patch, "/w"), ["rbind", "rprivate", "rw"]);
        assert_eq!(options(&patch, "/x"), ["rbind", "rprivate", "rro"]);
        assert!(patch.remove_mounts.is_empty());
    }

    #[tokio::test]
    async fn images_are_bound_read_only_each_in_its_place() {
        let mut bench = Bench::new();
        let here = bench.path().to_owned();
        let image = |inside: &str| Mount { image: Some(ImageVolume::default()), container_path: inside.into(), readonly: true, ..Mount::default() };
        bench.spec.mounts = vec![image("/a"), volume(&here, "/b"), image("/c")];
        bench.image_volumes = vec!["/one".into(), "/two".into()];
        let patch = bench.prepare(&ISOLATOR).await.unwrap();
        let sources: Vec<_> = patch.mounts.iter().map(|m| m.source().clone().unwrap()).collect();
        assert_eq!(sources, [PathBuf::from("/one"), std::fs::canonicalize(&here).unwrap(), PathBuf::from("/two")]);
        for inside in ["/a", "/c"] {
            assert_eq!(options(&patch, inside), ["rbind", "rprivate", "ro"]);
        }
    }

    #[tokio::test]
    async fn only_the_runtimes_own_trees_give_way() {
        let mut bench = Bench::new();
        let here = bench.path().to_owned();
        bench.spec.mounts = ["/dev/", "/sys/fs", "/etc", "/device"].iter().map(|inside| volume(&here, inside)).collect();
        assert_eq!(bench.prepare(&ISOLATOR).await.unwrap().remove_mounts, ["/dev", "/sys/fs"]);
    }

    #[tokio::test]
    async fn what_makes_no_sense_is_refused() {
        let mut bench = Bench::new();
        let here = bench.path().to_owned();
        let good = volume(&here, "/v");
        for (bad, kind) in [
            (volume(&here, "/"), Kind::InvalidArgument),
            (volume(&here, "/a/../../b"), Kind::InvalidArgument),
            (volume(Path::new("relative"), "/v"), Kind::InvalidArgument),
            (volume(Path::new(""), "/v"), Kind::InvalidArgument),
            (Mount { recursive_read_only: true, ..good.clone() }, Kind::InvalidArgument),
            (Mount { recursive_read_only: true, readonly: true, propagation: Propagation::HostToContainer, ..good.clone() }, Kind::InvalidArgument),
            (Mount { image: Some(ImageVolume::default()), host_path: String::new(), ..good.clone() }, Kind::Internal),
        ] {
            bench.spec.mounts = vec![bad.clone()];
            assert_eq!(bench.prepare(&ISOLATOR).await.unwrap_err().kind, kind, "{bad:?}");
        }
        let old = HostPath { rro: false, selinux: false };
        bench.spec.mounts = vec![Mount { recursive_read_only: true, readonly: true, ..good }];
        assert!(bench.prepare(&old).await.unwrap_err().to_string().starts_with("RROUnsupported: "));
    }

    #[test]
    fn propagation_needs_the_right_mount() {
        let info = b"1 0 8:1 / / rw - ext4 /dev/a rw\n\
            2 1 0:5 / /shared rw,nosuid shared:7 - tmpfs x rw\n\
            3 1 0:6 / /slave rw master:7 propagate_from:2 - tmpfs x rw\n\
            4 1 0:7 / /both rw shared:9 master:7 - tmpfs x rw\n\
            5 2 0:8 / /shared/with\\040space rw - tmpfs x rw\n\
            6 1 0:9 / /over rw shared:1 - tmpfs x rw\n\
            7 6 0:9 / /over rw - tmpfs x rw\n";
        use Propagation::{Bidirectional, HostToContainer, Private};
        for (path, from, both) in [
            ("/x", false, false),
            ("/shared", true, true),
            ("/shared/deep/er", true, true),
            ("/sharedx", false, false),
            ("/slave/x", true, false),
            ("/both", true, true),
            ("/shared/with space/x", false, false),
            ("/over/x", false, false),
        ] {
            let check = |wish| check_propagation(Path::new(path), wish, info).is_ok();
            assert_eq!((check(Private), check(HostToContainer), check(Bidirectional)), (true, from, both), "{path}");
        }
    }
}
