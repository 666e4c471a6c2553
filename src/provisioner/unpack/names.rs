//! Names in layer archives, before the kernel sees them.

use crate::model::error::{Error, Kind, Result};

/// A name without `.`, `..`, doubled and leading slashes, relative to the root.
///
/// # Errors
/// `DataLoss` for names with NUL and names that leave the root.
pub fn clean(path: &[u8]) -> Result<Vec<u8>> {
    if path.contains(&0) {
        return Err(Error::new(Kind::DataLoss, "name contains NUL"));
    }
    let mut out: Vec<&[u8]> = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                out.pop().ok_or_else(|| Error::new(Kind::DataLoss, "name leaves the root"))?;
            }
            part => out.push(part),
        }
    }
    Ok(out.join(&b'/'))
}

/// Where the link at `path` leads, within the root.
pub fn follow(path: &[u8], target: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    let parent = path.iter().rposition(|b| *b == b'/').map_or(&[][..], |i| &path[..i]);
    let start: &[u8] = if target.starts_with(b"/") { &[] } else { parent };
    for part in start.split(|b| *b == b'/').chain(target.split(|b| *b == b'/')) {
        match part {
            b"" | b"." => {}
            // Above the root is the root, as in chroot.
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(crate::stdx::testing::cases(256))]
        #[test]
        fn cleaned_names_cannot_leave(path in proptest::collection::vec(prop_oneof![Just(b'.'), Just(b'/'), any::<u8>()], 0..40), target in "[./a-c]{0,20}") {
            if let Ok(clean) = clean(&path) {
                prop_assert!(!clean.starts_with(b"/") && !clean.contains(&0));
                prop_assert!(clean.is_empty() || clean.split(|b| *b == b'/').all(|p| !p.is_empty() && p != b"." && p != b".."));
                let followed = follow(&clean, target.as_bytes());
                prop_assert!(followed.split(|b| *b == b'/').all(|p| p != b".."));
            }
        }
    }
}
