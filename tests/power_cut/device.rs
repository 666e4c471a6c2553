//! A disk that remembers: one file, served over the kernel's FUSE protocol, under a loop device. The loop driver sends every
//! write, and every flush of the file system above as an fsync, in the order in which a disk would see them; both are kept.
//!
//! device-mapper's log-writes target would do the same, but stock kernels of test machines lack it; FUSE they have.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Unit in which content is kept.
pub const BLOCK: usize = 4096;
/// Largest write in one message.
const MAX_WRITE: usize = 128 << 10;
/// `struct fuse_in_header` and `struct fuse_out_header` of `linux/fuse.h`.
const HEADER_IN: usize = 40;
const HEADER_OUT: usize = 16;
/// `struct fuse_read_in`, `struct fuse_write_in`.
const TRANSFER_IN: usize = 40;
/// Version of the protocol spoken here; the kernel speaks older ones.
const VERSION: (u32, u32) = (7, 31);
const BIG_WRITES: u32 = 1 << 5;
const FOPEN_KEEP_CACHE: u32 = 1 << 1;

mod op {
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

/// What a disk holds; blocks that were never written are zero.
#[derive(Clone, Default)]
pub struct Content(HashMap<u64, Box<[u8; BLOCK]>>);

impl Content {
    /// Of a file, without its empty blocks.
    pub fn of(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let mut content = Self::default();
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            // Holes of a sparse file are passed over without being read.
            let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) else { return content };
            at = data / BLOCK as u64 * BLOCK as u64;
            let n = file.read_at(&mut buffer, at).unwrap();
            for (i, chunk) in buffer[..n].chunks(BLOCK).enumerate().filter(|(_, c)| c.iter().any(|b| *b != 0)) {
                content.write(at + (i * BLOCK) as u64, chunk);
            }
            at += n as u64;
        }
    }

    /// Writes bytes anywhere.
    pub fn write(&mut self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let within = usize::try_from(offset % BLOCK as u64).unwrap();
            let n = data.len().min(BLOCK - within);
            let block = self.0.entry(offset / BLOCK as u64).or_insert_with(|| Box::new([0; BLOCK]));
            block[within..within + n].copy_from_slice(&data[..n]);
            (offset, data) = (offset + n as u64, &data[n..]);
        }
    }

    fn read(&self, offset: u64, size: usize) -> Vec<u8> {
        let mut out = vec![0; size];
        let mut done = 0;
        while done < size {
            let at = offset + done as u64;
            let within = usize::try_from(at % BLOCK as u64).unwrap();
            let n = (size - done).min(BLOCK - within);
            if let Some(block) = self.0.get(&(at / BLOCK as u64)) {
                out[done..done + n].copy_from_slice(&block[within..within + n]);
            }
            done += n;
        }
        out
    }

    /// As a sparse file of `size` bytes.
    pub fn store(&self, path: &Path, size: u64) {
        let file = File::create(path).unwrap();
        file.set_len(size).unwrap();
        for (n, block) in &self.0 {
            file.write_all_at(&block[..], n * BLOCK as u64).unwrap();
        }
    }
}

/// What reached the disk.
pub enum Entry {
    /// Bytes at an offset.
    Write(u64, Box<[u8]>),
    /// Everything before must survive a power cut from here on.
    Flush,
}

/// The disk while it is in use.
pub struct Device {
    /// The file to make a loop device of.
    pub path: PathBuf,
    shared: Arc<Mutex<Shared>>,
    server: Option<JoinHandle<()>>,
}

struct Shared {
    size: u64,
    content: Content,
    log: Vec<Entry>,
}

impl Device {
    /// Serves `content` as a file at `path`.
    pub fn serve(path: &Path, size: u64, content: Content) -> Self {
        File::create(path).unwrap();
        let fuse = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=100000,user_id=0,group_id=0", fuse.as_raw_fd());
        let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV;
        nix::mount::mount(Some("power-cut"), path, Some("fuse"), flags, Some(options.as_str())).unwrap();
        let shared = Arc::new(Mutex::new(Shared { size, content, log: Vec::new() }));
        let mine = shared.clone();
        let server = std::thread::spawn(move || serve(fuse, &mine));
        Self { path: path.to_owned(), shared, server: Some(server) }
    }

    /// How many entries there are by now.
    pub fn position(&self) -> usize {
        lock(&self.shared).log.len()
    }

    /// Ends the service; gives everything that was written and flushed. Nothing may be mounted from it any more.
    pub fn finish(mut self) -> Vec<Entry> {
        nix::mount::umount2(&self.path, nix::mount::MntFlags::MNT_DETACH).unwrap();
        self.server.take().unwrap().join().unwrap();
        std::mem::take(&mut lock(&self.shared).log)
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap()
}

/// A little-endian or big-endian number as this machine has it, at a place in a message.
fn u32_at(message: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(message[at..at + 4].try_into().unwrap())
}

fn u64_at(message: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(message[at..at + 8].try_into().unwrap())
}

/// Answers the kernel until the file is unmounted.
fn serve(mut fuse: File, shared: &Mutex<Shared>) {
    let mut buffer = vec![0; MAX_WRITE + BLOCK];
    loop {
        let n = match fuse.read(&mut buffer) {
            Ok(n) => n,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => continue,
            // Unmounted.
            Err(_) => return,
        };
        let message = &buffer[..n];
        let (opcode, body) = (u32_at(message, 4), &message[HEADER_IN..]);
        let (error, answer) = match opcode {
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT => continue,
            _ => match answer(opcode, body, &mut lock(shared)) {
                Ok(answer) => (0, answer),
                Err(errno) => (-errno, Vec::new()),
            },
        };
        let mut out = u32::try_from(HEADER_OUT + answer.len()).unwrap().to_ne_bytes().to_vec();
        out.extend(error.to_ne_bytes());
        out.extend(&message[8..16]);
        out.extend(answer);
        // Whoever asked may have been killed meanwhile.
        let _ = fuse.write_all(&out);
        if opcode == op::DESTROY {
            return;
        }
    }
}

fn answer(opcode: u32, body: &[u8], shared: &mut Shared) -> Result<Vec<u8>, i32> {
    match opcode {
        op::INIT => Ok(welcome(u32_at(body, 8))),
        op::GETATTR | op::SETATTR => Ok(attributes(shared.size)),
        op::OPEN => {
            let mut open = vec![0; 16];
            open[8..12].copy_from_slice(&FOPEN_KEEP_CACHE.to_ne_bytes());
            Ok(open)
        }
        op::READ => {
            let (offset, size) = (u64_at(body, 8), u32_at(body, 16) as usize);
            let size = size.min(usize::try_from(shared.size.saturating_sub(offset)).unwrap());
            Ok(shared.content.read(offset, size))
        }
        op::WRITE => {
            let (offset, size) = (u64_at(body, 8), u32_at(body, 16));
            let data = &body[TRANSFER_IN..TRANSFER_IN + size as usize];
            shared.content.write(offset, data);
            shared.log.push(Entry::Write(offset, data.into()));
            let mut written = size.to_ne_bytes().to_vec();
            written.extend([0; 4]);
            Ok(written)
        }
        op::FSYNC => {
            shared.log.push(Entry::Flush);
            Ok(Vec::new())
        }
        op::RELEASE | op::DESTROY => Ok(Vec::new()),
        // Discarding blocks is a disk's choice; this one does not.
        op::FALLOCATE => Err(libc::EOPNOTSUPP),
        _ => Err(libc::ENOSYS),
    }
}

/// `struct fuse_init_out`.
fn welcome(max_readahead: u32) -> Vec<u8> {
    let mut out = Vec::new();
    for number in [VERSION.0, VERSION.1, max_readahead, BIG_WRITES] {
        out.extend(number.to_ne_bytes());
    }
    // Requests in the background and their threshold of congestion.
    out.extend(16u16.to_ne_bytes());
    out.extend(12u16.to_ne_bytes());
    out.extend(u32::try_from(MAX_WRITE).unwrap().to_ne_bytes());
    out.extend(1u32.to_ne_bytes());
    out.resize(64, 0);
    out
}

/// `struct fuse_attr_out`, true for ever: nobody else changes it.
fn attributes(size: u64) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(u64::from(u32::MAX).to_ne_bytes());
    out.extend([0; 8]);
    for number in [1, size, size / 512, 0, 0, 0] {
        out.extend(number.to_ne_bytes());
    }
    out.extend([0; 12]);
    for number in [libc::S_IFREG | 0o600, 1, 0, 0, 0, u32::try_from(BLOCK).unwrap(), 0] {
        out.extend(number.to_ne_bytes());
    }
    out
}
