//! One file a command; what several of them need stands here.

pub(crate) mod ask;
pub(crate) mod build;
mod data;
pub(crate) mod demo;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod export_model;
pub(crate) mod fidelity;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod loss;
pub(crate) mod prune;
pub(crate) mod report;
pub(crate) mod search;
pub(crate) mod status;
pub(crate) mod tell;
pub(crate) mod train;
pub(crate) mod verify;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use caskd_formats::{Cache, Io, Spread};
use serde::Serialize;
use tch::{Device, Kind};

use crate::cli::DtypeArg;
use crate::exit::Failure;

/// `cpu` or `cuda:N`, refused when there is no such device.
pub(crate) fn parse_device(text: &str) -> Result<Device, Failure> {
    let unknown = || {
        Failure::user(
            format!("`{text}` is no device"),
            "give cpu, or cuda:0 for the first GPU",
        )
    };
    match text {
        "cpu" => Ok(Device::Cpu),
        "cuda" => parse_device("cuda:0"),
        _ => {
            let index: usize = text
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .ok_or_else(unknown)?;
            let devices = tch::Cuda::device_count().max(0) as usize;
            if index >= devices {
                let hint = "use --device cpu, or point LIBTORCH to a CUDA build of libtorch and build again";
                return Err(Failure::user(
                    format!("there is no CUDA device {index}: libtorch sees {devices}"),
                    hint,
                ));
            }
            Ok(Device::Cuda(index))
        }
    }
}

/// Opens the cache in `folder`, whose shards may lie in the folders `shards` too.
pub(crate) fn open_cache(folder: &Path, shards: &[PathBuf], io: Io) -> Result<Cache, Failure> {
    Ok(Cache::open_in(Arc::new(Spread::new(folder, shards)?), io)?)
}

pub(crate) fn kind_of(dtype: DtypeArg) -> Kind {
    match dtype {
        DtypeArg::F32 => Kind::Float,
        DtypeArg::Bf16 => Kind::BFloat16,
    }
}

/// Prints the command's one JSON object.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::ours(format!("can't write the JSON: {error}")))?;
    print_text(text);
    Ok(())
}

/// Prints the command's result for people.
pub(crate) fn print_text(text: impl std::fmt::Display) {
    use std::io::Write;
    // Who closes the pipe has read enough: `caskd status study | head`.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Refuses to write over something.
pub(crate) fn refuse_existing(path: &Path) -> Result<(), Failure> {
    if path.exists() {
        return Err(Failure::user(
            format!("`{}` exists already", path.display()),
            "choose another --out, or remove it first",
        ));
    }
    Ok(())
}

/// Writes a whole file under its final name, or nothing. A name that something other than a file has, such as a device,
/// is refused: the file would take its place.
pub(crate) fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut dyn std::io::Write) -> std::io::Result<()>,
) -> Result<(), Failure> {
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        return Err(Failure::user(
            format!("`{}` is there and is no file", path.display()),
            "give the name of a file to write",
        ));
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let file = tempfile::Builder::new()
            .prefix(".caskd-")
            .tempfile_in(folder)?;
        let mut buffered = std::io::BufWriter::with_capacity(1 << 20, file);
        fill(&mut buffered)?;
        let file = buffered
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)?;
        file.as_file().sync_all()?;
        let mut permissions = file.as_file().metadata()?.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
        file.as_file().set_permissions(permissions)?;
        file.persist(path).map_err(|error| error.error)?;
        std::fs::File::open(folder)?.sync_all()
    };
    write().map_err(|error| Failure::file("write", path, &error))
}
