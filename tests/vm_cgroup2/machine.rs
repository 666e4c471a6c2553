//! The machine: builds what it boots from, runs it to its end and hands over what the tests inside reported.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::image;
use crate::common::host;

/// Set inside the machine.
pub const INSIDE: &str = "VM_TEST_INSIDE";
/// The serial line for reports, inside.
pub const REPORTS: &str = "/dev/ttyS1";
/// What a run may take on a slow machine. On two cores it takes less than a minute.
const DEADLINE: Duration = Duration::from_secs(400);
/// Lines of the console shown after a failure.
const SHOWN: usize = 200;

/// What came of one check: its name, `Ok` with milliseconds or the failure's text.
type Outcome = (String, Result<String, String>);

/// Boots a machine which runs the test `name` of this program again, inside, and judges what it reports about `checks`.
pub fn run(name: &str, systemd: bool, checks: &[&str]) {
    let scratch = tempfile::Builder::new().prefix("vm-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |file: &str| scratch.path().join(file);
    let start = Instant::now();
    image::write_initramfs(&at("initramfs.cpio"), scratch.path());
    image::write_disk(&at("disk.ext4"), scratch.path(), systemd, &script(name, systemd));
    let built = start.elapsed();
    let machine = Machine::boot(&at("initramfs.cpio"), &at("disk.ext4"), &at("console"), &at("reports"));
    let ended = machine.wait();
    let console = fs::read(at("console")).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let reports = fs::read(at("reports")).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let outcomes: Vec<Outcome> = reports.lines().filter_map(parse).collect();
    println!("image in {built:.1?}, all in {:.1?}", start.elapsed());
    for (check, result) in &outcomes {
        println!("{check}: {}", result.as_ref().map_or_else(|e| format!("FAILED: {e}"), |ms| format!("ok in {ms} ms")));
    }
    let mut failures: Vec<String> = outcomes.iter().filter_map(|(check, result)| Some(format!("{check}: {}", result.as_ref().err()?))).collect();
    failures.extend(checks.iter().filter(|c| !outcomes.iter().any(|(check, _)| check == *c)).map(|c| format!("{c}: no report")));
    let lines: Vec<&str> = console.lines().collect();
    let tail = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
    assert!(failures.is_empty() && ended.is_ok(), "{}\nmachine: {ended:?}\n--- console of the machine ---\n{tail}", failures.join("\n"));
}

/// `CHECK name ok|FAILED text`, the text in quotes with escapes.
fn parse(line: &str) -> Option<Outcome> {
    let mut fields = line.trim().strip_prefix("CHECK ")?.splitn(3, ' ');
    let (name, result, text) = (fields.next()?, fields.next()?, fields.next().unwrap_or_default());
    let text: String = serde_json::from_str(text).ok()?;
    Some((name.to_owned(), if result == "ok" { Ok(text) } else { Err(text) }))
}

/// What process 1, or systemd's only service, runs.
fn script(name: &str, systemd: bool) -> String {
    let mounts = "mount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t cgroup2 -o nsdelegate,memory_recursiveprot cgroup2 /sys/fs/cgroup\n\
                  mount -t tmpfs -o mode=755 run /run\nmkdir -p /dev/pts /dev/shm\nmount -t devpts devpts /dev/pts\nmount -t tmpfs shm /dev/shm\n\
                  exec >/dev/ttyS0 2>&1 </dev/null\n";
    let test = std::env::current_exe().unwrap();
    format!(
        "#!/bin/sh\nexport PATH=/bin:/sbin:/usr/bin:/usr/sbin {INSIDE}=1\n{}mount --make-rshared /\nip link set lo up\nstty -F {REPORTS} raw -echo\ncd /tmp\n\
         {} --exact {name} --nocapture\necho \"tests ended with $?\"\npoweroff -f\n",
        if systemd { "" } else { mounts },
        test.display(),
    )
}

struct Machine(Child);

impl Machine {
    fn boot(initramfs: &Path, disk: &Path, console: &Path, reports: &Path) -> Self {
        let file = |path: &Path| format!("file:{}", path.display());
        let drive = format!("file={},if=none,id=disk,format=raw,cache=unsafe", disk.display());
        let kernel: PathBuf = image::kernel();
        // setpriv: the machine dies with the thread that started it, however that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-smp", "2", "-m", "1536"]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
        // no_timer_check: on a busy machine an emulated timer ticks too late for that check, and the kernel gives up.
        command.args([
            "-append",
            "console=ttyS0 panic=-1 mitigations=off norandmaps nokaslr no5lvl no_timer_check tsc=reliable clocksource=tsc systemd.log_target=console systemd.unified_cgroup_hierarchy=1",
        ]);
        command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=disk", "-serial", &file(console), "-serial", &file(reports)]);
        Self(command.stdin(Stdio::null()).spawn().expect("setpriv is installed"))
    }

    fn wait(mut self) -> Result<(), String> {
        let start = Instant::now();
        loop {
            match self.0.try_wait().unwrap() {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(status.to_string()),
                None if start.elapsed() > DEADLINE => return Err(format!("did not end in {DEADLINE:?}")),
                None => host::pause(),
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
