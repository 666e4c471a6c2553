//! Plans, use of the disk and explanations as text for people.

use std::fmt::Write as _;

use super::show::{bytes, short};
use crate::model::image::FsUsage;
use crate::provisioner::gc::{Holder, Outcome, Plan, Step, Subject, df, why};
use crate::provisioner::scrub;
use crate::stdx::clock::now_ns;

/// A plan: what goes, then what stays.
pub fn plan(plan: &Plan) -> String {
    let mut text = String::new();
    if plan.steps.is_empty() {
        text.push_str("nothing to collect\n");
    } else {
        let _ = writeln!(text, "{:>4} {:>10} {:>9}  what goes", "step", "frees", "files");
    }
    for (n, step) in plan.steps.iter().enumerate() {
        let _ = writeln!(text, "{:>4} {:>10} {:>9}  {}", n + 1, bytes(step.frees.bytes), step.frees.inodes, step_text(step));
    }
    if !plan.steps.is_empty() {
        let _ = writeln!(text, "{:>4} {:>10} {:>9}", "all", bytes(plan.frees.bytes), plan.frees.inodes);
    }
    if !plan.enough {
        text.push_str("that is less than was asked for\n");
    }
    if !plan.kept.is_empty() {
        let _ = writeln!(text, "\n{:>15} {:>9}  what stays", "refers to", "files");
    }
    for kept in &plan.kept {
        let _ = writeln!(text, "{:>15} {:>9}  {}: {}", bytes(kept.usage.bytes), kept.usage.inodes, subject(&kept.what), holders(&kept.holders));
    }
    text
}

fn step_text(step: &Step) -> String {
    match step.layers.len() {
        0 => subject(&step.what),
        1 => format!("{}, with 1 layer", subject(&step.what)),
        n => format!("{}, with {n} layers", subject(&step.what)),
    }
}

fn subject(what: &Subject) -> String {
    match what {
        Subject::Image { id, names, used } => {
            let name = names.first().map_or("without a name", String::as_str);
            format!("image {} {name}, used {}", short(id.as_str()), ago(*used))
        }
        Subject::Orphans => "layers that no image has".to_owned(),
        Subject::Debris { path } => format!("debris {}", path.display()),
        Subject::Container { id, image } => format!("layers of the removed image {}, for container {}", short(image.as_str()), short(id)),
    }
}

fn holders(holders: &[Holder]) -> String {
    let text = |holder: &Holder| match holder {
        Holder::Container(id) => format!("container {}", short(id)),
        Holder::Image(id) => format!("image {}", short(id.as_str())),
        Holder::Recent(at) => format!("wanted {}", ago(*at)),
        other => other.to_string(),
    };
    holders.iter().map(text).collect::<Vec<_>>().join(", ")
}

/// What a collection did.
pub fn outcome(outcome: &Outcome) -> String {
    let mut text = format!("freed {} in {} files by {} steps\n", bytes(outcome.freed.bytes), outcome.freed.inodes, outcome.steps);
    if let Some(why) = &outcome.stopped {
        let _ = writeln!(text, "stopped: {why}");
    }
    text
}

/// The use of the disk.
pub fn df(report: &df::Report, all: bool) -> String {
    let mut text = format!("{}: {} of {} left on its file system\n\n", report.store.display(), bytes(report.available), bytes(report.capacity));
    let line = |text: &mut String, name: &str, count: String, usage: FsUsage| {
        let _ = writeln!(text, "{name:<22} {count:>7} {:>10} {:>9} files", bytes(usage.bytes), usage.inodes);
    };
    for (name, count, usage) in df::summary(report) {
        // The last line is the claim of this command, so it is printed even when there is nothing.
        if count > 0 || name == "unexplained" {
            line(&mut text, name, count.to_string(), usage);
        }
    }
    line(&mut text, "total", String::new(), report.total);
    if report.quarantine.inodes > 0 {
        line(&mut text, "quarantine (outside)", String::new(), report.quarantine);
    }
    if !report.images.is_empty() {
        let _ = writeln!(text, "\n{:>10} {:>10}  image", "alone", "refers to");
    }
    for image in &report.images {
        let name = image.names.first().map_or("without a name", String::as_str);
        let users = match image.containers.len() {
            0 => format!("used {}", ago(image.used)),
            1 => "1 container".to_owned(),
            n => format!("{n} containers"),
        };
        let _ = writeln!(text, "{:>10} {:>10}  {} {name}, {users}", bytes(image.alone.bytes), bytes(image.all.bytes), short(image.id.as_str()));
    }
    let shown = report.parts.iter().filter(|p| all || p.owner == df::Owner::Unexplained || p.recorded.is_some());
    for (n, part) in shown.enumerate() {
        if n == 0 {
            let _ = writeln!(text, "\n{:>10} {:>9}  part", "occupies", "files");
        }
        let path = if part.path.as_os_str().is_empty() { ".".into() } else { part.path.display().to_string() };
        let drift = part.recorded.map(|r| format!(" (its record says {})", bytes(r.bytes))).unwrap_or_default();
        let _ = writeln!(text, "{:>10} {:>9}  {path}: {}{drift}", bytes(part.usage.bytes), part.usage.inodes, owner(&part.owner));
    }
    text
}

fn owner(owner: &df::Owner) -> String {
    match owner {
        df::Owner::Store => "the store itself".to_owned(),
        df::Owner::Layer(id) => format!("layer {id}"),
        df::Owner::Image(id) => format!("image {id}"),
        df::Owner::Container(id) => format!("root filesystem of container {id}"),
        df::Owner::Lease(id) => format!("record of what container {id} holds"),
        df::Owner::Running => "a pull, import or create that is under way".to_owned(),
        df::Owner::Debris => "half-made or half-removed".to_owned(),
        df::Owner::Damaged => "damaged layer that was replaced and is in use".to_owned(),
        df::Owner::Unexplained => "nobody knows".to_owned(),
    }
}

/// Explanations, one block each.
pub fn why(answers: &[why::Answer]) -> String {
    let mut text = String::new();
    for answer in answers {
        let _ = writeln!(text, "{}", owner(&answer.what));
        for about in &answer.about {
            let _ = writeln!(text, "  {about}");
        }
        let alone = answer.alone.filter(|a| *a != answer.usage).map(|a| format!(", {} of it alone", bytes(a.bytes))).unwrap_or_default();
        let _ = writeln!(text, "  {} in {} files{alone}", bytes(answer.usage.bytes), answer.usage.inodes);
        let held = if answer.holders.is_empty() { "held by nobody".to_owned() } else { format!("held by: {}", holders(&answer.holders)) };
        let _ = writeln!(text, "  {held}");
    }
    text
}

/// What a scrub found.
pub fn scrub(report: &scrub::Report) -> String {
    let mut text = format!("{} layers read, {}: {} damaged", report.checked, bytes(report.bytes), report.damaged.len());
    let _ = match report.unverifiable.len() {
        0 => writeln!(text),
        n => writeln!(text, ", {n} of an older version that recorded nothing to compare with"),
    };
    for finding in &report.damaged {
        let fate = match &finding.fate {
            scrub::Fate::Marked => "no container starts from it".to_owned(),
            scrub::Fate::Repaired => "fetched again".to_owned(),
            scrub::Fate::Unrepaired(why) => format!("not repaired: {why}"),
        };
        let _ = writeln!(text, "layer {}: {}; {fate}", finding.layer, finding.what);
        let _ = writeln!(text, "  images: {}", finding.images.join(", "));
        if !finding.containers.is_empty() {
            let ids: Vec<&str> = finding.containers.iter().map(|id| short(id)).collect();
            let _ = writeln!(text, "  containers made from it, to be made anew: {}", ids.join(", "));
        }
    }
    text
}

/// How long ago, in the largest unit that fits.
fn ago(at: i64) -> String {
    let seconds = now_ns().saturating_sub(at).max(0) / 1_000_000_000;
    match seconds {
        0..=119 => format!("{seconds} s ago"),
        120..=7199 => format!("{} min ago", seconds / 60),
        7200..=172_799 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}
