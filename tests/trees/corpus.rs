//! Layer archives written header by header, so that they hold what no tool would write: the corpus of images, and random ones.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use super::Random;

/// One member of an archive.
#[derive(Clone, Default)]
pub struct Member {
    name: Vec<u8>,
    kind: u8,
    mode: u32,
    owner: (u64, u64),
    mtime: u64,
    link: Vec<u8>,
    device: (u32, u32),
    data: Vec<u8>,
    pax: Vec<(String, Vec<u8>)>,
}

fn member(kind: u8, name: &(impl AsRef<[u8]> + ?Sized), mode: u32) -> Member {
    Member { name: name.as_ref().to_vec(), kind, mode, mtime: 1_400_000_000, ..Member::default() }
}

/// A regular file.
pub fn file(name: &(impl AsRef<[u8]> + ?Sized), data: &str) -> Member {
    Member { data: data.as_bytes().to_vec(), ..member(b'0', name, 0o644) }
}

/// A directory.
pub fn dir(name: &(impl AsRef<[u8]> + ?Sized)) -> Member {
    member(b'5', name, 0o755)
}

/// A symbolic link.
pub fn symlink(name: &str, target: &str) -> Member {
    Member { link: target.into(), ..member(b'2', name, 0o777) }
}

/// A further name. Entries of links carry the metadata of their file: containerd gives them to the file again, we and umoci do
/// not look at them.
pub fn hardlink(name: &str, target: &str) -> Member {
    Member { link: target.into(), ..member(b'1', name, 0o644) }
}

/// A device node or pipe.
pub fn node(kind: u8, name: &str, major: u32, minor: u32) -> Member {
    Member { device: (major, minor), ..member(kind, name, 0o640) }
}

/// The mark that hides `name` of lower layers.
pub fn whiteout(name: &str) -> Member {
    let (parent, name) = name.rsplit_once('/').map_or((String::new(), name), |(parent, name)| (format!("{parent}/"), name));
    file(&format!("{parent}.wh.{name}"), "")
}

/// The mark that hides all that lower layers have in `dir`.
pub fn opaque(dir: &str) -> Member {
    file(&if dir.is_empty() { ".wh..wh..opq".to_owned() } else { format!("{dir}/.wh..wh..opq") }, "")
}

impl Member {
    /// With permission bits.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Of user and group.
    pub fn of(mut self, user: u64, group: u64) -> Self {
        self.owner = (user, group);
        self
    }

    /// Changed at `mtime`, in seconds since the epoch.
    pub fn at(mut self, mtime: u64) -> Self {
        self.mtime = mtime;
        self
    }

    /// With a record of a PAX header.
    pub fn pax(mut self, key: &str, value: &(impl AsRef<[u8]> + ?Sized)) -> Self {
        self.pax.push((key.to_owned(), value.as_ref().to_vec()));
        self
    }

    /// With an extended attribute.
    pub fn xattr(self, name: &str, value: &[u8]) -> Self {
        self.pax(&format!("SCHILY.xattr.{name}"), value)
    }

    fn write(&self, archive: &mut Vec<u8>) {
        if !self.pax.is_empty() {
            let mut records = Vec::new();
            for (key, value) in &self.pax {
                // The length of a record counts its own digits.
                let rest = key.len() + value.len() + 3;
                let mut length = rest + 1;
                while length != rest + length.to_string().len() {
                    length = rest + length.to_string().len();
                }
                records.extend_from_slice(format!("{length} {key}=").as_bytes());
                records.extend_from_slice(value);
                records.push(b'\n');
            }
            Member { data: records, ..member(b'x', "PaxHeaders/0", 0o644) }.write(archive);
        }
        let mut header = tar::Header::new_ustar();
        let old = header.as_old_mut();
        let name = &self.name[..self.name.len().min(old.name.len())];
        old.name[..name.len()].copy_from_slice(name);
        old.linkname[..self.link.len()].copy_from_slice(&self.link);
        old.linkflag = [self.kind];
        header.set_mode(self.mode);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header.set_mtime(self.mtime);
        header.set_size(self.data.len() as u64);
        header.set_device_major(self.device.0).unwrap();
        header.set_device_minor(self.device.1).unwrap();
        header.set_cksum();
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(&self.data);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
}

/// An archive of these members, in this order.
pub fn layer(members: &[Member]) -> Vec<u8> {
    let mut archive = Vec::new();
    for member in members {
        member.write(&mut archive);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// Where a judge differs from us, and from the other judge: path, field, judge.
pub type Exceptions = &'static [(&'static str, &'static str, &'static str)];

/// An image of the corpus.
pub struct Image {
    /// What it is about.
    pub name: String,
    /// Uncompressed archives, lowest first.
    pub layers: Vec<Vec<u8>>,
    /// What is not compared.
    pub except: Exceptions,
    /// Judges that do not know what is in it.
    pub refused_by: &'static [&'static str],
}

fn made(name: &str, layers: Vec<Vec<u8>>) -> Image {
    Image { name: name.to_owned(), layers, except: &[], refused_by: &[] }
}

fn image(name: &str, layers: &[&[Member]]) -> Image {
    made(name, layers.iter().map(|members| layer(members)).collect())
}

/// Directories that a layer uses without listing them. What time they have nobody has laid down: judges take that of unpacking.
pub fn implied(layers: &[Vec<u8>]) -> BTreeSet<String> {
    let mut implied = BTreeSet::new();
    for layer in layers {
        let (mut used, mut listed) = (BTreeSet::from([".".to_owned()]), BTreeSet::new());
        for entry in tar::Archive::new(layer.as_slice()).entries().unwrap() {
            let entry = entry.unwrap();
            let path = entry.path_bytes();
            let parts: Vec<String> = path.split(|b| *b == b'/').filter(|p| !matches!(*p, b"" | b".")).map(|p| p.escape_ascii().to_string()).collect();
            used.extend((1..parts.len()).map(|n| parts[..n].join("/")));
            if entry.header().entry_type().is_dir() {
                listed.insert(if parts.is_empty() { ".".to_owned() } else { parts.join("/") });
            }
        }
        implied.extend(used.difference(&listed).cloned());
    }
    implied
}

/// All images made by hand.
pub fn corpus(scratch: &Path) -> Vec<Image> {
    let mut images = vec![kinds(), names(), whiteouts(), opaques(), replacements(), links(), odd(), contiguous(), deep(), same_twice()];
    images.extend(sparse(scratch));
    images
}

fn kinds() -> Image {
    let long = "v".repeat(3000);
    let made = image(
        "kinds",
        &[
            &[
                dir("./").mode(0o711).of(3, 4).at(1_300_000_000),
                dir("d").mode(0o2775).of(1000, 1001),
                dir("t").mode(0o1777),
                file("d/setuid", "s").mode(0o4711).of(1000, 1001),
                file("d/setgid", "s").mode(0o2755).of(0, 1001),
                file("d/none", "").mode(0),
                file("d/all", "x").mode(0o7777).of(2_097_151, 2_097_151),
                file("d/large-id", "x").pax("uid", "3000000000").pax("gid", "4294967294"),
                file("d/old", "x").at(0),
                file("d/future", "x").at(4_102_444_800),
                file("d/fraction", "x").pax("mtime", "1500000000.123456789"),
                symlink("l", "/nowhere").of(7, 8).at(1_234_567_890),
                symlink("d/l", "../t").pax("mtime", "1500000000.5"),
                node(b'3', "d/null", 1, 3).mode(0o666),
                node(b'4', "d/block", 259, 1_000_000).of(0, 6),
                node(b'6', "d/pipe", 0, 0).mode(0o600).at(5),
                node(b'3', "d/char00x", 0, 1),
                file("x/user", "x").xattr("user.note", b"kept").xattr("user.empty", b"").xattr("user.binary", &[0, 1, 2, 255]),
                file("x/long", "x").xattr("user.long", long.as_bytes()),
                dir("x/dir").xattr("user.on-dir", b"1"),
                file("x/capable", "x").xattr("security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                file("x/trusted", "x").xattr("trusted.note", b"t"),
            ],
            // Attributes do not survive the replacement of their file.
            &[file("x/user", "new").mode(0o600), dir("d").mode(0o700).of(5, 5).at(1_350_000_000), file("d/setuid", "s").mode(0o755)],
        ],
    );
    // Other namespaces than user and security are not carried by containerd. A root that only a lower layer lists stays 0755 of
    // root there.
    Image { except: &[("x/trusted", "xattrs", "containerd"), (".", "mode", "containerd"), (".", "owner", "containerd")], ..made }
}

fn names() -> Image {
    let long = format!("{}/{}/{}", "a".repeat(255), "b".repeat(200), "c".repeat(255));
    let mut members = vec![
        dir("long"),
        file("long/placeholder", "long").pax("path", &format!("long/{long}")),
        symlink("long/target", "x").pax("linkpath", &"../t".repeat(300)),
        file("gnu/short", "x"),
        Member { data: [b"gnu/", "g".repeat(180).as_bytes(), b"\0"].concat(), ..member(b'L', "././@LongLink", 0o644) },
        file("gnu/cut", "long by GNU's way"),
    ];
    for name in [
        &b"n/latin-\xe9\xff"[..],
        b"n/new\nline",
        b"n/co:lon,comma",
        b"n/back\\slash",
        b"n/ space ",
        b"n/quote\"'",
        b"n/\x01",
        b"n/...",
        b"n/.hidden",
        b"n/.wh",
        b"n/wh.x",
        b"n/%s*?",
    ] {
        members.push(file(name, "odd name"));
    }
    // The directory is listed before what is put into it, and umoci does not come back to it.
    Image { except: &[("long", "mtime", "umoci")], ..image("names", &[&members, &[whiteout("n/co:lon,comma"), file("n/...", "again")]]) }
}

fn whiteouts() -> Image {
    let made = image(
        "whiteouts",
        &[
            &[
                file("file", "1"),
                dir("dir"),
                file("dir/a", "1"),
                dir("dir/sub"),
                file("dir/sub/b", "1"),
                symlink("link", "dir"),
                node(b'3', "null", 1, 3),
                file("again-same-layer", "1"),
                dir("dir-again"),
                file("dir-again/old", "1"),
                file("later", "1"),
                dir("p"),
                file("p/one", "1"),
                file("p/two", "1"),
                file("one-name", "linked"),
                hardlink("other-name", "one-name"),
            ],
            &[
                whiteout("file"),
                whiteout("dir"),
                whiteout("link"),
                whiteout("null"),
                whiteout("never-was"),
                whiteout("p/one"),
                whiteout("one-name"),
                whiteout("later"),
                whiteout("again-same-layer"),
                file("again-same-layer", "2"),
                whiteout("dir-again"),
                dir("dir-again").mode(0o700),
                file("dir-again/new", "2"),
            ],
            &[file("later", "3"), dir("dir").mode(0o711), file("dir/c", "3"), dir("file"), file("file/inside", "3")],
            &[whiteout("dir"), whiteout("file")],
            &[file("dir", "now a file")],
        ],
    );
    // Hidden and made anew by one layer.
    Image { except: &[("dir-again/old", "presence", "containerd")], ..made }
}

fn opaques() -> Image {
    image(
        "opaques",
        &[
            &[
                dir("first"),
                file("first/low", "1"),
                dir("last"),
                file("last/low", "1"),
                dir("nested"),
                dir("nested/in"),
                file("nested/in/low", "1"),
                dir("nested/out"),
                file("nested/out/low", "1"),
                dir("empty"),
                file("empty/low", "1"),
                dir("stays"),
                file("stays/low", "1"),
            ],
            &[
                dir("first"),
                opaque("first"),
                file("first/high", "2"),
                dir("last"),
                file("last/high", "2"),
                opaque("last"),
                dir("nested"),
                dir("nested/in").mode(0o750),
                opaque("nested/in"),
                dir("empty"),
                opaque("empty"),
                dir("new"),
                opaque("new"),
                file("new/x", "2"),
                dir("stays"),
                file("stays/high", "2"),
            ],
            &[dir("first"), file("first/third", "3"), dir("nested"), dir("nested/in"), file("nested/in/third", "3")],
            &[dir("last"), opaque("last"), dir("last/deep"), file("last/deep/x", "4")],
        ],
    )
}

fn replacements() -> Image {
    image(
        "replacements",
        &[
            &[
                dir("dir-file"),
                file("dir-file/x", "1"),
                file("file-dir", "1"),
                dir("dir-link"),
                file("dir-link/x", "1"),
                symlink("link-dir", "dir-link"),
                symlink("link-file", "file-dir"),
                node(b'6', "pipe-file", 0, 0),
                file("file-node", "1"),
                file("hard-a", "1"),
                hardlink("hard-b", "hard-a"),
                dir("chmod"),
                file("chmod/x", "1"),
            ],
            &[
                file("dir-file", "2"),
                dir("file-dir"),
                file("file-dir/x", "2"),
                symlink("dir-link", "nowhere"),
                dir("link-dir"),
                file("link-dir/x", "2"),
                file("link-file", "2"),
                file("pipe-file", "2"),
                node(b'3', "file-node", 5, 1),
                // One name of two becomes another file; the other keeps the old content.
                file("hard-a", "2"),
                dir("chmod").mode(0o500).of(9, 9),
            ],
            &[dir("dir-file"), file("dir-file/back", "3"), file("file-dir", "3"), symlink("link-dir", "dir-file"), dir("dir-link")],
        ],
    )
}

fn links() -> Image {
    let mut many: Vec<Member> = vec![file("many/0", "linked")];
    many.extend((1..50).map(|n| hardlink(&format!("many/{n}"), &format!("many/{}", n - 1))));
    many.extend([
        symlink("s", "many/0"),
        hardlink("s2", "s"),
        node(b'6', "pipe", 0, 0),
        hardlink("pipe2", "pipe").mode(0o640),
        file("z", "late").mode(0o600).of(4, 4),
        hardlink("a", "./z").mode(0o600).of(4, 4),
        hardlink("b", "/z").mode(0o600).of(4, 4),
    ]);
    image("links", &[&many, &[file("new/x", "2"), hardlink("new/y", "new/x")]])
}

fn odd() -> Image {
    image(
        "odd",
        &[
            &[
                file("./dot", "1"),
                file("/absolute", "1"),
                file("a//double", "1"),
                file("a/./inner", "1"),
                dir("slash/"),
                file("slash/x", "1"),
                file("implied/parents/of/this", "1"),
                file("twice", "first"),
                file("twice", "second").mode(0o600),
                file("kind", "file"),
                dir("kind"),
                file("kind/x", "1"),
                dir("kind2"),
                file("kind2/x", "1"),
                file("kind2", "file"),
                dir("late").mode(0o500),
                file("late/x", "1"),
                dir("late").mode(0o755).of(1, 2).at(1_200_000_000),
                Member { kind: 0, ..file("old-style-file", "1") },
            ],
            &[],
            &[file("implied/parents/again", "3")],
        ],
    )
}

/// A kind of file that POSIX defines and nobody has.
fn contiguous() -> Image {
    Image { refused_by: &["containerd", "umoci"], ..image("contiguous", &[&[Member { kind: b'7', ..file("contiguous", "1") }]]) }
}

/// Sparse files in each of the formats that GNU tar writes.
fn sparse(scratch: &Path) -> [Image; 2] {
    use std::os::unix::fs::FileExt as _;
    let files = scratch.join("sparse");
    std::fs::create_dir(&files).unwrap();
    for (name, size, pieces) in [
        ("head", 4 << 20, &[0u64][..]),
        ("tail", 4 << 20, &[(4 << 20) - 5]),
        ("many", 8 << 20, &[65536, 1 << 20, 3 << 20, 5 << 20, 6 << 20, 7 << 20]),
        ("hole", 1 << 20, &[]),
    ] {
        let file = std::fs::File::create(files.join(name)).unwrap();
        file.set_len(size).unwrap();
        for at in pieces {
            file.write_all_at(b"data!", *at).unwrap();
        }
    }
    let formats = [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ];
    let layers = formats.iter().enumerate().map(|(n, format)| {
        let transform = format!("s,^\\.,f{n},");
        let output = Command::new("tar")
            .args(["-S", "-c", "--owner=3", "--group=4", "--transform", &transform])
            .args(*format)
            .arg("-C")
            .arg(&files)
            .arg(".")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    });
    let mut layers: Vec<_> = layers.collect();
    let pax = layers.split_off(1);
    [Image { refused_by: &["containerd", "umoci"], ..made("sparse-gnu", layers) }, made("sparse-pax", pax)]
}

/// Many layers, each of which changes something.
fn deep() -> Image {
    let one = |n: usize| {
        let mut members = vec![dir("d").mode(0o700 + u32::try_from(n % 8).unwrap()), file(&format!("d/{n}"), &n.to_string()), file("d/last", &n.to_string())];
        if n % 3 == 2 {
            members.push(whiteout(&format!("d/{}", n - 2)));
        }
        if n == 40 {
            members.push(opaque("d"));
        }
        layer(&members)
    };
    made("deep", (0..60).map(one).collect())
}

/// The same layer on both sides of one that undoes it.
fn same_twice() -> Image {
    let base = [dir("d"), file("d/x", "1"), file("y", "1")];
    image("same-twice", &[&base, &[whiteout("d"), whiteout("y")], &base])
}

/// A random image: each layer does random things to what is there, always naming the parents of what it touches, so that no
/// judge has to guess their metadata.
pub fn random(seed: u64) -> Image {
    let mut random = Random::new(seed);
    // What is there, with its kind.
    let mut present: BTreeMap<String, u8> = BTreeMap::new();
    let mut layers = Vec::new();
    for _ in 0..2 + random.below(6) {
        layers.push(layer(&random_layer(&mut random, &mut present)));
    }
    made(&format!("random-{seed}"), layers)
}

fn random_layer(random: &mut Random, present: &mut BTreeMap<String, u8>) -> Vec<Member> {
    let mut members: Vec<Member> = Vec::new();
    // What this layer itself has said, which no mark of it may take back: the order of marks and entries means nothing.
    let mut said: BTreeMap<String, u8> = BTreeMap::new();
    let meta = |random: &mut Random, member: Member| {
        let mode = [0o755, 0o700, 0o2750, 0o1777, 0o4755][random.below(5)];
        let member = member.mode(mode).of(random.below(5) as u64, random.below(5) as u64).at(1_000_000_000 + random.below(1000) as u64);
        if random.below(4) == 0 { member.xattr("user.n", random.below(9).to_string().as_bytes()) } else { member }
    };
    for _ in 0..3 + random.below(12) {
        let path: Vec<String> = (0..1 + random.below(3)).map(|_| ["a", "b", "c", "d"][random.below(4)].to_owned()).collect();
        let name = path.join("/");
        let parents: Vec<String> = (1..path.len()).map(|n| path[..n].join("/")).collect();
        if said.contains_key(&name) || parents.iter().any(|p| said.get(p).is_some_and(|kind| *kind != b'5')) {
            continue;
        }
        for parent in parents {
            if said.insert(parent.clone(), b'5').is_none() {
                members.push(meta(random, dir(&parent)));
                present.insert(parent, b'5');
            }
        }
        let below = format!("{name}/");
        let forget = |present: &mut BTreeMap<String, u8>| present.retain(|p, _| *p != name && !p.starts_with(&below));
        let kind = b"001256wwo"[random.below(9)];
        match kind {
            b'w' if present.contains_key(&name) => {
                members.push(whiteout(&name));
                forget(present);
                said.insert(name, b'w');
                continue;
            }
            b'o' if present.get(&name).is_none_or(|kind| *kind == b'5') => {
                members.extend([meta(random, dir(&name)), opaque(&name)]);
                forget(present);
                present.insert(name.clone(), b'5');
                said.insert(name, b'5');
                continue;
            }
            b'5' => members.push(meta(random, dir(&name))),
            // The kernel keeps user attributes on files and directories only.
            b'2' => members.push(symlink(&name, "a/b").of(3, 4).at(1_000_000_000 + random.below(1000) as u64)),
            b'6' => members.push(node(b'6', &name, 0, 0).at(1_000_000_000 + random.below(1000) as u64)),
            b'1' => {
                let files: Vec<_> = said.iter().filter(|(_, kind)| **kind == b'0').map(|(name, _)| name.clone()).collect();
                let Some(target) = files.get(random.below(files.len().max(1))) else { continue };
                let Some(of) = members.iter().find(|m| m.name == target.as_bytes() && m.kind == b'0') else { continue };
                let link = hardlink(&name, target).mode(of.mode).of(of.owner.0, of.owner.1).at(of.mtime);
                members.push(link);
            }
            _ => {
                let data = random.below(1_000_000).to_string();
                members.push(meta(random, file(&name, &data)));
            }
        }
        if kind != b'5' || present.get(&name).is_some_and(|kind| *kind != b'5') {
            forget(present);
        }
        let kind = if matches!(kind, b'w' | b'o') { b'0' } else { kind };
        present.insert(name.clone(), kind);
        said.insert(name, kind);
    }
    members
}
