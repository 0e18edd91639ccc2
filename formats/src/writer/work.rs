//! A build that many processes share. One writes the plan: `plan.json`, the LM head and the basis, a file for each task,
//! and `work-<16 hex>.json`, which names them. Workers then write shards, each with a receipt, in any order and as often as
//! they like; one process joins the receipts into the manifest. Every file but a receipt is named by its digest, and
//! nothing in the finished cache tells who made it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    CacheWriter, Contents, compare, contents, current_plan, is_whole, plan_value, read_row,
    shard_number, whole_shard,
};
use crate::cache::{Columns, Io};
use crate::error::{Error, Result};
use crate::fidelity::Fidelity;
use crate::manifest::{HeadInfo, Manifest, ShardInfo};
use crate::sequence::Sequence;
use crate::shard;
use crate::spec::CacheSpec;
use crate::store::{Guard, PLAN, RECEIPTS, SHARDS, Store, TASKS};
use crate::transform::{self, Basis};

/// Far above any plan of the largest number of shards.
const SIZE_LIMIT: u64 = 256 << 20;

/// The receipt of the fidelity report.
const FIDELITY: &str = "fidelity";

/// One task: the sequences of one shard, waiting for the teacher. The number of the task is that of the shard.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct TaskInfo {
    /// Path in the cache, `tasks/00003-<16 hex>`.
    pub file: String,
    /// blake3, hexadecimal.
    pub digest: String,
    /// Length of the file.
    pub bytes: u64,
    /// Sequences of the shard.
    pub sequences: u64,
    /// Their positions.
    pub positions: u64,
}

/// `work-<16 hex>.json`: what workers need to know beside the spec in `plan.json`.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Work {
    /// The LM head, which is on disk already.
    pub head: Option<HeadInfo>,
    /// The tasks, in the order of their shards.
    pub tasks: Vec<TaskInfo>,
    /// What the builder wants to find again: where the teacher is, how large a batch may be.
    pub builder: Value,
}

/// `receipts/00003.json`: a worker's word that a shard is on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Receipt<T> {
    /// blake3 of the work file.
    work: String,
    done: T,
}

impl CacheWriter {
    /// Writes the file of one task; `bytes` are the builder's own.
    pub fn write_task(&self, shard: usize, positions: u64, bytes: &[u8]) -> Result<TaskInfo> {
        self.store.create_folder(TASKS)?;
        let digest = blake3::hash(bytes).to_hex().to_string();
        let file = format!("{TASKS}/{shard:05}-{}", &digest[..16]);
        self.put(&file, &digest, &[bytes])?;
        Ok(TaskInfo {
            file,
            digest,
            bytes: bytes.len() as u64,
            sequences: self.spec.sequences_in_shard(shard) as u64,
            positions,
        })
    }

    /// Publishes the plan and lets the folder go: from here on it belongs to workers.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] where the tasks are not those of the spec.
    pub fn publish_work(self, tasks: Vec<TaskInfo>, builder: Value) -> Result<Work> {
        if tasks.len() != self.spec.num_shards() {
            return Err(Error::InvalidRequest(format!(
                "{} tasks for {} shards",
                tasks.len(),
                self.spec.num_shards()
            )));
        }
        let work = Work {
            head: self.head.clone(),
            tasks,
            builder,
        };
        let bytes = format!("{:#}\n", serde_json::json!(work)).into_bytes();
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let stale = work_files(&self.store)?.into_iter();
        let stale: Vec<String> = stale.filter(|file| *file != work_file(&digest)).collect();
        if !stale.is_empty() {
            self.store.remove_folder(RECEIPTS)?;
        }
        for file in stale {
            self.store.remove(&file)?;
        }
        self.store.create_folder(RECEIPTS)?;
        self.put(&work_file(&digest), &digest, &[&bytes])?;
        Ok(work)
    }

    /// Takes the build over from its workers, for [`CacheWriter::finish`]. A finished cache is taken as it is.
    ///
    /// # Errors
    /// [`Error::Locked`] while a worker is alive, [`Error::NoWork`] where there is no plan, [`Error::TasksMissing`],
    /// [`Error::Damaged`] where a shard is not what its receipt says.
    pub fn commit(dir: &Path) -> Result<(CacheWriter, Option<Work>)> {
        let store = Store::local(dir);
        refuse_others(&store)?;
        let lock = store.lock()?;
        if contents(&store)? == Contents::Finished {
            let manifest = Manifest::load(&store)?;
            let writer = CacheWriter {
                spec: manifest.spec(),
                shards: manifest.shards.iter().cloned().enumerate().collect(),
                head: manifest.head.clone(),
                basis: None,
                fidelity: None,
                published: Some(manifest),
                store,
                lock,
            };
            return Ok((writer, None));
        }
        let planned = Planned::load(&store)?;
        let mut shards = BTreeMap::new();
        let mut missing = Vec::new();
        for (number, task) in planned.work.tasks.iter().enumerate() {
            let Some(info) = planned.receipt(&store, number)? else {
                missing.push(number);
                continue;
            };
            let on_disk = shard::describe(
                &store,
                &planned.spec,
                number,
                &info.file,
                info.digest.clone(),
            )?;
            let named = shard::file_name(number, &info.digest) == info.file;
            if on_disk.as_ref() != Some(&info) || !named || info.positions != task.positions {
                return Err(Error::damaged(
                    &info.file,
                    "it is not the shard that its receipt describes",
                ));
            }
            shards.insert(number, info);
        }
        if !missing.is_empty() {
            return Err(Error::TasksMissing {
                dir: dir.to_owned(),
                tasks: ranges(&missing),
                total: planned.work.tasks.len(),
            });
        }
        if let Some(head) = &planned.work.head {
            store.open(&head.file, head.bytes, Io::Read)?;
        }
        let writer = CacheWriter {
            fidelity: planned.fidelity(&store)?,
            spec: planned.spec,
            shards,
            head: planned.work.head.clone(),
            basis: planned.basis,
            published: None,
            store,
            lock,
        };
        Ok((writer, Some(planned.work)))
    }

    /// Whether the report is known, from a finished cache or from [`CacheWriter::set_fidelity`].
    pub fn has_fidelity(&self) -> bool {
        self.fidelity.is_some() || self.published.is_some()
    }
}

/// A planned build as one of its workers sees it; keeps single builders out as long as it lives.
#[derive(Debug)]
pub struct SharedBuild {
    store: Store,
    planned: Planned,
    _lock: Box<dyn Guard>,
}

/// How a worker's shard came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delivery {
    First,
    /// Another worker was first, with other bytes.
    Contradicted,
}

impl SharedBuild {
    /// Joins the build that is planned in `dir`.
    ///
    /// # Errors
    /// [`Error::Locked`] where a single builder has the folder, [`Error::NoWork`] where nothing is planned,
    /// [`Error::PlanDiffers`] where another version of caskd has planned.
    pub fn join(dir: &Path) -> Result<SharedBuild> {
        let store = Store::local(dir);
        refuse_others(&store)?;
        let refuse_finished = || match contents(&store)? {
            Contents::Finished => Err(Error::CacheExists {
                dir: dir.to_owned(),
                what: "a finished cache",
            }),
            _ => Ok(()),
        };
        refuse_finished()?;
        let lock = store.share()?;
        // Or since the first look, which leaves no lock file.
        refuse_finished()?;
        let planned = Planned::load(&store)?;
        Ok(SharedBuild {
            store,
            planned,
            _lock: lock,
        })
    }

    /// Everything that decides the bytes.
    pub fn spec(&self) -> &CacheSpec {
        &self.planned.spec
    }

    /// The tasks, and what the planner left for its workers.
    pub fn work(&self) -> &Work {
        &self.planned.work
    }

    /// The basis of a compact cache.
    pub fn basis(&self) -> Option<&Arc<Basis>> {
        self.planned.basis.as_ref()
    }

    /// The bytes that [`CacheWriter::write_task`] was given.
    pub fn read_task(&self, task: usize) -> Result<Vec<u8>> {
        let Some(info) = self.planned.work.tasks.get(task) else {
            return Err(Error::InvalidRequest(format!("there is no task {task}")));
        };
        let source = self.store.open(&info.file, info.bytes, Io::Read)?;
        let bytes = source
            .range(0, info.bytes as usize)
            .map_err(|error| Error::damaged(&info.file, error.to_string()))?;
        if blake3::hash(&bytes).to_hex().as_str() != info.digest {
            return Err(Error::damaged(&info.file, "its digest does not match"));
        }
        Ok(bytes.to_vec())
    }

    /// Those of `tasks` that are not done. A shard that a killed worker left without a receipt, whole, counts and gets one.
    pub fn pending(&self, tasks: impl IntoIterator<Item = usize>) -> Result<Vec<usize>> {
        let mut on_disk: BTreeMap<usize, Vec<String>> = BTreeMap::new();
        for name in self.store.list(SHARDS)? {
            if let Some(number) = shard_number(&name) {
                on_disk.entry(number).or_default().push(name);
            }
        }
        let mut pending = Vec::new();
        for task in tasks {
            let left = on_disk.get(&task).map_or(&[][..], Vec::as_slice);
            if !self.is_done(task)? && !self.adopt(task, left)? {
                pending.push(task);
            }
        }
        Ok(pending)
    }

    /// Whether a task has a receipt.
    pub fn is_done(&self, task: usize) -> Result<bool> {
        Ok(self.planned.receipt(&self.store, task)?.is_some())
    }

    fn adopt(&self, task: usize, names: &[String]) -> Result<bool> {
        for name in names {
            let file = format!("{SHARDS}/{name}");
            let digest = self.store.digest(&file)?;
            if shard::file_name(task, &digest) != file {
                continue;
            }
            if let Some(info) = shard::describe(&self.store, self.spec(), task, &file, digest)? {
                self.deliver(&task_receipt(task), &info)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes a shard and its receipt. False where another worker had delivered other bytes for it, which stay: that
    /// happens between machines of different kinds only.
    ///
    /// # Errors
    /// As [`CacheWriter::write_shard`].
    pub fn write_shard(&self, task: usize, sequences: &[Sequence]) -> Result<bool> {
        let (bytes, info) =
            whole_shard(self.spec(), self.planned.basis.as_deref(), task, sequences)?;
        if !is_whole(&self.store, &info.file, &info.digest)? {
            match self.store.publish(&info.file, &[&bytes]) {
                // Two workers on one share: the name says that the bytes are the same.
                Err(Error::CacheExists { .. }) => {}
                other => other?,
            }
        }
        Ok(self.deliver(&task_receipt(task), &info)? == Delivery::First)
    }

    /// Decodes a row of a shard that has a receipt.
    pub fn read_back(&self, task: usize, row: u32, columns: &Columns) -> Result<Sequence> {
        let Some(info) = self.planned.receipt(&self.store, task)? else {
            let message = format!("shard {task} is not written yet");
            return Err(Error::InvalidRequest(message));
        };
        read_row(
            &self.store,
            self.spec(),
            self.planned.basis.clone(),
            (task, &info, row),
            columns,
        )
    }

    /// The fidelity report, where some worker has measured it.
    pub fn fidelity(&self) -> Result<Option<Fidelity>> {
        self.planned.fidelity(&self.store)
    }

    /// Leaves the fidelity report for the manifest.
    pub fn put_fidelity(&self, fidelity: &Fidelity) -> Result<()> {
        self.deliver(FIDELITY, fidelity).map(|_| ())
    }

    fn deliver<T>(&self, name: &str, done: &T) -> Result<Delivery>
    where
        T: Serialize + for<'de> Deserialize<'de> + PartialEq,
    {
        let receipt = Receipt {
            work: self.planned.digest.clone(),
            done,
        };
        let text = serde_json::to_string_pretty(&receipt)
            .map_err(|error| Error::damaged(name, error.to_string()))?;
        match self.store.publish(&receipt_file(name), &[text.as_bytes()]) {
            Ok(()) => Ok(Delivery::First),
            Err(Error::CacheExists { .. }) => {
                let before: Option<T> = self.planned.read(&self.store, name)?;
                Ok(if before.as_ref() == Some(done) {
                    Delivery::First
                } else {
                    Delivery::Contradicted
                })
            }
            Err(error) => Err(error),
        }
    }
}

/// A plan, read and checked.
#[derive(Debug)]
struct Planned {
    spec: CacheSpec,
    work: Work,
    /// blake3 of the work file: receipts of another plan are no receipts.
    digest: String,
    basis: Option<Arc<Basis>>,
}

impl Planned {
    fn load(store: &Store) -> Result<Planned> {
        let no_work = || Error::NoWork {
            dir: store.root().to_owned(),
        };
        let plan = store.read_small(PLAN, SIZE_LIMIT)?.ok_or_else(no_work)?;
        let damaged = |error: serde_json::Error| Error::damaged(PLAN, error.to_string());
        let mut plan: Value = serde_json::from_slice(&plan).map_err(damaged)?;
        let spec: CacheSpec = serde_json::from_value(plan["spec"].clone()).map_err(damaged)?;
        spec.check()?;
        // The version, above all: another caskd may give other bytes.
        plan["spec"] = plan_value(&spec, "")["spec"].take();
        compare(store, &plan, &current_plan(&spec))?;

        let [file] = work_files(store)?.try_into().map_err(|_| no_work())?;
        let bytes = store.read_small(&file, SIZE_LIMIT)?.ok_or_else(no_work)?;
        let digest = blake3::hash(&bytes).to_hex().to_string();
        if work_file(&digest) != file {
            return Err(Error::damaged(&file, "its digest does not match its name"));
        }
        let work: Work = serde_json::from_slice(&bytes)
            .map_err(|error| Error::damaged(&file, error.to_string()))?;
        if work.tasks.len() != spec.num_shards() {
            return Err(Error::damaged(
                &file,
                "its tasks are not those of plan.json",
            ));
        }
        let basis = match &spec.code {
            Some(code) => {
                let basis = transform::basis::load(store, &code.basis, Io::Read, &spec)?;
                Some(Arc::new(basis))
            }
            None => None,
        };
        Ok(Planned {
            spec,
            work,
            digest,
            basis,
        })
    }

    fn receipt(&self, store: &Store, task: usize) -> Result<Option<ShardInfo>> {
        self.read(store, &task_receipt(task))
    }

    fn fidelity(&self, store: &Store) -> Result<Option<Fidelity>> {
        self.read(store, FIDELITY)
    }

    /// A receipt of this plan; one of another plan is none.
    fn read<T: for<'de> Deserialize<'de>>(&self, store: &Store, name: &str) -> Result<Option<T>> {
        let file = receipt_file(name);
        let Some(bytes) = store.read_small(&file, SIZE_LIMIT)? else {
            return Ok(None);
        };
        let receipt: Receipt<T> = serde_json::from_slice(&bytes)
            .map_err(|error| Error::damaged(&file, error.to_string()))?;
        if receipt.work != self.digest {
            return Err(Error::damaged(&file, "it is a receipt of another plan"));
        }
        Ok(Some(receipt.done))
    }
}

/// Removes what only workers need: the manifest is published, or there is none to come.
pub(super) fn remove(store: &Store) -> Result<()> {
    for file in work_files(store)? {
        store.remove(&file)?;
    }
    store.remove_folder(TASKS)?;
    store.remove_folder(RECEIPTS)
}

fn refuse_others(store: &Store) -> Result<()> {
    match contents(store)? {
        Contents::Unfinished | Contents::Finished => Ok(()),
        Contents::Empty | Contents::Foreign => Err(Error::NoWork {
            dir: store.root().to_owned(),
        }),
    }
}

fn work_files(store: &Store) -> Result<Vec<String>> {
    let names = store.list("")?.into_iter();
    Ok(names.filter(|name| is_work_file(name)).collect())
}

fn is_work_file(name: &str) -> bool {
    let digest = name.strip_prefix("work-");
    digest.is_some_and(|rest| rest.strip_suffix(".json").is_some())
}

fn work_file(digest: &str) -> String {
    format!("work-{}.json", &digest[..16])
}

fn task_receipt(task: usize) -> String {
    format!("{task:05}")
}

fn receipt_file(name: &str) -> String {
    format!("{RECEIPTS}/{name}.json")
}

/// `[1, 2, 3, 7]` → `1-3, 7`.
fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let texts = runs.iter().map(|(first, last)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    });
    texts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_numbers_are_written_short() {
        assert_eq!(ranges(&[1, 2, 3, 7, 9, 10]), "1-3, 7, 9-10");
        assert_eq!(ranges(&[0]), "0");
    }
}
