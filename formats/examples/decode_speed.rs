//! Decoding a cache, measured: the Rust half of `runs/bench_cache.py`.
//!
//!     decode_speed make FOLDER POSITIONS     writes a cache: tier sparse, K = 64, one f16 layer of width 576
//!     decode_speed serve FOLDER              answers commands on stdin, a JSON line each
//!
//! Commands: `scan` (every row, every column), `native` (tokens and statistics only), `copy` (a plain copy of as many
//! bytes as `scan` hands out), `subset` (5% of the rows, drawn at random), `threads` (two threads that share the rows),
//! `one-thread` (the same by one thread that is as new), `rows` (the small columns of every row). What the machine itself
//! allows: `copy-threads` (the copy by two threads, half of it each), `count` and `count-threads` (additions that touch no
//! memory, by one thread and by two). `seconds` is CPU time of the threads that work, `wall` is wall time, `anonymous` the
//! process's private memory in bytes.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measuring program that may stop at the first surprise"
)]

use std::io::BufRead;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use caskd_formats::{
    Cache, CacheSpec, CacheWriter, Columns, DataInfo, HiddenCodec, HiddenState, Io, LayerSpec,
    Sequence, Statistics, TeacherInfo, Tier, TokenizerInfo, TopK,
};
use serde_json::{Value, json};

const TOP_K: usize = 64;
const VOCABULARY: usize = 49_152;
const WIDTH: usize = 576;
const ROWS_PER_SHARD: usize = 256;

/// A command is repeated until so much time has gone by.
const LEAST_SECONDS: f64 = 0.4;

/// Passes over the data where threads are compared: a new thread begins beside its parent, and many milliseconds may go by before the
/// scheduler gives it a core of its own.
const PASSES: usize = 32;

/// Rows of one read, as a batch of the trainer.
const ROWS_PER_READ: usize = 16;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        ["make", folder, positions] => make(Path::new(folder), positions.parse().unwrap()),
        ["serve", folder] => serve(Path::new(folder)),
        _ => {
            eprintln!("decode_speed make FOLDER POSITIONS | decode_speed serve FOLDER");
            std::process::exit(2);
        }
    }
}

fn serve(folder: &Path) {
    let cache = Cache::open(folder, Io::Mmap).unwrap();
    let mut buffers = Buffers::default();
    for command in std::io::stdin().lock().lines() {
        let command = command.unwrap();
        // Again and again for a while: the scheduler's account is a few milliseconds coarse.
        let (started, cpu) = (Instant::now(), thread_seconds());
        let (mut repeats, mut own) = (0.0, (0.0, 0.0));
        let mut answer = loop {
            let answer = answer(&cache, &command, &mut buffers);
            repeats += 1.0;
            let number = |name: &str| answer[name].as_f64().unwrap_or_default();
            own = (own.0 + number("seconds"), own.1 + number("wall"));
            if started.elapsed().as_secs_f64() > LEAST_SECONDS {
                break answer;
            }
        };
        let fields = answer.as_object_mut().unwrap();
        let (seconds, wall) = if fields.contains_key("seconds") {
            own
        } else {
            (thread_seconds() - cpu, started.elapsed().as_secs_f64())
        };
        fields.insert("seconds".to_owned(), json!(seconds / repeats));
        fields.insert("wall".to_owned(), json!(wall / repeats));
        fields.insert("anonymous".to_owned(), json!(anonymous_bytes()));
        println!("{answer}");
    }
}

/// What the commands decode into, again and again: of one thread, or of the first and the second.
#[derive(Default)]
struct Buffers {
    out: [Vec<Sequence>; 2],
}

/// One command; those that measure themselves say `seconds` and `wall`.
fn answer(cache: &Cache, command: &str, buffers: &mut Buffers) -> Value {
    let native = Columns {
        statistics: true,
        ..Columns::default()
    };
    let out = &mut buffers.out[0];
    match command {
        "scan" => scan(cache, &all(cache), out).as_json(),
        "native" => scan(cache, &native, out).as_json(),
        "subset" => subset(cache, out).as_json(),
        "copy" => copy(cache, 1, out),
        "copy-threads" => copy(cache, 2, out),
        "count" => by_threads(&mut [()], |_, ()| count(1)),
        "count-threads" => by_threads(&mut [(), ()], |_, ()| count(2)),
        "one-thread" => shared_scan(cache, &mut buffers.out[..1]),
        "threads" => shared_scan(cache, &mut buffers.out),
        "rows" => json!({ "rows": cache.rows().unwrap().len() }),
        other => json!({ "error": format!("no command {other}") }),
    }
}

fn all(cache: &Cache) -> Columns {
    Columns::all(cache.manifest())
}

/// What was handed out.
#[derive(Clone, Copy, Default)]
struct Counted {
    positions: usize,
    bytes: usize,
}

impl Counted {
    fn add(&mut self, sequences: &[Sequence]) {
        for sequence in sequences {
            let positions = sequence.token_ids.len();
            self.positions += positions;
            self.bytes += positions * (4 + 1);
            if sequence.statistics.is_some() {
                self.bytes += positions * 5 * 4;
            }
            if let Some(top_k) = &sequence.top_k {
                self.bytes += (top_k.ids.len() + top_k.logits.len()) * 4;
            }
            for state in &sequence.hidden {
                self.bytes += state.values.len() * 4;
            }
        }
    }

    fn as_json(self) -> Value {
        json!({ "positions": self.positions, "bytes": self.bytes })
    }
}

/// Every row, as the reads of a trainer: shard and rows.
fn reads(cache: &Cache) -> Vec<(u32, Vec<u32>)> {
    let shards = cache.manifest().shards.iter().enumerate();
    shards
        .flat_map(|(shard, info)| {
            let rows: Vec<u32> = (0..info.sequences as u32).collect();
            let reads = rows.chunks(ROWS_PER_READ).map(<[u32]>::to_vec);
            reads.map(|rows| (shard as u32, rows)).collect::<Vec<_>>()
        })
        .collect()
}

fn scan(cache: &Cache, columns: &Columns, out: &mut Vec<Sequence>) -> Counted {
    let mut counted = Counted::default();
    for (shard, rows) in reads(cache) {
        cache.read_into(shard, &rows, columns, out).unwrap();
        counted.add(out);
    }
    counted
}

/// Every row [`PASSES`] times, by a thread for each of `buffers`; each takes the next read when it is done with one.
fn shared_scan(cache: &Cache, buffers: &mut [Vec<Sequence>]) -> Value {
    let (reads, columns, next) = (reads(cache), all(cache), AtomicUsize::new(0));
    by_threads(buffers, |_, out| {
        let mut counted = Counted::default();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= reads.len() * PASSES {
                return counted;
            }
            let (shard, rows) = &reads[number % reads.len()];
            cache.read_into(*shard, rows, &columns, out).unwrap();
            counted.add(out);
        }
    })
}

/// Every twentieth row on average, other rows in every shard.
fn subset(cache: &Cache, out: &mut Vec<Sequence>) -> Counted {
    let mut noise = Noise(20);
    let mut counted = Counted::default();
    for (shard, info) in cache.manifest().shards.iter().enumerate() {
        let rows: Vec<u32> = (0..info.sequences as u32)
            .filter(|_| noise.below(20) == 0)
            .collect();
        for rows in rows.chunks(ROWS_PER_READ) {
            cache
                .read_into(shard as u32, rows, &all(cache), out)
                .unwrap();
            counted.add(out);
        }
    }
    counted
}

/// Copies as many bytes as a scan hands out, in pieces of one read, between buffers that are as warm as a reader's, by so
/// many threads.
fn copy(cache: &Cache, threads: usize, out: &mut Vec<Sequence>) -> Value {
    let rows: Vec<u32> = (0..ROWS_PER_READ as u32).collect();
    cache.read_into(0, &rows, &all(cache), out).unwrap();
    let mut piece = Counted::default();
    piece.add(out);
    let positions = cache.manifest().data.positions as usize;
    let share = positions * (piece.bytes / piece.positions) / threads;
    // The source is as large as the cache's files (they come from memory, not from the processor's cache).
    let source_bytes = cache
        .manifest()
        .shards
        .iter()
        .map(|info| info.bytes as usize)
        .sum::<usize>();
    // Both go when it is done: the next measurement is of private memory.
    let source = vec![1_u8; source_bytes.max(piece.bytes)];
    let mut pieces = vec![vec![1_u8; piece.bytes]; threads];
    by_threads(&mut pieces, |part, target| {
        let (mut copied, mut at) = (0, part * (source.len() / threads));
        while copied < share * PASSES {
            let length = piece.bytes.min(share * PASSES - copied);
            if at + length > source.len() {
                at = 0;
            }
            target[..length].copy_from_slice(&source[at..at + length]);
            std::hint::black_box(&mut *target);
            copied += length;
            at += length;
        }
        Counted {
            bytes: copied,
            ..Counted::default()
        }
    })
}

/// Multiplications in registers, as many as keep one core busy for a while; this thread's share of them.
fn count(threads: usize) -> Counted {
    const ROUNDS: usize = 200 * PASSES;
    // Eight at a time: one chain would leave most of the core to a neighbour that shares it.
    let mut sums: [u64; 8] = std::array::from_fn(|lane| lane as u64);
    for _ in 0..ROUNDS / threads {
        for _ in 0..10_000 {
            for sum in &mut sums {
                *sum = sum.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
            }
        }
        std::hint::black_box(&mut sums);
    }
    Counted::default()
}

/// [`PASSES`] passes of work by one thread for each of `own`, which is its memory; what is counted and measured is of one
/// pass.
fn by_threads<T: Send>(own: &mut [T], work: impl Fn(usize, &mut T) -> Counted + Sync) -> Value {
    let started = Instant::now();
    let results: Vec<(Counted, f64)> = std::thread::scope(|scope| {
        let workers: Vec<_> = own
            .iter_mut()
            .enumerate()
            .map(|(part, own)| {
                let work = &work;
                scope.spawn(move || {
                    let cpu = thread_seconds();
                    let counted = work(part, own);
                    (counted, (thread_seconds() - cpu) / PASSES as f64)
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .collect()
    });
    let sum = |of: &dyn Fn(&Counted) -> usize| -> usize {
        results
            .iter()
            .map(|(counted, _)| of(counted))
            .sum::<usize>()
            / PASSES
    };
    let counted = Counted {
        positions: sum(&|counted| counted.positions),
        bytes: sum(&|counted| counted.bytes),
    };
    let seconds: f64 = results.iter().map(|result| result.1).sum();
    let mut answer = counted.as_json();
    answer["seconds"] = json!(seconds);
    answer["wall"] = json!(started.elapsed().as_secs_f64() / PASSES as f64);
    answer
}

/// CPU seconds of the calling thread, to a nanosecond: from the scheduler, because a busy machine's clock says little.
fn thread_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = text
        .split(' ')
        .next()
        .and_then(|first| first.parse::<f64>().ok());
    nanoseconds.unwrap_or_default() / 1e9
}

fn anonymous_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("RssAnon"));
    let kibibytes = line
        .and_then(|line| line.split_whitespace().nth(1))
        .and_then(|number| number.parse::<u64>().ok());
    kibibytes.unwrap_or_default() * 1024
}

/// SplitMix64.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in 0..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 24) as f32
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Nearly normal: four uniform 16-bit numbers.
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|part| bits >> (16 * part) & 0xFFFF).sum();
        (sum as f32 / 65_536.0 - 2.0) * 1.732
    }
}

/// Values like a language model's: logits that fall fast and then slowly, frequent tokens with small numbers, channels of
/// different size.
fn make(folder: &Path, positions: usize) {
    let mut noise = Noise(1);
    let mut lengths = Vec::new();
    let mut left = positions;
    while left > 0 {
        let length = (40 + noise.below(130)).min(left);
        lengths.push(length);
        left -= length;
    }
    let targets = lengths.iter().map(|length| *length as u64 / 2).sum();
    let spec = spec(lengths.len() as u64, positions as u64, targets);
    let scales: Vec<f32> = (0..WIDTH).map(|_| (noise.normal() * 0.5).exp()).collect();
    let mut writer = CacheWriter::open(folder, &spec, false).unwrap();
    for (shard, lengths) in lengths.chunks(ROWS_PER_SHARD).enumerate() {
        let sequences: Vec<Sequence> = lengths
            .iter()
            .map(|length| sequence(*length, &scales, &mut noise))
            .collect();
        writer.write_shard(shard, &sequences).unwrap();
    }
    writer.finish().unwrap();
}

fn sequence(positions: usize, scales: &[f32], noise: &mut Noise) -> Sequence {
    let mut statistics = Statistics::default();
    let mut top_k = TopK {
        k: TOP_K,
        ..TopK::default()
    };
    for _ in 0..positions {
        let mut logit = 15.0 + 3.0 * noise.normal();
        statistics.max.push(logit);
        statistics.mean.push(noise.normal());
        statistics.std.push(2.0 + 0.3 * noise.normal());
        statistics.min.push(-12.0 + noise.normal());
        statistics.log_sum_exp.push(logit + 1.5 * noise.unit());
        let first = top_k.ids.len();
        while top_k.ids.len() < first + TOP_K {
            let id = (VOCABULARY as f32).powf(noise.unit()) as u32 - 1;
            if !top_k.ids[first..].contains(&id) {
                top_k.ids.push(id);
                top_k.logits.push(logit);
                let rank = (top_k.ids.len() - first) as f32;
                logit -= 1e-4 - noise.unit().max(1e-6).ln() * 2.0 / (1.0 + rank);
            }
        }
    }
    let hidden = HiddenState {
        layer: 15,
        width: WIDTH,
        values: (0..positions)
            .flat_map(|_| scales)
            .map(|scale| scale * noise.normal())
            .collect(),
    };
    Sequence {
        source: format!("made.jsonl:{}", noise.below(100_000)),
        token_ids: (0..positions)
            .map(|_| (VOCABULARY as f32).powf(noise.unit()) as u32 - 1)
            .collect(),
        loss_mask: (0..positions)
            .map(|position| position > positions / 2)
            .collect(),
        statistics: Some(statistics),
        top_k: Some(top_k),
        hidden: vec![hidden],
        coefficients: None,
    }
}

fn spec(sequences: u64, positions: u64, targets: u64) -> CacheSpec {
    CacheSpec {
        origin: None,
        tier: Tier::Sparse,
        top_k: TOP_K,
        vocab_size: VOCABULARY,
        layers: vec![LayerSpec {
            layer: 15,
            width: WIDTH,
            codec: HiddenCodec::F16,
        }],
        code: None,
        sequences_per_shard: ROWS_PER_SHARD,
        max_len: 1024,
        teacher: TeacherInfo {
            name: "made up".to_owned(),
            architecture: "llama".to_owned(),
            digest: "00".repeat(32),
            compute_dtype: "f32".to_owned(),
            num_layers: 30,
            hidden_size: WIDTH,
            num_parameters: 0,
        },
        tokenizer: TokenizerInfo {
            fingerprint: "00".repeat(32),
            vocab_size: VOCABULARY,
        },
        data: DataInfo {
            digest: "00".repeat(32),
            files: Vec::new(),
            sequences,
            positions,
            targets,
            truncated: 0,
            skipped: 0,
            prompt_form: "none".to_owned(),
            ..DataInfo::default()
        },
    }
}
