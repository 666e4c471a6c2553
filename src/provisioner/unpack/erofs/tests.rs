//! Images beside directories: every archive of the tests of unpacking, and random ones, become both; what the kernel shows of the
//! two is the same. Needs root and a kernel with EROFS. `fsck.erofs` has its say where it is installed.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::PathBuf;

use proptest::prelude::*;

use super::super::tests::{Item, archive, file, item, link, pax};
use super::super::{Expected, Form, Unpacked, file_source, unpack};
use super::*;
use crate::provisioner::config::Limits;

/// Layers with more bytes than this (sparse ones) are not archived again here.
const MOST_SAVED: u64 = 64 << 20;

/// Path to a line that says everything of it. Times of what the archive does not list are left out.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    let mut links: BTreeMap<u64, String> = BTreeMap::new();
    while let Some(path) = todo.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().escape_ascii().to_string();
        let kind = meta.file_type();
        let content = if kind.is_dir() {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            String::new()
        } else if kind.is_symlink() {
            std::fs::read_link(&path).unwrap().as_os_str().as_bytes().escape_ascii().to_string()
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            super::super::Hasher::of(&bytes, None).unwrap().to_string()
        } else {
            meta.rdev().to_string()
        };
        let whiteout = kind.is_char_device() && meta.rdev() == 0;
        let time = if whiteout { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) };
        let size = if kind.is_dir() { 0 } else { meta.size() };
        let names = if kind.is_dir() { "directory".to_owned() } else { meta.nlink().to_string() };
        let line = format!("{:o} {}:{} at {time:?} size {size} names {names} {:?} {content}", meta.mode(), meta.uid(), meta.gid(), xattrs(&path));
        if !kind.is_dir() && meta.nlink() > 1 {
            let first = links.entry(meta.ino()).or_insert(line.clone());
            assert_eq!(*first, line);
        }
        out.insert(name, line);
    }
    out
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0u8; 64 << 10];
    let n = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap();
    let value = |name: &[u8]| {
        let mut value = vec![0u8; 64 << 10];
        let n = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
        value.truncate(n);
        (String::from_utf8_lossy(name).into_owned(), value)
    };
    names[..n].split(|b| *b == 0).filter(|n| !n.is_empty()).map(value).collect()
}

pub struct Mounted {
    _dir: tempfile::TempDir,
    _mount: std::os::fd::OwnedFd,
    pub image: PathBuf,
    pub root: PathBuf,
    pub unpacked: Unpacked,
}

pub fn mounted(blob: &[u8], expected: &Expected, limits: Limits) -> Result<Mounted> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("fs.erofs");
    let unpacked = unpack(file_source(blob), &image, Form::Erofs, expected, limits)?;
    if let Ok(said) = std::process::Command::new("fsck.erofs").arg(&image).output() {
        assert!(said.status.success(), "fsck.erofs: {}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    }
    let mount = crate::disk::layer::root(&image).unwrap();
    let root = PathBuf::from(format!("/proc/self/fd/{}/", mount.as_raw_fd()));
    Ok(Mounted { _dir: dir, _mount: mount, image, root, unpacked })
}

/// What is archived again from either form is the same; unpacked it is the same layer, and archived once more the same bytes.
fn saved_again(root: &Path, image: &Mounted, finished: &Finished) {
    use crate::provisioner::save::layer;
    let size = |path: &PathBuf| std::fs::symlink_metadata(path).map_or(0, |m| if m.is_file() { m.len() } else { 0 });
    let total: u64 = tree(root).keys().map(|name| size(&root.join(std::ffi::OsStr::from_bytes(&unescape(name))))).sum();
    if total > MOST_SAVED {
        return;
    }
    let (mut first, mut second) = (Vec::new(), Vec::new());
    layer::write(root, &finished.implied, &mut first).unwrap();
    layer::write(&image.image, &finished.implied, &mut second).unwrap();
    assert!(first == second, "the forms differ: {} and {} bytes", first.len(), second.len());
    let dir = tempfile::tempdir().unwrap();
    let again = dir.path().join("fs");
    std::fs::create_dir(&again).unwrap();
    let unpacked = unpack(file_source(first.as_slice()), &again, Form::Directory, &Expected::default(), Limits::default()).unwrap();
    assert_eq!((&unpacked.tree.content, unpacked.tree.opaque_root), (&finished.content, finished.opaque_root));
    // Times of directories that an archive only implies depend on what comes after them; each whiteout is saved for itself, also where
    // one was a hard link to another.
    let untimed = |line: &str| match (line.split_once(" at "), line.split_once(" size ")) {
        (Some((before, _)), Some((_, after))) if after.contains("names directory") => format!("{before} {after}"),
        (Some((before, _)), _) if line.starts_with("20000 ") => before.to_owned(),
        _ => line.to_owned(),
    };
    let lines = |root: &Path| -> BTreeMap<String, String> { tree(root).into_iter().map(|(name, line)| (name, untimed(&line))).collect() };
    assert_eq!(lines(root), lines(&again));
    let mut third = Vec::new();
    layer::write(&again, &unpacked.tree.implied, &mut third).unwrap();
    assert!(first == third, "archived once more: {} and {} bytes", first.len(), third.len());
}

fn unescape(name: &str) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), name.as_bytes());
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.strip_prefix(b"x").and_then(|t| t.get(..2)).and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 16).ok());
        match (first, hex, tail.first()) {
            (b'\\', Some(byte), _) => {
                out.push(byte);
                rest = &tail[3..];
            }
            (b'\\', None, Some(next)) => {
                out.push(match next {
                    b'n' => b'\n',
                    b't' => b'\t',
                    b'r' => b'\r',
                    other => *other,
                });
                rest = &tail[1..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// Makes the image of what became the directory `root` with `result` and compares.
pub fn compare(blob: &[u8], expected: &Expected, limits: Limits, root: &Path, result: &Result<Unpacked>) {
    let image = mounted(blob, expected, limits);
    match (result, image) {
        (Ok(unpacked), Ok(image)) => {
            let (directory, image_finished) = (&unpacked.tree, &image.unpacked.tree);
            let sorted = |f: &Finished| f.implied.iter().cloned().collect::<std::collections::BTreeSet<_>>();
            assert_eq!((directory.opaque_root, sorted(directory)), (image_finished.opaque_root, sorted(image_finished)));
            assert_eq!((&unpacked.diff_id, unpacked.blob_size), (&image.unpacked.diff_id, image.unpacked.blob_size));
            let (want, have) = (tree(root), tree(&image.root));
            for (path, line) in &want {
                assert_eq!(have.get(path), Some(line), "{path}");
            }
            assert_eq!(want.len(), have.len());
            saved_again(root, &image, directory);
        }
        (Err(_), Err(_)) => {}
        (Ok(_), Err(e)) => panic!("refused as an image only: {e:?}"),
        (Err(e), Ok(_)) => panic!("refused as a directory only: {e:?}"),
    }
}

fn both(items: &[Item<'_>]) {
    let blob = archive(items);
    let dir = tempfile::tempdir().unwrap();
    let result = unpack(file_source(&blob[..]), dir.path(), Form::Directory, &Expected::default(), Limits::default());
    compare(&blob, &Expected::default(), Limits::default(), dir.path(), &result);
}

#[test]
fn sizes_around_every_boundary() {
    let text: Vec<u8> = (0..70_000u32).map(|n| (n % 251) as u8).collect();
    let sizes =
        [0, 1, 31, 32, 2047, 2048, 2049, 3999, 4000, 4031, 4032, 4033, 4063, 4064, 4065, 4095, 4096, 4097, 6143, 6144, 6145, 8191, 8192, 65_535, 65_536];
    let names: Vec<String> = sizes.iter().map(|n| format!("d/size-{n}")).collect();
    let mut items: Vec<_> = names.iter().zip(sizes).map(|(name, n)| Item { data: &text[..n], ..item(name, b'0') }).collect();
    // Owners beyond 16 bits need the larger inode, whose data begin elsewhere.
    let more: Vec<String> = sizes.iter().map(|n| format!("e/size-{n}")).collect();
    items.extend(more.iter().zip(sizes).map(|(name, n)| Item { data: &text[..n], ids: (100_000, 1), ..item(name, b'0') }));
    both(&items);
}

#[test]
fn directories_of_every_size() {
    for count in [0, 1, 100, 300, 2_000] {
        let names: Vec<String> = (0..count).map(|n| format!("dir/{}{n}", ["", "!", "~", ".", "\u{e9}"][n % 5])).collect();
        let long: Vec<String> = (0..count / 10).map(|n| format!("long/{n:0>90}")).collect();
        both(&names.iter().chain(&long).map(|n| file(n, "x")).collect::<Vec<_>>());
    }
}

#[test]
fn links_of_files_that_are_replaced() {
    both(&[
        file("a", "1"),
        link("b", b'1', "a"),
        link("c", b'1', "b"),
        file("a", "2"),
        file("b", "3"),
        file("x/y", "4"),
        link("x/z", b'1', "x/y"),
        link("w", b'1', "x/y"),
        file("x", "gone with all below"),
    ]);
    both(&[link("s", b'2', "target"), link("t", b'1', "s"), item("p", b'6'), link("q", b'1', "p"), item("d", b'5'), link("e", b'1', "d")]);
    both(&[file("a", "1"), link("a2", b'1', "./a"), link("d", b'2', "."), link("d/a", b'1', "a")]);
}

#[test]
fn attributes() {
    let many: Vec<(String, Vec<u8>)> = (0..40).map(|n| (format!("SCHILY.xattr.user.many{n}"), vec![n as u8; 40])).collect();
    let records: Vec<(&str, &[u8])> = many.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect();
    let many = pax(&records);
    let acl = [
        &2u32.to_le_bytes()[..],
        &[1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 5, 0, 1, 0, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255],
        &[16, 0, 5, 0, 255, 255, 255, 255, 32, 0, 5, 0, 255, 255, 255, 255],
    ]
    .concat();
    let kinds = pax(&[
        ("SCHILY.xattr.user.u", b"1"),
        ("SCHILY.xattr.user.u", b"last"),
        ("SCHILY.xattr.trusted.t", b""),
        ("SCHILY.xattr.security.s", b"2"),
        ("SCHILY.xattr.system.posix_acl_access", &acl),
        ("SCHILY.xattr.other.o", b"3"),
        ("SCHILY.xattr.trusted.overlay.metacopy", b""),
    ]);
    let default = pax(&[("SCHILY.xattr.system.posix_acl_default", &acl)]);
    let head = |data| Item { data, ..item("x", b'x') };
    let link_head = pax(&[("SCHILY.xattr.user.u", b"1"), ("SCHILY.xattr.trusted.t", b"t")]);
    both(&[
        head(&many),
        file("many", "text behind attributes"),
        head(&kinds),
        Item { mode: 0o755, ..file("kinds", "x") },
        head(&kinds),
        Item { mode: 0o755, ..item("dir", b'5') },
        file("dir/.wh..wh..opq", ""),
        head(&default),
        Item { mode: 0o755, ..item("inherits", b'5') },
        head(&link_head),
        link("link", b'2', "kinds"),
        head(&link_head),
        item("fifo", b'6'),
    ]);
    let cut = pax(&[("SCHILY.xattr.security.capability", b"short")]);
    both(&[head(&cut), file("refused", "")]);
}

#[test]
fn a_sparse_image_stays_sparse() {
    let size = 6u64 << 30;
    let sparse = pax(&[
        ("GNU.sparse.major", b"0"),
        ("GNU.sparse.minor", b"1"),
        ("GNU.sparse.name", b"big"),
        ("GNU.sparse.size", size.to_string().as_bytes()),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.map", format!("100,5,{},4", size - 4).as_bytes()),
    ]);
    let blob = archive(&[Item { data: &sparse, ..item("x", b'x') }, file("sparse", "firstlast"), file("after", "z")]);
    let image = mounted(&blob, &Expected::default(), Limits::default()).unwrap();
    assert!(image.unpacked.tree.usage.bytes < 4 << 20, "{:?}", image.unpacked.tree.usage);
    let big = std::fs::File::open(image.root.join("big")).unwrap();
    assert_eq!(big.metadata().unwrap().len(), size);
    let mut text = [0u8; 7];
    big.read_exact_at(&mut text, 99).unwrap();
    assert_eq!(&text, b"\0first\0");
    big.read_exact_at(&mut text[..4], size - 4).unwrap();
    assert_eq!(&text[..4], b"last");
    assert!(rustix::fs::seek(&big, rustix::fs::SeekFrom::Hole(0)).unwrap() < 1 << 20);
    assert_eq!(std::fs::read(image.root.join("after")).unwrap(), b"z");
}

#[test]
fn sizes_past_32_bits_take_the_larger_inode() {
    let size = (4u64 << 30) + 5_000;
    let inode = Inode { mode: 0o100_644, uid: 0, gid: 0, mtime: (0, 0), links: 1, size, data: 1, layout: Layout::Inline };
    assert!(!inode.is_compact((0, 0)) && Inode { size: 5_000, ..inode }.is_compact((0, 0)));
    assert_eq!(u64::from_le_bytes(inode.encode(false, 0)[8..16].try_into().unwrap()), size);
}

#[test]
fn a_loop_device_shows_the_same() {
    let blob = archive(&[file("a/b", "text"), item("pipe", b'6')]);
    let image = mounted(&blob, &Expected::default(), Limits::default()).unwrap();
    let file = std::fs::File::open(&image.image).unwrap();
    let mount = crate::disk::layer::mount_by_loop(&file, rustix::mount::MountAttrFlags::empty()).unwrap();
    let root = PathBuf::from(format!("/proc/self/fd/{}/", mount.as_raw_fd()));
    assert_eq!(tree(&root), tree(&image.root));
}

#[test]
fn the_superblock_is_covered_by_its_checksum() {
    let blob = archive(&[file("a", "text")]);
    let image = mounted(&blob, &Expected::default(), Limits::default()).unwrap();
    let mut bytes = std::fs::read(&image.image).unwrap();
    bytes[2000] ^= 1;
    let bad = image.image.with_file_name("bad.erofs");
    std::fs::write(&bad, bytes).unwrap();
    assert!(crate::disk::layer::root(&bad).is_err());
}

/// Random entries over few names, so that they meet: (kind, name, link target, data length, mode).
fn entries() -> impl Strategy<Value = Vec<(u8, String, String, usize, u32)>> {
    let part = prop_oneof![Just("a"), Just("b"), Just("c"), Just(".."), Just("l")];
    let path = proptest::collection::vec(part, 1..4).prop_map(|p| p.join("/"));
    let name = (prop_oneof![4 => Just(""), 1 => Just(".wh.")], path.clone()).prop_map(|(mark, path)| match path.rsplit_once('/') {
        Some((dir, name)) => format!("{dir}/{mark}{name}"),
        None => format!("{mark}{path}"),
    });
    let name = prop_oneof![12 => name, 1 => path.clone().prop_map(|p| format!("{p}/.wh..wh..opq"))];
    let target = prop_oneof![3 => path.clone(), 1 => path.prop_map(|p| format!("/{p}"))];
    let kind = prop_oneof![3 => Just(b'0'), 3 => Just(b'5'), 2 => Just(b'2'), 2 => Just(b'1'), 1 => Just(b'6'), 1 => Just(b'3')];
    let length = prop_oneof![Just(0usize), Just(10), Just(3_000), Just(5_000), Just(20_000)];
    let mode = prop_oneof![Just(0o644u32), Just(0o755), Just(0o4711), Just(0o1777), Just(0)];
    proptest::collection::vec((kind, name, target, length, mode), 1..12)
}

#[test]
fn links_lead_to_the_root_and_to_whiteouts() {
    both(&[Item { link: "/..", ..item("b", b'2') }, item("b/.wh..wh..opq", b'0')]);
    both(&[item("l/c/.wh.a", b'0'), Item { link: "l/c/a", ..item("a", b'1') }]);
    // A whiteout with two names gives way to a directory.
    both(&[item(".wh.a", b'0'), link("b", b'1', "a"), file("a/x", "")]);
    both(&[item("d/.wh.a", b'0'), link("b", b'1', "d/a"), link("l", b'2', "d/a/e"), file("l/x", "")]);
}

proptest! {
    #![proptest_config(crate::stdx::testing::cases(300))]
    #[test]
    fn random_layers_agree(entries in entries()) {
        let text = vec![7u8; 20_000];
        let items: Vec<Item<'_>> = entries
            .iter()
            .map(|(kind, name, target, length, mode)| Item {
                link: if matches!(kind, b'1' | b'2') { target } else { "" },
                data: if *kind == b'0' { &text[..*length] } else { b"" },
                mode: *mode,
                ids: (u64::from(*mode), 5),
                ..item(name, *kind)
            })
            .collect();
        both(&items);
    }
}
