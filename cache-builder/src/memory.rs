//! How much memory this process may still take.

use std::path::{Path, PathBuf};

/// Bytes that are free to this process: of the machine, and of the control groups that it runs in (versions 1 and 2).
/// What the system only caches counts as free. `None` where the system does not say.
pub fn available_memory() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.and_then(|text| field(&text, "MemAvailable:").map(|kib| kib * 1024));
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = group_headroom(Path::new("/sys/fs/cgroup"), &groups);
    machine.into_iter().chain(group).min()
}

/// The smallest headroom of the groups that `/proc/self/cgroup` names, and of those above them.
fn group_headroom(root: &Path, groups: &str) -> Option<u64> {
    let mut least = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (mount, version) = if controllers.is_empty() {
            (root.to_owned(), &VERSION_2)
        } else if controllers.split(',').any(|name| name == "memory") {
            (root.join("memory"), &VERSION_1)
        } else {
            continue;
        };
        // Inside a container the path may be that of the host; the mount then is the group itself.
        let inside = mount.join(path.trim_start_matches('/'));
        for folder in inside
            .ancestors()
            .take_while(|folder| folder.starts_with(&mount))
        {
            let headroom = version.headroom(folder);
            least = headroom.into_iter().chain(least).min();
        }
    }
    least
}

/// Names of the files that tell a group's memory.
struct Version {
    limit: &'static str,
    usage: &'static str,
    /// Fields of `memory.stat` that the system gives back when it must.
    cached: [&'static str; 2],
}

const VERSION_1: Version = Version {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cached: ["total_active_file", "total_inactive_file"],
};

const VERSION_2: Version = Version {
    limit: "memory.max",
    usage: "memory.current",
    cached: ["active_file", "inactive_file"],
};

impl Version {
    /// `None` where there is no limit.
    fn headroom(&self, folder: &Path) -> Option<u64> {
        let read = |name: &str| -> Option<String> {
            let path: PathBuf = folder.join(name);
            std::fs::read_to_string(path).ok()
        };
        let limit: u64 = read(self.limit)?.trim().parse().ok()?;
        // Version 1 says "none" by a number that no machine has.
        if limit > 1 << 60 {
            return None;
        }
        let usage: u64 = read(self.usage)?.trim().parse().ok()?;
        let stat = read("memory.stat").unwrap_or_default();
        let cached: u64 = self
            .cached
            .iter()
            .filter_map(|name| field(&stat, name))
            .sum();
        Some(limit.saturating_sub(usage.saturating_sub(cached)))
    }
}

/// The number after a name, in a file of `name number` lines.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut words = text.lines().map(str::split_whitespace);
    words.find_map(|mut line| (line.next()? == name).then(|| line.next()?.parse().ok())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(folder: &Path, version: &Version, limit: &str, usage: u64, cached: u64) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join(version.limit), format!("{limit}\n")).unwrap();
        std::fs::write(folder.join(version.usage), format!("{usage}\n")).unwrap();
        let stat = format!(
            "anon 5\n{} {cached}\n{} 1\n",
            version.cached[0], version.cached[1]
        );
        std::fs::write(folder.join("memory.stat"), stat).unwrap();
    }

    #[test]
    fn the_tightest_group_decides() {
        let root = tempfile::tempdir().unwrap();
        let check = |groups: &str, expected: Option<u64>| {
            assert_eq!(group_headroom(root.path(), groups), expected, "{groups}");
        };
        check("0::/a/b\n", None);
        group(&root.path().join("a/b"), &VERSION_2, "max", 10, 0);
        check("0::/a/b\n", None);
        group(&root.path().join("a"), &VERSION_2, "1000", 700, 99);
        check("0::/a/b\n", Some(400));
        group(&root.path().join("a/b"), &VERSION_2, "300", 100, 9);
        check("0::/a/b\n", Some(210));
        check("0::/elsewhere/of/the/host\n", None);
        let v1 = root.path().join("memory/x");
        group(&v1, &VERSION_1, "9223372036854771712", 7, 0);
        check("4:memory:/x\n1:cpu:/y\n", None);
        group(&v1, &VERSION_1, "100", 7, 0);
        check("4:memory:/x\n1:cpu:/y\n", Some(94));
        check("not a line\n", None);
    }

    #[test]
    fn this_machine_says_something_plausible() {
        if Path::new("/proc/meminfo").exists() {
            let bytes = available_memory().unwrap();
            assert!(bytes > 1 << 20 && bytes < 1 << 50, "{bytes}");
        }
    }
}
