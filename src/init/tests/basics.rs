//! Create, start, exec, terminals.

use std::fs::File;
use std::io::Read;

use serde_json::json;

use super::harness::{Bundle, create, exec, open, process, reap};
use crate::init::{Stdio, spawn_pid_holder};
use crate::model::plan::{EXTRAS_FILE, Extras};

#[test]
fn a_container_runs_in_its_own_namespaces() {
    let b = Bundle::new("hostname; echo $$; echo $A; echo $HOME; set -- /proc/[0-9]*; echo $#; readlink /proc/self/ns/net; id");
    let lines = b.lines();
    let host = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(lines[..4], ["inside", "1", "b c", "/root"]);
    // The shell itself looks, so that it is alone.
    assert_eq!(lines[4], "1");
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
fn variables_that_are_no_text_reach_container_and_exec() {
    let b = Bundle::new("printf %s \"$BYTES\" | /bin/busybox od -An -tx1; exec sleep 1000");
    let extras = Extras { env_bytes: vec![b"BYTES=a\xff=b".to_vec(), b"A=\xfe".to_vec()], ..Extras::default() };
    std::fs::write(b.path(EXTRAS_FILE), serde_json::to_vec(&extras).unwrap()).unwrap();
    let running = b.background();
    let p = process("printf %s \"$BYTES\" | /bin/busybox od -An -tx1; echo $A");
    assert_eq!(b.exec(&running, &p).unwrap().out, " 61 ff 3d 62\nb c\n", "and text that the process itself has wins");
    assert_eq!(std::fs::read(format!("/proc/{}/environ", running.pid)).unwrap().split(|b| *b == 0).filter(|e| *e == b"BYTES=a\xff=b").count(), 1);
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

#[test]
fn a_terminal_is_made_in_the_container() {
    let mut b = Bundle::new("tty; stty size; test -c /dev/console && echo console; ls -l /dev/console");
    std::os::unix::fs::symlink("busybox", b.path("rootfs/bin/stty")).unwrap();
    b.spec["process"]["terminal"] = json!(true);
    let blocked = create(b.request(Stdio::Terminal { size: (91, 17) })).unwrap();
    let (pid, master) = (blocked.pid, File::from(blocked.console.unwrap()));
    open(blocked.gate).unwrap();
    let out = terminal(master);
    assert_eq!(reap(pid), 0);
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[..3], ["/dev/pts/0", "17 91", "console"], "{out}");
    assert!(lines[3].starts_with("crw--w----") && lines[3].contains("136,"), "{out}");
}

#[test]
fn an_exec_gets_a_terminal_too() {
    let b = Bundle::new("echo up; exec sleep 1000");
    let running = b.background();
    let done = exec(b.exec_request(&running, &process("tty; test -t 2 && echo yes"), Stdio::Terminal { size: (0, 0) })).unwrap();
    let out = terminal(File::from(done.console.unwrap()));
    assert_eq!((reap(done.pid), out.as_str()), (0, "/dev/pts/0\r\nyes\r\n"));
}

/// Reads a terminal's master until the other side is closed, which is EIO.
fn terminal(mut master: File) -> String {
    let (mut out, mut buffer) = (Vec::new(), [0; 1024]);
    while let Ok(n @ 1..) = master.read(&mut buffer) {
        out.extend_from_slice(&buffer[..n]);
    }
    String::from_utf8(out).unwrap()
}

#[test]
fn a_container_joins_namespaces_by_path() {
    let holder = Bundle::new("echo up; exec sleep 1000");
    let running = holder.background();
    let (pid, pidfd) = spawn_pid_holder().unwrap().stay().unwrap();
    let mut b = Bundle::new("hostname; echo $$; cat /proc/1/comm; readlink /proc/self/ns/ipc");
    let of = |kind: &str, pid: u32| json!(format!("/proc/{pid}/ns/{kind}"));
    b.spec["linux"]["namespaces"] = json!([
        { "type": "pid", "path": of("pid", pid) }, { "type": "ipc", "path": of("ipc", running.pid) },
        { "type": "uts", "path": of("uts", running.pid) }, { "type": "network", "path": of("net", running.pid) }, { "type": "mount" },
    ]);
    b.spec["hostname"] = json!("not-applied");
    let lines = b.lines();
    let ipc = std::fs::read_link(format!("/proc/{}/ns/ipc", running.pid)).unwrap();
    assert_eq!(lines, ["inside", "2", "mesocri-pod", ipc.to_str().unwrap()]);
    rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).unwrap();
    assert_eq!(reap(pid), 128 + 9);
}

#[test]
fn a_new_user_namespace_is_mapped() {
    let mut b = Bundle::new("id -u; cat /proc/self/uid_map; stat -c %t:%T /dev/null");
    b.spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    let map = json!([{ "containerID": 0, "hostID": 0, "size": 1000 }]);
    b.spec["linux"]["uidMappings"] = map.clone();
    b.spec["linux"]["gidMappings"] = map;
    let lines = b.lines();
    assert_eq!(lines[0], "0");
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["0", "0", "1000"]);
    assert_eq!(lines[2], "1:3");
}

#[test]
fn a_process_is_not_started_before_the_gate_opens_and_ends_without_it() {
    let b = Bundle::new("touch /ran");
    let (stdio, _out) = super::harness::streams();
    let blocked = create(b.request(stdio)).unwrap();
    let pid = blocked.pid;
    drop(blocked);
    assert_eq!(reap(pid), 1);
    assert!(!b.path("rootfs/ran").exists());
}

/// The budget is for release builds on an idle machine; here the number is only shown (`--no-capture`), and bounded against
/// gross mistakes.
#[test]
fn create_and_start_take_milliseconds() {
    let mut b = Bundle::new("");
    b.spec["process"]["args"] = json!(["/bin/true"]);
    super::storage::overlay(&mut b, 5);
    let mut times: Vec<_> = (0..50)
        .map(|_| {
            let (stdio, out) = super::harness::streams();
            let request = b.request(stdio);
            let begin = std::time::Instant::now();
            let blocked = create(request).unwrap();
            let (pid, created) = (blocked.pid, begin.elapsed());
            open(blocked.gate).unwrap();
            let started = begin.elapsed();
            assert_eq!(super::harness::finish(pid, out).code, 0);
            let manager = crate::cgroups::Manager::open(b.spec["linux"]["cgroupsPath"].as_str().unwrap()).unwrap();
            manager.delete().unwrap();
            (started, created)
        })
        .collect();
    times.sort();
    let (started, created) = times[times.len() / 2];
    println!("median of {}: create {created:?}, with start {started:?}", times.len());
    // Budgets are for the benchmark. Here only what no busy machine does.
    assert!(started.as_millis() < 2_000, "{started:?}");
}
