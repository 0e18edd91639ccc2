//! One forward and backward pass: the trunk by autograd, the head fused, hidden states aligned.

use tch::{Kind, Tensor};

use caskd_models::Network;

use crate::batch::Batch;
use crate::head::{Heads, ScaledLoss, fused_head, rows_per_chunk};
use crate::losses::{HiddenPositions, MissingLogits};
use crate::objective::{Objective, StepSize, Work};
use crate::teacher_logits::LinearCode;

/// Which term left the finite numbers, and where.
#[derive(Debug)]
pub(crate) struct NotFiniteTerm {
    /// Name of the term.
    pub(crate) term: String,
    /// The sequence, or all of the batch where it cannot be told.
    pub(crate) sources: String,
}

/// What one batch adds to a step.
#[derive(Debug)]
pub(crate) struct Shares {
    /// Each term's share of its (unweighted) value over the step.
    pub(crate) values: Vec<f64>,
    /// Teacher logits that were looked up, and not found.
    pub(crate) missing: MissingLogits,
}

/// Adds the gradient of one batch's share of the step to the student's trainable tensors.
pub(crate) fn forward_backward(
    student: &Network,
    objective: &Objective,
    teacher: Option<&LinearCode>,
    batch: &Batch,
    step: &StepSize,
    recompute: bool,
) -> Result<Shares, NotFiniteTerm> {
    let keep = objective.student_layers();
    // A base in 8 bits would be unpacked whole into a graph: its pass goes back block by block.
    let (forward, tape) = if recompute || student.is_quantized() {
        let (forward, tape) = student.forward_taped(&batch.input_ids, &keep);
        (forward, Some(tape))
    } else {
        (student.forward(&batch.input_ids, &keep, true), None)
    };
    let width = *forward.last_hidden.size().last().unwrap_or(&0);
    let vocabulary = objective.vocabulary as i64;
    let mut shares = vec![0.0; objective.terms.len()];
    let mut missing = MissingLogits::default();
    // What the backward pass of the trunk starts from: values with a graph, or gradients of hidden layers.
    let mut roots: Vec<Tensor> = Vec::new();
    let mut seeds: Vec<(u32, Tensor)> = Vec::new();

    let (of_logits, losses): (Vec<usize>, Vec<ScaledLoss<'_>>) = objective
        .terms
        .iter()
        .enumerate()
        .filter_map(|(index, term)| match &term.work {
            Work::Logits {
                loss, logits_norm, ..
            } => Some((
                index,
                ScaledLoss {
                    loss: loss.loss(),
                    norm: *logits_norm,
                    scale: term.weight / term.denominator(step),
                },
            )),
            Work::Hidden { .. } => None,
        })
        .unzip();
    if !losses.is_empty() && batch.num_targets() > 0 {
        let rows = forward
            .last_hidden
            .detach()
            .view([-1, width])
            .index_select(0, &batch.targets);
        let head = student.head().narrow(0, 0, vocabulary);
        let heads = Heads {
            student: &head.detach().to_kind(student.kind()),
            teacher,
            trains: student.trains_all(),
        };
        let of_head = fused_head(&rows, batch, &heads, &losses, rows_per_chunk(vocabulary))
            .map_err(|bad| {
                let term = objective.terms[of_logits[bad.loss]].name.clone();
                NotFiniteTerm {
                    term,
                    sources: batch.source_of_target(bad.row).to_owned(),
                }
            })?;
        missing += of_head.missing;
        for (&index, sum) in of_logits.iter().zip(&of_head.sums) {
            shares[index] = sum / objective.terms[index].denominator(step);
        }
        // Its gradient with respect to the last hidden state is the one the head computed.
        let gradient = forward.last_hidden.detach().zeros_like().view([-1, width]);
        let gradient = gradient.index_copy(0, &batch.targets, &of_head.hidden);
        if tape.is_some() {
            seeds.push((student.num_layers() as u32, gradient));
        } else {
            roots.push((forward.last_hidden.view([-1, width]) * gradient).sum(Kind::Float));
        }
        if let Some(weight) = of_head.weight {
            roots.push((head * weight).sum(Kind::Float));
        }
    }

    for (index, term) in objective.terms.iter().enumerate() {
        let Work::Hidden {
            loss,
            pairs,
            positions,
            projections,
            ..
        } = &term.work
        else {
            continue;
        };
        for (index_of_pair, pair) in pairs.iter().enumerate() {
            let (in_batch, in_positions) = match positions {
                HiddenPositions::All => (&batch.positions, None),
                HiddenPositions::Targets => (&batch.targets, Some(&batch.targets_in_positions)),
            };
            let teacher = batch.teacher_hidden(pair.teacher);
            let teacher = in_positions.map_or_else(
                || teacher.shallow_clone(),
                |rows| teacher.index_select(0, rows),
            );
            let Some((_, student)) = forward
                .hidden
                .iter()
                .find(|(layer, _)| *layer == pair.student)
            else {
                continue; // The forward pass returns every layer it was asked for.
            };
            let leaf = tape
                .is_some()
                .then(|| student.detach().set_requires_grad(true));
            let student = leaf
                .as_ref()
                .unwrap_or(student)
                .view([-1, student.size()[2]])
                .index_select(0, in_batch)
                .to_kind(Kind::Float);
            let student = match projections.get(index_of_pair) {
                Some(projection) => student.matmul(&projection.tr()),
                None => student,
            };
            let values = loss.loss().value(&student, &teacher);
            let mean = values.sum(Kind::Float) / term.denominator(step);
            shares[index] += mean.double_value(&[]);
            // The embeddings (layer 0) are frozen: nothing to train there.
            if mean.requires_grad() {
                let value = mean * term.weight;
                match leaf {
                    Some(leaf) => {
                        value.backward();
                        seeds.push((pair.student, leaf.grad()));
                    }
                    None => roots.push(value),
                }
            }
        }
        if !shares[index].is_finite() {
            return Err(NotFiniteTerm {
                term: term.name.clone(),
                sources: batch.sources.join(", "),
            });
        }
    }

    if let Some(root) = roots.into_iter().reduce(|sum, root| sum + root) {
        root.backward();
    }
    if let Some(tape) = &tape {
        student.backward(tape, &seeds);
    }
    Ok(Shares {
        values: shares,
        missing,
    })
}
