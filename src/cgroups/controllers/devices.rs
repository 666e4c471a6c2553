//! Device nodes: which may be opened or made.
//!
//! The rules are an ordered list; for every kind of access (read, write, mknod) the last rule that names the device decides. v1
//! takes the rules one by one in two files. v2 has no files: the rules become a small BPF program.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use super::{Row, none};
use crate::cgroups::file::Group;
use crate::cgroups::host::Controller;
use crate::model::error::{Act, Error, Result};
use crate::sys::bpf::{self, Insn};

pub(super) const DEVICES: Row =
    Row { controller: Controller::Devices, wanted, required: true, apply_v1, apply_v2, stats_v1: none::stats, stats_v2: none::stats };

/// Name of our program, to find the old one when the rules change (`BPF_OBJ_NAME_LEN` allows 15 bytes).
const PROGRAM: &str = "mesocri_dev";
/// More rules than any device list needs; keeps the program far below the verifier's limit.
const MAX_RULES: usize = 4096;

// Bits of an access, as the BPF program sees them (`BPF_DEVCG_ACC_*`).
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL_ACCESS: u32 = MKNOD | READ | WRITE;

fn wanted(r: &LinuxResources) -> bool {
    r.devices().as_ref().is_some_and(|d| !d.is_empty())
}

/// Kind of device node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Any,
    Block,
    Char,
}

/// A rule with everything filled in: `None` is every number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    node: Node,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    /// Numbers that are missing or negative are wildcards, as is the type `a`.
    fn new(rule: &LinuxDeviceCgroup) -> Result<Self> {
        let bad = |why: &str| Error::invalid(format!("read device rule {rule:?}: {why}"));
        let node = match rule.typ() {
            None | Some(LinuxDeviceType::A) => Node::Any,
            Some(LinuxDeviceType::B) => Node::Block,
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Node::Char,
            Some(LinuxDeviceType::P) => return Err(bad("a fifo is no device")),
        };
        let number = |n: Option<i64>| match n {
            None | Some(..0) => Ok(None),
            Some(n) => i32::try_from(n).map(|n| Some(n.unsigned_abs())).map_err(|_| bad("number too large")),
        };
        let mut access = 0;
        for c in rule.access().as_deref().unwrap_or("rwm").chars() {
            access |= match c {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => return Err(bad("access is any of r, w and m")),
            };
        }
        Ok(Self { allow: rule.allow(), node, major: number(rule.major())?, minor: number(rule.minor())?, access })
    }

    /// Names every device and every access.
    fn is_everything(&self) -> bool {
        self.node == Node::Any && self.major.is_none() && self.minor.is_none() && self.access == ALL_ACCESS
    }
}

fn rules(r: &LinuxResources) -> Result<Vec<Rule>> {
    let given = r.devices().as_deref().unwrap_or_default();
    if given.len() > MAX_RULES {
        return Err(Error::invalid(format!("read device rules: {} of them, at most {MAX_RULES} are taken", given.len())));
    }
    given.iter().map(Rule::new).filter(|r| !matches!(r, Ok(Rule { access: 0, .. }))).collect()
}

/// The lines for `devices.allow` or `devices.deny`. The kernel reads `a` as "everything, all access" whatever follows, so only a
/// rule that means it is written so; another rule for both kinds becomes two lines.
fn lines_v1(rule: &Rule) -> Vec<String> {
    if rule.is_everything() {
        return vec!["a *:* rwm".to_owned()];
    }
    let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
    let access: String = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')].iter().filter(|(bit, _)| rule.access & bit != 0).map(|(_, c)| *c).collect();
    let kinds: &[char] = match rule.node {
        Node::Any => &['b', 'c'],
        Node::Block => &['b'],
        Node::Char => &['c'],
    };
    kinds.iter().map(|kind| format!("{kind} {}:{} {access}", number(rule.major), number(rule.minor))).collect()
}

fn apply_v1(group: &Group, r: &LinuxResources) -> Result<()> {
    for rule in rules(r)? {
        let file = if rule.allow { "devices.allow" } else { "devices.deny" };
        for line in lines_v1(&rule) {
            group.write(file, &line)?;
        }
    }
    Ok(())
}

/// The program. It keeps the access still to be decided in a register and walks the rules from last to first: an allow rule
/// takes its bits out and allows when none are left; a deny rule denies when one of its bits is still open. What no rule
/// decided is allowed, as in a fresh v1 group, so a list that wants "deny the rest" begins with a rule that denies all.
fn compile(rules: &[Rule]) -> Vec<Insn> {
    use bpf::reg::{R0, R1, R2, R3, R4, R5};
    // `bpf_cgroup_dev_ctx`: access << 16 | type, major, minor.
    let mut code = vec![
        bpf::load_u32(R2, R1, 0),
        bpf::mov_reg(R3, R2),
        bpf::and_imm(R2, 0xffff),
        bpf::rsh_imm(R3, 16),
        bpf::load_u32(R4, R1, 4),
        bpf::load_u32(R5, R1, 8),
    ];
    let answer = |allow: bool| [bpf::mov_imm(R0, i32::from(allow)), bpf::exit()];
    // What precedes a rule that names everything is never asked.
    let start = rules.iter().rposition(Rule::is_everything).unwrap_or(0);
    for rule in rules[start..].iter().rev() {
        let mut body: Vec<Insn> = Vec::with_capacity(4);
        let bits = i32::try_from(rule.access).unwrap_or(0);
        if rule.is_everything() {
            body.extend(answer(rule.allow));
        } else if rule.allow {
            body.push(bpf::and_imm(R3, !bits));
            body.push(bpf::jump_if_not(R3, 0, 2));
            body.extend(answer(true));
        } else {
            body.push(bpf::mov_reg(R0, R3));
            body.push(bpf::and_imm(R0, bits));
            body.push(bpf::jump_if(R0, 0, 2));
            body.extend(answer(false));
        }
        let node = match rule.node {
            Node::Any => None,
            Node::Block => Some(1),
            Node::Char => Some(2),
        };
        let tests: Vec<_> = [(R2, node), (R4, rule.major), (R5, rule.minor)].into_iter().filter_map(|(reg, v)| Some((reg, v?))).collect();
        for (n, (reg, value)) in tests.iter().enumerate() {
            let skip = tests.len() - n - 1 + body.len();
            code.push(bpf::jump_if_not(*reg, i32::try_from(*value).unwrap_or(i32::MAX), i16::try_from(skip).unwrap_or(i16::MAX)));
        }
        code.append(&mut body);
        if rule.is_everything() {
            return code;
        }
    }
    code.extend(answer(true));
    code
}

/// Loads and attaches the program, then takes off the one it replaces. In between both hold, so nothing is ever open that should
/// not be. Programs of others (systemd's) stay.
fn apply_v2(group: &Group, r: &LinuxResources) -> Result<()> {
    let shown = group.dir().display();
    let program = bpf::load_cgroup_device(&compile(&rules(r)?), PROGRAM).act("load device program for", shown)?;
    let dir =
        rustix::fs::open(group.dir(), rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())
            .act("open cgroup", group.dir().display())?;
    let old = bpf::attached_cgroup_device(&dir, PROGRAM).act("list device programs of", group.dir().display())?;
    bpf::attach_cgroup_device(&dir, &program).act("attach device program to", group.dir().display())?;
    for program in old {
        bpf::detach_cgroup_device(&dir, &program).act("detach old device program from", group.dir().display())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
