//! Debian's containerd runs containers on our shim: the proof that we speak containerd's protocol and not only our own.
//! Needs root and the package `containerd`.

#![allow(clippy::unwrap_used, missing_docs)] // a test that cannot set itself up has failed

use std::io::{BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use sha2::Digest;

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-mesocri-v1");
const IMAGE: &str = "mesocri.test/busybox:1";

/// A containerd of the test's own.
struct Containerd {
    dir: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        let config = format!(
            "version = 2\nroot = '{}'\nstate = '{}'\ndisabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.internal.v1.opt']\n\
             [grpc]\naddress = '{}'\n[ttrpc]\naddress = '{}'\n",
            path("root"),
            path("state"),
            path("c.sock"),
            path("c.sock.ttrpc")
        );
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new("containerd").arg("-c").arg(dir.path().join("config.toml")).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let containerd = Self { dir, process };
        containerd.until("containerd answers", |c| c.ctr(&["version"]).output().unwrap().status.success());
        let archive = containerd.archive();
        containerd.ok(&["images", "import", "--snapshotter", "native", &archive.to_string_lossy()]);
        containerd
    }

    fn ctr(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.dir.path().join("c.sock")).args(words).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Command {
        let fifos = self.dir.path().join("fifos");
        let mut command = self.ctr(&["run", "--runtime", SHIM, "--snapshotter", "native", "--fifo-dir"]);
        command.arg(fifos).args(words);
        command
    }

    fn ok(&self, words: &[&str]) -> String {
        let output = self.ctr(words).output().unwrap();
        assert!(output.status.success(), "ctr {words:?}: {}\n{}", text(&output), self.log());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done(self) {
            assert!(Instant::now() < deadline, "{what}: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// An image of busybox and its libraries, as `docker save` writes them.
    fn archive(&self) -> PathBuf {
        let mut layer = tar::Builder::new(Vec::new());
        let add = |layer: &mut tar::Builder<Vec<u8>>, from: &str, to: &str| {
            layer.append_path_with_name(std::fs::canonicalize(from).unwrap(), to).unwrap();
        };
        add(&mut layer, "/bin/busybox", "bin/busybox");
        let listed = Command::new("ldd").arg("/bin/busybox").output().unwrap();
        for library in String::from_utf8_lossy(&listed.stdout).split_ascii_whitespace().filter(|word| word.starts_with('/')) {
            add(&mut layer, library, &library[1..]);
        }
        for name in ["sh", "sleep", "cat", "echo", "tty", "id"] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            layer.append_link(&mut header, format!("bin/{name}"), "busybox").unwrap();
        }
        let layer = layer.into_inner().unwrap();
        let hex: String = sha2::Sha256::digest(&layer).iter().map(|b| format!("{b:02x}")).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": { "Env": ["PATH=/bin"], "Cmd": ["sh"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{hex}")] },
        });
        let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
        let path = self.dir.path().join("image.tar");
        let mut archive = tar::Builder::new(std::fs::File::create(&path).unwrap());
        for (name, bytes) in [("layer.tar", layer), ("config.json", config.to_string().into_bytes()), ("manifest.json", manifest.to_string().into_bytes())] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, bytes.as_slice()).unwrap();
        }
        archive.finish().unwrap();
        path
    }

    /// Processes whose command line has `word`.
    fn processes(word: &str) -> Vec<u32> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.split('\0').any(|arg| arg == word))).collect()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn text(output: &Output) -> String {
    format!("{}: {}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A name no other test of this machine has.
fn name(part: &str) -> String {
    format!("mesocri-test-{part}-{}", std::process::id())
}

#[test]
fn output_exit_code_and_input_pass() {
    let containerd = Containerd::start();
    let output = containerd.run(&["--rm", IMAGE, &name("run"), "sh", "-c", "echo out; echo err >&2; exit 5"]).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}\n{}", text(&output), containerd.log());
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (b"out\n".as_slice(), b"err\n".as_slice()), "{}", text(&output));

    // The end of the input arrives too, else cat would stay. It is sent after the first line came back: ctr forgets to pass on
    // an end that it sees before the task exists (with runc's shim as well).
    let mut cat = containerd.run(&["--rm", IMAGE, &name("cat"), "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut input, mut back) = (cat.stdin.take().unwrap(), std::io::BufReader::new(cat.stdout.take().unwrap()));
    input.write_all(b"through\n").unwrap();
    let mut line = String::new();
    back.read_line(&mut line).unwrap();
    assert_eq!(line, "through\n");
    drop(input);
    let mut rest = String::new();
    back.read_to_string(&mut rest).unwrap();
    assert!(cat.wait().unwrap().success());
    assert_eq!(rest, "");
    let left = std::fs::read_dir(containerd.dir.path().join("state/io.containerd.runtime.v2.task/default")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "bundles");
    assert!(Containerd::processes(&name("run")).is_empty(), "shims");
}

#[test]
fn exec_list_metrics_pause_and_kill() {
    let containerd = Containerd::start();
    let id = name("life");
    let output = containerd.run(&["-d", IMAGE, &id, "sleep", "1000"]).output().unwrap();
    assert!(output.status.success(), "{}\n{}", text(&output), containerd.log());
    let mut exec = containerd.ctr(&["tasks", "exec", "--exec-id", "e", "--fifo-dir"]);
    let output = exec.arg(containerd.dir.path().join("fifos")).args([&id, "sh", "-c", "echo in; exit 4"]).output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(4), b"in\n".as_slice()), "{}", text(&output));
    assert!(containerd.ok(&["tasks", "ls"]).contains("RUNNING"));
    assert!(containerd.ok(&["tasks", "metrics", &id]).contains("memory.usage_in_bytes"));
    assert_eq!(containerd.ok(&["tasks", "ps", &id]).lines().count(), 2, "a heading and one process");
    containerd.ok(&["tasks", "pause", &id]);
    assert!(containerd.ok(&["tasks", "ls"]).contains("PAUSED"));
    containerd.ok(&["tasks", "resume", &id]);
    containerd.ok(&["tasks", "kill", "-s", "SIGKILL", &id]);
    containerd.until("the task ends", |c| c.ok(&["tasks", "ls"]).contains("STOPPED"));
    containerd.ok(&["tasks", "rm", &id]);
    containerd.ok(&["containers", "rm", &id]);
    containerd.until("the shim ends", |_| Containerd::processes(&id).is_empty());
}

#[test]
fn what_a_killed_shim_leaves_is_cleaned_up() {
    let containerd = Containerd::start();
    let id = name("lost");
    let seconds = format!("1{}", std::process::id());
    let output = containerd.run(&["-d", IMAGE, &id, "sleep", &seconds]).output().unwrap();
    assert!(output.status.success(), "{}\n{}", text(&output), containerd.log());
    assert_eq!(Containerd::processes(&seconds).len(), 1);
    let shims = Containerd::processes(&id);
    assert_eq!(shims.len(), 1, "one shim");
    let bundle = containerd.dir.path().join("state/io.containerd.runtime.v2.task/default").join(&id);
    let address = std::fs::read_to_string(bundle.join("address")).unwrap();
    let socket = Path::new(address.strip_prefix("unix://").unwrap());
    assert!(socket.exists());
    let pid = rustix::process::Pid::from_raw(i32::try_from(shims[0]).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    // containerd runs the shim's delete verb then.
    containerd.until("the container dies with it", |_| Containerd::processes(&seconds).is_empty());
    let cgroup = Path::new("/sys/fs/cgroup/pids/default").join(&id);
    containerd.until("its cgroup goes", |_| !cgroup.exists());
    containerd.until("its socket goes", |_| !socket.exists());
    containerd.ok(&["containers", "rm", &id]);
}
