//! The two digest algorithms of OCI descriptors behind one type.

use sha2::Digest as _;

use crate::model::Digest;
use crate::model::error::Result;

/// A running digest.
pub enum Hasher {
    /// SHA-256, what everyone uses.
    Sha256(sha2::Sha256),
    /// SHA-512, boxed for its size.
    Sha512(Box<sha2::Sha512>),
}

impl Hasher {
    /// For an algorithm that [`Digest`] knows.
    pub fn new(algorithm: &str) -> Self {
        if algorithm == "sha512" { Self::Sha512(Box::default()) } else { Self::Sha256(sha2::Sha256::new()) }
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(h) => h.update(bytes),
            Self::Sha512(h) => h.update(bytes),
        }
    }

    /// The digest.
    ///
    /// # Errors
    /// None in practice: the text is well formed by construction.
    pub fn finish(self) -> Result<Digest> {
        match self {
            Self::Sha256(h) => format!("sha256:{:x}", h.finalize()).parse(),
            Self::Sha512(h) => format!("sha512:{:x}", h.finalize()).parse(),
        }
    }

    /// The digest of `bytes` in the algorithm of `like`.
    ///
    /// # Errors
    /// As [`Hasher::finish`].
    pub fn of(bytes: &[u8], like: Option<&Digest>) -> Result<Digest> {
        let mut hasher = Self::new(like.map_or("sha256", Digest::algorithm));
        hasher.update(bytes);
        hasher.finish()
    }
}
