//! The running kernel's version, for what cannot be asked by trying it.

/// Major and minor number of a release: `6.1.0-18-amd64` is (6, 1).
pub fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The running kernel's; (0, 0) when it does not tell.
pub fn running() -> (u32, u32) {
    rustix::system::uname().release().to_str().ok().and_then(version).unwrap_or_default()
}

/// Whether overlay knows the options of the new mount interface (Linux 6.5). Before, that interface takes any option, whether it
/// exists or not, and only the mount fails: so it cannot be asked.
pub fn overlay_knows_its_options() -> bool {
    running() >= (6, 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version("5.14-rc3"), Some((5, 14)));
        assert_eq!(version("x"), None);
        assert!(running() >= (5, 10));
    }
}
