//! The shard's half of the fuzz targets: it reaches the fields that outsiders cannot.

use std::sync::Arc;
use twox_hash::XxHash3_64;

use super::page::{Layout, OpenPage};
use super::pages::{checksum, parse_offset_index};
use super::read::{Shard, Workspace};
use crate::cache::{Columns, Io};
use crate::frame::Compared;
use crate::fuzz::{Noise, mutate};
use crate::manifest::ShardInfo;
use crate::source::Source;
use crate::spec::CacheSpec;
use crate::store::{Memory, Storage};
use crate::transform::Basis;

/// A sound shard with all that is needed to forge it.
pub(crate) struct Sound {
    spec: Arc<CacheSpec>,
    index: usize,
    info: ShardInfo,
    bytes: Vec<u8>,
    columns: Columns,
    basis: Option<Arc<Basis>>,
}

impl Sound {
    fn shard(&self, bytes: Vec<u8>) -> crate::Result<Shard> {
        Shard::open(
            &self.spec,
            self.index,
            &self.info,
            &Source::Mapped(bytes.into()),
            self.basis.clone(),
        )
    }
}

/// Every shard of the caches.
pub(crate) fn open_shards<T>(caches: &[(T, Memory)]) -> Vec<Sound> {
    let mut shards = Vec::new();
    for (_, memory) in caches {
        let cache = crate::Cache::open_in(Arc::new(memory.clone()), Io::Mmap).unwrap();
        for (index, info) in cache.manifest().shards.iter().enumerate() {
            let source = memory.open(&info.file, Io::Mmap).unwrap().unwrap();
            shards.push(Sound {
                spec: Arc::new(cache.manifest().spec()),
                index,
                info: info.clone(),
                bytes: source.range(0, info.bytes as usize).unwrap().to_vec(),
                columns: Columns::all(cache.manifest()),
                basis: cache.basis().unwrap(),
            });
        }
    }
    shards
}

/// Changes a page, repairs the checksums of its blobs and its own, and reads all rows.
pub(crate) fn forge_page(shards: &[Sound], noise: &mut Noise) -> usize {
    let sound = &shards[noise.below(shards.len())];
    let mut shard = sound.shard(sound.bytes.clone()).unwrap();
    let column = noise.below(shard.footer.columns.len());
    let number = noise.below(shard.footer.columns[column].pages.len());
    let layout = shard.footer.columns[column].layout;
    let page = shard.footer.columns[column].pages[number];
    let start = page.start as usize;
    let mut bytes = sound.bytes[start..start + page.length as usize].to_vec();
    mutate(&mut bytes, noise);
    // A page of another length goes where nothing else lies.
    let start = sound.bytes.len();
    let mut file = sound.bytes.clone();
    file.extend_from_slice(&bytes);
    repair_blobs(&mut file, start, page.first_row, layout, shard.rows);
    let page = &mut shard.footer.columns[column].pages[number];
    page.start = start as u64;
    page.length = bytes.len() as u32;
    page.checksum = checksum(&file[start..]);
    let given = file.len();
    shard.source = Source::Mapped(file.into());
    let mut workspace = Workspace::new(Compared::Nothing).unwrap();
    let _ = shard.keys(&mut workspace);
    let rows: Vec<u32> = (0..shard.rows).collect();
    let mut sequences = Vec::new();
    if shard
        .read(&mut workspace, &rows, &sound.columns, &mut sequences)
        .is_ok()
    {
        assert_eq!(sequences.len(), rows.len());
    }
    given
}

/// Where the page can be parsed, its blobs get right checksums, so that their content reaches the codecs.
fn repair_blobs(file: &mut [u8], start: usize, first_row: u32, layout: Layout, rows: u32) {
    if layout.is_compressed {
        return;
    }
    let page = super::pages::Page {
        start: start as u64,
        length: (file.len() - start) as u32,
        checksum: checksum(&file[start..]),
        first_row,
    };
    let mut workspace = Workspace::new(Compared::Nothing).unwrap();
    let (mut open, source) = (OpenPage::default(), Source::Mapped(file.to_vec().into()));
    let decompressor = workspace.decompressor();
    // Pages of bulk columns hold one row.
    if rows > first_row && open.load(&source, &page, 1, layout, decompressor).is_ok() {
        let base = source.range(0, 0).unwrap().as_ptr() as usize;
        let places: Vec<(usize, usize)> = open
            .blobs(&source, first_row)
            .map(|blob| (blob.as_ptr() as usize - base, blob.len()))
            .collect();
        for (at, length) in places {
            if length >= 8 {
                let sum = XxHash3_64::oneshot(&file[at + 8..at + length]);
                file[at..at + 8].copy_from_slice(&sum.to_le_bytes());
            }
        }
    }
}

/// Changes the tail of a file, repairs its checksum, opens it, and reads what opens.
pub(crate) fn forge_footer(shards: &[Sound], noise: &mut Noise) -> usize {
    let sound = &shards[noise.below(shards.len())];
    let start = sound.bytes.len() - sound.info.footer.bytes as usize;
    let mut tail = sound.bytes[start..].to_vec();
    // The footer's length at the end is kept right in most cases: else nothing behind it is ever parsed.
    let is_whole = noise.below(4) > 0;
    let footer = tail.len() - 8;
    let length = u32::from_le_bytes(tail[footer..footer + 4].try_into().unwrap()) as usize;
    if is_whole {
        let mut front = tail[..footer].to_vec();
        let before = front.len();
        mutate(&mut front, noise);
        let length = (length + front.len()).saturating_sub(before);
        tail = front;
        tail.extend_from_slice(&(length as u32).to_le_bytes());
        tail.extend_from_slice(b"PAR1");
    } else {
        mutate(&mut tail, noise);
    }
    let mut file = sound.bytes[..start].to_vec();
    file.extend_from_slice(&tail);
    let mut info = sound.info.clone();
    info.bytes = file.len() as u64;
    info.footer.bytes = tail.len() as u64;
    info.footer.checksum = format!("{:016x}", XxHash3_64::oneshot(&tail));
    let given = file.len();
    let source = Source::Mapped(file.into());
    if let Ok(shard) = Shard::open(
        &sound.spec,
        sound.index,
        &info,
        &source,
        sound.basis.clone(),
    ) {
        let mut workspace = Workspace::new(Compared::Nothing).unwrap();
        let _ = shard.keys(&mut workspace);
        let rows: Vec<u32> = (0..shard.rows).collect();
        let _ = shard.read(&mut workspace, &rows, &sound.columns, &mut Vec::new());
    }
    given
}

/// Changes a column's offset index.
pub(crate) fn forge_index(shards: &[Sound], noise: &mut Noise) -> usize {
    let sound = &shards[noise.below(shards.len())];
    let shard = sound.shard(sound.bytes.clone()).unwrap();
    let column = &shard.footer.columns[noise.below(shard.footer.columns.len())];
    // One location: a field header and a varint each.
    let mut index = vec![0x19, ((column.pages.len().min(14) as u8) << 4) | 0x0C];
    for page in column.pages.iter().take(14) {
        let varint = |mut value: u64| {
            let mut bytes = Vec::new();
            value <<= 1;
            while value > 0x7F {
                bytes.push(value as u8 | 0x80);
                value >>= 7;
            }
            bytes.push(value as u8);
            bytes
        };
        index.push(0x16);
        index.extend(varint(page.start));
        index.push(0x15);
        index.extend(varint(u64::from(page.length)));
        index.push(0x16);
        index.extend(varint(u64::from(page.first_row)));
        index.push(0);
    }
    index.push(0);
    mutate(&mut index, noise);
    let first = column.pages[0].start;
    let end = first + column.bytes;
    if let Some(pages) = parse_offset_index(&index, first..end, shard.rows) {
        assert!(pages.len() <= shard.rows as usize && pages[0].first_row == 0);
    }
    index.len()
}
