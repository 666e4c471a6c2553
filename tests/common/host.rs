//! The host around a bench: private namespaces, and a picture of what could be left behind in them.

use std::collections::BTreeSet;
use std::net::SocketAddrV4;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// How long an event that must come may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long what nobody holds any more may still be seen.
const LEAVE_WITHIN: Duration = Duration::from_secs(10);

/// Puts the calling thread and its future children into mount and network namespaces of their own: `/` shared within them,
/// `/run` empty, loopback up, one uplink that ends in itself so that a default route exists.
pub fn enter_private_namespaces() {
    assert!(nix::unistd::geteuid().is_root(), "end-to-end tests need root");
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).unwrap();
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).unwrap();
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
    // sysfs shows the network namespace it was mounted in; without a new one /sys/class/net would be the host's.
    run("ip", &["link", "set", "lo", "up"]);
    make_uplink();
}

/// One uplink that ends in itself so that a default route exists.
pub fn make_uplink() {
    run("ip", &["link", "add", "uplink", "type", "veth", "peer", "name", "uplinkp"]);
    run("ip", &["addr", "add", "10.99.0.1/24", "dev", "uplink"]);
    run("ip", &["link", "set", "uplink", "up"]);
    run("ip", &["link", "set", "uplinkp", "up"]);
    run("ip", &["route", "add", "default", "via", "10.99.0.2", "dev", "uplink"]);
}

/// crun refuses a hybrid host whose v2 hierarchy has a controller. In the calling mount namespace it, and whoever else looks, sees a
/// v1 host: a tree made anew with the v1 hierarchies alone. crun makes plain directories for controllers that it misses; they go with
/// the tree. Elsewhere nothing changes.
#[allow(dead_code)] // not every test binary has a use for it
pub fn v1_alone() {
    let (none, tree): (Option<&str>, _) = (None, Path::new("/sys/fs/cgroup"));
    if !tree.join("unified").is_dir() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    // What is mounted on a shared mount cannot be moved away from it.
    mount(Some("tmpfs"), scratch.path(), Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, scratch.path(), none, MsFlags::MS_PRIVATE, none).unwrap();
    let made = scratch.path().join("tree");
    std::fs::create_dir(&made).unwrap();
    mount(Some("tmpfs"), &made, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    for entry in std::fs::read_dir(tree).unwrap().flatten().filter(|e| e.file_name() != "unified") {
        let target = made.join(entry.file_name());
        match std::fs::read_link(entry.path()) {
            Ok(link) => std::os::unix::fs::symlink(link, target).unwrap(),
            Err(_) => {
                std::fs::create_dir(&target).unwrap();
                mount(Some(&entry.path()), &target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).unwrap();
            }
        }
    }
    mount(Some(&made), tree, none, MsFlags::MS_MOVE, none).unwrap();
    nix::mount::umount(scratch.path()).unwrap();
}

/// Runs a program to its end; it must succeed. Returns its standard output.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("run {program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Whether a process lives whose last argument is `word`.
#[allow(dead_code)] // each test file uses its part
pub fn has_process(word: &str) -> bool {
    let is_last = |line: &[u8]| line.strip_suffix(b"\0").is_some_and(|line| line.rsplit(|b| *b == 0).next() == Some(word.as_bytes()));
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| std::fs::read(entry.path().join("cmdline")).is_ok_and(|line| is_last(&line)))
}

/// Waits for something that nothing announces (a listening port, a process's end); fails after a long while.
#[track_caller]
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        pause();
    }
}

/// Waits until a server listens on all of these addresses; `false` when it has ended instead. It must be this process that does: where
/// another has taken an address, the server ends only after a while.
pub fn listens(server: &mut Child, addresses: &[&str]) -> bool {
    let start = Instant::now();
    loop {
        if server.try_wait().unwrap().is_some() {
            return false;
        }
        if addresses.iter().all(|address| listens_on(server.id(), address)) {
            return true;
        }
        if start.elapsed() > PATIENCE {
            let _ = server.kill();
            let _ = server.wait();
            panic!("the server does not listen on {addresses:?}");
        }
        pause();
    }
}

fn listens_on(pid: u32, address: &str) -> bool {
    let address: SocketAddrV4 = address.parse().unwrap();
    let wanted = format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port());
    let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    let fields = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    // 0A is LISTEN; the tenth field is the socket's inode.
    let Some(socket) = fields.into_iter().find(|f| f.get(1) == Some(&wanted.as_str()) && f.get(3) == Some(&"0A")).map(|f| format!("socket:[{}]", f[9])) else {
        return false;
    };
    let open = format!("/proc/{pid}/fd");
    super::entries(Path::new(&open)).iter().any(|fd| std::fs::read_link(format!("{open}/{fd}")).is_ok_and(|link| link.to_str() == Some(&socket)))
}

/// A moment between two looks at something that nothing announces.
pub fn pause() {
    nix::poll::poll(&mut [], nix::poll::PollTimeout::from(5u8)).unwrap();
}

/// What a runtime could leave behind, each as one line of text.
#[derive(Clone, Debug, Default)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks at mounts, network namespaces, links, nftables, loop devices, cgroups below `cgroup` and processes of ours. Other
    /// tests run beside this one: what cannot be told apart from theirs is compared by `hack/test`, over the whole run.
    pub fn take(cgroup: &str) -> Self {
        let mut seen = BTreeSet::new();
        for line in std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap().lines() {
            let fields: Vec<_> = line.split(' ').collect();
            seen.insert(format!("mount {} at {}", fields[3], fields[4]));
        }
        for name in super::entries(Path::new("/run/netns")) {
            seen.insert(format!("netns {name}"));
        }
        for line in run("ip", &["-o", "link"]).lines() {
            let name = line.split(':').nth(1).unwrap_or_default().trim().split('@').next().unwrap_or_default().to_owned();
            // The built-in bridge stays for the next pod, as documented; ports on it must not.
            if name != "mesocri0" {
                seen.insert(format!("link {name}"));
            }
        }
        for line in packet_rules() {
            seen.insert(format!("nftables {line}"));
        }
        // The scratch directory has the name of the group.
        for (device, file) in loop_devices().into_iter().filter(|(_, file)| file.contains(cgroup)) {
            seen.insert(format!("loop device {device} of {file}"));
        }
        for dir in cgroups_below(cgroup) {
            seen.insert(format!("cgroup {dir}"));
        }
        for (pid, text) in our_processes(cgroup) {
            seen.insert(format!("process {pid} {text}"));
        }
        Self(seen)
    }

    /// What is there now and was not before.
    pub fn difference(&self, now: &Self) -> Vec<String> {
        now.0.difference(&self.0).cloned().collect()
    }

    /// What stays of that. The kernel takes a dead network namespace, and its ends of links with it, apart when it has time.
    pub fn left(&self, cgroup: &str) -> Vec<String> {
        self.left_but(cgroup, |_| false)
    }

    /// The same without what may stay.
    pub fn left_but(&self, cgroup: &str, may_stay: impl Fn(&str) -> bool) -> Vec<String> {
        let start = Instant::now();
        loop {
            let mut left = self.difference(&Self::take(cgroup));
            left.retain(|line| !may_stay(line));
            if left.is_empty() || start.elapsed() > LEAVE_WITHIN {
                return left;
            }
            pause();
        }
    }
}

/// Packet rules of this network namespace that name an address. The built-in bridge's table stays for the next pod, as documented; what
/// pods put into its maps must not. Plugins' empty chains stay too. Nothing in a bench that is a machine of its own: its pods are on the host's network, and its kernel needs no rules.
fn packet_rules() -> Vec<String> {
    if same_namespace("net", "/proc/1") {
        return Vec::new();
    }
    let text = run("nft", &["--stateless", "list", "ruleset"]);
    let mut table = "";
    let mut rules = Vec::new();
    for line in text.lines() {
        if line.starts_with("table ") {
            table = line;
        }
        let addressed = || line.split([' ', '/', ',']).any(|word| word.parse::<std::net::IpAddr>().is_ok());
        if line.contains("elements") || table != "table inet mesocri0 {" && addressed() {
            rules.push(format!("{table} {}", line.trim()));
        }
    }
    rules
}

/// Whether this thread is in the same namespace of `kind` as the process below `proc`.
fn same_namespace(kind: &str, proc: &str) -> bool {
    let of = |proc: &str| std::fs::read_link(format!("{proc}/ns/{kind}")).ok();
    of("/proc/thread-self") == of(proc)
}

/// Loop devices in use, with their files.
fn loop_devices() -> Vec<(String, String)> {
    let devices = super::entries(Path::new("/sys/block")).into_iter().filter(|name| name.starts_with("loop"));
    devices.filter_map(|name| Some((name.clone(), std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?))).collect()
}

/// Directories of this bench in every cgroup hierarchy.
pub fn cgroups_below(cgroup: &str) -> Vec<String> {
    fn walk(dir: &Path, found: &mut Vec<String>) {
        found.push(dir.display().to_string());
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                walk(&entry.path(), found);
            }
        }
    }
    let mut found = Vec::new();
    for root in std::iter::once("/sys/fs/cgroup".into()).chain(std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|e| e.path())) {
        let dir = root.join(cgroup.trim_start_matches('/'));
        if dir.is_dir() {
            walk(&dir, &mut found);
        }
    }
    found
}

/// Processes that are ours: in a cgroup of this bench, or in this thread's mount or network namespace.
fn our_processes(cgroup: &str) -> Vec<(i32, String)> {
    let own = ["mnt", "net"].map(|kind| std::fs::read_link(format!("/proc/thread-self/ns/{kind}")).unwrap());
    let me = std::process::id().cast_signed();
    let apart = !same_namespace("mnt", "/proc/1");
    let mut found = Vec::new();
    for name in super::entries(Path::new("/proc")) {
        let Ok(pid) = name.parse::<i32>() else { continue };
        let dir = Path::new("/proc").join(&name);
        let read = |file: &str| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        let command = read("cmdline").replace('\0', " ");
        let inside = ["mnt", "net"].into_iter().zip(&own).any(|(kind, own)| std::fs::read_link(dir.join("ns").join(kind)).is_ok_and(|ns| ns == *own));
        // A bench that is a machine of its own sees the machine's own processes.
        let ours = inside && pid != me && (apart || command.contains("mesocri"));
        // A dead process whose parent died too is for whoever inherits it to reap, not for us.
        let stat = read("stat");
        if stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z ") && !rest.starts_with(&format!(" Z {me} "))) {
            continue;
        }
        if ours || read("cgroup").contains(&format!("{cgroup}/")) {
            found.push((pid, command));
        }
    }
    found
}

/// The shims of this thread's mount namespace.
pub fn shims() -> Vec<i32> {
    our_processes("/no such group").into_iter().filter(|(_, command)| command.starts_with("containerd-shim-mesocri")).map(|(pid, _)| pid).collect()
}

/// SIGKILL; a process that has ended is fine.
pub fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}

/// Ends what a failed test left running, so that one failure does not become many: what is in a cgroup of the bench, and what was
/// started with an argument or a variable that names the bench's directory or works in it; then the cgroups.
pub fn kill_processes_of(cgroup: &str, dir: &Path) {
    let name = dir.to_str().unwrap().as_bytes();
    for pid in super::entries(Path::new("/proc")).iter().filter_map(|name| name.parse::<i32>().ok()) {
        let process = Path::new("/proc").join(pid.to_string());
        let read = |file: &str| std::fs::read(process.join(file)).unwrap_or_default();
        let names_dir = |file: &str| read(file).windows(name.len()).any(|part| part == name);
        let inside = std::fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
        let ours = inside || names_dir("cmdline") || names_dir("environ") || String::from_utf8_lossy(&read("cgroup")).contains(&format!("{cgroup}/"));
        if ours && pid != std::process::id().cast_signed() {
            kill(pid);
        }
    }
    // The killed leave when they are scheduled. In a test that fails already there is nobody to tell of what does not go.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        // The deepest first.
        let left = cgroups_below(cgroup).iter().rev().filter(|dir| std::fs::remove_dir(dir).is_err()).count();
        if left == 0 {
            break;
        }
        pause();
    }
}
