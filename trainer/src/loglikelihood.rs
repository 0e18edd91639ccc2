//! Log-likelihoods of continuations, many requests in one forward pass.
//!
//! Requests that follow each other with the same context share it: the context's tokens run once,
//! each continuation attends to them and to itself. Several such trees lie side by side in one pass,
//! so nothing is padded, and only the positions that predict a continuation reach the head.

use caskd_models::LoadedModel;
use tch::Tensor;

use crate::head::{chunks, logits, rows_per_chunk};
use crate::{Error, Result};

/// Tokens of one pass, where no single request is longer. Attention's share grows with their number.
const PACKED_TOKENS: usize = 384;

/// A continuation to score after its context, both as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// At least one token.
    pub context: Vec<u32>,
    /// At least one token.
    pub continuation: Vec<u32>,
}

/// What a model says of a continuation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loglikelihood {
    /// Σ ln p of its tokens.
    pub sum: f64,
    /// Each of its tokens is the likeliest at its place.
    pub greedy: bool,
}

/// Requests of one context: its tokens once, then each continuation but for its last token.
struct Tree<'a> {
    context: &'a [u32],
    /// Index of the request and its continuation.
    continuations: Vec<(usize, &'a [u32])>,
}

impl Tree<'_> {
    fn tokens(&self) -> usize {
        let continuations: usize = self
            .continuations
            .iter()
            .map(|(_, tokens)| tokens.len() - 1)
            .sum();
        self.context.len() + continuations
    }
}

/// Scores requests in their order. Contexts are cut on the left to what `max_len` positions can hold.
/// `progress` hears (requests done, all requests).
///
/// # Errors
/// An empty context or continuation, a token outside the model's vocabulary, a continuation longer
/// than `max_len`, a log-likelihood that is NaN.
pub fn loglikelihoods(
    model: &LoadedModel,
    requests: &[Request],
    max_len: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<Loglikelihood>> {
    let vocabulary = model.network.vocab_size();
    for (index, request) in requests.iter().enumerate() {
        check(index, request, max_len, vocabulary)?;
    }
    let mut trees: Vec<Tree<'_>> = Vec::new();
    for (
        index,
        Request {
            context,
            continuation,
        },
    ) in requests.iter().enumerate()
    {
        // The last token of the continuation is predicted but never read.
        let room = (max_len + 1).saturating_sub(continuation.len()).max(1);
        let context = &context[context.len().saturating_sub(room)..];
        match trees.last_mut() {
            Some(tree) if tree.context == context => tree.continuations.push((index, continuation)),
            _ => trees.push(Tree {
                context,
                continuations: vec![(index, continuation)],
            }),
        }
    }
    trees.sort_by_key(|tree| std::cmp::Reverse(tree.tokens()));

    let nothing = Loglikelihood {
        sum: f64::NAN,
        greedy: false,
    };
    let mut scores = vec![nothing; requests.len()];
    let (mut done, mut rest) = (0, trees.as_slice());
    while let Some(first) = rest.first() {
        let limit = PACKED_TOKENS.max(first.tokens());
        let (mut taken, mut tokens) = (0, 0);
        while let Some(tree) = rest.get(taken)
            && tokens + tree.tokens() <= limit
        {
            tokens += tree.tokens();
            taken += 1;
        }
        let (pass, after) = rest.split_at(taken);
        Packed::of(pass).score(model, &mut scores);
        rest = after;
        done += pass
            .iter()
            .map(|tree| tree.continuations.len())
            .sum::<usize>();
        progress(done as u64, requests.len() as u64);
    }
    match scores.iter().position(|score| score.sum.is_nan()) {
        Some(request) => Err(Error::RequestNotANumber { request }),
        None => Ok(scores),
    }
}

fn check(index: usize, request: &Request, max_len: usize, vocabulary: usize) -> Result<()> {
    let bad = |message: String| {
        Err(Error::BadRequest {
            request: index,
            message,
        })
    };
    if request.context.is_empty() || request.continuation.is_empty() {
        return bad("its context or its continuation has no token".to_owned());
    }
    if request.continuation.len() > max_len {
        return bad(format!(
            "its continuation has {} tokens, more than the {max_len} that the model takes",
            request.continuation.len()
        ));
    }
    let mut tokens = request.context.iter().chain(&request.continuation);
    match tokens.find(|&&token| token as usize >= vocabulary) {
        Some(token) => bad(format!(
            "token {token} is outside the vocabulary of {vocabulary}"
        )),
        None => Ok(()),
    }
}

/// The input of one pass and what to read off it.
#[derive(Default)]
struct Packed {
    ids: Vec<i64>,
    positions: Vec<f32>,
    /// For each token the ranges of tokens that it attends to: of the context, and of its own branch.
    sees: Vec<[std::ops::Range<usize>; 2]>,
    /// Tokens whose logits are needed, ascending.
    rows: Vec<i64>,
    /// (index into `rows`, token that follows, request), by request.
    targets: Vec<(usize, i64, usize)>,
}

impl Packed {
    fn of(trees: &[Tree<'_>]) -> Packed {
        let mut packed = Packed::default();
        for tree in trees {
            let root = packed.ids.len();
            let end = root + tree.context.len();
            for (i, &token) in tree.context.iter().enumerate() {
                packed.push(token, i, [root..root, root..root + i + 1]);
            }
            packed.rows.push(end as i64 - 1);
            let fork = packed.rows.len() - 1;
            for &(request, continuation) in &tree.continuations {
                let branch = packed.ids.len();
                let mut row = fork;
                for (i, &token) in continuation.iter().enumerate() {
                    packed.targets.push((row, i64::from(token), request));
                    if i + 1 < continuation.len() {
                        packed.rows.push((branch + i) as i64);
                        row = packed.rows.len() - 1;
                        let seen = [root..end, branch..branch + i + 1];
                        packed.push(token, tree.context.len() + i, seen);
                    }
                }
            }
        }
        packed
    }

    fn push(&mut self, token: u32, position: usize, sees: [std::ops::Range<usize>; 2]) {
        self.ids.push(i64::from(token));
        self.positions.push(position as f32);
        self.sees.push(sees);
    }

    /// One pass; the scores of its requests go into `scores`.
    fn score(&self, model: &LoadedModel, scores: &mut [Loglikelihood]) {
        let n = self.ids.len();
        let mut visible = vec![false; n * n];
        for (row, ranges) in visible.chunks_mut(n).zip(&self.sees) {
            for range in ranges {
                row[range.clone()].fill(true);
            }
        }
        let network = &model.network;
        for &(_, _, request) in &self.targets {
            scores[request] = Loglikelihood {
                sum: 0.0,
                greedy: true,
            };
        }
        tch::no_grad(|| {
            let rows = Tensor::from_slice(&self.rows).to_device(network.device());
            let hidden = network
                .forward_packed(&self.ids, &self.positions, &visible)
                .index_select(0, &rows);
            let head = network.head();
            for (first, length) in chunks(hidden.size()[0], rows_per_chunk(head.size()[0])) {
                let logits = logits(&hidden.narrow(0, first, length), head);
                let likeliest = logits.argmax(-1, false);
                let normalizer = logits.logsumexp([-1].as_slice(), false);
                let inside = |&&(row, _, _): &&(usize, i64, usize)| {
                    (first as usize..(first + length) as usize).contains(&row)
                };
                let targets: Vec<_> = self.targets.iter().filter(inside).collect();
                let row: Vec<i64> = targets
                    .iter()
                    .map(|target| target.0 as i64 - first)
                    .collect();
                let token: Vec<i64> = targets.iter().map(|target| target.1).collect();
                let row = Tensor::from_slice(&row).to_device(network.device());
                let token = Tensor::from_slice(&token).to_device(network.device());
                let log_p = logits
                    .index_select(0, &row)
                    .gather(1, &token.unsqueeze(1), false)
                    .squeeze_dim(1)
                    - normalizer.index_select(0, &row);
                let first_choice = likeliest.index_select(0, &row).eq_tensor(&token);
                for (i, &&(_, _, request)) in targets.iter().enumerate() {
                    let i = i as i64;
                    scores[request].sum += log_p.double_value(&[i]);
                    scores[request].greedy &= first_choice.int64_value(&[i]) == 1;
                }
            }
        });
    }
}

/// Splits text as lm-evaluation-harness does (0.4.13, `_encode_pair`): white space at the context's end
/// moves to the continuation, both are tokenized together, and the continuation is what follows as
/// many tokens as the context has alone. An empty context is the tokenizer's BOS, else its EOS.
///
/// # Errors
/// A text that the tokenizer refuses, an empty context of a tokenizer with neither token.
pub fn request(model: &LoadedModel, context: &str, continuation: &str) -> Result<Request> {
    let encode = |text: &str| -> Result<Vec<u32>> {
        let encoding = model
            .tokenizer
            .encode(text, false)
            .map_err(|error| Error::Tokenizer {
                message: error.to_string(),
            })?;
        Ok(encoding.get_ids().to_vec())
    };
    let head = context.trim_end();
    let moved = &context[head.len()..];
    if head.is_empty() {
        let start = model.bos.or(model.eos).ok_or_else(|| Error::Tokenizer {
            message: "an empty context needs a BOS or EOS token".to_owned(),
        })?;
        return Ok(Request {
            context: vec![start],
            continuation: encode(&format!("{moved}{continuation}"))?,
        });
    }
    let context = encode(head)?;
    let mut whole = encode(&format!("{head}{moved}{continuation}"))?;
    let continuation = whole.split_off(context.len().min(whole.len()));
    Ok(Request {
        context,
        continuation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(list: &[u32]) -> Vec<u32> {
        list.to_vec()
    }

    /// Two requests share a context: it stands once, each branch sees it and itself, and both first
    /// tokens are read off the context's last row.
    #[test]
    fn continuations_share_their_context() {
        let (context, left, right) = (tokens(&[5, 6]), tokens(&[7, 8]), tokens(&[9]));
        let tree = Tree {
            context: &context,
            continuations: vec![(0, &left), (1, &right)],
        };
        assert_eq!(tree.tokens(), 3);
        let packed = Packed::of(&[tree]);
        assert_eq!(packed.ids, [5, 6, 7]);
        assert_eq!(packed.positions, [0.0, 1.0, 2.0]);
        assert_eq!(packed.sees[2], [0..2, 2..3]);
        assert_eq!(packed.rows, [1, 2]);
        assert_eq!(packed.targets, [(0, 7, 0), (1, 8, 0), (0, 9, 1)]);
    }
}
