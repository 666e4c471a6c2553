//! What a root filesystem looks like, file by file, and how ours are mounted.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use mesocri::model::image::{RootFs, RootMount};
use mesocri::provisioner::unpack::Hasher;
use nix::mount::{MntFlags, MsFlags};

/// Path (escaped) to fields.
pub type Tree = BTreeMap<String, BTreeMap<&'static str, String>>;

/// Reads the tree below `root`.
pub fn read(root: &Path) -> Tree {
    let mut tree = Tree::new();
    // Names of one file: each says what the first is. The number of links is no use: on overlay it counts hidden names too.
    let mut inodes: HashMap<_, Vec<String>> = HashMap::new();
    walk(root, Path::new(""), &mut tree, &mut inodes);
    for names in inodes.values().filter(|names| names.len() > 1) {
        for name in names {
            tree.get_mut(name).unwrap().insert("same as", names[0].clone());
        }
    }
    tree
}

fn walk(root: &Path, name: &Path, tree: &mut Tree, inodes: &mut HashMap<(u64, u64), Vec<String>>) {
    let path = root.join(name);
    let meta = std::fs::symlink_metadata(&path).unwrap();
    let kind = meta.file_type();
    let shown = if name.as_os_str().is_empty() { ".".to_owned() } else { name.as_os_str().as_bytes().escape_ascii().to_string() };
    let mut fields = BTreeMap::from([
        ("mode", format!("{:o}", meta.mode())),
        ("owner", format!("{}:{}", meta.uid(), meta.gid())),
        ("mtime", format!("{}.{:09}", meta.mtime(), meta.mtime_nsec())),
    ]);
    if kind.is_symlink() {
        fields.insert("target", std::fs::read_link(&path).unwrap().as_os_str().as_bytes().escape_ascii().to_string());
    }
    if kind.is_file() {
        fields.insert("size", meta.size().to_string());
        fields.insert("content", Hasher::of(&std::fs::read(&path).unwrap(), None).unwrap().to_string());
    }
    if kind.is_char_device() || kind.is_block_device() {
        fields.insert("device", format!("{}:{}", nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev())));
    }
    if !kind.is_dir() && meta.nlink() > 1 {
        inodes.entry((meta.dev(), meta.ino())).or_default().push(shown.clone());
    }
    let attributes = xattrs(&path);
    if !attributes.is_empty() {
        fields.insert("xattrs", attributes);
    }
    tree.insert(shown, fields);
    if kind.is_dir() {
        let mut entries: Vec<_> = std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
        entries.sort();
        for entry in entries {
            walk(root, &name.join(entry), tree, inodes);
        }
    }
}

fn xattrs(path: &Path) -> String {
    let mut names = vec![0u8; 64 << 10];
    let length = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap();
    let mut lines: Vec<String> = names[..length]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0u8; 64 << 10];
            let length = rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(name), value.as_mut_slice()).unwrap();
            format!("{}={}", name.escape_ascii(), value[..length].escape_ascii())
        })
        .collect();
    lines.sort();
    lines.join(" ")
}

/// Where two trees differ: path, field, what each has.
pub fn differences(ours: &Tree, theirs: &Tree) -> Vec<(String, &'static str, String, String)> {
    let mut found = Vec::new();
    let paths: std::collections::BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    for path in paths {
        let (Some(a), Some(b)) = (ours.get(path), theirs.get(path)) else {
            let has = |tree: &Tree| if tree.contains_key(path) { "there" } else { "missing" }.to_owned();
            found.push((path.clone(), "presence", has(ours), has(theirs)));
            continue;
        };
        let fields: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
        for field in fields {
            let (a, b) = (a.get(field).cloned().unwrap_or_default(), b.get(field).cloned().unwrap_or_default());
            if a != b {
                found.push((path.clone(), *field, a, b));
            }
        }
    }
    found
}

/// Mounts `rootfs` on `target` as a container would have it, reads it and unmounts it. In the caller's mount namespace.
pub fn of(rootfs: &RootFs, target: &Path) -> Tree {
    for mount in &rootfs.mounts {
        mount_one(mount, target);
    }
    let tree = read(target);
    while nix::mount::umount2(target, MntFlags::MNT_DETACH).is_ok() {}
    tree
}

fn mount_one(mount: &RootMount, target: &Path) {
    let data: Vec<String> = mount.options.iter().filter(|o| *o != "ro").cloned().collect();
    match mount.fstype.as_str() {
        "overlay" => mesocri::init::overlay::mount_on(target, &data, false).unwrap(),
        "erofs" => {
            let made = mesocri::disk::layer::mount(Path::new(&mount.source), rustix::mount::MountAttrFlags::empty()).unwrap();
            let flags = rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(&made, "", rustix::fs::CWD, target, flags).unwrap();
        }
        _ => nix::mount::mount(Some(mount.source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap(),
    }
}
