//! Simple regret of the samplers on synthetic response surfaces.
//!
//! `cargo run --release -p caskd-search --example surfaces -- [--seeds N] [--first-run N] [--trials N] [--surfaces 1,2] [--samplers gp,sabo+helpful]
//! [--timing 100,500]`
//! prints one JSON object. Simple regret after t trials is the clean value of the configuration with the lowest
//! noisy observation among the first t, less the least clean value of the surface. Surfaces 7 and 8 are another
//! random function for every run; settings of the samplers are chosen on them and on S1 to S4, with runs from 100 on.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub
)]

mod own;
mod response;
mod tuning;

use std::collections::BTreeMap;
use std::time::Instant;

use caskd_search::{
    BoxError, Discrepancy, Holder, Objective, Outcome, Params, SaboOptions, SamplerKind, Space,
    Study, StudyConfig, Trial,
};
use response::{Fidelity, Levels, SURFACES, clean, minimum, observe, sigma};

/// Where S(x) comes from. The surfaces have none, so it is made up; a sampler's name may carry one of the suffixes.
enum Source {
    /// No suffix: what a probe of a student with slightly narrower logits than its teacher would give. It favours
    /// large scaling values and hidden states that are not normalised, half right and half wrong on S1 to S4.
    Probe,
    /// `+helpful` and, with the sign turned, `+misleading`: large where the surface is low on average over all
    /// parameters that the part does not depend on.
    Marginal {
        logits: BTreeMap<[usize; 3], f64>,
        hidden: BTreeMap<[usize; 2], f64>,
        sign: f64,
    },
}

impl Source {
    fn new(surface: usize, suffix: Option<&str>) -> Self {
        let sign = match suffix {
            None => return Self::Probe,
            Some("helpful") => -1.0,
            Some("misleading") => 1.0,
            Some(other) => panic!("no source of S(x) is called {other}"),
        };
        let (mut logits, mut hidden) = (BTreeMap::new(), BTreeMap::new());
        for c in (0..25_920).map(Levels::from_index) {
            // Diverged configurations would drown all others.
            let value = clean(surface, c, Fidelity::Full).min(60.0);
            *logits.entry(logits_key(c)).or_insert(0.0) += value;
            *hidden.entry(hidden_key(c)).or_insert(0.0) += value;
        }
        Self::Marginal {
            logits,
            hidden,
            sign,
        }
    }
}

fn logits_key(c: Levels) -> [usize; 3] {
    [c.scaling, c.logits_norm, c.kd_type]
}

fn hidden_key(c: Levels) -> [usize; 2] {
    [c.layers, if c.layers > 0 { c.hidden_norm } else { 0 }]
}

impl Objective for Source {
    fn evaluate(&mut self, _: &Trial<'_>) -> Result<Outcome, BoxError> {
        Err("the benchmark evaluates by itself".into())
    }

    fn discrepancy(&mut self, params: &Params) -> Result<Discrepancy, BoxError> {
        let c = Levels::of(params);
        Ok(match self {
            Self::Probe => {
                let (teacher, student) = [(2.6, 2.2), (0.11, 0.10), (1.0, 1.0)][c.logits_norm];
                let scaling = (c.scaling + 1) as f64;
                let logits = if c.kd_type == 1 {
                    0.02 * scaling
                } else {
                    scaling * (1.0f64 / teacher - 1.0 / student).abs()
                };
                let hidden = [0.0, 1.0, 1.8][c.layers] * [900.0, 0.4, 35.0][c.hidden_norm];
                Discrepancy { logits, hidden }
            }
            // Means, in units of the metric.
            Self::Marginal {
                logits,
                hidden,
                sign,
            } => Discrepancy {
                logits: *sign * logits[&logits_key(c)] / (25_920.0 / 120.0),
                hidden: *sign * hidden[&hidden_key(c)] / (25_920.0 / 9.0)
                    * if c.layers > 0 { 1.0 } else { 1.0 / 3.0 },
            },
        })
    }
}

fn main() {
    let mut args: BTreeMap<String, String> = BTreeMap::new();
    let mut given = std::env::args().skip(1);
    while let Some(key) = given.next() {
        args.insert(key, given.next().unwrap_or_default());
    }
    let number = |key: &str, default: u64| args.get(key).map_or(default, |v| v.parse().unwrap());
    let (seeds, trials) = (number("--seeds", 20), number("--trials", 50));
    let first = number("--first-run", 0);
    let surfaces: Vec<usize> = args.get("--surfaces").map_or_else(
        || (1..=SURFACES.len()).collect(),
        |list| list.split(',').map(|k| k.parse().unwrap()).collect(),
    );
    let samplers = args
        .get("--samplers")
        .map_or("random,sobol,tpe,gp,sabo,laei,inverted", |s| s.as_str());

    if args.contains_key("--table") {
        print_tables();
        return;
    }
    let mut results = Vec::new();
    for &surface in &surfaces {
        let known = (surface <= SURFACES.len()).then(|| Known::new(surface));
        for sampler in samplers.split(',') {
            let begun = Instant::now();
            let (runs, recommended): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (first..first + seeds)
                .map(|run| match (&known, surface) {
                    (Some(known), _) => regrets(known, surface, sampler, run, trials),
                    (None, BASINS) => {
                        regrets(&tuning::Drawn::basins(run), surface, sampler, run, trials)
                    }
                    (None, _) => regrets(&tuning::Drawn::new(run), surface, sampler, run, trials),
                })
                .unzip();
            let seconds = begun.elapsed().as_secs_f64();
            let mean_of = |curves: &[Vec<f64>], i: usize| {
                curves.iter().filter_map(|curve| curve.get(i)).sum::<f64>() / seeds as f64
            };
            eprintln!(
                "{:12} {:15} regret@30 {:6.3}  @50 {:6.3}  recommended {:6.3} {:6.3}  {:.1} ms per trial",
                name(surface),
                sampler,
                mean_of(&runs, 30.min(trials as usize) - 1),
                mean_of(&runs, 50.min(trials as usize) - 1),
                mean_of(&recommended, 0),
                mean_of(&recommended, 1),
                1e3 * seconds / (seeds * trials) as f64,
            );
            results.push(serde_json::json!({
                "surface": name(surface),
                "sampler": sampler,
                "first_run": first,
                "regret": runs,
                "recommended": recommended,
                "seconds_per_trial": seconds / (seeds * trials) as f64,
            }));
        }
    }
    let timing: Vec<_> = args.get("--timing").map_or_else(Vec::new, |sizes| {
        sizes
            .split(',')
            .map(|n| suggestion_seconds(n.parse().unwrap()))
            .collect()
    });
    println!(
        "{}",
        serde_json::json!({ "results": results, "timing": timing })
    );
}

/// Every surface by index: clean value and noise, for benchmarks in other languages.
fn print_tables() {
    let tables: Vec<_> = (1..=SURFACES.len())
        .map(|surface| {
            let all = || (0..25_920).map(Levels::from_index);
            serde_json::json!({
                "surface": SURFACES[surface - 1],
                "least": minimum(surface),
                "clean": all().map(|c| clean(surface, c, Fidelity::Full)).collect::<Vec<_>>(),
                "clean_at_5_percent": all().map(|c| clean(surface, c, Fidelity::FivePercent)).collect::<Vec<_>>(),
                "sigma": all().map(|c| sigma(surface, c, Fidelity::Full)).collect::<Vec<_>>(),
            })
        })
        .collect();
    println!("{}", serde_json::json!({ "tables": tables }));
}

fn config(sampler: &str, seed: u64) -> StudyConfig {
    let sabo = match sampler {
        "laei" => SaboOptions::laei(),
        "inverted" => SaboOptions {
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

/// Number of the random functions with a wide and a narrow basin.
const BASINS: usize = 8;

/// Trials after which the study is asked what it recommends.
const RECOMMENDED_AT: [u64; 2] = [30, 50];

/// What a run searches.
trait Surface {
    /// The value without noise.
    fn clean(&self, c: Levels) -> f64;
    /// One noisy measurement.
    fn observe(&self, c: Levels, seed: u64) -> f64;
    /// The least value without noise.
    fn least(&self) -> f64;
}

/// S1 to S6, by number.
struct Known {
    number: usize,
    least: f64,
}

impl Known {
    fn new(number: usize) -> Self {
        Self {
            number,
            least: minimum(number),
        }
    }
}

impl Surface for Known {
    fn clean(&self, c: Levels) -> f64 {
        clean(self.number, c, Fidelity::Full)
    }

    fn observe(&self, c: Levels, seed: u64) -> f64 {
        observe(self.number, c, seed)
    }

    fn least(&self) -> f64 {
        self.least
    }
}

fn name(surface: usize) -> &'static str {
    match surface {
        BASINS => "basins",
        _ => SURFACES.get(surface - 1).unwrap_or(&"random"),
    }
}

/// Simple regret after each trial of one run, and that of the study's recommendation after some trials.
fn regrets(
    surface: &dyn Surface,
    number: usize,
    sampler: &str,
    run: u64,
    trials: u64,
) -> (Vec<f64>, Vec<f64>) {
    let (sampler, suffix) = sampler
        .split_once('+')
        .map_or((sampler, None), |(name, suffix)| (name, Some(suffix)));
    let mut source = Source::new(number, suffix);
    let mut study = Study::in_memory(&Space::table2(), &config(sampler, run)).unwrap();
    let mut best = (f64::INFINITY, f64::INFINITY);
    let mut recommended = Vec::new();
    let curve = (0..trials)
        .map(|number| {
            let asked = study
                .ask_measured(Holder::External { seconds: 1e9 }, &mut source)
                .unwrap();
            let c = Levels::of(&asked.params);
            let value = surface.observe(c, run * 10_000 + number);
            study
                .tell(number, None, &Outcome::Value(value), 0.0)
                .unwrap();
            if value < best.0 {
                best = (value, surface.clean(c) - surface.least());
            }
            if RECOMMENDED_AT.contains(&(number + 1)) {
                let view = study.view().unwrap();
                let choice = Levels::of(&view.recommended().unwrap().unwrap().params);
                recommended.push(surface.clean(choice) - surface.least());
            }
            best.1
        })
        .collect();
    (curve, recommended)
}

/// Seconds that this thread has computed, which other work on the machine does not lengthen; where the system does not
/// tell, the time since `begun`.
fn busy_seconds(begun: Instant) -> f64 {
    std::fs::read_to_string("/proc/thread-self/schedstat")
        .ok()
        .and_then(|text| text.split(' ').next()?.parse::<f64>().ok())
        .map_or_else(|| begun.elapsed().as_secs_f64(), |ns| ns * 1e-9)
}

/// Seconds per suggestion of each sampler after `n` observations.
fn suggestion_seconds(n: u64) -> serde_json::Value {
    let begun = Instant::now();
    let mut row = serde_json::Map::new();
    row.insert("observations".to_owned(), n.into());
    for sampler in SamplerKind::ALL {
        let mut study = Study::in_memory(
            &Space::table2(),
            &StudyConfig {
                startup: n,
                ..config(sampler.name(), 1)
            },
        )
        .unwrap();
        for number in 0..n {
            let asked = study.ask_measured(Holder::External { seconds: 1e9 }, &mut Source::Probe);
            let c = Levels::of(&asked.unwrap().params);
            study
                .tell(number, None, &Outcome::Value(observe(1, c, number)), 0.0)
                .unwrap();
        }
        let mut seconds = Vec::new();
        for number in n..n + 5 {
            let before = busy_seconds(begun);
            let asked = study
                .ask_measured(Holder::External { seconds: 1e9 }, &mut Source::Probe)
                .unwrap();
            seconds.push(busy_seconds(begun) - before);
            let value = observe(1, Levels::of(&asked.params), number);
            study
                .tell(number, None, &Outcome::Value(value), 0.0)
                .unwrap();
        }
        seconds.sort_by(f64::total_cmp);
        eprintln!(
            "{n} observations, {sampler}: {:.4} s per suggestion (median of 5)",
            seconds[2]
        );
        row.insert(sampler.name().to_owned(), seconds[2].into());
    }
    row.into()
}
