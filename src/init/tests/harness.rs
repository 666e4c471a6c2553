//! A bundle on disk, a specification as engines write it, and running it with the output captured.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, WaitOptions, waitpid};
use serde_json::{Value, json};

use crate::init::{self, Blocked, CgroupRef, CreateRequest, ExecRequest, Executed, Gate, Line, Stdio, StepError};
use crate::model::image::RootMount;

/// A bundle with a root filesystem of its own; gone, with its cgroup, when dropped.
pub(super) struct Bundle {
    pub(super) dir: tempfile::TempDir,
    pub(super) spec: Value,
    pub(super) rootfs: Vec<RootMount>,
    cgroup: String,
}

/// What a container wrote, and how it ended (`exit` or 128 + signal).
#[derive(Debug, PartialEq)]
pub(super) struct Outcome {
    pub(super) out: String,
    pub(super) code: i32,
}

static SERIAL: AtomicU32 = AtomicU32::new(0);

impl Bundle {
    /// A container as containerd's `ctr run` describes it, that runs `script` in a shell.
    pub(super) fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        busybox(&dir.path().join("rootfs"));
        let cgroup = format!("/mesocri-test/init-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let spec = spec(&["/bin/sh", "-c", script], &cgroup);
        Self { dir, spec, rootfs: Vec::new(), cgroup }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn mount(&mut self, mount: Value) {
        self.spec["mounts"].as_array_mut().unwrap().push(mount);
    }

    pub(super) fn write(&self) {
        fs::write(self.path("config.json"), self.spec.to_string()).unwrap();
    }

    pub(super) fn request(&self, stdio: Stdio) -> CreateRequest {
        self.write();
        CreateRequest { bundle: self.dir.path().to_owned(), rootfs: self.rootfs.clone(), stdio }
    }

    /// Creates, starts and waits for the end.
    pub(super) fn run(&self) -> Result<Outcome, StepError> {
        let (stdio, out) = streams();
        let blocked = create(self.request(stdio))?;
        let pid = blocked.pid;
        let started = open(blocked.gate);
        let outcome = finish(pid, out);
        started.map(|()| outcome)
    }

    /// Runs and expects success; the output's lines.
    pub(super) fn lines(&self) -> Vec<String> {
        let outcome = self.run().unwrap();
        assert_eq!(outcome.code, 0, "{}", outcome.out);
        outcome.out.lines().map(str::to_owned).collect()
    }

    /// Starts a container that goes on until killed; it has printed a line.
    pub(super) fn background(&self) -> Running {
        let (stdio, mut out) = streams();
        let Blocked { pid, gate, cgroup, .. } = create(self.request(stdio)).unwrap();
        let running = Running { pid, cgroup };
        open(gate).unwrap();
        let mut byte = [0];
        while out.read(&mut byte).unwrap() == 1 && byte != [b'\n'] {}
        running
    }

    pub(super) fn exec(&self, running: &Running, process: &Value) -> Result<Outcome, StepError> {
        let (stdio, out) = streams();
        let done = exec(self.exec_request(running, process, stdio))?;
        Ok(finish(done.pid, out))
    }

    pub(super) fn exec_request(&self, running: &Running, process: &Value, stdio: Stdio) -> ExecRequest {
        ExecRequest { bundle: self.dir.path().to_owned(), process: process.to_string().into_bytes(), pid: running.pid, stdio, cgroup: running.cgroup.clone() }
    }

    pub(super) fn cgroup_exists(&self) -> bool {
        Path::new("/sys/fs/cgroup/pids").join(self.cgroup.trim_start_matches('/')).exists()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if let Ok(manager) = crate::cgroups::Manager::open(&self.cgroup) {
            let _ = manager.kill();
            let _ = manager.delete();
        }
    }
}

/// A running container's first process, killed and reaped when dropped.
pub(super) struct Running {
    pub(super) pid: u32,
    pub(super) cgroup: Option<CgroupRef>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.pid as i32).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        let _ = waitpid(Some(pid), WaitOptions::empty());
    }
}

/// Makes a container and waits until it is there.
pub(super) fn create(request: CreateRequest) -> Result<Blocked, StepError> {
    init::create(request).and_then(wait)
}

/// Runs an exec and waits until it runs.
pub(super) fn exec(request: ExecRequest) -> Result<Executed, StepError> {
    init::exec(request).and_then(wait)
}

/// Lets a container's first process go and waits until it runs.
pub(super) fn open(gate: Gate) -> Result<(), StepError> {
    gate.open().and_then(wait)
}

fn wait<L: Line>(mut line: L) -> Result<L::Born, StepError> {
    loop {
        poll(&mut [PollFd::new(&line, PollFlags::IN)], None).unwrap();
        if let Some(outcome) = line.hear() {
            return outcome;
        }
    }
}

/// Standard streams with output and errors in one pipe.
pub(super) fn streams() -> (Stdio, File) {
    let (read, write) = std::io::pipe().unwrap();
    let again = write.try_clone().unwrap();
    (Stdio::Streams { stdin: None, stdout: Some(write.into()), stderr: Some(again.into()) }, File::from(OwnedFd::from(read)))
}

pub(super) fn finish(pid: u32, mut out: File) -> Outcome {
    let mut text = Vec::new();
    out.read_to_end(&mut text).unwrap();
    Outcome { out: String::from_utf8_lossy(&text).into_owned(), code: reap(pid) }
}

pub(super) fn reap(pid: u32) -> i32 {
    let (_, status) = waitpid(Pid::from_raw(pid as i32), WaitOptions::empty()).unwrap().unwrap();
    status.exit_status().unwrap_or_else(|| 128 + status.terminating_signal().unwrap())
}

/// An exec's `process` with a shell script.
pub(super) fn process(script: &str) -> Value {
    spec(&["/bin/sh", "-c", script], "/unused")["process"].clone()
}

/// A root filesystem with busybox, its libraries and links for all applets.
pub(super) fn busybox(root: &Path) {
    for dir in ["bin", "lib64", "lib/x86_64-linux-gnu", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let copies = [
        ("/usr/bin/busybox", "bin/busybox"),
        ("/lib64/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2"),
        ("/lib/x86_64-linux-gnu/libc.so.6", "lib/x86_64-linux-gnu/libc.so.6"),
        ("/lib/x86_64-linux-gnu/libresolv.so.2", "lib/x86_64-linux-gnu/libresolv.so.2"),
    ];
    for (from, to) in copies {
        fs::copy(from, root.join(to)).unwrap();
    }
    for applet in ["sh", "cat", "ls", "id", "grep", "mount", "stat", "hostname", "sleep", "true", "env", "readlink", "touch", "wc", "tty", "mkdir"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n").unwrap();
}

fn spec(args: &[&str], cgroup: &str) -> Value {
    let caps = json!(["CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_SYS_RESOURCE"]);
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "user": { "uid": 0, "gid": 0, "additionalGids": [0, 10] },
            "args": args,
            "env": ["PATH=/usr/local/sbin:/bin", "A=b c"],
            "cwd": "/",
            "capabilities": { "bounding": caps, "effective": caps, "permitted": caps },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512 }],
            "noNewPrivileges": true,
            "oomScoreAdj": -998
        },
        "root": { "path": "rootfs" },
        "hostname": "inside",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev"] },
            { "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }
        ],
        "linux": {
            "resources": { "devices": [{ "allow": true, "access": "rwm" }] },
            "cgroupsPath": cgroup,
            "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" }],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/missing/path"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}
