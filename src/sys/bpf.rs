//! `bpf(2)` for cgroup device programs: a tiny assembler, load, attach, list, detach.
//!
//! The kernel's verifier checks every program before it runs; nothing here can harm more than a refused system call.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// One instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    /// Operation.
    pub code: u8,
    /// Destination register in the low half, source in the high half.
    pub regs: u8,
    /// Jump distance or memory offset.
    pub offset: i16,
    /// Constant.
    pub imm: i32,
}

/// Registers.
pub mod reg {
    /// Result.
    pub const R0: u8 = 0;
    /// Argument: the context.
    pub const R1: u8 = 1;
    /// Scratch.
    pub const R2: u8 = 2;
    /// Scratch.
    pub const R3: u8 = 3;
    /// Scratch.
    pub const R4: u8 = 4;
    /// Scratch.
    pub const R5: u8 = 5;
}

/// `dst = *(u32 *)(src + offset)`.
pub fn load_u32(dst: u8, src: u8, offset: i16) -> Insn {
    Insn { code: 0x61, regs: dst | src << 4, offset, imm: 0 }
}

/// `dst = src`.
pub fn mov_reg(dst: u8, src: u8) -> Insn {
    Insn { code: 0xbf, regs: dst | src << 4, offset: 0, imm: 0 }
}

/// `dst = imm`.
pub fn mov_imm(dst: u8, imm: i32) -> Insn {
    Insn { code: 0xb7, regs: dst, offset: 0, imm }
}

/// `dst &= imm` (sign-extended).
pub fn and_imm(dst: u8, imm: i32) -> Insn {
    Insn { code: 0x57, regs: dst, offset: 0, imm }
}

/// `dst >>= imm`.
pub fn rsh_imm(dst: u8, imm: i32) -> Insn {
    Insn { code: 0x77, regs: dst, offset: 0, imm }
}

/// Skips `offset` instructions when `dst == imm`.
pub fn jump_if(dst: u8, imm: i32, offset: i16) -> Insn {
    Insn { code: 0x15, regs: dst, offset, imm }
}

/// Skips `offset` instructions when `dst != imm`.
pub fn jump_if_not(dst: u8, imm: i32, offset: i16) -> Insn {
    Insn { code: 0x55, regs: dst, offset, imm }
}

/// Returns R0.
pub fn exit() -> Insn {
    Insn { code: 0x95, regs: 0, offset: 0, imm: 0 }
}

// From linux/bpf.h.
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const F_ALLOW_MULTI: u32 = 2;
const NAME_LEN: usize = 16;
/// Programs on one group that are looked at; the kernel allows 64.
const MAX_ATTACHED: usize = 64;

/// `union bpf_attr` for `BPF_PROG_LOAD`, up to the last field that is needed.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; NAME_LEN],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// For `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[repr(C)]
#[derive(Default)]
struct Attach {
    target_fd: i32,
    attach_bpf_fd: i32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// For `BPF_PROG_QUERY`.
#[repr(C)]
#[derive(Default)]
struct Query {
    target_fd: i32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    pad: u32,
}

/// For `BPF_PROG_GET_FD_BY_ID`.
#[repr(C)]
#[derive(Default)]
struct GetId {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// For `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
#[derive(Default)]
struct Info {
    bpf_fd: i32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_prog_info`, up to the name.
#[repr(C)]
#[derive(Default)]
struct ProgInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_len: u32,
    xlated_len: u32,
    jited: u64,
    xlated: u64,
    load_time: u64,
    created_by_uid: u32,
    nr_map_ids: u32,
    map_ids: u64,
    name: [u8; NAME_LEN],
}

/// Calls bpf(2). `attr` must be one of the structures above, its pointers valid for the command.
fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<i32> {
    let size = size_of::<T>();
    // SAFETY: `attr` is a live, exclusively borrowed `repr(C)` structure of `size` bytes, laid out as the kernel's union for `command`;
    // the addresses in it point to buffers which the callers keep alive and whose lengths they pass along.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or(i32::MAX)) }
}

fn new_fd(raw: i32) -> OwnedFd {
    // SAFETY: `raw` was just returned by a bpf command that makes a descriptor; nobody else owns it. bpf sets close-on-exec.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

fn address<T: ?Sized>(of: *const T) -> u64 {
    of.cast::<u8>().expose_provenance() as u64
}

fn object_name(name: &str) -> [u8; NAME_LEN] {
    let mut bytes = [0; NAME_LEN];
    for (to, from) in bytes.iter_mut().take(NAME_LEN - 1).zip(name.bytes()) {
        *to = from;
    }
    bytes
}

/// Loads a cgroup device program called `name` (15 bytes are kept).
///
/// # Errors
/// `EPERM` without `CAP_BPF` or `CAP_SYS_ADMIN`, `EINVAL` when the verifier refuses or the kernel lacks cgroup BPF.
pub fn load_cgroup_device(code: &[Insn], name: &str) -> io::Result<OwnedFd> {
    // The license string lets GPL-only helpers be called; none is, but the field must hold one.
    let license = c"Apache-2.0";
    let mut attr = Load {
        prog_type: TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(code.len()).map_err(io::Error::other)?,
        insns: address(code.as_ptr()),
        license: address(license.as_ptr()),
        prog_name: object_name(name),
        expected_attach_type: ATTACH_CGROUP_DEVICE,
        ..Load::default()
    };
    bpf(PROG_LOAD, &mut attr).map(new_fd)
}

/// Attaches `program` to the v2 group behind `group`, beside programs that are attached already: an access must please all.
///
/// # Errors
/// `EPERM` when a program above was attached without allowing others.
pub fn attach_cgroup_device(group: &impl AsFd, program: &impl AsFd) -> io::Result<()> {
    let mut attr = Attach {
        target_fd: group.as_fd().as_raw_fd(),
        attach_bpf_fd: program.as_fd().as_raw_fd(),
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_flags: F_ALLOW_MULTI,
        replace_bpf_fd: 0,
    };
    bpf(PROG_ATTACH, &mut attr).map(drop)
}

/// Detaches `program` from the group.
///
/// # Errors
/// `ENOENT` when it is not attached.
pub fn detach_cgroup_device(group: &impl AsFd, program: &impl AsFd) -> io::Result<()> {
    let mut attr =
        Attach { target_fd: group.as_fd().as_raw_fd(), attach_bpf_fd: program.as_fd().as_raw_fd(), attach_type: ATTACH_CGROUP_DEVICE, ..Attach::default() };
    bpf(PROG_DETACH, &mut attr).map(drop)
}

/// The device programs called `name` that are attached to this very group (not to those above).
///
/// # Errors
/// What the kernel refuses.
pub fn attached_cgroup_device(group: &impl AsFd, name: &str) -> io::Result<Vec<OwnedFd>> {
    let mut ids = [0u32; MAX_ATTACHED];
    let mut attr = Query {
        target_fd: group.as_fd().as_raw_fd(),
        attach_type: ATTACH_CGROUP_DEVICE,
        prog_ids: address(ids.as_mut_ptr().cast_const()),
        prog_cnt: u32::try_from(MAX_ATTACHED).unwrap_or(0),
        ..Query::default()
    };
    bpf(PROG_QUERY, &mut attr)?;
    let wanted = object_name(name);
    let mut found = Vec::new();
    for id in ids.iter().take(attr.prog_cnt as usize) {
        // One that was detached a moment ago has no descriptor any more.
        let Ok(program) = bpf(PROG_GET_FD_BY_ID, &mut GetId { id: *id, ..GetId::default() }).map(new_fd) else { continue };
        if program_name(&program)? == wanted {
            found.push(program);
        }
    }
    Ok(found)
}

fn program_name(program: &OwnedFd) -> io::Result<[u8; NAME_LEN]> {
    let mut info = ProgInfo::default();
    let len = u32::try_from(size_of::<ProgInfo>()).unwrap_or(0);
    bpf(OBJ_GET_INFO_BY_FD, &mut Info { bpf_fd: program.as_raw_fd(), info_len: len, info: address(std::ptr::from_mut(&mut info).cast_const()) })?;
    Ok(info.name)
}
