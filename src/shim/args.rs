//! The shim's command line, as containerd calls it: Go flags (`-id x`, `--id=x`), then a verb.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::model::error::{Error, Result};

/// What to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verb {
    /// Make the socket, serve on it in the background, print its address.
    Start,
    /// Clean up after a shim that is gone.
    Delete,
    /// Serve in the foreground, on the socket given.
    #[default]
    Serve,
    /// Print the version.
    Version,
}

/// The command line. Unknown flags are refused, so that a typing error is not silently ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// `-namespace`: containerd's namespace.
    pub namespace: String,
    /// `-id`: of the container, or of the sandbox.
    pub id: String,
    /// `-address`: containerd's own socket.
    pub address: String,
    /// `-publish-binary`: the program that forwards events; not used, containerd waits for tasks by `Wait`.
    pub publish_binary: String,
    /// `-bundle`: only with `delete`.
    pub bundle: Option<PathBuf>,
    /// `-socket`: where to serve.
    pub socket: Option<PathBuf>,
    /// `-debug`.
    pub debug: bool,
    /// The verb.
    pub verb: Verb,
}

impl Args {
    /// Reads the arguments that follow the program's name.
    ///
    /// # Errors
    /// `InvalidArgument` naming the argument.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let mut args = Self::default();
        let mut words = arguments.into_iter().map(|word| word.into_string().map_err(|w| Error::invalid(format!("argument {} is not UTF-8", w.display()))));
        while let Some(word) = words.next() {
            let word = word?;
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                args.verb = verb(&word)?;
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => args.debug = inline.is_none_or(|v| v == "true"),
                "v" | "version" => args.verb = Verb::Version,
                _ => {
                    let value = match inline {
                        Some(value) => value,
                        None => words.next().transpose()?.ok_or_else(|| Error::invalid(format!("flag -{name} needs a value")))?,
                    };
                    args.set(name, value)?;
                }
            }
        }
        if let Some(extra) = words.next() {
            return Err(Error::invalid(format!("argument {} after the verb", extra?)));
        }
        Ok(args)
    }

    fn set(&mut self, name: &str, value: String) -> Result<()> {
        match name {
            "namespace" => self.namespace = value,
            "id" => self.id = value,
            "address" => self.address = value,
            "publish-binary" => self.publish_binary = value,
            "bundle" => self.bundle = Some(value.into()),
            "socket" => self.socket = Some(value.into()),
            _ => return Err(Error::invalid(format!("unknown flag -{name}"))),
        }
        Ok(())
    }
}

fn verb(word: &str) -> Result<Verb> {
    match word {
        "start" => Ok(Verb::Start),
        "delete" => Ok(Verb::Delete),
        _ => Err(Error::invalid(format!("unknown verb {word} (start, delete)"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(line.split_ascii_whitespace().map(OsString::from))
    }

    #[test]
    fn containerds_calls_are_understood() {
        let args = parse("-namespace default -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id c1 start").unwrap();
        assert_eq!((args.namespace.as_str(), args.id.as_str(), args.verb), ("default", "c1", Verb::Start));
        let args = parse("--namespace=default --id=c1 --bundle=/b -debug delete").unwrap();
        assert_eq!((args.bundle, args.debug, args.verb), (Some("/b".into()), true, Verb::Delete));
        assert_eq!(parse("-debug=false -socket /s").unwrap(), Args { socket: Some("/s".into()), ..Args::default() });
        assert_eq!(parse("-v").unwrap().verb, Verb::Version);
    }

    #[test]
    fn mistakes_are_named() {
        for (line, part) in [("-id", "-id needs a value"), ("-colour red", "-colour"), ("stop", "verb stop"), ("start now", "now after")] {
            let text = parse(line).unwrap_err().to_string();
            assert!(text.contains(part), "{line}: {text}");
        }
    }
}
