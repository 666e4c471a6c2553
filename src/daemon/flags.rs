//! Flags of the daemon, one table: Mesos spelling, the configuration key each sets, and help. From it come the command line, the
//! environment variables (`MESOCRI_` + name in capitals), the man page and the completions.

use clap::{Arg, ArgMatches, Command};

/// How a flag's text becomes a configuration value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Taken as it is.
    Text,
    /// Comma separated.
    List,
    /// `true` or `false`.
    Bool,
    /// A JSON object, or the path (also `file://`) of a file with one, as Mesos takes it.
    Json,
}

/// One flag.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// Long name, as Mesos spells it.
    pub name: &'static str,
    /// Dotted path of the configuration key.
    pub key: &'static str,
    /// Shape of the value.
    pub form: Form,
    /// One line for help and man page.
    pub help: &'static str,
}

/// All flags. Every other key is set by `--set KEY=VALUE` or in the file.
pub const FLAGS: &[Flag] = &[
    Flag { name: "work_dir", key: "root", form: Form::Text, help: "persistent directory: image store, records" },
    Flag { name: "runtime_dir", key: "state", form: Form::Text, help: "state that a reboot may lose: sockets, bundles" },
    Flag { name: "cri_socket", key: "socket", form: Form::Text, help: "unix socket of the CRI; default RUNTIME_DIR/mesocri.sock" },
    Flag { name: "isolation", key: "isolation", form: Form::List, help: "isolators to use, comma separated; an order is not needed" },
    Flag { name: "image_providers", key: "image_providers", form: Form::List, help: "image formats to serve, comma separated: docker, appc" },
    Flag {
        name: "image_provisioner_backend",
        key: "provisioner.backend",
        form: Form::Text,
        help: "backend of root filesystems: overlay, bind, copy, aufs, erofs; empty chooses",
    },
    Flag {
        name: "docker_registry",
        key: "provisioner.docker_registry",
        form: Form::Text,
        help: "registry of image names without a host: URL, or a directory of archives (also hdfs://)",
    },
    Flag {
        name: "docker_config",
        key: "provisioner.docker_config",
        form: Form::Text,
        help: "credentials for registries: path of a config.json or .dockercfg, or the JSON itself",
    },
    Flag { name: "hadoop_home", key: "provisioner.hdfs.hadoop_home", form: Form::Text, help: "Hadoop installation whose bin/hadoop reads hdfs:// URIs" },
    Flag {
        name: "appc_simple_discovery_uri_prefix",
        key: "provisioner.appc_simple_discovery_uri_prefix",
        form: Form::Text,
        help: "what comes before NAME-VERSION-OS-ARCH.aci in the URI of an appc image: http://, https://, a path, file://, hdfs://",
    },
    Flag {
        name: "appc_keyring",
        key: "provisioner.appc_keyring",
        form: Form::Text,
        help: "GnuPG keyring; appc images then need a signature by a key in it (.aci.asc beside the archive)",
    },
    Flag {
        name: "appc_store_dir",
        key: "provisioner.appc_store_dir",
        form: Form::Text,
        help: "taken for Mesos's sake and not used: images of all formats share the one store in WORK_DIR/store",
    },
    Flag { name: "image_gc_config", key: "provisioner.image_gc_config", form: Form::Json, help: "when to collect unused images: JSON, or a file with it" },
    Flag { name: "network_cni_config_dir", key: "network.cni.conf_dir", form: Form::Text, help: "directory of CNI network configurations" },
    Flag { name: "network_cni_plugins_dir", key: "network.cni.bin_dirs", form: Form::List, help: "directories of CNI plugins, comma separated" },
    Flag { name: "logging_level", key: "log.level", form: Form::Text, help: "log filter, e.g. info or mesocri=debug" },
    Flag { name: "log_format", key: "log.format", form: Form::Text, help: "text or json" },
    Flag { name: "otlp_endpoint", key: "tracing.otlp_endpoint", form: Form::Text, help: "OTLP/gRPC collector for traces, e.g. http://127.0.0.1:4317" },
];

/// Prefix of environment variables.
pub const ENV_PREFIX: &str = "MESOCRI_";

impl Flag {
    /// Its environment variable.
    pub fn variable(&self) -> String {
        format!("{ENV_PREFIX}{}", self.name.to_uppercase())
    }

    /// Its text as a configuration value.
    ///
    /// # Errors
    /// Says what was expected.
    pub fn value(&self, text: &str) -> Result<toml::Value, String> {
        match self.form {
            Form::Text => Ok(toml::Value::String(text.to_owned())),
            Form::List => Ok(toml::Value::Array(text.split(',').map(str::trim).filter(|s| !s.is_empty()).map(|s| toml::Value::String(s.to_owned())).collect())),
            Form::Json => json(text),
            Form::Bool => text.parse().map(toml::Value::Boolean).map_err(|_| format!("{text:?} is neither true nor false")),
        }
    }
}

/// Inline or from a file.
fn json(text: &str) -> Result<toml::Value, String> {
    let inline = text.trim_start().starts_with('{');
    let content = if inline {
        text.to_owned()
    } else {
        let path = text.strip_prefix("file://").unwrap_or(text);
        std::fs::read_to_string(path).map_err(|e| format!("read {path}: {e}"))?
    };
    serde_json::from_str(&content).map_err(|e| if inline { format!("parse JSON: {e}") } else { format!("parse JSON in {text}: {e}") })
}

/// Adds `--config`, all flags of the table and `--set` to a command.
pub fn add_to(command: Command) -> Command {
    let command =
        command.arg(Arg::new("config").long("config").value_name("FILE").help("configuration file (TOML); default /etc/mesocri/config.toml when it exists"));
    let command = FLAGS.iter().fold(command, |command, flag| {
        command.arg(Arg::new(flag.name).long(flag.name).value_name("VALUE").help(format!("{} [key: {}] [env: {}]", flag.help, flag.key, flag.variable())))
    });
    command.arg(
        Arg::new("set")
            .long("set")
            .value_name("KEY=VALUE")
            .action(clap::ArgAction::Append)
            .help("sets any configuration key; VALUE is TOML, or text when it is not"),
    )
}

/// What the command line said: `(flag, key, value)` in order.
///
/// # Errors
/// Names the flag whose text has the wrong form.
pub fn given(matches: &ArgMatches) -> Result<Vec<(String, String, toml::Value)>, String> {
    let mut given = Vec::new();
    for flag in FLAGS {
        if let Some(text) = matches.get_one::<String>(flag.name) {
            let value = flag.value(text).map_err(|e| format!("flag --{}: {e}", flag.name))?;
            given.push((format!("flag --{}", flag.name), flag.key.to_owned(), value));
        }
    }
    for pair in matches.get_many::<String>("set").into_iter().flatten() {
        let (key, text) = pair.split_once('=').ok_or_else(|| format!("flag --set {pair}: expected KEY=VALUE"))?;
        // Bare words are text, everything that parses as a TOML value is that value.
        let value = format!("v = {text}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v")).unwrap_or_else(|| toml::Value::String(text.to_owned()));
        given.push(("flag --set".to_owned(), key.to_owned(), value));
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_taken_inline_and_from_files() {
        let text = r#"{"image_disk_headroom": 0.1, "image_disk_watch_interval": {"nanoseconds": 5}}"#;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gc.json");
        std::fs::write(&path, text).unwrap();
        let flag = FLAGS.iter().find(|f| f.name == "image_gc_config").unwrap();
        let inline = flag.value(text).unwrap();
        assert_eq!(inline["image_disk_watch_interval"]["nanoseconds"].as_integer(), Some(5));
        assert_eq!(flag.value(&path.display().to_string()).unwrap(), inline);
        assert_eq!(flag.value(&format!("file://{}", path.display())).unwrap(), inline);
        assert!(flag.value("{").unwrap_err().contains("JSON"));
        assert!(flag.value("/nowhere").unwrap_err().contains("/nowhere"));
    }
}
