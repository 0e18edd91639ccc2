//! `caskd export-model`: a run or a model for transformers and PEFT.

use std::path::{Path, PathBuf};

use caskd_models::{LoadOptions, pad_to_dense, save_model, save_peft};
use caskd_trainer::is_run;
use serde::Serialize;
use tch::Device;

use super::eval::load_any;
use super::{kind_of, print_json, refuse_existing};
use crate::cli::{ExportModelArgs, PrunedArg};
use crate::exit::{Exit, Failure, Outcome};
use crate::terminal::say;

#[derive(Serialize)]
struct Exported<'a> {
    out: &'a Path,
    /// "model", or "adapter" with --peft.
    written: &'static str,
    architecture: &'static str,
    parameters: u64,
    /// Blocks were filled up with zeros.
    padded: bool,
    /// The model that adapters go onto.
    base: Option<PathBuf>,
    bytes: u64,
}

pub(crate) fn run(args: &ExportModelArgs) -> Outcome {
    refuse_existing(&args.out)?;
    let options = LoadOptions {
        device: Device::Cpu,
        kind: kind_of(args.dtype),
    };
    if args.peft && !is_run(&args.model) {
        return Err(Failure::user(
            format!(
                "`{}` is no run, and only runs have adapters",
                args.model.display()
            ),
            "give the folder of a finished `caskd train`, or leave out --peft",
        ));
    }
    let mut model = load_any(&args.model, &options)?;
    let padded = model.network.config().is_pruned() && args.pruned == PrunedArg::Padded;
    if args.peft && model.network.sparsity().is_some() {
        return Err(Failure::user(
            "the student is masked: PEFT would add its adapters to the zeros too, which gives other numbers",
            "leave out --peft: the merged model keeps its mask",
        ));
    }
    if args.peft && model.network.lora().is_none() {
        return Err(Failure::user(
            format!(
                "`{}` trained all weights and has no adapters",
                args.model.display()
            ),
            "leave out --peft",
        ));
    }
    // What other programs load has no 8 bits of ours.
    model.network.unpack();
    if padded {
        pad_to_dense(&mut model);
    }
    let base = if args.peft {
        Some(save_peft(&model, &args.out)?)
    } else {
        model.network.merge_lora();
        save_model(&model, &args.out)?;
        None
    };
    let bytes =
        folder_bytes(&args.out).map_err(|error| Failure::file("read", &args.out, &error))?;
    let exported = Exported {
        out: &args.out,
        written: if args.peft { "adapter" } else { "model" },
        architecture: model.network.architecture(),
        parameters: model.network.num_parameters(),
        padded,
        base,
        bytes,
    };
    say(format!(
        "{} `{}`: {:.1} MB{}",
        exported.written,
        args.out.display(),
        bytes as f64 / 1e6,
        match (&exported.base, padded) {
            (Some(base), _) => format!(", for the base model `{}`", base.display()),
            (None, true) => ", pruned blocks filled up with zeros".to_owned(),
            (None, false) => String::new(),
        }
    ));
    if args.json {
        print_json(&exported)?;
    }
    Ok(Exit::Done)
}

fn folder_bytes(folder: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() {
            folder_bytes(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(bytes)
}
