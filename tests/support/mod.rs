//! A tiny teacher on disk, data files, and the binary under test.
#![allow(
    dead_code,
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    clippy::format_collect,
    reason = "every test binary uses a part of this"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use caskd_models::{LayerShape, LlamaConfig, LoadOptions, LoadedModel, Network, save_model};
use serde_json::{Value, json};

/// A temporary folder with a tiny random teacher in `teacher/`.
pub(crate) struct Bench {
    pub(crate) folder: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let bench = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        save_model(&tiny_model(256, 1), &bench.path("teacher")).unwrap();
        bench
    }

    /// A temporary folder with nothing in it.
    pub(crate) fn empty() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// `count` records that differ.
    pub(crate) fn records(&self, name: &str, count: usize) -> PathBuf {
        let lines: String = (0..count)
            .map(|index| {
                let record = json!({"instruction": format!("Say the number {index}."), "input": "", "output": format!("The number is {}.", index * 37 % 101)});
                format!("{record}\n")
            })
            .collect();
        self.write(name, &lines)
    }

    /// Runs caskd in the folder.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_caskd"));
        // One thread: the networks are tiny, and tests run side by side.
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("OMP_NUM_THREADS", "1")
            .stdin(Stdio::null());
        command
    }

    /// Runs caskd, which must succeed, and parses its JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            stderr(&output)
        );
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!(
                "{arguments:?}: {error}: {}",
                String::from_utf8_lossy(&output.stdout)
            )
        })
    }

    /// Runs caskd, which must succeed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> Output {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            stderr(&output)
        );
        output
    }

    /// A small cache of `count` records under `name`.
    pub(crate) fn cache(&self, name: &str, count: usize, more: &[&str]) -> PathBuf {
        let data = self.records(&format!("{name}.jsonl"), count);
        let data = data.to_str().unwrap();
        self.ok(&[
            &[
                "build",
                "--teacher",
                "teacher",
                "--data",
                data,
                "--out",
                name,
                "--top-k",
                "8",
            ],
            more,
        ]
        .concat());
        self.path(name)
    }
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Every file below `folder` with its bytes.
pub(crate) fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn walk(root: &Path, folder: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, found);
            } else {
                found.insert(
                    path.strip_prefix(root).unwrap().to_owned(),
                    std::fs::read(&path).unwrap(),
                );
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, folder, &mut found);
    found
}

/// Four layers, width 16, a byte-level tokenizer; `vocabulary` rows of which 256 are bytes.
pub(crate) fn tiny_model(vocabulary: usize, seed: u64) -> LoadedModel {
    model_of(&tiny_config(vocabulary), seed)
}

/// A random network with a byte-level tokenizer.
pub(crate) fn model_of(config: &LlamaConfig, seed: u64) -> LoadedModel {
    let network = Network::random(config, seed, &LoadOptions::default()).unwrap();
    LoadedModel::new(network, byte_tokenizer(config.vocab_size), "tiny")
}

pub(crate) fn tiny_config(vocabulary: usize) -> LlamaConfig {
    let shape = LayerShape {
        heads: 4,
        kv_heads: 4,
        intermediate_size: 32,
    };
    LlamaConfig {
        vocab_size: vocabulary,
        hidden_size: 16,
        head_dim: 4,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        tie_word_embeddings: true,
        dense: shape,
        layers: vec![shape; 4],
        ..LlamaConfig::default()
    }
}

/// GPT-2's printable stand-ins for the 256 bytes, without merges.
fn byte_tokenizer(vocabulary: usize) -> tokenizers::Tokenizer {
    let printable = |byte: u32| {
        (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte)
    };
    let mut spare = 256;
    let mut vocab: serde_json::Map<String, Value> = (0..256u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                spare += 1;
                spare - 1
            };
            (char::from_u32(code).unwrap().to_string(), byte.into())
        })
        .collect();
    for id in 256..vocabulary {
        vocab.insert(format!("<extra{id}>"), id.into());
    }
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}
    });
    json.to_string().parse().unwrap()
}

/// The Python of `CASKD_PYTHON` where it has these modules; else says what is skipped for want of them.
pub(crate) fn python_with(modules: &str) -> Option<std::ffi::OsString> {
    let Some(python) = std::env::var_os("CASKD_PYTHON") else {
        eprintln!("SKIPPED: set CASKD_PYTHON to a Python with {modules}");
        return None;
    };
    let import = format!("import {modules}");
    let has = Command::new(&python).args(["-c", &import]).output();
    if !has.unwrap().status.success() {
        eprintln!("SKIPPED: CASKD_PYTHON lacks one of {modules}");
        return None;
    }
    Some(python)
}
