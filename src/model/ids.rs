//! Identifiers. Pods and containers: 64 lower-case hexadecimal characters from 32 random bytes, opaque to callers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of randomness in an id.
const ID_BYTES: usize = 32;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Takes an id that something else made (a record's directory name, a test).
            pub fn from_string(id: impl Into<String>) -> Self {
                Self(id.into())
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The first 12 characters, for people.
            pub fn short(&self) -> &str {
                self.0.get(..12).unwrap_or(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

id!(
    /// A pod (CRI sandbox, Mesos top-level container).
    PodId
);
id!(
    /// A container inside a pod.
    ContainerId
);
id!(
    /// An image: the digest of its configuration, `sha256:<64 hex>` (cri-behaviour §13.1); of Appc images that of the archive,
    /// `sha512:<128 hex>`.
    ImageId
);

impl PodId {
    /// A fresh random id.
    pub fn random() -> Self {
        Self(random_hex())
    }
}

impl ContainerId {
    /// A fresh random id.
    pub fn random() -> Self {
        Self(random_hex())
    }
}

fn random_hex() -> String {
    use std::fmt::Write;
    let mut bytes = [0u8; ID_BYTES];
    crate::sys::random::fill(&mut bytes);
    bytes.iter().fold(String::with_capacity(ID_BYTES * 2), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}
