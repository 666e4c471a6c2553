//! `pathWhitelist`: of an image and all below it, only the listed paths exist, and the directories that lead to them.
//!
//! Layers are shared, so nothing is taken out of them: one more layer on top hides what is not listed, by whiteouts. (It hides
//! that of images further below too, where such an image is one of several dependencies.)

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};

use crate::model::error::{Act, Error, Kind, Result};
use crate::provisioner::unpack::content::opacity;
use crate::provisioner::unpack::sink::WHITEOUT;

/// Most names looked at; each costs about its length in memory.
const MAX_NAMES: usize = 2_000_000;

/// What is seen of several layers: path, and whether it is a directory.
type Seen = BTreeMap<Vec<u8>, bool>;

/// The archive of the layer that leaves only `list` of `layers`, lowest first; `None` when nothing has to be hidden or made. Blocks.
///
/// # Errors
/// `ResourceExhausted` beyond the bound, I/O errors.
pub fn layer(layers: &[PathBuf], list: &BTreeSet<String>) -> Result<Option<Vec<u8>>> {
    let mut seen = Seen::new();
    for files in layers {
        add(files, &mut seen)?;
    }
    let mut kept: BTreeSet<&[u8]> = BTreeSet::new();
    for path in list {
        let path = path.trim_end_matches('/').as_bytes();
        kept.insert(path);
        kept.extend(path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(slash, _)| &path[..slash]));
    }
    let mut builder = tar::Builder::new(Vec::new());
    let mut entries = 0;
    for path in seen.keys().filter(|path| !kept.contains(path.as_slice())) {
        let (parent, name) = split(path);
        // What hides the parent hides this.
        if parent.is_empty() || kept.contains(parent) {
            let slash: &[u8] = if parent.is_empty() { b"" } else { b"/" };
            append(&mut builder, &[parent, slash, WHITEOUT, name].concat(), tar::EntryType::Regular, 0)?;
            entries += 1;
        }
    }
    for path in list.iter().filter_map(|path| path.strip_suffix('/')).filter(|path| !path.is_empty()) {
        if seen.get(path.as_bytes()) != Some(&true) {
            append(&mut builder, format!("{path}/").as_bytes(), tar::EntryType::Directory, 0o755)?;
            entries += 1;
        }
    }
    if entries == 0 {
        return Ok(None);
    }
    builder.into_inner().map(Some).act("write", "layer archive")
}

fn append(builder: &mut tar::Builder<Vec<u8>>, path: &[u8], kind: tar::EntryType, mode: u32) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(0);
    builder.append_data(&mut header, Path::new(OsStr::from_bytes(path)), std::io::empty()).act("write", "layer archive")
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// Lays one layer over what is seen.
fn add(files: &Path, seen: &mut Seen) -> Result<()> {
    let root = crate::disk::layer::root(files).act("open layer", files.display())?;
    let mut pending = vec![Vec::new()];
    while let Some(dir) = pending.pop() {
        add_directory(&root, &dir, seen, &mut pending).act("read layer directory", dir.escape_ascii())?;
        if seen.len() > MAX_NAMES {
            return Err(Error::new(Kind::ResourceExhausted, format!("more than {MAX_NAMES} files")));
        }
    }
    Ok(())
}

/// Every directory is opened by its path from the root, through no link: layers are hostile and this runs on the host.
fn add_directory(root: &OwnedFd, dir: &[u8], seen: &mut Seen, pending: &mut Vec<Vec<u8>>) -> rustix::io::Result<()> {
    use std::os::fd::AsFd;
    let name = if dir.is_empty() { b".".as_slice() } else { dir };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat2(root, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)?;
    if !opacity(fd.as_fd()).is_empty() {
        forget_below(seen, dir);
    }
    for entry in Dir::read_from(&fd)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let slash: &[u8] = if dir.is_empty() { b"" } else { b"/" };
        let path = [dir, slash, name.to_bytes()].concat();
        let stat = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            seen.insert(path.clone(), true);
            pending.push(path);
            continue;
        }
        forget_below(seen, &path);
        if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
            seen.remove(&path);
        } else {
            seen.insert(path, false);
        }
    }
    Ok(())
}

fn forget_below(seen: &mut Seen, dir: &[u8]) {
    if dir.is_empty() {
        seen.clear();
        return;
    }
    // `0` comes right behind the slash.
    let below = [dir, b"/"].concat()..[dir, b"0"].concat();
    let gone: Vec<Vec<u8>> = seen.range(below).map(|(path, _)| path.clone()).collect();
    for path in gone {
        seen.remove(&path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn names(tar: &[u8]) -> BTreeSet<String> {
        let mut archive = tar::Archive::new(tar);
        archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect()
    }

    #[test]
    fn only_what_is_listed_is_left() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["low/bin/a", "low/bin/b", "low/etc/x", "low/etc-old", "low/opt/deep/er/f", "low/gone/f", "high/bin/c", "high/var/v"] {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("high/gone"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        let layers = [dir.path().join("low"), dir.path().join("high")];
        let list = |paths: &[&str]| paths.iter().map(|p| (*p).to_owned()).collect::<BTreeSet<_>>();
        let made = layer(&layers, &list(&["bin/a", "opt/", "new/dir/"])).unwrap().unwrap();
        let hidden = ["bin/.wh.b", "bin/.wh.c", ".wh.etc", ".wh.etc-old", "opt/.wh.deep", ".wh.var", "new/dir/"];
        assert_eq!(names(&made), hidden.iter().map(|h| (*h).to_owned()).collect());
        assert_eq!(layer(&layers, &list(&["bin/a", "opt/", "new/dir/"])).unwrap().unwrap(), made, "the same each time");
        let all = ["bin/a", "bin/b", "bin/c", "etc/x", "etc-old", "opt/deep/er/f", "var/v"];
        assert_eq!(layer(&layers, &list(&all)).unwrap(), None);
        let linked = dir.path().join("linked");
        std::fs::create_dir(&linked).unwrap();
        std::os::unix::fs::symlink("/", linked.join("root")).unwrap();
        assert_eq!(names(&layer(&[linked], &list(&["x"])).unwrap().unwrap()), [".wh.root".to_owned()].into());
    }
}
