//! What the machine boots from: a disk with this build's programs and what they need of the host, and an initramfs that loads
//! the modules to reach it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{BUSYBOX, host};

/// Where the archive with the test image lies in the machine.
pub const ARCHIVE: &str = "/busybox.tar";
/// Modules of the kernel that are needed: disk, root filesystems, networks of pods. Those they depend on come along.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "overlay",
    "veth",
    "bridge",
    "br_netfilter",
    "nf_tables",
    "nft_chain_nat",
    "nft_masq",
    "nft_nat",
    "nft_ct",
    "nft_fib_inet",
    "nft_reject_inet",
    "nft_redir",
    "autofs4",
];
/// Size of the disk; it is sparse.
const DISK: &str = "3G";

/// Directory of an unpacked kernel package.
fn kernel_dir() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    std::env::var_os("MESOCRI_VM_KERNEL").map_or_else(|| target.join("vm"), PathBuf::from)
}

/// The kernel's image.
pub fn kernel() -> PathBuf {
    let boot = kernel_dir().join("boot");
    let name = crate::common::entries(&boot).into_iter().find(|n| n.starts_with("vmlinuz-"));
    boot.join(name.unwrap_or_else(|| panic!("no kernel in {}: run `hack/dev deps test`", boot.display())))
}

/// Writes the disk to `disk`. `init` is what runs as process 1: a script, or systemd with that script as its only service.
pub fn write_disk(disk: &Path, scratch: &Path, systemd: bool, script: &str) {
    let mut tree = Tree::new(scratch.join("disk"));
    for dir in ["dev", "proc", "sys", "run", "tmp", "root", "etc", "var/lib", "var/log"] {
        fs::create_dir_all(tree.at(dir)).unwrap();
    }
    tree.busybox();
    for program in [env!("CARGO_BIN_EXE_mesocri"), env!("CARGO_BIN_EXE_containerd-shim-mesocri-v1"), env!("CARGO_BIN_EXE_mesocri-init")] {
        tree.program(Path::new(program));
    }
    tree.program(&std::env::current_exe().unwrap());
    tree.program(&which("ip"));
    tree.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644);
    tree.text("etc/group", "root:x:0:\n", 0o644);
    tree.text("etc/resolv.conf", "nameserver 127.0.0.1\n", 0o644);
    mesocri::daemon::cli::sample::write_archive(&tree.at(ARCHIVE), BUSYBOX).unwrap();
    if systemd {
        tree.systemd();
        tree.text("sbin/test", script, 0o755);
        symlink("/lib/systemd/systemd", tree.at("sbin/init")).unwrap();
    } else {
        tree.text("sbin/init", script, 0o755);
    }
    host::run(
        "mke2fs",
        &[
            "-q",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-E",
            "lazy_itable_init=1,nodiscard",
            "-d",
            &tree.root.display().to_string(),
            &disk.display().to_string(),
            DISK,
        ],
    );
}

fn which(name: &str) -> PathBuf {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path.split(':').chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"]);
    dirs.map(|d| Path::new(d).join(name)).find(|p| p.is_file()).unwrap_or_else(|| panic!("{name} is not installed (hack/dev deps test)"))
}

/// A directory that becomes a file system.
struct Tree {
    root: PathBuf,
    seen: BTreeSet<PathBuf>,
}

impl Tree {
    fn new(root: PathBuf) -> Self {
        fs::create_dir_all(&root).unwrap();
        Self { root, seen: BTreeSet::new() }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn text(&self, path: &str, text: &str, mode: u32) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A host's file at the same path; a link where both lie on one file system.
    fn file(&mut self, path: &Path) {
        if !self.seen.insert(path.to_owned()) {
            return;
        }
        let to = self.at(path.to_str().unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        let source = fs::canonicalize(path).unwrap();
        if fs::hard_link(&source, &to).is_err() {
            fs::copy(&source, &to).unwrap_or_else(|e| panic!("copy {}: {e}", path.display()));
        }
    }

    /// A program with the libraries that the loader names.
    fn program(&mut self, path: &Path) {
        self.file(path);
        let output = Command::new("ldd").arg(path).output().unwrap();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if let Some(library) = line.split_whitespace().find(|w| w.starts_with('/')) {
                self.file(Path::new(library));
            }
        }
    }

    /// `/bin/busybox` with a link for each of its commands.
    fn busybox(&mut self) {
        let busybox = which("busybox");
        self.program(&busybox);
        fs::create_dir_all(self.at("bin")).unwrap();
        if busybox != Path::new("/bin/busybox") {
            symlink(&busybox, self.at("bin/busybox")).unwrap();
        }
        for name in host::run(busybox.to_str().unwrap(), &["--list"]).lines().filter(|n| !matches!(*n, "busybox" | "ip" | "init") && !n.contains('/')) {
            symlink("busybox", self.at("bin").join(name)).unwrap();
        }
    }

    /// systemd without any of its units but one: the tests.
    fn systemd(&mut self) {
        self.program(Path::new("/lib/systemd/systemd"));
        // Since 255 it starts processes by a helper.
        let executor = Path::new("/lib/systemd/systemd-executor");
        if executor.exists() {
            self.program(executor);
        }
        self.program(&which("systemctl"));
        self.text("etc/machine-id", "0123456789abcdef0123456789abcdef\n", 0o444);
        self.text("etc/os-release", "ID=test\n", 0o644);
        self.text("etc/systemd/system/default.target", "[Unit]\nRequires=test.service\n", 0o644);
        let service = "[Unit]\nDefaultDependencies=no\n[Service]\nType=simple\nDelegate=yes\nExecStart=/sbin/test\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS0\n";
        self.text("etc/systemd/system/test.service", service, 0o644);
    }
}

/// Writes the initramfs: loads modules, mounts the disk, goes on with its `/sbin/init`.
pub fn write_initramfs(to: &Path, scratch: &Path) {
    let mut tree = Tree::new(scratch.join("initramfs"));
    tree.busybox();
    for dir in ["dev", "proc", "root"] {
        fs::create_dir_all(tree.at(dir)).unwrap();
    }
    let modules = Modules::find(&kernel_dir().join("lib/modules"));
    let mut script = "#!/bin/sh\nexport PATH=/bin\n".to_owned();
    for (name, path) in modules.in_order(MODULES) {
        fs::copy(path, tree.at(&format!("{name}.ko"))).unwrap();
        script += &format!("insmod /{name}.ko || echo 'no {name}'\n");
    }
    script += "mount -t devtmpfs dev /dev\nuntil [ -b /dev/vda ]; do sleep 0.1; done\nmount -t ext4 /dev/vda /root\nmount --move /dev /root/dev\nexec switch_root /root /sbin/init\n";
    tree.text("init", &script, 0o755);
    let mut archive = Vec::new();
    archive_tree(&tree.root, &tree.root, &mut archive);
    member(&mut archive, "TRAILER!!!", 0, &[]);
    fs::write(to, archive).unwrap();
}

/// Members of a `newc` archive, in the form that the kernel unpacks.
fn archive_tree(root: &Path, dir: &Path, out: &mut Vec<u8>) {
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let name = path.strip_prefix(root).unwrap().to_str().unwrap();
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        if kind.is_dir() {
            member(out, name, 0o040_755, &[]);
            archive_tree(root, &path, out);
        } else if kind.is_symlink() {
            member(out, name, 0o120_777, fs::read_link(&path).unwrap().to_str().unwrap().as_bytes());
        } else {
            member(out, name, 0o100_000 | (meta.permissions().mode() & 0o777), &fs::read(&path).unwrap());
        }
    }
}

fn member(out: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    // ino, mode, uid, gid, nlink, mtime, size, four device numbers, length of the name, checksum.
    let fields = [0, mode, 0, 0, 1, 0, u32::try_from(data.len()).unwrap(), 0, 0, 0, 0, u32::try_from(name.len() + 1).unwrap(), 0];
    out.extend(b"070701");
    fields.iter().for_each(|f| out.extend(format!("{f:08x}").bytes()));
    out.extend(name.bytes().chain([0]));
    pad(out);
    out.extend(data);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Modules of the kernel by name.
struct Modules(BTreeMap<String, PathBuf>);

impl Modules {
    fn find(dir: &Path) -> Self {
        fn walk(dir: &Path, found: &mut BTreeMap<String, PathBuf>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                match path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".ko")) {
                    // The kernel takes both for the same character.
                    Some(name) => drop(found.insert(name.replace('-', "_"), path)),
                    None => walk(&path, found),
                }
            }
        }
        let mut found = BTreeMap::new();
        walk(dir, &mut found);
        assert!(!found.is_empty(), "no modules in {}", dir.display());
        Self(found)
    }

    /// `wanted` and what they need, each after what it needs.
    fn in_order(&self, wanted: &[&str]) -> Vec<(String, &Path)> {
        let mut order = Vec::new();
        for name in wanted {
            self.add(name, &mut order);
        }
        order
    }

    fn add<'a>(&'a self, name: &str, order: &mut Vec<(String, &'a Path)>) {
        if order.iter().any(|(n, _)| n == name) {
            return;
        }
        let path = self.0.get(name).unwrap_or_else(|| panic!("the kernel has no module {name}"));
        for needed in depends(&fs::read(path).unwrap()) {
            self.add(&needed, order);
        }
        order.push((name.to_owned(), path));
    }
}

/// The `depends=a,b` entry in a module's section of strings.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|n| !n.is_empty()).map(|n| n.replace('-', "_")).collect()
}
