//! `mesocri pull`: brings an image into the store, by the operator's front.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};
use tokio_stream::StreamExt as _;

use super::run::{connect, refused};
use super::show::Show;
use crate::model::appc;
use crate::model::error::{Error, Result};
use crate::wire::operator::operator_client::OperatorClient;
use crate::wire::operator::{PullRequest, pull_progress::Event};

/// The command.
pub fn command(address: &Arg) -> Command {
    Command::new("pull")
        .about("Pull an image and print its id")
        .arg(address.clone())
        .arg(Arg::new("quiet").long("quiet").short('q').action(ArgAction::SetTrue).help("show nothing but the id"))
        .arg(Arg::new("appc").long("appc").action(ArgAction::SetTrue).help("IMAGE is the name of an appc image (the same as appc://IMAGE)"))
        .arg(
            Arg::new("label")
                .long("label")
                .value_name("NAME=VALUE")
                .action(ArgAction::Append)
                .requires("appc")
                .help("label of the appc image; version, os and arch choose the archive [default: latest, this machine's]"),
        )
        .arg(Arg::new("id").long("id").value_name("SHA512").requires("appc").help("id that the appc image must have, sha512-…"))
        .arg(Arg::new("image").required(true).help("image reference, as docker takes it, or appc://NAME[:VERSION][?LABEL=VALUE&…]"))
}

/// Runs it.
///
/// # Errors
/// Those of the daemon.
pub async fn main(matches: &ArgMatches) -> Result<ExitCode> {
    let image = name(matches)?;
    let channel = connect(&super::address(matches)).await?;
    let mut show = Show::new(matches.get_flag("quiet"));
    show.line(format_args!("pull {image}"));
    let mut stream = OperatorClient::new(channel).pull(PullRequest { image }).await.map_err(|s| refused("pull the image", &s))?.into_inner();
    let mut id = None;
    while let Some(step) = stream.next().await {
        let Some(event) = step.map_err(|s| refused("pull the image", &s))?.event else { continue };
        if let Event::ImageId(image) = &event {
            id = Some(image.clone());
        }
        show.pull(event);
    }
    println!("{}", id.ok_or_else(|| Error::internal("pull the image: the daemon ended the pull without one"))?);
    Ok(ExitCode::SUCCESS)
}

/// What the arguments ask for, as one reference.
fn name(matches: &ArgMatches) -> Result<String> {
    let image = matches.get_one::<String>("image").cloned().unwrap_or_default();
    if !matches.get_flag("appc") {
        return Ok(image);
    }
    let mut labels = BTreeMap::new();
    for text in matches.get_many::<String>("label").into_iter().flatten() {
        let (label, value) = text.split_once('=').ok_or_else(|| Error::invalid(format!("parse --label {text}: expected NAME=VALUE")))?;
        if labels.insert(label.to_owned(), value.to_owned()).is_some() {
            return Err(Error::invalid(format!("parse --label {text}: {label} is said twice")));
        }
    }
    let id = matches.get_one::<String>("id").map(|id| appc::parse_id(id)).transpose()?;
    Ok(appc::Name::new(image.strip_prefix(appc::SCHEME).unwrap_or(&image), labels, id)?.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_arguments() {
        let parse = |args: &[&str]| {
            let all = ["pull"].iter().chain(args);
            command(&Arg::new("address").long("address")).try_get_matches_from(all).map_err(|e| e.to_string()).and_then(|m| name(&m).map_err(|e| e.to_string()))
        };
        assert_eq!(parse(&["busybox"]).unwrap(), "busybox");
        assert_eq!(parse(&["--appc", "example.com/app"]).unwrap(), "appc://example.com/app");
        let id = format!("sha512-{}", "a".repeat(128));
        let full = parse(&["--appc", "--label", "version=1 2", "--label", "os=linux", "--id", &id, "appc://a"]).unwrap();
        assert_eq!(full, format!("appc://a:1%202?os=linux@{id}"));
        for bad in [
            &["--label", "a=b", "x"][..],
            &["--appc", "--label", "a", "x"],
            &["--appc", "--id", "sha512-1", "x"],
            &["--appc", "X"],
            &["--appc", "--label", "a=1", "--label", "a=2", "x"],
            &[],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
