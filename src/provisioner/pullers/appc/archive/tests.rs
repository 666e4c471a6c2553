//! Archives by several writers, and hostile ones.

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use super::*;
use crate::provisioner::unpack::tests::{Item, archive, file, item, link, pax};

fn spool(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

fn read_with(bytes: &[u8], limits: Limits) -> Result<(Vec<u8>, Contents)> {
    let file = spool(bytes);
    let mut archive = Archive::open(&file, limits, CancellationToken::new())?;
    let mut layer = Vec::new();
    let mut source = archive.layer();
    while let Some(piece) = source().map_err(|e| e.downcast::<Error>().unwrap())? {
        layer.extend_from_slice(&piece);
    }
    drop(source);
    Ok((layer, archive.contents()?))
}

fn read(bytes: &[u8]) -> Result<(Vec<u8>, Contents)> {
    read_with(bytes, Limits::default())
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A tree with names of every length around what headers hold.
fn tree(root: &Path) {
    std::fs::create_dir_all(root.join("usr/bin")).unwrap();
    std::fs::write(root.join("usr/bin/a"), vec![b'x'; 300_000]).unwrap();
    std::fs::hard_link(root.join("usr/bin/a"), root.join("usr/bin/b")).unwrap();
    std::os::unix::fs::symlink("rootfs/usr", root.join("usr/link")).unwrap();
    for length in [80, 92, 93, 94, 95, 99, 100, 101, 120, 200] {
        let name = "n".repeat(length - 4);
        std::fs::write(root.join("usr").join(&name), length.to_string()).unwrap();
        std::fs::hard_link(root.join("usr").join(&name), root.join(format!("h-{}", &name[2..]))).unwrap();
        std::os::unix::fs::symlink("t".repeat(length), root.join(format!("s{length}"))).unwrap();
    }
}

#[test]
fn the_layer_is_what_the_writer_would_have_made_of_the_tree_alone() {
    let dir = tempfile::tempdir().unwrap();
    tree(&dir.path().join("rootfs"));
    std::fs::write(dir.path().join("manifest"), "the manifest").unwrap();
    let tar = |format: &str, at: &Path, names: &[&str]| {
        let mut command = Command::new("tar");
        run(command.args(["--sort=name", "--owner=0", "--group=0", "--mode=u+rw", format, "-C"]).arg(at).args(["-cf", "-"]).args(names))
    };
    for format in ["--format=gnu", "--format=oldgnu", "--format=ustar"] {
        // Old formats cannot hold all of it.
        let short = format == "--format=ustar";
        if short {
            for length in [101, 120, 200] {
                std::fs::remove_file(dir.path().join(format!("rootfs/usr/{}", "n".repeat(length - 4)))).unwrap();
                std::fs::remove_file(dir.path().join(format!("rootfs/h-{}", "n".repeat(length - 6)))).unwrap();
                std::fs::remove_file(dir.path().join(format!("rootfs/s{length}"))).unwrap();
            }
            // What is a hard link is so by its longer name, too: the limit is that of the archive with the prefix.
            for length in [94, 95, 99, 100] {
                std::fs::remove_file(dir.path().join(format!("rootfs/h-{}", "n".repeat(length - 6)))).unwrap();
            }
        }
        let mut names: Vec<_> = std::fs::read_dir(dir.path().join("rootfs")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let expected = tar(format, &dir.path().join("rootfs"), &names);
        for top in [["manifest", "rootfs"], ["rootfs", "manifest"]] {
            let (layer, contents) = read(&tar(format, dir.path(), &top)).unwrap();
            assert_eq!(contents.manifest, b"the manifest");
            if format != "--format=oldgnu" {
                assert!(layer == expected, "{format}: {} bytes, {} expected", layer.len(), expected.len());
            }
            assert_eq!(listing(&layer), listing(&expected), "{format}");
        }
        // With a dot in front, names keep it.
        let (layer, _) = read(&tar(format, dir.path(), &["./manifest", "./rootfs"])).unwrap();
        assert!(listing(&layer).iter().all(|name| name.starts_with("./")), "{format}: {:?}", listing(&layer));
        assert_eq!(listing(&layer).len(), listing(&expected).len() + 1);
    }
}

fn listing(tar: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(tar);
    let entries = archive.entries().unwrap().map(|e| {
        let e = e.unwrap();
        let text = |bytes: std::borrow::Cow<'_, [u8]>| String::from_utf8_lossy(&bytes).into_owned();
        format!("{} {} {}", text(e.path_bytes()), text(e.link_name_bytes().unwrap_or_default()), e.size())
    });
    entries.collect()
}

/// Items of a layer as those of an image.
fn image<'a>(names: &'a [String], items: &[Item<'a>]) -> Vec<u8> {
    let mut all = vec![file("manifest", "{}"), item("rootfs/", b'5')];
    all.extend(items.iter().zip(names).map(|(item, name)| Item { name, ..Item { ..*item } }));
    archive(&all)
}

#[test]
fn ids_and_compression() {
    let items = [item("etc/", b'5'), file("etc/x", "x"), item("dev/null", b'3')];
    let names: Vec<String> = items.iter().map(|i| format!("rootfs/{}", i.name)).collect();
    let plain = image(&names, &items);
    let id = Hasher::of(&plain, Some(&format!("sha512:{}", "0".repeat(128)).parse().unwrap())).unwrap();
    let gzip = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&plain).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = zstd::encode_all(plain.as_slice(), 1).unwrap();
    for bytes in [&plain, &gzip, &zstd] {
        let (layer, contents) = read(bytes).unwrap();
        assert_eq!(layer, archive(&items));
        assert_eq!((contents.id.clone(), contents.sizes), (id.clone(), (bytes.len() as u64, plain.len() as u64)));
    }
    for (magic, word) in [(b"BZh91AY&SY".as_slice(), "bzip2"), (b"\xfd7zXZ\0\0\x04", "xz")] {
        let error = read(magic).err().unwrap();
        assert!(error.kind == Kind::Unimplemented && error.to_string().contains(word), "{error}");
    }
    for cut in [1, 511, 512, 700, gzip.len() / 2] {
        assert!(read(&plain[..plain.len().min(cut)]).is_err() && read(&gzip[..cut.min(gzip.len() - 1)]).is_err(), "{cut}");
    }
}

#[test]
fn extended_headers_of_other_writers() {
    let long = "é".repeat(40);
    let image = [
        archive_start(&[file("manifest", "{}")]),
        extended(&[("path", format!("rootfs/{long}").as_bytes()), ("mtime", b"1.5")]),
        archive_start(&[file("rootfs/short", "a")]),
        // Too long only with the prefix: nothing is left of the header.
        extended(&[("path", format!("rootfs/{}", "p".repeat(97)).as_bytes())]),
        archive_start(&[file("rootfs/p", "b")]),
        extended(&[("linkpath", format!("rootfs/{long}").as_bytes())]),
        archive(&[link("rootfs/hard", b'1', "x")]),
    ]
    .concat();
    let (layer, _) = read(&image).unwrap();
    let names = listing(&layer);
    assert_eq!(names, [format!("{long}  1"), format!("{}  1", "p".repeat(97)), format!("hard {long} 0")]);
    let headers: Vec<&[u8]> = layer.chunks(512).filter(|block| block[156] == b'x' && block[257..262] == *b"ustar").collect();
    assert_eq!(headers.len(), 2);
    assert!(headers.iter().all(|header| header.starts_with(b"PaxHeaders.0/x\0")));
}

/// An extended header for the entry behind it.
fn extended(records: &[(&str, &[u8])]) -> Vec<u8> {
    archive_start(&[Item { data: &pax(records), ..item("rootfs/PaxHeaders.0/x", b'x') }])
}

/// Entries without an end.
fn archive_start(items: &[Item<'_>]) -> Vec<u8> {
    let mut bytes = archive(items);
    bytes.truncate(bytes.len() - 1024);
    bytes
}

#[test]
fn a_root_directory_worth_keeping_is_kept() {
    for (mode, ids, kept) in [(0o755, (0, 0), false), (0o700, (0, 0), true), (0o755, (1, 0), true)] {
        let root = Item { mode, ids, ..item("rootfs", b'5') };
        let (layer, _) = read(&archive(&[root, file("manifest", "{}")])).unwrap();
        assert_eq!(listing(&layer), if kept { vec!["./  0".to_owned()] } else { vec![] });
    }
}

#[test]
fn hostile_archives_are_refused() {
    let manifest = || file("manifest", "{}");
    let root = || item("rootfs/", b'5');
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("no manifest", archive(&[root()])),
        ("no rootfs", archive(&[manifest()])),
        ("two manifests", archive(&[manifest(), root(), manifest()])),
        ("a manifest that is a link", archive(&[link("manifest", b'2', "/etc/passwd"), root()])),
        ("a manifest that is a directory", archive(&[item("manifest/", b'5'), root()])),
        ("a rootfs that is a link", archive(&[manifest(), link("rootfs", b'2', "/")])),
        ("a rootfs that is a file", archive(&[manifest(), file("rootfs", "x")])),
        ("something else beside", archive(&[manifest(), root(), file("evil", "x")])),
        ("a way out", archive(&[manifest(), file("../rootfs/x", "x")])),
        ("an absolute name", archive(&[manifest(), file("/rootfs/x", "x")])),
        ("a hard link out", archive(&[manifest(), file("rootfs/a", ""), link("rootfs/b", b'1', "/etc/shadow")])),
        ("a hard link to the manifest", archive(&[manifest(), link("rootfs/b", b'1', "manifest")])),
        ("a whiteout", archive(&[manifest(), file("rootfs/.wh.x", "")])),
        ("an opaque directory", archive(&[manifest(), file("rootfs/a/.wh..wh..opq", "")])),
        (
            "a name in two headers",
            [archive_start(&[manifest()]), extended(&[("path", b"rootfs/a")]), extended(&[("path", b"rootfs/b")]), archive(&[root()])].concat(),
        ),
        ("a malformed record", [archive_start(&[manifest()]), extended(&[("size", b"-1")]), archive(&[root()])].concat()),
        ("a size beyond all", [archive_start(&[manifest()]), extended(&[("size", b"18446744073709551615")]), archive(&[file("rootfs/x", "")])].concat()),
        ("a wrong checksum", {
            let mut bytes = archive(&[manifest(), root()]);
            bytes[0] ^= 1;
            bytes
        }),
    ];
    for (what, bytes) in cases {
        assert_eq!(read(&bytes).err().map(|e| e.kind), Some(Kind::DataLoss), "{what}");
    }
    // The control.
    assert!(read(&archive(&[manifest(), root(), file("rootfs/x", "x")])).is_ok());
}

#[test]
fn archives_have_limits() {
    let big = "m".repeat(3000);
    let image = archive(&[file("manifest", &big), item("rootfs", b'5'), file("rootfs/f", &big)]);
    let limits = Limits::default();
    for (limits, fits) in [
        (limits, true),
        (Limits { manifest_bytes: 2999, ..limits }, false),
        (Limits { layer_bytes: image.len() as u64 - 1, ..limits }, false),
        (Limits { manifest_bytes: 3000, layer_bytes: image.len() as u64, ..limits }, true),
    ] {
        assert_eq!(read_with(&image, limits).map(|_| ()).map_err(|e| e.kind), if fits { Ok(()) } else { Err(Kind::ResourceExhausted) });
    }
    let cancel = CancellationToken::new();
    cancel.cancel();
    let file = spool(&image);
    let mut archive = Archive::open(&file, limits, cancel).unwrap();
    let error = archive.layer()().unwrap_err().downcast::<Error>().unwrap();
    assert_eq!(error.kind, Kind::Cancelled);
    assert!(archive.contents().is_err());
}
