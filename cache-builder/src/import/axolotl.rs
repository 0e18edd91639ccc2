//! The records that Axolotl's KD plugin trains from.
//!
//! | form | fields | row i is about |
//! |---|---|---|
//! | prepared | `input_ids`, `labels`, `target_token_ids`, `target_logprobs`, `target_mask`, each \[T\] or \[T, K\] | token i + 1 |
//! | chat, with ids | `logprobs` [N, K] and `target_token_ids` [N, K] of the last N tokens | token T − N + i |
//! | chat, older | `logprobs` \[N\] of lists of `{"token": "token_id:5", "logprob": …}` | token T − N + i |
//!
//! The plugin's loss compares row i with the student's logits at position i, which is the convention of the prepared
//! form. Rows of a mask of 0 that are padding (no probability, or the same token twice) hold no values. Where the chat
//! forms carry `messages` and no `input_ids`, the tokenizer's chat template gives the tokens, as it does in the plugin,
//! and the values must fit them.

use serde_json::Value;

use super::chat::Texts;
use super::foreign::{NOTHING, Row};
use super::jsonl::{Fields, Keys, Parsed, entries, ids, number, targets, token_id};
use crate::data::Problem;

type Result<T> = std::result::Result<T, Problem>;

const FORMS: &str = "a record has input_ids, target_token_ids, target_logprobs and target_mask; or logprobs beside input_ids or messages";

/// The one sequence of a record.
pub(crate) fn sequences(record: &Value, texts: &Texts<'_>) -> Result<Vec<Parsed>> {
    let fields = record
        .as_object()
        .ok_or_else(|| Problem::new("not a JSON object", FORMS))?;
    let Some(given) = fields.get("input_ids") else {
        return of_conversation(fields, texts).map(|parsed| vec![parsed]);
    };
    let token_ids = ids(given, "input_ids")?;
    let tokens = real_tokens(fields, token_ids.len())?;
    let parsed = match (fields.get("target_logprobs"), fields.get("logprobs")) {
        (Some(values), _) => prepared(fields, token_ids, values)?,
        (None, Some(values)) => {
            let all = vec![true; token_ids.len()];
            of_last_tokens(fields, token_ids, &all, values)?
        }
        (None, None) => {
            return Err(Problem::new(
                "the record has neither `target_logprobs` nor `logprobs`",
                FORMS,
            ));
        }
    };
    Ok(vec![Parsed {
        token_ids: parsed.token_ids[..tokens].to_vec(),
        loss_mask: parsed.loss_mask[..tokens].to_vec(),
        rows: parsed.rows.into_iter().take(tokens).collect(),
    }])
}

/// A record whose tokens the chat template gives.
fn of_conversation(fields: &Fields, texts: &Texts<'_>) -> Result<Parsed> {
    let Some(values) = fields.get("logprobs") else {
        return Err(Problem::new("the record has no `input_ids`", FORMS));
    };
    let Some(spoken) = texts.conversation(fields)? else {
        return Err(Problem::new(
            "the record has neither `input_ids` nor `messages`",
            FORMS,
        ));
    };
    let parsed = of_last_tokens(fields, spoken.token_ids, &spoken.loss_mask, values)?;
    texts.check_fit(&parsed)?;
    Ok(parsed)
}

/// Tokens before the padding that `attention_mask` shows.
fn real_tokens(fields: &Fields, tokens: usize) -> Result<usize> {
    let Some(mask) = fields.get("attention_mask").and_then(Value::as_array) else {
        return Ok(tokens);
    };
    if mask.len() != tokens {
        return Err(Problem::new(
            format!(
                "`attention_mask` has {} entries for {tokens} token ids",
                mask.len()
            ),
            FORMS,
        ));
    }
    let flags: Vec<u64> = mask.iter().map(|flag| flag.as_u64().unwrap_or(0)).collect();
    let real = flags.iter().take_while(|flag| **flag == 1).count();
    if flags[real..].iter().any(|flag| *flag != 0) {
        return Err(Problem::new(
            "`attention_mask` is not 1 for the tokens and 0 for padding behind them",
            "import records before they are packed, padded on the right",
        ));
    }
    Ok(real)
}

fn prepared(fields: &Fields, token_ids: Vec<u32>, values: &Value) -> Result<Parsed> {
    let tokens = token_ids.len();
    let values = rows_of(values, "target_logprobs")?;
    let of_tokens = fields.get("target_token_ids").unwrap_or(&Value::Null);
    let of_tokens = rows_of(of_tokens, "target_token_ids")?;
    if values.len() != of_tokens.len() || !(tokens == values.len() || tokens == values.len() + 1) {
        return Err(Problem::new(
            format!(
                "{} rows of `target_logprobs`, {} of `target_token_ids`, {tokens} of `input_ids`",
                values.len(),
                of_tokens.len()
            ),
            "there is one row for each token, or for each but the last",
        ));
    }
    let used = match fields.get("target_mask").filter(|mask| !mask.is_null()) {
        Some(mask) => {
            let mask = rows_of(mask, "target_mask")?;
            if mask.len() != values.len() {
                return Err(Problem::new(
                    format!(
                        "{} rows of `target_mask` for {} of `target_logprobs`",
                        mask.len(),
                        values.len()
                    ),
                    FORMS,
                ));
            }
            mask.iter().map(is_used).collect()
        }
        None => vec![true; values.len()],
    };
    let mut rows = Vec::with_capacity(values.len());
    for (index, ((values, of_tokens), used)) in values.iter().zip(of_tokens).zip(&used).enumerate()
    {
        let row =
            zipped(values, of_tokens).map_err(|problem| problem.at(format!("row {index}")))?;
        rows.push(row.filter(|row| *used || is_plausible(row)));
    }
    // Without labels the mask says which rows predict a target.
    let mut loss_mask = targets(fields, tokens)?.unwrap_or_else(|| vec![true; tokens]);
    for (position, used) in used.iter().enumerate() {
        if let Some(target) = loss_mask.get_mut(position + 1) {
            *target &= used;
        }
    }
    Ok(Parsed {
        token_ids,
        loss_mask,
        rows,
    })
}

/// Rows of the last N tokens: row i is about the token itself.
/// Without labels those of them are targets that `spoken` \[T\] marks.
fn of_last_tokens(
    fields: &Fields,
    token_ids: Vec<u32>,
    spoken: &[bool],
    values: &Value,
) -> Result<Parsed> {
    let tokens = token_ids.len();
    let values = rows_of(values, "logprobs")?;
    if values.len() > tokens {
        return Err(Problem::new(
            format!("{} rows of `logprobs` for {tokens} token ids", values.len()),
            "there is one row for each of the last tokens; did the teacher read the conversation in another chat template (--chat-template)?",
        ));
    }
    let mut foreseen: Vec<Option<Row>> = match fields.get("target_token_ids") {
        Some(of_tokens) => {
            let of_tokens = rows_of(of_tokens, "target_token_ids")?;
            if of_tokens.len() != values.len() {
                return Err(Problem::new(
                    format!(
                        "{} rows of `target_token_ids` for {} of `logprobs`",
                        of_tokens.len(),
                        values.len()
                    ),
                    FORMS,
                ));
            }
            values
                .iter()
                .zip(of_tokens)
                .map(|(values, ids)| zipped(values, ids))
                .collect::<Result<_>>()?
        }
        None => values
            .iter()
            .map(|values| entries(values, Keys::Names))
            .collect::<Result<_>>()?,
    };
    let first = tokens - values.len();
    let loss_mask = match targets(fields, tokens)? {
        Some(mask) => mask,
        None => (0..tokens)
            .map(|position| position >= first && spoken[position])
            .collect(),
    };
    let mut before = vec![None; first];
    before.append(&mut foreseen);
    Ok(Parsed {
        token_ids,
        loss_mask,
        rows: before.into_iter().skip(1).collect(),
    })
}

fn rows_of<'a>(value: &'a Value, name: &str) -> Result<&'a [Value]> {
    value
        .as_array()
        .map(Vec::as_slice)
        .ok_or_else(|| Problem::new(format!("`{name}` is not a list"), FORMS))
}

/// A row's mask: one flag, or one for each entry.
fn is_used(mask: &Value) -> bool {
    let is_set = |flag: &Value| {
        flag.as_bool()
            .unwrap_or_else(|| flag.as_u64().unwrap_or(0) != 0)
    };
    match mask {
        Value::Array(flags) => flags.iter().any(is_set),
        flag => is_set(flag),
    }
}

/// Log-probabilities and token ids side by side; `None` where no entry has a probability.
fn zipped(values: &Value, of_tokens: &Value) -> Result<Option<Row>> {
    let (Some(values), Some(of_tokens)) = (values.as_array(), of_tokens.as_array()) else {
        return match (values, of_tokens) {
            (Value::Null, _) | (_, Value::Null) => Ok(None),
            _ => Err(Problem::new("it is not a list of entries", FORMS)),
        };
    };
    if values.len() != of_tokens.len() {
        return Err(Problem::new(
            format!(
                "{} log-probabilities for {} token ids",
                values.len(),
                of_tokens.len()
            ),
            "both hold K entries",
        ));
    }
    let mut row = Vec::with_capacity(values.len());
    for (value, id) in values.iter().zip(of_tokens) {
        let id = token_id(id, Keys::Ids).ok_or_else(|| {
            Problem::new(
                format!("{id} is no token id"),
                "token ids are whole numbers",
            )
        })?;
        if let Some(value) = number(Some(value))?.filter(|value| *value > NOTHING) {
            row.push((id, value));
        }
    }
    Ok((!row.is_empty()).then_some(row))
}

/// Whether a row that no target needs holds values at all: padding repeats a token, or is the even placeholder of an
/// exported cache.
fn is_plausible(row: &Row) -> bool {
    let mut ids: Vec<u32> = row.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    let is_flat = row.len() > 1 && row.iter().all(|(_, value)| *value == row[0].1);
    ids.windows(2).all(|pair| pair[0] != pair[1]) && !is_flat
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::chat::tests::with_texts;
    use serde_json::json;

    fn one(record: &Value) -> Parsed {
        let parsed = with_texts(None, |texts| sequences(record, texts))
            .map_err(|problem| problem.message)
            .unwrap();
        parsed.into_iter().next().unwrap()
    }

    #[test]
    fn a_prepared_row_is_about_the_next_token() {
        let parsed = one(&json!({
            "input_ids": [3, 5, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 5, 7, -100],
            "target_token_ids": [[5, 6], [7, 8], [0, 1], [0, 0]],
            "target_logprobs": [[-0.5, -1.5], [-0.25, -2.5], [null, null], [-1e9, -1e9]],
            "target_mask": [[1, 1], [1, 1], [0, 0], [0, 0]],
        }));
        assert_eq!(parsed.token_ids, [3, 5, 7]);
        assert_eq!(parsed.loss_mask, [false, true, true]);
        assert_eq!(
            parsed.rows,
            [
                Some(vec![(5, -0.5), (6, -1.5)]),
                Some(vec![(7, -0.25), (8, -2.5)]),
                None
            ]
        );
    }

    #[test]
    fn masked_rows_keep_values_and_give_no_target() {
        let parsed = one(&json!({
            "input_ids": [3, 5, 7], "target_token_ids": [[5, 6], [7, 8]],
            "target_logprobs": [[-0.5, -1.5], [-0.25, -2.5]], "target_mask": [0, 1],
        }));
        assert_eq!(parsed.loss_mask, [true, false, true]);
        assert!(parsed.rows[0].is_some());
    }

    #[test]
    fn rows_of_an_answer_are_about_its_tokens() {
        let expected = [None, Some(vec![(7, -0.25), (8, -2.5)])];
        let with_ids = one(
            &json!({"messages": [], "input_ids": [3, 5, 7], "logprobs": [[-0.25, -2.5]], "target_token_ids": [[7, 8]]}),
        );
        assert_eq!(with_ids.rows, expected);
        assert_eq!(with_ids.loss_mask, [false, false, true]);
        let older = one(
            &json!({"input_ids": [3, 5, 7], "logprobs": [[{"token": "token_id:7", "logprob": -0.25}, {"token": "token_id:8", "logprob": -2.5}]]}),
        );
        assert_eq!(older.rows, expected);
    }

    /// `w1 w10 … w3 w2 w20 w21 … w3`: the assistant says the numbers from 20 on and ends its turn.
    fn talk(answers: u32) -> Value {
        let words = |ids: std::ops::Range<u32>| {
            ids.map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ")
        };
        json!([{"role": "user", "content": words(10..14)}, {"role": "assistant", "content": words(20..20 + answers)}])
    }

    #[test]
    fn the_chat_template_gives_the_tokens_of_messages() {
        let said: Vec<u32> = (20..36).chain([3]).collect();
        let rows: Vec<[f32; 2]> = said.iter().map(|_| [-0.25, -2.5]).collect();
        let ids: Vec<[u32; 2]> = said.iter().map(|id| [*id, 40]).collect();
        let parsed = one(
            &json!({"messages": talk(16), "logprobs": rows, "target_token_ids": ids, "labels": null}),
        );
        let asked = [1, 10, 11, 12, 13, 3, 2];
        assert_eq!(parsed.token_ids, [&asked[..], &said].concat());
        let targets = parsed.loss_mask.iter().filter(|target| **target).count();
        assert_eq!(targets, said.len());
        assert!(parsed.rows[..6].iter().all(Option::is_none));
        assert_eq!(parsed.rows[6], Some(vec![(20, -0.25), (40, -2.5)]));
        let older: Vec<Value> = said
            .iter()
            .map(|id| json!([{"token": format!("token_id:{id}"), "logprob": -0.25}, {"token": "token_id:40", "logprob": -2.5}]))
            .collect();
        let older = one(&json!({"messages": talk(16), "logprobs": older}));
        assert_eq!(older.rows, parsed.rows);
    }

    #[test]
    fn values_of_another_conversation_are_refused() {
        let rows = vec![[-0.25, -2.5]; 17];
        let ids: Vec<[u32; 2]> = (20..37).map(|id| [id + 5, 41]).collect();
        let record = json!({"messages": talk(16), "logprobs": rows, "target_token_ids": ids});
        let problem = with_texts(None, |texts| sequences(&record, texts)).unwrap_err();
        assert!(
            problem.message.contains("about other tokens"),
            "{}",
            problem.message
        );
        assert!(problem.hint.contains("--chat-template"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |record: Value, part: &str| {
            let problem = with_texts(None, |texts| sequences(&record, texts));
            let problem = problem.unwrap_err().message;
            assert!(problem.contains(part), "{problem}");
        };
        refused(
            json!({"messages": [], "logprobs": []}),
            "`messages` is empty",
        );
        refused(json!({"messages": []}), "no `input_ids`");
        refused(
            json!({"logprobs": []}),
            "neither `input_ids` nor `messages`",
        );
        refused(json!({"input_ids": [1, 2]}), "neither");
        refused(
            json!({"input_ids": [1, 2], "target_logprobs": [], "target_token_ids": []}),
            "0 rows",
        );
        refused(
            json!({"input_ids": [1, 2], "target_logprobs": [[-1.0]], "target_token_ids": [[1, 2]]}),
            "row 0: 1 log-probabilities for 2",
        );
        refused(
            json!({"input_ids": [1, 2], "attention_mask": [0, 1], "logprobs": []}),
            "attention_mask",
        );
        refused(json!({"input_ids": [1], "logprobs": [[], []]}), "2 rows");
    }
}
