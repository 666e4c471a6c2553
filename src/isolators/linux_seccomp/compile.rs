//! OCI seccomp rules to BPF, by libseccomp.

use std::io::{Read, Seek};

use libseccomp::error::SeccompErrno;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompOperator};

use crate::model::error::{Act, Error, Kind, Result};

/// Errno of a refusal that names none (OCI runtime spec, `errnoRet`).
const DEFAULT_ERRNO: u32 = libc::EPERM.cast_unsigned();
/// Binary search instead of a list: a call costs tens of instructions, not hundreds (`seccomp_attr_set(3)`).
const BINARY_TREE: u32 = 2;
/// No kernel numbers its system calls higher (x32's begin at 2^30 and are another architecture to libseccomp).
const MAX_SYSCALL: i32 = 1023;

/// Version of the library, which decides what it knows.
pub fn library_version() -> String {
    libseccomp::ScmpVersion::current().map_or_else(|_| "unknown".to_owned(), |v| v.to_string())
}

/// Compiles `rules` to an array of `sock_filter` in host byte order. System calls that this libseccomp does not know are
/// left out; when the rest would be refused, those that are newer than it give `ENOSYS`, so that programs fall back.
///
/// # Errors
/// `InvalidArgument` for rules that make no sense.
pub fn compile(rules: &LinuxSeccomp) -> Result<Vec<u8>> {
    let bad = |what: &str, e: libseccomp::error::SeccompError| Error::with(Kind::InvalidArgument, format!("compile seccomp profile: {what}"), e);
    let default = action(rules.default_action(), rules.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).map_err(|e| bad("default action", e))?;
    for arch in rules.architectures().iter().flatten() {
        let name = arch.to_string();
        let arch: ScmpArch = name.parse().map_err(|e| bad(&name, e))?;
        filter.add_arch(arch).map_err(|e| bad(&name, e))?;
    }
    for rule in rules.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        // The library refuses rules that say what holds anyway.
        if action == default {
            continue;
        }
        let conditions = conditions(rule.args().as_deref().unwrap_or_default())?;
        for name in rule.names() {
            let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
            for condition in &conditions {
                match filter.add_rule_conditional(action, syscall, condition) {
                    // A rule for the same call and arguments stands already; the first one holds.
                    Err(e) if e.errno() == Some(SeccompErrno::EEXIST) => {}
                    other => {
                        other.map_err(|e| bad(name, e))?;
                    }
                }
            }
        }
    }
    // Old libraries do not have it; the filter is only slower then.
    let _ = filter.set_ctl_optimize(BINARY_TREE);
    let memory = rustix::fs::memfd_create("seccomp", rustix::fs::MemfdFlags::CLOEXEC).act("create", "memfd")?;
    filter.export_bpf(&memory).map_err(|e| bad("export", e))?;
    let mut memory = std::fs::File::from(memory);
    memory.rewind().act("rewind", "memfd")?;
    let mut bpf = if matches!(default, ScmpAction::Allow | ScmpAction::Log) { Vec::new() } else { too_new() };
    memory.read_to_end(&mut bpf).act("read", "memfd")?;
    Ok(bpf)
}

/// Instructions to put before a filter: native calls beyond the last that libseccomp knows give `ENOSYS`. Jumps of BPF are
/// relative, so the rest need not change.
fn too_new() -> Vec<u8> {
    let Some(last) = (0..=MAX_SYSCALL).rev().find(|nr| ScmpSyscall::from_raw_syscall(*nr).get_name().is_ok()) else { return Vec::new() };
    let Some(native) = audit_arch() else { return Vec::new() };
    let load = |offset| (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let jump = |how, value, yes, no| (libc::BPF_JMP | how | libc::BPF_K, yes, no, value);
    // Offsets in `struct seccomp_data`: the number is at 0, the architecture at 4.
    let program = [
        load(4),
        jump(libc::BPF_JEQ, native, 0, 4),
        load(0),
        jump(libc::BPF_JGT, MAX_SYSCALL.cast_unsigned(), 2, 0),
        jump(libc::BPF_JGT, last.cast_unsigned(), 0, 1),
        (libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()),
    ];
    let encode = |(code, yes, no, k): (u32, u8, u8, u32)| {
        let [a, b] = u16::try_from(code).unwrap_or_default().to_ne_bytes();
        let [c, d, e, f] = k.to_ne_bytes();
        [a, b, yes, no, c, d, e, f]
    };
    program.into_iter().flat_map(encode).collect()
}

/// `AUDIT_ARCH_*` of this machine (`linux/audit.h`).
fn audit_arch() -> Option<u32> {
    match std::env::consts::ARCH {
        "x86_64" => Some(0xc000_003e),
        "aarch64" => Some(0xc000_00b7),
        "riscv64" => Some(0xc000_00f3),
        "s390x" => Some(0x8000_0016),
        "powerpc64" => Some(0xc000_0015),
        "loongarch64" => Some(0xc000_0102),
        _ => None,
    }
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let number = errno.unwrap_or(DEFAULT_ERRNO);
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => {
            ScmpAction::Errno(i32::try_from(number).map_err(|_| Error::invalid(format!("compile seccomp profile: errno {number} is none")))?)
        }
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(number).map_err(|_| Error::invalid(format!("compile seccomp profile: trace message {number} is too large")))?)
        }
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => return Err(Error::new(Kind::Unimplemented, "seccomp listeners are not built")),
    })
}

/// Conditions of one rule hold together; but two on the same argument cannot, so then each makes a rule of its own, as the
/// profiles' first reader did it.
fn conditions(args: &[LinuxSeccompArg]) -> Result<Vec<Vec<ScmpArgCompare>>> {
    let mut all = Vec::with_capacity(args.len());
    for arg in args {
        let index = u32::try_from(arg.index()).ok().filter(|i| *i < 6);
        let index = index.ok_or_else(|| Error::invalid(format!("compile seccomp profile: no argument {}", arg.index())))?;
        let (op, value) = match arg.op() {
            LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
            LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
            LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
            LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
            LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
            LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
            LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or_default()),
        };
        all.push(ScmpArgCompare::new(index, op, value));
    }
    let mut seen = [false; 6];
    let twice = args.iter().any(|arg| seen.get_mut(arg.index()).is_some_and(|s| std::mem::replace(s, true)));
    Ok(if twice { all.into_iter().map(|c| vec![c]).collect() } else { vec![all] })
}
