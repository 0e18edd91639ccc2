//! Where a teacher computes, and in how much memory, as the user says it.

use caskd_cache_builder::{Placement, available_memory};
use tch::Device;

use crate::cli::BuildArgs;
use crate::commands::parse_device;
use crate::exit::Failure;

/// A machine that says less is full of what can wait: a small build is not refused for it.
const LEAST_BUDGET: u64 = 1 << 30;

/// Reads --device, --memory-budget and --spill.
pub(super) fn placement(args: &BuildArgs) -> Result<Placement, Failure> {
    let devices = devices(&args.device)?;
    let memory_budget = match args.memory_budget.as_str() {
        // A tenth is left to others. Of a GPU libtorch does not say what is free.
        "auto" if devices.iter().all(|device| *device == Device::Cpu) => {
            available_memory().map(|bytes| (bytes / 10 * 9).max(LEAST_BUDGET))
        }
        "auto" => None,
        text => Some(parse_size(text)?),
    };
    if let Some(folder) = &args.spill
        && !folder.is_dir()
    {
        return Err(Failure::user(
            format!("--spill `{}` is no folder", folder.display()),
            "give a folder on a fast disk with room for activations",
        ));
    }
    Ok(Placement {
        devices,
        memory_budget,
        spill: args.spill.clone(),
    })
}

fn devices(text: &str) -> Result<Vec<Device>, Failure> {
    let devices: Vec<Device> = text
        .split(',')
        .map(|name| parse_device(name.trim()))
        .collect::<Result<_, _>>()?;
    let distinct = (1..devices.len()).all(|index| !devices[..index].contains(&devices[index]));
    let mixed = devices.len() > 1 && devices.contains(&Device::Cpu);
    if !distinct || mixed {
        return Err(Failure::user(
            format!("--device `{text}` does not name different GPUs"),
            "layers are spread over GPUs: --device cuda:0,cuda:1",
        ));
    }
    Ok(devices)
}

/// `4GiB`, `500 MB`, `4G` (binary, as `ulimit` and Kubernetes people say it), or a plain number of bytes.
pub(super) fn parse_size(text: &str) -> Result<u64, Failure> {
    let wrong = || {
        Failure::user(
            format!("--memory-budget `{text}` is no size"),
            "for instance: --memory-budget 4GiB, 500MB, or auto",
        )
    };
    let text_end = text.trim_end();
    let unit_at = text_end
        .find(|letter: char| !letter.is_ascii_digit() && letter != '.')
        .unwrap_or(text_end.len());
    let (number, unit) = text_end.split_at(unit_at);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let factor = match unit.trim() {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "K" | "KiB" | "Ki" => 1024.0,
        "M" | "MiB" | "Mi" => 1024.0 * 1024.0,
        "G" | "GiB" | "Gi" => 1024.0 * 1024.0 * 1024.0,
        "T" | "TiB" | "Ti" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    let bytes = number * factor;
    if !bytes.is_finite() || bytes < 1.0 {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_or_refused() {
        for (text, expected) in [
            ("4GiB", 4 << 30),
            ("4G", 4 << 30),
            ("1.5 GiB", 3 << 29),
            ("500MB", 500_000_000),
            ("64 KiB", 65_536),
            ("12345", 12_345),
        ] {
            assert_eq!(parse_size(text).unwrap(), expected, "{text}");
        }
        for text in ["", "GiB", "4 apples", "-1G", "0", "1e3", "NaN", "4GiBs"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn devices_are_different_gpus() {
        assert_eq!(devices("cpu").unwrap(), [Device::Cpu]);
        for text in ["cpu,cpu", "cpu,cuda:0", "cuda:", "gpu", "cuda:0,", ""] {
            assert!(devices(text).is_err(), "{text}");
        }
    }
}
