//! Image references: `[host[:port]/]path[:tag][@digest]`, normalised as Docker does (cri-behaviour §13.1), and names of Appc images
//! ([`super::appc`]).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::appc;
use super::digest::Digest;
use super::error::Error;

/// Longest reference taken; the distribution specification allows names of 255 characters.
const MAX_LEN: usize = 1024;

/// A full reference: registry, repository and at least one of tag and digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
    written: Written,
    /// Set when it names an Appc image: then this is the name, and the other parts say the same in Docker's words.
    appc: Option<Box<appc::Name>>,
}

/// How a name was written: what it leaves open, settings may decide. No part of what the reference is.
#[derive(Clone, Copy, Debug)]
enum Written {
    /// With a host.
    Full,
    /// `a/b`.
    Path,
    /// `a`.
    Bare,
}

impl PartialEq for Written {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Written {}

impl std::hash::Hash for Written {
    fn hash<H: std::hash::Hasher>(&self, _: &mut H) {}
}

impl PartialOrd for Written {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Written {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

impl Reference {
    /// The repository as it was written, if that was without a host: `busybox`, `library/busybox`.
    pub fn written_short(&self) -> Option<&str> {
        match self.written {
            Written::Full => None,
            Written::Path => Some(&self.repository),
            Written::Bare => Some(self.repository.strip_prefix("library/").unwrap_or(&self.repository)),
        }
    }

    /// The Appc image that it names, if it does.
    pub fn appc(&self) -> Option<&appc::Name> {
        self.appc.as_deref()
    }

    /// The same, as if written in full.
    #[must_use]
    pub fn settled(&self) -> Self {
        Self { written: Written::Full, ..self.clone() }
    }

    /// The same tag and digest of another repository.
    #[must_use]
    pub fn renamed(&self, registry: &str, repository: &str) -> Self {
        let (tag, digest) = (self.tag.clone(), self.digest.clone());
        Self { registry: registry.to_owned(), repository: repository.to_owned(), tag, digest, written: Written::Full, appc: None }
    }

    /// `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Tag, `latest` when neither tag nor digest was written.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Digest of the manifest or index; wins over the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// What a pull of this records under `repo_tags`: nothing when pulled by digest.
    pub fn repo_tag(&self) -> Option<String> {
        match (&self.tag, &self.digest) {
            _ if self.appc.is_some() => self.appc().map(|name| name.without_id().to_string()),
            (Some(tag), None) => Some(format!("{}:{tag}", self.name())),
            _ => None,
        }
    }

    /// What it records under `repo_digests`, given the digest the registry served.
    pub fn repo_digest(&self, served: &Digest) -> String {
        match self.appc() {
            Some(name) => name.with_id(served).to_string(),
            None => format!("{}@{served}", self.name()),
        }
    }
}

impl From<appc::Name> for Reference {
    fn from(name: appc::Name) -> Self {
        Self {
            registry: appc::HOST.to_owned(),
            repository: name.name.clone(),
            tag: name.labels.get(appc::VERSION).cloned(),
            digest: name.id.clone(),
            written: Written::Full,
            appc: Some(Box::new(name)),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::invalid(format!("parse image reference {:?}: {why}", s.chars().take(80).collect::<String>()));
        if s.is_empty() || s.len() > MAX_LEN {
            return Err(bad("empty or too long"));
        }
        if let Some(name) = s.strip_prefix(appc::SCHEME).or_else(|| s.strip_prefix(appc::HOST)?.strip_prefix('/')) {
            return appc::Name::parse(name).map(Self::from);
        }
        let (rest, digest) = match s.split_once('@') {
            Some((rest, d)) => (rest, Some(d.parse::<Digest>().map_err(|e| e.within(format!("parse image reference {s:?}")))?)),
            None => (s, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag.to_owned())),
            _ => (rest, None),
        };
        if let Some(tag) = &tag {
            let ok = !tag.is_empty()
                && tag.len() <= 128
                && !tag.starts_with(['.', '-'])
                && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
            if !ok {
                return Err(bad("malformed tag"));
            }
        }
        let (registry, path, written) = match name.split_once('/') {
            Some((host, path)) if host == "localhost" || host.contains(['.', ':']) => (host, path, Written::Full),
            Some(_) => ("docker.io", name, Written::Path),
            None => ("docker.io", name, Written::Bare),
        };
        let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
        if !valid_host(registry) {
            return Err(bad("malformed registry host"));
        }
        if path.is_empty() || path.len() > 255 || !path.split('/').all(valid_component) {
            return Err(bad("malformed repository name (lower case letters, digits and . _ - between them)"));
        }
        let repository = if registry == "docker.io" && !path.contains('/') { format!("library/{path}") } else { path.to_owned() };
        let tag = if tag.is_none() && digest.is_none() { Some("latest".to_owned()) } else { tag };
        Ok(Self { registry: registry.to_owned(), repository, tag, digest, written, appc: None })
    }
}

fn valid_host(host: &str) -> bool {
    !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']' | b'_')) && !host.starts_with(['-', '.'])
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` (distribution specification, repository names).
fn valid_component(c: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = c.as_bytes();
    edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| edge(Some(b)) || matches!(b, b'.' | b'_' | b'-'))
        && !c.contains("..")
        && !c.contains("___")
}

impl TryFrom<String> for Reference {
    type Error = Error;
    fn try_from(s: String) -> Result<Self, Error> {
        s.parse()
    }
}

impl From<Reference> for String {
    fn from(r: Reference) -> Self {
        r.to_string()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = self.appc() {
            return name.fmt(f);
        }
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn normalises_like_docker() {
        for (given, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("a/b", "docker.io/a/b:latest"),
            ("index.docker.io/a/b:x", "docker.io/a/b:x"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x/y:t", "localhost:5000/x/y:t"),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
        ] {
            assert_eq!(given.parse::<Reference>().unwrap().to_string(), full);
        }
    }

    #[test]
    fn remembers_what_was_not_written() {
        for (given, short) in [("busybox:1", Some("busybox")), ("library/busybox", Some("library/busybox")), ("a/b", Some("a/b")), ("quay.io/a", None)] {
            let reference: Reference = given.parse().unwrap();
            assert_eq!(reference.written_short(), short);
            assert_eq!(reference.settled(), reference);
            assert_eq!(reference.settled().written_short(), None);
        }
    }

    #[test]
    fn appc_images_have_names_of_their_own() {
        let id = "b".repeat(128);
        for (given, full) in [
            ("appc://example.com/app", "appc://example.com/app".to_owned()),
            ("appc.invalid/example.com/app:1.2", "appc://example.com/app:1.2".to_owned()),
            (&format!("appc.invalid/a:1@sha512:{id}"), format!("appc://a:1@sha512-{id}")),
        ] {
            let reference: Reference = given.parse().unwrap();
            assert_eq!(reference.to_string(), full);
            assert!(reference.appc().is_some() && reference.written_short().is_none());
        }
        let reference: Reference = "appc://a:1?os=linux".parse().unwrap();
        assert_eq!(reference.repo_tag().as_deref(), Some("appc://a:1?os=linux"));
        assert_eq!(reference.repo_digest(&format!("sha512:{id}").parse().unwrap()), format!("appc://a:1?os=linux@sha512-{id}"));
        assert_ne!(reference, "appc.invalid:443/a:1".parse().unwrap());
        assert!("appc://A".parse::<Reference>().is_err());
    }

    #[test]
    fn refuses_malformed() {
        for bad in ["", ":tag", "a:", "A/b", "a//b", "../x", "a/../b", "a@sha256:12", "x y", "host:5000/", "-h.x/y", "a:-t"] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #![proptest_config(crate::stdx::testing::cases(256))]
        #[test]
        fn never_panics_and_round_trips(s in "\\PC{0,60}") {
            if let Ok(r) = s.parse::<Reference>() {
                prop_assert_eq!(r.to_string().parse::<Reference>().unwrap(), r);
            }
        }
    }
}
