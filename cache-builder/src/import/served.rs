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
//!
//! Where the token ids of the prompt were not asked for, but its `messages` or its text `prompt` stand in the record,
//! the tokenizer gives them: there must be as many as entries, and they must fit these.

use serde_json::Value;

use super::chat::{Spoken, Texts};
use super::foreign::Row;
use super::jsonl::{Fields, Keys, Parsed, entries, ids, ids_as, targets};
use crate::data::Problem;

type Result<T> = std::result::Result<T, Problem>;

/// Tokens with what was known before each: entry i is about token i.
#[derive(Default)]
struct Foreseen {
    tokens: Vec<u32>,
    before: Vec<Option<Row>>,
    targets: Vec<bool>,
}

impl Foreseen {
    fn append(&mut self, mut answer: Foreseen) {
        self.tokens.append(&mut answer.tokens);
        self.before.append(&mut answer.before);
        self.targets.append(&mut answer.targets);
    }
}

const IDS_HINT: &str = "keep the token ids beside the log-probabilities: vLLM returns `prompt_token_ids` with \
                        `return_token_ids`; or put them into the record as `input_ids`, or the `messages` that the \
                        server was asked with";

const NAMES_HINT: &str =
    "have the server name tokens by id: vLLM with --return-tokens-as-token-ids";

/// The sequences of one record: a saved request, a response, or a list of them.
pub(crate) fn sequences(record: &Value, texts: &Texts<'_>) -> Result<Vec<Parsed>> {
    match record {
        Value::Array(list) => {
            let nested: Result<Vec<Vec<Parsed>>> =
                list.iter().map(|record| sequences(record, texts)).collect();
            Ok(nested?.into_iter().flatten().collect())
        }
        Value::Object(fields) => of_object(fields, texts),
        _ => Err(Problem::new(
            "not a JSON object",
            "a record is one server response, or a list of them",
        )),
    }
}

fn of_object(fields: &Fields, texts: &Texts<'_>) -> Result<Vec<Parsed>> {
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
                of_choice(choice, outer, fields, texts)
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
        texts,
    )?])
}

/// vLLM's fields, in `choice` or beside it.
fn of_choice(
    choice: &Fields,
    outer: Option<&Fields>,
    record: &Fields,
    texts: &Texts<'_>,
) -> Result<Parsed> {
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
    let prompt = match given {
        Some(given) => spoken(ids(given, "prompt_token_ids")?),
        None => texts
            .asked(record)?
            .ok_or_else(|| Problem::new("the record has no `prompt_token_ids`", IDS_HINT))?,
    };
    let values = match find("prompt_logprobs") {
        Some(values) => list_of(values, "prompt_logprobs")?,
        None => &vec![Value::Null; prompt.token_ids.len()],
    };
    let by_template = if given.is_some() {
        ""
    } else {
        " that the tokenizer makes of the record's text"
    };
    let mut foreseen = with_entries(prompt, values, "prompt_logprobs", Keys::Ids)
        .map_err(|problem| Problem::new(problem.message + by_template, problem.hint))?;
    if let Some(logprobs) = logprobs
        && let Some(answer) = answer(choice, logprobs, find("prompt_logprobs").is_some())?
    {
        foreseen.append(answer);
    }
    if foreseen.before.iter().all(Option::is_none) {
        return Err(Problem::new(
            "the record holds no log-probabilities",
            "ask the server for `prompt_logprobs` (vLLM) or `top_logprobs_num` (SGLang)",
        ));
    }
    let parsed = finish(foreseen, record)?;
    if given.is_none() {
        texts.check_fit(&parsed)?;
    }
    Ok(parsed)
}

/// Tokens that all are targets.
fn spoken(token_ids: Vec<u32>) -> Spoken {
    Spoken {
        loss_mask: vec![true; token_ids.len()],
        token_ids,
    }
}

/// What the model said; `None` where its tokens have no ids and the prompt has values enough to go without.
fn answer(choice: &Fields, logprobs: &Value, is_optional: bool) -> Result<Option<Foreseen>> {
    let given = choice
        .get("token_ids")
        .or_else(|| choice.get("output_token_ids"))
        .filter(|value| !value.is_null());
    let content = logprobs.get("content").and_then(Value::as_array);
    let names = || match content {
        Some(content) => Some(content.iter().map(|token| token["token"].clone()).collect()),
        None => logprobs.get("tokens").cloned(),
    };
    let token_ids = match given {
        Some(given) => ids(given, "token_ids")?,
        None => match names() {
            Some(names) => match named_ids(&names) {
                Err(_) if is_optional => return Ok(None),
                ids => ids?,
            },
            None => return Ok(None),
        },
    };
    let said = spoken(token_ids);
    if let Some(content) = content {
        let tops: Vec<Value> = content
            .iter()
            .map(|token| token["top_logprobs"].clone())
            .collect();
        return with_entries(said, &tops, "logprobs.content", Keys::Names).map(Some);
    }
    match logprobs.get("top_logprobs") {
        Some(tops) => {
            let tops = list_of(tops, "top_logprobs")?;
            with_entries(said, tops, "top_logprobs", Keys::Names)
        }
        None => with_entries(said, list_of(logprobs, "logprobs")?, "logprobs", Keys::Ids),
    }
    .map(Some)
}

fn named_ids(names: &Value) -> Result<Vec<u32>> {
    ids_as(names, "tokens", Keys::Names)
        .map_err(|problem| Problem::new(problem.message, NAMES_HINT))
}

/// The OpenAI form with `echo`, where the tokens themselves are ids; `None` in other forms.
fn echoed(logprobs: &Value) -> Option<Result<Foreseen>> {
    let tokens = logprobs.get("tokens")?;
    let tops = logprobs.get("top_logprobs")?.as_array()?;
    // Echoed or not, the first token of a prompt has no value.
    tops.first().filter(|first| first.is_null())?;
    Some(
        named_ids(tokens)
            .and_then(|tokens| with_entries(spoken(tokens), tops, "top_logprobs", Keys::Names)),
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
        spoken(prompt),
        list_of(values, "input_top_logprobs")?,
        "input_top_logprobs",
        Keys::Ids,
    )?;
    if let (Some(values), Some(tokens)) =
        (list("output_top_logprobs"), list("output_token_logprobs"))
    {
        let tokens = own_ids(tokens, "output_token_logprobs")?;
        foreseen.append(with_entries(
            spoken(tokens),
            list_of(values, "output_top_logprobs")?,
            "output_top_logprobs",
            Keys::Ids,
        )?);
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

fn with_entries(said: Spoken, values: &[Value], name: &str, keys: Keys) -> Result<Foreseen> {
    let tokens = said.token_ids.len();
    if tokens != values.len() {
        return Err(Problem::new(
            format!(
                "`{name}` has {} entries for {tokens} token ids",
                values.len()
            ),
            "each token needs one, the first of a prompt null",
        ));
    }
    let before: Result<Vec<Option<Row>>> =
        values.iter().map(|value| entries(value, keys)).collect();
    Ok(Foreseen {
        tokens: said.token_ids,
        before: before?,
        targets: said.loss_mask,
    })
}

fn finish(foreseen: Foreseen, record: &Fields) -> Result<Parsed> {
    let given = targets(record, foreseen.tokens.len())?;
    Ok(Parsed {
        loss_mask: given.unwrap_or(foreseen.targets),
        token_ids: foreseen.tokens,
        rows: foreseen.before.into_iter().skip(1).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::chat::tests::with_texts;
    use serde_json::json;

    /// Tokens 3, 5, 7: 5 was foreseen as 5 or 6, 7 as 7 or 8.
    fn check(record: &Value) {
        let parsed = with_texts(None, |texts| sequences(record, texts))
            .map_err(|problem| problem.message)
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
        let record = json!({"choices": [choice(1), choice(2)]});
        let parsed = with_texts(None, |texts| sequences(&record, texts)).unwrap();
        assert_eq!(
            parsed
                .iter()
                .map(|parsed| parsed.token_ids[0])
                .collect::<Vec<_>>(),
            [1, 2]
        );
    }

    /// Entries of a prompt of these tokens.
    fn foreseen(tokens: &[u32]) -> Vec<Value> {
        let entry = |id: &u32| json!({id.to_string(): {"logprob": -0.5, "rank": 1}, "40": {"logprob": -2.0, "rank": 2}});
        std::iter::once(Value::Null)
            .chain(tokens[1..].iter().map(entry))
            .collect()
    }

    #[test]
    fn the_tokenizer_gives_the_tokens_that_were_not_asked_for() {
        let words: Vec<String> = (10..30).map(|id| format!("w{id}")).collect();
        let (text, said): (String, Vec<u32>) = (words.join(" "), (10..30).collect());
        let parse = |record: &Value| {
            let parsed = with_texts(None, |texts| sequences(record, texts));
            parsed.map(|mut parsed| parsed.remove(0))
        };
        let prompt = parse(&json!({"prompt": text, "prompt_logprobs": foreseen(&said)})).unwrap();
        assert_eq!(prompt.token_ids, said);
        assert!(prompt.loss_mask.iter().all(|target| *target));

        // A question, its answer header, and what the model said to it.
        let asked: Vec<u32> = [&[1][..], &said, &[3, 2]].concat();
        let answer = json!([{"token": "token_id:31", "logprob": -0.1, "top_logprobs": [{"token": "token_id:31", "logprob": -0.1}]}]);
        let question = json!([{"role": "user", "content": text}]);
        let chat = parse(
            &json!({"messages": question, "prompt_logprobs": foreseen(&asked),
            "choices": [{"message": {"content": "w31"}, "logprobs": {"content": answer}}]}),
        )
        .unwrap();
        assert_eq!(chat.token_ids, [&asked[..], &[31]].concat());
        assert_eq!(chat.loss_mask.iter().filter(|target| **target).count(), 1);
        assert_eq!(chat.rows.last(), Some(&Some(vec![(31, -0.1)])));

        // A whole conversation as the prompt: the assistant's turns are learned.
        let both =
            json!([{"role": "user", "content": "w5"}, {"role": "assistant", "content": text}]);
        let whole: Vec<u32> = [&[1, 5, 3, 2][..], &said, &[3]].concat();
        let chat = parse(&json!({"messages": both, "prompt_logprobs": foreseen(&whole)})).unwrap();
        assert_eq!(chat.loss_mask.iter().filter(|target| **target).count(), 21);

        let fewer = parse(&json!({"prompt": text, "prompt_logprobs": foreseen(&said[1..])}));
        let problem = fewer.unwrap_err().message;
        assert!(
            problem.contains("19 entries for 20 token ids that the tokenizer"),
            "{problem}"
        );
        let other: Vec<u32> = said.iter().map(|id| id + 4).collect();
        let problem =
            parse(&json!({"prompt": text, "prompt_logprobs": foreseen(&other)})).unwrap_err();
        assert!(
            problem.message.contains("about other tokens"),
            "{}",
            problem.message
        );
    }

    #[test]
    fn an_answer_without_ids_is_left_out_behind_a_prompt_with_values() {
        let named = json!({"tokens": [" the"], "top_logprobs": [{" the": -0.1}]});
        let prompt = json!([null, {"5": {"logprob": -0.5, "rank": 1}}]);
        let record = json!({"prompt_token_ids": [3, 5], "choices": [{"prompt_logprobs": prompt, "prompt_token_ids": [3, 5], "logprobs": named}]});
        let parsed = with_texts(None, |texts| sequences(&record, texts)).unwrap();
        assert_eq!(parsed[0].token_ids, [3, 5]);
        let record = json!({"choices": [{"prompt_token_ids": [3, 5], "logprobs": named}]});
        let problem = with_texts(None, |texts| sequences(&record, texts)).unwrap_err();
        assert!(
            problem.hint.contains("return-tokens-as-token-ids"),
            "{}",
            problem.hint
        );
    }

    #[test]
    fn what_cannot_be_placed_is_refused() {
        let refused = |record: Value, part: &str| {
            let problem = with_texts(None, |texts| sequences(&record, texts));
            let problem = problem.unwrap_err().message;
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
