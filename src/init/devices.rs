//! `/dev` of the container: device nodes, the usual links, and the console.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::termios::Winsize;

use super::Stdio;
use super::fault::{Fault, On, Result};
use super::mounts;
use super::resolve::{self, Kind};
use super::stage2::Child;
use crate::sys;

/// Nodes every container has (OCI runtime-spec, default devices): name, major, minor.
const DEFAULT: &[(&str, u32, u32)] = &[("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// Links every container has: name, target.
const LINKS: &[(&str, &str)] = &[("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")];
/// `statfs` type of devpts.
const DEVPTS_MAGIC: u64 = 0x1cd1;

/// One node to make.
struct Node<'a> {
    path: &'a Path,
    kind: FileType,
    major: u32,
    minor: u32,
    mode: u32,
    owner: (u32, u32),
}

/// The step: default nodes, the spec's nodes, links. A `/dev` that is bound from the host is left alone.
pub(super) fn all(child: &mut Child<'_>) -> Result {
    if bound_from_host(child) {
        return Ok(());
    }
    let dev = resolve::create(child.root.as_fd(), Path::new("/dev"), Kind::Directory).on("/dev")?;
    let dev = rustix::fs::openat(&dev, c".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).on("/dev")?;
    for (name, major, minor) in DEFAULT {
        let node = Node { path: Path::new(name), kind: FileType::CharacterDevice, major: *major, minor: *minor, mode: 0o666, owner: (0, 0) };
        make(&dev, &node)?;
    }
    for device in child.bundle.linux.devices().iter().flatten() {
        let path = resolve::normal(device.path());
        let node = node(device, &path)?;
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if parent == Path::new("/dev") => make(&dev, &Node { path: Path::new(name), ..node })?,
            (Some(parent), Some(name)) => {
                let dir = resolve::create(child.root.as_fd(), parent, Kind::Directory).on(parent.display())?;
                make(&dir, &Node { path: Path::new(name), ..node })?;
            }
            _ => return Err(Fault::new(path.display(), libc::EINVAL)),
        }
    }
    for (name, target) in LINKS {
        match rustix::fs::symlinkat(*target, &dev, *name) {
            Err(Errno::EXIST) => {}
            other => other.on(format_args!("/dev/{name}"))?,
        }
    }
    // An image's own node would be a terminal of the host's devpts.
    match rustix::fs::unlinkat(&dev, c"ptmx", AtFlags::empty()) {
        Err(Errno::NOENT) => {}
        other => other.on("/dev/ptmx")?,
    }
    rustix::fs::symlinkat("pts/ptmx", &dev, "ptmx").on("/dev/ptmx")
}

fn bound_from_host(child: &Child<'_>) -> bool {
    child.bundle.spec.mounts().iter().flatten().any(|m| {
        resolve::normal(m.destination()) == Path::new("/dev")
            && (m.typ().as_deref() == Some("bind") || m.options().iter().flatten().any(|o| o == "bind" || o == "rbind"))
    })
}

fn node<'a>(device: &LinuxDevice, path: &'a Path) -> Result<Node<'a>> {
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => return Err(Fault::new(path.display(), libc::EINVAL)),
    };
    let number = |n: i64| u32::try_from(n).map_err(|_| Fault::new(path.display(), libc::EINVAL));
    Ok(Node {
        path,
        kind,
        major: number(device.major())?,
        minor: number(device.minor())?,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
    })
}

fn make(dir: &OwnedFd, node: &Node<'_>) -> Result {
    let named = || node.path.display();
    let number = if node.kind == FileType::Fifo { 0 } else { rustix::fs::makedev(node.major, node.minor) };
    let mode = Mode::from_raw_mode(node.mode);
    let mut made = rustix::fs::mknodat(dir, node.path, node.kind, mode, number);
    if made == Err(Errno::EXIST) {
        let stat = rustix::fs::statat(dir, node.path, AtFlags::SYMLINK_NOFOLLOW).on(named())?;
        if FileType::from_raw_mode(stat.st_mode) == node.kind && stat.st_rdev == number {
            return Ok(());
        }
        // Something else of that name from the image, maybe a link to where it would hurt.
        rustix::fs::unlinkat(dir, node.path, AtFlags::empty()).on(named())?;
        made = rustix::fs::mknodat(dir, node.path, node.kind, mode, number);
    }
    match made {
        // In a user namespace nodes cannot be made: the host's is bound instead.
        Err(Errno::PERM) => return bind(dir, node),
        other => other.on(named())?,
    }
    if node.owner != (0, 0) {
        let (uid, gid) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
        rustix::fs::chownat(dir, node.path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).on(named())?;
    }
    Ok(())
}

/// Binds the host's node of the same name, when it is the same device.
fn bind(dir: &OwnedFd, node: &Node<'_>) -> Result {
    let host = Path::new("/dev").join(node.path);
    let source = rustix::fs::openat(CWD, &host, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).on(host.display())?;
    if !resolve::is_device(&source, node.kind, node.major, node.minor).on(host.display())? {
        return Err(Fault::new(host.display(), libc::ENODEV));
    }
    let target = resolve::create(dir.as_fd(), node.path, Kind::File).on(host.display())?;
    let tree = sys::mount::clone_tree(source.as_fd(), false).on(host.display())?;
    sys::mount::attach(tree.as_fd(), target.as_fd()).on(host.display())
}

/// The step: when a terminal is asked for, makes one in the container's own devpts; for a new container it is `/dev/console` too.
pub(super) fn console(child: &mut Child<'_>) -> Result {
    let Stdio::Terminal { size } = child.stdio else {
        return Ok(());
    };
    let path = Path::new("/dev/pts/ptmx");
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = resolve::open(child.root.as_fd(), path, flags).on(path.display())?;
    let in_devpts = rustix::fs::fstatfs(&master).on(path.display())?.f_type as u64 == DEVPTS_MAGIC;
    if !in_devpts || !resolve::is_device(&master, FileType::CharacterDevice, 5, 2).on(path.display())? {
        return Err(Fault::new(path.display(), libc::ENODEV));
    }
    let slave = sys::pty::open_peer(master.as_fd()).on(path.display())?;
    if size != (0, 0) {
        let size = Winsize { ws_col: size.0, ws_row: size.1, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size).on("terminal size")?;
    }
    if child.is_container {
        let target = resolve::create(child.root.as_fd(), Path::new("/dev/console"), Kind::File).on("/dev/console")?;
        let tree = sys::mount::clone_tree(slave.as_fd(), false).on("/dev/console")?;
        sys::mount::attach(tree.as_fd(), target.as_fd()).on("/dev/console")?;
    }
    child.console = Some((master, slave));
    Ok(())
}

/// The step: descriptors 0 to 2, owned by the user so that it can open `/dev/stdout` again.
pub(super) fn streams(child: &mut Child<'_>) -> Result {
    let user = child.process.user();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    let mut set = [None, None, None];
    match (&mut child.console, &mut child.stdio) {
        (Some((_, slave)), _) => {
            rustix::process::ioctl_tiocsctty(&*slave).on("terminal")?;
            for fd in &mut set {
                *fd = Some(rustix::io::fcntl_dupfd_cloexec(&*slave, 3).on("terminal")?);
            }
        }
        (None, Stdio::Streams { stdin, stdout, stderr }) => set = [stdin.take(), stdout.take(), stderr.take()],
        (None, Stdio::Terminal { .. }) => {}
    }
    for fd in set.iter().flatten() {
        let stat = rustix::fs::fstat(fd).on("standard stream")?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if stat.st_uid != user.uid() && (child.console.is_some() || matches!(kind, FileType::Fifo | FileType::Socket)) {
            match rustix::fs::fchown(fd, Some(uid), Some(gid)) {
                // Some sockets have no owner, and in a user namespace the stream may belong to nobody we know.
                Err(Errno::INVAL | Errno::PERM | Errno::ROFS) => {}
                other => other.on("standard stream")?,
            }
        }
    }
    let mut null = None;
    if set.iter().any(Option::is_none) {
        // The container's own node: a process may change the mode of what it has open.
        let opened = resolve::open(child.root.as_fd(), Path::new("/dev/null"), OFlags::RDWR).on("/dev/null")?;
        if !resolve::is_device(&opened, FileType::CharacterDevice, 1, 3).on("/dev/null")? {
            return Err(Fault::new("/dev/null", libc::ENODEV));
        }
        null = Some(opened);
    }
    let [stdin, stdout, stderr] = set.each_ref().map(|fd| fd.as_ref().or(null.as_ref()));
    if let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) {
        rustix::stdio::dup2_stdin(stdin).on("standard input")?;
        rustix::stdio::dup2_stdout(stdout).on("standard output")?;
        rustix::stdio::dup2_stderr(stderr).on("standard error")?;
    }
    Ok(())
}

/// The step, before the root changes: masked paths. A file is covered by the null device, a directory by an empty read-only
/// file system; what is not there needs nothing.
pub(super) fn mask(child: &mut Child<'_>) -> Result {
    let mut null = None;
    let mut empty: Option<OwnedFd> = None;
    for path in child.bundle.linux.masked_paths().iter().flatten() {
        let path = Path::new(path);
        let Some(target) = mounts::existing(child.root.as_fd(), path)? else { continue };
        let stat = rustix::fs::fstat(&target).on(path.display())?;
        let tree = if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            match &empty {
                // One file system serves all of them.
                Some(first) => sys::mount::clone_tree(first.as_fd(), false).on(path.display())?,
                None => mounts::file_system("tmpfs", Path::new("tmpfs"), &["size=0k".to_owned()], libc::MOUNT_ATTR_RDONLY)?,
            }
        } else {
            let null = match &null {
                Some(null) => null,
                None => null.insert(resolve::host_null().on("/dev/null")?),
            };
            sys::mount::clone_tree(null.as_fd(), false).on(path.display())?
        };
        sys::mount::attach(tree.as_fd(), target.as_fd()).on(path.display())?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            empty = empty.or(Some(tree));
        }
    }
    Ok(())
}

/// The step: read-only paths, with all that is mounted below them.
pub(super) fn read_only_paths(child: &mut Child<'_>) -> Result {
    for path in child.bundle.linux.readonly_paths().iter().flatten() {
        let path = Path::new(path);
        let Some(target) = mounts::existing(child.root.as_fd(), path)? else { continue };
        let tree = sys::mount::clone_tree(target.as_fd(), true).on(path.display())?;
        let attributes = sys::mount::Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() };
        let set = sys::mount::set_attributes(tree.as_fd(), attributes, true);
        sys::mount::attach(tree.as_fd(), target.as_fd()).on(path.display())?;
        match set {
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => mounts::make_read_only(&tree).on(path.display())?,
            other => other.on(path.display())?,
        }
    }
    Ok(())
}
