//! A Debian as three layers: what debootstrap makes, then what an administrator does to it.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::corpus::{dir, file, hardlink, layer, opaque, symlink, whiteout};

/// The archive that `hack/dev deps test` made.
fn archive() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/debian/root.tar");
    assert!(path.exists(), "{} is missing: hack/dev deps test makes it", path.display());
    path
}

/// The layers, lowest first.
pub fn layers() -> Vec<Vec<u8>> {
    let base = std::fs::read(archive()).unwrap();
    // What apt and dpkg leave, taken from the tree itself so that real files meet marks and replacements.
    let names = String::from_utf8(Command::new("tar").args(["-tf"]).arg(archive()).output().unwrap().stdout).unwrap();
    let documents = names.lines().filter(|n| n.starts_with("./usr/share/doc/") && n.ends_with("/copyright")).step_by(3);
    let mut removed = vec![dir("usr").at(1_700_000_000), dir("usr/share").at(1_700_000_000), dir("usr/share/doc").mode(0o750)];
    for name in documents {
        let parent = name.trim_start_matches("./").trim_end_matches("/copyright");
        removed.extend([dir(parent), whiteout(&format!("{parent}/copyright"))]);
    }
    removed.extend([dir("usr/share/locale"), opaque("usr/share/locale"), whiteout("usr/share/man"), dir("var"), dir("var/cache"), whiteout("var/cache/apt")]);
    let added = [
        dir("etc").mode(0o751),
        file("etc/hostname", "layered"),
        symlink("etc/motd", "hostname"),
        dir("usr").at(1_700_000_001),
        dir("usr/share").at(1_700_000_001),
        dir("usr/share/man"),
        file("usr/share/man/page", "new"),
        hardlink("usr/share/man/other", "usr/share/man/page"),
        dir("usr/bin"),
        file("usr/bin/perl", "#!/bin/sh").mode(0o755),
    ];
    vec![base, layer(&removed), layer(&added)]
}
