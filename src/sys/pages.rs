//! Private memory whose pages go back to the kernel while it is not used.

#![allow(unsafe_code)]

use std::ptr::NonNull;

/// An anonymous mapping. Untouched pages cost nothing; [`Pages::release`] makes all pages untouched again.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to this value alone and is plain memory, as a `Box<[u8]>` is.
unsafe impl Send for Pages {}

impl Pages {
    /// Maps `length` bytes of zeros.
    ///
    /// # Errors
    /// `ENOMEM` from mmap(2), `EINVAL` for a zero length.
    pub fn map(length: usize) -> std::io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, length })
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `start` points to `length` readable, writable, initialised (zeroed) bytes that live until drop, borrowed uniquely through `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }

    /// Gives the pages back; the bytes read as zeros afterwards.
    pub fn release(&mut self) {
        // SAFETY: the range is exactly our own mapping; the content is given up by contract, zeros remain initialised bytes.
        let _ = unsafe { libc::madvise(self.start.as_ptr().cast(), self.length, libc::MADV_DONTNEED) };
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range is exactly our own mapping and nothing can borrow it any more.
        let _ = unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_read_as_zeros() {
        let mut pages = Pages::map(10_000).unwrap();
        pages.bytes().fill(7);
        assert!(pages.bytes().iter().all(|b| *b == 7));
        pages.release();
        assert!(pages.bytes().iter().all(|b| *b == 0));
    }

    #[test]
    fn nothing_cannot_be_mapped() {
        assert!(Pages::map(0).is_err());
    }
}
