//! `caskd loss`: any loss and its gradient on given tensors.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use caskd_trainer::{LossTerm, LossValues, loss_values};
use serde::Serialize;
use serde_json::json;
use tch::{Kind, Tensor};

use super::{print_json, print_text, write_file};
use crate::cli::LossArgs;
use crate::exit::{Exit, Failure, Outcome};

/// Keys of a term that play no part here.
const NOT_HERE: [&str; 7] = [
    "weight",
    "schedule",
    "final_weight",
    "warmup_share",
    "reduction",
    "layers",
    "positions",
];

/// What `--json` prints.
#[derive(Serialize)]
struct Evaluated<'a> {
    out: &'a Path,
    kind: &'static str,
    /// All keys of the kind, those at their defaults too.
    settings: toml::Table,
    /// "f32" or "f64".
    dtype: &'static str,
    positions: u64,
    /// Positions that were not left out.
    counted: u64,
    /// Mean of the values over all positions.
    mean: f64,
    /// Mean over those that counted.
    mean_of_counted: f64,
}

pub(crate) fn run(args: &LossArgs) -> Outcome {
    if args.list {
        return list(args.json);
    }
    let (Some(kind), Some(input), Some(out)) = (&args.kind, &args.input, &args.out) else {
        return Err(Failure::user(
            "--kind, --in and --out are needed",
            "see `caskd loss --help`; `caskd loss --list` shows every kind",
        ));
    };
    let term = read_term(kind, &args.settings)?;
    let tensors = read_tensors(input)?;
    let values = loss_values(&term, &tensors)?;
    write_values(out, &term, &values)?;
    let evaluated = Evaluated {
        out,
        kind: term.kind(),
        settings: keys_that_matter(&term),
        dtype: if values.value.kind() == Kind::Double {
            "f64"
        } else {
            "f32"
        },
        positions: values.positions,
        counted: values.counted,
        mean: values.mean,
        mean_of_counted: values.mean * values.positions as f64 / values.counted.max(1) as f64,
    };
    if args.json {
        print_json(&evaluated)?;
    } else {
        print_text(format!(
            "{}: mean {:.9} over {} positions ({} counted) in {}; `value` and `grad` in `{}`",
            evaluated.kind,
            evaluated.mean,
            evaluated.positions,
            evaluated.counted,
            evaluated.dtype,
            out.display()
        ));
    }
    Ok(Exit::Done)
}

fn read_term(kind: &str, settings: &[String]) -> Result<LossTerm, Failure> {
    let mut keys = toml::Table::new();
    keys.insert("kind".to_owned(), toml::Value::String(kind.to_owned()));
    for setting in settings {
        let (key, value) = setting.split_once('=').ok_or_else(|| {
            Failure::user(
                format!("`{setting}` is not KEY=VALUE"),
                "for instance: --set temperature=2",
            )
        })?;
        let (key, value) = (key.trim(), value.trim());
        let refused = NOT_HERE.contains(&key) || key == "kind";
        if refused && !(key == "reduction" && kind == "knowledge-alignment") {
            return Err(Failure::user(
                format!("`{key}` has no effect here"),
                "values come out position by position, unweighted; --kind names the loss",
            ));
        }
        // A TOML value, or a bare string.
        let parsed = format!("value = {value}").parse::<toml::Table>();
        let value = match parsed {
            Ok(mut table) if table.len() == 1 => table.remove("value"),
            _ => None,
        }
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
        keys.insert(key.to_owned(), value);
    }
    Ok(LossTerm::from_table(&keys)?)
}

/// The keys of a term without those that play no part in the value of a position.
fn keys_that_matter(term: &LossTerm) -> toml::Table {
    let on_hidden = term.requirement().is_none();
    let mut keys = term.to_table();
    // Only on hidden states does `reduction` belong to the kind.
    keys.retain(|key, _| {
        key != "kind" && (!NOT_HERE.contains(&key) || (key == "reduction" && on_hidden))
    });
    keys
}

fn list(as_json: bool) -> Outcome {
    let kinds = LossTerm::kinds()
        .map(|kind| {
            let term = LossTerm::with_defaults(kind)?;
            Ok((kind, keys_that_matter(&term)))
        })
        .collect::<Result<Vec<_>, Failure>>()?;
    if as_json {
        let kinds: Vec<_> = kinds
            .iter()
            .map(|(kind, keys)| json!({"kind": kind, "settings": keys}))
            .collect();
        print_json(&kinds)?;
        return Ok(Exit::Done);
    }
    let mut text = String::new();
    for (kind, keys) in kinds {
        let keys: Vec<String> = keys
            .iter()
            .map(|(key, value)| format!("{key} = {value}"))
            .collect();
        let _ = writeln!(text, "{kind:<24} {}", keys.join(", "));
    }
    print_text(text.trim_end());
    Ok(Exit::Done)
}

fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>, Failure> {
    // The system's own word for a file that can't be opened; the library's for what is inside.
    std::fs::File::open(path).map_err(|error| Failure::file("read", path, &error))?;
    Tensor::read_safetensors(path).map_err(|error| {
        Failure::user(
            format!("`{}` is not a safetensors file: {error}", path.display()),
            "save `teacher` and `student` with safetensors (f32 or f64)",
        )
    })
}

/// Writes `value` and `grad`, whole or not at all.
fn write_values(out: &Path, term: &LossTerm, values: &LossValues) -> Result<(), Failure> {
    let settings = serde_json::to_string(&keys_that_matter(term)).unwrap_or_default();
    let mut header = serde_json::Map::new();
    header.insert(
        "__metadata__".to_owned(),
        json!({"format": "pt", "written_by": concat!("caskd ", env!("CARGO_PKG_VERSION")),
               "kind": term.kind(), "settings": settings}),
    );
    let mut offset = 0;
    let tensors = [("value", &values.value), ("grad", &values.grad)];
    let double = values.value.kind() == Kind::Double;
    for (name, tensor) in tensors {
        let end = offset + tensor.numel() * if double { 8 } else { 4 };
        header.insert(
            name.to_owned(),
            json!({"dtype": if double { "F64" } else { "F32" }, "shape": tensor.size(), "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    write_file(out, |sink| {
        sink.write_all(&(text.len() as u64).to_le_bytes())?;
        sink.write_all(text.as_bytes())?;
        for (_, tensor) in tensors {
            sink.write_all(&bytes_of(tensor)?)?;
        }
        Ok(())
    })
}

/// Little-endian numbers of a tensor in f32 or f64.
fn bytes_of(tensor: &Tensor) -> io::Result<Vec<u8>> {
    let flat = tensor.contiguous().view(-1);
    if flat.kind() == Kind::Double {
        let values = Vec::<f64>::try_from(&flat).map_err(io::Error::other)?;
        Ok(values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect())
    } else {
        let values = Vec::<f32>::try_from(&flat).map_err(io::Error::other)?;
        Ok(values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect())
    }
}
