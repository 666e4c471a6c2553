//! A small image from the host's own busybox, for machines that reach no registry: a docker-archive with the program and the
//! shared libraries it needs. Nothing is downloaded, nothing is made up.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::model::error::{Act as _, Error, Result};

/// Where a busybox is looked for.
const PLACES: [&str; 4] = ["/bin/busybox", "/usr/bin/busybox", "/sbin/busybox", "/usr/local/bin/busybox"];

/// Writes the archive under `name:tag` to `path`.
///
/// # Errors
/// `NotFound` when the host has no busybox; I/O errors.
pub fn write_archive(path: &Path, repo_tag: &str) -> Result<()> {
    let busybox = PLACES
        .iter()
        .map(PathBuf::from)
        .find(|p| p.is_file())
        .ok_or_else(|| Error::not_found(format!("find busybox in {} (install it, or name an image archive with `mesocri load`)", PLACES.join(", "))))?;
    let layer = layer(&busybox)?;
    let diff_id = format!("sha256:{}", hex(&Sha256::digest(&layer)));
    let config = serde_json::json!({
        "architecture": architecture(), "os": "linux", "created": "1970-01-01T00:00:00Z",
        "config": { "Cmd": ["sh"], "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created_by": "mesocri run: the host's busybox" }],
    });
    let config = serde_json::to_vec(&config).act("encode", "image configuration")?;
    let config_name = format!("{}.json", hex(&Sha256::digest(&config)));
    let manifest = serde_json::json!([{ "Config": config_name, "RepoTags": [repo_tag], "Layers": ["layer.tar"] }]);
    let manifest = serde_json::to_vec(&manifest).act("encode", "image manifest")?;

    let file = std::fs::File::create(path).act("create", path.display())?;
    let mut archive = tar::Builder::new(file);
    for (name, bytes) in [(config_name.as_str(), &config), ("layer.tar", &layer), ("manifest.json", &manifest)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes.as_slice()).act("write", path.display())?;
    }
    archive.into_inner().and_then(|mut f| f.flush()).act("write", path.display())
}

/// One layer: busybox, its libraries, the applets as links, the directories that programs expect.
fn layer(busybox: &Path) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    tar.mode(tar::HeaderMode::Deterministic);
    let header = |kind: tar::EntryType, mode: u32, size: u64| {
        let mut h = tar::Header::new_gnu();
        h.set_entry_type(kind);
        h.set_mode(mode);
        h.set_size(size);
        h.set_uid(0);
        h.set_gid(0);
        h.set_mtime(0);
        h
    };
    for (dir, mode) in [("bin", 0o755), ("etc", 0o755), ("proc", 0o755), ("root", 0o700), ("sys", 0o755), ("dev", 0o755), ("tmp", 0o1777), ("var", 0o755)] {
        tar.append_data(&mut header(tar::EntryType::Directory, mode, 0), dir, std::io::empty()).act("add", dir)?;
    }
    let files = BTreeMap::from([
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ]);
    for (name, text) in files {
        tar.append_data(&mut header(tar::EntryType::Regular, 0o644, text.len() as u64), name, text.as_bytes()).act("add", name)?;
    }
    for (source, target) in std::iter::once((busybox.to_owned(), PathBuf::from("bin/busybox"))).chain(libraries(busybox)?) {
        let bytes = std::fs::read(&source).act("read", source.display())?;
        tar.append_data(&mut header(tar::EntryType::Regular, 0o755, bytes.len() as u64), &target, bytes.as_slice()).act("add", source.display())?;
    }
    for applet in applets(busybox)? {
        tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), format!("bin/{applet}"), "busybox").act("add", &applet)?;
    }
    tar.into_inner().act("finish", "the layer")
}

/// The commands that this busybox was built with, as it lists them itself.
fn applets(busybox: &Path) -> Result<Vec<String>> {
    let output = std::process::Command::new(busybox).arg("--list").output().act("run", busybox.display())?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter(|name| *name != "busybox" && !name.is_empty() && !name.contains('/')).map(str::to_owned).collect())
}

/// The shared libraries and the loader of a program, as the loader itself lists them; none for a static one.
fn libraries(program: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    let output = std::process::Command::new("ldd").arg(program).output().act("run", "ldd")?;
    if !output.status.success() {
        return Ok(Vec::new());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(|path| (PathBuf::from(path), PathBuf::from(path.trim_start_matches('/'))))
        .collect())
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}
