//! Running text to tokens, block by block: the same tokens as if the whole text had been encoded at once, in little
//! memory and on all cores.

use rayon::prelude::*;
use tokenizers::Tokenizer;

/// Bytes of new text in a block.
pub(crate) const BLOCK: usize = 1 << 20;

/// Bytes of the text before a block that are encoded again with it.
const OVERLAP: usize = 16 << 10;

/// Blocks that are encoded at the same time.
const BLOCKS: usize = 8;

/// Tokens that must be the same on both sides where two blocks are joined.
const AGREE: usize = 16;

/// What a tokenizer said of a text that it refuses.
pub(crate) type Refused = String;

/// Tokens of a stretch of text with the byte of the whole text at which each begins.
#[derive(Debug, Default)]
struct Stretch {
    ids: Vec<u32>,
    starts: Vec<usize>,
}

fn encode(tokenizer: &Tokenizer, text: &str, offset: usize) -> Result<Stretch, Refused> {
    let encoding = tokenizer
        .encode(text, false)
        .map_err(|error| error.to_string())?;
    Ok(Stretch {
        ids: encoding.get_ids().to_vec(),
        starts: encoding
            .get_offsets()
            .iter()
            .map(|&(start, _)| start + offset)
            .collect(),
    })
}

/// Encodes blocks of text as they come.
///
/// A tokenizer's choice at one place depends on the text near it only, so each block is encoded with some of the text
/// before it, and two blocks are joined where both have the same tokens at the same bytes, away from either's cut.
pub(crate) struct TextEncoder<'a> {
    tokenizer: &'a Tokenizer,
    block: usize,
    overlap: usize,
    /// Blocks that are not encoded yet.
    waiting: Vec<String>,
    /// The text that `pending` was encoded from, and the byte it begins at.
    text: String,
    offset: usize,
    /// Tokens of the last block that the next one may still change, and the byte at which those begin that are not
    /// given out yet.
    pending: Stretch,
    from: usize,
}

impl<'a> TextEncoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self::with_sizes(tokenizer, BLOCK, OVERLAP)
    }

    fn with_sizes(tokenizer: &'a Tokenizer, block: usize, overlap: usize) -> Self {
        Self {
            tokenizer,
            block,
            overlap,
            waiting: Vec::new(),
            text: String::new(),
            offset: 0,
            pending: Stretch::default(),
            from: 0,
        }
    }

    /// How much text a block should have.
    pub(crate) fn block(&self) -> usize {
        self.block
    }

    /// Takes the next block; gives tokens that are certain.
    pub(crate) fn push(&mut self, block: String) -> Result<Vec<u32>, Refused> {
        self.waiting.push(block);
        if self.waiting.len() < BLOCKS {
            return Ok(Vec::new());
        }
        self.encode_waiting()
    }

    /// The rest of the tokens.
    pub(crate) fn finish(mut self) -> Result<Vec<u32>, Refused> {
        let mut tokens = self.encode_waiting()?;
        tokens.append(&mut self.pending.ids);
        Ok(tokens)
    }

    fn encode_waiting(&mut self) -> Result<Vec<u32>, Refused> {
        let blocks = std::mem::take(&mut self.waiting);
        let mut inputs: Vec<(String, usize)> = Vec::with_capacity(blocks.len());
        let mut end = self.offset + self.text.len();
        for block in blocks {
            let before = inputs.last().map_or(&self.text, |(text, _)| text);
            let tail = tail(before, self.overlap);
            let input = format!("{tail}{block}");
            let offset = end - tail.len();
            inputs.push((input, offset));
            end += block.len();
        }
        let tokenizer = self.tokenizer;
        let encoded: Vec<Stretch> = inputs
            .par_iter()
            .map(|(text, offset)| encode(tokenizer, text, *offset))
            .collect::<Result<_, _>>()?;
        let mut tokens = Vec::new();
        for ((text, offset), stretch) in inputs.into_iter().zip(encoded) {
            self.join(text, offset, stretch, &mut tokens)?;
        }
        Ok(tokens)
    }

    fn join(
        &mut self,
        text: String,
        offset: usize,
        next: Stretch,
        tokens: &mut Vec<u32>,
    ) -> Result<(), Refused> {
        if self.text.is_empty() {
            (self.text, self.offset, self.pending, self.from) = (text, offset, next, offset);
            return Ok(());
        }
        let end = self.offset + self.text.len();
        if let Some((left, right)) = meeting(&self.pending, &next, offset, end) {
            tokens.extend_from_slice(&self.pending.ids[..left]);
            self.from = next.starts[right];
            self.pending = Stretch {
                ids: next.ids[right..].to_vec(),
                starts: next.starts[right..].to_vec(),
            };
            (self.text, self.offset) = (text, offset);
            return Ok(());
        }
        // Nowhere the same: both as one block.
        self.text.push_str(&text[end - offset..]);
        let whole = encode(self.tokenizer, &self.text, self.offset)?;
        let first = whole.starts.partition_point(|&start| start < self.from);
        self.pending = Stretch {
            ids: whole.ids[first..].to_vec(),
            starts: whole.starts[first..].to_vec(),
        };
        Ok(())
    }
}

/// The last `length` bytes of a text, at most, from a whole character on.
fn tail(text: &str, length: usize) -> &str {
    let mut start = text.len().saturating_sub(length);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// Where two stretches meet: indices of a token of each, from which on [`AGREE`] tokens are the same at the same bytes.
/// The right one begins at byte `start`, the left one ends at `end`; a quarter of what they share is left alone on
/// either side.
fn meeting(left: &Stretch, right: &Stretch, start: usize, end: usize) -> Option<(usize, usize)> {
    let margin = end.saturating_sub(start) / 4;
    let mut i = left.starts.partition_point(|&at| at < start + margin);
    let mut j = right.starts.partition_point(|&at| at < start + margin);
    while i + AGREE <= left.ids.len() && j + AGREE <= right.ids.len() {
        if left.starts[i + AGREE - 1] + margin > end {
            return None;
        }
        match left.starts[i].cmp(&right.starts[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                if left.ids[i..i + AGREE] == right.ids[j..j + AGREE]
                    && left.starts[i..i + AGREE] == right.starts[j..j + AGREE]
                {
                    return Some((i, j));
                }
                i += 1;
                j += 1;
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use tokenizers::models::bpe::{BPE, BpeTrainer};
    use tokenizers::normalizers::{Prepend, Replace, Sequence};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{
        AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
        TokenizerBuilder,
    };

    use super::*;

    const TEXT: &str = concat!(
        include_str!("../../../docs/FORMAT.md"),
        include_str!("../../../docs/LOSSES.md"),
        "     deep      spaces \n\n\n and ünïcödé — 你好，世界 🙂🙂\n",
        include_str!("../../../docs/SEARCH.md"),
    );

    /// Cut into words before BPE, as GPT-2 does.
    fn byte_level() -> Tokenizer {
        trained(
            None,
            Some(ByteLevel::new(false, true, true).into()),
            ByteLevel::alphabet().into_iter().collect(),
        )
    }

    /// BPE over the whole text with a mark before it, as Llama 1 and 2 do.
    fn whole_text() -> Tokenizer {
        let marks = Sequence::new(vec![
            Prepend::new("▁".into()).into(),
            Replace::new(" ", "▁").unwrap().into(),
        ]);
        trained(
            Some(marks.into()),
            None,
            TEXT.chars().chain(['▁', 'x']).collect(),
        )
    }

    fn trained(
        normalizer: Option<NormalizerWrapper>,
        pre_tokenizer: Option<PreTokenizerWrapper>,
        alphabet: std::collections::HashSet<char>,
    ) -> Tokenizer {
        let mut tokenizer = TokenizerBuilder::<
            BPE,
            NormalizerWrapper,
            PreTokenizerWrapper,
            PostProcessorWrapper,
            DecoderWrapper,
        >::default()
        .with_model(BPE::default())
        .with_normalizer(normalizer)
        .with_pre_tokenizer(pre_tokenizer)
        .build()
        .unwrap();
        let mut trainer = BpeTrainer::builder()
            .vocab_size(900)
            .show_progress(false)
            .initial_alphabet(alphabet.into_iter().collect())
            .build();
        // Words and not the whole text: BPE learns pairs of words quadratically.
        let words = TEXT.split_inclusive(' ').take(6000);
        tokenizer
            .train(&mut trainer, words.map(str::to_owned))
            .unwrap();
        let mut tokenizer: Tokenizer = tokenizer.into();
        tokenizer
            .add_special_tokens([AddedToken::from("<end>", true)])
            .unwrap();
        tokenizer
    }

    fn in_blocks(tokenizer: &Tokenizer, text: &str, block: usize, overlap: usize) -> Vec<u32> {
        let mut encoder = TextEncoder::with_sizes(tokenizer, block, overlap);
        let mut tokens = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let mut length = rest.len().min(block);
            while !rest.is_char_boundary(length) {
                length += 1;
            }
            tokens.extend(encoder.push(rest[..length].to_owned()).unwrap());
            rest = &rest[length..];
        }
        tokens.extend(encoder.finish().unwrap());
        tokens
    }

    fn check(text: &str) {
        for tokenizer in [byte_level(), whole_text()] {
            let whole = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            for (block, overlap) in [(700, 300), (1000, 400), (4096, 1000), (1 << 20, 1 << 14)] {
                let blocks = in_blocks(&tokenizer, text, block, overlap);
                let first = whole.iter().zip(&blocks).position(|(a, b)| a != b);
                assert!(
                    whole == blocks,
                    "blocks of {block} bytes: {} tokens instead of {}, first other one {first:?}",
                    blocks.len(),
                    whole.len()
                );
            }
        }
    }

    #[test]
    fn blocks_give_the_tokens_of_the_whole() {
        check(TEXT);
        check("");
        check("a");
    }

    #[test]
    fn long_runs_without_a_seam_are_encoded_whole() {
        let run = "x".repeat(5000);
        check(&format!(
            "A line.\n{run}\nAnother <end> line. {}",
            &TEXT[..3000]
        ));
        check(&" ".repeat(3001));
    }
}
