//! Builds killed before every single change of the disk.

use std::sync::atomic::AtomicI64;

use super::*;
use crate::store::Local;
use crate::{Cache, Io, verify};

use crate::fuzz::sample::{small, tree};

/// Runs a whole build that is killed before change number `changes`.
fn build(dir: &Path, resume: bool, changes: i64) -> Result<Manifest> {
    let sample = small();
    let mut local = Local::new(dir);
    local.fuse = Some(AtomicI64::new(changes));
    let mut writer = CacheWriter::open_in(Arc::new(local), &sample.spec, resume)?;
    sample.fill(&mut writer)?;
    writer.finish()
}

#[test]
fn a_build_killed_anywhere_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    small().write(&whole);
    let expected = tree(&whole);
    let mut finished_before_the_end = 0;
    for changes in 0.. {
        let dir = folder.path().join(format!("killed-{changes}"));
        if build(&dir, false, changes).is_ok() {
            assert!(changes > 30, "a build has many changes");
            assert!(finished_before_the_end > 0);
            break;
        }
        // Either there is no cache, or it is whole.
        match Cache::open(&dir, Io::Mmap) {
            Ok(_) => {
                assert!(verify(&dir, true).unwrap().ok);
                finished_before_the_end += 1;
            }
            Err(Error::NotACache { .. } | Error::Unfinished { .. }) => {}
            Err(error) => panic!("killed before change {changes}: {error}"),
        }
        // Killed once more on the way, then left alone.
        let _ = build(&dir, true, changes / 2);
        build(&dir, true, i64::MAX).unwrap();
        assert_eq!(tree(&dir), expected, "killed before change {changes}");
    }
}
