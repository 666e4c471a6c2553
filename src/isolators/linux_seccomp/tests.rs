//! Tests of profiles: compiled filters are run by a small interpreter of classic BPF, so what is tested is what the kernel
//! would do.

use super::super::tests::Bench;
use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const X86_64: u32 = 0xc000_003e;

fn errno(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

/// Runs `bpf` on one system call (`struct seccomp_data`, seccomp(2)).
fn run(bpf: &[u8], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
    let mut data = [nr.to_ne_bytes(), arch.to_ne_bytes(), [0; 4], [0; 4]].concat();
    args.iter().for_each(|a| data.extend(a.to_ne_bytes()));
    let word = |at: u32| u32::from_ne_bytes(data[at as usize..at as usize + 4].try_into().unwrap());
    let (mut pc, mut a, mut steps) = (0usize, 0u32, 0);
    loop {
        steps += 1;
        assert!(steps < 4096);
        let i = &bpf[pc * 8..pc * 8 + 8];
        let (code, yes, no, k) = (u32::from(u16::from_ne_bytes([i[0], i[1]])), i[2], i[3], u32::from_ne_bytes(i[4..8].try_into().unwrap()));
        pc += 1;
        let mut jump = |holds: bool| pc += usize::from(if holds { yes } else { no });
        match code {
            0x20 => a = word(k),
            0x05 => pc += k as usize,
            0x15 => jump(a == k),
            0x25 => jump(a > k),
            0x35 => jump(a >= k),
            0x45 => jump(a & k != 0),
            0x54 => a &= k,
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn call(bpf: &[u8], nr: libc::c_long, args: &[u64]) -> u32 {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    run(bpf, X86_64, nr as u32, all)
}

fn bpf(profile: &[u8], caps: &[&str]) -> Vec<u8> {
    let granted = caps.iter().map(|c| c.parse().unwrap()).collect();
    compile::compile(&Profile::parse(profile).unwrap().resolve(&granted).unwrap()).unwrap()
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_default_profile_follows_the_capabilities() {
    let plain = bpf(RUNTIME_DEFAULT, &["CHOWN"]);
    let admin = bpf(RUNTIME_DEFAULT, &["SYS_ADMIN", "SYS_CHROOT", "AUDIT_WRITE"]);
    // linux/bpf_common.h: BPF_MAXINSNS; the kernel refuses more.
    assert!(plain.len() / 8 <= 4096 && admin.len() / 8 <= 4096);
    for nr in [libc::SYS_read, libc::SYS_execve, libc::SYS_openat, libc::SYS_clone3, libc::SYS_arch_prctl] {
        assert_eq!((call(&plain, nr, &[]), call(&admin, nr, &[])), (ALLOW, ALLOW), "{nr}");
    }
    assert_eq!(call(&plain, libc::SYS_chroot, &[]), errno(libc::EPERM));
    assert_eq!(call(&admin, libc::SYS_chroot, &[]), ALLOW);
    assert_eq!((call(&plain, libc::SYS_bpf, &[]), call(&admin, libc::SYS_bpf, &[])), (errno(libc::EPERM), ALLOW));
    assert_eq!(call(&plain, libc::SYS_kexec_load, &[]), errno(libc::EPERM));
    assert_eq!(call(&plain, libc::SYS_personality, &[0]), ALLOW);
    assert_eq!(call(&plain, libc::SYS_personality, &[1]), errno(libc::ENOSYS));
    // Netlink audit sockets only with the capability; other netlink sockets always.
    assert_eq!(call(&plain, libc::SYS_socket, &[16, 3, 9]), errno(libc::EINVAL));
    assert_eq!(call(&plain, libc::SYS_socket, &[16, 3, 0]), ALLOW);
    assert_eq!(call(&admin, libc::SYS_socket, &[16, 3, 9]), ALLOW);
    // Not in the list, and beyond every list.
    assert_eq!(call(&plain, 1000, &[]), errno(libc::ENOSYS));
    assert_eq!(run(&plain, 0x1234, 0, [0; 6]), libc::SECCOMP_RET_KILL_THREAD, "a foreign architecture");
}

#[test]
#[cfg(target_arch = "x86_64")]
fn conditions_operators_and_unknown_names() {
    let profile = br#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13, "syscalls": [
        {"names": ["no_such_call", "read"], "action": "SCMP_ACT_ALLOW"},
        {"name": "write", "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 240, "valueTwo": 16, "op": "SCMP_CMP_MASKED_EQ"}]},
        {"names": ["close"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]},
        {"names": ["dup2"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 5, "op": "SCMP_CMP_GE"}, {"index": 1, "value": 5, "op": "SCMP_CMP_LT"}]},
        {"names": ["getpid"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "3.0"}},
        {"names": ["getppid"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.0"}},
        {"names": ["getuid"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
        {"names": ["getgid"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["amd64"]}},
        {"names": ["fork"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
        {"names": ["reboot"], "action": "SCMP_ACT_KILL_PROCESS"}
    ]}"#;
    let bpf = bpf(profile, &[]);
    let no = errno(13);
    for (nr, args, wanted) in [
        (libc::SYS_read, &[][..], ALLOW),
        (libc::SYS_write, &[0x11f], ALLOW),
        (libc::SYS_write, &[0x20], no),
        (libc::SYS_close, &[1], ALLOW),
        (libc::SYS_close, &[2], ALLOW),
        (libc::SYS_close, &[3], no),
        (libc::SYS_dup2, &[5, 4], ALLOW),
        (libc::SYS_dup2, &[5, 5], no),
        (libc::SYS_dup2, &[4, 4], no),
        (libc::SYS_getpid, &[], ALLOW),
        (libc::SYS_getppid, &[], no),
        (libc::SYS_getuid, &[], no),
        (libc::SYS_getgid, &[], no),
        (libc::SYS_fork, &[], no),
        (libc::SYS_reboot, &[], libc::SECCOMP_RET_KILL_PROCESS),
        // Newer than the library: the program must be able to fall back, whatever the profile's default.
        (1000, &[], errno(libc::ENOSYS)),
    ] {
        assert_eq!(call(&bpf, nr, args), wanted, "{nr} {args:?}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn an_allowing_default_stays_one() {
    let bpf = bpf(br#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}"#, &[]);
    assert_eq!(call(&bpf, libc::SYS_mkdir, &[]), errno(libc::EPERM));
    assert_eq!(call(&bpf, 1000, &[]), ALLOW);
}

#[test]
fn nonsense_is_refused() {
    for bad in [
        "",
        "[]",
        r#"{"defaultAction": "SCMP_ACT_NOPE"}"#,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}"#,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "includes": {"minKernel": "new"}}]}"#,
    ] {
        let made = Profile::parse(bad.as_bytes()).and_then(|p| p.resolve(&Capabilities::default())).and_then(|s| compile::compile(&s));
        assert!(made.is_err(), "{bad}");
    }
}

#[tokio::test]
async fn one_file_per_profile_and_capabilities_made_again_when_cleaned_away() {
    let mut bench = Bench::new();
    let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
    bench.spec.security.seccomp = SecurityProfile::RuntimeDefault;
    let first = bench.prepare(&*isolator).await.unwrap();
    let path = first.seccomp_bpf.clone().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len() % 8, 0);
    assert!(first.seccomp.is_some());
    let written = std::fs::metadata(&path).unwrap().modified().unwrap();
    // Another daemon on the same tree takes the file as it is.
    let second = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
    assert_eq!(bench.prepare(&*second).await.unwrap(), first);
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), written);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(bench.prepare(&*isolator).await.unwrap(), first);
    assert!(path.exists());
    // A capability that the profile does not ask about makes no other filter, one that it asks about does.
    bench.spec.security.capabilities.drop = vec!["KILL".into()];
    assert_eq!(bench.prepare(&*isolator).await.unwrap().seccomp_bpf, Some(path.clone()));
    bench.spec.security.capabilities.drop = vec!["SYS_CHROOT".into()];
    assert_ne!(bench.prepare(&*isolator).await.unwrap().seccomp_bpf, Some(path));
}

#[tokio::test]
async fn privileged_and_unconfined_have_none_and_files_are_read_carefully() {
    let mut bench = Bench::new();
    let isolator = (ENTRY.create)(&bench.deps, toml::Table::new()).unwrap();
    assert_eq!(bench.prepare(&*isolator).await.unwrap(), LaunchPatch::default());
    let file = bench.path().join("profile.json");
    std::fs::write(&file, r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).unwrap();
    bench.spec.security.seccomp = SecurityProfile::Localhost(format!("localhost/{}", file.display()));
    assert!(bench.prepare(&*isolator).await.unwrap().seccomp_bpf.is_some());
    bench.spec.security.privileged = true;
    assert_eq!(bench.prepare(&*isolator).await.unwrap(), LaunchPatch::default());
    bench.spec.security.privileged = false;
    let fifo = bench.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let missing = bench.path().join("missing.json");
    for bad in [missing.to_str().unwrap(), "relative.json", "localhost/relative.json", fifo.to_str().unwrap(), "/dev/zero"] {
        bench.spec.security.seccomp = SecurityProfile::Localhost(bad.into());
        let error = bench.prepare(&*isolator).await.unwrap_err();
        assert_eq!(error.kind, Kind::InvalidArgument);
        assert!(error.to_string().contains(bad), "{error}");
    }
}
