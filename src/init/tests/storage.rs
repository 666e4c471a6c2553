//! Mounts and layers.

use std::fs;

use serde_json::json;

use super::harness::Bundle;
use crate::model::image::RootMount;

/// Puts the bundle's files under an overlay of this many layers, each with a file `layer-<n>`, the topmost first.
pub(super) fn overlay(b: &mut Bundle, layers: usize) {
    let lower: Vec<_> = (0..layers)
        .map(|n| {
            let dir = b.path(&format!("layers/{n:04}-a-rather-long-name-for-one-directory/fs"));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(format!("layer-{n}")), "").unwrap();
            fs::write(dir.join("which"), format!("{n}\n")).unwrap();
            dir.to_str().unwrap().to_owned()
        })
        .chain([b.path("base").to_str().unwrap().to_owned()])
        .collect();
    fs::rename(b.path("rootfs"), b.path("base")).unwrap();
    for dir in ["upper", "work", "rootfs"] {
        fs::create_dir(b.path(dir)).unwrap();
    }
    let options =
        vec![format!("lowerdir={}", lower.join(":")), format!("upperdir={}", b.path("upper").display()), format!("workdir={}", b.path("work").display())];
    b.rootfs = vec![RootMount { fstype: "overlay".into(), source: "overlay".into(), options }];
}

#[test]
fn two_hundred_layers_are_one_root() {
    let mut b = Bundle::new("ls / | grep -c ^layer-; cat /which; touch /new; mount | grep ' / '");
    overlay(&mut b, 200);
    let lines = b.lines();
    assert_eq!(lines[..2], ["200", "0"]);
    assert!(lines[2].starts_with("overlay on / type overlay (rw,"), "{}", lines[2]);
    assert!(b.path("upper/new").exists() && !b.path("base/new").exists());
    assert!(fs::read_dir(b.path("rootfs")).unwrap().next().is_none(), "nothing was mounted on the host");
}

#[test]
fn binds_are_read_only_as_deep_as_asked() {
    // The source has a mount of its own below, made in a namespace that the container copies.
    let mut b = Bundle::new("for d in plain ro ro/sub rro rro/sub; do touch /$d/x 2>/dev/null && echo w $d || echo r $d; done");
    fs::create_dir_all(b.path("data/sub")).unwrap();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    nix::mount::mount(none, "/", none, nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE, none).unwrap();
    nix::mount::mount(Some("t"), &b.path("data/sub"), Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
    let source = b.path("data").to_str().unwrap().to_owned();
    for (name, option) in [("plain", "rw"), ("ro", "ro"), ("rro", "rro")] {
        b.mount(json!({ "destination": format!("/{name}"), "type": "bind", "source": source, "options": ["rbind", option, "rprivate"] }));
    }
    assert_eq!(b.lines(), ["w plain", "r ro", "w ro/sub", "r rro", "r rro/sub"]);
    nix::mount::umount(&b.path("data/sub")).unwrap();
}

#[test]
fn a_file_is_bound_on_a_file_that_is_made_for_it() {
    let mut b = Bundle::new("cat /var/lib/app/hosts; touch /etc/hosts2 2>/dev/null || echo ro; stat -c %a /var/lib/app");
    fs::write(b.path("hosts"), "127.0.0.1 me\n").unwrap();
    b.spec["root"]["readonly"] = json!(true);
    b.mount(json!({ "destination": "/var/lib/app/hosts", "type": "bind", "source": "hosts", "options": ["bind", "ro"] }));
    assert_eq!(b.lines(), ["127.0.0.1 me", "ro", "755"]);
}

#[test]
fn propagation_is_as_asked() {
    let script = "grep -E ' /(s|p|h) ' /proc/self/mountinfo | while read a b c d at f opt rest; do echo $at $opt; done";
    let mut b = Bundle::new(script);
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    nix::mount::mount(none, "/", none, nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_SHARED, none).unwrap();
    fs::create_dir(b.path("data")).unwrap();
    // A mount of its own: the one that holds the root filesystem must become private.
    nix::mount::mount(Some("t"), &b.path("data"), Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
    let source = b.path("data").to_str().unwrap().to_owned();
    for (name, option) in [("s", "rshared"), ("p", "rprivate"), ("h", "rslave")] {
        b.mount(json!({ "destination": format!("/{name}"), "type": "bind", "source": source, "options": ["rbind", option] }));
    }
    b.spec["linux"]["rootfsPropagation"] = json!("rshared");
    let before = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let lines = b.lines();
    assert!(lines[0].starts_with("/s shared:"), "{lines:?}");
    assert_eq!(lines[1], "/p -");
    assert!(lines[2].starts_with("/h master:"), "{lines:?}");
    assert_eq!(before, fs::read_to_string("/proc/thread-self/mountinfo").unwrap(), "nothing reaches the host");
    nix::mount::umount(&b.path("data")).unwrap();
}

#[test]
fn cgroup_mounts_show_the_containers_own_groups() {
    let b = Bundle::new("ls /sys/fs/cgroup; cat /sys/fs/cgroup/pids/cgroup.procs; mkdir /sys/fs/cgroup/pids/x 2>/dev/null || echo ro");
    let lines = b.lines();
    assert!(lines.contains(&"pids".to_owned()) && lines.contains(&"memory".to_owned()), "{lines:?}");
    assert_eq!(lines[lines.len() - 3..], ["1", "3", "ro"].map(str::to_owned), "{lines:?}");
}
