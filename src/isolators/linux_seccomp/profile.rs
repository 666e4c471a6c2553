//! Seccomp profiles in Docker's JSON form: lists of system calls with conditions on architecture, kernel and capabilities.
//! Resolving the conditions gives the OCI form, which has none.

use oci_spec::runtime::{Arch, Capabilities, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompOperator, LinuxSyscall};
use serde::Deserialize;

use crate::model::error::{Error, Kind, Result};
use crate::stdx::kernel;

/// A profile as it stands in the file. Members that mean nothing to a filter (comments) are passed over.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Profile {
    default_action: LinuxSeccompAction,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<Arch>,
    #[serde(default)]
    arch_map: Vec<ArchFamily>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchFamily {
    architecture: Arch,
    #[serde(default)]
    sub_architectures: Vec<Arch>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    name: Option<String>,
    action: LinuxSeccompAction,
    errno_ret: Option<u32>,
    args: Option<Vec<Arg>>,
    #[serde(default)]
    includes: Condition,
    #[serde(default)]
    excludes: Condition,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Arg {
    index: usize,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: LinuxSeccompOperator,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Condition {
    caps: Vec<String>,
    arches: Vec<String>,
    min_kernel: Option<String>,
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// `InvalidArgument` when it is none.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|e| Error::with(Kind::InvalidArgument, "parse seccomp profile", e))
    }

    /// The rules that hold on this machine for a process with the capabilities `granted`.
    ///
    /// # Errors
    /// `InvalidArgument` for malformed conditions, `Unimplemented` for a rule that needs a listener.
    pub fn resolve(&self, granted: &Capabilities) -> Result<LinuxSeccomp> {
        let caps: Vec<String> = granted.iter().map(|c| format!("CAP_{c}")).collect();
        let mut syscalls = Vec::new();
        for rule in &self.syscalls {
            if rule.action == LinuxSeccompAction::ScmpActNotify {
                return Err(Error::new(Kind::Unimplemented, "seccomp profile: SCMP_ACT_NOTIFY needs a listener, which is not built"));
            }
            if rule.holds(&caps)? {
                syscalls.push(rule.oci()?);
            }
        }
        let mut seccomp = LinuxSeccomp::default();
        seccomp
            .set_default_action(self.default_action)
            .set_default_errno_ret(self.default_errno_ret)
            .set_architectures(Some(self.architectures()))
            .set_syscalls(Some(syscalls));
        Ok(seccomp)
    }

    /// This machine's architecture with those it can run besides.
    fn architectures(&self) -> Vec<Arch> {
        let native = native();
        let mut all = vec![native];
        let family = self.arch_map.iter().find(|family| family.architecture == native);
        let more = family.map_or(&self.architectures, |family| &family.sub_architectures);
        all.extend(more.iter().filter(|arch| **arch != native));
        all
    }
}

impl Rule {
    fn holds(&self, caps: &[String]) -> Result<bool> {
        let (i, e) = (&self.includes, &self.excludes);
        let here = |arches: &[String]| arches.iter().any(|a| a == go_arch());
        let included = i.caps.iter().all(|c| caps.contains(c)) && (i.arches.is_empty() || here(&i.arches)) && kernel_at_least(i.min_kernel.as_deref())?;
        let excluded = e.caps.iter().any(|c| caps.contains(c)) || here(&e.arches) || (e.min_kernel.is_some() && kernel_at_least(e.min_kernel.as_deref())?);
        Ok(included && !excluded)
    }

    fn oci(&self) -> Result<LinuxSyscall> {
        let arg = |a: &Arg| {
            let two = if a.op == LinuxSeccompOperator::ScmpCmpMaskedEq { a.value_two } else { 0 };
            let built = LinuxSeccompArgBuilder::default().index(a.index).value(a.value).value_two(two).op(a.op).build();
            built.map_err(|e| Error::with(Kind::Internal, "build seccomp argument", e))
        };
        let args = self.args.iter().flatten().map(arg).collect::<Result<Vec<_>>>()?;
        let mut syscall = LinuxSyscall::default();
        syscall
            .set_names(self.names.iter().chain(&self.name).cloned().collect())
            .set_action(self.action)
            .set_errno_ret(self.errno_ret)
            .set_args((!args.is_empty()).then_some(args));
        Ok(syscall)
    }
}

/// Profiles name architectures as Go does.
fn go_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// This machine's architecture as profiles name it in `archMap`.
fn native() -> Arch {
    match std::env::consts::ARCH {
        "x86_64" => Arch::ScmpArchX86_64,
        "x86" => Arch::ScmpArchX86,
        "aarch64" => Arch::ScmpArchAarch64,
        "arm" => Arch::ScmpArchArm,
        "powerpc64" => Arch::ScmpArchPpc64le,
        "s390x" => Arch::ScmpArchS390x,
        "riscv64" => Arch::ScmpArchRiscv64,
        "loongarch64" => Arch::ScmpArchLoongarch64,
        _ => Arch::ScmpArchNative,
    }
}

fn kernel_at_least(wanted: Option<&str>) -> Result<bool> {
    let Some(wanted) = wanted.filter(|w| !w.is_empty()) else { return Ok(true) };
    let bad = || Error::invalid(format!("seccomp profile: minKernel {wanted:?} is not <major>.<minor>"));
    Ok(kernel::running() >= kernel::version(wanted).ok_or_else(bad)?)
}
