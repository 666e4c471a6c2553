//! `hack/dev bench`: the rows of the design's budget table for mesocri and for Debian's containerd (with runc and with crun) in
//! the same run, alternating, one table with ratios, JSON beside it. Medians; the ratio is what counts.
//!
//! `pull` as an argument adds the large cold pulls, `pull-only` leaves the rest away; `--json FILE` says where the JSON goes; `--rounds N` how often each row is taken.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a measurement that fails must stop

#[path = "../../tests/common/mod.rs"]
mod common;
mod engines;
mod images;
mod pulls;
mod rows;

use std::collections::BTreeMap;

use engines::Engine;

/// Samples by row and engine.
pub type Samples = BTreeMap<&'static str, BTreeMap<String, Vec<f64>>>;

/// What the design promises, in the row's own unit; `None` where it names no figure.
pub fn budget(row: &str) -> Option<f64> {
    rows::ROWS.iter().find(|r| r.name == row).and_then(|r| r.budget)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let value = |name: &str| arguments.iter().position(|a| a == name).and_then(|i| arguments.get(i + 1)).cloned();
    let rounds: usize = value("--rounds").map_or(10, |n| n.parse().expect("--rounds takes a number"));
    let only_pulls = arguments.iter().any(|a| a == "pull-only");
    let large = only_pulls || arguments.iter().any(|a| a == "pull");
    let only = value("--engine");
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let mut samples = Samples::new();
        let mut bench = engines::Bench::start(only.as_deref()).await;
        images::push(&bench, large);
        for engine in &mut bench.engines {
            engine.start().await;
            rows::warm_up(engine).await;
        }
        // Alternating: what the machine does besides hits all engines alike.
        for round in 0..if only_pulls { 0 } else { rounds } {
            for engine in &bench.engines {
                rows::single_pod(engine, round, &mut samples).await;
            }
        }
        for engine in bench.engines.iter().filter(|_| !only_pulls) {
            rows::idle(engine, &mut samples).await;
            rows::many_pods(engine, &mut samples).await;
        }
        for shape in images::shapes(large) {
            for _ in 0..3 {
                for engine in &bench.engines {
                    pulls::cold(&bench, engine, shape, &mut samples).await;
                }
            }
            for engine in &bench.engines {
                pulls::together(&bench, engine, shape, &mut samples).await;
            }
        }
        let names: Vec<String> = bench.engines.iter().map(|e: &Engine| e.name.clone()).collect();
        print_table(&names, &samples);
        if let Some(path) = value("--json") {
            std::fs::write(path, serde_json::to_vec_pretty(&samples).unwrap()).unwrap();
        }
        bench.finish().await;
    });
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn print_table(engines: &[String], samples: &Samples) {
    print!("| what | unit |");
    for engine in engines {
        print!(" {engine} |");
    }
    println!(" budget | mesocri ÷ best peer |");
    println!("|{}", "---|".repeat(engines.len() + 4));
    for row in rows::ROWS {
        let Some(by_engine) = samples.get(row.name) else { continue };
        print!("| {} | {} |", row.name, row.unit);
        let of = |engine: &str| by_engine.get(engine).map(|s| median(s));
        for engine in engines {
            of(engine).map_or_else(|| print!(" – |"), |v| print!(" {v:.2} |"));
        }
        let peers = engines.iter().filter(|e| *e != "mesocri").filter_map(|e| of(e));
        let best = if row.more_is_better { peers.fold(f64::NAN, f64::max) } else { peers.fold(f64::NAN, f64::min) };
        let budget = row.budget.map_or_else(String::new, |b| {
            format!(
                "{}{b}{}",
                if row.more_is_better { "≥ " } else { "≤ " },
                of("mesocri").map_or("", |v| if (v <= b) != row.more_is_better { " ✓" } else { " ✗" })
            )
        });
        let ratio = of("mesocri").map_or(f64::NAN, |v| v / best);
        println!(" {budget} | {ratio:.3} |");
    }
}
