//! `caskd search --compare`: samplers side by side, each in studies of its own, as in BayesKD's Tables 10 and 11.

use std::fmt::Write as _;

use caskd_search::{SamplerKind, StudyConfig, TrialState, TrialView, read_study};
use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

use super::{SearchPlan, refuse_other_things, sampler_kind, search_with, without_value};
use crate::cli::SearchArgs;
use crate::commands::{print_json, print_text, write_file};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::say;

/// The comparison's file in its folder.
pub(crate) const COMPARISON_FILE: &str = "comparison.json";

/// Differences are called significant below this, as in the paper.
const SIGNIFICANT: f64 = 0.05;

/// What a comparison found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Comparison {
    /// What a value is.
    pub(crate) metric: String,
    pub(crate) maximize: bool,
    /// Trials of each study.
    pub(crate) trials: u64,
    pub(crate) samplers: Vec<Sampled>,
    pub(crate) tests: Vec<Test>,
}

/// The studies of one sampler.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Sampled {
    pub(crate) sampler: String,
    pub(crate) studies: Vec<OneStudy>,
    /// Of the studies' best values (Table 11).
    pub(crate) mean: f64,
    /// Unbiased; null with one study.
    pub(crate) variance: Option<f64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct OneStudy {
    pub(crate) study: String,
    pub(crate) seed: u64,
    pub(crate) best: f64,
    /// The best value after each trial; null before the first value.
    pub(crate) best_so_far: Vec<Option<f64>>,
    pub(crate) failed: usize,
}

/// Independent-samples t-test of two samplers' best values (Table 10).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Test {
    pub(crate) first: String,
    pub(crate) second: String,
    /// Mean of the first less mean of the second.
    pub(crate) difference: f64,
    /// Student's t with pooled variance, as the paper has it; null where neither varies.
    pub(crate) t: Option<f64>,
    pub(crate) p: Option<f64>,
    /// Welch's p, which does not assume equal variances.
    pub(crate) p_welch: Option<f64>,
    pub(crate) significant: bool,
    /// Whether the first one's mean is the better one.
    pub(crate) better: bool,
}

pub(super) fn run(args: &SearchArgs, plan: &SearchPlan) -> Outcome {
    if let Some(twice) =
        (1..args.compare.len()).find(|&i| args.compare[..i].contains(&args.compare[i]))
    {
        return Err(Failure::user(
            format!(
                "--compare names {} twice",
                sampler_kind(args.compare[twice])
            ),
            "name each sampler once; --seeds says how many studies it gets",
        ));
    }
    if let (Some(study), Some(_)) = (&args.study, &args.out)
        && !study.starts_with("postgres")
    {
        return Err(Failure::user(
            "a comparison keeps each of its studies in a file of its own below --out",
            "leave out --study, or name a PostgreSQL database",
        ));
    }
    let folder = plan.location.trials_folder()?;
    let result = folder.join(COMPARISON_FILE);
    if !args.resume && !result.exists() {
        refuse_other_things(&plan.location)?;
    }
    plan.plan.check_space(&plan.space)?;
    let mut evaluator = plan.plan.open()?;
    let space = evaluator.narrowed(&plan.space)?;
    let mut samplers: Vec<(SamplerKind, Vec<OneStudy>)> = args
        .compare
        .iter()
        .map(|sampler| (sampler_kind(*sampler), Vec::new()))
        .collect();
    // Seed by seed, so that a comparison that is stopped early has seen all samplers alike.
    for seed in (plan.study.seed..).take(args.seeds as usize) {
        for (sampler, studies) in &mut samplers {
            let location = plan.location.sibling(&format!("{sampler}-{seed}"));
            say(format!("{sampler}, seed {seed}:"));
            let one = SearchPlan {
                study: StudyConfig {
                    sampler: *sampler,
                    seed,
                    ..plan.study.clone()
                },
                space: space.clone(),
                plan: plan.plan.clone(),
                resume: args.resume,
                location,
            };
            if !search_with(&one, &space, &mut evaluator)?.completed {
                return Ok(Exit::Stopped);
            }
            studies.push(one_study(&one)?);
        }
    }
    let comparison = Comparison::of(
        plan.plan.metric(),
        &plan.study,
        samplers
            .into_iter()
            .map(|(sampler, studies)| Sampled::of(sampler, studies))
            .collect(),
    );
    let json = serde_json::to_string_pretty(&comparison)
        .map_err(|error| Failure::ours(format!("can't write the comparison: {error}")))?;
    write_file(&result, |sink| sink.write_all(json.as_bytes()))?;
    if args.json {
        print_json(&comparison)?;
    } else {
        print_text(comparison.text());
    }
    Ok(Exit::Done)
}

fn one_study(plan: &SearchPlan) -> Result<OneStudy, Failure> {
    let view = read_study(&plan.location)?;
    let best = view.best().and_then(|best| best.value);
    let best = best.ok_or_else(|| without_value(&plan.location))?;
    Ok(OneStudy {
        study: plan.location.to_string(),
        seed: plan.study.seed,
        best,
        best_so_far: best_so_far(&view.trials, plan.study.direction.sign()),
        failed: view.count(TrialState::Failed),
    })
}

/// The best value after each trial of the first rung, in the order of their numbers.
pub(crate) fn best_so_far(trials: &[TrialView], sign: f64) -> Vec<Option<f64>> {
    let mut best: Option<f64> = None;
    trials
        .iter()
        .filter(|trial| trial.rung == 0)
        .map(|trial| {
            if let Some(value) = trial.value
                && best.is_none_or(|best| sign * value < sign * best)
            {
                best = Some(value);
            }
            best
        })
        .collect()
}

impl Sampled {
    fn of(sampler: SamplerKind, studies: Vec<OneStudy>) -> Self {
        let values: Vec<f64> = studies.iter().map(|study| study.best).collect();
        Self {
            sampler: sampler.to_string(),
            mean: mean(&values),
            variance: variance(&values),
            studies,
        }
    }

    fn values(&self) -> Vec<f64> {
        self.studies.iter().map(|study| study.best).collect()
    }
}

impl Comparison {
    fn of(metric: &str, config: &StudyConfig, samplers: Vec<Sampled>) -> Self {
        let sign = config.direction.sign();
        let mut tests = Vec::new();
        for (i, first) in samplers.iter().enumerate() {
            for second in &samplers[i + 1..] {
                tests.push(Test::of(first, second, sign));
            }
        }
        Self {
            metric: metric.to_owned(),
            maximize: sign < 0.0,
            trials: config.trials,
            samplers,
            tests,
        }
    }

    /// The two tables for the terminal.
    fn text(&self) -> String {
        let mut text = format!(
            "best {} of {} trials\n{:<10}{:>14}{:>14}{:>9}\n",
            self.metric, self.trials, "sampler", "mean", "variance", "studies"
        );
        // Writing to a string cannot fail.
        for sampled in &self.samplers {
            let variance = sampled
                .variance
                .map_or("-".to_owned(), |variance| format!("{variance:.6}"));
            let _ = writeln!(
                text,
                "{:<10}{:>14.6}{variance:>14}{:>9}",
                sampled.sampler,
                sampled.mean,
                sampled.studies.len()
            );
        }
        text.push_str("\nindependent samples t-test\n");
        for test in &self.tests {
            let p = |p: Option<f64>| p.map_or("-".to_owned(), |p| format!("{p:.3e}"));
            let _ = writeln!(
                text,
                "{} vs. {}: difference {:+.6}, p = {} (Welch {}): {}",
                test.first,
                test.second,
                test.difference,
                p(test.p),
                p(test.p_welch),
                test.verdict()
            );
        }
        text.truncate(text.trim_end().len());
        text
    }
}

impl Test {
    fn of(first: &Sampled, second: &Sampled, sign: f64) -> Self {
        let (a, b) = (first.values(), second.values());
        let difference = mean(&a) - mean(&b);
        let pooled = t_test(&a, &b, Pooling::Pooled);
        let welch = t_test(&a, &b, Pooling::Welch);
        Self {
            first: first.sampler.clone(),
            second: second.sampler.clone(),
            difference,
            t: pooled.map(|(t, _)| t),
            p: pooled.map(|(_, p)| p),
            p_welch: welch.map(|(_, p)| p),
            significant: pooled.is_some_and(|(_, p)| p < SIGNIFICANT),
            better: sign * difference < 0.0,
        }
    }

    /// In the words of Table 10.
    pub(crate) fn verdict(&self) -> &'static str {
        match (self.significant, self.better) {
            (false, _) => "not significant",
            (true, true) => "significantly better",
            (true, false) => "significantly worse",
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn variance(values: &[f64]) -> Option<f64> {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    (values.len() > 1).then(|| squares / (values.len() - 1) as f64)
}

#[derive(Clone, Copy, PartialEq)]
enum Pooling {
    Pooled,
    Welch,
}

/// Two-sided t-test of two independent samples: t and p.
fn t_test(a: &[f64], b: &[f64], pooling: Pooling) -> Option<(f64, f64)> {
    let (va, vb) = (variance(a)?, variance(b)?);
    let (na, nb) = (a.len() as f64, b.len() as f64);
    let (error, freedom) = match pooling {
        Pooling::Pooled => {
            let freedom = na + nb - 2.0;
            let pooled = ((na - 1.0) * va + (nb - 1.0) * vb) / freedom;
            (pooled * (1.0 / na + 1.0 / nb), freedom)
        }
        Pooling::Welch => {
            let (ea, eb) = (va / na, vb / nb);
            // Welch's and Satterthwaite's degrees of freedom.
            let freedom = (ea + eb).powi(2) / (ea * ea / (na - 1.0) + eb * eb / (nb - 1.0));
            (ea + eb, freedom)
        }
    };
    if error <= 0.0 {
        return None;
    }
    let t = (mean(a) - mean(b)) / error.sqrt();
    let students = StudentsT::new(0.0, 1.0, freedom).ok()?;
    Some((t, 2.0 * students.cdf(-t.abs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scipy.stats.ttest_ind([5.1, 4.9, 5.4, 5.0, 5.3], [5.6, 5.2, 6.1, 5.9, 5.5], equal_var = True | False).
    #[test]
    fn t_tests_agree_with_scipy() {
        let a = [5.1, 4.9, 5.4, 5.0, 5.3];
        let b = [5.6, 5.2, 6.1, 5.9, 5.5];
        let (t, p) = t_test(&a, &b, Pooling::Pooled).unwrap();
        let (_, welch) = t_test(&a, &b, Pooling::Welch).unwrap();
        for (found, expected) in [
            (t, -2.853_870_759_731_947_3),
            (p, 0.021_351_615_481_134_8),
            (welch, 0.026_626_759_226_977_36),
        ] {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
    }

    #[test]
    fn without_variance_there_is_no_test() {
        assert_eq!(t_test(&[1.0, 1.0], &[2.0, 2.0], Pooling::Pooled), None);
        assert_eq!(t_test(&[1.0], &[2.0, 3.0], Pooling::Welch), None);
    }

    #[test]
    fn the_best_so_far_skips_failures_and_promotions() {
        let trial = |value: Option<f64>, rung: u64| TrialView {
            value,
            rung,
            ..TrialView::default()
        };
        let trials = [
            trial(None, 0),
            trial(Some(3.0), 0),
            trial(Some(1.0), 1),
            trial(Some(5.0), 0),
        ];
        assert_eq!(best_so_far(&trials, 1.0), [None, Some(3.0), Some(3.0)]);
        assert_eq!(best_so_far(&trials, -1.0), [None, Some(3.0), Some(5.0)]);
    }
}
