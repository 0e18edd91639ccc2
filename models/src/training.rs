//! What of a network trains, and passes that keep little: all weights as f32 leaves, a frozen base in 8 bits, and
//! training passes that run each block again on the way back.

use tch::{Kind, Tensor};

use crate::block::{Block, Context};
use crate::linear::Pass;
use crate::network::Forward;
use crate::{Error, Network, Result};

/// The way back through a pass of [`Network::forward_taped`]: what entered each block, without a graph.
#[derive(Debug)]
pub struct Tape {
    inputs: Vec<Tensor>,
    /// What entered the final norm.
    output: Tensor,
    shape: [i64; 3],
    dropout_seed: u64,
}

impl Network {
    /// Makes every weight a leaf in f32 that trains, copies of the loaded ones; passes go on computing in the type
    /// that the network was loaded in. A tied head stays tied.
    ///
    /// # Errors
    /// Adapters are attached, or the weights are in 8 bits.
    pub fn train_all(&mut self) -> Result<()> {
        if self.lora().is_some() || self.is_quantized() {
            return Err(Error::Training {
                message: "all weights train only without adapters, and not in 8 bits".to_owned(),
            });
        }
        let compute = self.kind();
        self.for_each_tensor(&mut |tensor| {
            *tensor = tensor
                .detach()
                .to_kind(Kind::Float)
                .copy()
                .set_requires_grad(true);
        });
        self.set_compute(compute);
        Ok(())
    }

    /// Ends [`Network::train_all`]: the trained weights, frozen, in f32.
    pub fn freeze(&mut self) {
        self.for_each_tensor(&mut |tensor| *tensor = tensor.detach());
        self.set_compute(Kind::Float);
    }

    /// Whether all weights train.
    pub fn trains_all(&self) -> bool {
        self.head().requires_grad()
    }

    /// Puts the projections of all blocks into 8 bits, with a scale for each output: w ≈ q · s, s = max|w| of the
    /// output's weights over 127, q rounded to nearest. Embedding, norms, biases and head stay as they are. The error of
    /// a weight is s/2 at most.
    ///
    /// # Errors
    /// Adapters are attached, the network is masked or in 8 bits already.
    pub fn quantize(&mut self) -> Result<()> {
        if self.sparsity().is_some() {
            return Err(masked_in_8_bits());
        }
        if self.lora().is_some() || self.is_quantized() {
            return Err(Error::Training {
                message: "a base goes into 8 bits once, and before adapters are attached"
                    .to_owned(),
            });
        }
        self.blocks.iter_mut().for_each(Block::quantize);
        Ok(())
    }

    /// Ends [`Network::quantize`]: the rounded weights in the type that passes compute in.
    pub fn unpack(&mut self) {
        let kind = self.kind();
        for block in &mut self.blocks {
            for (_, linear) in block.linears_mut() {
                linear.unpack(kind);
            }
        }
    }

    /// Whether the projections are in 8 bits.
    pub fn is_quantized(&self) -> bool {
        self.blocks.first().is_some_and(|block| {
            block
                .linears()
                .iter()
                .any(|(_, linear)| linear.scale.is_some())
        })
    }

    /// [`Network::forward`] in training, without a graph: [`Network::backward`] makes the graph of one block at a time.
    /// A pass and its way back cost one more pass than with a graph, and keep one activation a block.
    ///
    /// # Panics
    /// As [`Network::forward`].
    pub fn forward_taped(&self, input_ids: &Tensor, keep: &[u32]) -> (Forward, Tape) {
        let dropout_seed = self.dropout_seed();
        let mut inputs = Vec::new();
        let mut output = None;
        let forward = tch::no_grad(|| {
            self.run(
                input_ids,
                keep,
                Pass::Training { dropout_seed },
                &mut |index, x| {
                    if index < self.num_layers() {
                        inputs.push(x.shallow_clone());
                    } else {
                        output = Some(x.shallow_clone());
                    }
                },
                &mut |_, _, _| {},
            )
        });
        let size = forward.last_hidden.size();
        let tape = Tape {
            inputs,
            output: output.unwrap_or_else(|| forward.last_hidden.shallow_clone()),
            shape: [size[0], size[1], size[2]],
            dropout_seed,
        };
        (forward, tape)
    }

    /// Adds to every adapter's gradient what the gradients of hidden layers [B, T, D] give: `gradients` by layer, L
    /// being the last hidden state after the final norm.
    pub fn backward(&self, tape: &Tape, gradients: &[(u32, Tensor)]) {
        let [batch, positions, width] = tape.shape;
        let of_layer = |layer: usize| {
            gradients
                .iter()
                .filter(|(of, _)| *of as usize == layer)
                .map(|(_, gradient)| gradient.reshape([batch * positions, width]))
                .reduce(|sum, next| sum + next)
        };
        let layers = self.num_layers();
        let contexts = self.contexts(|options| {
            let pass = Pass::Training {
                dropout_seed: tape.dropout_seed,
            };
            Context::new(self.config(), (batch, positions), options, pass)
        });
        // Through the final norm.
        let mut gradient = of_layer(layers)
            .map(|gradient| back(&tape.output, &gradient, &|x| self.final_norm().forward(x)));
        for (index, block) in self.blocks.iter().enumerate().rev() {
            let Some((_, context)) = contexts.iter().find(|(of, _)| *of == block.device()) else {
                unreachable!("every block's device has its context")
            };
            if let Some(of_output) = gradient {
                let input = tape.inputs[index].to_device(block.device());
                let of_output = of_output.to_device(block.device());
                gradient = Some(back(&input, &of_output, &|x| block.forward(x, context)));
            }
            // Layer 0 is the embedding, which does not train.
            if index > 0
                && let Some(added) = of_layer(index)
            {
                let added = added.to_device(block.device());
                gradient = Some(match gradient {
                    Some(gradient) => gradient + added.to_kind(self.kind()),
                    None => added.to_kind(self.kind()),
                });
            }
        }
    }
}

impl Block {
    pub(crate) fn quantize(&mut self) {
        tch::no_grad(|| {
            for (_, linear) in self.linears_mut() {
                linear.quantize();
            }
        });
    }
}

/// A mask is where the stored weight is zero, and 8 bits round others to zero too.
pub(crate) fn masked_in_8_bits() -> Error {
    Error::Training {
        message: "a masked base does not go into 8 bits".to_owned(),
    }
}

/// The gradient at an input from that at the output; leaves inside get theirs added.
fn back(input: &Tensor, of_output: &Tensor, forward: &dyn Fn(&Tensor) -> Tensor) -> Tensor {
    let input = input.detach().set_requires_grad(true);
    let output = forward(&input);
    // Its gradient with respect to the output is the one that is known.
    (output * of_output).sum(Kind::Float).backward();
    input.grad()
}
