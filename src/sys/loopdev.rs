//! Loop devices: a file as a block device, for kernels that mount no file directly.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82_u32 as libc::Ioctl;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a_u32 as libc::Ioctl;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Attempts to get a free device before someone else does.
const ATTEMPTS: usize = 64;

/// `struct loop_config` of `linux/loop.h`, `struct loop_info64` within it.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    /// `lo_device`, `lo_inode`, `lo_rdevice`, `lo_offset`, `lo_sizelimit`.
    numbers: [u64; 5],
    /// `lo_number`, `lo_encrypt_type`, `lo_encrypt_key_size`.
    small: [u32; 3],
    flags: u32,
    /// `lo_file_name`, `lo_crypt_name`, `lo_encrypt_key`.
    names: [u8; 64 + 64 + 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// Attaches `file` read-only to a free device. The device goes when the file returned is closed and nothing is mounted from it.
///
/// # Errors
/// Those of `/dev/loop-control` and the device; `EBUSY` when others take every device first. Linux >= 5.8.
pub fn attach(file: BorrowedFd<'_>) -> io::Result<(File, PathBuf)> {
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        // SAFETY: the request takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = File::options().read(true).open(&path)?;
        let config = Config {
            fd: file.as_fd().as_raw_fd().unsigned_abs(),
            block_size: 0,
            numbers: [0; 5],
            small: [0; 3],
            flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR,
            names: [0; 160],
            init: [0; 2],
            reserved: [0; 8],
        };
        // SAFETY: the structure has the layout of the request and lives for the call, which only reads it.
        let r = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, std::ptr::from_ref(&config)) };
        if r == 0 {
            return Ok((device, path));
        }
        let e = io::Error::last_os_error();
        if e.raw_os_error() != Some(libc::EBUSY) {
            return Err(e);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}
