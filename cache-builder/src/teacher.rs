//! The teacher of a build: whole in memory, or read layer by layer for every block of positions.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use caskd_models::{LoadOptions, LoadedModel, ModelFiles, Network, WideHead};
use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::footprint::Footprint;
use crate::layers::{Event, LayerPass, LayerTimes};

/// Where and how a teacher computes. None of it changes a value, but for the kind of device.
#[derive(Debug, Clone)]
pub struct Placement {
    /// Devices that the layers are spread over, in their order.
    pub devices: Vec<Device>,
    /// Bytes that the build may take; the weights are read layer by layer where they do not fit. `None`: they fit.
    pub memory_budget: Option<u64>,
    /// Where activations wait between layers; in memory where there is none.
    pub spill: Option<PathBuf>,
}

/// A teacher ready to compute.
pub(crate) struct Teacher {
    files: ModelFiles,
    options: LoadOptions,
    /// Where it is whole in memory.
    whole: Option<LoadedModel>,
    spill: Option<PathBuf>,
    /// Positions that go through a layer while its weights are in memory; 0 where all are.
    pub(crate) block_positions: usize,
    /// Whether the head is kept in f32, or converted whenever it is used.
    wide_head: bool,
    pub(crate) digest: String,
}

/// The LM head [V, D], products with which come out in f32.
pub(crate) enum StatisticsHead {
    Packed(WideHead),
    Plain(Tensor),
}

impl Teacher {
    /// Loads what of the teacher the budget allows.
    pub(crate) fn load(
        (files, digest): (ModelFiles, String),
        path: &Path,
        kind: Kind,
        placement: &Placement,
        footprint: &Footprint,
    ) -> Result<Teacher> {
        let plan = footprint.plan(placement)?;
        if !plan.layered {
            return Teacher::whole(path, kind, &placement.devices);
        }
        Ok(Teacher {
            options: LoadOptions {
                device: placement.devices.first().copied().unwrap_or(Device::Cpu),
                kind,
            },
            digest,
            files,
            whole: None,
            spill: placement.spill.clone(),
            block_positions: plan.block_positions,
            wide_head: plan.wide_head,
        })
    }

    /// Loads all of a teacher.
    pub(crate) fn whole(path: &Path, kind: Kind, devices: &[Device]) -> Result<Teacher> {
        let files = ModelFiles::open(path)?;
        let model = ModelFiles::open(path)?.load(kind, devices)?;
        Ok(Teacher {
            files,
            options: LoadOptions {
                device: model.network.device(),
                kind,
            },
            spill: None,
            block_positions: 0,
            wide_head: true,
            digest: model.digest.clone(),
            whole: Some(model),
        })
    }

    pub(crate) fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// Device and type that it computes on and in; of several devices the last.
    pub(crate) fn options(&self) -> LoadOptions {
        self.options
    }

    /// The network, where it is whole in memory.
    pub(crate) fn network(&self) -> Option<&Network> {
        self.whole.as_ref().map(|model| &model.network)
    }

    pub(crate) fn is_layered(&self) -> bool {
        self.whole.is_none()
    }

    /// LM head [V, D] in the compute type, on the device of the last layer.
    pub(crate) fn head(&self) -> Result<Tensor> {
        if let Some(model) = &self.whole {
            return Ok(model.network.head().detach());
        }
        let rows = 0..self.files.config().vocab_size();
        Ok(self.files.load_head(rows, &self.options)?)
    }

    /// The head as statistics are computed with it: packed where the processor multiplies bf16, else in f32 where that
    /// fits.
    pub(crate) fn head_for_statistics(&self) -> Result<StatisticsHead> {
        let head = self.head()?;
        if let Some(packed) = WideHead::packed(&head) {
            return Ok(StatisticsHead::Packed(packed));
        }
        Ok(StatisticsHead::Plain(if self.wide_head {
            head.to_kind(Kind::Float).contiguous()
        } else {
            head.contiguous()
        }))
    }

    /// Runs batches [B, T] of ids through the network; `keep` names the hidden layers to return.
    pub(crate) fn run(
        &self,
        batches: &[Tensor],
        keep: &[u32],
        stop: &AtomicBool,
        on_event: &mut dyn FnMut(Event) -> Result<()>,
    ) -> Result<LayerTimes> {
        let Some(model) = &self.whole else {
            return LayerPass {
                files: &self.files,
                options: self.options,
                keep,
                spill: self.spill.as_deref(),
                stop,
            }
            .run(batches, on_event);
        };
        for (index, ids) in batches.iter().enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Ok(LayerTimes::default());
            }
            let ids = ids.to_device(model.network.device());
            on_event(Event::Done(index, model.network.forward(&ids, keep, false)))?;
        }
        Ok(LayerTimes {
            completed: true,
            waiting_seconds: 0.0,
        })
    }
}
