//! A tiny teacher and student with one tokenizer, and caches of the teacher, in a temporary folder.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use caskd_formats::{
    Cache, CacheSpec, CacheWriter, DataInfo, HeadDtype, HeadWeights, HiddenCodec, HiddenState, Io,
    LayerSpec, Sequence, Statistics, TeacherInfo, Tier, TokenizerInfo, TopK,
};
use caskd_models::{
    LayerShape, LlamaConfig, LoadOptions, LoadedModel, Network, SeededRng, load, save_model,
};
use caskd_trainer::{Control, StepReport, TrainConfig, TrainSummary, train};
use tch::{Kind, Tensor};

pub(crate) const TOKENS: usize = 40;
pub(crate) const VOCABULARY: usize = 43;
pub(crate) const TEACHER_LAYERS: usize = 4;
pub(crate) const SEQUENCES: usize = 23;
const TOP_K: usize = 5;

pub(crate) struct Tiny {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) teacher: LoadedModel,
}

/// What a test wants to be different.
pub(crate) struct CacheForm {
    pub(crate) tier: Tier,
    pub(crate) layers: Vec<u32>,
    pub(crate) top_k: usize,
    pub(crate) fingerprint: Option<String>,
    pub(crate) vocabulary: usize,
    /// Every second response is the student's.
    pub(crate) student_responses: bool,
}

impl Default for CacheForm {
    fn default() -> Self {
        CacheForm {
            tier: Tier::Exact,
            layers: vec![2, 4],
            top_k: TOP_K,
            fingerprint: None,
            vocabulary: VOCABULARY,
            student_responses: false,
        }
    }
}

impl Tiny {
    pub(crate) fn new() -> Tiny {
        // Tests run side by side, and nothing here is large enough to be shared out.
        tch::set_num_threads(1);
        let teacher = model(TEACHER_LAYERS, 16, VOCABULARY, 1);
        Tiny {
            folder: tempfile::tempdir().unwrap(),
            teacher,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Saves a student of other depth and width and gives its path.
    pub(crate) fn student(&self) -> PathBuf {
        let path = self.path("student");
        if !path.exists() {
            save_model(&model(2, 8, VOCABULARY, 2), &path).unwrap();
        }
        path
    }

    pub(crate) fn cache(&self, name: &str, form: &CacheForm) -> Arc<Cache> {
        let path = self.path(name);
        write_cache(&self.teacher, form, &path);
        Arc::new(Cache::open(&path, Io::Mmap).unwrap())
    }
}

pub(crate) fn load_student(path: &Path) -> LoadedModel {
    load(path, &LoadOptions::default()).unwrap()
}

/// Trains without being stopped and collects the reports.
pub(crate) fn train_quietly(
    config: &TrainConfig,
    student: &Path,
    cache: &Arc<Cache>,
    out: &Path,
    resume: bool,
) -> caskd_trainer::Result<(TrainSummary, Vec<StepReport>)> {
    let stop = AtomicBool::new(false);
    let mut reports = Vec::new();
    let mut progress = |report: &StepReport| reports.push(report.clone());
    let mut control = Control {
        resume,
        stop: &stop,
        progress: &mut progress,
    };
    let summary = train(
        config,
        load_student(student),
        student,
        Arc::clone(cache),
        out,
        &mut control,
    )?;
    Ok((summary, reports))
}

pub(crate) fn model(layers: usize, width: usize, vocabulary: usize, seed: u64) -> LoadedModel {
    let shape = LayerShape {
        heads: 4,
        kv_heads: 2,
        intermediate_size: 2 * width,
    };
    let config = LlamaConfig {
        vocab_size: vocabulary,
        hidden_size: width,
        head_dim: width / 4,
        max_position_embeddings: 128,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        tie_word_embeddings: true,
        dense: shape,
        layers: vec![shape; layers],
        ..LlamaConfig::default()
    };
    let network = Network::random(&config, seed, &LoadOptions::default()).unwrap();
    LoadedModel::new(network, tokenizer(), "tiny")
}

fn tokenizer() -> tokenizers::Tokenizer {
    let vocabulary: serde_json::Map<String, serde_json::Value> = (0..TOKENS)
        .map(|id| (format!("w{id}"), id.into()))
        .collect();
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    });
    json.to_string().parse().unwrap()
}

pub(crate) fn sequences(teacher: &LoadedModel, form: &CacheForm) -> Vec<Sequence> {
    let mut rng = SeededRng::new(99);
    (0..SEQUENCES)
        .map(|index| {
            let positions = 4 + rng.below(12) as usize;
            let token_ids: Vec<u32> = (0..positions)
                .map(|_| rng.below(TOKENS as u64) as u32)
                .collect();
            let input: Vec<i64> = token_ids.iter().map(|&id| i64::from(id)).collect();
            let input = Tensor::from_slice(&input).unsqueeze(0);
            tch::no_grad(|| {
                let forward = teacher.network.forward(&input, &form.layers, false);
                let logits = teacher.network.logits(&forward.last_hidden).squeeze_dim(0);
                // Rows of the head that no token has give zeros.
                let padding = (form.vocabulary - VOCABULARY) as i64;
                let logits = logits.constant_pad_nd([0, padding]);
                let hidden = forward.hidden.iter().map(|(layer, hidden)| HiddenState {
                    layer: *layer,
                    width: hidden.size()[2] as usize,
                    values: floats(hidden),
                });
                Sequence {
                    source: format!(
                        "tiny.jsonl:{}{}",
                        index + 1,
                        if form.student_responses && index % 2 == 1 {
                            "#student"
                        } else {
                            ""
                        }
                    ),
                    loss_mask: (0..positions).map(|t| t >= 2).collect(),
                    statistics: Some(statistics(&logits)),
                    top_k: (form.top_k > 0).then(|| {
                        let (values, ids) = logits.topk(form.top_k as i64, -1, true, true);
                        let ids: Vec<i64> = Vec::try_from(ids.view(-1)).unwrap();
                        let ids = ids.into_iter().map(|id| id as u32).collect();
                        TopK {
                            k: form.top_k,
                            ids,
                            logits: floats(&values),
                        }
                    }),
                    hidden: hidden.collect(),
                    token_ids,
                    coefficients: None,
                }
            })
        })
        .collect()
}

fn write_cache(teacher: &LoadedModel, form: &CacheForm, path: &Path) {
    let sequences = sequences(teacher, form);
    let config = teacher.network.config();
    let spec = CacheSpec {
        origin: None,
        tier: form.tier,
        top_k: form.top_k,
        vocab_size: form.vocabulary,
        layers: form
            .layers
            .iter()
            .map(|&layer| LayerSpec {
                layer,
                width: config.hidden_size(),
                codec: HiddenCodec::F16,
            })
            .collect(),
        code: None,
        sequences_per_shard: 10,
        max_len: 64,
        teacher: TeacherInfo {
            name: "tiny".into(),
            architecture: "llama".into(),
            digest: "00".into(),
            compute_dtype: "f32".into(),
            num_layers: TEACHER_LAYERS as u32,
            hidden_size: config.hidden_size(),
            num_parameters: teacher.network.num_parameters(),
        },
        tokenizer: TokenizerInfo {
            fingerprint: form
                .fingerprint
                .clone()
                .unwrap_or_else(|| teacher.fingerprint.clone()),
            vocab_size: TOKENS,
        },
        data: DataInfo {
            digest: "00".into(),
            files: vec![],
            sequences: sequences.len() as u64,
            positions: sequences
                .iter()
                .map(|sequence| sequence.token_ids.len() as u64)
                .sum(),
            targets: sequences
                .iter()
                .map(|sequence| sequence.token_ids.len() as u64 - 2)
                .sum(),
            truncated: 0,
            skipped: 0,
            prompt_form: "none".into(),
            ..DataInfo::default()
        },
    };
    let mut writer = CacheWriter::open(path, &spec, false).unwrap();
    for (shard, sequences) in sequences.chunks(10).enumerate() {
        writer.write_shard(shard, sequences).unwrap();
    }
    if form.tier == Tier::Exact {
        let head = Tensor::cat(
            &[
                teacher.network.head().shallow_clone(),
                Tensor::zeros(
                    [
                        (form.vocabulary - VOCABULARY) as i64,
                        config.hidden_size() as i64,
                    ],
                    (Kind::Float, tch::Device::Cpu),
                ),
            ],
            0,
        );
        let bytes: Vec<u8> = floats(&head)
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let head = HeadWeights {
            vocab_size: form.vocabulary,
            width: config.hidden_size(),
            dtype: HeadDtype::F32,
            bytes: &bytes,
        };
        writer.write_head(&head).unwrap();
    }
    writer.finish().unwrap();
}

fn statistics(logits: &Tensor) -> Statistics {
    Statistics {
        mean: floats(&logits.mean_dim([-1].as_slice(), false, Kind::Float)),
        std: floats(&logits.std_dim([-1].as_slice(), false, false)),
        min: floats(&logits.amin([-1], false)),
        max: floats(&logits.amax([-1], false)),
        log_sum_exp: floats(&logits.logsumexp([-1].as_slice(), false)),
    }
}

pub(crate) fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.detach().contiguous().view(-1)).unwrap()
}
