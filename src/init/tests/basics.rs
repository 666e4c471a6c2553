//! Create, start, exec, terminals.

use serde_json::json;

use super::harness::{Bundle, process};

#[test]
fn a_container_runs_in_its_own_namespaces() {
    let b = Bundle::new("hostname; echo $$; echo $A; echo $HOME; ls /proc | grep -c '^[0-9]'; readlink /proc/self/ns/net; id");
    let lines = b.lines();
    let host = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(lines[..4], ["inside", "1", "b c", "/root"]);
    // The shell, ls and grep.
    assert_eq!(lines[4], "3");
    assert_ne!(lines[5], host.to_str().unwrap());
    assert_eq!(lines[6], "uid=0(root) gid=0 groups=0,10");
}

#[test]
fn an_exec_joins_the_container() {
    let b = Bundle::new("echo up; exec sleep 1000");
    let running = b.background();
    assert!(b.cgroup_exists());
    let mut p = process("hostname; readlink /proc/1/exe; readlink /proc/self/ns/mnt; readlink /proc/1/ns/mnt; cat /proc/self/cgroup | grep pids; exit 7");
    p["cwd"] = json!("/tmp");
    let outcome = b.exec(&running, &p).unwrap();
    let lines: Vec<_> = outcome.out.lines().collect();
    assert_eq!(outcome.code, 7, "{}", outcome.out);
    assert_eq!(lines[..2], ["inside", "/bin/busybox"]);
    assert_eq!(lines[2], lines[3]);
    assert!(lines[4].contains("/mesocri-test/init-"), "{}", outcome.out);
    p["args"] = json!(["/no/such"]);
    let e = b.exec(&running, &p).unwrap_err();
    assert_eq!((e.step.as_str(), e.object.as_str(), e.errno), ("exec", "/no/such", libc::ENOENT));
}

#[test]
fn a_missing_program_is_named() {
    let mut b = Bundle::new("");
    b.spec["process"]["args"] = json!(["nonesuch", "x"]);
    let e = b.run().unwrap_err();
    assert_eq!(e.to_string(), "exec nonesuch: No such file or directory (os error 2)");
    b.spec["process"]["args"] = json!(["/etc/passwd"]);
    assert_eq!(b.run().unwrap_err().errno, libc::EACCES);
}

#[test]
fn a_failed_create_leaves_no_cgroup() {
    let mut b = Bundle::new("");
    b.mount(json!({ "destination": "/x", "type": "bind", "source": "/no/such/source", "options": ["rbind"] }));
    let e = b.run().unwrap_err();
    assert_eq!((e.step.as_str(), e.object.as_str(), e.errno), ("mount", "/no/such/source", libc::ENOENT));
    assert!(!b.cgroup_exists());
}
