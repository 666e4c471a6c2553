//! What a container cannot reach.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::json;

use super::harness::{Bundle, process};

#[test]
fn capabilities_user_and_limits_are_the_specs() {
    let mut b = Bundle::new("grep -E '^(Cap|NoNew|Groups|Uid)' /proc/self/status; ulimit -n; ulimit -Hn; umask");
    b.spec["process"]["user"] = json!({ "uid": 1000, "gid": 100, "additionalGids": [7], "umask": 23 });
    let caps = json!(["CAP_CHOWN", "CAP_KILL"]);
    b.spec["process"]["capabilities"] = json!({ "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_RESOURCE"], "effective": caps, "permitted": caps, "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"] });
    let out = b.lines().join("\n").replace('\t', " ");
    for line in [
        "Uid: 1000 1000 1000 1000",
        "Groups: 7 ",
        "CapInh: 0000000000000020",
        "CapPrm: 0000000000000020",
        "CapEff: 0000000000000020",
        "CapAmb: 0000000000000020",
        "NoNewPrivs: 1",
        "\n512\n1024\n0027",
    ] {
        assert!(out.contains(line), "{line} in {out}");
    }
    // What this process lacks is left out, not an error.
    let mine = crate::sys::process::bounding_set();
    assert!(out.contains(&format!("CapBnd: {:016x}", (1 | 1 << 5 | 1 << 24) & mine)), "{out}");
}

#[test]
fn root_has_no_more_than_the_bounding_set() {
    let b = Bundle::new("grep -E '^Cap(Eff|Prm|Inh|Amb)' /proc/self/status");
    let mine = crate::sys::process::bounding_set();
    let set = (1 | 1 << 10 | 1 << 5 | 1 << 24) & mine;
    let none = format!("{:016x}", 0);
    let lines: Vec<_> = b.lines().iter().map(|l| l.rsplit('\t').next().unwrap().to_owned()).collect();
    assert_eq!(lines, [none.clone(), format!("{set:016x}"), format!("{set:016x}"), none]);
}

#[test]
fn no_descriptor_leaks_in() {
    // One that is not closed by execve stands for whatever the shim may have open.
    let leak = fs::File::open("/etc").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let b = Bundle::new("ls /proc/1/fd; echo; ls /proc/self/fd | wc -l; echo up; exec sleep 1000");
    // The fourth and last is the directory that ls reads; the shell's own fd 10 is not used with -c.
    let mut plain = Bundle::new("");
    plain.spec["process"]["args"] = json!(["/bin/ls", "/proc/self/fd"]);
    assert_eq!(plain.lines(), ["0", "1", "2", "3"]);
    let running = b.background();
    let mut p = process("");
    p["args"] = json!(["/bin/ls", "/proc/self/fd"]);
    assert_eq!(b.exec(&running, &p).unwrap().out, "0\n1\n2\n3\n");
}

#[test]
fn a_working_directory_through_a_descriptor_is_refused() {
    for fd in [3, 4, 5, 6, 7, 8, 9, 10] {
        let mut b = Bundle::new("ls /proc/self/cwd/");
        b.spec["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}"));
        let e = b.run().unwrap_err();
        assert!(e.step.ends_with("working directory"), "{e}");
    }
}

#[test]
fn a_missing_working_directory_is_made_inside() {
    let mut b = Bundle::new("readlink /proc/self/cwd");
    let outside = b.path("outside");
    fs::create_dir(&outside).unwrap();
    // The link is absolute: inside the root it means the root's own, which is missing too.
    symlink(&outside, b.path("rootfs/link")).unwrap();
    b.spec["process"]["cwd"] = json!("/link/a/b");
    let inside = format!("{}/a/b", outside.display());
    assert_eq!(b.lines(), [inside]);
    assert!(fs::read_dir(&outside).unwrap().next().is_none());
}

#[test]
fn mount_destinations_stay_inside() {
    let mut b = Bundle::new("ls /deep/mnt/; ls /up/escape/");
    fs::create_dir_all(b.path("data")).unwrap();
    fs::write(b.path("data/file"), "").unwrap();
    let canary = b.path("canary");
    fs::create_dir(&canary).unwrap();
    symlink(&canary, b.path("rootfs/deep")).unwrap();
    symlink("../../../../../../..", b.path("rootfs/up")).unwrap();
    let source = b.path("data").to_str().unwrap().to_owned();
    for dest in ["/deep/mnt", "/up/escape"] {
        b.mount(json!({ "destination": dest, "type": "bind", "source": source, "options": ["bind"] }));
    }
    assert_eq!(b.lines(), ["file", "file"]);
    assert!(fs::read_dir(&canary).unwrap().next().is_none());
    assert!(b.path("rootfs").join(canary.strip_prefix("/").unwrap()).join("mnt").is_dir());
    assert!(!std::path::Path::new("/escape").exists());
}

#[test]
fn nothing_is_mounted_into_procfs() {
    for dest in ["/proc/self/attr", "/proc/sys", "/fake/sys", "/"] {
        let mut b = Bundle::new("true");
        symlink("/proc", b.path("rootfs/fake")).unwrap();
        b.mount(json!({ "destination": dest, "type": "tmpfs", "source": "tmpfs" }));
        let e = b.run().unwrap_err();
        assert_eq!((e.step.as_str(), e.errno), ("mount", libc::EPERM), "{dest}: {e}");
    }
    let mut b = Bundle::new("cat /proc/uptime");
    fs::write(b.path("uptime"), "1 2\n").unwrap();
    b.mount(json!({ "destination": "/proc/uptime", "type": "bind", "source": "uptime", "options": ["bind"] }));
    assert_eq!(b.lines(), ["1 2"]);
}

#[test]
fn masked_and_read_only_paths_hold() {
    let script = "wc -c < /proc/version; stat -c %t:%T /proc/version; ls /secret | wc -l; ls /empty | wc -l; \
                  echo 1 2>/dev/null > /proc/sys/kernel/domainname || echo ro";
    let mut b = Bundle::new(script);
    for dir in ["secret", "empty"] {
        fs::create_dir(b.path("rootfs").join(dir)).unwrap();
        fs::write(b.path("rootfs").join(dir).join("f"), "x").unwrap();
    }
    symlink("/secret", b.path("rootfs/alias")).unwrap();
    b.spec["linux"]["maskedPaths"].as_array_mut().unwrap().extend([json!("/proc/version"), json!("/alias"), json!("/empty")]);
    assert_eq!(b.lines(), ["0", "1:3", "0", "0", "ro"]);
}

#[test]
fn devices_replace_what_the_image_has_of_their_names() {
    let mut b = Bundle::new("stat -c %t:%T /dev/null; stat -c '%a %t:%T %u' /dev/net/mine; readlink /dev/ptmx");
    b.spec["mounts"].as_array_mut().unwrap().retain(|m| !m["destination"].as_str().unwrap().starts_with("/dev"));
    let canary = b.path("canary");
    fs::write(&canary, "").unwrap();
    symlink(&canary, b.path("rootfs/dev/null")).unwrap();
    symlink(&canary, b.path("rootfs/dev/ptmx")).unwrap();
    b.spec["linux"]["devices"] = json!([{ "path": "/dev/net/mine", "type": "c", "major": 10, "minor": 200, "fileMode": 0o640, "uid": 5, "gid": 6 }]);
    assert_eq!(b.lines(), ["1:3", "640 a:c8 5", "pts/ptmx"]);
    assert!(fs::metadata(&canary).unwrap().is_file());
}

#[test]
fn sysctls_are_written_only_in_the_containers_namespaces() {
    let mut b = Bundle::new("cat /proc/sys/net/ipv4/ip_unprivileged_port_start");
    b.spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_unprivileged_port_start": "7" });
    assert_eq!(b.lines(), ["7"]);
    // The value that the host has: should the guard fail, the host is not harmed.
    let value = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    for name in ["kernel.core_pattern", "net/../kernel/core_pattern", "net//kernel/core_pattern", "net.\0", "kernel.shm_rmid_forced+kernel.core_pattern", "net"]
    {
        b.spec["linux"]["sysctl"] = json!({ name: value.trim_end() });
        let e = b.run().unwrap_err();
        assert_eq!(e.step, "set sysctl", "{e}");
    }
    b.spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "network");
    b.spec["mounts"].as_array_mut().unwrap().retain(|m| m["type"] != "sysfs");
    b.spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "0" });
    assert_eq!(b.run().unwrap_err().errno, libc::EPERM);
}

#[test]
fn a_compiled_filter_is_loaded_and_a_missing_one_is_an_error() {
    let mut b = Bundle::new("mkdir /tmp/x 2>/dev/null || echo refused; grep Seccomp: /proc/self/status");
    b.spec["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ERRNO" });
    let e = b.run().unwrap_err();
    assert_eq!((e.step.as_str(), e.errno), ("read system call filter", libc::EOPNOTSUPP));
    // mkdir (83 on x86-64) is refused with EPERM, all else allowed.
    let program: [(u16, u8, u8, u32); 4] = [(0x20, 0, 0, 0), (0x15, 0, 1, 83), (0x06, 0, 0, 0x0005_0001), (0x06, 0, 0, 0x7fff_0000)];
    let bytes: Vec<u8> = program.iter().flat_map(|(c, t, f, k)| [&c.to_ne_bytes()[..], &[*t, *f], &k.to_ne_bytes()].concat()).collect();
    fs::write(b.path("filter.bpf"), bytes).unwrap();
    fs::write(b.path("mesocri.json"), json!({ "seccomp_bpf": b.path("filter.bpf") }).to_string()).unwrap();
    for no_new_privileges in [true, false] {
        b.spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        assert_eq!(b.lines(), ["refused", "Seccomp:\t2"]);
    }
}

#[test]
fn a_hostile_passwd_gives_no_home() {
    for kind in ["fifo", "link"] {
        let b = Bundle::new("echo $HOME");
        let passwd = b.path("rootfs/etc/passwd");
        fs::remove_file(&passwd).unwrap();
        if kind == "fifo" {
            rustix::fs::mknodat(rustix::fs::CWD, &passwd, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        } else {
            symlink("/proc/self/environ", &passwd).unwrap();
        }
        assert_eq!(b.lines(), ["/"]);
    }
}
