//! What the process holds in memory.

use std::fs;

/// Resident memory in bytes; `None` where the system does not tell.
pub(crate) fn resident() -> Option<u64> {
    field("VmRSS:")
}

/// The largest that it was since the process began.
pub(crate) fn peak() -> Option<u64> {
    field("VmHWM:")
}

fn field(name: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_that_is_touched_counts() {
        let before = resident().unwrap();
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        let during = resident().unwrap();
        assert!(during > before + (48 << 20), "{before} to {during}");
        assert!(peak().unwrap() >= during - (1 << 20));
        drop(held);
    }
}
