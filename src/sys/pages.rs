//! Memory that goes back to the kernel while it is not used.

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

/// Unmaps the pages of this program's text until they are run again, and returns how many bytes were looked at.
///
/// Half of a daemon's text runs at start only (flags, configuration, first probes), and the kernel maps sixteen pages around each
/// one that is touched; all that stays charged to the process until memory runs short. Afterwards it has what it runs.
/// Costs one minor fault for each 64 KiB of text that is used again.
///
/// # Errors
/// When `/proc/self/maps` cannot be read.
pub fn forget_text() -> std::io::Result<usize> {
    let program = std::fs::read_link("/proc/self/exe")?;
    let mut forgotten = 0;
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let Some((start, length)) = text_of(line, &program) else { continue };
        // SAFETY: the range is a private mapping of a file that is executable and not writable, so that its pages are equal to
        // the file's and the next access reads them from there.
        if unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) } == 0 {
            forgotten += length;
        }
    }
    Ok(forgotten)
}

/// Start and length of the mapping in a line of `/proc/PID/maps` if it is text of `program`: executable and never written. Its
/// other read-only mappings may have been relocated, and forgetting them would undo that.
fn text_of(line: &str, program: &std::path::Path) -> Option<(usize, usize)> {
    let mut columns = line.split_ascii_whitespace();
    let (start, end) = columns.next()?.split_once('-')?;
    if columns.next()? != "r-xp" || std::path::Path::new(columns.nth(3)?) != program {
        return None;
    }
    let start = usize::from_str_radix(start, 16).ok()?;
    Some((start, usize::from_str_radix(end, 16).ok()?.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_what_runs_and_is_not_written() {
        let program = std::path::Path::new("/a/b");
        let text = |line| text_of(line, program);
        assert_eq!(text("1000-3000 r-xp 00001000 fe:00 42    /a/b"), Some((0x1000, 0x2000)));
        assert_eq!(text("1000-3000 r--p 00001000 fe:00 42    /a/b"), None);
        assert_eq!(text("1000-3000 rwxp 00001000 fe:00 42    /a/b"), None);
        assert_eq!(text("1000-3000 r-xp 00001000 fe:00 42    /a/c"), None);
        assert_eq!(text("1000-3000 r-xp 00000000 00:00 0"), None);
    }

    /// What stays mapped afterwards is what the reading itself ran.
    #[test]
    fn forgotten_text_comes_back_when_it_runs() {
        let resident = || -> usize {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let program = std::fs::read_link("/proc/self/exe").unwrap();
            let mut lines = smaps.lines();
            lines.find(|l| text_of(l, &program).is_some()).unwrap();
            let rss = lines.find_map(|l| l.strip_prefix("Rss:")).unwrap();
            rss.trim().trim_end_matches(" kB").parse().unwrap()
        };
        // Touches much of it.
        let _ = some_work();
        let before = resident();
        assert!(forget_text().unwrap() > 0);
        let after = resident();
        assert!(after < before, "{after} KiB, before {before} KiB");
        assert_eq!(some_work(), 3);
    }

    fn some_work() -> usize {
        let words: std::collections::BTreeMap<_, _> = "one two three".split(' ').map(|w| (w.to_owned(), format!("{w:?}"))).collect();
        words.len()
    }

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
