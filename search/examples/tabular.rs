//! Trials that each sampler needs to reach the best 5% of a table of really trained configurations.
//!
//! `cargo run --release -p caskd-search --example tabular -- TABLE.json [--seeds N] [--first-run N] [--samplers gp,sabo]`
//! prints one JSON object. The table holds its space as TOML (`space_toml`) and a row for each of the space's points
//! with its `value` (smaller is better; null where the training failed) and the measured parts of S(x), `logits` and
//! `hidden`. Trials count from 1.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs
)]

use std::collections::BTreeMap;

use caskd_search::{
    BoxError, Discrepancy, Holder, Objective, Outcome, Params, SaboOptions, SamplerKind, Space,
    Study, StudyConfig, Trial,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Table {
    space_toml: String,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    params: Params,
    value: Option<f64>,
    logits: f64,
    hidden: f64,
}

/// The rows by canonical parameters.
struct Tabular {
    rows: BTreeMap<String, Row>,
}

impl Objective for Tabular {
    fn evaluate(&mut self, _: &Trial<'_>) -> Result<Outcome, BoxError> {
        Err("the benchmark looks values up by itself".into())
    }

    fn discrepancy(&mut self, params: &Params) -> Result<Discrepancy, BoxError> {
        let row = self.rows.get(&params.to_json()).ok_or("no such row")?;
        Ok(Discrepancy {
            logits: row.logits,
            hidden: row.hidden,
        })
    }
}

fn main() {
    let mut given = std::env::args().skip(1);
    let path = given.next().expect("the table's path");
    let mut args: BTreeMap<String, String> = BTreeMap::new();
    while let Some(key) = given.next() {
        args.insert(key, given.next().unwrap_or_default());
    }
    let number = |key: &str, default: u64| args.get(key).map_or(default, |v| v.parse().unwrap());
    let (seeds, first) = (number("--seeds", 50), number("--first-run", 0));
    let samplers = args
        .get("--samplers")
        .map_or("random,tpe,gp,sabo,sabo-inverted,laei", |s| s.as_str());

    let table: Table = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let space = Space::from_toml(&table.space_toml).unwrap();
    let rows: BTreeMap<String, Row> = table
        .rows
        .into_iter()
        .map(|row| (space.canonical(&row.params).unwrap().to_json(), row))
        .collect();
    assert_eq!(
        space.distinct(),
        Some(rows.len()),
        "the table has one row for each distinct point of its space"
    );
    let threshold = best_five_percent(&rows);
    let mut tabular = Tabular { rows };
    let results: Vec<_> = samplers
        .split(',')
        .map(|sampler| {
            let needed: Vec<u64> = (first..first + seeds)
                .map(|run| trials_needed(&space, &mut tabular, sampler, run, threshold))
                .collect();
            let mut sorted = needed.clone();
            sorted.sort_unstable();
            eprintln!("{sampler:14} median {}", sorted[sorted.len() / 2]);
            serde_json::json!({ "sampler": sampler, "trials_needed": needed })
        })
        .collect();
    println!(
        "{}",
        serde_json::json!({
            "points": tabular.rows.len(),
            "threshold": threshold,
            "first_run": first,
            "results": results,
        })
    );
}

/// The value that 5% of the rows (at least one) reach.
fn best_five_percent(rows: &BTreeMap<String, Row>) -> f64 {
    let mut values: Vec<f64> = rows.values().filter_map(|row| row.value).collect();
    values.sort_by(f64::total_cmp);
    // Of all rows: a configuration that fails is not among the best.
    values[(rows.len() / 20).max(1) - 1]
}

fn config(sampler: &str, seed: u64) -> StudyConfig {
    let sabo = match sampler {
        "laei" => SaboOptions::laei(),
        "sabo-inverted" => SaboOptions {
            inverted: true,
            ..SaboOptions::default()
        },
        _ => SaboOptions::default(),
    };
    StudyConfig {
        sampler: sampler.parse().unwrap_or(SamplerKind::Sabo),
        seed,
        sabo,
        ..StudyConfig::default()
    }
}

/// Number of the first trial that reaches `threshold`.
fn trials_needed(
    space: &Space,
    tabular: &mut Tabular,
    sampler: &str,
    run: u64,
    threshold: f64,
) -> u64 {
    let mut study = Study::in_memory(space, &config(sampler, run)).unwrap();
    let points = tabular.rows.len() as u64;
    for number in 0..points {
        let asked = study
            .ask_measured(Holder::External { seconds: 1e9 }, tabular)
            .unwrap();
        let value = tabular.rows[&asked.params.to_json()].value;
        if value.is_some_and(|value| value <= threshold) {
            return number + 1;
        }
        let outcome = value.map_or_else(
            || Outcome::Failed("in the table".to_owned()),
            Outcome::Value,
        );
        study.tell(number, None, &outcome, 0.0).unwrap();
    }
    points
}
