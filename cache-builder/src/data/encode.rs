//! One record to token sequences with their loss masks.

use std::ops::Range;

use caskd_formats::LossOn;
use caskd_models::LoadedTokenizer;
use tokenizers::Tokenizer;

use super::TokenizedSequence;
use super::chat::{render_chat, render_question};
use super::options::{DataOptions, PromptForm, USUAL_CHAT_DATE};
use super::record::{FORMS, Problem, RecordBody, message};
use super::templates::Templates;
use crate::Result;

/// The prompt of an instruction record, as Stanford Alpaca words it; the response follows directly.
pub fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.trim().is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    }
}

const TEMPLATE_HINT: &str =
    "look at the roles and their order; another template: --chat-template NAME|FILE.jinja";

/// What turns records into sequences.
pub(crate) struct Encoder<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    eos: Option<u32>,
    vocab_size: usize,
    max_len: usize,
    loss_on: LossOn,
    prompt: PromptForm,
    templates: Templates,
    date: chrono::NaiveDate,
    special: Vec<String>,
}

/// A record's sequences, and how many tokens `max_len` cut off it.
#[derive(Debug, Default)]
pub(crate) struct EncodedRecord {
    pub(crate) sequences: Vec<TokenizedSequence>,
    pub(crate) cut_tokens: u64,
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(
        tokenizer: &'a LoadedTokenizer,
        vocab_size: usize,
        max_len: usize,
        options: &DataOptions,
    ) -> Result<Self> {
        let date = options.chat_date.unwrap_or(USUAL_CHAT_DATE);
        let config = &tokenizer.tokenizer_config;
        let templates = Templates::new(config, options.chat_template.as_deref(), date)?;
        let mut special: Vec<String> = tokenizer
            .tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| token.special)
            .map(|token| token.content)
            .collect();
        special.sort_unstable();
        Ok(Self {
            tokenizer: &tokenizer.tokenizer,
            eos: tokenizer.eos,
            vocab_size,
            max_len,
            loss_on: options.loss_on,
            prompt: options.prompt,
            templates,
            date,
            special,
        })
    }

    /// Digest of the chat template and the date that it was told, as far as a record has used them.
    pub(crate) fn used_template(&self) -> (Option<String>, Option<String>) {
        let (digest, asked_for_date) = self.templates.used();
        (digest, asked_for_date.then(|| self.date.to_string()))
    }

    /// The special tokens that the tokenizer puts before and behind a text.
    pub(crate) fn surroundings(&self) -> std::result::Result<(Vec<u32>, Vec<u32>), String> {
        let encoding = self
            .tokenizer
            .encode("a", true)
            .map_err(|error| error.to_string())?;
        let of_tokenizer = |flag: &&u32| **flag == 1;
        let mask = encoding.get_special_tokens_mask();
        let before = mask.iter().take_while(of_tokenizer).count();
        let after = mask.iter().rev().take_while(of_tokenizer).count();
        let ids = encoding.get_ids();
        Ok((
            ids[..before].to_vec(),
            ids[ids.len().saturating_sub(after)..].to_vec(),
        ))
    }

    /// Encodes a record that stands at `source`.
    ///
    /// Instructions and completions become prompt + response + end-of-sequence token, with the loss on what follows the
    /// prompt; conversations what the chat template says, with the loss on the assistant's turns; texts end with the
    /// end-of-sequence token and are cut into windows. All other records are cut at `max_len`.
    pub(crate) fn encode(
        &self,
        source: String,
        body: RecordBody,
    ) -> std::result::Result<EncodedRecord, Problem> {
        let mut sequence = match body {
            RecordBody::Text(text) => return self.windows(source, &text),
            RecordBody::Tokens {
                input_ids,
                loss_mask,
            } => self.given(source, input_ids, loss_mask)?,
            RecordBody::Completion { prompt, completion } => {
                self.response(source, prompt, &completion)?
            }
            RecordBody::Instruction {
                instruction,
                input,
                output,
            } => match self.prompt {
                PromptForm::Alpaca => {
                    self.response(source, alpaca_prompt(&instruction, &input), &output)?
                }
                PromptForm::Chat => {
                    let question = if input.trim().is_empty() {
                        instruction
                    } else {
                        format!("{instruction}\n\n{input}")
                    };
                    let messages = [message("user", question), message("assistant", output)];
                    self.chat(source, &messages, &minijinja::Value::from(()))?
                }
            },
            RecordBody::Chat { messages, tools } => self.chat(source, &messages, &tools)?,
        };
        let length = sequence.token_ids.len();
        sequence.token_ids.truncate(self.max_len);
        sequence.loss_mask.truncate(self.max_len);
        // All sequences wait in memory: none may hold on to what was cut off.
        sequence.token_ids.shrink_to_fit();
        sequence.loss_mask.shrink_to_fit();
        Ok(EncodedRecord {
            cut_tokens: (length - sequence.token_ids.len()) as u64,
            sequences: vec![sequence],
        })
    }

    /// The tokens of a conversation with the header of the answer that it asks for.
    pub(crate) fn question(&self, body: &RecordBody) -> std::result::Result<Vec<u32>, Problem> {
        let RecordBody::Chat { messages, tools } = body else {
            return Err(Problem::new("it is no conversation", FORMS));
        };
        let template = self.templates.of(tools)?;
        let text = render_question(template, messages, tools)
            .map_err(|message| Problem::new(message, TEMPLATE_HINT))?;
        self.tokens(&text, false)
    }

    /// The tokens of a text as it stands, with the special tokens that the tokenizer puts around it.
    pub(crate) fn plain(&self, text: &str) -> std::result::Result<Vec<u32>, Problem> {
        self.tokens(text, true)
    }

    fn tokens(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> std::result::Result<Vec<u32>, Problem> {
        let whole = 0..text.len();
        let targets = std::slice::from_ref(&whole);
        let sequence = self.text_with_targets(String::new(), text, targets, add_special_tokens)?;
        Ok(sequence.token_ids)
    }

    fn given(
        &self,
        source: String,
        token_ids: Vec<u32>,
        loss_mask: Option<Vec<bool>>,
    ) -> std::result::Result<TokenizedSequence, Problem> {
        if let Some(id) = token_ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(Problem::new(
                format!(
                    "token id {id} is beyond the teacher's vocabulary of {}",
                    self.vocab_size
                ),
                "were the ids made with another tokenizer?",
            ));
        }
        let all = || vec![true; token_ids.len()];
        Ok(TokenizedSequence {
            source,
            loss_mask: match self.loss_on {
                LossOn::Response => loss_mask.unwrap_or_else(all),
                LossOn::All => all(),
            },
            token_ids,
        })
    }

    fn response(
        &self,
        source: String,
        prompt: String,
        response: &str,
    ) -> std::result::Result<TokenizedSequence, Problem> {
        let begin = prompt.len();
        let text = prompt + response;
        let target = begin..text.len();
        let mut sequence =
            self.text_with_targets(source, &text, std::slice::from_ref(&target), true)?;
        self.end(&mut sequence);
        Ok(sequence)
    }

    fn chat(
        &self,
        source: String,
        messages: &[minijinja::Value],
        tools: &minijinja::Value,
    ) -> std::result::Result<TokenizedSequence, Problem> {
        let template = self.templates.of(tools)?;
        let chat = render_chat(template, messages, tools, &self.special)
            .map_err(|message| Problem::new(message, TEMPLATE_HINT))?;
        if chat.turns.is_empty() && self.loss_on == LossOn::Response {
            return Err(Problem::new(
                "the conversation has no turn of the assistant to learn from",
                "--loss-on all learns from every token",
            ));
        }
        // The template has written all special tokens already.
        self.text_with_targets(source, &chat.text, &chat.turns, false)
    }

    /// Tokens of a text; targets are those that begin in one of the `targets`.
    fn text_with_targets(
        &self,
        source: String,
        text: &str,
        targets: &[Range<usize>],
        add_special_tokens: bool,
    ) -> std::result::Result<TokenizedSequence, Problem> {
        let encoding = self
            .tokenizer
            .encode(text, add_special_tokens)
            .map_err(|error| Problem::new(format!("the tokenizer refuses it: {error}"), FORMS))?;
        let mut targets = targets.iter().peekable();
        let loss_mask = encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| {
                while targets.next_if(|target| target.end <= start).is_some() {}
                // Offsets leave out a token's spaces; one of spaces alone ends where it seems to begin.
                let begins_inside = targets
                    .peek()
                    .is_some_and(|target| target.start <= start && target.start < end);
                self.loss_on == LossOn::All || begins_inside
            })
            .collect();
        Ok(TokenizedSequence {
            source,
            token_ids: encoding.get_ids().to_vec(),
            loss_mask,
        })
    }

    fn end(&self, sequence: &mut TokenizedSequence) {
        let Some(eos) = self.eos else { return };
        // Some tokenizers have put it there themselves.
        if sequence.token_ids.last() != Some(&eos) {
            sequence.token_ids.push(eos);
            sequence.loss_mask.push(true);
        }
        if let Some(last) = sequence.loss_mask.last_mut() {
            *last = true;
        }
    }

    fn windows(&self, source: String, text: &str) -> std::result::Result<EncodedRecord, Problem> {
        let whole = 0..text.len();
        let mut all = self.text_with_targets(source, text, std::slice::from_ref(&whole), true)?;
        all.loss_mask.fill(true);
        self.end(&mut all);
        let many = all.token_ids.len() > self.max_len;
        let sequences = all
            .token_ids
            .chunks(self.max_len)
            .zip(1..)
            .map(|(ids, window)| TokenizedSequence {
                source: if many {
                    format!("{}:{window}", all.source)
                } else {
                    all.source.clone()
                },
                token_ids: ids.to_vec(),
                loss_mask: vec![true; ids.len()],
            })
            .collect();
        Ok(EncodedRecord {
            sequences,
            cut_tokens: 0,
        })
    }
}
