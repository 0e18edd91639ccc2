//! The demo's table, and what is said below it.

use std::fmt::Write as _;
use std::path::PathBuf;

use serde::Serialize;

use super::{Places, Scores, Searched, TeacherAccount, Trained, teacher_path};
use crate::cli::DemoArgs;
use crate::exit::Failure;
use crate::terminal::duration;

/// A line of the table.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) model: &'static str,
    /// On `heldout.txt`.
    pub(super) perplexity: f64,
    /// On the responses of `heldout.jsonl`.
    pub(super) response_perplexity: f64,
    /// Mean KL(teacher ‖ model) in nats over the held-out responses.
    pub(super) kl: f64,
    pub(super) tokens_per_second: f64,
    pub(super) seconds: f64,
    pub(super) artefact: PathBuf,
}

#[derive(Serialize)]
pub(super) struct DemoReport<'a> {
    pub(super) rows: &'a [Row],
    pub(super) teacher_seconds: f64,
    pub(super) online_teacher_seconds: f64,
    pub(super) seconds: f64,
}

pub(super) fn table_rows(
    places: &Places,
    args: &DemoArgs,
    account: &TeacherAccount,
    teacher: &[f64; 2],
    scores: &[Scores],
    trained: [&Trained; 4],
    search_seconds: [f64; 2],
) -> Result<Vec<Row>, Failure> {
    let scored = |model, scores: &Scores, tokens_per_second, seconds, artefact| Row {
        model,
        perplexity: scores.text_perplexity,
        response_perplexity: scores.response_perplexity,
        kl: scores.kl,
        tokens_per_second,
        seconds,
        artefact,
    };
    let [dense, sparse, lora, kd, random, sabo] = scores else {
        return Err(Failure::ours("six models were to be evaluated"));
    };
    Ok(vec![
        Row {
            model: "teacher",
            perplexity: teacher[0],
            response_perplexity: teacher[1],
            kl: 0.0,
            tokens_per_second: account.tokens_per_second,
            seconds: account.seconds,
            artefact: places.join("cache"),
        },
        scored(
            "dense",
            dense,
            dense.tokens_per_second,
            dense.seconds,
            teacher_path(args)?,
        ),
        scored(
            "sparse (without LoRA)",
            sparse,
            sparse.tokens_per_second,
            sparse.seconds,
            places.join("student"),
        ),
        scored(
            "sparse (with LoRA)",
            lora,
            trained[0].tokens_per_second,
            trained[0].seconds,
            places.join("lora"),
        ),
        scored(
            "standard KD",
            kd,
            trained[1].tokens_per_second,
            trained[1].seconds,
            places.join("kd"),
        ),
        scored(
            "BayesKD (random)",
            random,
            trained[2].tokens_per_second,
            trained[2].seconds + search_seconds[0],
            places.join("bayeskd-random"),
        ),
        scored(
            "BayesKD (SABO)",
            sabo,
            trained[3].tokens_per_second,
            trained[3].seconds + search_seconds[1],
            places.join("bayeskd-sabo"),
        ),
    ])
}

pub(super) fn as_text(
    report: &DemoReport<'_>,
    searches: &[(&str, &Searched)],
    account: &TeacherAccount,
    places: &Places,
) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "\n{:<22} {:>10} {:>10} {:>8} {:>9} {:>8}  artefact",
        "model", "ppl text", "ppl resp.", "KL", "tokens/s", "time"
    );
    for row in report.rows {
        let _ = writeln!(
            text,
            "{:<22} {:>10.2} {:>10.2} {:>8.4} {:>9.0} {:>8}  {}",
            row.model,
            row.perplexity,
            row.response_perplexity,
            row.kl,
            row.tokens_per_second,
            duration(row.seconds),
            row.artefact.display()
        );
    }
    let _ = writeln!(
        text,
        "\nppl text: held-out prose; ppl resp. and KL to the teacher (nats): held-out responses. tokens/s and time: the teacher's \
         pass, the evaluation of dense and sparse, the training of the others (with its search for BayesKD). The dense model is the \
         student before pruning; here it has the teacher's weights."
    );
    for (name, searched) in searches {
        let _ = writeln!(text, "best of {name}: {}", searched.settings);
    }
    let _ = writeln!(
        text,
        "\nThe teacher ran once, for {} ({} positions), and was never loaded again. With the teacher in the loop (online KD) the same \
         runs and trials would have spent {} in it, at the same {:.0} tokens/s: {:.1} times as much.",
        duration(report.teacher_seconds),
        account.positions,
        duration(report.online_teacher_seconds),
        account.tokens_per_second,
        report.online_teacher_seconds / report.teacher_seconds.max(1e-9),
    );
    let _ = write!(
        text,
        "Everything lies in `{}`; the whole demo took {}.",
        places.out.display(),
        duration(report.seconds)
    );
    text
}
