//! Hostile input: forged bytes whose checksums have been repaired, so that they reach the parsers.
//!
//! A case may be refused or decoded; it may not panic, hang, or allocate beyond what its size justifies. Each target
//! runs some thousand cases as a test; `CASKD_FUZZ_CASES=2000000` runs that many of each, other ones with
//! `CASKD_FUZZ_SEED`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use crate::cache::{Columns, Io};
use crate::frame::tests as blobs;
use crate::manifest::Manifest;
use crate::shard::fuzz::{forge_footer, forge_index, forge_page, open_shards};
use crate::store::Memory;
use crate::transform::tests as transform;
use crate::unchecked::counting::peak;
use crate::{Cache, CacheWriter, Error, HiddenCodec, Tier};

#[path = "../tests/sample/mod.rs"]
pub(crate) mod sample;

pub(crate) use sample::Noise;
use sample::{Sample, Shape};

/// Cases of a target when it runs as a test.
const SMOKE: u64 = 3000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs many cases; `case` returns how many bytes it was given, and may allocate `ratio` times as many and a constant.
fn run(name: &str, weight: u64, ratio: usize, mut case: impl FnMut(&mut Noise) -> usize) {
    let cases = number("CASKD_FUZZ_CASES").unwrap_or(SMOKE * weight);
    let seed = number("CASKD_FUZZ_SEED").unwrap_or(1);
    quiet();
    let done = watched(name);
    for index in 0..cases {
        let mut noise = Noise(seed << 40 ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let work = AssertUnwindSafe(|| peak(|| case(&mut noise)));
        let Ok((given, allocated)) = catch_unwind(work) else {
            panic!("{name}, seed {seed}, case {index} panicked");
        };
        let bound = (256 << 10) + ratio * given;
        assert!(
            allocated <= bound,
            "{name}, seed {seed}, case {index}: {allocated} bytes allocated for {given}"
        );
        done.fetch_add(1, Ordering::Relaxed);
    }
    done.store(u64::MAX, Ordering::Relaxed);
    eprintln!("{name}: {cases} cases");
}

/// Ends the process if no case ends for minutes: what hangs names itself.
fn watched(name: &str) -> Arc<AtomicU64> {
    let done = Arc::new(AtomicU64::new(0));
    let (watched, name) = (done.clone(), name.to_owned());
    std::thread::spawn(move || {
        let mut before = None;
        loop {
            std::thread::sleep(Duration::from_mins(3));
            let now = watched.load(Ordering::Relaxed);
            if now == u64::MAX {
                return;
            }
            if before == Some(now) {
                eprintln!("{name}: case {now} does not end");
                std::process::abort();
            }
            before = Some(now);
        }
    });
    done
}

/// The Parquet library panics on some footers, which the reader turns into errors; its messages would drown ours.
fn quiet() {
    std::panic::set_hook(Box::new(|info| {
        let is_ours = info
            .location()
            .is_some_and(|location| !location.file().contains("parquet"));
        if is_ours {
            eprintln!("{info}");
        }
    }));
}

/// Changes some bytes in one of the ways that parsers mind.
pub(crate) fn mutate(bytes: &mut Vec<u8>, noise: &mut Noise) {
    const NUMBERS: [u8; 9] = [0, 1, 2, 0x0F, 0x7F, 0x80, 0x81, 0xFE, 0xFF];
    for _ in 0..=noise.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = noise.below(bytes.len());
        match noise.below(9) {
            0 | 1 => bytes[at] ^= 1 << noise.below(8),
            2 | 3 => bytes[at] = NUMBERS[noise.below(NUMBERS.len())],
            4 => bytes[at] = noise.next() as u8,
            5 => {
                let value = [0, 1, 0xFFFF, 1 << 20, 1 << 24, 1 << 30, 1 << 31, u32::MAX];
                let value = value[noise.below(value.len())].to_le_bytes();
                for (place, byte) in bytes[at..].iter_mut().zip(value) {
                    *place = byte;
                }
            }
            6 => drop(bytes.drain(at..(at + 1 + noise.below(8)).min(bytes.len()))),
            7 => {
                let end = (at + 1 + noise.below(16)).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                let place = noise.below(bytes.len());
                bytes.splice(place..place, piece);
            }
            _ => bytes.truncate(at),
        }
    }
}

/// Caches in memory that have every column and codec between them.
pub(crate) fn caches() -> Vec<(Sample, Memory)> {
    let wide = Shape {
        tier: Tier::Sparse,
        top_k: 4,
        vocab_size: 70_000,
        layers: vec![(1, 6, HiddenCodec::Int8)],
        lengths: vec![40, 3, 80, 1],
        per_shard: 4,
    };
    let compact = sample::compact(50, 3, vec![1, 7, 30, 16]);
    [sample::small(), sample::sample(&wide), compact]
        .into_iter()
        .map(|sample| {
            let memory = Memory::default();
            let storage = Arc::new(memory.clone());
            let mut writer = CacheWriter::open_in(storage, &sample.spec, false).unwrap();
            sample.fill(&mut writer).unwrap();
            writer.finish().unwrap();
            (sample, memory)
        })
        .collect()
}

#[test]
fn forged_blobs() {
    let sound: Vec<Vec<u8>> = (0..3).map(blobs::sound).collect();
    run("blobs", 10, 40_000, |noise| {
        let kind = noise.below(3);
        let mut blob = sound[kind].clone();
        mutate(&mut blob, noise);
        let given = blob.len();
        if let Ok(values) = blobs::decode(kind, blob) {
            let expected = blobs::POSITIONS * blobs::WIDTH * if kind == 0 { 2 } else { 1 };
            assert_eq!(values, expected);
        }
        given
    });
}

#[test]
fn forged_transform_blobs() {
    let basis = transform::basis();
    run("transform blobs", 2, 1000, |noise| {
        transform::forge_blob(&basis, noise)
    });
}

#[test]
fn forged_bases() {
    let (file, info) = transform::basis().to_file();
    run("bases", 1, 1000, |noise| {
        transform::forge_basis(&file, &info, noise)
    });
}

#[test]
fn forged_pages() {
    let shards = open_shards(&caches());
    run("pages", 10, 40_000, |noise| forge_page(&shards, noise));
}

#[test]
fn forged_page_indexes() {
    let shards = open_shards(&caches());
    run("page indexes", 10, 100, |noise| forge_index(&shards, noise));
}

#[test]
fn forged_footers() {
    let shards = open_shards(&caches());
    run("footers", 1, 1000, |noise| forge_footer(&shards, noise));
}

#[test]
fn forged_manifests() {
    let manifests: Vec<Bytes> = caches()
        .iter()
        .flat_map(|(_, memory)| memory.files())
        .filter(|(name, _)| name == crate::store::MANIFEST)
        .map(|(_, bytes)| bytes)
        .collect();
    run("manifests", 3, 200, |noise| {
        let mut bytes = manifests[noise.below(manifests.len())].to_vec();
        mutate(&mut bytes, noise);
        let given = bytes.len();
        // Half of the digits lie outside a string: numbers of every size take their place.
        if noise.below(2) == 0
            && let Some(at) = bytes.iter().position(u8::is_ascii_digit)
        {
            let numbers = [
                "0",
                "-1",
                "4294967296",
                "18446744073709551615",
                "1e300",
                "16777217",
            ];
            let digits: Vec<usize> = (at..bytes.len())
                .filter(|at| bytes[*at].is_ascii_digit())
                .collect();
            let at = digits[noise.below(digits.len())];
            bytes.splice(at..=at, numbers[noise.below(numbers.len())].bytes());
        }
        if let Ok(manifest) = Manifest::parse_forged(&bytes) {
            // What the manifest says is believed by nobody: the files are not there.
            let storage = Arc::new(Memory::new([(
                crate::store::MANIFEST.to_owned(),
                manifest.to_bytes().unwrap().into(),
            )]));
            assert!(Cache::open_in(storage.clone(), Io::Mmap).is_err());
            match crate::verify_in(storage, true, &mut |_, _| {}) {
                Ok(report) => assert!(!report.ok),
                Err(error) => assert!(matches!(error, Error::UnknownVersion { .. }), "{error}"),
            }
        }
        given
    });
}

#[test]
fn forged_heads() {
    let (_, memory) = caches().swap_remove(0);
    let cache = Cache::open_in(Arc::new(memory.clone()), Io::Mmap).unwrap();
    let info = cache.manifest().head.clone().unwrap();
    let (_, sound) = memory
        .files()
        .into_iter()
        .find(|(name, _)| *name == info.file)
        .unwrap();
    run("heads", 5, 200, |noise| {
        let mut bytes = sound.to_vec();
        mutate(&mut bytes, noise);
        let given = bytes.len();
        if let Ok(head) = crate::head::parse(&info, &bytes.into()) {
            assert_eq!(head.rows(0..head.vocab_size).len(), 11 * 4);
        }
        given
    });
}

/// Not forged: damaged anywhere, as disks do it.
#[test]
fn damaged_files_are_never_read_as_other_values() {
    let caches = caches();
    let originals: Vec<_> = caches
        .iter()
        .map(|(_, memory)| {
            let cache = Cache::open_in(Arc::new(memory.clone()), Io::Mmap).unwrap();
            let columns = Columns::all(cache.manifest());
            let rows = [0];
            (memory.files(), cache.read(0, &rows, &columns).unwrap())
        })
        .collect();
    run("damaged files", 1, 1000, |noise| {
        let (files, original) = &originals[noise.below(originals.len())];
        let mut files = files.clone();
        let chosen = noise.below(files.len());
        let mut bytes = files[chosen].1.to_vec();
        mutate(&mut bytes, noise);
        let is_changed = bytes != files[chosen].1;
        files[chosen].1 = bytes.into();
        let given = files.iter().map(|(_, bytes)| bytes.len()).sum();
        let storage = Arc::new(Memory::new(files));
        let found =
            crate::verify_in(storage.clone(), false, &mut |_, _| {}).is_ok_and(|report| report.ok);
        assert_eq!(found, !is_changed);
        if let Ok(cache) = Cache::open_in(storage, Io::Mmap)
            && let Ok(decoded) = cache.read(0, &[0], &Columns::all(cache.manifest()))
        {
            assert_eq!(&decoded, original);
        }
        given
    });
}
