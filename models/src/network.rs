//! A whole network in memory, of any architecture: embedding, blocks, final norm, head; adapters.
//!
//! It is put together from the pieces of [`files`](crate::files), which a layer-by-layer pass uses one at a
//! time: both give the same values.

use tch::{Device, Kind, Tensor};

use crate::attention::{Packed, groups};
use crate::block::{Block, Context, Site};
use crate::config::Config;
use crate::files::Embedding;
use crate::linear::{Adapter, Pass};
use crate::lora::LoraConfig;
use crate::norm::Norm;
use crate::sparsity::Sparsity;
use crate::weights::{RandomWeights, WeightSource};
use crate::{Error, LoadOptions, Result};

/// Called with (layer, place, tensor) during a pass.
pub(crate) type Observer<'a> = &'a mut dyn FnMut(usize, Site, &Tensor);

/// What a forward pass returns.
#[derive(Debug)]
pub struct Forward {
    /// [B, T, D] after the final norm.
    pub last_hidden: Tensor,
    /// The layers asked for, ascending, each [B, T, D].
    pub hidden: Vec<(u32, Tensor)>,
}

/// A network. The base weights are frozen; only attached adapters train.
#[derive(Debug)]
pub struct Network {
    config: Config,
    embedding: Embedding,
    pub(crate) blocks: Vec<Block>,
    norm: Norm,
    head: Tensor,
    lora: Option<LoraConfig>,
    dropout_seed: u64,
    /// The type that passes compute in, where the head is of another.
    compute: Option<Kind>,
    /// Where weights are zero and stay so.
    sparsity: Option<Sparsity>,
}

impl Network {
    /// Loads every part; block i of L goes to device i·P/L of P `devices`, the embedding to the
    /// first of them, final norm and head to the last.
    pub(crate) fn load(
        config: &Config,
        source: &dyn WeightSource,
        kind: Kind,
        devices: &[Device],
        finish: &dyn Fn(&mut Block),
    ) -> Result<Network> {
        let on = |device: Device| LoadOptions { device, kind };
        let (first, last) = match devices {
            [] => (Device::Cpu, Device::Cpu),
            [first, .., last] => (*first, *last),
            [only] => (*only, *only),
        };
        let embedding = Embedding::load(config, source, &on(first))?;
        let layers = config.num_layers();
        let blocks = (0..layers)
            .map(|index| {
                let device = devices.get(index * devices.len() / layers);
                let device = *device.unwrap_or(&first);
                let mut block = Block::load(config, index, source, &on(device))?;
                finish(&mut block);
                Ok(block)
            })
            .collect::<Result<Vec<_>>>()?;
        let norm = config.final_norm(source, &on(last))?;
        let head = if config.tie_word_embeddings() {
            embedding.table.to_device(last)
        } else {
            config.head_rows(0..config.vocab_size(), source, &on(last))?
        };
        Ok(Network {
            config: config.clone(),
            embedding,
            blocks,
            norm,
            head,
            lora: None,
            dropout_seed: 0,
            compute: None,
            sparsity: None,
        })
    }

    /// Random weights (normal, standard deviation 0.02; norms near one) from a seed, for tests and
    /// for measuring.
    ///
    /// # Errors
    /// libtorch cannot allocate them.
    pub fn random(config: impl Into<Config>, seed: u64, options: &LoadOptions) -> Result<Network> {
        let source = RandomWeights { seed };
        let devices = [options.device];
        Network::load(&config.into(), &source, options.kind, &devices, &|_| {})
    }

    /// Runs the network on `input_ids` [B, T] i64, padded on the right: attention is causal, so
    /// padding never reaches a real position. `keep` names the layers to return (0..=L). An
    /// autograd graph is built only for attached adapters, and not inside `tch::no_grad`.
    ///
    /// # Panics
    /// When `input_ids` is not two-dimensional or holds an id outside the vocabulary, or `keep`
    /// names a layer beyond L: callers check both before.
    pub fn forward(&self, input_ids: &Tensor, keep: &[u32], train: bool) -> Forward {
        let pass = if train {
            Pass::Training {
                dropout_seed: self.dropout_seed,
            }
        } else {
            Pass::Inference
        };
        self.forward_observed(input_ids, keep, pass, &mut |_, _, _| {})
    }

    pub(crate) fn forward_observed(
        &self,
        input_ids: &Tensor,
        keep: &[u32],
        pass: Pass,
        observe: Observer<'_>,
    ) -> Forward {
        self.run(input_ids, keep, pass, &mut |_, _| {}, observe)
    }

    /// The whole pass; `enter` sees what enters each block [N, D], and at last the final norm.
    pub(crate) fn run(
        &self,
        input_ids: &Tensor,
        keep: &[u32],
        pass: Pass,
        enter: &mut dyn FnMut(usize, &Tensor),
        observe: Observer<'_>,
    ) -> Forward {
        let &[batch, positions] = input_ids.size().as_slice() else {
            panic!("input_ids must be [B, T], not {:?}", input_ids.size());
        };
        let last = self.blocks.len() as u32;
        assert!(
            keep.iter().all(|&layer| layer <= last),
            "layers {keep:?} of a network with {last}"
        );
        let shape = [batch, positions, self.config.hidden_size() as i64];
        let contexts =
            self.contexts(|options| Context::new(&self.config, (batch, positions), options, pass));
        let mut hidden = Vec::new();
        let x = run_blocks(
            &self.blocks,
            self.embedding.forward(input_ids).to_kind(self.kind()),
            &contexts,
            &mut |index, x| {
                enter(index, x);
                if keep.contains(&(index as u32)) {
                    hidden.push((index as u32, x.view(shape)));
                }
            },
            observe,
        );
        let x = x.to_device(self.device());
        enter(self.blocks.len(), &x);
        let last_hidden = self.norm.forward(&x).view(shape);
        if keep.contains(&last) {
            hidden.push((last, last_hidden.shallow_clone()));
        }
        Forward {
            last_hidden,
            hidden,
        }
    }

    /// Hidden states after the final norm of N tokens that are not one sequence but many, packed side
    /// by side: \[N\] ids → [R, D], the states of the tokens `rows`. `positions` are those within each token's own sequence, and a
    /// token attends to those for which its row of `visible` \[N·N\] holds, so that continuations of one
    /// context can share it. Neighbours that see nothing of the others cost no attention with them, and tokens that are not
    /// asked for cost the last block their keys and values alone. Without a graph and without dropout.
    ///
    /// # Panics
    /// When the three disagree on N, an id is outside the vocabulary, or a row is not below N.
    pub fn forward_packed(
        &self,
        input_ids: &[i64],
        positions: &[f32],
        visible: &[bool],
        rows: &[i64],
    ) -> Tensor {
        let n = input_ids.len() as i64;
        assert!(
            positions.len() as i64 == n && visible.len() as i64 == n * n,
            "{n} tokens, {} positions, {} pairs",
            positions.len(),
            visible.len()
        );
        let mut asked = rows.to_vec();
        asked.sort_unstable();
        asked.dedup();
        let place = |row: &i64| asked.binary_search(row).unwrap_or_default() as i64;
        let order: Vec<i64> = rows.iter().map(place).collect();
        tch::no_grad(|| {
            let groups = groups(visible, input_ids.len());
            let (places, visible) = (Tensor::from_slice(positions), Tensor::from_slice(visible));
            let mut packed = Packed {
                places: &places,
                visible: &visible.view([n, n]),
                queries: None,
                groups: groups.iter().map(|&length| (length, length)).collect(),
            };
            let embedded = self.embedding.forward(&Tensor::from_slice(input_ids));
            let asked_rows = Tensor::from_slice(&asked);
            let order = Tensor::from_slice(&order).to_device(self.device());
            let Some((last, blocks)) = self.blocks.split_last() else {
                let states = embedded.index_select(0, &asked_rows.to_device(embedded.device()));
                return self
                    .norm
                    .forward(&states.to_device(self.device()))
                    .index_select(0, &order);
            };
            let contexts = self.contexts(|options| Context::packed(&self.config, &packed, options));
            let x = run_blocks(
                blocks,
                embedded,
                &contexts,
                &mut |_, _| {},
                &mut |_, _, _| {},
            );
            let mut end = 0;
            packed.groups = groups
                .into_iter()
                .map(|length| {
                    let before = asked.partition_point(|&row| row < end);
                    end += length;
                    let queries = asked.partition_point(|&row| row < end) - before;
                    (queries as i64, length)
                })
                .collect();
            packed.queries = Some(&asked_rows);
            let options = LoadOptions {
                device: last.device(),
                kind: self.kind(),
            };
            let context = Context::packed(&self.config, &packed, &options);
            let x = last.forward(&x.to_device(options.device), &context);
            let states = self.norm.forward(&x.to_device(self.device()));
            states.index_select(0, &order)
        })
    }

    /// The shared part of a pass on every device that holds a block.
    pub(crate) fn contexts(
        &self,
        make: impl Fn(&LoadOptions) -> Context,
    ) -> Vec<(Device, Context)> {
        let mut contexts: Vec<(Device, Context)> = Vec::new();
        for device in self.blocks.iter().map(Block::device) {
            if contexts.iter().all(|(known, _)| *known != device) {
                let kind = self.kind();
                contexts.push((device, make(&LoadOptions { device, kind })));
            }
        }
        contexts
    }

    /// Logits of hidden states after the final norm: [.., D] → [.., V], in the compute type.
    pub fn logits(&self, last_hidden: &Tensor) -> Tensor {
        last_hidden.linear(&self.head.to_kind(last_hidden.kind()), None::<&Tensor>)
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Hugging Face's `model_type`.
    pub fn architecture(&self) -> &'static str {
        self.config.architecture()
    }

    /// V: rows of the LM head.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size()
    }

    /// D.
    pub fn hidden_size(&self) -> usize {
        self.config.hidden_size()
    }

    /// L.
    pub fn num_layers(&self) -> usize {
        self.blocks.len()
    }

    /// LM head [V, D] (the embedding when tied).
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Attaches fresh adapters: A kaiming-uniform from the seed, B zero, both f32 whatever the
    /// compute type.
    ///
    /// # Errors
    /// A rank below one, a dropout outside [0, 1), a target that is no projection of a block,
    /// adapters attached already.
    pub fn attach_lora(&mut self, lora: &LoraConfig, seed: u64) -> Result<()> {
        lora.check()?;
        let lora = lora.resolve(&self.projections())?;
        if self.lora.is_some() {
            return Err(Error::Lora {
                message: "the network has adapters already".to_owned(),
            });
        }
        if self.sparsity.is_some() && lora.dropout > 0.0 {
            return Err(Error::Lora {
                message: "adapters of a masked network have no dropout: they are part of its masked weights"
                    .to_owned(),
            });
        }
        let scale = lora.alpha / lora.rank as f64;
        for (index, block) in self.blocks.iter_mut().enumerate() {
            let device = block.device();
            let block_path = self.config.block_path(index);
            for (path, linear) in block.linears_mut() {
                if lora.targets.iter().any(|name| name == last_part(path)) {
                    let size = linear.weight.size();
                    linear.adapter = Some(Adapter::new(
                        &format!("{block_path}.{path}"),
                        (size[0], size[1]),
                        lora.rank,
                        scale,
                        lora.dropout,
                        seed,
                        device,
                    ));
                }
            }
        }
        self.lora = Some(lora);
        Ok(())
    }

    /// Names of a block's projections, in the order of the forward pass.
    pub(crate) fn projections(&self) -> Vec<&'static str> {
        let linears = self.blocks.first().map(Block::linears).unwrap_or_default();
        linears.iter().map(|(path, _)| last_part(path)).collect()
    }

    /// The attached adapters' configuration, its targets by name.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// Dropout masks of the next `forward(train = true)` are a pure function of this seed: set it
    /// before every training pass (for instance from seed, step and micro-batch).
    pub fn set_dropout_seed(&mut self, seed: u64) {
        self.dropout_seed = seed;
    }

    /// What trains, ordered by name: all weights by Hugging Face's names after [`Network::train_all`], else the
    /// adapter tensors by PEFT name (`base_model.model.….lora_A.weight`). Shallow
    /// clones that require gradients, so an optimizer changes the network through them.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        if self.trains_all() {
            let mut tensors = self.parameters();
            tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
            return tensors;
        }
        let mut tensors = Vec::new();
        for adapter in self
            .blocks
            .iter()
            .flat_map(Block::linears)
            .filter_map(|(_, linear)| linear.adapter.as_ref())
        {
            for (part, tensor) in [("lora_A", &adapter.a), ("lora_B", &adapter.b)] {
                let name = format!("base_model.model.{}.{part}.weight", adapter.name);
                tensors.push((name, tensor.shallow_clone()));
            }
        }
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        tensors
    }

    /// Adds the adapters to the base weights (in f32, then rounded to the compute type) and
    /// removes them.
    pub fn merge_lora(&mut self) {
        for block in &mut self.blocks {
            for (_, linear) in block.linears_mut() {
                linear.merge();
            }
        }
        self.lora = None;
    }

    /// Parameters of the base network, adapters not counted; a tied head counts once.
    pub fn num_parameters(&self) -> u64 {
        self.config.num_parameters()
    }

    /// Base parameters under Hugging Face's names; a tied head is left out, as there.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut tensors = self.embedding.parameters(&self.config);
        for (index, block) in self.blocks.iter().enumerate() {
            tensors.extend(block.parameters(&self.config.block_path(index)));
        }
        tensors.extend(self.norm.parameters(self.config.norm_path()));
        if !self.config.tie_word_embeddings() {
            tensors.push(("lm_head.weight".to_owned(), &self.head));
        }
        tensors
            .into_iter()
            .map(|(name, tensor)| (name, tensor.shallow_clone()))
            .collect()
    }

    /// What a masked network's configuration says.
    pub fn sparsity(&self) -> Option<&Sparsity> {
        self.sparsity.as_ref()
    }

    /// Takes the projections' zeros in the masked layers for their masks.
    pub(crate) fn set_sparsity(&mut self, sparsity: Sparsity) {
        let end = sparsity.end_layer.min(self.blocks.len());
        for block in &mut self.blocks[sparsity.first_layer.min(end)..end] {
            for (_, linear) in block.linears_mut() {
                linear.mask = Some(linear.weight.ne(0));
            }
        }
        self.sparsity = Some(sparsity);
    }

    pub(crate) fn final_norm(&self) -> &Norm {
        &self.norm
    }

    /// The token embedding.
    pub fn embedding(&self) -> &Embedding {
        &self.embedding
    }

    /// A block, adapters included, on the network's own weights: what is put into it changes nothing here.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn block(&self, index: usize) -> Block {
        self.blocks[index].replica()
    }

    pub(crate) fn dropout_seed(&self) -> u64 {
        self.dropout_seed
    }

    pub(crate) fn set_compute(&mut self, kind: Kind) {
        self.compute = Some(kind);
    }

    /// Replaces every tensor; a tied head stays the embedding.
    pub(crate) fn for_each_tensor(&mut self, change: &mut dyn FnMut(&mut Tensor)) {
        self.embedding.for_each_tensor(change);
        for block in &mut self.blocks {
            block.for_each_tensor(change);
        }
        self.norm.for_each_tensor(change);
        if self.config.tie_word_embeddings() {
            self.head = self.embedding.table.to_device(self.head.device());
        } else {
            change(&mut self.head);
        }
    }

    /// Device of final norm and head, where [`forward`](Network::forward) leaves the last hidden
    /// state. Token ids may come from any device.
    pub fn device(&self) -> Device {
        self.head.device()
    }

    /// Compute type of the weights.
    pub fn kind(&self) -> Kind {
        self.compute.unwrap_or_else(|| self.head.kind())
    }

    /// Records which heads of a block were kept.
    pub(crate) fn keep_heads(&mut self, index: usize, kept: &[i64]) {
        self.config.keep_heads(index, kept);
    }

    /// Records new block sizes after the weights were cut.
    pub(crate) fn set_layers(&mut self, layers: Vec<crate::LayerShape>) {
        self.config.set_layers(layers);
    }

    /// A network without adapters on the same base weights. Nothing changes them in place: merging and pruning put
    /// new tensors into the network they are called on.
    #[must_use]
    pub fn share(&self) -> Network {
        Network {
            config: self.config.clone(),
            embedding: self.embedding.share(),
            blocks: self.blocks.iter().map(Block::share).collect(),
            norm: self.norm.share(),
            head: self.head.shallow_clone(),
            lora: None,
            dropout_seed: 0,
            compute: self.compute,
            sparsity: self.sparsity.clone(),
        }
    }

    /// The same network for another thread, adapters included: weights are shared, not copied.
    pub(crate) fn replica(&self) -> Network {
        Network {
            blocks: self.blocks.iter().map(Block::replica).collect(),
            lora: self.lora.clone(),
            dropout_seed: self.dropout_seed,
            ..self.share()
        }
    }
}

/// Runs x [N, D] through blocks, from device to device; `enter` sees what enters each.
fn run_blocks(
    blocks: &[Block],
    mut x: Tensor,
    contexts: &[(Device, Context)],
    enter: &mut dyn FnMut(usize, &Tensor),
    observe: Observer<'_>,
) -> Tensor {
    for (index, block) in blocks.iter().enumerate() {
        enter(index, &x);
        let device = block.device();
        let context = contexts.iter().find(|(known, _)| *known == device);
        let Some((_, context)) = context else {
            unreachable!("every block's device has its context")
        };
        x = block.forward_observed(&x.to_device(device), context, &mut |site, tensor| {
            observe(index, site, tensor);
        });
    }
    x
}

fn last_part(path: &'static str) -> &'static str {
    path.rsplit('.').next().unwrap_or(path)
}
