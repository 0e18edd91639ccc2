//! The rules of building: what is refused, what is kept.
#![allow(clippy::unwrap_used)]

mod sample;

use std::fs;

use caskd_formats::{Cache, CacheSpec, CacheWriter, Error, HiddenCodec, Io, Sequence};
use sample::{small, tree};

type Change<T> = fn(&mut T);

#[test]
fn a_folder_with_something_in_it_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let sample = small();
    fs::write(folder.path().join("thesis.txt"), "mine").unwrap();
    for resume in [false, true] {
        let error = CacheWriter::open(folder.path(), &sample.spec, resume).unwrap_err();
        assert!(
            matches!(
                error,
                Error::CacheExists {
                    what: "other files",
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(error.is_user() && error.hint().is_some());
    }
    assert_eq!(
        tree(folder.path()).len(),
        1,
        "nothing was put beside a stranger's file"
    );
}

#[test]
fn a_finished_cache_is_not_built_over_and_resumes_harmlessly() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("a/b/cache");
    let sample = small();
    sample.write(&dir);
    let before = tree(&dir);
    let error = CacheWriter::open(&dir, &sample.spec, false).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("`{}` already holds a finished cache", dir.display())
    );
    assert_eq!(tree(&dir), before);

    let mut writer = CacheWriter::open(&dir, &sample.spec, true).unwrap();
    assert!((0..3).all(|shard| writer.is_done(shard)));
    writer.write_shard(0, sample.shard(0)).unwrap();
    sample.fill(&mut writer).unwrap();
    writer.finish().unwrap();
    assert_eq!(tree(&dir), before);

    let mut writer = CacheWriter::open(&dir, &sample.spec, true).unwrap();
    let mut others = sample.shard(0).to_vec();
    others[0].source.push('x');
    assert!(
        writer.write_shard(0, &others).is_err(),
        "a published shard is never replaced"
    );
}

#[test]
fn a_second_builder_is_refused_and_the_lock_ends_with_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    let sample = small();
    let mut first = CacheWriter::open(&dir, &sample.spec, false).unwrap();
    first.write_shard(1, sample.shard(1)).unwrap();
    for resume in [false, true] {
        let error = CacheWriter::open(&dir, &sample.spec, resume).unwrap_err();
        assert!(matches!(error, Error::Locked { .. }), "{error:?}");
        assert_eq!(
            error.to_string(),
            format!("another process is building a cache in `{}`", dir.display())
        );
    }
    drop(first);
    let error = CacheWriter::open(&dir, &sample.spec, false).unwrap_err();
    assert!(error.hint().unwrap().contains("--resume"), "{error}");
    assert!(matches!(
        Cache::open(&dir, Io::Mmap),
        Err(Error::Unfinished { .. })
    ));
    let second = CacheWriter::open(&dir, &sample.spec, true).unwrap();
    assert_eq!(
        [second.is_done(0), second.is_done(1), second.is_done(2)],
        [false, true, false]
    );
}

#[test]
fn another_plan_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    let sample = small();
    drop(CacheWriter::open(&dir, &sample.spec, false).unwrap());
    let mut other = sample.spec.clone();
    other.teacher.digest = "ff".repeat(32);
    let error = CacheWriter::open(&dir, &other, true).unwrap_err();
    assert!(
        matches!(&error, Error::PlanDiffers { field, .. } if field == "teacher.digest"),
        "{error}"
    );
    sample.write(&folder.path().join("finished"));
    let error = CacheWriter::open(&folder.path().join("finished"), &other, true).unwrap_err();
    assert!(
        matches!(&error, Error::PlanDiffers { field, .. } if field == "teacher.digest"),
        "{error}"
    );
}

#[test]
fn a_rotten_shard_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    let sample = small();
    let mut writer = CacheWriter::open(&dir, &sample.spec, false).unwrap();
    let info = writer.write_shard(0, sample.shard(0)).unwrap();
    drop(writer);
    let mut bytes = fs::read(dir.join(&info.file)).unwrap();
    bytes[100] ^= 4;
    fs::write(dir.join(&info.file), bytes).unwrap();
    let mut writer = CacheWriter::open(&dir, &sample.spec, true).unwrap();
    assert!(!writer.is_done(0));
    sample.fill(&mut writer).unwrap();
    writer.finish().unwrap();
    let whole = folder.path().join("whole");
    sample.write(&whole);
    assert_eq!(tree(&dir), tree(&whole));
}

#[test]
fn an_incomplete_cache_is_not_published() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("cache");
    let sample = small();
    let mut writer = CacheWriter::open(&dir, &sample.spec, false).unwrap();
    writer.write_shard(1, sample.shard(1)).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(
        error.to_string().contains("shards 0, 2 are missing"),
        "{error}"
    );
    let mut writer = CacheWriter::open(&dir, &sample.spec, true).unwrap();
    for shard in 0..3 {
        writer.write_shard(shard, sample.shard(shard)).unwrap();
    }
    let error = writer.finish().unwrap_err();
    assert!(error.to_string().contains("LM head"), "{error}");
}

#[test]
fn specs_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&str, Change<CacheSpec>); 6] = [
        ("top_k", |spec| spec.top_k = 12),
        ("data.sequences", |spec| spec.data.sequences = 0),
        ("layers", |spec| spec.layers.truncate(1)),
        ("layers", |spec| spec.layers[1].layer = 5),
        ("layers", |spec| spec.layers.reverse()),
        ("vocab_size", |spec| spec.vocab_size = 0),
    ];
    for (expected, change) in cases {
        let mut spec = small().spec;
        change(&mut spec);
        let error = CacheWriter::open(&folder.path().join("cache"), &spec, false).unwrap_err();
        assert!(
            matches!(&error, Error::InvalidSpec { field, .. } if field == expected),
            "{error:?}"
        );
        assert!(
            error.is_user() && error.hint().is_some() == (expected != "vocab_size"),
            "{error}"
        );
    }
    assert!(!folder.path().join("cache").exists());
}

#[test]
fn sequences_that_cannot_be_stored_are_refused_by_name() {
    let cases: [(&str, &str, Change<Sequence>); 13] = [
        ("top_k", "the lower token id must come first", |s| {
            let top_k = s.top_k.as_mut().unwrap();
            top_k.logits[1] = top_k.logits[0];
            top_k.ids[0] = 7;
            top_k.ids[1] = 6;
        }),
        ("top_k", "NaN at position 2", |s| {
            s.top_k.as_mut().unwrap().logits[7] = f32::NAN;
        }),
        ("top_k", "the first logit", |s| {
            s.top_k.as_mut().unwrap().logits[0] = 99.0;
        }),
        ("top_k", "ascend at rank 2", |s| {
            s.top_k.as_mut().unwrap().logits[5] = 30.0;
        }),
        ("top_k", "token id 11", |s| {
            s.top_k.as_mut().unwrap().ids[1] = 11;
        }),
        ("mean", "NaN at position 3", |s| {
            s.statistics.as_mut().unwrap().mean[3] = f32::NAN;
        }),
        ("log_sum_exp", "inf at position 0", |s| {
            s.statistics.as_mut().unwrap().log_sum_exp[0] = f32::INFINITY;
        }),
        ("std", "6 values for 7 tokens", |s| {
            s.statistics.as_mut().unwrap().std.truncate(6);
        }),
        ("token_ids", "token id 11", |s| s.token_ids[0] = 11),
        ("loss_mask", "6 entries for 7 tokens", |s| {
            s.loss_mask.truncate(6);
        }),
        ("hidden.2", "does not fit in f16", |s| {
            s.hidden[0].values[9] = 7e4;
        }),
        (
            "hidden.4",
            "inf at position 1, channel 2, is not finite",
            |s| s.hidden[1].values[6] = f32::INFINITY,
        ),
        ("hidden", "layers [2]", |s| s.hidden.truncate(1)),
    ];
    for (column, message, change) in cases {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("cache");
        let sample = small();
        let mut sequences = sample.shard(0).to_vec();
        change(&mut sequences[1]);
        let mut writer = CacheWriter::open(&dir, &sample.spec, false).unwrap();
        let error = writer.write_shard(0, &sequences).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("sequence `data.jsonl:2`, column {column}: ")),
            "{text}"
        );
        assert!(text.contains(message), "{text}");
        assert!(error.is_user() && error.hint().is_some());
        assert_eq!(fs::read_dir(dir.join("shards")).unwrap().count(), 0);
    }
    assert_eq!(small().spec.layers[0].codec, HiddenCodec::F16);
}
