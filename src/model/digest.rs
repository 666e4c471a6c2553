//! Content digests: `algorithm:hex`, validated before they can become part of a path or a URL (OCI image-spec, descriptor.md).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::error::Error;

/// A digest that is safe to use as a file name: known algorithm, right length, lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Wraps the hexadecimal SHA-256 that we computed ourselves.
    pub fn sha256(hex: &str) -> Result<Self, Error> {
        format!("sha256:{hex}").parse()
    }

    /// The whole text, `sha256:…`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `sha256` or `sha512`.
    pub fn algorithm(&self) -> &str {
        self.0.split_once(':').map_or("", |(a, _)| a)
    }

    /// The hexadecimal part.
    pub fn hex(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, h)| h)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::invalid(format!("parse digest {:?}: {why}", s.chars().take(80).collect::<String>()));
        let (algorithm, hex) = s.split_once(':').ok_or_else(|| bad("no algorithm"))?;
        let len = match algorithm {
            "sha256" => 64,
            "sha512" => 128,
            _ => return Err(bad("unknown algorithm")),
        };
        if hex.len() != len {
            return Err(bad("wrong length"));
        }
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(bad("not lower-case hexadecimal"));
        }
        Ok(Self(s.to_owned()))
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;
    fn try_from(s: String) -> Result<Self, Error> {
        s.parse()
    }
}

impl From<Digest> for String {
    fn from(d: Digest) -> Self {
        d.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_could_leave_the_store() {
        let good = format!("sha256:{}", "a".repeat(64));
        assert_eq!(good.parse::<Digest>().unwrap().hex().len(), 64);
        for bad in ["", "sha256", "sha256:", "sha256:../../x", "md5:00", &good.to_uppercase(), &good[..70], "sha512:aa", &format!("sha256:{}/", "a".repeat(63))]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
