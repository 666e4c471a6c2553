//! Which user, group and further groups the first process gets (cri-behaviour §11), from the request, the image's `USER` and the
//! image's `/etc/passwd` and `/etc/group`.
//!
//! Numbers that do not fit are errors, never another number (attack case 16); a text of digits is always a number, so that a
//! line of the image's passwd cannot make it another user than the one an admission check saw.

use std::path::{Path, PathBuf};

use oci_spec::runtime::User;

use super::lookup;
use crate::model::container::UserSpec;
use crate::model::error::{Error, Result};

/// Largest `passwd` and `group` file that is read; real ones have some kilobytes (attack case 17).
const MAX_FILE: u64 = 1 << 20;
/// Largest id taken from an image: what fits a signed 32-bit number everywhere.
const MAX_IMAGE_ID: u32 = i32::MAX.cast_unsigned();
/// `(uid_t)-1`: to system calls it means "leave it as it is".
const NO_ID: u32 = u32::MAX;

/// Resolves the user of a container. `layers` are the image's files, topmost first.
///
/// # Errors
/// `InvalidArgument` for unknown names, malformed numbers, a group without a user, and hostile files.
pub fn resolve(asked: &UserSpec, image_user: &str, layers: &[PathBuf]) -> Result<User> {
    let (who, group) = wanted(asked, image_user)?;
    let mut passwd = File::new("/etc/passwd", layers);
    let mut groups = File::new("/etc/group", layers);
    let entry = match &who {
        Id::Number(uid) => passwd.find(|line| (line.number(2) == Some(*uid)).then(|| Passwd::of(line)))?.transpose()?,
        Id::Name(name) => Some(
            passwd
                .find(|line| (line.field(0) == Some(name)).then(|| Passwd::of(line)))?
                .transpose()?
                .ok_or_else(|| Error::invalid(format!("user {name:?} is not in the image's /etc/passwd")))?,
        ),
    };
    let uid = match (&who, &entry) {
        (Id::Number(uid), _) => *uid,
        (Id::Name(_), entry) => entry.as_ref().map(|e| e.uid).unwrap_or_default(),
    };
    let gid = match group {
        Some(Id::Number(gid)) => gid,
        Some(Id::Name(name)) => groups
            .find(|line| (line.field(0) == Some(&name)).then(|| line.id(2, "group")))?
            .transpose()?
            .ok_or_else(|| Error::invalid(format!("group {name:?} is not in the image's /etc/group")))?,
        None => entry.as_ref().map_or(0, |e| e.gid),
    };
    if uid == NO_ID || gid == NO_ID || asked.supplemental_groups.contains(&NO_ID) {
        return Err(Error::invalid(format!("user or group {NO_ID} is none")));
    }
    let mut all = vec![gid];
    if !asked.strict_groups
        && let Some(entry) = &entry
    {
        groups.each(|line| {
            // A line that is malformed makes nobody a member.
            if line.field(3).is_some_and(|members| members.split(',').any(|m| m == entry.name))
                && let Some(gid) = line.number(2).filter(|gid| *gid <= MAX_IMAGE_ID)
            {
                all.push(gid);
            }
            None::<()>
        })?;
    }
    all.extend(&asked.supplemental_groups);
    let mut seen = std::collections::HashSet::new();
    all.retain(|gid| seen.insert(*gid));
    let mut user = User::default();
    user.set_uid(uid).set_gid(gid).set_additional_gids(Some(all));
    Ok(user)
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Id {
    Number(u32),
    Name(String),
}

impl Id {
    /// A text of digits, with or without a sign, is a number or an error; anything else is a name.
    fn parse(what: &str, text: &str) -> Result<Self> {
        let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
        if digits.is_empty() || text.contains(['\n', '\r', '\0', ':']) {
            return Err(Error::invalid(format!("{what} {text:?} is neither a name nor a number")));
        }
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Ok(Self::Name(text.to_owned()));
        }
        match text.parse::<u32>() {
            Ok(id) if id <= MAX_IMAGE_ID && digits.len() == text.len() => Ok(Self::Number(id)),
            _ => Err(Error::invalid(format!("{what} {text:?} is not a number between 0 and {MAX_IMAGE_ID}"))),
        }
    }
}

/// The user and maybe group to look for. The image's are used only when the request names no user at all.
fn wanted(asked: &UserSpec, image_user: &str) -> Result<(Id, Option<Id>)> {
    let who = match (asked.uid, asked.username.as_deref().filter(|n| !n.is_empty())) {
        (Some(uid), _) => Some(Id::Number(uid)),
        (None, Some(name)) => Some(Id::parse("user", name)?),
        (None, None) => None,
    };
    if asked.gid.is_some() && who.is_none() {
        return Err(Error::invalid("a group needs a user: run_as_group without run_as_user or run_as_username"));
    }
    if let Some(who) = who {
        return Ok((who, asked.gid.map(Id::Number)));
    }
    let (user, group) = match image_user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (image_user, None),
    };
    let user = if user.is_empty() { Id::Number(0) } else { Id::parse("the image's user", user)? };
    let group = group.filter(|g| !g.is_empty()).map(|g| Id::parse("the image's group", g)).transpose()?;
    Ok((user, group))
}

struct Passwd {
    name: String,
    uid: u32,
    gid: u32,
}

impl Passwd {
    fn of(line: &Line<'_>) -> Result<Self> {
        Ok(Self { name: line.field(0).unwrap_or_default().to_owned(), uid: line.id(2, "user")?, gid: line.id(3, "group")? })
    }
}

/// A file of colon separated lines, read when the first line is looked at.
struct File<'a> {
    path: &'static str,
    layers: &'a [PathBuf],
    text: Option<Vec<u8>>,
}

impl<'a> File<'a> {
    fn new(path: &'static str, layers: &'a [PathBuf]) -> Self {
        Self { path, layers, text: None }
    }

    /// The first line that `pick` takes.
    fn find<T>(&mut self, mut pick: impl FnMut(&Line<'_>) -> Option<T>) -> Result<Option<T>> {
        if self.text.is_none() {
            self.text = Some(lookup::read(self.layers, Path::new(self.path), MAX_FILE)?.unwrap_or_default());
        }
        let text = self.text.as_deref().unwrap_or_default();
        // Lines that are not UTF-8 name nobody that a request could name.
        let mut lines = text.split(|b| *b == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
        Ok(lines.find_map(|line| pick(&Line(line.trim_end_matches('\r')))))
    }

    fn each(&mut self, see: impl FnMut(&Line<'_>) -> Option<()>) -> Result<()> {
        self.find(see).map(|_| ())
    }
}

struct Line<'a>(&'a str);

impl Line<'_> {
    fn field(&self, n: usize) -> Option<&str> {
        self.0.split(':').nth(n)
    }

    /// Digits that fit 32 bits.
    fn number(&self, n: usize) -> Option<u32> {
        self.field(n).filter(|f| f.bytes().all(|b| b.is_ascii_digit())).and_then(|f| f.parse().ok())
    }

    /// An id of the line that was asked for: malformed or too large is an error, not another id.
    fn id(&self, n: usize, what: &str) -> Result<u32> {
        let id = self.number(n).filter(|id| *id <= MAX_IMAGE_ID);
        id.ok_or_else(|| Error::invalid(format!("the image's {what} {:?} has no valid number", self.field(0).unwrap_or_default())))
    }
}

#[cfg(test)]
mod tests;
