//! What inference servers return for a prompt: vLLM, SGLang, and the OpenAI completions form.
//!
//! | server | where | entry i is about |
//! |---|---|---|
//! | vLLM | `prompt_logprobs` [P], first null; `{id: {logprob, rank, decoded_token}}` | token i of the prompt |
//! | vLLM, generated | `logprobs` [G] beside `token_ids`, in `outputs[0]` of a saved request | token i of the answer |
//! | SGLang | `meta_info.input_top_logprobs` [P], first null; `[[logprob, id, text], …]` | token i of the prompt |
//! | SGLang, generated | `meta_info.output_top_logprobs` [G] | token i of the answer |
//! | OpenAI completions with `echo` | `choices[].logprobs.top_logprobs`, first null; `{"token_id:5": logprob}` | `tokens[i]` |
//! | OpenAI chat, generated | `choices[].logprobs.content[].top_logprobs` | token i of the answer |
//!
//! All of them tell of a token what was known before it, so entry i belongs to position i − 1 of the cache. vLLM gives
//! the prompt's own token beside the k largest, whatever its rank; an entry whose rank is beyond the number of entries
//! is such a one and is left out.

use serde_json::Value;

use super::foreign::{Problem, Row};
use super::jsonl::{Fields, Parsed, entries, ids, targets};

type Result<T> = std::result::Result<T, Problem>;

/// Tokens with what was known before each: entry i is about token i.
#[derive(Default)]
struct Foreseen {
    tokens: Vec<u32>,
    before: Vec<Option<Row>>,
}

const IDS_HINT: &str = "keep the token ids beside the log-probabilities: vLLM returns `prompt_token_ids` with \
                        `return_token_ids`, or put them into the record as `input_ids`";

/// The sequences of one record: a saved request, a response, or a list of them.
pub(crate) fn sequences(record: &Value) -> Result<Vec<Parsed>> {
    match record {
        Value::Array(list) => {
            let nested: Result<Vec<Vec<Parsed>>> = list.iter().map(sequences).collect();
            Ok(nested?.into_iter().flatten().collect())
        }
        Value::Object(fields) => of_object(fields),
        _ => Err(Problem::new(
            "not a JSON object",
            "a record is one server response, or a list of them",
        )),
    }
}

fn of_object(fields: &Fields) -> Result<Vec<Parsed>> {
    let list = |name: &str| {
        fields
            .get(name)
            .and_then(Value::as_array)
            .filter(|list| !list.is_empty())
    };
    if let Some(choices) = list("choices") {
        let is_one = choices.len() == 1;
        return choices
            .iter()
            .map(|choice| {
                let choice = choice.as_object().ok_or_else(|| {
                    Problem::new(
                        "a choice is not a JSON object",
                        "is this a server response?",
                    )
                })?;
                // A chat response keeps the prompt's values beside its choices.
                let outer = if is_one { Some(fields) } else { None };
                of_choice(choice, outer, fields)
            })
            .collect();
    }
    if let Some(meta) = fields.get("meta_info").and_then(Value::as_object) {
        return Ok(vec![of_sglang(meta, fields)?]);
    }
    let output = list("outputs").and_then(|outputs| outputs[0].as_object());
    if list("outputs").is_some_and(|outputs| outputs.len() > 1) {
        return Err(Problem::new(
            "the request has several outputs",
            "save one output a record (n = 1): each continues the prompt in its own way",
        ));
    }
    Ok(vec![of_choice(
        output.unwrap_or(fields),
        Some(fields),
        fields,
    )?])
}

/// vLLM's fields, in `choice` or beside it.
fn of_choice(choice: &Fields, outer: Option<&Fields>, record: &Fields) -> Result<Parsed> {
    let find = |name: &str| {
        let inside = choice.get(name);
        inside
            .or_else(|| outer.and_then(|outer| outer.get(name)))
            .filter(|value| !value.is_null())
    };
    let logprobs = choice.get("logprobs").filter(|value| !value.is_null());
    if find("prompt_logprobs").is_none()
        && let Some(echoed) = logprobs.and_then(echoed)
    {
        return finish(echoed?, record);
    }
    let given = find("prompt_token_ids").or_else(|| record.get("input_ids"));
    let Some(given) = given else {
        return Err(Problem::new(
            "the record has no `prompt_token_ids`",
            IDS_HINT,
        ));
    };
    let prompt = ids(given, "prompt_token_ids")?;
    let mut foreseen = match find("prompt_logprobs") {
        Some(values) => with_entries(
            prompt,
            list_of(values, "prompt_logprobs")?,
            "prompt_logprobs",
        )?,
        None => Foreseen {
            before: vec![None; prompt.len()],
            tokens: prompt,
        },
    };
    let generated = choice
        .get("token_ids")
        .or_else(|| choice.get("output_token_ids"));
    if let (Some(generated), Some(logprobs)) = (generated, logprobs) {
        let generated = ids(generated, "token_ids")?;
        let answer = match logprobs.get("content").and_then(Value::as_array) {
            Some(content) => {
                let tops: Vec<Value> = content
                    .iter()
                    .map(|token| token["top_logprobs"].clone())
                    .collect();
                with_entries(generated, &tops, "logprobs.content")?
            }
            None => match logprobs.get("top_logprobs") {
                Some(tops) => {
                    with_entries(generated, list_of(tops, "top_logprobs")?, "top_logprobs")?
                }
                None => with_entries(generated, list_of(logprobs, "logprobs")?, "logprobs")?,
            },
        };
        foreseen.tokens.extend(answer.tokens);
        foreseen.before.extend(answer.before);
    }
    if foreseen.before.iter().all(Option::is_none) {
        return Err(Problem::new(
            "the record holds no log-probabilities",
            "ask the server for `prompt_logprobs` (vLLM) or `top_logprobs_num` (SGLang)",
        ));
    }
    finish(foreseen, record)
}

/// The OpenAI form with `echo`, where the tokens themselves are ids; `None` in other forms.
fn echoed(logprobs: &Value) -> Option<Result<Foreseen>> {
    let tokens = logprobs.get("tokens")?;
    let tops = logprobs.get("top_logprobs")?.as_array()?;
    // Echoed or not, the first token of a prompt has no value.
    tops.first().filter(|first| first.is_null())?;
    Some(
        ids(tokens, "tokens")
            .map_err(|problem| {
                Problem::new(
                    problem.problem,
                    "have the server name tokens by id: vLLM with --return-tokens-as-token-ids",
                )
            })
            .and_then(|tokens| with_entries(tokens, tops, "top_logprobs")),
    )
}

fn of_sglang(meta: &Fields, record: &Fields) -> Result<Parsed> {
    let list = |name: &str| meta.get(name).filter(|value| !value.is_null());
    let Some(values) = list("input_top_logprobs") else {
        return Err(Problem::new(
            "`meta_info` has no `input_top_logprobs`",
            "ask SGLang with return_logprob, top_logprobs_num and logprob_start_len 0",
        ));
    };
    let prompt = match (record.get("input_ids"), list("input_token_logprobs")) {
        (Some(given), _) => ids(given, "input_ids")?,
        (None, Some(tokens)) => own_ids(tokens, "input_token_logprobs")?,
        (None, None) => return Err(Problem::new("the record has no token ids", IDS_HINT)),
    };
    let mut foreseen = with_entries(
        prompt,
        list_of(values, "input_top_logprobs")?,
        "input_top_logprobs",
    )?;
    if let (Some(values), Some(tokens)) =
        (list("output_top_logprobs"), list("output_token_logprobs"))
    {
        let tokens = own_ids(tokens, "output_token_logprobs")?;
        let answer = with_entries(
            tokens,
            list_of(values, "output_top_logprobs")?,
            "output_top_logprobs",
        )?;
        foreseen.tokens.extend(answer.tokens);
        foreseen.before.extend(answer.before);
    }
    finish(foreseen, record)
}

/// The ids of `[[logprob, id, text], …]`.
fn own_ids(tokens: &Value, name: &str) -> Result<Vec<u32>> {
    let list = list_of(tokens, name)?;
    let ids_of: Vec<Value> = list.iter().map(|token| token[1].clone()).collect();
    ids(&Value::Array(ids_of), name)
}

fn list_of<'a>(value: &'a Value, name: &str) -> Result<&'a [Value]> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| {
        Problem::new(
            format!("`{name}` is not a list"),
            "is this a server response?",
        )
    })
}

fn with_entries(tokens: Vec<u32>, values: &[Value], name: &str) -> Result<Foreseen> {
    if tokens.len() != values.len() {
        return Err(Problem::new(
            format!(
                "`{name}` has {} entries for {} token ids",
                values.len(),
                tokens.len()
            ),
            "each token needs one, the first of a prompt null",
        ));
    }
    let before: Result<Vec<Option<Row>>> = values.iter().map(entries).collect();
    Ok(Foreseen {
        tokens,
        before: before?,
    })
}

fn finish(foreseen: Foreseen, record: &Fields) -> Result<Parsed> {
    let tokens = foreseen.tokens.len();
    let loss_mask = targets(record, tokens)?.unwrap_or_else(|| vec![true; tokens]);
    Ok(Parsed {
        token_ids: foreseen.tokens,
        loss_mask,
        rows: foreseen.before.into_iter().skip(1).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Tokens 3, 5, 7: 5 was foreseen as 5 or 6, 7 as 7 or 8.
    fn check(record: &Value) {
        let parsed = sequences(record)
            .map_err(|problem| problem.problem)
            .unwrap();
        assert_eq!(parsed.len(), 1, "{record}");
        assert_eq!(parsed[0].token_ids, [3, 5, 7], "{record}");
        assert_eq!(
            parsed[0].rows,
            [
                Some(vec![(5, -0.5), (6, -1.5)]),
                Some(vec![(7, -0.25), (8, -2.5)])
            ],
            "{record}"
        );
    }

    #[test]
    fn every_server_puts_a_token_s_values_before_it() {
        let vllm = json!([null, {"5": {"logprob": -0.5, "rank": 1}, "6": {"logprob": -1.5, "rank": 2}},
                          {"7": {"logprob": -0.25, "rank": 1}, "8": {"logprob": -2.5, "rank": 2}}]);
        check(&json!({"prompt_token_ids": [3, 5, 7], "prompt_logprobs": vllm}));
        check(&json!({"input_ids": [3, 5, 7], "prompt_logprobs": vllm}));
        check(
            &json!({"model": "m", "choices": [{"index": 0, "text": "x", "prompt_token_ids": [3, 5, 7], "prompt_logprobs": vllm, "logprobs": null, "token_ids": [9]}]}),
        );
        check(
            &json!({"prompt_token_ids": [3, 5, 7], "prompt_logprobs": vllm, "choices": [{"message": {}, "logprobs": null}]}),
        );
        check(
            &json!({"prompt_token_ids": [3, 5], "prompt_logprobs": [vllm[0], vllm[1]],
                      "outputs": [{"token_ids": [7], "logprobs": [vllm[2]]}]}),
        );
        check(
            &json!({"prompt_token_ids": [3, 5], "prompt_logprobs": [vllm[0], vllm[1]],
                      "choices": [{"token_ids": [7], "logprobs": {"content": [{"token": "token_id:7", "logprob": -0.25,
                        "top_logprobs": [{"token": "token_id:7", "logprob": -0.25}, {"token": "token_id:8", "logprob": -2.5}]}]}}]}),
        );
        check(
            &json!({"choices": [{"logprobs": {"tokens": ["token_id:3", "token_id:5", "token_id:7"], "token_logprobs": [null, -0.5, -0.25],
                      "top_logprobs": [null, {"token_id:5": -0.5, "token_id:6": -1.5}, {"token_id:7": -0.25, "token_id:8": -2.5}]}}]}),
        );
        check(&json!({"text": "", "meta_info": {
            "input_token_logprobs": [[null, 3, null], [-0.5, 5, null], [-0.25, 7, null]],
            "input_top_logprobs": [null, [[-0.5, 5, null], [-1.5, 6, null]], [[-0.25, 7, null], [-2.5, 8, null]]]}}));
        check(&json!([{"input_ids": [3, 5], "meta_info": {
            "input_top_logprobs": [null, [[-0.5, 5, "a"], [-1.5, 6, "b"]]],
            "output_token_logprobs": [[-0.25, 7, "c"]],
            "output_top_logprobs": [[[-0.25, 7, "c"], [-2.5, 8, "d"]]]}}]));
    }

    #[test]
    fn several_choices_are_several_sequences() {
        let choice =
            |id: u32| json!({"prompt_token_ids": [id, 5], "prompt_logprobs": [null, {"5": -0.5}]});
        let parsed = sequences(&json!({"choices": [choice(1), choice(2)]})).unwrap();
        assert_eq!(
            parsed
                .iter()
                .map(|parsed| parsed.token_ids[0])
                .collect::<Vec<_>>(),
            [1, 2]
        );
    }

    #[test]
    fn what_cannot_be_placed_is_refused() {
        let refused = |record: Value, part: &str| {
            let problem = sequences(&record).unwrap_err().problem;
            assert!(problem.contains(part), "{problem}");
        };
        refused(
            json!({"prompt_logprobs": [null, {"5": -0.5}]}),
            "no `prompt_token_ids`",
        );
        refused(
            json!({"input_ids": [1], "prompt_logprobs": [null, {"5": -0.5}]}),
            "2 entries for 1 token ids",
        );
        refused(json!({"input_ids": [1, 2]}), "no log-probabilities");
        refused(
            json!({"input_ids": [1, 2], "prompt_logprobs": 3}),
            "not a list",
        );
        refused(json!({"meta_info": {}}), "no `input_top_logprobs`");
        refused(json!(7), "not a JSON object");
        refused(
            json!({"input_ids": [1, 2], "labels": [1], "prompt_logprobs": [null, {"5": -0.5}]}),
            "1 entries for 2",
        );
    }
}
