//! The log file format of the CRI: `<RFC 3339 time> <stdout|stderr> <P|F> <content>\n` (cri-behaviour §9).
//!
//! [`Framer`] cuts one stream into lines and keeps the unfinished one; [`LogFile`] is the file both streams share. Whoever
//! reads the process's output (our shim, or the daemon for shims that cannot) uses both. No buffer lives longer than a call
//! except an unfinished line, so a quiet stream costs nothing.

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Prefix of a stdio address that asks for this format; an absolute path follows.
pub const SCHEME: &str = "cri-log://";
/// Longest content of one line; what is longer is cut into pieces of exactly this size. The value readers expect.
pub const MAX_LINE: usize = 16384;
/// Bytes of a time such as `2016-10-06T00:17:09.669794202Z`.
const STAMP: usize = 30;
/// Bytes around the content: time, three blanks, stream name (6), tag, newline.
const FRAME: usize = STAMP + 3 + 6 + 1 + 1;
/// Smallest buffer a [`Batch`] works with: one line of any length, and the newline that repairs a torn one.
pub const MIN_BATCH: usize = MAX_LINE + FRAME + 1;

/// Which of the process's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, and everything of a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Stdout => b"stdout",
            Self::Stderr => b"stderr",
        }
    }
}

/// A log file, opened for appending. Its writes are whole lines; errors are counted and survived: the process must be able
/// to go on writing whatever becomes of its log.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    /// `None` until it could be opened.
    file: Option<File>,
    /// The last write ended inside a line.
    torn: bool,
    /// Bytes that could not be written since the file was opened.
    lost: u64,
}

impl LogFile {
    /// Opens (makes) the file, mode 0640, and its directory, mode 0755.
    ///
    /// # Errors
    /// What the kernel says of the directory or the file.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: Some(open_append(path)?), torn: false, lost: 0 })
    }

    /// A log that cannot be opened now, of a process that runs already: every write tries again, and what comes until then is lost.
    pub fn unopened(path: &Path) -> Self {
        Self { path: path.to_owned(), file: None, torn: false, lost: 0 }
    }

    /// Starts a new file at the same path (after a rotation renamed the old one). On failure the old one stays in use.
    ///
    /// # Errors
    /// As [`LogFile::open`].
    pub fn reopen(&mut self) -> std::io::Result<()> {
        self.file = Some(open_append(&self.path)?);
        self.torn = false;
        self.lost = 0;
        Ok(())
    }

    /// Bytes that could not be written since the file was opened.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Appends whole lines with one write(2) where the kernel takes them all.
    fn append(&mut self, lines: &[u8]) {
        let mut rest = lines;
        if self.file.is_none() {
            self.file = open_append(&self.path).ok();
        }
        while let Some(file) = self.file.as_mut().filter(|_| !rest.is_empty()) {
            match file.write(rest) {
                Ok(n) if n > 0 => rest = &rest[n..],
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // No space, or the like: drop the rest and go on. If part of it went out, the next line starts a new one.
                Ok(_) | Err(_) => break,
            }
        }
        let written = lines.len() - rest.len();
        if let Some(last) = written.checked_sub(1).and_then(|n| lines.get(n)) {
            self.torn = *last != b'\n';
        }
        self.lost += rest.len() as u64;
    }
}

fn open_append(path: &Path) -> std::io::Result<File> {
    let open = || std::fs::OpenOptions::new().append(true).create(true).mode(0o640).open(path);
    match open() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            if let Some(dir) = path.parent() {
                std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
            }
            open()
        }
        result => result,
    }
}

/// Lines on their way to a file, gathered in a lent buffer. Whole lines only ever leave it; dropping it writes the rest.
#[derive(Debug)]
pub struct Batch<'a> {
    buffer: &'a mut [u8],
    used: usize,
    file: &'a mut LogFile,
    stamp: [u8; STAMP],
}

impl<'a> Batch<'a> {
    /// Starts a batch whose lines carry the time `now`, nanoseconds since the epoch. `buffer` has at least [`MIN_BATCH`] bytes.
    pub fn new(buffer: &'a mut [u8], file: &'a mut LogFile, now: i64) -> Self {
        Self { buffer, used: 0, file, stamp: stamp(now) }
    }

    fn line(&mut self, stream: Stream, tag: u8, content: &[u8]) {
        let need = FRAME + content.len() + 1;
        if self.buffer.len() - self.used < need {
            self.flush();
        }
        if self.used == 0 && self.file.torn {
            self.put(b"\n");
        }
        let stamp = self.stamp;
        self.put(&stamp);
        self.put(b" ");
        self.put(stream.name());
        self.put(&[b' ', tag, b' ']);
        self.put(content);
        self.put(b"\n");
    }

    fn put(&mut self, bytes: &[u8]) {
        let end = self.used + bytes.len();
        if let Some(room) = self.buffer.get_mut(self.used..end) {
            room.copy_from_slice(bytes);
            self.used = end;
        }
    }

    fn flush(&mut self) {
        self.file.append(&self.buffer[..self.used]);
        self.used = 0;
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Cuts one stream into log lines.
#[derive(Debug)]
pub struct Framer {
    stream: Stream,
    /// The unfinished line, at most [`MAX_LINE`] + 1 bytes (that one may be the `\r` of a coming `\r\n`).
    held: Vec<u8>,
}

impl Framer {
    /// At the start of a stream.
    pub fn new(stream: Stream) -> Self {
        Self { stream, held: Vec::new() }
    }

    /// Takes the next bytes of the stream and puts what they complete into `batch`.
    pub fn push(&mut self, data: &[u8], batch: &mut Batch<'_>) {
        let mut rest = data;
        while !rest.is_empty() {
            let start = rest;
            // The one memchr that std offers. Reading from a slice cannot fail.
            let n = rest.skip_until(b'\n').unwrap_or(start.len());
            match start[..n].strip_suffix(b"\n") {
                Some(line) => self.complete(line, batch),
                None => self.hold(&start[..n], batch),
            }
        }
    }

    /// The stream has ended: an unfinished line is written as a partial one.
    pub fn finish(&mut self, batch: &mut Batch<'_>) {
        let held = std::mem::take(&mut self.held);
        for piece in held.chunks(MAX_LINE) {
            batch.line(self.stream, b'P', piece);
        }
    }

    fn complete(&mut self, line: &[u8], batch: &mut Batch<'_>) {
        if self.held.is_empty() {
            let mut line = line.strip_suffix(b"\r").unwrap_or(line);
            while line.len() > MAX_LINE {
                let (piece, rest) = line.split_at(MAX_LINE);
                batch.line(self.stream, b'P', piece);
                line = rest;
            }
            batch.line(self.stream, b'F', line);
        } else {
            self.hold(line, batch);
            let held = std::mem::take(&mut self.held);
            batch.line(self.stream, b'F', held.strip_suffix(b"\r").unwrap_or(&held));
        }
    }

    fn hold(&mut self, mut data: &[u8], batch: &mut Batch<'_>) {
        while !data.is_empty() {
            let take = data.len().min(MAX_LINE + 2 - self.held.len());
            self.held.extend_from_slice(&data[..take]);
            data = &data[take..];
            // One byte too many decides, unless it may be the first half of `\r\n`.
            if self.held.len() > MAX_LINE + 1 || self.held.get(MAX_LINE).is_some_and(|b| *b != b'\r') {
                batch.line(self.stream, b'P', &self.held[..MAX_LINE]);
                self.held.drain(..MAX_LINE);
            }
        }
    }
}

/// `2016-10-06T00:17:09.669794202Z`.
fn stamp(now: i64) -> [u8; STAMP] {
    let (seconds, nanos) = (now.div_euclid(1_000_000_000), now.rem_euclid(1_000_000_000));
    let (days, of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    digits(&mut text[0..4], year);
    digits(&mut text[5..7], month);
    digits(&mut text[8..10], day);
    digits(&mut text[11..13], of_day / 3600);
    digits(&mut text[14..16], of_day / 60 % 60);
    digits(&mut text[17..19], of_day % 60);
    digits(&mut text[20..29], nanos);
    text
}

fn digits(field: &mut [u8], mut value: i64) {
    for place in field.iter_mut().rev() {
        // A remainder of ten fits.
        *place = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Days since 1970-01-01 to year, month, day in the proleptic Gregorian calendar: years start in March, so that the leap day
/// is the last of the year, and 400 years (146,097 days) repeat.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
#[path = "crilog/tests.rs"]
mod tests;
