//! The command line of `mesocri`: one file per operator command.

mod pull;
mod run;
pub mod sample;
mod show;
mod store;
mod store_show;
mod transfer;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::{config, flags, serve, telemetry};
use crate::model::error::{Act as _, Error, Kind, Result};

/// Worker threads of the daemon: its work is waiting; more threads only cost memory.
const WORKERS: usize = 2;
/// Threads that wait in the file system at most.
const BLOCKING_THREADS: usize = 64;

/// The whole command line, also the source of man pages and completions.
pub fn command() -> Command {
    let address =
        Arg::new("address").long("address").value_name("SOCKET").help("socket of the daemon [default: /run/mesocri/mesocri.sock] [env: MESOCRI_CRI_SOCKET]");
    Command::new("mesocri")
        .about("A node container engine: Kubernetes CRI and Mesos fronts on one containerizer")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(flags::add_to(Command::new("daemon").about("Run the daemon")))
        .subcommand(flags::add_to(Command::new("config").about("Print the effective configuration with the origin of each value")))
        .subcommand(
            Command::new("run")
                .about("Pull an image, run it in a pod of its own, show its log and leave with its exit code")
                .arg(address.clone())
                .arg(
                    Arg::new("mount")
                        .long("mount")
                        .short('v')
                        .value_name("HOST:CONTAINER[:ro]")
                        .action(ArgAction::Append)
                        .help("bind a host path into the container"),
                )
                .arg(Arg::new("env").long("env").short('e').value_name("NAME=VALUE").action(ArgAction::Append).help("set an environment variable"))
                .arg(
                    Arg::new("network")
                        .long("network")
                        .value_name("MODE")
                        .value_parser(["pod", "host"])
                        .default_value("pod")
                        .help("the pod's own network or the host's"),
                )
                .arg(Arg::new("quiet").long("quiet").short('q').action(ArgAction::SetTrue).help("show nothing but the container's output"))
                .arg(Arg::new("image").required(true).help("image reference, as docker takes it"))
                .arg(Arg::new("command").num_args(0..).last(true).help("command and arguments instead of the image's")),
        )
        .subcommand(Command::new("network").about("Look after pod networks").subcommand_required(true).arg_required_else_help(true).subcommand(flags::add_to(
            Command::new("prune").about("Remove the bridge and the nftables table that stay when the last pod goes; not while a daemon runs"),
        )))
        .subcommands(transfer::commands(&address))
        .subcommands(store::commands(&address))
        .subcommand(pull::command(&address))
        .subcommand(
            Command::new("ping")
                .about("Leave with 0 when the daemon is ready to serve")
                .arg(address)
                .arg(Arg::new("wait").long("wait").value_name("SECONDS").default_value("0").value_parser(value_parser!(u64)).help("how long to wait for it")),
        )
        .subcommand(
            Command::new("completions")
                .about("Print a shell completion script")
                .arg(Arg::new("shell").required(true).value_parser(value_parser!(clap_complete::Shell)).help("which shell")),
        )
        .subcommand(
            Command::new("man")
                .about("Write the man pages")
                .arg(Arg::new("directory").required(true).value_parser(value_parser!(PathBuf)).help("where to; made if missing")),
        )
}

/// Parses the arguments of the process and does what they say.
pub fn main() -> ExitCode {
    let matches = command().get_matches();
    match dispatch(&matches) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("mesocri: {e}");
            ExitCode::from(match e.kind {
                // sysexits(3): usage and configuration errors are the user's to mend, the rest is ours.
                Kind::InvalidArgument | Kind::FailedPrecondition => 78,
                Kind::Unavailable => 69,
                _ => 1,
            })
        }
    }
}

fn dispatch(matches: &ArgMatches) -> Result<ExitCode> {
    match matches.subcommand() {
        Some(("daemon", m)) => {
            let loaded = load(m)?;
            runtime(WORKERS)?.block_on(async {
                let _telemetry = telemetry::start(&loaded.config.log, &loaded.config.tracing)?;
                serve::run(loaded.config).await
            })?;
            Ok(ExitCode::SUCCESS)
        }
        Some(("config", m)) => {
            let loaded = load(m)?;
            let text = config::explain(&loaded)?;
            // Also when the daemon would refuse it: what is in force helps to see why.
            print!("{text}");
            loaded.config.check()?;
            Ok(ExitCode::SUCCESS)
        }
        Some(("network", m)) => match m.subcommand() {
            Some(("prune", m)) => {
                let loaded = load(m)?;
                runtime(1)?.block_on(serve::prune_network(loaded.config))?;
                Ok(ExitCode::SUCCESS)
            }
            _ => Err(Error::invalid("no command given")),
        },
        Some(("run", m)) => runtime(1)?.block_on(run::run(m)),
        Some(("load", m)) => runtime(1)?.block_on(transfer::load(m)),
        Some(("save", m)) => runtime(1)?.block_on(transfer::save(m)),
        Some(("pull", m)) => runtime(1)?.block_on(pull::main(m)),
        Some(("ping", m)) => {
            let wait = std::time::Duration::from_secs(m.get_one::<u64>("wait").copied().unwrap_or(0));
            runtime(1)?.block_on(run::ping(&address(m), wait))
        }
        Some((name, m)) if store::NAMES.contains(&name) => runtime(1)?.block_on(store::main(name, m)),
        Some(("completions", m)) => {
            if let Some(shell) = m.get_one::<clap_complete::Shell>("shell") {
                clap_complete::generate(*shell, &mut command(), "mesocri", &mut std::io::stdout());
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(("man", m)) => {
            let dir = m.get_one::<PathBuf>("directory").cloned().unwrap_or_default();
            std::fs::create_dir_all(&dir).act("create directory", dir.display())?;
            clap_mangen::generate_to(command(), &dir).act("write man pages to", dir.display())?;
            Ok(ExitCode::SUCCESS)
        }
        _ => Err(Error::invalid("no command given")),
    }
}

fn load(matches: &ArgMatches) -> Result<config::Loaded> {
    let file = config::read_file(matches.get_one::<String>("config").map(std::path::Path::new))?;
    let flags = flags::given(matches).map_err(Error::invalid)?;
    config::load(config::Sources { file, env: std::env::vars().collect(), flags })
}

fn runtime(workers: usize) -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .act("start", "the async runtime")
}

/// Where the daemon of a client command listens.
fn address(matches: &ArgMatches) -> PathBuf {
    matches
        .get_one::<String>("address")
        .cloned()
        .or_else(|| std::env::var("MESOCRI_CRI_SOCKET").ok())
        .map_or_else(|| PathBuf::from("/run/mesocri/mesocri.sock"), |a| PathBuf::from(a.strip_prefix("unix://").unwrap_or(&a)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn command_line_is_consistent() {
        super::command().debug_assert();
    }

    #[test]
    fn man_pages_and_completions_name_every_flag() {
        let dir = tempfile::tempdir().unwrap();
        clap_mangen::generate_to(super::command(), dir.path()).unwrap();
        let page = std::fs::read_to_string(dir.path().join("mesocri-daemon.1")).unwrap().replace('\\', "");
        let mut script = Vec::new();
        clap_complete::generate(clap_complete::Shell::Bash, &mut super::command(), "mesocri", &mut script);
        let script = String::from_utf8(script).unwrap();
        for flag in crate::daemon::flags::FLAGS {
            assert!(page.contains(flag.name), "{} is not in the man page", flag.name);
            assert!(script.contains(flag.name), "{} is not completed", flag.name);
        }
    }
}
