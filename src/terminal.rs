//! Talk on stderr: progress with rate and ETA, a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::exit::Failure;

/// Set by Ctrl-C and SIGTERM; long work looks at it between batches and stops cleanly.
pub(crate) static STOP: AtomicBool = AtomicBool::new(false);

/// Makes the first Ctrl-C (or SIGTERM) ask for a clean stop, the second one end the process.
pub(crate) fn install_stop_handler() -> Result<(), Failure> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping after the current step; press Ctrl-C again to stop at once");
    })
    .map_err(|error| Failure::ours(format!("can't install the signal handler: {error}")))
}

/// Sends what the libraries warn of to stderr, at once.
pub(crate) fn show_warnings() {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_target(false)
        .without_time()
        .init();
}

/// Whether a stop was asked for.
pub(crate) fn stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// One line of talk.
pub(crate) fn say(text: impl std::fmt::Display) {
    eprintln!("{text}");
}

/// Progress of one piece of work.
pub(crate) struct Progress {
    label: String,
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Option<Instant>,
    first_done: Option<u64>,
}

/// Between two plain lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    /// A bar (or line) headed by `label`; nothing is shown before the first update.
    pub(crate) fn new(label: impl Into<String>) -> Self {
        let label = label.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {percent:>3}%  {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style);
            bar.set_prefix(label.clone());
            bar
        });
        Self {
            label,
            bar,
            started: Instant::now(),
            last_line: None,
            first_done: None,
        }
    }

    /// Shows `done` of `total` with `detail` (rate, loss …) and the time that is left.
    pub(crate) fn update(&mut self, done: u64, total: u64, detail: &str) {
        // What an earlier run had done says nothing about the speed of this one.
        let first = *self.first_done.get_or_insert(done);
        let eta = self.eta(done.saturating_sub(first), total.saturating_sub(done));
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(format!("{detail}  ETA {eta}"));
        } else if done >= total
            || self
                .last_line
                .is_none_or(|last| last.elapsed() >= LINE_EVERY)
        {
            self.last_line = Some(Instant::now());
            let percent = 100.0 * done as f64 / (total.max(1)) as f64;
            eprintln!("{}: {percent:.0}%  {detail}  ETA {eta}", self.label);
        }
    }

    /// A line of talk beside the bar.
    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(text)),
            None => say(text),
        }
    }

    fn eta(&self, done_here: u64, left: u64) -> String {
        if left == 0 {
            return "0s".into();
        }
        if done_here == 0 {
            return "--".into();
        }
        let seconds = self.started.elapsed().as_secs_f64() / done_here as f64 * left as f64;
        duration(seconds)
    }

    /// Removes the bar.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `75` → `1m15s`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

/// A value of whatever size: losses may be tiny, a command's value may be anything.
pub(crate) fn shown(value: f64) -> String {
    if value == 0.0 || (1e-3..1e7).contains(&value.abs()) {
        format!("{value:.4}")
    } else {
        format!("{value:.4e}")
    }
}

/// `1536000` → `1.5 MB`.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "B" {
                format!("{count} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// One word of a command line as a shell takes it.
pub(crate) fn shell_word(text: impl std::fmt::Display) -> String {
    let text = text.to_string();
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "._-+/=:,@%".contains(letter);
    if !text.is_empty() && text.chars().all(is_plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_short() {
        assert_eq!(duration(9.4), "9s");
        assert_eq!(duration(75.0), "1m15s");
        assert_eq!(duration(3700.0), "1h01m");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_536_000), "1.5 MB");
        assert_eq!(
            [6.12766, 0.0, -2.31e-5].map(shown),
            ["6.1277", "0.0000", "-2.3100e-5"]
        );
    }

    #[test]
    fn what_goes_to_the_shell_is_one_word() {
        assert_eq!(shell_word("a b'c$(d)"), r"'a b'\''c$(d)'");
        assert_eq!(shell_word("out/x-1.json"), "out/x-1.json");
        assert_eq!(shell_word(""), "''");
    }
}
