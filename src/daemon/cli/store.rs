//! `mesocri gc`, `df`, `why` and `store`: what fills the image store, who holds it, what a collection would take, whether it is whole.

use std::io::Read as _;
use std::path::Path;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::transport::Channel;

use super::run::{connect, refused};
use super::store_show as show;
use crate::model::ImageId;
use crate::model::error::{Act as _, Error, Kind, Result};
use crate::model::image::FsUsage;
use crate::operator::MAX_MESSAGE;
use crate::provisioner::gc::{Goal, MIN_AGE_SECONDS, Outcome, Plan, Request, df, why};
use crate::provisioner::scrub;
use crate::wire::operator::operator_client::OperatorClient;
use crate::wire::operator::{DiskUsageRequest, Document, ExplainRequest};

/// The commands of this file.
pub const NAMES: &[&str] = &["gc", "df", "why", "store"];

/// Their definitions.
pub fn commands(address: &Arg) -> Vec<Command> {
    let json = Arg::new("json").long("json").action(ArgAction::SetTrue).help("print JSON");
    let plan = |name: &'static str, about: &'static str| {
        Command::new(name)
            .about(about)
            .arg(address.clone())
            .arg(json.clone())
            .arg(Arg::new("free").long("free").value_name("SIZE").help("go by last use and stop when this much is freed, e.g. 10GB or 512MiB"))
            .arg(Arg::new("debris").long("debris").action(ArgAction::SetTrue).conflicts_with("free").help("only what crashes left, no image"))
            .arg(
                Arg::new("image")
                    .long("image")
                    .value_name("IMAGE")
                    .action(ArgAction::Append)
                    .conflicts_with_all(["free", "debris"])
                    .help("only this image, whoever keeps it"),
            )
            .arg(Arg::new("exclude").long("exclude").value_name("NAME").action(ArgAction::Append).help("spare this image; a prefix when it ends in *"))
            .arg(
                Arg::new("min-age")
                    .long("min-age")
                    .value_name("TIME")
                    .help(format!("spare images wanted less than this ago, e.g. 90s, 15m, 24h, 7d [default: {MIN_AGE_SECONDS}s]")),
            )
    };
    let gc = Command::new("gc")
        .about("Collect images that nobody uses")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(plan("plan", "Print what would go, in order, what each step frees, and who keeps the rest"))
        .subcommand(
            Command::new("apply")
                .about("Do exactly what a plan says, or refuse because the store has changed since")
                .arg(address.clone())
                .arg(json.clone())
                .arg(Arg::new("plan").required(true).value_name("PLAN").help("file with what `mesocri gc plan --json` printed; - is standard input")),
        )
        .subcommand(plan("run", "Plan and act at once"));
    let all = Arg::new("all").long("all").short('a').action(ArgAction::SetTrue).help("list every part");
    let df = Command::new("df").about("Name every byte of the image store").arg(address.clone()).arg(json.clone()).arg(all);
    let key = Arg::new("what").required(true).value_name("PATH|DIGEST|ID").help("path, digest of a layer or blob, image, container");
    let why = Command::new("why").about("Say who holds something in the image store").arg(address.clone()).arg(json.clone()).arg(key);
    let repair = Arg::new("repair").long("repair").action(ArgAction::SetTrue).help("fetch damaged layers again from where their images came");
    let scrub =
        Command::new("scrub").about("Read every layer, compare it with what was unpacked, mark what is damaged").arg(address.clone()).arg(json).arg(repair);
    let store = Command::new("store").about("Look after the image store").subcommand_required(true).arg_required_else_help(true).subcommand(scrub);
    vec![gc, df, why, store]
}

/// Runs one of them.
pub async fn main(name: &str, matches: &ArgMatches) -> Result<ExitCode> {
    match (name, matches.subcommand()) {
        ("gc", Some(("plan", m))) => {
            let plan: Plan = parse(&plan_document(m).await?)?;
            print(m, &plan, show::plan)
        }
        ("gc", Some(("run", m))) => {
            let mut operator = operator(m).await?;
            let request = request(m, &mut operator).await?;
            let answer = operator.collect(request).await.map_err(|s| refused("collect", &s))?.into_inner();
            report(m, &parse(&answer)?)
        }
        ("gc", Some(("apply", m))) => {
            let path = m.get_one::<String>("plan").cloned().unwrap_or_default();
            let json = read_plan(&path)?;
            let answer = operator(m).await?.apply_plan(Document { json }).await.map_err(|s| refused(&format!("apply {path}"), &s))?.into_inner();
            report(m, &parse(&answer)?)
        }
        ("df", _) => {
            let answer = operator(matches).await?.disk_usage(DiskUsageRequest {}).await.map_err(|s| refused("ask for the use of the disk", &s))?;
            let report: df::Report = parse(&answer.into_inner())?;
            let all = matches.get_flag("all");
            print(matches, &report, |report| show::df(report, all))
        }
        ("why", _) => {
            let key = matches.get_one::<String>("what").cloned().unwrap_or_default();
            // A path is told as the daemon sees it, whatever directory this runs in.
            let key =
                if key.starts_with(['.', '/']) && Path::new(&key).exists() { std::path::absolute(&key).act("find", &key)?.display().to_string() } else { key };
            let answer = operator(matches).await?.explain(ExplainRequest { key }).await.map_err(|s| refused("explain", &s))?.into_inner();
            let answers: Vec<why::Answer> = parse(&answer)?;
            print(matches, &answers, |answers: &Vec<why::Answer>| show::why(answers))
        }
        ("store", Some(("scrub", m))) => {
            let request = encode(&scrub::Request { repair: m.get_flag("repair") })?;
            let answer = operator(m).await?.scrub(request).await.map_err(|s| refused("scrub", &s))?.into_inner();
            let report: scrub::Report = parse(&answer)?;
            print(m, &report, show::scrub)?;
            let whole = report.damaged.iter().all(|f| f.fate == scrub::Fate::Repaired);
            Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        _ => Err(Error::invalid("no command given")),
    }
}

async fn operator(matches: &ArgMatches) -> Result<OperatorClient<Channel>> {
    let channel = connect(&super::address(matches)).await?;
    Ok(OperatorClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE))
}

async fn plan_document(matches: &ArgMatches) -> Result<Document> {
    let mut operator = operator(matches).await?;
    let request = request(matches, &mut operator).await?;
    Ok(operator.plan_collection(request).await.map_err(|s| refused("plan", &s))?.into_inner())
}

/// What the flags ask for. Names of images are turned into ids by the daemon's own rules.
async fn request(matches: &ArgMatches, operator: &mut OperatorClient<Channel>) -> Result<Document> {
    let many = |name: &str| matches.get_many::<String>(name).map(|v| v.cloned().collect::<Vec<_>>()).unwrap_or_default();
    let mut ids = Vec::new();
    for key in many("image") {
        let answer = operator.explain(ExplainRequest { key: key.clone() }).await.map_err(|s| refused("find image", &s))?.into_inner();
        let answers: Vec<why::Answer> = parse(&answer)?;
        let found = answers.into_iter().find_map(|a| if let df::Owner::Image(id) = a.what { Some(id) } else { None });
        ids.push(found.ok_or_else(|| Error::not_found(format!("find image {key:?}")))?);
    }
    let goal = goal(ids, matches.get_one::<String>("free"), matches.get_flag("debris"))?;
    let min_age_seconds = matches.get_one::<String>("min-age").map_or(Ok(MIN_AGE_SECONDS), |text| seconds(text))?;
    encode(&Request { goal, excluded: many("exclude"), min_age_seconds })
}

fn goal(ids: Vec<ImageId>, free: Option<&String>, debris: bool) -> Result<Goal> {
    Ok(match free {
        _ if !ids.is_empty() => Goal::Images(ids),
        Some(text) => Goal::Free(FsUsage { bytes: bytes(text)?, inodes: 0 }),
        None if debris => Goal::Debris,
        None => Goal::Everything,
    })
}

fn read_plan(path: &str) -> Result<String> {
    if path != "-" {
        return std::fs::read_to_string(path).act("read plan", path);
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).act("read plan from", "standard input")?;
    Ok(text)
}

fn report(matches: &ArgMatches, outcome: &Outcome) -> Result<ExitCode> {
    print(matches, outcome, show::outcome)?;
    Ok(if outcome.stopped.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print<T: Serialize>(matches: &ArgMatches, value: &T, text: impl Fn(&T) -> String) -> Result<ExitCode> {
    if matches.get_flag("json") {
        println!("{}", serde_json::to_string_pretty(value).act("encode", "answer")?);
    } else {
        print!("{}", text(value));
    }
    Ok(ExitCode::SUCCESS)
}

fn encode<T: Serialize>(value: &T) -> Result<Document> {
    Ok(Document { json: serde_json::to_string(value).act("encode", "request")? })
}

fn parse<T: DeserializeOwned>(document: &Document) -> Result<T> {
    serde_json::from_str(&document.json).map_err(|e| Error::with(Kind::Internal, "read the daemon's answer", e))
}

/// `10GB`, `512MiB`, `1000`.
fn bytes(text: &str) -> Result<u64> {
    let units = [
        ("", 1),
        ("B", 1),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
    ];
    scaled(text, &units).ok_or_else(|| Error::invalid(format!("parse size {text:?}: expected a number and a unit, as in 10GB or 512MiB")))
}

/// `90s`, `15m`, `24h`, `7d`.
fn seconds(text: &str) -> Result<u64> {
    let units = [("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)];
    scaled(text, &units).ok_or_else(|| Error::invalid(format!("parse time {text:?}: expected a number and a unit, as in 90s, 15m, 24h or 7d")))
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim()))?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times() {
        assert_eq!(bytes("10GB").unwrap(), 10_000_000_000);
        assert_eq!(bytes("512 MiB").unwrap(), 512 << 20);
        assert_eq!(bytes("7").unwrap(), 7);
        assert_eq!(seconds("24h").unwrap(), 86_400);
        for bad in ["", "GB", "1.5GB", "-1", "1XB", "99999999999TB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert!(seconds("5").is_err());
    }
}
