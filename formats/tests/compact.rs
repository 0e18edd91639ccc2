//! The compact tier: what was written comes back, in whatever order it was built, and damage is found.
#![allow(clippy::unwrap_used)]

mod sample;

use caskd_formats::{
    Basis, BasisParts, Cache, CacheWriter, Columns, Error, Fidelity, Io, Sequence, SymbolCounts,
    TopK, stored_code, verify,
};
use sample::{Sample, compact, tree};

fn read_all(sample: &Sample, cache: &Cache) -> Vec<Sequence> {
    let columns = Columns::all(cache.manifest());
    (0..sample.spec.num_shards())
        .flat_map(|shard| {
            let rows: Vec<u32> = (0..sample.shard(shard).len() as u32).collect();
            cache.read(shard as u32, &rows, &columns).unwrap()
        })
        .collect()
}

#[test]
fn everything_comes_back() {
    let cases = [
        (50, 3, vec![1, 7, 300, 64, 33]),
        (2, 1, vec![1]),
        (131_073, 5, vec![40, 513, 2]),
        (100, 2, vec![32_768]),
    ];
    for (vocab_size, k, lengths) in cases {
        let sample = compact(vocab_size, k, lengths);
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("cache");
        sample.write(&dir);
        let cache = Cache::open(&dir, Io::Mmap).unwrap();
        for (original, decoded) in sample.sequences.iter().zip(read_all(&sample, &cache)) {
            assert_eq!(original.coefficients, decoded.coefficients);
            assert_eq!(original.top_k, decoded.top_k);
            assert_eq!(original.statistics, decoded.statistics);
            assert_eq!(original.token_ids, decoded.token_ids);
        }
        let report = verify(&dir, true).unwrap();
        assert!(report.ok, "{:?}", report.problems);
    }
}

#[test]
fn logits_are_the_top_k_over_what_the_basis_gives_lowered_by_the_tail_shift() {
    let sample = compact(50, 3, vec![9, 4]);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    sample.write(&dir);
    let cache = Cache::open(&dir, Io::Mmap).unwrap();
    let (head, basis) = (
        cache.head().unwrap().unwrap(),
        cache.basis().unwrap().unwrap(),
    );
    let columns = Columns::for_logits(cache.manifest()).unwrap();
    let sequence = cache.read(0, &[1], &columns).unwrap().remove(0);
    let logits = cache.rebuild_logits(&head, &sequence).unwrap();
    let weights = head.rows(0..50);
    let (statistics, top_k) = (
        sequence.statistics.as_ref().unwrap(),
        sequence.top_k.as_ref().unwrap(),
    );
    let levels = &sequence.coefficients.as_ref().unwrap().levels;
    for t in 0..sequence.token_ids.len() {
        let hidden: Vec<f64> = (0..6)
            .map(|d| {
                let sum: f64 = (0..4)
                    .map(|c| {
                        f64::from(basis.parts().synthesis[d * 4 + c]) * f64::from(levels[t * 4 + c])
                    })
                    .sum();
                f64::from(basis.parts().mean[d]) + sum
            })
            .collect();
        let mut row: Vec<f64> = (0..50)
            .map(|v| {
                (0..6)
                    .map(|d| f64::from(weights[v * 6 + d]) * hidden[d])
                    .sum()
            })
            .collect();
        let shift = f64::from(statistics.mean[t]) - row.iter().sum::<f64>() / 50.0 - 0.25;
        for logit in &mut row {
            *logit += shift;
        }
        for rank in t * 3..(t + 1) * 3 {
            row[top_k.ids[rank] as usize] = f64::from(top_k.logits[rank]);
        }
        for (found, expected) in logits[t * 50..(t + 1) * 50].iter().zip(&row) {
            assert!(
                (f64::from(*found) - expected).abs() < 1e-3 + 1e-5 * expected.abs(),
                "{found} for {expected}"
            );
        }
    }
}

#[test]
fn an_interrupted_build_completes_to_the_same_bytes() {
    let sample = compact(50, 3, vec![5, 9, 30, 2, 17]);
    let folder = tempfile::tempdir().unwrap();
    let (whole, resumed) = (folder.path().join("whole"), folder.path().join("resumed"));
    sample.write(&whole);
    let mut writer = CacheWriter::open(&resumed, &sample.spec, false).unwrap();
    assert!(
        writer.write_shard(1, sample.shard(1)).is_err(),
        "the basis comes first"
    );
    writer.write_basis(sample.basis.clone().unwrap()).unwrap();
    writer.write_shard(1, sample.shard(1)).unwrap();
    drop(writer);
    let (code, basis) = stored_code(&resumed).unwrap().unwrap();
    assert_eq!(Some(&code), sample.spec.code.as_ref());
    assert_eq!(basis.to_file(), sample.basis.as_ref().unwrap().to_file());
    let mut writer = CacheWriter::open(&resumed, &sample.spec, true).unwrap();
    assert!(writer.is_done(1) && !writer.is_done(0));
    sample.fill(&mut writer).unwrap();
    writer.finish().unwrap();
    assert_eq!(tree(&whole), tree(&resumed));
    let (found, _) = stored_code(&whole).unwrap().unwrap();
    assert_eq!(found, code);
    // A finished cache takes neither another basis nor another plan.
    let other = compact(50, 3, vec![6, 9, 30, 2, 17]);
    assert!(CacheWriter::open(&whole, &other.spec, true).is_err());
}

#[test]
fn every_flipped_bit_is_found() {
    let sample = compact(20, 2, vec![5, 40]);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    sample.write(&dir);
    for (name, bytes) in tree(&dir) {
        for at in (0..bytes.len()).step_by(1 + bytes.len() / 60) {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            std::fs::write(dir.join(&name), &bad).unwrap();
            let found = verify(&dir, false).is_ok_and(|report| report.ok);
            assert!(!found, "{name} at {at}");
        }
        std::fs::write(dir.join(&name), &bytes).unwrap();
    }
    assert!(verify(&dir, true).unwrap().ok);
}

#[test]
fn a_basis_that_does_not_fit_is_refused() {
    let sample = compact(20, 2, vec![5, 40]);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    let manifest = sample.write(&dir);
    let name = &manifest.code.as_ref().unwrap().basis.file;
    std::fs::remove_file(dir.join(name)).unwrap();
    assert!(matches!(
        Cache::open(&dir, Io::Mmap),
        Err(Error::Missing { .. })
    ));

    let counts = SymbolCounts::of(
        &[1, 2],
        1,
        &TopK {
            k: 1,
            ids: vec![0, 1],
            logits: vec![1.0, 2.0],
        },
        4,
    );
    let parts = |mean: Vec<f32>, rest: Vec<f32>| BasisParts {
        tail_shift: 0.0,
        mean,
        analysis: rest.clone(),
        synthesis: rest,
    };
    assert!(Basis::new(parts(vec![0.0], vec![1.0]), &counts).is_ok());
    assert!(Basis::new(parts(vec![0.0; 2], vec![1.0]), &counts).is_err());
    assert!(Basis::new(parts(vec![f32::NAN], vec![1.0]), &counts).is_err());
    assert!(Basis::new(parts(vec![], vec![]), &counts).is_err());
    let mut shifted = parts(vec![0.0], vec![1.0]);
    shifted.tail_shift = f32::INFINITY;
    assert!(Basis::new(shifted, &counts).is_err());
}

#[test]
fn the_fidelity_report_survives_in_the_manifest() {
    let sample = compact(20, 2, vec![5]);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    let mut writer = CacheWriter::open(&dir, &sample.spec, false).unwrap();
    sample.fill(&mut writer).unwrap();
    let figures = || Fidelity::keys().map(|key| (key, 0.0123)).collect();
    let report = Fidelity {
        positions: 5,
        batch_positions: 5,
        student: "s".to_owned(),
        tail: None,
        kl: figures(),
        gradient_error: figures(),
    };
    writer.set_fidelity(report.clone());
    writer.finish().unwrap();
    let cache = Cache::open(&dir, Io::Mmap).unwrap();
    assert_eq!(cache.manifest().fidelity.as_ref(), Some(&report));
}
