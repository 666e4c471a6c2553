//! Names of Appc images: an identifier, labels, maybe the id of the very image.
//!
//! As text: `appc://example.com/app:1.2?arch=amd64&os=linux@sha512-…`; all after the identifier may be missing. What is neither a
//! letter, a digit nor one of `-._~+` in a label's value is written `%XX`. A kubelet takes no such text for an image, so the same name may be written
//! as a reference of [`HOST`], a host that cannot exist (RFC 6761): `appc.invalid/example.com/app:1.2`; labels other than the
//! version then are what this machine asks for by itself.

use std::collections::BTreeMap;
use std::fmt;

use super::digest::Digest;
use super::error::{Error, Result};

/// What Appc names begin with.
pub const SCHEME: &str = "appc://";
/// Stands for the scheme where only Docker's form of references passes.
pub const HOST: &str = "appc.invalid";
/// The label that names the version.
pub const VERSION: &str = "version";
/// Version of names that say none (Mesos, simple discovery).
pub const LATEST: &str = "latest";
/// Longest identifier and longest value of a label.
const MAX_TEXT: usize = 255;
/// Most labels of a name.
const MAX_LABELS: usize = 32;

/// The name of an Appc image.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// AC identifier, `example.com/app`.
    pub name: String,
    /// Labels, `version`, `os` and `arch` among them if they are said.
    pub labels: BTreeMap<String, String>,
    /// Id of the image: SHA-512 of its uncompressed archive.
    pub id: Option<Digest>,
}

impl Name {
    /// Checks the parts.
    ///
    /// # Errors
    /// `InvalidArgument` naming the part that breaks the grammar.
    pub fn new(name: &str, labels: BTreeMap<String, String>, id: Option<Digest>) -> Result<Self> {
        if !is_identifier(name) {
            return Err(bad(name, "the name is no AC identifier (lower-case letters and digits, single - . _ ~ / between them)"));
        }
        if labels.len() > MAX_LABELS {
            return Err(bad(name, "too many labels"));
        }
        for (label, value) in &labels {
            if !is_identifier(label) || label == "name" {
                return Err(bad(name, &format!("label {:?} is none (an AC identifier other than `name`)", short(label))));
            }
            if value.is_empty() || value.len() > MAX_TEXT || value.chars().any(char::is_control) {
                return Err(bad(name, &format!("the value of label {label} is empty, too long or has control characters")));
            }
        }
        if id.as_ref().is_some_and(|id| id.algorithm() != "sha512") {
            return Err(bad(name, "the id of an appc image is a sha512"));
        }
        Ok(Self { name: name.to_owned(), labels, id })
    }

    /// Reads the text behind [`SCHEME`].
    ///
    /// # Errors
    /// As [`Name::new`].
    pub fn parse(text: &str) -> Result<Self> {
        let (rest, id) = match text.rsplit_once('@') {
            Some((rest, id)) => (rest, Some(parse_id(id).map_err(|e| e.within(format!("parse appc image name {:?}", short(text))))?)),
            None => (text, None),
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (name, version) = match path.split_once(':') {
            Some((name, version)) => (name, Some(version)),
            None => (path, None),
        };
        let mut labels = BTreeMap::new();
        let pairs = query.split('&').filter(|p| !p.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        for (label, value) in version.map(|v| (VERSION, v)).into_iter().chain(pairs) {
            let value = decode(value).ok_or_else(|| bad(text, &format!("the value of label {:?} is not percent-encoded UTF-8", short(label))))?;
            if labels.insert(label.to_owned(), value).is_some() {
                return Err(bad(text, &format!("label {:?} is said twice", short(label))));
            }
        }
        Self::new(name, labels, id)
    }

    /// The same with version, operating system and architecture, where it does not say them.
    #[must_use]
    pub fn with_defaults(&self, os: &str, arch: &str) -> Self {
        let mut full = self.clone();
        for (label, value) in [(VERSION, LATEST), ("os", os), ("arch", arch)] {
            full.labels.entry(label.to_owned()).or_insert_with(|| value.to_owned());
        }
        full
    }

    /// The same without the id.
    #[must_use]
    pub fn without_id(&self) -> Self {
        Self { id: None, ..self.clone() }
    }

    /// The same of this very image.
    #[must_use]
    pub fn with_id(&self, id: &Digest) -> Self {
        Self { id: Some(id.clone()), ..self.clone() }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.name)?;
        if let Some(version) = self.labels.get(VERSION) {
            write!(f, ":{}", encode(version))?;
        }
        let mut separator = '?';
        for (label, value) in self.labels.iter().filter(|(label, _)| *label != VERSION) {
            write!(f, "{separator}{label}={}", encode(value))?;
            separator = '&';
        }
        match &self.id {
            Some(id) => write!(f, "@sha512-{}", id.hex()),
            None => Ok(()),
        }
    }
}

/// An image id as Appc and Mesos write it, `sha512-…`; a colon does as well.
///
/// # Errors
/// `InvalidArgument` for anything but a whole SHA-512.
pub fn parse_id(text: &str) -> Result<Digest> {
    match text.strip_prefix("sha512-").or_else(|| text.strip_prefix("sha512:")) {
        Some(hex) => format!("sha512:{hex}").parse(),
        None => Err(bad(text, "an image id begins with sha512-")),
    }
}

/// `[a-z0-9]+([-._~/][a-z0-9]+)*`.
pub fn is_identifier(text: &str) -> bool {
    is_words(text, b"-._~/")
}

/// `[a-z0-9]+([-][a-z0-9]+)*`.
pub fn is_name(text: &str) -> bool {
    is_words(text, b"-")
}

fn is_words(text: &str, between: &[u8]) -> bool {
    let word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let single = bytes.windows(2).all(|pair| pair.iter().any(word));
    !bytes.is_empty()
        && bytes.len() <= MAX_TEXT
        && single
        && [bytes.first(), bytes.last()].into_iter().flatten().all(word)
        && bytes.iter().all(|b| word(b) || between.contains(b))
}

fn encode(value: &str) -> String {
    use std::fmt::Write;
    value.bytes().fold(String::with_capacity(value.len()), |mut text, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~+".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        if *first == b'%' {
            let digits = more.get(..2).filter(|d| d.iter().all(u8::is_ascii_hexdigit))?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = &more[2..];
        } else {
            bytes.push(*first);
            rest = more;
        }
    }
    String::from_utf8(bytes).ok()
}

fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

fn bad(text: &str, why: &str) -> Error {
    Error::invalid(format!("parse appc image name {:?}: {why}", short(text)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_labels_and_ids() {
        let id = "a".repeat(128);
        for (given, shown) in [
            ("example.com/app", "appc://example.com/app".to_owned()),
            ("example.com/app:1.2", "appc://example.com/app:1.2".to_owned()),
            ("a?os=linux&version=2&arch=amd64", "appc://a:2?arch=amd64&os=linux".to_owned()),
            ("a:1%2F2?x=a%20b", "appc://a:1%2F2?x=a%20b".to_owned()),
            (&format!("a@sha512-{id}"), format!("appc://a@sha512-{id}")),
            (&format!("a:1?os=linux@sha512:{id}"), format!("appc://a:1?os=linux@sha512-{id}")),
        ] {
            assert_eq!(Name::parse(given).unwrap().to_string(), shown);
        }
        let full = Name::parse("a?os=freebsd").unwrap().with_defaults("linux", "amd64");
        assert_eq!(full.to_string(), "appc://a:latest?arch=amd64&os=freebsd");
    }

    #[test]
    fn the_grammar_keeps_what_could_lead_elsewhere_out() {
        for good in ["a", "example.com/reduce-worker", "0/1~2", "a.b_c-d"] {
            assert!(is_identifier(good), "{good}");
        }
        let long = "a".repeat(256);
        for bad in ["", "A", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a b", "-a", "a-", "a_-b", "ä", "a\0", long.as_str()] {
            assert!(!is_identifier(bad), "{bad:?}");
        }
        assert!(is_name("work-dir") && !is_name("work.dir") && !is_name("work/dir"));
        let short = format!("a@sha512-{}", "a".repeat(64));
        let other = format!("a@sha256-{}", "a".repeat(64));
        for bad in ["", ":1", "a:", "a?os=", "a?name=b", "a?os=x&os=y", "a:1?version=2", "a?OS=x", "a:%zz", "a:%ff", "a:%0a", "a@", &short, &other] {
            assert!(Name::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #![proptest_config(crate::stdx::testing::cases(256))]
        #[test]
        fn never_panics_and_round_trips(text in "[a-z0-9/.~:?&=@%A-F_-]{0,40}", value in "\\PC{1,20}") {
            if let Ok(name) = Name::parse(&text) {
                let shown = name.to_string();
                prop_assert_eq!(Name::parse(shown.strip_prefix(SCHEME).unwrap()).unwrap(), name);
            }
            if let Ok(name) = Name::new("a", [("l".to_owned(), value)].into(), None) {
                let shown = name.to_string();
                prop_assert_eq!(Name::parse(shown.strip_prefix(SCHEME).unwrap()).unwrap(), name);
            }
        }
    }
}
