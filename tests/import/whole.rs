//! Whole vocabularies as tensors and arrays.

use tch::{Kind, Tensor};

use crate::support::Bench;
use crate::{assert_same, floats, import, log_probabilities, refused, sequences, teacher_logits};

#[test]
fn whole_vocabularies_keep_every_statistic() {
    tch::set_num_threads(1);
    let bench = Bench::new();
    bench.cache("cache", 6, &["--tier", "sparse", "--layers", "none"]);
    let logits = teacher_logits(&bench, "cache");
    let mut tensors = Vec::new();
    for (index, (logits, sequence)) in logits.iter().zip(sequences(&bench, "cache")).enumerate() {
        let ids: Vec<i64> = sequence.token_ids.iter().map(|id| i64::from(*id)).collect();
        let mask: Vec<u8> = sequence
            .loss_mask
            .iter()
            .map(|target| u8::from(*target))
            .collect();
        tensors.push((format!("logits.{index}"), logits.shallow_clone()));
        tensors.push((format!("input_ids.{index}"), Tensor::from_slice(&ids)));
        tensors.push((format!("loss_mask.{index}"), Tensor::from_slice(&mask)));
    }
    Tensor::write_safetensors(&tensors, bench.path("whole.safetensors")).unwrap();
    let report = bench.json(&import(
        "whole.safetensors",
        "whole",
        &["--top-k", "8", "--json"],
    ));
    assert_eq!(report["format"], "safetensors");
    assert_eq!(report["origin"]["values"], "logits");
    assert_same(&bench, "cache", "whole", 5e-4);
    for (one, other) in sequences(&bench, "cache")
        .iter()
        .zip(&sequences(&bench, "whole"))
    {
        let (one, other) = (
            one.statistics.as_ref().unwrap(),
            other.statistics.as_ref().unwrap(),
        );
        for (one, other) in [
            (&one.mean, &other.mean),
            (&one.std, &other.std),
            (&one.min, &other.min),
            (&one.max, &other.max),
        ] {
            assert!(
                one.iter()
                    .zip(other)
                    .all(|(one, other)| (one - other).abs() < 1e-4)
            );
        }
    }

    // A sequence whose tokens are not there is no tensor of another kind, which would be passed over.
    let without = |name: &str| -> Vec<(String, Tensor)> {
        let others = tensors.iter().filter(|(other, _)| other != name);
        others
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect()
    };
    let tokenless = without("input_ids.3");
    Tensor::write_safetensors(&tokenless, bench.path("tokenless.safetensors")).unwrap();
    refused(
        &bench,
        &import("tokenless.safetensors", "tokenless", &[]),
        "tokenless",
        "there are no token ids for `logits.3`",
    );
    let mut more = without("");
    more.push(("top_k.logits".into(), logits[0].shallow_clone()));
    Tensor::write_safetensors(&more, bench.path("more.safetensors")).unwrap();
    let report = bench.json(&import("more.safetensors", "more", &["--json"]));
    assert_eq!(report["sequences"], 6);

    // As log-probabilities at temperature 2: brought back to 1.
    let warm: Vec<(String, Tensor)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let is_logits = name.starts_with("logits");
            let tensor = if is_logits {
                (tensor / 2.0).log_softmax(-1, Kind::Float)
            } else {
                tensor.shallow_clone()
            };
            (name.clone(), tensor)
        })
        .collect();
    Tensor::write_safetensors(&warm, bench.path("warm.safetensors")).unwrap();
    let report = bench.json(&import(
        "warm.safetensors",
        "warm",
        &["--top-k", "8", "--temperature", "2", "--json"],
    ));
    assert_eq!(report["origin"]["values"], "log-probabilities");
    assert_eq!(report["origin"]["temperature"], 2.0);
    assert_same(&bench, "cache", "warm", 5e-4);

    // NumPy, one sequence.
    let rows = logits[0].size()[0] as usize;
    let ids: Vec<u8> = sequences(&bench, "cache")[0]
        .token_ids
        .iter()
        .flat_map(|id| id.to_le_bytes())
        .collect();
    let values: Vec<u8> = floats(&logits[0])
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    std::fs::write(
        bench.path("logits.npy"),
        npy("<f4", &format!("({rows}, 256)"), &values),
    )
    .unwrap();
    std::fs::write(
        bench.path("ids.npy"),
        npy("<u4", &format!("({rows},)"), &ids),
    )
    .unwrap();
    bench.ok(&import(
        "logits.npy",
        "numpy",
        &["--tokens", "ids.npy", "--top-k", "8"],
    ));
    let (one, other) = (
        &sequences(&bench, "cache")[0],
        &sequences(&bench, "numpy")[0],
    );
    for position in 0..rows - 1 {
        for (one, other) in log_probabilities(one, position)
            .iter()
            .zip(log_probabilities(other, position))
        {
            assert!((one.1 - other.1).abs() < 5e-4);
        }
    }
    refused(
        &bench,
        &import("logits.npy", "alone", &[]),
        "alone",
        "holds one array",
    );
    let cut = std::fs::read(bench.path("logits.npy")).unwrap();
    std::fs::write(bench.path("cut.npy"), &cut[..cut.len() / 2]).unwrap();
    refused(
        &bench,
        &import("cut.npy", "cut", &["--tokens", "ids.npy"]),
        "cut",
        "is cut short",
    );
    let mut bad = cut;
    let at = bad.len() - 1024;
    bad[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(bench.path("nan.npy"), &bad).unwrap();
    refused(
        &bench,
        &import("nan.npy", "nan", &["--tokens", "ids.npy"]),
        "nan",
        "the value of token 0 is NaN",
    );
}

/// A .npy file.
pub(crate) fn npy(dtype: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    [
        b"\x93NUMPY\x01\x00",
        &(header.len() as u16).to_le_bytes()[..],
        header.as_bytes(),
        data,
    ]
    .concat()
}
