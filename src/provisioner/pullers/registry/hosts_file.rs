//! `hosts.toml`, as containerd reads it: the registry's own settings at the top, mirrors as `[host."URL"]` in the order to ask.

use std::collections::HashMap;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use serde::de::IgnoredAny;
use toml::Spanned;

use crate::model::error::{Error, Kind, Result};

/// Keys of the form; whatever else stands in a file is ignored with a warning, as other readers of these files ignore it.
const KEYS: &[&str] = &["server", "host", "capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"];

/// A file's content.
pub struct HostsFile {
    /// URL of the registry itself.
    pub server: Option<String>,
    /// Its settings.
    pub settings: Settings,
    /// Mirrors in the order of the file.
    pub hosts: Vec<(String, Settings)>,
}

/// Settings of one server.
pub struct Settings {
    /// May be asked for content.
    pub pull: bool,
    /// May be asked what a tag means.
    pub resolve: bool,
    /// Files of authorities, relative to the directory of `hosts.toml`.
    pub ca: Vec<String>,
    /// Files of our certificate and, unless it is in there too, its key.
    pub client: Option<(String, Option<String>)>,
    /// Take any certificate.
    pub skip_verify: bool,
    /// Headers to send.
    pub headers: HeaderMap,
    /// The URL's path is complete; no `/v2` is added.
    pub override_path: bool,
    /// Time to connect.
    pub dial_timeout: Option<Duration>,
}

#[derive(Deserialize)]
struct Order {
    #[serde(default)]
    host: HashMap<Spanned<String>, IgnoredAny>,
}

#[derive(Deserialize)]
struct RawFile {
    server: Option<String>,
    #[serde(default)]
    host: HashMap<String, RawSettings>,
    #[serde(flatten)]
    settings: RawSettings,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawSettings {
    capabilities: Option<Vec<String>>,
    ca: Option<Files>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    header: HashMap<String, Files>,
    override_path: bool,
    dial_timeout: Option<String>,
}

/// One text or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Files {
    One(String),
    Many(Vec<String>),
}

impl Files {
    fn all(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    One(String),
    /// Each with certificate and key in one file.
    Files(Vec<String>),
    Pairs(Vec<Vec<String>>),
}

/// Reads a file's text.
///
/// # Errors
/// `InvalidArgument` for what cannot be understood.
pub fn parse(text: &str) -> Result<HostsFile> {
    // The whole error shows lines of the file, and headers may be secrets.
    let bad = |e: toml::de::Error| Error::invalid(format!("understand it: {}", e.message()));
    // Two readings: with positions, because the order of tables counts, and of the whole, to name what nobody understands.
    let order: Order = toml::from_str(text).map_err(bad)?;
    let raw: RawFile = toml::from_str(text).map_err(bad)?;
    warn_of_unknown(text);
    let mut positions: Vec<(usize, String)> = order.host.into_keys().map(|k| (k.span().start, k.into_inner())).collect();
    positions.sort();
    let mut by_name = raw.host;
    let mut hosts = Vec::new();
    for (_, name) in positions {
        if let Some(settings) = by_name.remove(&name) {
            hosts.push((name, settings.read()?));
        }
    }
    let server = raw.server.filter(|s| !s.is_empty());
    Ok(HostsFile { server, settings: raw.settings.read()?, hosts })
}

impl RawSettings {
    fn read(self) -> Result<Settings> {
        let (mut pull, mut resolve) = (true, true);
        if let Some(capabilities) = self.capabilities.filter(|c| !c.is_empty()) {
            (pull, resolve) = (false, false);
            for capability in capabilities {
                match capability.to_ascii_lowercase().as_str() {
                    "pull" => pull = true,
                    "resolve" => resolve = true,
                    "push" | "referrers" => {}
                    other => return Err(Error::invalid(format!("capability {other:?} is unknown"))),
                }
            }
        }
        let client = match self.client {
            None => None,
            Some(Client::One(file)) => Some((file, None)),
            Some(Client::Files(files)) => match <[String; 2]>::try_from(files) {
                Ok([cert, key]) => Some((cert, Some(key))),
                Err(mut files) if files.len() == 1 => files.pop().map(|f| (f, None)),
                Err(_) => return Err(Error::invalid("more than one client certificate")),
            },
            Some(Client::Pairs(mut pairs)) => match (pairs.pop(), pairs.is_empty()) {
                (None, _) => None,
                (Some(pair), true) => {
                    let mut pair = pair.into_iter().filter(|f| !f.is_empty());
                    pair.next().map(|cert| (cert, pair.next()))
                }
                (Some(_), false) => return Err(Error::invalid("more than one client certificate")),
            },
        };
        let mut headers = HeaderMap::new();
        for (name, values) in self.header {
            let header = HeaderName::try_from(name.as_str()).map_err(|e| Error::with(Kind::InvalidArgument, format!("header {name:?}"), e))?;
            for value in values.all() {
                // Values may be secrets: the error does not show them.
                let mut value = HeaderValue::try_from(value).map_err(|e| Error::with(Kind::InvalidArgument, format!("value of header {name:?}"), e))?;
                value.set_sensitive(true);
                headers.append(header.clone(), value);
            }
        }
        Ok(Settings {
            pull,
            resolve,
            ca: self.ca.map(Files::all).unwrap_or_default(),
            client,
            skip_verify: self.skip_verify.unwrap_or(false),
            headers,
            override_path: self.override_path,
            dial_timeout: self.dial_timeout.map(|t| duration(&t)).transpose()?,
        })
    }
}

/// `1m30s`, `500ms`, `1.5h`: durations as Go writes them.
fn duration(text: &str) -> Result<Duration> {
    let bad = || Error::invalid(format!("duration {text:?} is not of the form 30s, 1m30s, 500ms"));
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let unit = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return Err(bad()),
        };
        seconds += number.parse::<f64>().map_err(|_| bad())? * unit;
        rest = tail;
    }
    Duration::try_from_secs_f64(seconds).ok().filter(|_| !text.is_empty()).ok_or_else(bad)
}

fn warn_of_unknown(text: &str) {
    let Ok(table) = text.parse::<toml::Table>() else { return };
    let hosts = table.get("host").and_then(toml::Value::as_table).into_iter().flat_map(|hosts| hosts.values());
    for table in hosts.filter_map(toml::Value::as_table).chain([&table]) {
        for key in table.keys().filter(|k| !KEYS.contains(&k.as_str())) {
            tracing::warn!(key, "hosts.toml has a key that means nothing here");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_order_and_reads_every_key() {
        let file = parse(
            r#"
server = "https://registry-1.docker.io"
ca = ["/a.pem", "b.pem"]
[host."https://zzz"]
  capabilities = ["pull", "resolve"]
  [host."https://zzz".header]
    x-one = "1"
[host."https://aaa"]
  capabilities = ["pull", "push"]
  ca = "c.pem"
  client = [["cert.pem", "key.pem"]]
  skip_verify = true
  override_path = true
  dial_timeout = "1m1.5s"
  rewrite = { "a" = "b" }
[host."https://mmm"]
  client = "both.pem"
"#,
        )
        .unwrap();
        assert_eq!(file.server.as_deref(), Some("https://registry-1.docker.io"));
        assert_eq!(file.settings.ca, ["/a.pem", "b.pem"]);
        let names: Vec<_> = file.hosts.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["https://zzz", "https://aaa", "https://mmm"]);
        let (zzz, aaa, mmm) = (&file.hosts[0].1, &file.hosts[1].1, &file.hosts[2].1);
        assert_eq!((zzz.pull, zzz.resolve, zzz.headers["x-one"].to_str().unwrap()), (true, true, "1"));
        assert_eq!((aaa.pull, aaa.resolve, aaa.skip_verify, aaa.override_path), (true, false, true, true));
        assert_eq!((aaa.ca.as_slice(), aaa.client.clone()), (["c.pem".to_owned()].as_slice(), Some(("cert.pem".into(), Some("key.pem".into())))));
        assert_eq!(aaa.dial_timeout, Some(Duration::from_millis(61_500)));
        assert_eq!((mmm.pull, mmm.resolve, mmm.client.clone()), (true, true, Some(("both.pem".into(), None))));
        assert!(parse("").unwrap().hosts.is_empty());
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        for bad in [
            "server = 1",
            "server = ",
            "capabilities = ['fetch']",
            "dial_timeout = '5'",
            "dial_timeout = ''",
            "dial_timeout = '1x'",
            "client = [['a','b'],['c','d']]",
            "client = ['a','b','c']",
            "[header]\n'a b' = 'x'",
            "[header]\na = \"x\\ny\"",
            "[host.'https://x']\nca = 3",
        ] {
            assert_eq!(parse(bad).err().map(|e| e.kind), Some(Kind::InvalidArgument), "{bad}");
        }
        let secret = parse("[header]\nauthorization = \"hunter2\\n\"").err().unwrap();
        assert!(!secret.to_string().contains("hunter2"), "{secret}");
    }
}
