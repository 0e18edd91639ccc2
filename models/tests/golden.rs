//! Agreement with Hugging Face transformers; `tests/golden/make_golden.py` makes the numbers.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use caskd_models::{LoadedModel, load, load_tokenizer};
use support::{f32_on_cpu, golden, max_difference, numbers, pick, teacher, tiny};
use tch::{Kind, Tensor};

const TOLERANCE: f64 = 1e-3;

fn check_tiny(name: &str) {
    let model = tiny(name);
    let expected = numbers(&golden(name).join("golden.safetensors"));
    let layers: Vec<u32> = (0..=model.network.num_layers() as u32).collect();
    let forward = tch::no_grad(|| {
        model
            .network
            .forward(&pick(&expected, "input_ids"), &layers, false)
    });
    assert_eq!(
        forward
            .hidden
            .iter()
            .map(|(layer, _)| *layer)
            .collect::<Vec<_>>(),
        layers
    );
    for (layer, hidden) in &forward.hidden {
        let difference = max_difference(hidden, &pick(&expected, &format!("hidden.{layer}")));
        assert!(
            difference < TOLERANCE,
            "{name}: hidden state {layer} differs by {difference}"
        );
    }
    let logits = model.network.logits(&forward.last_hidden);
    let difference = max_difference(&logits, &pick(&expected, "logits"));
    assert!(
        difference < TOLERANCE,
        "{name}: logits differ by {difference}"
    );
    // The golden would prove nothing on constant logits.
    assert!(logits.std(true).double_value(&[]) > 0.5);
    if expected.iter().any(|(name, _)| name == "loss") {
        let loss = next_token_loss(&logits, &pick(&expected, "input_ids"));
        let difference = (loss - pick(&expected, "loss").double_value(&[])).abs();
        assert!(
            difference < TOLERANCE,
            "{name}: losses differ by {difference}"
        );
    }
}

/// Mean cross-entropy of every next token: logits [B, T, V], ids [B, T].
fn next_token_loss(logits: &Tensor, ids: &Tensor) -> f64 {
    let positions = ids.size()[1] - 1;
    logits
        .narrow(1, 0, positions)
        .flatten(0, 1)
        .cross_entropy_for_logits(&ids.narrow(1, 1, positions).flatten(0, 1))
        .double_value(&[])
}

#[test]
fn multi_head_tied() {
    check_tiny("mha_tied");
}

#[test]
fn grouped_heads_untied_with_unusual_head_width() {
    check_tiny("gqa_untied");
}

#[test]
fn one_kv_head_tied_with_small_theta() {
    check_tiny("mqa_tied");
}

#[test]
fn biases() {
    check_tiny("biases");
}

#[test]
fn llama3_scaled_rotary() {
    check_tiny("llama3_rope");
}

#[test]
fn bf16_in_shards_with_an_index() {
    check_tiny("bf16_sharded");
}

#[test]
fn half_precision_file() {
    check_tiny("f16");
}

#[test]
fn linear_scaled_rotary() {
    check_tiny("llama_linear_rope");
}

#[test]
fn qwen2_with_its_biases() {
    check_tiny("qwen2_tied");
    check_tiny("qwen2_untied");
}

#[test]
fn sliding_windows() {
    check_tiny("qwen2_window");
    check_tiny("mistral_window");
}

#[test]
fn mistral_without_a_window() {
    check_tiny("mistral_full");
}

#[test]
fn bloom_with_even_and_odd_head_counts() {
    check_tiny("bloom_4");
    check_tiny("bloom_3_untied");
    check_tiny("bloom_5_post_norm");
}

#[test]
fn names_without_their_first_part() {
    check_tiny("bloom_7_bare");
}

/// A GGUF file against transformers and the gguf package; `make_gguf.py` makes both.
fn check_gguf(name: &str) -> LoadedModel {
    let model = load(&golden(&format!("{name}.gguf")), &f32_on_cpu()).unwrap();
    let expected = numbers(&golden(&format!("{name}.safetensors")));
    let parameters = model.network.parameters();
    let weights: Vec<_> = expected
        .iter()
        .filter_map(|(key, golden)| Some((key.strip_prefix("weight.")?, golden)))
        .collect();
    assert_eq!(weights.len(), parameters.len());
    for (name, golden) in weights {
        let values = pick(&parameters, name)
            .flatten(0, -1)
            .slice(0, None, None, 23);
        let sample = values.narrow(0, 0, golden.size()[0]);
        let difference = max_difference(&sample, golden);
        assert!(difference < 1e-6, "{name} differs by {difference}");
    }
    let ids = pick(&expected, "input_ids");
    let layers: Vec<u32> = (0..=model.network.num_layers() as u32).collect();
    let forward = tch::no_grad(|| model.network.forward(&ids, &layers, false));
    for (layer, hidden) in &forward.hidden {
        let golden = pick(&expected, &format!("hidden.{layer}"));
        let difference = max_difference(&hidden.slice(2, None, None, 5), &golden);
        assert!(
            difference < TOLERANCE,
            "{name}: hidden state {layer} differs by {difference}"
        );
    }
    let logits = model.network.logits(&forward.last_hidden);
    let difference = max_difference(&logits, &pick(&expected, "logits"));
    assert!(
        difference < TOLERANCE,
        "{name}: logits differ by {difference}"
    );
    let loss = next_token_loss(&logits, &ids) - pick(&expected, "loss").double_value(&[]);
    assert!(loss.abs() < TOLERANCE, "{name}: losses differ by {loss}");
    model
}

#[test]
fn every_gguf_type() {
    let model = check_gguf("gguf_mixed");
    assert_eq!(model.network.architecture(), "llama");
    let encoded = model.tokenizer.encode("abcdx", false).unwrap();
    assert_eq!(encoded.get_tokens(), ["abcd", "x"]);
}

#[test]
fn qwen2_and_bloom_from_gguf() {
    assert_eq!(check_gguf("gguf_qwen2").network.architecture(), "qwen2");
    assert_eq!(check_gguf("gguf_bloom").network.architecture(), "bloom");
}

fn load_teacher(kind: Kind) -> Option<LoadedModel> {
    let mut options = f32_on_cpu();
    options.kind = kind;
    Some(load(&teacher()?, &options).unwrap())
}

#[test]
fn real_teacher_from_gguf() {
    let Some(model) = load_teacher(Kind::Float) else {
        return;
    };
    assert_eq!(model.network.num_parameters(), 134_515_008);
    let expected = numbers(&golden("teacher.safetensors"));
    let layers = [0, 1, 15, 29, 30];
    let forward = tch::no_grad(|| {
        model
            .network
            .forward(&pick(&expected, "input_ids"), &layers, false)
    });
    for (layer, hidden) in &forward.hidden {
        let sample = hidden.slice(1, None, None, 16).slice(2, None, None, 48);
        let golden = pick(&expected, &format!("hidden.{layer}"));
        let difference = max_difference(&sample, &golden);
        // Inner states of this network reach into the hundreds; the bound is relative to them.
        let scale = golden.abs().max().double_value(&[]).max(1.0);
        assert!(
            difference < TOLERANCE * scale,
            "hidden state {layer} differs by {difference}, scale {scale}"
        );
    }
    let logits = model.network.logits(&forward.last_hidden);
    let difference = max_difference(
        &logits.index_select(2, &pick(&expected, "columns")),
        &pick(&expected, "logits"),
    );
    assert!(difference < TOLERANCE, "logits differ by {difference}");
    let log_sum_exp = logits.logsumexp([-1i64].as_slice(), false);
    let difference = max_difference(&log_sum_exp, &pick(&expected, "log_sum_exp"));
    assert!(
        difference < TOLERANCE,
        "log-sum-exp differs by {difference}"
    );
    assert_eq!(logits.argmax(-1, false), pick(&expected, "argmax"));
    let loss = next_token_loss(&logits, &pick(&expected, "input_ids"));
    let difference = (loss - pick(&expected, "loss").double_value(&[])).abs();
    assert!(difference < TOLERANCE, "losses differ by {difference}");
}

#[test]
fn bf16_stays_near_f32() {
    let (Some(exact), Some(coarse)) = (load_teacher(Kind::Float), load_teacher(Kind::BFloat16))
    else {
        return;
    };
    let ids = pick(&numbers(&golden("teacher.safetensors")), "input_ids")
        .narrow(0, 0, 1)
        .narrow(1, 0, 96);
    let nats = |model: &LoadedModel| {
        let hidden = tch::no_grad(|| model.network.forward(&ids, &[], false)).last_hidden;
        let scores = model
            .network
            .logits(&hidden)
            .to_kind(Kind::Float)
            .log_softmax(-1, Kind::Float);
        let targets = ids.narrow(1, 1, ids.size()[1] - 1).unsqueeze(-1);
        -scores
            .narrow(1, 0, ids.size()[1] - 1)
            .gather(2, &targets, false)
            .mean(Kind::Double)
            .double_value(&[])
    };
    let (exact, coarse) = (nats(&exact), nats(&coarse));
    assert!((exact - coarse).abs() < 0.03, "f32 {exact}, bf16 {coarse}");
}

/// A string and its ids by the published tokenizer.
#[derive(serde::Deserialize)]
struct Encoded {
    text: String,
    ids: Vec<u32>,
}

#[test]
fn tokenizer_from_gguf() {
    let Some(path) = teacher() else { return };
    let loaded = load_tokenizer(&path).unwrap();
    assert_eq!((loaded.bos, loaded.eos), (Some(1), Some(2)));
    assert!(
        loaded.tokenizer_config["chat_template"]
            .as_str()
            .unwrap()
            .contains("<|im_start|>")
    );
    let text = std::fs::read_to_string(golden("teacher_tokenizer.json")).unwrap();
    let expected: Vec<Encoded> = serde_json::from_str(&text).unwrap();
    assert!(expected.len() >= 40);
    for Encoded { text, ids } in expected {
        let encoded = loaded.tokenizer.encode(text.as_str(), false).unwrap();
        assert_eq!(encoded.get_ids(), ids, "{text:?}");
        assert_eq!(loaded.tokenizer.decode(&ids, false).unwrap(), text);
    }
}

#[test]
fn sentence_piece_tokenizer_from_gguf() {
    let loaded = load_tokenizer(&golden("gguf_sentence_piece.gguf")).unwrap();
    assert_eq!((loaded.bos, loaded.eos), (Some(1), Some(2)));
    let text = std::fs::read_to_string(golden("gguf_sentence_piece.json")).unwrap();
    let expected: Vec<Encoded> = serde_json::from_str(&text).unwrap();
    assert!(expected.len() >= 12);
    for Encoded { text, ids } in expected {
        let encoded = loaded.tokenizer.encode(text.as_str(), true).unwrap();
        assert_eq!(encoded.get_ids(), ids, "{text:?}");
    }
}

#[test]
fn padding_on_the_right_changes_no_real_position() {
    let model = tiny("gqa_untied");
    let ids = support::ids(1, 9, 41);
    let padded = Tensor::cat(
        &[
            ids.shallow_clone(),
            Tensor::zeros([1, 7], (Kind::Int64, tch::Device::Cpu)),
        ],
        1,
    );
    let alone = tch::no_grad(|| model.network.forward(&ids, &[1], false));
    let with_padding = tch::no_grad(|| model.network.forward(&padded, &[1], false));
    for (a, b) in [
        (&alone.last_hidden, &with_padding.last_hidden),
        (&alone.hidden[0].1, &with_padding.hidden[0].1),
    ] {
        assert!(max_difference(a, &b.narrow(1, 0, 9)) < 1e-5);
    }
}
