//! What `verify` and `inspect` say of whole, damaged and wrong caches, through the binary.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use caskd_formats::{Cache, CacheWriter, Columns, HeadWeights, Io, Sequence};
use support::{Bench, files, stderr};

fn stdout(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_flipped_bit_in_any_file_of_any_tier_is_found_and_named() {
    let bench = Bench::new();
    // A manifest and a shard; the head; the basis.
    for (tier, least, options) in [
        ("sparse", 2, &[][..]),
        ("exact", 3, &[]),
        ("compact", 4, &["--rate", "200"]),
    ] {
        let folder = bench.cache(tier, 12, &[&["--tier", tier], options].concat());
        let whole = files(&folder);
        assert!(whole.len() >= least, "{tier}");
        let has_head = |name: &Path| name.to_string_lossy().contains("head-");
        let heads = whole.iter().filter(|(name, _)| has_head(name)).count();
        assert_eq!(heads, usize::from(tier != "sparse"), "{tier}");
        for (name, bytes) in &whole {
            // The start, the end, and places between.
            for step in 0..8 {
                let at = (bytes.len() - 1) * step / 7;
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << (step % 8);
                std::fs::write(folder.join(name), &damaged).unwrap();
                let output = bench.run(&["verify", tier]);
                assert_eq!(
                    output.status.code(),
                    Some(2),
                    "{tier}: {} byte {at}",
                    name.display()
                );
                let said = stdout(&output) + &stderr(&output);
                assert!(
                    said.contains(name.to_str().unwrap()),
                    "{}: {said}",
                    name.display()
                );
            }
            std::fs::write(folder.join(name), bytes).unwrap();
        }
        bench.ok(&["verify", tier, "--deep"]);

        // In the middle of a shard lies a row of a column, and both are named.
        let (name, bytes) = whole
            .iter()
            .find(|(name, _)| name.starts_with("shards"))
            .unwrap();
        let mut damaged = bytes.clone();
        damaged[bytes.len() / 2] ^= 8;
        std::fs::write(folder.join(name), &damaged).unwrap();
        let report: serde_json::Value =
            serde_json::from_slice(&bench.run(&["verify", tier, "--json"]).stdout).unwrap();
        let problems = report["problems"].as_array().unwrap();
        assert!(
            problems
                .iter()
                .any(|problem| problem["row"].is_u64() && problem["column"].is_string()),
            "{tier}: {report}"
        );
    }
}

/// Writes the same cache with other values: every checksum is right.
fn rewrite(from: &Path, to: &Path, change: impl Fn(&mut Sequence)) {
    let cache = Cache::open(from, Io::Mmap).unwrap();
    let manifest = cache.manifest();
    let mut writer = CacheWriter::open(to, &manifest.spec(), false).unwrap();
    for (shard, info) in manifest.shards.iter().enumerate() {
        let rows: Vec<u32> = (0..info.sequences as u32).collect();
        let columns = Columns::all(manifest);
        let mut sequences = cache.read(shard as u32, &rows, &columns).unwrap();
        sequences.iter_mut().for_each(&change);
        writer.write_shard(shard, &sequences).unwrap();
    }
    if let Some(head) = cache.head().unwrap() {
        let weights = HeadWeights {
            vocab_size: head.vocab_size,
            width: head.width,
            dtype: head.dtype,
            bytes: head.bytes(),
        };
        writer.write_head(&weights).unwrap();
    }
    writer.finish().unwrap();
}

type Change = fn(&mut Sequence);

#[test]
fn the_teacher_confirms_its_cache_and_nobody_elses() {
    let bench = Bench::new();
    for dtype in ["f32", "bf16"] {
        let name = format!("cache-{dtype}");
        let folder = bench.cache(&name, 12, &["--dtype", dtype, "--layers", "last,2"]);
        let found = bench.json(&[
            "verify",
            &name,
            "--teacher",
            "teacher",
            "--sample",
            "5",
            "--json",
        ]);
        assert_eq!(found["teacher"]["ok"], true, "{found}");
        assert_eq!(found["teacher"]["sequences"], 5);
        let deviations = found["teacher"]["deviations"].as_array().unwrap();
        assert_eq!(deviations.len(), 5 + 1 + 2);

        // A cache of other values whose checksums are all right.
        let changes: [(&str, Change); 3] = [
            ("mean", |sequence| {
                for mean in &mut sequence.statistics.as_mut().unwrap().mean {
                    *mean *= 0.5;
                }
            }),
            ("hidden.2", |sequence| {
                for value in &mut sequence.hidden[0].values {
                    *value *= 1.3;
                }
            }),
            ("top_k", |sequence| {
                // Off by one position.
                let top_k = sequence.top_k.as_mut().unwrap();
                top_k.ids.rotate_left(top_k.k);
            }),
        ];
        for (column, change) in changes {
            let other = format!("{name}-{column}");
            rewrite(&folder, &bench.path(&other), change);
            let output = bench.run(&["verify", &other, "--teacher", "teacher"]);
            assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
            let said = stdout(&output);
            let expected = if column == "top_k" {
                "not ok: the teacher read".to_owned()
            } else {
                format!("{column}: differs from the teacher")
            };
            assert!(said.contains(&expected), "{said}");
        }
    }
    caskd_models::save_model(&support::tiny_model(256, 2), &bench.path("other")).unwrap();
    let output = bench.run(&["verify", "cache-f32", "--teacher", "other"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("is not the teacher of this cache"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn the_card_names_a_command_that_makes_the_same_bytes() {
    let bench = Bench::new();
    let folder = bench.cache(
        "cache",
        6,
        &["--layers", "1", "--hidden", "f16", "--max-len", "200"],
    );
    let card = bench.json(&["inspect", "cache", "--json"]);
    let command = card["command"].as_str().unwrap().to_owned();
    assert!(
        !command.contains(bench.folder.path().to_str().unwrap()),
        "{command}"
    );
    let words: Vec<&str> = command
        .split(' ')
        .skip(1)
        .chain(["--out", "again"])
        .collect();
    bench.ok(&words);
    assert!(files(&folder) == files(&bench.path("again")));
    assert!(stdout(&bench.ok(&["inspect", "cache"])).contains(&command));
}
