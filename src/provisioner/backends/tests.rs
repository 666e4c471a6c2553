//! Conformance of backends: on every file system, every row that the table allows gives the same tree from the same layers, in
//! whatever form they are kept. Needs root; file systems live in files on loop devices, in mount namespaces that end with their
//! threads.

mod file_systems;

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use nix::mount::{MntFlags, MsFlags};

use super::*;
use crate::model::Kind;
use crate::provisioner::config::Limits;
use crate::provisioner::remove;
use crate::provisioner::unpack::tests::{Item, archive, file, item, link, pax};
use crate::provisioner::unpack::{Expected, file_source, unpack};

/// A store on some file system, with layers in several forms.
struct Place {
    dir: PathBuf,
    layout: Layout,
}

impl Place {
    fn new(dir: &Path) -> Self {
        let layout = Layout::new(dir.join("r"), dir.join("s"));
        for dir in [layout.staging(), layout.layers(), layout.rootfs_all()] {
            std::fs::create_dir_all(dir).unwrap();
        }
        Self { dir: dir.to_owned(), layout }
    }

    /// Unpacks layers; `form` says how each is kept.
    fn layers(&self, archives: &[Vec<u8>], name: &str, form: impl Fn(usize) -> Form) -> Vec<PathBuf> {
        let one = |(number, blob): (usize, &Vec<u8>)| {
            let dir = self.layout.layers().join(format!("{name}-{number:04}"));
            std::fs::create_dir(&dir).unwrap();
            let form = form(number);
            let path = dir.join(if form == Form::Erofs { "fs.erofs" } else { "fs" });
            if form == Form::Directory {
                std::fs::create_dir(&path).unwrap();
            }
            unpack(file_source(&blob[..]), &path, form, &Expected::default(), Limits::default()).unwrap();
            path
        };
        archives.iter().enumerate().map(one).collect()
    }

    /// What a container would see, path to line. Classic is the way of old kernels.
    fn tree(&self, backend: &dyn Backend, layers: &[PathBuf], classic: bool) -> BTreeMap<String, String> {
        let dir = self.layout.rootfs_all().join(format!("c-{}-{classic}-{}", backend.name(), layers[0].parent().unwrap().file_name().unwrap().display()));
        std::fs::create_dir(&dir).unwrap();
        let stack: Vec<_> = layers.iter().map(|path| Layer { path, marks: false, lists_root: true }).collect();
        let rootfs = backend.provision(&dir, &stack).unwrap();
        assert_eq!(rootfs.backend, backend.name());
        assert!(rootfs.lookup.iter().all(|p| p.exists()));
        let target = self.dir.join("merged");
        std::fs::create_dir_all(&target).unwrap();
        for mount in &rootfs.mounts {
            mount_one(mount, &target, classic);
        }
        let mut tree = BTreeMap::new();
        walk(&target, &target, &mut tree);
        if rootfs.writable.is_some() {
            // Writing works, and does not reach the layers.
            std::fs::write(target.join("written"), "x").unwrap();
            std::fs::remove_file(target.join("gone/again")).unwrap_or_default();
            assert!(!target.join("gone/again").exists());
            let untouched = |path: &PathBuf| !crate::disk::layer::is_image(path) && path.join("written").exists();
            assert!(!layers.iter().any(untouched));
        } else {
            assert_eq!(std::fs::write(target.join("written"), "x").unwrap_err().raw_os_error(), Some(libc::EROFS));
        }
        while nix::mount::umount2(&target, MntFlags::MNT_DETACH).is_ok() {}
        for _ in 0..2 {
            remove::tree(&dir).unwrap();
        }
        tree
    }
}

/// As init does it.
fn mount_one(mount: &crate::model::image::RootMount, target: &Path, classic: bool) {
    let data: Vec<String> = mount.options.iter().filter(|o| *o != "ro").cloned().collect();
    match mount.fstype.as_str() {
        "overlay" => crate::init::overlay::mount_on(target, &data, classic).unwrap(),
        "erofs" => {
            let made = crate::disk::layer::mount(Path::new(&mount.source), rustix::mount::MountAttrFlags::empty()).unwrap();
            let flags = rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(&made, "", rustix::fs::CWD, target, flags).unwrap();
        }
        _ => {
            nix::mount::mount(Some(mount.source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
            if mount.options.iter().any(|o| o == "ro") {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                nix::mount::mount(None::<&str>, target, None::<&str>, flags, None::<&str>).unwrap();
            }
        }
    }
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
        let mtime = if kind.is_dir() { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) };
        let mut value = [0u8; 64];
        let n = rustix::fs::lgetxattr(path, "user.note", value.as_mut_slice()).unwrap_or(0);
        let note = String::from_utf8_lossy(&value[..n]).into_owned();
        let line = format!("{:o} {}:{} links {links} at {mtime:?} [{note}] {content}", meta.mode(), meta.uid(), meta.gid());
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

/// Three layers with everything that layers do to each other.
fn archives() -> Vec<Vec<u8>> {
    let note = pax(&[("SCHILY.xattr.user.note", b"kept"), ("mtime", b"1500000000.25")]);
    vec![
        archive(&[
            file("gone/below", "1"),
            file("opaque/below", "1"),
            file("was-dir/x", "1"),
            file("was-file", "1"),
            file("stays/low", "low"),
            file("hard/a", "linked"),
            link("hard/b", b'1', "hard/a"),
            Item { data: &note, ..item("x", b'x') },
            Item { mode: 0o4711, ids: (1000, 1001), ..file("setuid", "s") },
            link("link", b'2', "/etc/passwd"),
            Item { mode: 0o666, ..item("null", b'3') },
            item("pipe", b'6'),
        ]),
        archive(&[
            file(".wh.gone", ""),
            file("opaque/.wh..wh..opq", ""),
            file("opaque/above", "2"),
            file("was-dir", "now a file"),
            item("was-file", b'5'),
            file("was-file/x", "new"),
        ]),
        archive(&[Item { mode: 0o711, ids: (7, 8), ..item("./", b'5') }, item("gone", b'5'), file("gone/again", "3"), file("stays/high", "high")]),
    ]
}

/// Every row that should work here does, with layers in every form; the others are refused for the reason given.
fn conformance(dir: &Path, refused: &[(&str, &str)], by_probe: bool) {
    let place = Place::new(dir);
    let mut stacks = vec![place.layers(&archives(), "images", |_| Form::Erofs)];
    let copy = copy::Copy::probe(&place.layout).unwrap();
    if copy.form() == Form::Directory {
        stacks.push(place.layers(&archives(), "directories", |_| Form::Directory));
        stacks.push(place.layers(&archives(), "mixed", |n| if n == 1 { Form::Erofs } else { Form::Directory }));
    }
    let expected = place.tree(&copy, &stacks[0], false);
    for name in ["gone/again", "opaque/above", "stays/low", "stays/high", "was-file/x", "hard/b"] {
        assert!(expected.contains_key(name), "{name} is missing");
    }
    for name in ["gone/below", "opaque/below", "was-dir/x"] {
        assert!(!expected.contains_key(name), "{name} shows");
    }
    assert!(expected["setuid"].starts_with("104711 1000:1001") && expected["setuid"].contains("[kept]") && expected["setuid"].contains("250000000"));
    assert!(expected["hard/a"].contains("links 2") && expected[""].starts_with("40711 7:8"));
    for row in BACKENDS {
        let chosen = choose(row.name, by_probe, &place.layout);
        if let Some((_, why)) = refused.iter().find(|(name, _)| *name == row.name) {
            let error = chosen.err().unwrap_or_else(|| panic!("{} is not refused", row.name));
            assert!(error.kind == Kind::FailedPrecondition && error.to_string().contains(why), "{}: {error}", row.name);
            continue;
        }
        let backend = chosen.unwrap();
        if row.name == "bind" && refused.iter().any(|(name, _)| *name == "overlay") && !by_probe {
            // See below for what it does then.
            continue;
        }
        for stack in &stacks {
            for classic in [false, true] {
                assert_eq!(place.tree(&*backend, stack, classic), expected, "{} {:?}", row.name, stack[0]);
            }
        }
    }
    let first = BACKENDS.iter().find(|row| row.automatic && !refused.iter().any(|(name, _)| *name == row.name)).unwrap();
    assert_eq!(choose("", by_probe, &place.layout).unwrap().name(), first.name);
    assert_eq!(std::fs::read_dir(place.layout.staging()).unwrap().count(), 0, "a probe left something");
}

const NO_AUFS: (&str, &str) = ("aufs", "this kernel has no file system aufs");

#[test]
fn takes_500_layers_in_any_form_both_ways() {
    file_systems::private(|dir| {
        let place = Place::new(dir);
        let archives: Vec<_> = (0..500).map(|n| archive(&[file(&format!("f{n}"), "x"), file("same", &n.to_string())])).collect();
        let overlay = choose("overlay", false, &place.layout).unwrap();
        for form in [Form::Directory, Form::Erofs] {
            let layers = place.layers(&archives, &format!("{form:?}"), |_| form);
            for classic in [false, true] {
                let tree = place.tree(&*overlay, &layers, classic);
                assert_eq!(tree.keys().filter(|k| k.starts_with('f')).count(), 500);
                assert!(tree["same"].ends_with(" 499"));
            }
        }
        let one = &place.layers(&archives[..1], "again", |_| Form::Directory)[0];
        let many = vec![Layer { path: one, marks: false, lists_root: true }; 501];
        assert_eq!(overlay.provision(&place.layout.rootfs_all(), &many).unwrap_err().kind, Kind::Unimplemented);
    });
}

#[test]
fn bind_without_overlay_keeps_mesos_rules() {
    file_systems::private(|dir| {
        let place = Place::new(dir);
        let bind = bind::Bind::without_overlay();
        let blobs = [archive(&[file("a", "1")]), archive(&[file("b", "2")])];
        for form in [Form::Directory, Form::Erofs] {
            let layers = place.layers(&blobs, &format!("{form:?}"), |_| form);
            assert!(place.tree(&bind, &layers[..1], false).contains_key("a"));
            let two: Vec<_> = layers.iter().map(|path| Layer { path, marks: false, lists_root: true }).collect();
            let error = bind.provision(dir, &two).unwrap_err();
            assert!(error.kind == Kind::FailedPrecondition && error.to_string().contains("exactly one"), "{error}");
        }
    });
}

#[test]
fn copies_keep_holes() {
    file_systems::private(|dir| {
        let place = Place::new(dir);
        let size = 64u64 << 20;
        let map = format!("100,5,{},4", size - 4);
        let size = size.to_string();
        let head =
            pax(&[("GNU.sparse.name", b"big"), ("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.numblocks", b"2"), ("GNU.sparse.map", map.as_bytes())]);
        let blob = archive(&[Item { data: &head, ..item("x", b'x') }, file("sparse", "firstlast")]);
        for form in [Form::Directory, Form::Erofs] {
            let layers = place.layers(std::slice::from_ref(&blob), &format!("{form:?}"), |_| form);
            let to = place.layout.rootfs_all().join(format!("{form:?}"));
            std::fs::create_dir(&to).unwrap();
            copy::Copy::fallback().provision(&to, &[Layer { path: &layers[0], marks: false, lists_root: true }]).unwrap();
            let big = std::fs::File::open(to.join("fs/big")).unwrap();
            let meta = big.metadata().unwrap();
            assert!(meta.len().to_string() == size && meta.blocks() * 512 < 1 << 20, "{form:?}: {} blocks", meta.blocks());
            let mut text = [0u8; 7];
            std::os::unix::fs::FileExt::read_exact_at(&big, &mut text, 99).unwrap();
            assert_eq!(&text, b"\0first\0");
        }
    });
}

#[test]
fn unknown_names_are_refused_and_the_table_is_consistent() {
    file_systems::private(|dir| {
        let place = Place::new(dir);
        let error = choose("devicemapper", false, &place.layout).err().unwrap();
        assert!(error.kind == Kind::InvalidArgument && error.to_string().contains("overlay, aufs, copy, bind, erofs"), "{error}");
    });
    for row in validate::FORBIDDEN {
        assert!(BACKENDS.iter().any(|b| b.name == row.backend), "{row:?}");
        assert_eq!(validate::forbidding(row.backend, row.magic, false).unwrap().on, row.on);
        assert_eq!(validate::forbidding(row.backend, row.magic, true).is_none(), row.dated);
        assert!(!["bind", "copy"].contains(&row.backend), "they work anywhere");
    }
    // The table of Mesos, row for row.
    let mesos = [("overlay", &["aufs", "btrfs", "ecryptfs", "overlay", "zfs"][..]), ("aufs", &["aufs", "btrfs", "ecryptfs"])];
    for (backend, all) in mesos {
        for on in all {
            assert!(validate::FORBIDDEN.iter().any(|row| (row.backend, row.on) == (backend, *on)), "{backend}/{on}");
        }
    }
}
