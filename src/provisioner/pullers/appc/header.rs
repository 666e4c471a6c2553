//! Headers of tar entries under another, shorter name: what a writer would have written who had been given that name.

use super::archive::bad;
use crate::model::error::Result;
use crate::provisioner::unpack::tar::{MAX_PATH, verify_checksum};

/// Size of a tar block.
pub const BLOCK: usize = 512;
/// Bytes of the name and of its prefix in a header (POSIX ustar).
const NAME: usize = 100;
const PREFIX: usize = 155;
/// Where Go's writer, and with it most image tools, puts extended headers.
const PAX_DIRECTORY: &[u8] = b"PaxHeaders.0";

/// Key and value of one record.
type Record = (Vec<u8>, Vec<u8>);

/// Extended headers that precede an entry.
#[derive(Default)]
pub struct Pending {
    long_name: Option<(tar::Header, Vec<u8>)>,
    long_link: Option<(tar::Header, Vec<u8>)>,
    pax: Option<(tar::Header, Vec<Record>)>,
}

/// A header whose checksum is right.
///
/// # Errors
/// `DataLoss` when it is not.
pub fn checked(block: [u8; BLOCK]) -> Result<tar::Header> {
    let header = tar::Header::from_byte_slice(&block);
    verify_checksum(header, &block)?;
    Ok(header.clone())
}

/// Whether an entry is a directory. Archives older than POSIX mark them by a slash alone.
pub fn is_directory(kind: tar::EntryType, name: &[u8]) -> bool {
    kind.is_dir() || (kind.is_file() && name.ends_with(b"/"))
}

/// Whether a directory is what one is made as when no archive speaks of it.
pub fn is_plain_directory(header: &tar::Header) -> bool {
    let owner = [header.uid(), header.gid()].into_iter().all(|id| id.is_ok_and(|id| id == 0));
    owner && header.mode().is_ok_and(|mode| mode & 0o7777 == 0o755)
}

impl Pending {
    /// Takes one more.
    ///
    /// # Errors
    /// `DataLoss` for one that is malformed, or that could be meant in two ways.
    pub fn add(&mut self, header: tar::Header, mut data: Vec<u8>) -> Result<()> {
        let again = match header.entry_type() {
            tar::EntryType::XHeader => {
                let records = records(&data)?;
                self.pax.replace((header, records)).is_some()
            }
            kind => {
                while data.last() == Some(&0) {
                    data.pop();
                }
                let to = if kind == tar::EntryType::GNULongName { &mut self.long_name } else { &mut self.long_link };
                to.replace((header, data)).is_some()
            }
        };
        let both = |long: bool, key: &[u8]| long && self.record(key).is_some();
        if again || both(self.long_name.is_some(), b"path") || both(self.long_link.is_some(), b"linkpath") {
            return Err(bad("an entry has two names"));
        }
        Ok(())
    }

    /// The last record of this key, which is the one that counts.
    fn record(&self, key: &[u8]) -> Option<&[u8]> {
        self.pax.as_ref()?.1.iter().rfind(|(k, _)| k == key).map(|(_, value)| value.as_slice())
    }

    /// The entry's size, if it is said here.
    ///
    /// # Errors
    /// `DataLoss` when it is no number.
    pub fn size(&self) -> Result<Option<u64>> {
        let parse = |value: &[u8]| std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).ok_or_else(|| bad("malformed size"));
        self.record(b"size").map(parse).transpose()
    }

    /// Whether it brings extended attributes.
    pub fn has_attributes(&self) -> bool {
        self.pax.as_ref().is_some_and(|(_, records)| records.iter().any(|(key, _)| key.windows(5).any(|w| w == b"xattr")))
    }

    /// The entry's name.
    pub fn name(&self, header: &tar::Header) -> Vec<u8> {
        let long = || self.long_name.as_ref().map(|(_, name)| name.as_slice());
        let said = self.record(b"GNU.sparse.name").or_else(|| self.record(b"path")).or_else(long);
        said.map_or_else(|| header.path_bytes().into_owned(), <[u8]>::to_vec)
    }

    /// The target of a link.
    pub fn link(&self, header: &tar::Header) -> Vec<u8> {
        let long = || self.long_link.as_ref().map(|(_, link)| link.as_slice());
        let said = self.record(b"linkpath").or_else(long);
        said.map_or_else(|| header.link_name_bytes().map(|l| l.into_owned()).unwrap_or_default(), <[u8]>::to_vec)
    }

    /// All headers of the entry, called `name` now; a hard link leads to `link` now.
    ///
    /// # Errors
    /// `DataLoss` for names that no header can hold.
    pub fn write(self, header: &tar::Header, name: &[u8], link: Option<&[u8]>) -> Result<Vec<u8>> {
        if name.len() > MAX_PATH || link.is_some_and(|l| l.len() > MAX_PATH) {
            return Err(bad("name longer than PATH_MAX"));
        }
        let mut bytes = Vec::new();
        let mut header = header.clone();
        let old = self.name(&header);
        let in_record = self.record(b"path").is_some();
        let mut split = true;
        if let Some((mut extended, mut records)) = self.pax {
            rename(&mut records, b"path", Some(name));
            rename(&mut records, b"linkpath", link);
            for (_, value) in records.iter_mut().filter(|(key, _)| key == b"GNU.sparse.name") {
                *value = name.to_vec();
            }
            if !records.is_empty() {
                let data: Vec<u8> = records.iter().flat_map(encode).collect();
                let called = extended.path_bytes().into_owned();
                let called = if called == beside(&old) { beside(name) } else { without_prefix(&called) };
                put(&mut extended.as_old_mut().name, &called);
                append(&mut bytes, extended, &data);
            }
            split = !in_record;
        }
        // With its end, as the writers do.
        for (long, text) in [(self.long_link, link), (self.long_name, Some(name))] {
            let Some((extended, kept)) = long else { continue };
            let text = text.unwrap_or(&kept);
            if text.len() > NAME {
                append(&mut bytes, extended, &[text, b"\0"].concat());
                split = false;
            }
        }
        set_name(&mut header, name, split)?;
        if let Some(link) = link {
            put(&mut header.as_old_mut().linkname, link);
        }
        seal(&mut header);
        bytes.extend_from_slice(header.as_bytes());
        Ok(bytes)
    }
}

/// Gives the records of `key` another value, or drops them when the header has room for it.
fn rename(records: &mut Vec<Record>, key: &[u8], value: Option<&[u8]>) {
    let Some(value) = value else { return };
    if value.len() <= NAME && value.is_ascii() {
        records.retain(|(k, _)| k != key);
    }
    for (_, old) in records.iter_mut().filter(|(k, _)| k == key) {
        *old = value.to_vec();
    }
}

/// Writes the name into the header, over both fields where that is needed and `split` allows it.
fn set_name(header: &mut tar::Header, name: &[u8], split: bool) -> Result<()> {
    let mut rest = name;
    let mut prefix: &[u8] = b"";
    let is_posix = header.as_ustar().is_some();
    if name.len() > NAME && split {
        let most = if name.len() > PREFIX + 1 { PREFIX + 1 } else { name.len() - usize::from(name.ends_with(b"/")) };
        let slash = name[..most].iter().rposition(|b| *b == b'/').filter(|_| is_posix).ok_or_else(|| bad("a name is longer than its header"))?;
        (prefix, rest) = (&name[..slash], &name[slash + 1..]);
        if rest.len() > NAME {
            return Err(bad("a name is longer than its header"));
        }
    }
    if let Some(posix) = header.as_ustar_mut() {
        put(&mut posix.prefix, prefix);
    }
    // Where an extended header has the name, this one is for old readers: plain letters, cut off.
    let shown: Vec<u8> = if split { rest.to_vec() } else { rest.iter().copied().filter(u8::is_ascii).collect() };
    put(&mut header.as_old_mut().name, &shown);
    Ok(())
}

fn put(field: &mut [u8], text: &[u8]) {
    let n = text.len().min(field.len());
    field.fill(0);
    field[..n].copy_from_slice(&text[..n]);
}

/// Writes the checksum as it was written: most writers end it by NUL and space, some by NUL alone.
fn seal(header: &mut tar::Header) {
    let alone = header.as_old().cksum[7] == 0;
    header.as_old_mut().cksum = [b' '; 8];
    let sum: u32 = header.as_bytes().iter().map(|b| u32::from(*b)).sum();
    let text = if alone { format!("{sum:07o}\0") } else { format!("{sum:06o}\0 ") };
    put(&mut header.as_old_mut().cksum, text.as_bytes());
}

fn append(bytes: &mut Vec<u8>, mut header: tar::Header, data: &[u8]) {
    header.set_size(data.len() as u64);
    seal(&mut header);
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
}

/// Where Go's writer puts the extended header of `name`.
fn beside(name: &[u8]) -> Vec<u8> {
    let slash = name.iter().rposition(|b| *b == b'/').map_or(0, |n| n + 1);
    let parts = name[..slash].split(|b| *b == b'/').chain([PAX_DIRECTORY, &name[slash..]]);
    let parts: Vec<&[u8]> = parts.filter(|part| !part.is_empty() && *part != b".").collect();
    let mut path: Vec<u8> = parts.join(&b'/');
    path.retain(u8::is_ascii);
    path.truncate(NAME);
    while path.last() == Some(&b'/') {
        path.pop();
    }
    path
}

fn without_prefix(path: &[u8]) -> Vec<u8> {
    match (path.strip_prefix(b"rootfs/"), path.strip_prefix(b"./rootfs/")) {
        (Some(rest), _) => rest.to_vec(),
        (_, Some(rest)) => [b"./", rest].concat(),
        _ => path.to_vec(),
    }
}

/// Takes records apart: `<length> <key>=<value>\n`, the length counting itself.
fn records(mut data: &[u8]) -> Result<Vec<Record>> {
    let malformed = || bad("malformed PAX record");
    let mut all = Vec::new();
    while !data.is_empty() {
        let space = data.iter().take(20).position(|b| *b == b' ').ok_or_else(malformed)?;
        let length: usize = std::str::from_utf8(&data[..space]).ok().and_then(|text| text.parse().ok()).ok_or_else(malformed)?;
        let record = data.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(malformed)?;
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(malformed)?;
        all.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        data = &data[length..];
    }
    Ok(all)
}

fn encode((key, value): &Record) -> Vec<u8> {
    // Space, equals sign, line end.
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}
