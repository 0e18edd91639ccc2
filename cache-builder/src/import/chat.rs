//! Token ids of records that hold text instead of them, and whether foreign values are about these tokens.
//!
//! The tokenizer and its chat template say which tokens the teacher must have read. Whether it did is not taken on
//! trust: a token that the teacher read or wrote is among its likeliest about as often as their probabilities say, and
//! under another template, or some places beside, far less often.

use serde_json::Value;

use super::jsonl::{Fields, Parsed};
use crate::data::{Encoder, Problem, RecordBody, message_fields};

type Result<T> = std::result::Result<T, Problem>;

/// Tokens and which of them are targets, both \[T\].
#[derive(Debug, Default)]
pub(crate) struct Spoken {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) loss_mask: Vec<bool>,
}

/// What makes tokens of text.
pub(crate) struct Texts<'a> {
    encoder: Encoder<'a>,
    /// Places that values are moved by; `None`: not settled yet.
    shift: Option<i64>,
}

/// Fewer rows than this say nothing of a record.
const FEWEST_ROWS: usize = 16;

impl<'a> Texts<'a> {
    pub(crate) fn new(encoder: Encoder<'a>, shift: Option<i64>) -> Self {
        Self { encoder, shift }
    }

    /// Digest of the chat template and the date that it was told, as far as a record has used them.
    pub(crate) fn used_template(&self) -> (Option<String>, Option<String>) {
        self.encoder.used_template()
    }

    /// The whole conversation of a record, the assistant's turns its targets; `None` where the record holds none.
    pub(crate) fn conversation(&self, fields: &Fields) -> Result<Option<Spoken>> {
        message_fields(fields)?
            .map(|body| self.whole(body))
            .transpose()
    }

    fn whole(&self, body: RecordBody) -> Result<Spoken> {
        let encoded = self.encoder.encode(String::new(), body)?;
        let sequence = encoded.sequences.into_iter().next().unwrap_or_default();
        Ok(Spoken {
            token_ids: sequence.token_ids,
            loss_mask: sequence.loss_mask,
        })
    }

    /// What a server was asked with: the messages of a record, with the header of the answer where the assistant has not
    /// spoken last, or its `prompt`. Of a conversation only the assistant's turns are targets.
    pub(crate) fn asked(&self, fields: &Fields) -> Result<Option<Spoken>> {
        if let Some(body) = message_fields(fields)? {
            if body.ends_with_answer() {
                return self.whole(body).map(Some);
            }
            let token_ids = self.encoder.question(&body)?;
            return Ok(Some(Spoken {
                loss_mask: vec![false; token_ids.len()],
                token_ids,
            }));
        }
        let Some(prompt) = fields.get("prompt").and_then(Value::as_str) else {
            return Ok(None);
        };
        let token_ids = self.encoder.plain(prompt)?;
        Ok(Some(Spoken {
            loss_mask: vec![true; token_ids.len()],
            token_ids,
        }))
    }

    /// Refuses values that are about other tokens. Where no shift is settled they may stand some places beside: that is
    /// for the alignment check to say, which sees all records.
    pub(crate) fn check_fit(&self, parsed: &Parsed) -> Result<()> {
        let mut shifts = self.shift.map_or(-2..=2, |shift| shift..=shift);
        let is_short = parsed.rows.iter().flatten().count() < FEWEST_ROWS;
        if is_short || shifts.any(|shift| Fit::at(parsed, shift).is_good()) {
            return Ok(());
        }
        let Fit {
            rows,
            found,
            expected,
        } = Fit::at(parsed, self.shift.unwrap_or(0));
        Err(Problem::new(
            format!(
                "of {rows} tokens {found} are among the values of their place, about {expected:.0} should be: the values are about other tokens"
            ),
            "did the teacher read the text in another chat template (--chat-template), with another date (--chat-date) or \
             system prompt? put its token ids into the record as `input_ids`",
        ))
    }
}

/// How many tokens stand among the values of their place, and how many should by their probabilities.
struct Fit {
    rows: usize,
    found: usize,
    expected: f64,
}

impl Fit {
    fn at(parsed: &Parsed, shift: i64) -> Self {
        let mut fit = Self {
            rows: 0,
            found: 0,
            expected: 0.0,
        };
        for (position, row) in parsed.rows.iter().enumerate() {
            let token = usize::try_from(position as i64 + 1 + shift);
            let token = token.ok().and_then(|at| parsed.token_ids.get(at));
            let (Some(token), Some(row)) = (token, row) else {
                continue;
            };
            fit.rows += 1;
            fit.found += usize::from(row.iter().any(|(id, _)| id == token));
            let mass: f64 = row.iter().map(|(_, value)| f64::from(*value).exp()).sum();
            fit.expected += mass.min(1.0);
        }
        fit
    }

    fn is_good(&self) -> bool {
        self.found as f64 >= 0.5 * self.expected
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use caskd_models::LoadedTokenizer;
    use serde_json::json;
    use tokenizers::Tokenizer;

    use super::*;
    use crate::data::DataOptions;

    /// Of the words `w0` to `w49`: `w1` and `w2` begin what the user and the assistant say, `w3` ends it.
    pub(crate) fn with_texts<T>(shift: Option<i64>, work: impl FnOnce(&Texts<'_>) -> T) -> T {
        let template = "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} w3 {% endfor %}{% if add_generation_prompt %}w2{% endif %}";
        let words: serde_json::Map<String, Value> =
            (0..50).map(|id| (format!("w{id}"), json!(id))).collect();
        let definition = json!({
            "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
        });
        let tokenizer = LoadedTokenizer {
            tokenizer: Tokenizer::from_bytes(definition.to_string()).unwrap(),
            fingerprint: String::new(),
            bos: None,
            eos: None,
            tokenizer_config: json!({"chat_template": template}),
        };
        let encoder = Encoder::new(&tokenizer, 50, usize::MAX, &DataOptions::default()).unwrap();
        work(&Texts::new(encoder, shift))
    }

    #[test]
    fn values_of_other_tokens_are_noticed() {
        let about = |offset: usize, count: usize| {
            let token_ids: Vec<u32> = (0..count).map(|at| at as u32 * 7 % 40).collect();
            let row = |at: usize| {
                Some(vec![
                    (token_ids[(at + 1 + offset) % count], -0.2),
                    (99, -3.0),
                ])
            };
            Parsed {
                rows: (0..count - 1).map(row).collect(),
                loss_mask: vec![true; count],
                token_ids,
            }
        };
        let check = |shift: Option<i64>, parsed: &Parsed| {
            with_texts(shift, |texts| texts.check_fit(parsed)).map_err(|problem| problem.message)
        };
        assert!(check(None, &about(0, 40)).is_ok());
        let problem = check(None, &about(3, 40)).unwrap_err();
        assert!(problem.contains("of 39 tokens 0 are"), "{problem}");
        assert!(check(None, &about(3, 12)).is_ok(), "too few to say");
        // Some places beside is for the alignment check, until somebody has said where they belong.
        assert!(check(None, &about(1, 40)).is_ok());
        assert!(check(Some(1), &about(1, 40)).is_ok());
        assert!(check(Some(0), &about(1, 40)).is_err());
        // Unsure values are about as often wrong as they say.
        let mut unsure = about(0, 40);
        for (at, row) in unsure.rows.iter_mut().enumerate() {
            let token = unsure.token_ids[at + 1];
            *row = Some(vec![(token + u32::from(at % 3 != 0), -1.2)]);
        }
        assert!(check(Some(0), &unsure).is_ok());
    }
}
