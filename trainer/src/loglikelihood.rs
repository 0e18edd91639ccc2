//! Log-likelihoods of continuations, many requests in one forward pass.
//!
//! Requests that follow each other share what their contexts begin with: those tokens run once, the rest of each context
//! attends to them and to itself, each continuation to its context and itself. Several such trees lie side by side in one pass,
//! so nothing is padded, and only the positions that predict a continuation reach the head.

use std::collections::BTreeMap;

use caskd_models::{LoadedModel, Network, passes_at_once, side_by_side};
use tch::Tensor;

use crate::head::{chunks, logits, rows_per_chunk};
use crate::{Error, Result};

/// Tokens of one pass, where no single request is longer: as many as make products of matrices efficient.
const PACKED_TOKENS: usize = 1024;

/// Tokens that requests with contexts of their own may share a pass as one tree in: attention is among all of them.
const TREE_TOKENS: usize = 384;

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

/// Requests whose contexts begin alike: what they share once, then what each context adds, then each continuation but
/// for its last token.
struct Tree<'a> {
    /// At least one token.
    root: &'a [u32],
    stems: Vec<Stem<'a>>,
}

/// Requests of one context.
struct Stem<'a> {
    /// The whole context; begins with the root.
    context: &'a [u32],
    /// Index of the request and its continuation.
    continuations: Vec<(usize, &'a [u32])>,
}

impl<'a> Tree<'a> {
    fn new(context: &'a [u32], request: usize, continuation: &'a [u32]) -> Tree<'a> {
        Tree {
            root: context,
            stems: vec![Stem {
                context,
                continuations: vec![(request, continuation)],
            }],
        }
    }

    fn tokens(&self) -> usize {
        let stems: usize = self
            .stems
            .iter()
            .map(|stem| {
                let continuations = stem.continuations.iter();
                stem.context.len() - self.root.len()
                    + continuations
                        .map(|(_, tokens)| tokens.len() - 1)
                        .sum::<usize>()
            })
            .sum();
        self.root.len() + stems
    }

    /// Takes a request whose context is that of the last one, or shares at least half of its tokens with those here,
    /// where that saves tokens and they fit in a pass. False: not taken.
    fn take(&mut self, context: &'a [u32], request: usize, continuation: &'a [u32]) -> bool {
        if let Some(last) = self.stems.last_mut()
            && last.context == context
        {
            last.continuations.push((request, continuation));
            return true;
        }
        let shared = self.root.iter().zip(context).take_while(|(a, b)| a == b);
        let shared = shared.count();
        if shared == 0 || 2 * shared < context.len() {
            return false;
        }
        let alone = context.len() + continuation.len() - 1;
        // What the root loses stands in every stem so far.
        let copied = (self.stems.len() - 1) * (self.root.len() - shared);
        let together = self.tokens() + copied + alone - shared;
        if copied >= shared || together > TREE_TOKENS {
            return false;
        }
        self.root = &context[..shared];
        self.stems.push(Stem {
            context,
            continuations: vec![(request, continuation)],
        });
        true
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
        let taken = trees.last_mut();
        if !taken.is_some_and(|tree| tree.take(context, index, continuation)) {
            trees.push(Tree::new(context, index, continuation));
        }
    }
    let passes = passes(trees, passes_at_once(&model.network));
    let nothing = Loglikelihood {
        sum: f64::NAN,
        greedy: false,
    };
    let mut scores = vec![nothing; requests.len()];
    let mut done = 0;
    let score = |network: &Network, trees: &Vec<Tree<'_>>| Packed::of(trees).score(network);
    side_by_side(&model.network, &passes, score, |_, found| {
        done += found.len() as u64;
        for (request, score) in found {
            scores[request] = score;
        }
        progress(done, requests.len() as u64);
    });
    match scores.iter().position(|score| score.sum.is_nan()) {
        Some(request) => Err(Error::RequestNotANumber { request }),
        None => Ok(scores),
    }
}

/// Trees in passes of about the same number of tokens, a multiple of `at_once` of them where there are enough trees.
fn passes(mut trees: Vec<Tree<'_>>, at_once: usize) -> Vec<Vec<Tree<'_>>> {
    let tokens: usize = trees.iter().map(Tree::tokens).sum();
    let count = tokens.div_ceil(PACKED_TOKENS).next_multiple_of(at_once);
    let mut passes: Vec<(usize, Vec<Tree<'_>>)> = Vec::new();
    passes.resize_with(count.min(trees.len()), Default::default);
    // The longest first, each to where least is: the short ones level what those leave uneven.
    trees.sort_by_key(|tree| std::cmp::Reverse(tree.tokens()));
    for tree in trees {
        if let Some((tokens, pass)) = passes.iter_mut().min_by_key(|(tokens, _)| *tokens) {
            *tokens += tree.tokens();
            pass.push(tree);
        }
    }
    passes.into_iter().map(|(_, trees)| trees).collect()
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
    /// For each token the ranges of tokens that it attends to: of the root, of its stem, and of its own branch.
    sees: Vec<[std::ops::Range<usize>; 3]>,
    /// Tokens whose logits are needed.
    rows: Vec<i64>,
    /// (index into `rows`, token that follows, request), by request.
    targets: Vec<(usize, i64, usize)>,
}

impl Packed {
    fn of(trees: &[Tree<'_>]) -> Packed {
        let mut packed = Packed::default();
        for tree in trees {
            let root = packed.ids.len();
            let root_end = root + tree.root.len();
            for (i, &token) in tree.root.iter().enumerate() {
                packed.push(token, i, [root..root + i + 1, 0..0, 0..0]);
            }
            for Stem {
                context,
                continuations,
            } in &tree.stems
            {
                let stem = packed.ids.len();
                for (i, &token) in context.iter().enumerate().skip(tree.root.len()) {
                    let seen = stem..packed.ids.len() + 1;
                    packed.push(token, i, [root..root_end, seen, 0..0]);
                }
                let stem = stem..packed.ids.len();
                let last = if stem.is_empty() { root_end } else { stem.end };
                packed.rows.push(last as i64 - 1);
                let fork = packed.rows.len() - 1;
                for &(request, continuation) in continuations {
                    let branch = packed.ids.len();
                    let mut row = fork;
                    for (i, &token) in continuation.iter().enumerate() {
                        packed.targets.push((row, i64::from(token), request));
                        if i + 1 < continuation.len() {
                            packed.rows.push((branch + i) as i64);
                            row = packed.rows.len() - 1;
                            let seen = [root..root_end, stem.clone(), branch..branch + i + 1];
                            packed.push(token, context.len() + i, seen);
                        }
                    }
                }
            }
        }
        packed
    }

    fn push(&mut self, token: u32, position: usize, sees: [std::ops::Range<usize>; 3]) {
        self.ids.push(i64::from(token));
        self.positions.push(position as f32);
        self.sees.push(sees);
    }

    /// One pass: its requests with their scores.
    fn score(&self, network: &Network) -> BTreeMap<usize, Loglikelihood> {
        let n = self.ids.len();
        let mut visible = vec![false; n * n];
        for (row, ranges) in visible.chunks_mut(n).zip(&self.sees) {
            for range in ranges {
                row[range.clone()].fill(true);
            }
        }
        let mut scores = BTreeMap::new();
        tch::no_grad(|| {
            let hidden = network.forward_packed(&self.ids, &self.positions, &visible, &self.rows);
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
                    let score = scores.entry(request).or_insert(Loglikelihood {
                        sum: 0.0,
                        greedy: true,
                    });
                    score.sum += log_p.double_value(&[i]);
                    score.greedy &= first_choice.int64_value(&[i]) == 1;
                }
            }
        });
        scores
    }
}

/// Splits text as lm-evaluation-harness does (0.4.13, `_encode_pair`): white space at the context's end
/// moves to the continuation, both are tokenized together, and the continuation is what follows as
/// many tokens as the context has alone. Special tokens are those that the tokenizer puts around a text (a BOS with Llama 2
/// and 3). An empty context is the tokenizer's BOS, else its EOS.
///
/// # Errors
/// A text that the tokenizer refuses, an empty context of a tokenizer with neither token.
pub fn request(model: &LoadedModel, context: &str, continuation: &str) -> Result<Request> {
    let head = context.trim_end_matches(is_space);
    let moved = &context[head.len()..];
    if head.is_empty() {
        let start = prefix(model).ok_or_else(|| Error::Tokenizer {
            message: "an empty context needs a BOS or EOS token".to_owned(),
        })?;
        return Ok(Request {
            context: vec![start],
            continuation: encode(model, &format!("{moved}{continuation}"), false)?,
        });
    }
    let context = tokens(model, head)?;
    let mut whole = tokens(model, &format!("{head}{moved}{continuation}"))?;
    let continuation = whole.split_off(context.len().min(whole.len()));
    Ok(Request {
        context,
        continuation,
    })
}

/// A text's tokens as lm-evaluation-harness has them (0.4.13, `tok_encode`): a tokenizer that puts special tokens
/// around every text does it here too, unless the text begins with the [`prefix`] already.
pub(crate) fn tokens(model: &LoadedModel, text: &str) -> Result<Vec<u32>> {
    let prefix = prefix(model).and_then(|token| model.tokenizer.id_to_token(token));
    encode(
        model,
        text,
        !prefix.is_some_and(|prefix| text.starts_with(&prefix)),
    )
}

/// What stands before a text without a context: the tokenizer's BOS, else its EOS.
pub(crate) fn prefix(model: &LoadedModel) -> Option<u32> {
    model.bos.or(model.eos)
}

/// White space in Python's sense, which has the four separators too.
pub(crate) fn is_space(letter: char) -> bool {
    letter.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&letter)
}

fn encode(model: &LoadedModel, text: &str, with_special_tokens: bool) -> Result<Vec<u32>> {
    let encoding = model
        .tokenizer
        .encode(text, with_special_tokens)
        .map_err(|error| Error::Tokenizer {
            message: error.to_string(),
        })?;
    Ok(encoding.get_ids().to_vec())
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
        let mut tree = Tree::new(&context, 0, &left);
        assert!(tree.take(&context, 1, &right));
        assert_eq!(tree.tokens(), 3);
        let packed = Packed::of(&[tree]);
        assert_eq!(packed.ids, [5, 6, 7]);
        assert_eq!(packed.positions, [0.0, 1.0, 2.0]);
        assert_eq!(packed.sees[2], [0..2, 2..2, 2..3]);
        assert_eq!(packed.rows, [1, 2]);
        assert_eq!(packed.targets, [(0, 7, 0), (1, 8, 0), (0, 9, 1)]);
    }

    /// Contexts that begin alike: the beginning stands once, each rest sees it and itself, and each continuation its own
    /// context. One that shares less than half of its tokens stays apart.
    #[test]
    fn contexts_share_their_beginning() {
        let contexts = [tokens(&[1, 2, 3, 4]), tokens(&[1, 2, 5]), tokens(&[1, 2])];
        let end = tokens(&[8, 9]);
        let mut tree = Tree::new(&contexts[0], 0, &end);
        assert!(tree.take(&contexts[1], 1, &end));
        assert!(tree.take(&contexts[2], 2, &end));
        assert!(!tree.take(&[1, 6, 7], 3, &end));
        let packed = Packed::of(&[tree]);
        assert_eq!(packed.ids, [1, 2, 3, 4, 8, 5, 8, 8]);
        assert_eq!(packed.positions, [0.0, 1.0, 2.0, 3.0, 4.0, 2.0, 3.0, 2.0]);
        assert_eq!(packed.sees[3], [0..2, 2..4, 0..0]);
        assert_eq!(packed.sees[4], [0..2, 2..4, 4..5]);
        assert_eq!(packed.sees[6], [0..2, 5..6, 6..7]);
        assert_eq!(packed.sees[7], [0..2, 7..7, 7..8]);
        assert_eq!(packed.rows, [3, 4, 5, 6, 1, 7]);
        let request_1 = packed.targets.iter().filter(|target| target.2 == 1);
        assert_eq!(request_1.collect::<Vec<_>>(), [&(2, 8, 1), &(3, 9, 1)]);
    }
}
