//! Damage is found and named; nothing panics.
#![allow(clippy::unwrap_used)]

mod sample;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use caskd_formats::{Cache, CacheWriter, Columns, Error, HiddenCodec, Io, Tier, verify};
use sample::{Shape, sample, small, tree};

struct Written {
    _folder: tempfile::TempDir,
    dir: PathBuf,
}

fn written(sample: &sample::Sample) -> Written {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    sample.write(&dir);
    Written {
        _folder: folder,
        dir,
    }
}

/// Flips one bit, asserts that `verify` names the file and that reading neither panics nor returns other values.
fn check_flip(
    dir: &Path,
    name: &str,
    bytes: &[u8],
    bit: usize,
    originals: &[Vec<caskd_formats::Sequence>],
) -> bool {
    // In place: to write a whole file anew costs a flush on common file systems.
    let file = fs::File::options()
        .write(true)
        .open(dir.join(name))
        .unwrap();
    file.write_all_at(&[bytes[bit / 8] ^ 1 << (bit % 8)], bit as u64 / 8)
        .unwrap();
    let named = check_changed(dir, name, bit, originals);
    file.write_all_at(&[bytes[bit / 8]], bit as u64 / 8)
        .unwrap();
    named
}

fn check_changed(
    dir: &Path,
    name: &str,
    bit: usize,
    originals: &[Vec<caskd_formats::Sequence>],
) -> bool {
    let report = match verify(dir, false) {
        Ok(report) => report,
        // The digit of the version is the one place where another format is the better explanation.
        Err(Error::UnknownVersion { .. }) => return false,
        Err(error) => panic!("{name} bit {bit}: {error}"),
    };
    assert!(!report.ok, "{name}: bit {bit} is not found");
    assert!(
        report.problems.iter().all(|problem| problem.file == name),
        "{name} bit {bit}: {report:?}"
    );
    let named = report
        .problems
        .iter()
        .any(|problem| problem.row.is_some() && problem.column.is_some());
    // Verifying every bit and reading after some keeps the test short.
    if !bit.is_multiple_of(5) {
        return named;
    }
    if let Ok(cache) = Cache::open(dir, Io::Read) {
        let columns = Columns::all(cache.manifest());
        for (shard, originals) in originals.iter().enumerate() {
            let rows: Vec<u32> = (0..originals.len() as u32).collect();
            if let Ok(decoded) = cache.read(shard as u32, &rows, &columns) {
                assert_eq!(
                    &decoded, originals,
                    "{name}: bit {bit} changes values silently"
                );
            }
        }
        let _ = cache.rows();
        let _ = cache.head();
    }
    named
}

fn decoded(dir: &Path) -> Vec<Vec<caskd_formats::Sequence>> {
    let cache = Cache::open(dir, Io::Read).unwrap();
    let columns = Columns::all(cache.manifest());
    let shards = cache.manifest().shards.iter().enumerate();
    shards
        .map(|(shard, info)| {
            let rows: Vec<u32> = (0..info.sequences as u32).collect();
            cache.read(shard as u32, &rows, &columns).unwrap()
        })
        .collect()
}

/// The Parquet library panics on some garbage; the reader turns that into an error, but its message would drown the
/// test's output.
fn quiet() {
    std::panic::set_hook(Box::new(|info| {
        let is_ours = info
            .location()
            .is_some_and(|location| location.file().contains("tests/"));
        if is_ours {
            eprintln!("{info}");
        }
    }));
}

#[test]
fn flipped_bits_in_every_byte_of_manifest_and_head_are_found() {
    quiet();
    let written = written(&small());
    let originals = decoded(&written.dir);
    for (name, bytes) in tree(&written.dir) {
        if name.starts_with("shards") {
            continue;
        }
        for bit in (0..bytes.len() * 8).step_by(3) {
            check_flip(&written.dir, &name, &bytes, bit, &originals);
        }
    }
}

fn flip_bits_of_a_shard(bits: impl Fn(usize) -> Vec<usize>) {
    quiet();
    let written = written(&small());
    let originals = decoded(&written.dir);
    let (name, bytes) = tree(&written.dir)
        .into_iter()
        .find(|(name, _)| name.starts_with("shards/00000"))
        .unwrap();
    for byte in 0..bytes.len() {
        for bit in bits(byte) {
            check_flip(&written.dir, &name, &bytes, byte * 8 + bit, &originals);
        }
    }
}

#[test]
fn a_flipped_bit_in_every_byte_of_a_shard_is_found() {
    flip_bits_of_a_shard(|byte| vec![byte % 8]);
}

#[test]
#[ignore = "takes minutes; run it after a change of the layout"]
fn every_flipped_bit_of_a_shard_is_found() {
    flip_bits_of_a_shard(|_| (0..8).collect());
}

#[test]
fn flipped_bits_of_a_larger_shard_are_found_with_row_and_column() {
    quiet();
    let shape = Shape {
        tier: Tier::Sparse,
        top_k: 32,
        vocab_size: 70_000,
        layers: vec![(1, 64, HiddenCodec::Int8), (3, 48, HiddenCodec::F16)],
        lengths: vec![40; 20],
        per_shard: 20,
    };
    let written = written(&sample(&shape));
    let originals = decoded(&written.dir);
    let (name, bytes) = tree(&written.dir)
        .into_iter()
        .find(|(name, _)| name.starts_with("shards/"))
        .unwrap();
    let step = 8 * bytes.len() / 100 + 1;
    let (mut tried, mut named) = (0, 0);
    for bit in (3..bytes.len() * 8).step_by(step) {
        tried += 1;
        named += usize::from(check_flip(&written.dir, &name, &bytes, bit, &originals));
    }
    // What is neither footer nor page header lies in a row.
    assert!(named * 10 > tried * 9, "{named} of {tried}");
}

#[test]
fn a_flipped_bit_in_a_blob_names_shard_column_and_row() {
    let written = written(&small());
    let (name, bytes) = tree(&written.dir)
        .into_iter()
        .find(|(name, _)| name.starts_with("shards/00001"))
        .unwrap();
    // The blob of the shard's second row (five positions, layer 4): codec 2, version 1, layer 4, first 0, count, width.
    let header = [2, 1, 4, 0, 0, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0];
    let at = bytes
        .windows(header.len())
        .position(|window| window == header)
        .unwrap();
    let mut changed = bytes.clone();
    changed[at + 18] ^= 1;
    fs::write(written.dir.join(&name), &changed).unwrap();
    let cache = Cache::open(&written.dir, Io::Mmap).unwrap();
    let error = cache
        .read(1, &[0, 1], &Columns::all(cache.manifest()))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("`{name}`, column hidden.4, row 1 is damaged: the page's checksum does not match")
    );
    assert!(error.is_user());
    let report = verify(&written.dir, false).unwrap();
    let problem = report.problems.last().unwrap();
    assert_eq!(
        (problem.column.as_deref(), problem.row),
        (Some("hidden.4"), Some(1))
    );
}

#[test]
fn truncated_and_missing_files() {
    let written = written(&small());
    for (name, bytes) in tree(&written.dir) {
        let path = written.dir.join(&name);
        for length in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&path, &bytes[..length]).unwrap();
            let error = Cache::open(&written.dir, Io::Mmap).unwrap_err();
            let expected = if name == "manifest.json" {
                matches!(&error, Error::Damaged { file, .. } if *file == name)
            } else {
                matches!(&error, Error::WrongLength { file, .. } if *file == name)
            };
            assert!(
                expected && error.is_user() && error.hint().is_some(),
                "{error:?}"
            );
            assert!(!verify(&written.dir, true).unwrap().ok);
        }
        fs::remove_file(&path).unwrap();
        let error = Cache::open(&written.dir, Io::Mmap).unwrap_err();
        if name == "manifest.json" {
            assert!(matches!(error, Error::NotACache { .. }), "{error:?}");
        } else {
            assert!(
                matches!(&error, Error::Missing { file, .. } if *file == name),
                "{error:?}"
            );
            let report = verify(&written.dir, true).unwrap();
            assert!(
                report.problems.len() == 1 && report.problems[0].file == name,
                "{report:?}"
            );
        }
        fs::write(&path, &bytes).unwrap();
    }
    assert!(verify(&written.dir, true).unwrap().ok);
}

#[test]
fn a_file_cut_short_while_open_is_an_error_not_a_signal() {
    let written = written(&small());
    let cache = Cache::open(&written.dir, Io::Read).unwrap();
    cache.read(0, &[0], &Columns::default()).unwrap();
    let path = written.dir.join(&cache.manifest().shards[0].file);
    fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(10)
        .unwrap();
    assert!(
        cache
            .read(0, &[0], &Columns::all(cache.manifest()))
            .is_err()
    );
}

/// Changes the manifest's text and repairs its checksum, as an attacker or a careless editor with our source would.
fn forge(dir: &Path, change: impl Fn(&str) -> String) {
    let text = fs::read_to_string(dir.join("manifest.json")).unwrap();
    let changed = change(&text);
    assert_ne!(text, changed);
    let tail = "\"\n}\n";
    let front = &changed[..changed.len() - tail.len() - 64];
    let digest = blake3::hash(format!("{front}{tail}").as_bytes()).to_hex();
    fs::write(dir.join("manifest.json"), format!("{front}{digest}{tail}")).unwrap();
}

#[test]
fn a_forged_manifest_is_refused() {
    let cases: [(&str, &str, &str); 9] = [
        (
            "\"file\": \"shards/00000",
            "\"file\": \"../shards/00000",
            "leads out of the cache",
        ),
        (
            "\"file\": \"shards/00000",
            "\"file\": \"/shards/00000",
            "leads out of the cache",
        ),
        (
            "\"file\": \"shards/00000-",
            "\"file\": \"shards/00009-",
            "should be named",
        ),
        (
            "\"format_version\": 1",
            "\"format_version\": 2",
            "has format version 2, this caskd reads version 1",
        ),
        (
            "\"int8-channel\"",
            "\"int7-channel\"",
            "column hidden.4: codec int7-channel version 1 is unknown",
        ),
        (
            "\"top_k\": 3",
            "\"top_k\": 12",
            "entries are more than the vocabulary",
        ),
        (
            "\"sequences\": 5",
            "\"sequences\": 9",
            "3 shards, 9 sequences need 5",
        ),
        (
            "\"positions\": 18",
            "\"positions\": 17",
            "the shards have 18 positions, the data 17",
        ),
        (
            "\"tier\": \"exact\"",
            "\"tier\": \"magic\"",
            "unknown variant `magic`",
        ),
    ];
    for (from, to, expected) in cases {
        let written = written(&small());
        forge(&written.dir, |text| text.replacen(from, to, 1));
        let error = Cache::open(&written.dir, Io::Mmap).unwrap_err();
        assert!(error.to_string().contains(expected), "{from}: {error}");
        assert!(error.is_user() && error.hint().is_some());
    }
}

#[test]
fn a_shard_of_another_cache_is_refused() {
    let (here, there) = (written(&small()), written(&small()));
    let name = |dir: &Path, start: &str| {
        tree(dir)
            .into_iter()
            .find(|(name, _)| name.starts_with(start))
            .unwrap()
    };
    let (first, _) = name(&here.dir, "shards/00000");
    let (_, mut other) = name(&there.dir, "shards/00001");
    let length = fs::metadata(here.dir.join(&first)).unwrap().len() as usize;
    other.resize(length, 0);
    fs::write(here.dir.join(&first), other).unwrap();
    let cache = Cache::open(&here.dir, Io::Mmap).unwrap();
    assert!(cache.read(0, &[0], &Columns::default()).is_err());
    assert!(!verify(&here.dir, false).unwrap().ok);
}

#[test]
fn folders_that_are_no_cache() {
    let folder = tempfile::tempdir().unwrap();
    for dir in [folder.path().to_owned(), folder.path().join("absent")] {
        assert!(matches!(
            Cache::open(&dir, Io::Mmap),
            Err(Error::NotACache { .. })
        ));
        assert!(matches!(verify(&dir, true), Err(Error::NotACache { .. })));
    }
}

#[test]
fn a_flipped_bit_in_every_byte_of_a_plan_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    let sample = small();
    let mut writer = CacheWriter::open(&dir, &sample.spec, false).unwrap();
    writer.write_shard(1, sample.shard(1)).unwrap();
    drop(writer);
    let bytes = fs::read(dir.join("plan.json")).unwrap();
    for at in 0..bytes.len() - 1 {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        fs::write(dir.join("plan.json"), &changed).unwrap();
        let error = CacheWriter::open(&dir, &sample.spec, true).unwrap_err();
        let is_named = matches!(&error, Error::PlanDiffers { .. })
            || matches!(&error, Error::Damaged { file, .. } if file == "plan.json");
        assert!(is_named && error.is_user(), "byte {at}: {error:?}");
    }
    fs::write(dir.join("plan.json"), &bytes).unwrap();
    assert!(
        CacheWriter::open(&dir, &sample.spec, true)
            .unwrap()
            .is_done(1)
    );
}
