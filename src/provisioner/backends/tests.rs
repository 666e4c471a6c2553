//! Conformance of backends: every row gives the same tree from the same layers. Needs root: nodes are made and overlay is mounted.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use super::*;
use crate::provisioner::unpack::tree::OPAQUE;

struct Place {
    dir: tempfile::TempDir,
    layout: Layout,
    layers: Vec<PathBuf>,
}

impl Place {
    fn new(layers: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("r"), dir.path().join("s"));
        std::fs::create_dir_all(layout.staging()).unwrap();
        let layers: Vec<_> = (0..layers).map(|n| layout.layers().join(format!("{n:032x}/fs"))).collect();
        for layer in &layers {
            std::fs::create_dir_all(layer).unwrap();
        }
        Self { dir, layout, layers }
    }

    fn write(&self, layer: usize, path: &str, text: &str) -> PathBuf {
        let path = self.layers[layer].join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    fn hide(&self, layer: usize, path: &str) {
        let path = self.write(layer, path, "");
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::empty(), 0).unwrap();
    }

    /// Path to a line that says everything a container could see of it.
    fn tree(&self, name: &str) -> BTreeMap<String, String> {
        let backend = choose(name, &self.layout).unwrap();
        let dir = self.dir.path().join(format!("rootfs-{name}"));
        std::fs::create_dir(&dir).unwrap();
        let rootfs = backend.provision(&dir, &self.layers).unwrap();
        assert_eq!(rootfs.backend, name);
        let target = self.dir.path().join(format!("merged-{name}"));
        std::fs::create_dir(&target).unwrap();
        let mounts = rootfs.mounts;
        // A mount namespace that ends with its thread, so that nothing stays mounted.
        let tree = std::thread::spawn(move || {
            use nix::mount::MsFlags;
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            for mount in &mounts {
                mount_one(mount, &target);
            }
            let mut tree = BTreeMap::new();
            walk(&target, &target, &mut tree);
            // It is writable, and writing does not reach the layers.
            std::fs::write(target.join("written"), "x").unwrap();
            tree
        });
        let tree = tree.join().unwrap();
        assert!(self.layers.iter().all(|l| !l.join("written").exists()));
        for _ in 0..2 {
            crate::provisioner::remove::tree(&dir).unwrap();
        }
        tree
    }
}

fn mount_one(mount: &crate::model::image::RootMount, target: &Path) {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
    use std::os::fd::AsFd;
    if mount.fstype == "bind" {
        nix::mount::mount(Some(mount.source.as_str()), target, None::<&str>, nix::mount::MsFlags::MS_BIND, None::<&str>).unwrap();
        return;
    }
    // One lower directory at a time: 128 of them do not fit into the page of mount(2).
    let fs = rustix::mount::fsopen(mount.fstype.as_str(), FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for option in &mount.options {
        let (key, value) = option.split_once('=').unwrap();
        if key == "lowerdir" {
            for lower in value.split(':') {
                rustix::mount::fsconfig_set_string(fs.as_fd(), "lowerdir+", lower).unwrap();
            }
        } else {
            rustix::mount::fsconfig_set_string(fs.as_fd(), key, value).unwrap();
        }
    }
    rustix::mount::fsconfig_create(fs.as_fd()).unwrap();
    let made = rustix::mount::fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    rustix::mount::move_mount(made.as_fd(), "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).unwrap();
}

fn walk(root: &Path, dir: &Path, tree: &mut BTreeMap<String, String>) {
    let describe = |path: &Path, tree: &mut BTreeMap<String, String>| {
        let meta = std::fs::symlink_metadata(path).unwrap();
        let kind = meta.file_type();
        let content = match () {
            () if kind.is_symlink() => std::fs::read_link(path).unwrap().display().to_string(),
            () if kind.is_file() => std::fs::read_to_string(path).unwrap(),
            () if kind.is_char_device() => meta.rdev().to_string(),
            () => String::new(),
        };
        let links = if kind.is_dir() { 0 } else { meta.nlink() };
        let mtime = if kind.is_dir() { 0 } else { meta.mtime() };
        let mut value = [0u8; 64];
        let n = rustix::fs::lgetxattr(path, "user.note", value.as_mut_slice()).unwrap_or(0);
        let note = String::from_utf8_lossy(&value[..n]).into_owned();
        let line = format!("{:o} {}:{} links {links} at {mtime} [{note}] {content}", meta.mode(), meta.uid(), meta.gid());
        tree.insert(path.strip_prefix(root).unwrap().display().to_string(), line);
        kind.is_dir()
    };
    describe(dir, tree);
    let mut entries: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for entry in entries {
        if describe(&entry, tree) {
            walk(root, &entry, tree);
        }
    }
}

#[test]
fn all_give_the_same_tree() {
    let place = Place::new(3);
    place.write(0, "gone/below", "1");
    place.write(0, "opaque/below", "1");
    place.write(0, "was-dir/x", "1");
    place.write(0, "was-file", "1");
    place.write(0, "stays/low", "low");
    let first = place.write(0, "hard/a", "linked");
    std::fs::hard_link(&first, place.layers[0].join("hard/b")).unwrap();
    let setuid = place.write(0, "setuid", "s");
    std::os::unix::fs::lchown(&setuid, Some(1000), Some(1001)).unwrap();
    std::fs::set_permissions(&setuid, std::fs::Permissions::from_mode(0o4711)).unwrap();
    rustix::fs::lsetxattr(&setuid, "user.note", b"kept", rustix::fs::XattrFlags::empty()).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", place.layers[0].join("link")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, place.layers[0].join("null"), rustix::fs::FileType::CharacterDevice, 0o666.into(), rustix::fs::makedev(1, 3)).unwrap();
    place.hide(1, "gone");
    place.write(1, "opaque/above", "2");
    rustix::fs::lsetxattr(place.layers[1].join("opaque"), OPAQUE, b"y", rustix::fs::XattrFlags::empty()).unwrap();
    place.write(1, "was-dir", "now a file");
    place.write(1, "was-file/x", "now a directory");
    place.write(2, "gone/again", "3");
    place.write(2, "stays/high", "high");
    std::fs::set_permissions(&place.layers[2], std::fs::Permissions::from_mode(0o755)).unwrap();

    let trees: Vec<_> = BACKENDS.iter().map(|(name, _)| (name, place.tree(name))).collect();
    let (_, expected) = &trees[0];
    for name in ["gone/again", "opaque/above", "stays/low", "stays/high", "was-file/x", "hard/b"] {
        assert!(expected.contains_key(name), "{name} is missing");
    }
    for name in ["gone/below", "opaque/below", "was-dir/x"] {
        assert!(!expected.contains_key(name), "{name} shows");
    }
    assert!(expected["setuid"].starts_with("104711 1000:1001") && expected["setuid"].contains("[kept]"));
    assert!(expected["hard/a"].contains("links 2"));
    assert!(expected[""].starts_with("40755 0:0"));
    for (name, tree) in &trees {
        assert_eq!(tree, expected, "{name}");
    }
}

#[test]
fn takes_128_layers() {
    let place = Place::new(128);
    for n in 0..128 {
        place.write(n, &format!("f{n}"), "x");
        place.write(n, "same", &n.to_string());
    }
    for (name, _) in BACKENDS {
        let tree = place.tree(name);
        assert_eq!(tree.keys().filter(|k| k.starts_with('f')).count(), 128, "{name}");
        assert!(tree["same"].ends_with(" 127"), "{name}");
    }
}

#[test]
fn unknown_names_are_refused() {
    let place = Place::new(0);
    assert_eq!(choose("aufs", &place.layout).err().unwrap().kind, crate::model::Kind::InvalidArgument);
    assert_eq!(choose("", &place.layout).unwrap().name(), "overlay");
}
