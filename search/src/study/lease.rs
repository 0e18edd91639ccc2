//! Who works on a trial, whether that worker still lives, and how it says so.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::location::Location;
use super::store::Store;

/// How long a trial is held.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Holder {
    /// By this process, which renews its lease while it lives; when it dies, the trial is free at once.
    Process,
    /// By somebody outside, for this many seconds.
    External {
        /// Seconds until the trial is handed out again if no result has come.
        seconds: f64,
    },
}

/// Prefix of owners that no process stands for.
const EXTERNAL: &str = "external";

impl Holder {
    pub(super) fn owner(self) -> String {
        match self {
            Self::Process => this_process(),
            Self::External { .. } => EXTERNAL.to_owned(),
        }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

/// Names a process beyond its life: number, start time, and the kernel and namespace in which they mean something.
fn this_process() -> String {
    let pid = std::process::id();
    let start = start_time(pid).unwrap_or_default();
    format!("process {pid} started {start} in {}", surroundings())
}

/// A name for one handing out of a trial: no other one ever has it.
pub(super) fn claim(owner: &str) -> String {
    static CLAIMS: AtomicU64 = AtomicU64::new(0);
    let count = CLAIMS.fetch_add(1, Ordering::Relaxed);
    let process = if owner == EXTERNAL {
        this_process()
    } else {
        owner.to_owned()
    };
    format!("{process} at {:.6} number {count}", now())
}

/// True only where it is certain that the owner's process has ended: same running kernel, same process namespace,
/// and no process of that number and start time.
pub(crate) fn is_dead(owner: &str) -> bool {
    let Some((process, place)) = owner.split_once(" in ") else {
        return false;
    };
    let mut words = process.split(' ');
    let (Some("process"), Some(pid), Some("started"), Some(start)) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return false;
    };
    let Ok(pid) = pid.parse() else {
        return false;
    };
    let here = surroundings();
    if here == UNKNOWN || place != here {
        return false;
    }
    start_time(pid).as_deref() != Some(start)
}

const UNKNOWN: &str = "unknown";

/// The running kernel's identity and this process's namespace, where the system tells (Linux).
fn surroundings() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let namespace = std::fs::read_link("/proc/self/ns/pid");
    match (boot, namespace) {
        (Ok(boot), Ok(namespace)) => format!("{} {}", boot.trim(), namespace.display()),
        _ => UNKNOWN.to_owned(),
    }
}

/// When a process started, in the kernel's ticks; `None` where there is no such process (a zombie counts as none).
fn start_time(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold spaces and parentheses; state and start time follow its last one.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18).map(str::to_owned)
}

/// Renews the lease of a running trial from a thread of its own, until it is dropped.
pub(crate) struct Heartbeat {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    /// Renews trial `number`'s lease `token` three times per lease.
    pub(crate) fn start(location: &Location, number: u64, token: u64, lease_seconds: f64) -> Self {
        let (stop, stopped) = channel();
        let location = location.clone();
        let thread = std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || beat(&location, number, token, lease_seconds, &stopped))
            .ok();
        Self {
            stop: Some(stop),
            thread,
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn beat(location: &Location, number: u64, token: u64, lease_seconds: f64, stopped: &Receiver<()>) {
    let pause = Duration::from_secs_f64((lease_seconds / 3.0).clamp(0.05, 3600.0));
    while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        // A missed beat is made good by the next one; a lost lease shows when the result is told.
        if let Ok(store) = Store::open(location) {
            let _ = store.renew(number, token, lease_seconds);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_are_not_dead() {
        assert!(!is_dead(&this_process()));
        assert!(!is_dead(EXTERNAL));
        assert!(!is_dead(""));
        assert!(!is_dead("process 1 started 0 in another kernel"));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_finished_process_is_dead() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        let start = start_time(pid).unwrap_or_default();
        child.wait().unwrap();
        assert!(is_dead(&format!(
            "process {pid} started {start} in {}",
            surroundings()
        )));
        let recycled = std::process::id();
        assert!(is_dead(&format!(
            "process {recycled} started 1 in {}",
            surroundings()
        )));
    }
}
