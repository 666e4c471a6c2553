//! The image file: hands out space and writes what goes there, nearly in one sequence.
//!
//! Data of larger files lie block after block as they arrive. Inodes and the data that fit behind them go into runs of
//! [`RUN`] bytes between, so that what a directory walk reads lies together.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::format::{BLOCK, HOLE, SLOT};
use crate::model::error::{Act, Result};
use crate::provisioner::unpack::sink::exhausted;

/// Bytes taken at once for inodes.
const RUN: u64 = 64 << 10;
/// Bytes gathered before they are written.
const BUFFER: usize = 256 << 10;
/// A last partial block up to this size goes into a block of its own only if it is larger: both ways waste at most this much.
const SPILL: u64 = BLOCK / 2;

/// Bytes on their way to consecutive offsets.
#[derive(Default)]
struct Stream {
    at: u64,
    buffer: Vec<u8>,
}

/// The file being written.
pub struct Image {
    file: File,
    data: Stream,
    meta: Stream,
    /// Everything from here on is free.
    end: u64,
    /// The free part of the current run.
    run: (u64, u64),
}

/// Where an inode goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Offset.
    pub at: u64,
    /// The tail lies behind the inode.
    pub inline: bool,
    /// Otherwise, the block that it got.
    pub block: Option<u32>,
}

impl Image {
    /// Makes the file, whose first block stays free for [`Image::finish`].
    ///
    /// # Errors
    /// I/O errors.
    pub fn create(path: &Path) -> Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path).act("create", path.display())?;
        Ok(Self { file, data: Stream::default(), meta: Stream::default(), end: BLOCK, run: (0, 0) })
    }

    /// Takes `bytes`, rounded up to blocks; returns the first block's number.
    ///
    /// # Errors
    /// `ResourceExhausted` past 16 TiB, where block numbers end.
    pub fn blocks(&mut self, bytes: u64) -> Result<u32> {
        let first = self.end / BLOCK;
        self.end += bytes.next_multiple_of(BLOCK);
        let ok = self.end / BLOCK < u64::from(HOLE);
        u32::try_from(first).ok().filter(|_| ok).ok_or_else(|| exhausted("an image of more than 16 TiB"))
    }

    /// Takes room for an inode of `head` bytes and, if it fits within the block, a partial block of `tail` bytes behind it.
    /// A tail that does not gets a block from [`Image::blocks`] here, before anything else is taken.
    ///
    /// # Errors
    /// As [`Image::blocks`].
    pub fn slot(&mut self, head: u64, tail: u64) -> Result<Slot> {
        let fits = |at: u64| (at + head) % BLOCK + tail <= BLOCK;
        let (mut at, limit) = self.run;
        let (mut inline, mut block) = (tail > 0, None);
        if inline && !(fits(at) && at + head + tail <= limit) {
            let next = at.next_multiple_of(BLOCK);
            if tail > SPILL || !fits(next) {
                inline = false;
                block = Some(self.blocks(tail)?);
            } else {
                at = next;
            }
        }
        let need = head + if inline { tail } else { 0 };
        if at + need > limit {
            // Too long for what is left: the rest of the run stays a hole.
            at = u64::from(self.blocks(RUN.max(need))?) * BLOCK;
            self.run.1 = self.end;
        }
        self.run.0 = (at + need).next_multiple_of(SLOT);
        Ok(Slot { at, inline, block })
    }

    /// Writes inodes and what lies behind them. Offsets must not go back.
    ///
    /// # Errors
    /// I/O errors.
    pub fn put_meta(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.meta.put(&self.file, at, bytes)
    }

    /// Writes data of files. Offsets must not go back.
    ///
    /// # Errors
    /// I/O errors.
    pub fn put_data(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.data.put(&self.file, at, bytes)
    }

    /// Writes at once, at any offset that has been written already.
    ///
    /// # Errors
    /// I/O errors.
    pub fn patch(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.meta.flush(&self.file)?;
        self.file.write_all_at(bytes, at).act("write", "layer image")
    }

    /// Blocks up to the last one in use.
    pub fn total(&self) -> u64 {
        // A last run is as long as what is in it.
        let end = if self.run.1 == self.end { self.run.0.next_multiple_of(BLOCK) } else { self.end };
        end.max(BLOCK) / BLOCK
    }

    /// Writes what is left and the first block; returns allocated bytes.
    ///
    /// # Errors
    /// I/O errors.
    pub fn finish(mut self, first: &[u8]) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        self.data.flush(&self.file)?;
        self.meta.flush(&self.file)?;
        self.file.set_len(self.total() * BLOCK).act("set size of", "layer image")?;
        self.file.write_all_at(first, 0).act("write", "layer image")?;
        Ok(self.file.metadata().act("stat", "layer image")?.blocks() * 512)
    }
}

impl Stream {
    fn put(&mut self, file: &File, at: u64, bytes: &[u8]) -> Result<()> {
        let next = self.at + self.buffer.len() as u64;
        match at.checked_sub(next).and_then(|gap| usize::try_from(gap).ok()) {
            // Small gaps are padding.
            Some(gap) if gap < BLOCK as usize && !self.buffer.is_empty() => self.buffer.resize(self.buffer.len() + gap, 0),
            _ => {
                self.flush(file)?;
                self.at = at;
            }
        }
        if self.buffer.is_empty() && bytes.len() >= BUFFER / 2 {
            file.write_all_at(bytes, at).act("write", "layer image")?;
            self.at = at + bytes.len() as u64;
            return Ok(());
        }
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER { self.flush(file) } else { Ok(()) }
    }

    fn flush(&mut self, file: &File) -> Result<()> {
        file.write_all_at(&self.buffer, self.at).act("write", "layer image")?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
