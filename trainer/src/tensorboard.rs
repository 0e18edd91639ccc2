//! TensorBoard's event files, as far as a run needs them: scalars by step.
//!
//! A file is a row of records: length (u64), its checksum, the event, its checksum; everything
//! little-endian, checksums CRC-32C rotated right by 15 bits plus 0xa282ead8 (TensorFlow,
//! `lib/io/record_writer`). An event is a protocol buffer (`core/util/event.proto`): wall_time = 1
//! double, step = 2 int64, file_version = 3 string, summary = 5, session_log = 7; a summary
//! (`core/framework/summary.proto`) holds values = 1 with tag = 1 string, simple_value = 2 float.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::train::StepReport;
use crate::{Error, Result};

/// An event file that steps are added to.
pub(crate) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `folder`. Steps after `steps_made` that an earlier file there has are forgotten
    /// by TensorBoard: the run makes them again.
    pub(crate) fn create(folder: &Path, steps_made: u64) -> Result<EventFile> {
        let io = |action: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io {
                action,
                path,
                source,
            }
        };
        fs::create_dir_all(folder).map_err(io("create", folder))?;
        // TensorBoard reads the files of a folder in the order of their names.
        let seconds = wall_time();
        let name = format!(
            "events.out.tfevents.{seconds:017.6}.caskd.{}",
            std::process::id()
        );
        let path = folder.join(name);
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .map_err(io("create", &path))?;
        let mut events = EventFile { path, file };
        let mut version = Message::default();
        version.double(1, seconds);
        version.bytes(3, b"brain.Event:2");
        events.write(&version)?;
        if steps_made > 0 {
            let mut log = Message::default();
            log.int(1, 1); // SessionLog.START
            let mut start = Message::default();
            start.double(1, seconds);
            start.int(2, steps_made + 1);
            start.bytes(7, &log.0);
            events.write(&start)?;
        }
        Ok(events)
    }

    /// Adds a step's scalars.
    pub(crate) fn add(&mut self, report: &StepReport) -> Result<()> {
        let mut summary = Message::default();
        let mut scalar = |tag: &str, value: f64| {
            let mut entry = Message::default();
            entry.bytes(1, tag.as_bytes());
            entry.float(2, value as f32);
            summary.bytes(1, &entry.0);
        };
        scalar("loss/total", report.loss);
        for (term, value) in &report.terms {
            scalar(&format!("loss/{term}"), *value);
        }
        scalar("gradient_norm", report.grad_norm);
        scalar("learning_rate", report.learning_rate);
        scalar("epoch", report.epoch as f64);
        scalar("speed/tokens_per_second", report.tokens_per_second);
        scalar("speed/step_seconds", report.seconds);
        scalar("speed/data_wait_seconds", report.data_wait_seconds);
        if let Some(memory) = report.memory_bytes {
            scalar("memory_bytes", memory as f64);
        }
        let mut event = Message::default();
        event.double(1, wall_time());
        event.int(2, report.step);
        event.bytes(5, &summary.0);
        self.write(&event)
    }

    fn write(&mut self, event: &Message) -> Result<()> {
        self.file
            .write_all(&record(&event.0))
            .map_err(|source| Error::Io {
                action: "write",
                path: self.path.clone(),
                source,
            })
    }
}

fn wall_time() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0.0, |now| now.as_secs_f64())
}

/// The record of an event.
fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(event.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_checksum(&length).to_le_bytes());
    record.extend_from_slice(event);
    record.extend_from_slice(&masked_checksum(event).to_le_bytes());
    record
}

fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// A protocol buffer under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn int(&mut self, field: u64, value: u64) {
        self.varint(field << 3);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.varint((field << 3) | 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.varint((field << 3) | 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.varint((field << 3) | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value as u8) | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720's test vector for the checksum, the protocol buffer guide's for integers.
    #[test]
    fn records_and_messages_have_their_form() {
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        let mut message = Message::default();
        message.int(1, 150);
        message.bytes(2, b"testing");
        message.float(3, 1.0);
        let expected = b"\x08\x96\x01\x12\x07testing\x1d\0\0\x80\x3f";
        assert_eq!(message.0, expected);
        let record = record(&message.0);
        assert_eq!(record.len(), 8 + 4 + expected.len() + 4);
        assert_eq!(record[..8], (expected.len() as u64).to_le_bytes());
        assert_eq!(&record[12..12 + expected.len()], expected);
    }
}
