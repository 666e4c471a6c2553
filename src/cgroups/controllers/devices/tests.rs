//! The rules of device cgroups: what both versions write, and what the kernel then allows.

use proptest::prelude::*;

use super::*;

fn rule(allow: bool, typ: Option<LinuxDeviceType>, major: Option<i64>, minor: Option<i64>, access: &str) -> LinuxDeviceCgroup {
    let mut r = LinuxDeviceCgroup::default();
    r.set_allow(allow).set_typ(typ).set_major(major).set_minor(minor).set_access(Some(access.to_owned()));
    r
}

#[test]
fn v1_lines() {
    use LinuxDeviceType::{A, B, C};
    let lines = |r: LinuxDeviceCgroup| lines_v1(&Rule::new(&r).unwrap());
    assert_eq!(lines(rule(false, Some(A), None, None, "rwm")), ["a *:* rwm"]);
    assert_eq!(lines(rule(true, Some(C), Some(1), Some(3), "rw")), ["c 1:3 rw"]);
    assert_eq!(lines(rule(true, Some(B), None, None, "m")), ["b *:* m"]);
    assert_eq!(lines(rule(true, None, Some(-1), Some(3), "r")), ["b *:3 r", "c *:3 r"]);
    assert!(Rule::new(&rule(true, Some(C), None, None, "x")).is_err());
    assert!(Rule::new(&rule(true, Some(C), Some(i64::MAX), None, "r")).is_err());
}

/// What the rules mean, said the plain way: for each bit the last rule that names the device.
fn oracle(rules: &[Rule], node: Node, major: u32, minor: u32, access: u32) -> bool {
    [MKNOD, READ, WRITE].iter().filter(|bit| access & **bit != 0).all(|bit| {
        let names = |r: &&Rule| {
            (r.node == Node::Any || r.node == node) && r.major.is_none_or(|m| m == major) && r.minor.is_none_or(|m| m == minor) && r.access & bit != 0
        };
        rules.iter().rev().find(names).is_none_or(|r| r.allow)
    })
}

/// Runs a program as the kernel would.
fn run(code: &[Insn], kind: u32, major: u32, minor: u32, access: u32) -> bool {
    let mut regs = [0u64; 11];
    let ctx = [access << 16 | kind, major, minor];
    let mut pc = 0usize;
    loop {
        let i = code[pc];
        let (dst, src) = (usize::from(i.regs & 15), usize::from(i.regs >> 4));
        let imm = i64::from(i.imm).cast_unsigned();
        pc += 1;
        let jump = |taken: bool, pc: usize| if taken { pc.checked_add_signed(isize::from(i.offset)).unwrap() } else { pc };
        match i.code {
            0x61 => regs[dst] = u64::from(ctx[usize::try_from(i.offset / 4).unwrap()]),
            0xbf => regs[dst] = regs[src],
            0xb7 => regs[dst] = imm,
            0x57 => regs[dst] &= imm,
            0x77 => regs[dst] >>= imm,
            0x15 => pc = jump(regs[dst] == imm, pc),
            0x55 => pc = jump(regs[dst] != imm, pc),
            0x95 => return regs[0] == 1,
            other => panic!("unknown instruction {other:#x}"),
        }
    }
}

fn any_rule() -> impl Strategy<Value = Rule> {
    (any::<bool>(), 0..3u8, prop::option::of(0u32..3), prop::option::of(0u32..3), 1u32..8).prop_map(|(allow, node, major, minor, access)| Rule {
        allow,
        node: [Node::Any, Node::Block, Node::Char][usize::from(node)],
        major,
        minor,
        access,
    })
}

proptest! {
    #![proptest_config(crate::stdx::testing::cases(256))]
    #[test]
    fn program_does_what_the_rules_say(rules in prop::collection::vec(any_rule(), 0..8), block: bool, major in 0u32..3, minor in 0u32..3, access in 1u32..8) {
        let (node, kind) = if block { (Node::Block, 1) } else { (Node::Char, 2) };
        prop_assert_eq!(run(&compile(&rules), kind, major, minor, access), oracle(&rules, node, major, minor, access));
    }
}
