//! `linux/devices`: which device nodes a container has beyond the standard ones (which every OCI runtime makes itself), and
//! what the device control group allows.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::parts::{NoConfig, config, container_path, options};
use super::{Cx, Entry, Isolator};
use crate::model::container::Device;
use crate::model::error::{Act, Error, Kind, Result};
use crate::model::plan::LaunchPatch;
use crate::stdx::blocking;

const NAME: &str = "linux/devices";

/// Row of the registry.
pub const ENTRY: Entry = Entry {
    name: NAME,
    requires: &["filesystem/linux"],
    options: |table| options::<NoConfig>(NAME, table),
    create: |_, table| {
        let NoConfig {} = config(NAME, table)?;
        Ok(Box::new(Devices))
    },
};

/// Nodes of `/dev` that every container may use: major, minor (any when `None`). OCI runtime spec, "Default Devices".
const STANDARD: [(i64, Option<i64>); 8] = [
    (1, Some(3)), // null
    (1, Some(5)), // zero
    (1, Some(7)), // full
    (1, Some(8)), // random
    (1, Some(9)), // urandom
    (5, Some(0)), // tty
    (5, Some(2)), // ptmx
    (136, None),  // pts, console
];
/// Entries of the host's `/dev` that are file systems or links of the host's own, left out for privileged containers.
const NOT_DEVICES: [&str; 8] = ["pts", "shm", "mqueue", "fd", "hugepages", "console", ".lxc", ".udev"];
/// Deepest directory looked into for nodes.
const MAX_DEPTH: usize = 8;

struct Devices;

#[async_trait]
impl Isolator for Devices {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn prepare(&self, cx: &Cx<'_>) -> Result<LaunchPatch> {
        let Some(container) = cx.container else { return Ok(LaunchPatch::default()) };
        let (asked, privileged) = (container.spec.devices.clone(), container.spec.security.privileged);
        if asked.is_empty() && !privileged {
            return Ok(LaunchPatch { device_rules: standard_rules(), ..LaunchPatch::default() });
        }
        blocking::run("look at devices", move || patch(&asked, privileged)).await
    }
}

fn patch(asked: &[Device], privileged: bool) -> Result<LaunchPatch> {
    let mut patch =
        LaunchPatch { device_rules: if privileged { vec![rule(true, None, None, None, "rwm")] } else { standard_rules() }, ..LaunchPatch::default() };
    for device in asked {
        for (found, permissions) in nodes_of(device)? {
            // What was asked for by name comes first; a second node at a path would fail in init.
            if !patch.devices.iter().any(|d| d.path() == found.path()) {
                if !privileged {
                    patch.device_rules.push(rule(true, Some(found.typ()), Some(found.major()), Some(found.minor()), permissions));
                }
                patch.devices.push(found);
            }
        }
    }
    if privileged {
        let mut all = Vec::new();
        walk(Path::new("/dev"), Path::new("/dev"), MAX_DEPTH, &mut all)?;
        all.retain(|found| !patch.devices.iter().any(|d| d.path() == found.path()));
        patch.devices.append(&mut all);
    }
    Ok(patch)
}

/// Nothing, then the making of nodes (making is not opening), then the standard nodes.
fn standard_rules() -> Vec<LinuxDeviceCgroup> {
    let mut rules = vec![
        rule(false, None, None, None, "rwm"),
        rule(true, Some(LinuxDeviceType::C), None, None, "m"),
        rule(true, Some(LinuxDeviceType::B), None, None, "m"),
    ];
    rules.extend(STANDARD.map(|(major, minor)| rule(true, Some(LinuxDeviceType::C), Some(major), minor, "rwm")));
    rules
}

fn rule(allow: bool, typ: Option<LinuxDeviceType>, major: Option<i64>, minor: Option<i64>, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_typ(Some(typ.unwrap_or(LinuxDeviceType::A))).set_major(major).set_minor(minor).set_access(Some(access.to_owned()));
    rule
}

/// The node, or all nodes in the directory, that `device` names, with what is allowed on them.
fn nodes_of(device: &Device) -> Result<Vec<(LinuxDevice, &str)>> {
    let Device { host_path, container_path: inside, permissions } = device;
    let inside = container_path("device", if inside.is_empty() { host_path } else { inside })?;
    if !permissions.bytes().all(|b| matches!(b, b'r' | b'w' | b'm')) {
        return Err(Error::invalid(format!("device {host_path:?}: permissions {permissions:?} are not of r, w and m")));
    }
    let permissions = if permissions.is_empty() { "rwm" } else { permissions };
    let bad = |e| Error::with(Kind::InvalidArgument, format!("look at device {host_path:?}"), e);
    let host = std::fs::canonicalize(host_path).map_err(bad)?;
    let mut found = Vec::new();
    if host.is_dir() {
        walk(&host, &inside, MAX_DEPTH, &mut found)?;
    } else {
        found.extend(node(&host, inside)?);
    }
    if found.is_empty() {
        return Err(Error::invalid(format!("device {host_path:?} is no device node and has none in it")));
    }
    Ok(found.into_iter().map(|d| (d, permissions)).collect())
}

/// Collects device nodes below `host`. Links are left out: what they lead to is listed itself, or lies elsewhere.
fn walk(host: &Path, inside: &Path, depth: usize, found: &mut Vec<LinuxDevice>) -> Result<()> {
    for entry in std::fs::read_dir(host).act("read directory", host.display())? {
        let entry = entry.act("read directory", host.display())?;
        let name = entry.file_name();
        if NOT_DEVICES.iter().any(|n| name == *n) {
            continue;
        }
        let (path, inside) = (entry.path(), inside.join(&name));
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth > 0 => walk(&path, &inside, depth - 1, found)?,
            Ok(_) => found.extend(node(&path, inside)?),
            // Hot-plugged nodes come and go.
            Err(_) => {}
        }
    }
    found.sort_by(|a, b| a.path().cmp(b.path()));
    Ok(())
}

/// The node at `host` as seen at `inside`; `None` when it is no device or has just gone.
fn node(host: &Path, inside: PathBuf) -> Result<Option<LinuxDevice>> {
    let meta = match std::fs::symlink_metadata(host) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(format!("stat {}", host.display()), e)),
    };
    let typ = match meta.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        _ => return Ok(None),
    };
    let mut device = LinuxDevice::default();
    device
        .set_path(inside)
        .set_typ(typ)
        .set_major(i64::from(rustix::fs::major(meta.rdev())))
        .set_minor(i64::from(rustix::fs::minor(meta.rdev())))
        .set_file_mode(Some(meta.mode() & 0o7777))
        .set_uid(Some(meta.uid()))
        .set_gid(Some(meta.gid()));
    Ok(Some(device))
}

#[cfg(test)]
mod tests {
    use super::super::tests::Bench;
    use super::*;

    fn device(host: &str, inside: &str, permissions: &str) -> Device {
        Device { host_path: host.into(), container_path: inside.into(), permissions: permissions.into() }
    }

    #[tokio::test]
    async fn everything_is_denied_first_and_then_the_standard_nodes_allowed() {
        let patch = Bench::new().prepare(&Devices).await.unwrap();
        let rules: Vec<_> = patch.device_rules.iter().map(|r| format!("{} {r}", if r.allow() { "+" } else { "-" })).collect();
        assert_eq!(rules[..4], ["- a *:* rwm", "+ c *:* m", "+ b *:* m", "+ c 1:3 rwm"]);
        assert!(rules[1..].iter().all(|r| r.starts_with('+')) && !rules.contains(&"+ a *:* rwm".to_owned()));
        assert!(patch.devices.is_empty());
    }

    #[tokio::test]
    async fn nodes_directories_and_links_that_are_asked_for() {
        let mut bench = Bench::new();
        let dir = bench.path().join("nodes");
        std::fs::create_dir_all(dir.join("sub")).unwrap();
        for (path, minor) in [("a", 3), ("sub/b", 5)] {
            let (char, mode) = (nix::sys::stat::SFlag::S_IFCHR, nix::sys::stat::Mode::from_bits_truncate(0o620));
            nix::sys::stat::mknod(&dir.join(path), char, mode, nix::sys::stat::makedev(1, minor)).unwrap();
        }
        std::fs::write(dir.join("plain"), "").unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.join("link")).unwrap();
        bench.spec.devices =
            vec![device(dir.to_str().unwrap(), "/dev/x", "r"), device(dir.join("link").to_str().unwrap(), "/dev/z", ""), device("/dev/full", "", "w")];
        let patch = bench.prepare(&Devices).await.unwrap();
        let nodes: Vec<_> = patch.devices.iter().map(|d| format!("{} {}:{}", d.path().display(), d.major(), d.minor())).collect();
        assert_eq!(nodes, ["/dev/x/a 1:3", "/dev/x/sub/b 1:5", "/dev/z 1:5", "/dev/full 1:7"]);
        let rules: Vec<_> = patch.device_rules.iter().skip(standard_rules().len()).map(ToString::to_string).collect();
        assert_eq!(rules, ["c 1:3 r", "c 1:5 r", "c 1:5 rwm", "c 1:7 w"]);
    }

    #[tokio::test]
    async fn privileged_has_all_of_the_hosts_nodes_and_no_limit() {
        let mut bench = Bench::new();
        bench.spec.security.privileged = true;
        let patch = bench.prepare(&Devices).await.unwrap();
        assert_eq!(patch.device_rules.iter().map(ToString::to_string).collect::<Vec<_>>(), ["a *:* rwm"]);
        let has = |path: &str| patch.devices.iter().any(|d| d.path() == Path::new(path));
        assert!(has("/dev/null") && !has("/dev/console") && !patch.devices.iter().any(|d| d.path().starts_with("/dev/pts")));
    }

    #[tokio::test]
    async fn what_is_no_device_is_refused() {
        let mut bench = Bench::new();
        for bad in
            [device("/etc/passwd", "/dev/x", "r"), device("/no/such", "/dev/x", "r"), device("/dev/null", "/../x", "r"), device("/dev/null", "/dev/x", "rx")]
        {
            bench.spec.devices = vec![bad.clone()];
            assert_eq!(bench.prepare(&Devices).await.unwrap_err().kind, Kind::InvalidArgument, "{bad:?}");
        }
    }
}
