//! Any program as the objective: parameters in, one number out.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use caskd_search::{BoxError, Discrepancy, Objective, Outcome, Params, Trial};

use super::setting_text;
use crate::commands::write_file;
use crate::exit::Failure;
use crate::terminal::{shell_word, stopped};

/// Between two looks at a running program.
const LOOK: Duration = Duration::from_millis(20);
/// How long a program may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(5);
/// What is read of the end of an output.
const TAIL: u64 = 4096;
/// Of an error's output, what becomes the trial's reason.
const REASON: usize = 500;

/// Runs a command line for each trial.
pub(crate) struct CommandObjective {
    pub(crate) command: String,
    pub(crate) timeout: Option<Duration>,
}

/// How the program ended.
enum End {
    Exited(ExitStatus),
    TimedOut,
    Stopped,
}

impl Objective for CommandObjective {
    fn evaluate(&mut self, trial: &Trial<'_>) -> Result<Outcome, BoxError> {
        let dir = trial
            .dir
            .canonicalize()
            .unwrap_or_else(|_| trial.dir.to_owned());
        let json = trial.params.to_json();
        let params = dir.join("params.json");
        write_file(&params, |sink| sink.write_all(json.as_bytes()))?;
        let (output, errors) = (dir.join("stdout.txt"), dir.join("stderr.txt"));
        let child = Command::new("sh")
            .arg("-c")
            .arg(line(&self.command, trial, &params, &json, &dir))
            .envs(environment(trial, &params, &dir))
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(File::create(&errors)?)
            // A group of its own: Ctrl-C reaches it through us, and its children end with it.
            .process_group(0)
            .spawn()?;
        match watch(child, self.timeout)? {
            End::Stopped => Ok(Outcome::Stopped),
            End::TimedOut => {
                let limit = self.timeout.unwrap_or_default().as_secs_f64();
                Ok(Outcome::Failed(format!("took longer than {limit} seconds")))
            }
            End::Exited(status) if status.success() => Ok(match value_of(&tail(&output)?) {
                Ok(value) => Outcome::of(value),
                Err(message) => Outcome::Failed(message),
            }),
            End::Exited(status) => {
                let said = tail(&errors)?;
                let said = last_characters(said.trim());
                if let Some(126 | 127) = status.code() {
                    // No trial of this study can work.
                    return Err(Box::new(Failure::user(
                        format!("the shell can't run `{}`: {said}", self.command),
                        "mend the command and begin again in another --out",
                    )));
                }
                Ok(Outcome::Failed(if said.is_empty() {
                    format!("{status}, without a word on stderr")
                } else {
                    format!("{status}: {said}")
                }))
            }
        }
    }

    fn discrepancy(&mut self, _: &Params) -> Result<Discrepancy, BoxError> {
        // Nothing is known of the program: expected improvement decides alone.
        Ok(Discrepancy::default())
    }
}

/// The command with what the braces stand for, quoted for the shell.
fn line(command: &str, trial: &Trial<'_>, params: &Path, json: &str, dir: &Path) -> String {
    let mut line = command.to_owned();
    for (name, value) in [
        ("{params.json}", params.display().to_string()),
        ("{params}", json.to_owned()),
        ("{trial}", trial.number.to_string()),
        ("{seed}", trial.seed.to_string()),
        ("{rung}", trial.rung.to_string()),
        ("{fraction}", trial.fraction.to_string()),
        ("{budget}", trial.budget.to_string()),
        ("{dir}", dir.display().to_string()),
    ] {
        line = line.replace(name, &shell_word(&value));
    }
    line
}

/// The command with a trial's numbers and the parameters in `file`; `None` where it takes no file, or writes into
/// the trial's own folder.
pub(crate) fn with_file(command: &str, trial: &Trial<'_>, file: &Path) -> Option<String> {
    let runs_anywhere = command.contains("{params.json}") && !command.contains("{dir}");
    let json = trial.params.to_json();
    runs_anywhere.then(|| line(command, trial, file, &json, trial.dir))
}

/// A trial as a line for the shell: the program may look into its environment as well as at its arguments.
pub(crate) fn repeated(command: &str, trial: &Trial<'_>) -> String {
    let dir = trial
        .dir
        .canonicalize()
        .unwrap_or_else(|_| trial.dir.to_owned());
    let params = dir.join("params.json");
    let variables: Vec<String> = environment(trial, &params, &dir)
        .into_iter()
        .map(|(name, value)| format!("{name}={}", shell_word(&value)))
        .collect();
    let line = line(command, trial, &params, &trial.params.to_json(), &dir);
    format!("env {} sh -c {}", variables.join(" "), shell_word(&line))
}

/// The same as the braces, for programs that rather look into their environment.
fn environment(trial: &Trial<'_>, params: &Path, dir: &Path) -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = trial
        .params
        .iter()
        .map(|(name, value)| {
            let plain = |c: char| {
                if c.is_ascii_alphanumeric() {
                    c.to_ascii_uppercase()
                } else {
                    '_'
                }
            };
            let name: String = name.chars().map(plain).collect();
            (format!("CASKD_PARAM_{name}"), setting_text(value))
        })
        .collect();
    for (name, value) in [
        ("CASKD_PARAMS", params.display().to_string()),
        ("CASKD_TRIAL", trial.number.to_string()),
        ("CASKD_SEED", trial.seed.to_string()),
        ("CASKD_RUNG", trial.rung.to_string()),
        ("CASKD_FRACTION", trial.fraction.to_string()),
        ("CASKD_BUDGET", trial.budget.to_string()),
        ("CASKD_TRIAL_DIR", dir.display().to_string()),
    ] {
        variables.push((name.to_owned(), value));
    }
    variables
}

/// Waits for the program, or ends it: at a timeout, and when a stop was asked for.
fn watch(mut child: Child, timeout: Option<Duration>) -> Result<End, BoxError> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(End::Exited(status));
        }
        let late = timeout.is_some_and(|timeout| begun.elapsed() > timeout);
        if late || stopped() {
            end(&mut child)?;
            return Ok(if late { End::TimedOut } else { End::Stopped });
        }
        std::thread::sleep(LOOK);
    }
}

/// Asks the program and its children to end, and makes them after a while.
fn end(child: &mut Child) -> Result<(), BoxError> {
    let group = format!("-{}", child.id());
    let reached = |signal: &str| {
        Command::new("kill")
            .args([signal, "--", &group])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    reached("-TERM");
    let asked = Instant::now();
    while asked.elapsed() < GRACE {
        // The shell ends at once; what it started may still be about to, or ignore the signal.
        if child.try_wait()?.is_some() && !reached("-0") {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
    reached("-KILL");
    child.wait()?;
    Ok(())
}

/// The end of a file, as text.
fn tail(path: &Path) -> Result<String, BoxError> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn last_characters(text: &str) -> String {
    let count = text.chars().count();
    text.chars().skip(count.saturating_sub(REASON)).collect()
}

/// The number in the last line that is not empty.
fn value_of(output: &str) -> Result<f64, String> {
    let line = output
        .lines()
        .map(str::trim)
        .rfind(|line| !line.is_empty())
        .ok_or("the program printed nothing; its last line must be the value")?;
    if let Ok(number) = line.parse::<f64>() {
        return Ok(number);
    }
    serde_json::from_str::<serde_json::Value>(line)
        .ok()
        .and_then(|json| json.get("value")?.as_f64())
        .ok_or_else(|| {
            format!(
                "the last line of its output is neither a number nor JSON with a \"value\": {}",
                last_characters(line)
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_is_the_value() {
        for (output, value) in [
            ("1.5", 1.5),
            ("loss 3\n-2e-3\n\n", -2e-3),
            ("{\"value\": 7, \"more\": [1]}\n", 7.0),
        ] {
            assert_eq!(value_of(output), Ok(value));
        }
        assert!(value_of("nan").is_ok_and(f64::is_nan));
        for bad in [
            "",
            "\n",
            "done",
            "{\"value\": null}",
            "{\"loss\": 1}",
            "1 2",
        ] {
            assert!(value_of(bad).is_err(), "{bad}");
        }
    }
}
