//! The conformance suite on each file system that this machine can make. Nothing is visible outside of the test's thread: loop
//! devices go with their mounts, mounts with their namespace.

use std::path::Path;
use std::process::Command;

use super::{NO_AUFS, conformance};

/// Runs in a thread with a mount namespace, in a directory on the machine's own file system.
pub fn private(work: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let run = || {
            use nix::mount::{MsFlags, mount};
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            work(dir.path());
        };
        scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Makes a file system and mounts it; false when tool or kernel cannot.
fn make(dir: &Path, mkfs: &[&str]) -> bool {
    let image = dir.join("image");
    std::fs::File::create(&image).unwrap().set_len(640 << 20).unwrap();
    let run = |command: &mut Command| {
        command.output().is_ok_and(|o| {
            let ok = o.status.success();
            if !ok {
                eprintln!("{command:?}: {}", String::from_utf8_lossy(&o.stderr));
            }
            ok
        })
    };
    let on = dir.join("on");
    std::fs::create_dir(&on).unwrap();
    run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image)) && run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&on))
}

fn unmount(on: &Path) {
    nix::mount::umount2(on, nix::mount::MntFlags::MNT_DETACH).unwrap();
}

fn on(mkfs: &[&str], refused: &[(&str, &str)], by_probe: bool) -> bool {
    let mut made = false;
    private(|dir| {
        made = make(dir, mkfs);
        if made {
            conformance(&dir.join("on"), refused, by_probe);
            unmount(&dir.join("on"));
        }
    });
    made
}

#[test]
fn on_ext4() {
    assert!(on(&["mkfs.ext4", "-q", "-F"], &[NO_AUFS], false));
}

#[test]
fn on_ext4_that_does_not_tell_file_types() {
    let refused = [NO_AUFS, ("overlay", "row overlay/d_type"), ("erofs", "row erofs/d_type")];
    assert!(on(&["mkfs.ext4", "-q", "-F", "-O", "^filetype"], &refused, false));
}

#[test]
fn on_xfs() {
    assert!(on(&["mkfs.xfs", "-q", "-f"], &[NO_AUFS], false));
}

#[test]
fn on_xfs_that_does_not_tell_file_types() {
    // Version 4 of the format, which kernels are losing: then mount(2) refuses it, and the ext4 above stands for the row.
    let refused = [NO_AUFS, ("overlay", "row overlay/d_type"), ("erofs", "row erofs/d_type")];
    if !on(&["mkfs.xfs", "-q", "-f", "-m", "crc=0", "-n", "ftype=0"], &refused, false) {
        eprintln!("this kernel does not mount xfs without ftype");
    }
}

#[test]
fn on_btrfs_as_mesos_has_it_and_by_probe() {
    let refused = [NO_AUFS, ("overlay", "row overlay/btrfs"), ("erofs", "row erofs/btrfs")];
    assert!(on(&["mkfs.btrfs", "-q", "-f"], &refused, false));
    assert!(on(&["mkfs.btrfs", "-q", "-f"], &[NO_AUFS], true));
}

#[test]
fn on_tmpfs() {
    private(|dir| {
        nix::mount::mount(Some("tmpfs"), dir, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
        conformance(dir, &[NO_AUFS], false);
        unmount(dir);
    });
}

#[test]
fn on_overlay() {
    private(|dir| {
        for name in ["lower", "upper", "work", "on"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        let options = ["lower", "upper", "work"].map(|n| format!("{n}dir={}", dir.join(n).display()));
        let on = dir.join("on");
        crate::init::overlay::mount_on(&on, &options, false).unwrap();
        let refused = [NO_AUFS, ("overlay", "row overlay/overlay"), ("erofs", "row erofs/overlay")];
        conformance(&on, &refused, false);
        unmount(&on);
    });
}
