//! Layer archives, honest and hostile. Each hostile case looks at a canary outside of the layer.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use super::tree::OPAQUE;
use super::*;
use crate::model::Digest;

/// One entry of a test archive.
pub(in crate::provisioner) struct Item<'a> {
    pub name: &'a str,
    pub kind: u8,
    pub link: &'a str,
    pub data: &'a [u8],
    pub mode: u32,
    pub ids: (u64, u64),
}

pub(in crate::provisioner) fn item(name: &str, kind: u8) -> Item<'_> {
    Item { name, kind, link: "", data: b"", mode: if kind == b'5' { 0o755 } else { 0o644 }, ids: (0, 0) }
}

pub(in crate::provisioner) fn file<'a>(name: &'a str, data: &'a str) -> Item<'a> {
    Item { data: data.as_bytes(), ..item(name, b'0') }
}

pub(in crate::provisioner) fn link<'a>(name: &'a str, kind: u8, link: &'a str) -> Item<'a> {
    Item { link, ..item(name, kind) }
}

/// Writes headers byte by byte: the library's builder refuses the names that matter here.
pub(in crate::provisioner) fn archive(items: &[Item<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        let mut header = ::tar::Header::new_ustar();
        let name = item.name.as_bytes();
        assert!(name.len() <= 100 && item.link.len() <= 100);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.as_mut_bytes()[157..157 + item.link.len()].copy_from_slice(item.link.as_bytes());
        header.set_entry_type(::tar::EntryType::new(item.kind));
        header.set_mode(item.mode);
        header.set_uid(item.ids.0);
        header.set_gid(item.ids.1);
        header.set_mtime(1_000_000_000);
        header.set_size(item.data.len() as u64);
        if matches!(item.kind, b'3' | b'4') {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(item.data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

pub(in crate::provisioner) fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length = (rest..).find(|n| *n == rest + n.to_string().len()).unwrap();
        body.extend_from_slice(format!("{length} {key}=").as_bytes());
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    body
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("canary"), "alive").unwrap();
        std::fs::set_permissions(dir.path().join("canary"), std::fs::Permissions::from_mode(0o600)).unwrap();
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("layer")
    }

    fn unpack_with(&self, blob: &[u8], expected: &Expected, limits: Limits) -> Result<Unpacked> {
        std::fs::create_dir(self.root()).unwrap();
        let result = unpack(file_source(blob), &self.root(), Form::Directory, expected, limits);
        let canary = self.dir.path().join("canary");
        assert_eq!(std::fs::read_to_string(&canary).unwrap(), "alive");
        assert_eq!(std::fs::metadata(&canary).unwrap().mode() & 0o7777, 0o600);
        let names: Vec<_> = std::fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "something was made outside: {names:?}");
        // The same archive as an image: the same verdict, the same tree.
        super::erofs::tests::compare(blob, expected, limits, &self.root(), &result);
        result
    }

    fn unpack(&self, items: &[Item<'_>]) -> Result<Unpacked> {
        self.unpack_with(&archive(items), &Expected::default(), Limits::default())
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.root().join(path)).unwrap()
    }

    fn meta(&self, path: &str) -> std::fs::Metadata {
        std::fs::symlink_metadata(self.root().join(path)).unwrap()
    }

    fn is_opaque(&self, path: &str) -> bool {
        let mut value = [0u8; 4];
        rustix::fs::lgetxattr(self.root().join(path), OPAQUE, value.as_mut_slice()).is_ok_and(|n| &value[..n] == b"y")
    }
}

#[test]
fn metadata_are_those_of_the_archive() {
    let place = Place::new();
    let unpacked = place
        .unpack(&[
            Item { mode: 0o1777, ..item("./", b'5') },
            Item { mode: 0o2750, ids: (5, 6), ..item("d", b'5') },
            Item { mode: 0o4755, ids: (5, 6), ..file("d/suid", "x") },
            Item { mode: 0o600, ..file("./d//plain", "abc") },
            Item { ids: (7, 8), ..link("d/sym", b'2', "/nowhere") },
            link("d/hard", b'1', "d/plain"),
            Item { mode: 0o666, ..item("null", b'3') },
            item("fifo", b'6'),
        ])
        .unwrap();
    let ids = |m: &std::fs::Metadata| (m.mode() & 0o7777, m.uid(), m.gid(), m.mtime());
    assert_eq!(ids(&place.meta("")), (0o1777, 0, 0, 1_000_000_000));
    assert_eq!(ids(&place.meta("d")), (0o2750, 5, 6, 1_000_000_000));
    assert_eq!(ids(&place.meta("d/suid")), (0o4755, 5, 6, 1_000_000_000));
    assert_eq!(ids(&place.meta("d/plain")), (0o600, 0, 0, 1_000_000_000));
    assert_eq!((place.meta("d/sym").uid(), place.meta("d/sym").mtime()), (7, 1_000_000_000));
    assert_eq!(place.meta("d/hard").ino(), place.meta("d/plain").ino());
    assert_eq!((place.meta("null").rdev(), place.meta("null").mode() & 0o777), (rustix::fs::makedev(1, 3), 0o666));
    assert!(place.meta("fifo").file_type().is_fifo());
    assert_eq!(unpacked.tree.usage, crate::provisioner::usage::count(&place.root()).unwrap());
    assert!(unpacked.tree.implied.is_empty());
}

#[test]
fn names_that_leave_are_refused_and_absolute_ones_stay_inside() {
    for name in ["../canary", "a/../../canary", "..", "/../canary"] {
        let error = Place::new().unpack(&[file(name, "dead")]).unwrap_err();
        assert_eq!(error.kind, Kind::DataLoss, "{name}: {error}");
    }
    let place = Place::new();
    place.unpack(&[file("/etc/passwd", "inside"), file("b/../c", "c")]).unwrap();
    assert_eq!((place.read("etc/passwd").as_str(), place.read("c").as_str()), ("inside", "c"));
    let nul = pax(&[("path", b"a\0b")]);
    let error = Place::new().unpack(&[Item { data: &nul, ..item("x", b'x') }, file("y", "")]).unwrap_err();
    assert_eq!(error.kind, Kind::DataLoss);
}

#[test]
fn links_never_lead_out() {
    let outside = Place::new();
    let target = outside.dir.path().display().to_string();
    // Through a link to an absolute directory, through `..`, and through a link of a link.
    for to in [target.as_str(), "..", "../..", "/"] {
        let place = Place::new();
        place
            .unpack(&[link("d", b'2', to), link("e", b'2', "d"), file("d/x", "1"), file("e/y", "2"), Item { mode: 0o777, ..file("d/canary", "dead") }])
            .unwrap();
        assert!(!outside.dir.path().join("x").exists());
        assert!(place.meta("d").is_symlink());
    }
    // A file, mode and owner through a link in the last component: the link is replaced, not followed.
    let place = Place::new();
    place.unpack(&[link("c", b'2', "../canary"), Item { mode: 0o777, ids: (9, 9), ..file("c", "new") }]).unwrap();
    assert!(place.meta("c").is_file());
    // Hard links to what is outside, directly and through a link.
    for (name, to) in [("../canary", ""), ("d/canary", ".."), ("/canary", "")] {
        let place = Place::new();
        let first = link("d", b'2', if to.is_empty() { "x" } else { to });
        assert!(place.unpack(&[first, link("h", b'1', name)]).is_err(), "{name}");
        assert!(!place.root().join("h").exists());
    }
    // A hard link to a link, then metadata on its name: nothing outside changes (the canary is looked at).
    let place = Place::new();
    place.unpack(&[link("s", b'2', "../canary"), link("h", b'1', "s"), Item { mode: 0o777, ..file("h", "x") }]).unwrap();
    assert!(place.meta("s").is_symlink());
}

#[test]
fn a_dangling_parent_link_is_followed_inside() {
    let place = Place::new();
    place.unpack(&[link("lib", b'2', "usr/lib"), file("lib/a/so", "x"), link("loop", b'2', "loop2"), link("loop2", b'2', "/../opt")]).unwrap();
    assert_eq!(place.read("usr/lib/a/so"), "x");
    assert!(place.meta("lib").is_symlink());
    assert!(Place::new().unpack(&[link("a", b'2', "b"), link("b", b'2', "a"), file("a/x", "")]).is_err());
}

#[test]
fn whiteouts_whatever_the_order() {
    let whiteout = |m: std::fs::Metadata| m.file_type().is_char_device() && m.rdev() == 0;
    let place = Place::new();
    place
        .unpack(&[
            file("dir/.wh.gone", ""),
            item("opaque", b'5'),
            file("opaque/kept", "1"),
            file("opaque/.wh..wh..opq", ""),
            // Deleted below and made anew here, either way round.
            file(".wh.again1", ""),
            item("again1", b'5'),
            item("again2", b'5'),
            file("again2/x", ""),
            file(".wh.again2", ""),
            file(".wh.again3", ""),
            file("again3/implied", ""),
            file("plain", "p"),
            file(".wh.plain", ""),
            file(".wh..wh.plnk", ""),
        ])
        .unwrap();
    assert!(whiteout(place.meta("dir/gone")));
    assert!(place.is_opaque("opaque") && place.read("opaque/kept") == "1");
    assert!(place.is_opaque("again1") && place.is_opaque("again2") && place.is_opaque("again3"));
    assert!(place.root().join("again2/x").exists() && place.root().join("again3/implied").exists());
    assert_eq!(place.read("plain"), "p");
    assert!(!place.is_opaque("dir") && !place.root().join(".wh.plnk").exists());
    for name in [".wh.", ".wh..", ".wh...", "d/.wh..."] {
        let result = Place::new().unpack(&[file(name, "")]);
        assert!(result.is_err(), "{name}");
    }
    let place = Place::new();
    assert!(place.unpack(&[file(".wh..wh..opq", "")]).unwrap().tree.opaque_root);
}

#[test]
fn later_entries_replace_earlier_ones() {
    let place = Place::new();
    let unpacked = place
        .unpack(&[
            item("a", b'5'),
            file("a/b/c", "old"),
            file("a", "now a file"),
            file("f", "1"),
            file("f", "22"),
            item("f2", b'0'),
            item("f2", b'5'),
            file("f2/in", "x"),
        ])
        .unwrap();
    assert_eq!((place.read("a").as_str(), place.read("f").as_str(), place.read("f2/in").as_str()), ("now a file", "22", "x"));
    assert_eq!(unpacked.tree.usage, crate::provisioner::usage::count(&place.root()).unwrap());
}

#[test]
fn extended_headers() {
    let long = format!("deep/{}", "n".repeat(200));
    let records = pax(&[
        ("path", long.as_bytes()),
        ("mtime", b"1500000000.25"),
        ("uid", b"70000"),
        ("SCHILY.xattr.user.test", b"value\0binary"),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
    ]);
    let capability = pax(&[("SCHILY.xattr.security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])]);
    let gnu = format!("gnu/{}", "g".repeat(150));
    let place = Place::new();
    place
        .unpack(&[
            Item { data: &records, ..item("x", b'x') },
            file("short", "data"),
            Item { data: &capability, ..item("x", b'x') },
            Item { ids: (3, 3), ..file("cap", "") },
            Item { data: gnu.as_bytes(), ..item("././@LongLink", b'L') },
            file("truncated", "gnu"),
            Item { data: b"18 comment=ignore\n", ..item("g", b'g') },
        ])
        .unwrap();
    let meta = place.meta(&long);
    assert_eq!((meta.uid(), meta.mtime(), meta.mtime_nsec()), (70000, 1_500_000_000, 250_000_000));
    assert_eq!(place.read(&gnu), "gnu");
    let mut value = [0u8; 64];
    let n = rustix::fs::lgetxattr(place.root().join(&long), "user.test", value.as_mut_slice()).unwrap();
    assert_eq!(&value[..n], b"value\0binary");
    for name in ["trusted.overlay.redirect", OPAQUE] {
        assert!(rustix::fs::lgetxattr(place.root().join(&long), name, value.as_mut_slice()).is_err());
    }
    assert_eq!(rustix::fs::lgetxattr(place.root().join("cap"), "security.capability", value.as_mut_slice()).unwrap(), 20);
}

#[test]
fn sparse_files_of_gnu_tar() {
    for format in [
        ["--format=gnu", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ] {
        let source = tempfile::tempdir().unwrap();
        let sparse = std::fs::File::create(source.path().join("sparse")).unwrap();
        let mut offset = 0u64;
        for piece in 0..40u8 {
            offset += 1 << 16;
            std::os::unix::fs::FileExt::write_all_at(&sparse, &[piece + 1; 5000], offset).unwrap();
        }
        sparse.set_len(64 << 20).unwrap();
        let made = std::process::Command::new("tar").args(format).arg("-S").arg("-C").arg(source.path()).args(["-cf", "-", "."]).output();
        let Ok(made) = made else { return };
        let place = Place::new();
        let unpacked = place.unpack_with(&made.stdout, &Expected::default(), Limits::default()).unwrap();
        assert!(std::fs::read(source.path().join("sparse")).unwrap() == std::fs::read(place.root().join("sparse")).unwrap(), "{format:?}");
        assert!(unpacked.tree.usage.bytes < 2 << 20);
    }
}

#[test]
fn malformed_archives_fail_cleanly() {
    let good = archive(&[file("a", "0123456789")]);
    let mut checksum = good.clone();
    checksum[0] ^= 1;
    let huge = pax(&[("size", b"18446744073709551615")]);
    let bomb = archive(&[Item { data: &huge, ..item("x", b'x') }, file("y", "")]);
    let mut extended = archive(&[item("x", b'x')]);
    extended[124..135].copy_from_slice(b"77777777777");
    let sum: u32 = extended[..512].iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
    extended[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let unknown = archive(&[item("v", b'V')]);
    for (what, blob) in
        [("checksum", &checksum[..]), ("cut", &good[..515]), ("cut header", &good[..100]), ("size", &bomb), ("extended", &extended), ("type", &unknown)]
    {
        let error = Place::new().unpack_with(blob, &Expected::default(), Limits::default()).unwrap_err();
        assert_eq!(error.kind, Kind::DataLoss, "{what}: {error}");
    }
    for records in ["5 a=b\n", "x", "99 a=b\n", "6 a=b"] {
        let error = Place::new().unpack(&[Item { data: records.as_bytes(), ..item("x", b'x') }, file("y", "")]).unwrap_err();
        assert_eq!(error.kind, Kind::DataLoss, "{records}");
    }
}

#[test]
fn digests_sizes_and_limits_hold() {
    let blob = archive(&[file("a", "1"), file("b", "2")]);
    let digest = Hasher::of(&blob, None).unwrap();
    let other: Digest = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
    let full = Expected { blob: Some(digest.clone()), size: Some(blob.len() as u64), diff_id: Some(digest.clone()) };
    assert_eq!(Place::new().unpack_with(&blob, &full, Limits::default()).unwrap().diff_id, digest);
    let wrong = [
        Expected { blob: Some(other.clone()), ..full.clone() },
        Expected { diff_id: Some(other), ..full.clone() },
        Expected { size: Some(blob.len() as u64 - 1), ..full.clone() },
        Expected { size: Some(blob.len() as u64 + 1), ..full.clone() },
    ];
    for expected in wrong {
        assert_eq!(Place::new().unpack_with(&blob, &expected, Limits::default()).unwrap_err().kind, Kind::DataLoss);
    }
    for limits in [Limits { layer_entries: 1, ..Limits::default() }, Limits { layer_bytes: 1, ..Limits::default() }] {
        assert_eq!(Place::new().unpack_with(&blob, &full, limits).unwrap_err().kind, Kind::ResourceExhausted);
    }
}

#[test]
fn a_bomb_is_stopped_by_its_ratio() {
    // A stream that unpacks to gigabytes from a few kilobytes: zstd, whose ratio has no bound of its own.
    let mut tar = archive(&[item("zeros", b'0')]);
    let size = 4u64 << 30;
    tar[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    let sum: u32 = tar[..512].iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
    tar[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    std::io::Write::write_all(&mut encoder, &tar[..512]).unwrap();
    let zeros = vec![0u8; 1 << 20];
    for _ in 0..400 {
        std::io::Write::write_all(&mut encoder, &zeros).unwrap();
    }
    let blob = encoder.finish().unwrap();
    let error = Place::new().unpack_with(&blob, &Expected::default(), Limits { ratio: 100, ..Limits::default() }).unwrap_err();
    assert_eq!(error.kind, Kind::ResourceExhausted, "{error}");
}

#[test]
fn a_source_that_breaks_off_is_the_error() {
    let blob = archive(&[file("a", &"x".repeat(100_000))]);
    let mut pieces = vec![Ok(Some(Bytes::copy_from_slice(&blob[..50_000]))), Err(io::Error::other(Error::new(Kind::Cancelled, "given up")))].into_iter();
    let place = Place::new();
    std::fs::create_dir(place.root()).unwrap();
    let error =
        unpack(Box::new(move || pieces.next().unwrap_or(Ok(None))), &place.root(), Form::Directory, &Expected::default(), Limits::default()).unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
}
