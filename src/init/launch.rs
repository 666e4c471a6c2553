//! The program to come: its arguments, environment and where it may lie, all made while allocating is still free of risk.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{FileType, OFlags};

use super::fault::{Fault, Result};
use super::resolve;
use super::stage2::Child;
use crate::sys::process::{Image, execute};

/// Directories that are searched when the environment has no `PATH`.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bytes of `/etc/passwd` that are read: some thousand users, and no image's gigabyte.
const PASSWD_MAX: u64 = 1 << 20;

/// What execve gets.
pub(super) struct Program {
    /// Paths to try, in order.
    candidates: Vec<CString>,
    args: Image,
    env: Image,
    name: String,
}

/// The step, before the root changes: arguments, environment with `HOME`, paths to search.
pub(super) fn prepare(child: &mut Child<'_>) -> Result {
    let args = child.process.args().as_deref().unwrap_or_default();
    let Some(name) = args.first().filter(|a| !a.is_empty()) else {
        return Err(Fault::new("empty command", libc::EINVAL));
    };
    let given = child.process.env().iter().flatten().map(String::as_bytes);
    let mut env: Vec<Vec<u8>> = given.map(<[u8]>::to_vec).collect();
    // Of execs too, whose process is the container's with other words; what such a process says itself goes first.
    for variable in &child.bundle.extras.env_bytes {
        let name = variable.split_inclusive(|b| *b == b'=').next().unwrap_or_default();
        if !env.iter().any(|e| e.starts_with(name)) {
            env.push(variable.clone());
        }
    }
    if !env.iter().any(|e| e.starts_with(b"HOME=") && e.len() > b"HOME=".len()) {
        env.retain(|e| !e.starts_with(b"HOME="));
        let home = home(child.root.as_fd(), child.process.user().uid()).unwrap_or_else(|| b"/".to_vec());
        env.push([b"HOME=", home.as_slice()].concat());
    }
    let path = env.iter().rev().find_map(|e| e.strip_prefix(b"PATH=")).unwrap_or(DEFAULT_PATH);
    let candidates = if name.contains('/') {
        vec![c_string(name.as_bytes())?]
    } else {
        // An empty element means the working directory; an absolute path is all we search.
        path.split(|b| *b == b':').filter(|d| d.starts_with(b"/")).map(|d| c_string(&[d, b"/", name.as_bytes()].concat())).collect::<Result<_>>()?
    };
    let args_image = Image::new(args.iter().map(|a| c_string(a.as_bytes())).collect::<Result<_>>()?);
    let env = Image::new(env.iter().map(|e| c_string(e)).collect::<Result<_>>()?);
    child.program = Some(Program { candidates, args: args_image, env, name: name.clone() });
    Ok(())
}

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| Fault::new(String::from_utf8_lossy(bytes), libc::EINVAL))
}

impl Program {
    /// Becomes the program; what comes back says why not.
    pub(super) fn run(&self) -> Fault {
        let mut errno = libc::ENOENT;
        for path in &self.candidates {
            match execute(path, &self.args, &self.env).raw_os_error().unwrap_or(libc::EIO) {
                // Not here; maybe in the next directory. A file that may not be run is remembered.
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => errno = libc::EACCES,
                other => return Fault::new(&self.name, other),
            }
        }
        Fault::new(&self.name, errno)
    }
}

/// The user's home in the container's `/etc/passwd`. A file the image controls: no link, fifo or device is opened, no more than
/// a limit is read, and a value with control characters is none.
fn home(root: BorrowedFd<'_>, uid: u32) -> Option<Vec<u8>> {
    let fd = resolve::open(root, Path::new("/etc/passwd"), OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).ok()?;
    if FileType::from_raw_mode(rustix::fs::fstat(&fd).ok()?.st_mode) != FileType::RegularFile {
        return None;
    }
    let mut text = Vec::new();
    std::fs::File::from(fd).take(PASSWD_MAX).read_to_end(&mut text).ok()?;
    find_home(&text, uid)
}

fn find_home(passwd: &[u8], uid: u32) -> Option<Vec<u8>> {
    let uid = uid.to_string();
    let line = passwd.split(|b| *b == b'\n').map(|line| line.split(|b| *b == b':').collect::<Vec<_>>());
    let home = line.into_iter().find(|f| f.get(2) == Some(&uid.as_bytes()))?.get(5)?.to_vec();
    (home.starts_with(b"/") && !home.iter().any(u8::is_ascii_control)).then_some(home)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_the_sixth_field_of_the_users_line() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nx:x:10:10::/home/x:/bin/sh\nbad:x:11:11::/a\rb:/bin/sh\nshort:x:12\n";
        assert_eq!(find_home(passwd, 0).as_deref(), Some(&b"/root"[..]));
        assert_eq!(find_home(passwd, 10).as_deref(), Some(&b"/home/x"[..]));
        assert_eq!(find_home(passwd, 11), None);
        assert_eq!(find_home(passwd, 12), None);
        assert_eq!(find_home(passwd, 1), None);
    }
}
