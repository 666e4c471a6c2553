//! Simple discovery: from a name and its labels to where the archive lies, `{prefix}{name}-{version}-{os}-{arch}.aci`
//! (App Container specification, discovery; Mesos `appc_simple_discovery_uri_prefix`). Other labels do not show in the URI.

use std::path::PathBuf;

use reqwest::Url;

use crate::model::appc::{Name, VERSION};
use crate::model::error::{Error, Result};

/// Labels that make the end of a file's name.
const SHOWN: [&str; 3] = [VERSION, "os", "arch"];

/// Where an archive lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// At a web server.
    Web(Url),
    /// In this machine.
    File(PathBuf),
    /// At what the fetcher of files knows: `hdfs://` and its kin.
    Other(String),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // The prefix may hold user and password.
            Self::Web(url) => write!(f, "{}://{}{}", url.scheme(), crate::provisioner::pullers::registry::hosts::authority(url), url.path()),
            Self::File(path) => path.display().fmt(f),
            Self::Other(uri) => match (uri.find("://"), uri.find('@')) {
                (Some(scheme), Some(at)) if !uri[scheme + 3..at].contains('/') => write!(f, "{}{}", &uri[..scheme + 3], &uri[at + 1..]),
                _ => f.write_str(uri),
            },
        }
    }
}

/// Where the archive of `name` lies, or what has `ending` behind that (`.asc` is its signature). All labels that show in the URI must be said.
///
/// # Errors
/// `InvalidArgument` for labels that cannot be part of a file's name, and for a prefix that leads nowhere.
pub fn place(prefix: &str, name: &Name, ending: &str) -> Result<Place> {
    let mut file = name.name.clone();
    for label in SHOWN {
        let value = name.labels.get(label).ok_or_else(|| Error::invalid(format!("find image {name}: label {label:?} is missing")))?;
        // A slash would lead to another directory, and so would `..` with the one of a neighbour.
        if !value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~+".contains(&b)) {
            return Err(Error::invalid(format!("find image {name}: label {label} cannot be part of a file's name (letters, digits and - . _ ~ + can)")));
        }
        file.push('-');
        file.push_str(value);
    }
    file.push_str(".aci");
    file.push_str(ending);
    let full = format!("{prefix}{file}");
    let bad = |why: &dyn std::fmt::Display| Error::invalid(format!("find image {name}: appc_simple_discovery_uri_prefix leads nowhere: {why}"));
    match prefix.split_once(':').map(|(scheme, _)| scheme) {
        _ if prefix.starts_with('/') => Ok(Place::File(full.into())),
        Some("http" | "https") if prefix.contains("://") => {
            let mut url = Url::parse(&full).map_err(|e| bad(&e))?;
            url.set_fragment(None);
            Ok(Place::Web(url))
        }
        Some("file") => {
            // `file:/x`, `file:///x`, `file://localhost/x`.
            let rest = full.strip_prefix("file:").unwrap_or_default();
            let path = rest.strip_prefix("//localhost/").map(|rest| format!("/{rest}"));
            let path = path.unwrap_or_else(|| rest.strip_prefix("//").unwrap_or(rest).to_owned());
            if path.starts_with('/') { Ok(Place::File(path.into())) } else { Err(bad(&"a file prefix has an absolute path and no host")) }
        }
        Some(_) if prefix.contains("://") => Ok(Place::Other(full)),
        _ => Err(bad(&"it begins with http://, https://, file://, hdfs:// or a slash")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap().with_defaults("linux", "amd64")
    }

    #[test]
    fn the_template_is_mesoss() {
        for (prefix, image, place) in [
            ("http://", "example.com/app", "http://example.com/app-latest-linux-amd64.aci"),
            ("https://", "example.com/app:1.2", "https://example.com/app-1.2-linux-amd64.aci"),
            ("http://127.0.0.1:8080/", "app:1?arch=aarch64&os=freebsd&channel=x", "http://127.0.0.1:8080/app-1-freebsd-aarch64.aci"),
            ("https://u:secret@images/x/", "app:1+git~2", "https://images/x/app-1+git~2-linux-amd64.aci"),
            ("/tmp/images/", "example.com/app", "/tmp/images/example.com/app-latest-linux-amd64.aci"),
            ("file:///tmp/", "app", "/tmp/app-latest-linux-amd64.aci"),
            ("file:/tmp/", "app", "/tmp/app-latest-linux-amd64.aci"),
            ("file://localhost/tmp/", "app", "/tmp/app-latest-linux-amd64.aci"),
            ("hdfs://node:9000/user/", "app", "hdfs://node:9000/user/app-latest-linux-amd64.aci"),
            ("hdfs://u:secret@node/", "app", "hdfs://node/app-latest-linux-amd64.aci"),
        ] {
            assert_eq!(super::place(prefix, &name(image), "").unwrap().to_string(), place);
            assert_eq!(super::place(prefix, &name(image), ".asc").unwrap().to_string(), format!("{place}.asc"));
        }
        assert!(matches!(place("http://u:p@h/", &name("a"), "").unwrap(), Place::Web(url) if url.password() == Some("p")));
    }

    #[test]
    fn nothing_in_a_name_leads_elsewhere() {
        for image in ["a:..%2f..%2fetc%2fpasswd", "a:1?os=..%2fx", "a:1?arch=a%20b", "a:1%3fx", "a:1%23x", "a:%25"] {
            assert!(place("/srv/", &name(image), "").is_err(), "{image}");
        }
        for prefix in ["", "images/", "ftp:", "http:", "file://host/x", "file:x"] {
            assert!(place(prefix, &name("a"), "").is_err(), "{prefix:?}");
        }
        assert!(place("/srv/", &Name::parse("a").unwrap(), "").unwrap_err().to_string().contains("version"));
    }
}
