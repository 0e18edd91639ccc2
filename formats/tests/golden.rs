//! Caches of every format version are still read, and this version still writes the same bytes.
#![allow(clippy::unwrap_used)]

mod golden_sample;
mod sample;

use std::path::{Path, PathBuf};

use caskd_formats::{Cache, Columns, Io, verify};
use golden_sample::golden;
use sample::{Sample, tree};

const TIERS: [&str; 3] = ["sparse", "compact", "exact"];

fn folder(tier: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/v1")
        .join(tier)
}

#[test]
fn golden_caches_are_read() {
    for tier in TIERS {
        let report = verify(&folder(tier), true).unwrap();
        assert!(report.ok, "{tier}: {report:?}");
        let golden = golden(tier);
        let sample = Sample {
            spec: golden.spec,
            sequences: golden.sequences,
            head: golden.head,
            basis: golden.basis,
        };
        for io in [Io::Mmap, Io::Read] {
            let cache = Cache::open(&folder(tier), io).unwrap();
            assert_eq!(cache.manifest().spec(), sample.spec);
            let head = cache.head().unwrap();
            assert_eq!(
                head.as_ref().map(caskd_formats::Head::bytes),
                sample.head.as_deref()
            );
            for shard in 0..2 {
                let originals = sample.shard(shard);
                let rows: Vec<u32> = (0..originals.len() as u32).collect();
                let columns = Columns::all(cache.manifest());
                let decoded = cache.read(shard as u32, &rows, &columns).unwrap();
                for (original, decoded) in originals.iter().zip(&decoded) {
                    sample.assert_same(original, decoded);
                }
            }
        }
    }
}

/// Where this fails after an update of a library, the bytes of the format are what the reader says, not the writer:
/// the golden cache stays, and this test says so from then on.
#[test]
fn golden_caches_are_written_again_byte_by_byte() {
    for tier in TIERS {
        let dir = tempfile::tempdir().unwrap();
        let again = dir.path().join("cache");
        golden_sample::write(tier, &again);
        let found: Vec<_> = tree(&again);
        let expected: Vec<_> = tree(&folder(tier));
        let names = |files: &[(String, Vec<u8>)]| -> Vec<String> {
            files.iter().map(|(name, _)| name.clone()).collect()
        };
        assert_eq!(
            names(&found),
            names(&expected),
            "{tier}: shards have another digest"
        );
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            if name == "manifest.json" {
                // The program's version stands in it, and its checksum covers that.
                let text = |bytes: &[u8]| {
                    let mut value: serde_json::Value = serde_json::from_slice(bytes).unwrap();
                    let fields = value.as_object_mut().unwrap();
                    fields.remove("caskd_version").unwrap();
                    fields.remove("checksum").unwrap();
                    value
                };
                assert_eq!(text(found), text(expected));
            } else {
                assert!(found == expected, "{tier}: {name} has other bytes");
            }
        }
    }
}
