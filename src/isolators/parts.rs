//! What several isolators need: configuration tables, mounts and namespaces of the OCI spec, paths given by callers.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime as oci;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::model::error::{Error, Result};

/// The configuration of an isolator that has no options: any key is an error.
#[derive(serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct NoConfig {}

/// Reads the configuration table of isolator `name`.
///
/// # Errors
/// `InvalidArgument` naming the isolator and the key.
pub fn config<T: DeserializeOwned>(name: &str, table: toml::Table) -> Result<T> {
    let parsed: Result<T, toml::de::Error> = toml::Value::Table(table).try_into();
    // With the place in it, which the message alone has not.
    parsed.map_err(|e| Error::invalid(format!("configuration of isolator {name}: {}", e.to_string().trim().replace('\n', " "))))
}

/// Reads the configuration table of isolator `name` and gives it back with every option in it, defaults included.
///
/// # Errors
/// Those of [`config`].
pub fn options<T: DeserializeOwned + Serialize>(name: &str, table: toml::Table) -> Result<toml::Table> {
    let config: T = config(name, table)?;
    toml::Table::try_from(config).map_err(|e| Error::internal(format!("write out the configuration of isolator {name}: {e}")))
}

/// One mount of the spec.
pub fn mount(destination: impl Into<PathBuf>, typ: &str, source: impl Into<PathBuf>, options: &[&str]) -> oci::Mount {
    let mut mount = oci::Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(typ.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options.iter().map(|o| (*o).to_owned()).collect()));
    mount
}

/// One namespace of the spec: joined when it has a path, else new.
pub fn namespace(typ: oci::LinuxNamespaceType, path: Option<PathBuf>) -> oci::LinuxNamespace {
    let mut namespace = oci::LinuxNamespace::default();
    namespace.set_typ(typ).set_path(path);
    namespace
}

/// A path inside a container as a caller wrote it, made absolute and plain.
///
/// # Errors
/// `InvalidArgument` when it is empty, holds a NUL or `..` (which could mean another place once links are followed), or is the
/// root itself.
pub fn container_path(what: &str, path: &str) -> Result<PathBuf> {
    let bad = |why: &str| Error::invalid(format!("{what} {path:?}: {why}"));
    if path.is_empty() || path.contains('\0') {
        return Err(bad("empty or with a NUL byte"));
    }
    let mut plain = PathBuf::from("/");
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(bad("holds ..")),
        }
    }
    if plain == Path::new("/") {
        return Err(bad("is the root directory"));
    }
    Ok(plain)
}

/// The machine's host name.
pub fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| "localhost".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_paths_are_plain_or_refused() {
        for (given, plain) in [("/a/b", "/a/b"), ("a", "/a"), ("//a/./b/", "/a/b")] {
            assert_eq!(container_path("p", given).unwrap(), Path::new(plain), "{given}");
        }
        for bad in ["", "/", "//", ".", "..", "/..", "/a/../../etc", "/a/..", "a\0b"] {
            assert!(container_path("p", bad).is_err(), "{bad:?}");
        }
    }
}
