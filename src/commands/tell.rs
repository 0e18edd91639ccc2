//! `caskd tell`: how a trial came out.

use caskd_search::{Location, Outcome as TrialOutcome, Study, Told, TrialState};
use serde::Serialize;

use super::{print_json, print_text};
use crate::cli::TellArgs;
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::shell_word;

#[derive(Serialize)]
#[expect(clippy::struct_field_names, reason = "the names of the JSON object")]
struct Recorded {
    trial: u64,
    /// False where the same result had been told before, or the trial had gone to somebody else.
    recorded: bool,
    late: bool,
    state: TrialState,
    value: Option<f64>,
    error: Option<String>,
}

pub(crate) fn run(args: &TellArgs) -> Outcome {
    let outcome = match args.value {
        Some(value) => match TrialOutcome::of(value) {
            TrialOutcome::Failed(reason) => {
                return Err(Failure::user(
                    reason,
                    format!(
                        "a trial that diverged has failed: caskd tell {} {} --failed --reason '{value:e}'",
                        shell_word(&args.study),
                        args.trial
                    ),
                ));
            }
            outcome => outcome,
        },
        None => TrialOutcome::Failed(
            args.reason
                .clone()
                .unwrap_or_else(|| "failed, without a reason".to_owned()),
        ),
    };
    let mut study = Study::open(Location::parse(&args.study)?)?;
    let told = study.tell(args.trial, args.token, &outcome, args.seconds)?;
    let view = study.view()?;
    let Some(trial) = view.trials.iter().find(|t| t.number == args.trial) else {
        return Err(Failure::ours(format!("trial {} is gone", args.trial)));
    };
    let result = match (trial.value, &trial.error) {
        (Some(value), _) => format!("trial {}: {value}", trial.number),
        (None, Some(error)) => format!("trial {} failed: {error}", trial.number),
        (None, None) => format!("trial {} is {}", trial.number, trial.state.name()),
    };
    if args.json {
        print_json(&Recorded {
            trial: trial.number,
            recorded: told == Told::Recorded,
            late: told == Told::Late,
            state: trial.state,
            value: trial.value,
            error: trial.error.clone(),
        })?;
    } else {
        print_text(match told {
            Told::Recorded => result,
            Told::Known => format!("{result} (told before)"),
            Told::Late => format!("{result}; the one told now came too late and is kept apart"),
        });
    }
    Ok(Exit::Done)
}
