//! Folders and GGUF files: what is refused, what comes back after saving, damaged files.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::path::{Path, PathBuf};

use caskd_models::{Error, LoadOptions, LoraConfig, load, load_tokenizer, save_model};
use support::{f32_on_cpu, golden, ids, max_difference, teacher, tiny};
use tch::Kind;

/// A copy of a golden folder that a test may damage.
fn copy_of(name: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().to_owned();
    (folder, path)
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

fn refused(path: &Path) -> Error {
    let error = load(path, &f32_on_cpu()).expect_err("must be refused");
    assert!(error.is_user(), "{error}");
    error
}

#[test]
fn special_tokens_and_names_are_read() {
    let model = tiny("gqa_untied");
    assert_eq!((model.bos, model.eos), (Some(1), Some(2)));
    assert_eq!(model.name, "gqa_untied");
    assert_eq!((model.digest.len(), model.fingerprint.len()), (64, 64));
    assert_ne!(model.digest, tiny("mha_tied").digest);
    assert_eq!(model.fingerprint, tiny("mha_tied").fingerprint);
    assert_eq!(
        load_tokenizer(&golden("gqa_untied")).unwrap().fingerprint,
        model.fingerprint
    );
}

#[test]
fn saved_models_come_back_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for (name, kind) in [
        ("mha_tied", Kind::Float),
        ("biases", Kind::Float),
        ("llama3_rope", Kind::BFloat16),
    ] {
        let options = LoadOptions {
            kind,
            ..LoadOptions::default()
        };
        let model = load(&golden(name), &options).unwrap();
        let out = folder.path().join("nested").join(name);
        save_model(&model, &out).unwrap();
        let again = load(&out, &options).unwrap();
        assert_eq!(again.network.config(), model.network.config());
        assert_eq!(
            (again.bos, again.eos, &again.fingerprint),
            (model.bos, model.eos, &model.fingerprint)
        );
        for ((name, a), (_, b)) in model
            .network
            .parameters()
            .iter()
            .zip(&again.network.parameters())
        {
            assert_eq!(a, b, "{name}");
        }
        let error = save_model(&model, &out).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }) && error.hint().is_some());
    }
    // Nothing half-written is left beside them.
    let left: Vec<_> = std::fs::read_dir(folder.path().join("nested"))
        .unwrap()
        .collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn saving_twice_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = tiny("gqa_untied");
    model.generation_config = Some(serde_json::json!({"temperature": 0.6, "eos_token_id": [2, 9]}));
    let outs = [folder.path().join("a"), folder.path().join("b")];
    for out in &outs {
        save_model(&model, out).unwrap();
    }
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        let bytes = outs
            .each_ref()
            .map(|out| std::fs::read(out.join(name)).unwrap());
        assert_eq!(bytes[0], bytes[1], "{name}");
    }
    let again = load(&outs[0], &f32_on_cpu()).unwrap();
    assert_eq!(again.generation_config, model.generation_config);
}

#[test]
fn merged_models_are_saved_with_their_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = tiny("mha_tied");
    model
        .network
        .attach_lora(&LoraConfig::default(), 1)
        .unwrap();
    tch::no_grad(|| {
        for (_, mut tensor) in model.network.trainable() {
            let _ = tensor.g_add_scalar_(0.05);
        }
    });
    let run = |network: &caskd_models::Network| {
        tch::no_grad(|| network.forward(&ids(2, 7, 41), &[], false)).last_hidden
    };
    let before = run(&model.network);
    model.network.merge_lora();
    save_model(&model, &folder.path().join("merged")).unwrap();
    let again = load(&folder.path().join("merged"), &f32_on_cpu()).unwrap();
    assert!(max_difference(&before, &run(&again.network)) < 1e-4);
}

#[test]
fn settings_that_change_the_numbers_are_refused_by_name() {
    for (key, value, expected) in [
        ("model_type", serde_json::json!("mamba"), "`mamba`"),
        ("hidden_act", serde_json::json!("gelu"), "gelu"),
        (
            "quantization_config",
            serde_json::json!({ "quant_method": "gptq" }),
            "gptq",
        ),
        (
            "rope_parameters",
            serde_json::json!({ "rope_type": "yarn", "rope_theta": 1e4 }),
            "yarn",
        ),
        ("head_dim", serde_json::json!(5), "head_dim"),
        (
            "num_key_value_heads",
            serde_json::json!(3),
            "num_key_value_heads",
        ),
        (
            "num_hidden_layers",
            serde_json::json!(4_000_000_000u64),
            "num_hidden_layers",
        ),
        (
            "num_attention_heads",
            serde_json::json!(0),
            "num_attention_heads",
        ),
        ("vocab_size", serde_json::json!(99), "shape"),
        ("num_hidden_layers", serde_json::json!(3), "no tensor"),
        ("hidden_size", serde_json::json!("wide"), "JSON"),
    ] {
        let (_guard, path) = copy_of("mha_tied");
        edit_json(&path.join("config.json"), |config| config[key] = value);
        let message = refused(&path).to_string();
        assert!(message.contains(expected), "{key}: {message}");
    }
    let (_guard, path) = copy_of("mha_tied");
    edit_json(&path.join("config.json"), |config| {
        config.as_object_mut().unwrap().remove("rope_parameters");
        config["rope_scaling"] = serde_json::json!({ "type": "dynamic", "factor": 2.0 });
    });
    assert!(refused(&path).to_string().contains("dynamic"));
}

#[test]
fn missing_and_damaged_files_are_errors() {
    assert!(matches!(refused(&golden("nowhere")), Error::Io { .. }));
    assert!(matches!(
        refused(Path::new(env!("CARGO_MANIFEST_DIR"))),
        Error::NotAModel { .. }
    ));
    assert!(matches!(
        refused(&golden("make_golden.py")),
        Error::NotAModel { .. }
    ));
    let remove = |name: &str, file: &str| {
        let (guard, path) = copy_of(name);
        std::fs::remove_file(path.join(file)).unwrap();
        let error = refused(&path);
        drop(guard);
        error
    };
    assert!(matches!(
        remove("mha_tied", "model.safetensors"),
        Error::NoWeights { .. }
    ));
    assert!(matches!(
        remove("mha_tied", "tokenizer.json"),
        Error::Io { .. }
    ));
    assert!(matches!(
        remove("bf16_sharded", "model-00001-of-00002.safetensors"),
        Error::Io { .. }
    ));

    // Every truncation of a weight file, and garbage in place of each file.
    let (_guard, path) = copy_of("mha_tied");
    let weights = path.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    for length in [0, 4, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&weights, &bytes[..length]).unwrap();
        refused(&path);
    }
    std::fs::write(&weights, &bytes).unwrap();
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        let whole = std::fs::read(path.join(file)).unwrap();
        std::fs::write(path.join(file), b"\xff\xff\xff\xff garbage \x00 {]").unwrap();
        let error = refused(&path);
        assert!(error.to_string().contains(file), "{file}: {error}");
        std::fs::write(path.join(file), whole).unwrap();
    }
    load(&path, &f32_on_cpu()).unwrap();
}

#[test]
fn an_index_cannot_lead_out_of_its_folder() {
    let (_guard, path) = copy_of("bf16_sharded");
    edit_json(&path.join("model.safetensors.index.json"), |index| {
        for file in index["weight_map"].as_object_mut().unwrap().values_mut() {
            *file = serde_json::json!("../secret.safetensors");
        }
    });
    assert!(refused(&path).to_string().contains("../secret"));
}

#[test]
fn tokens_outside_the_network_are_refused() {
    let (_guard, path) = copy_of("mha_tied");
    edit_json(&path.join("tokenizer.json"), |tokenizer| {
        tokenizer["model"]["vocab"]["beyond"] = serde_json::json!(400);
    });
    assert!(refused(&path).to_string().contains("token 400"));
}

/// A GGUF of the real teacher cut short or with flipped bytes in its header gives errors, not
/// panics and not huge allocations.
#[test]
fn damaged_gguf_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for bytes in [
        &b""[..],
        b"GGUF",
        b"GGUF\x03\0\0\0",
        b"not a gguf at all, but long enough to hold a header",
    ] {
        std::fs::write(&path, bytes).unwrap();
        refused(&path);
        assert!(load_tokenizer(&path).is_err());
    }
    // Header with hostile counts and lengths.
    let mut hostile = b"GGUF\x03\0\0\0".to_vec();
    for _ in 0..8 {
        hostile.extend(u64::MAX.to_le_bytes());
    }
    std::fs::write(&path, &hostile).unwrap();
    refused(&path);

    let Some(teacher) = teacher() else { return };
    let head: Vec<u8> = {
        use std::io::Read;
        let mut head = vec![0; 4 << 20];
        std::fs::File::open(&teacher)
            .unwrap()
            .read_exact(&mut head)
            .unwrap();
        head
    };
    // All tensors lie beyond the end of a file cut after its header.
    for length in [30, 1000, 100_000, 1_000_000, head.len()] {
        std::fs::write(&path, &head[..length]).unwrap();
        let error = refused(&path);
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
    }
    // Flipped bytes in the metadata: whatever happens must be an error, the data being cut off.
    let mut rng = caskd_models::SeededRng::new(1);
    for _ in 0..60 {
        let mut bytes = head[..3 << 20].to_vec();
        let at = if rng.below(2) == 0 {
            rng.below(1500)
        } else {
            rng.below(3 << 20)
        };
        bytes[at as usize] ^= 1 << rng.below(8);
        std::fs::write(&path, &bytes).unwrap();
        refused(&path);
    }
}

#[test]
fn gguf_and_saved_folder_are_the_same_model() {
    let Some(path) = teacher() else { return };
    let folder = tempfile::tempdir().unwrap();
    let options = LoadOptions {
        kind: Kind::BFloat16,
        ..LoadOptions::default()
    };
    let model = load(&path, &options).unwrap();
    let out = folder.path().join("saved");
    save_model(&model, &out).unwrap();
    let again = load(&out, &options).unwrap();
    assert_eq!(again.fingerprint, model.fingerprint);
    assert_eq!(again.network.config(), model.network.config());
    assert_eq!((again.bos, again.eos), (model.bos, model.eos));
    assert_eq!(
        again.tokenizer_config["chat_template"],
        model.tokenizer_config["chat_template"]
    );
    for ((name, a), (_, b)) in model
        .network
        .parameters()
        .iter()
        .zip(&again.network.parameters())
    {
        assert_eq!(a, b, "{name}");
    }
    for text in ["In 1984, x = 12.5 <|im_end|>", "  tabs\tand\nlines "] {
        let ids = |tokenizer: &tokenizers::Tokenizer| {
            tokenizer.encode(text, false).unwrap().get_ids().to_vec()
        };
        assert_eq!(ids(&model.tokenizer), ids(&again.tokenizer));
    }
}
