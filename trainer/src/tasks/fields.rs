//! From a line of a task file to an item: prepared forms, and the harness's own dataset fields with
//! the prompts of lm-evaluation-harness 0.4.13.

use serde_json::Value;

use super::{Item, Task};

type Parsed<T> = std::result::Result<T, String>;

/// An item, or what is wrong with the line.
pub(super) fn item(task: Task, line: &Value) -> Parsed<Item> {
    let item = if line.get("query").is_some() {
        let choices = strings(line, "choices")?;
        chosen(text(line, "query")?, &choices, index(line, "gold")?)
    } else if line.get("contexts").is_some() {
        let contexts = strings(line, "contexts")?;
        let continuation = text(line, "continuation")?;
        continued(&contexts, continuation, index(line, "gold")?)
    } else if line.get("context").is_some() && line.get("continuation").is_some() {
        last_word(text(line, "context")?, text(line, "continuation")?)
    } else {
        from_dataset(task, line)?
    };
    if item.requests.is_empty() || item.gold >= item.requests.len() {
        return Err(format!(
            "the right choice has index {}, and there are {} choices",
            item.gold,
            item.requests.len()
        ));
    }
    Ok(item)
}

fn from_dataset(task: Task, line: &Value) -> Parsed<Item> {
    let of = |key| text(line, key);
    match task {
        Task::OpenBookQa => lettered(of("question_stem")?, line),
        Task::ArcEasy | Task::ArcChallenge => {
            lettered(&format!("Question: {}\nAnswer:", of("question")?), line)
        }
        Task::Piqa => Ok(chosen(
            &format!("Question: {}\nAnswer:", of("goal")?),
            &[of("sol1")?, of("sol2")?],
            index(line, "label")?,
        )),
        Task::BoolQ => {
            let gold = match line.get("answer").and_then(Value::as_bool) {
                Some(answer) => usize::from(answer),
                None => index(line, "label")?,
            };
            let query = format!(
                "{}\nQuestion: {}?\nAnswer:",
                of("passage")?,
                of("question")?
            );
            Ok(chosen(&query, &["no", "yes"], gold))
        }
        Task::Qnli => Ok(chosen(
            &format!(
                "{}\n{}\nQuestion: Does this response answer the question?\nAnswer:",
                of("question")?,
                of("sentence")?
            ),
            &["yes", "no"],
            index(line, "label")?,
        )),
        Task::Qqp => Ok(chosen(
            &format!(
                "Question 1: {}\nQuestion 2: {}\nQuestion: Do both questions ask the same thing?\nAnswer:",
                of("question1")?,
                of("question2")?
            ),
            &["no", "yes"],
            index(line, "label")?,
        )),
        Task::Sst2 => Ok(chosen(
            &format!(
                "{}\nQuestion: Is this sentence positive or negative?\nAnswer:",
                of("sentence")?
            ),
            &["negative", "positive"],
            index(line, "label")?,
        )),
        Task::HellaSwag => {
            let context = format!("{} {}", of("ctx_a")?, capitalized(of("ctx_b")?));
            let query = cleaned(format!("{}: {context}", of("activity_label")?));
            let endings: Vec<String> = strings(line, "endings")?.into_iter().map(cleaned).collect();
            let endings: Vec<&str> = endings.iter().map(String::as_str).collect();
            Ok(chosen(&query, &endings, index(line, "label")?))
        }
        Task::WinoGrande => {
            let (before, after) = of("sentence")?
                .split_once('_')
                .ok_or("`sentence` has no blank `_`")?;
            let contexts =
                [of("option1")?, of("option2")?].map(|option| format!("{before}{option}"));
            let contexts: Vec<&str> = contexts.iter().map(String::as_str).collect();
            let gold = index(line, "answer")?.checked_sub(1);
            Ok(continued(
                &contexts,
                after.trim(),
                gold.ok_or("`answer` must be 1 or 2")?,
            ))
        }
        Task::Lambada => {
            let (context, word) = of("text")?
                .rsplit_once(' ')
                .ok_or("`text` has only one word")?;
            Ok(last_word(context, word))
        }
    }
}

/// Each choice after the query.
fn chosen(query: &str, choices: &[&str], gold: usize) -> Item {
    Item {
        requests: choices
            .iter()
            .map(|choice| (query.to_owned(), format!(" {choice}")))
            .collect(),
        lengths: choices
            .iter()
            .map(|choice| choice.chars().count())
            .collect(),
        gold,
    }
}

/// One continuation after each context.
fn continued(contexts: &[&str], continuation: &str, gold: usize) -> Item {
    Item {
        requests: contexts
            .iter()
            .map(|context| ((*context).to_owned(), format!(" {continuation}")))
            .collect(),
        lengths: vec![continuation.chars().count(); contexts.len()],
        gold,
    }
}

fn last_word(context: &str, word: &str) -> Item {
    continued(&[context], word, 0)
}

/// Choices with letters or numbers as labels, the right one named by its label.
fn lettered(query: &str, line: &Value) -> Parsed<Item> {
    let choices = line.get("choices").ok_or("`choices` is missing")?;
    let (texts, labels) = (strings(choices, "text")?, strings(choices, "label")?);
    let answer = text(line, "answerKey")?.trim();
    let gold = labels.iter().position(|label| *label == answer);
    Ok(chosen(
        query,
        &texts,
        gold.ok_or_else(|| format!("`answerKey` is {answer:?}, the labels are {labels:?}"))?,
    ))
}

/// The first letter in upper case and all others in lower case, as the harness prepares `ctx_b`.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first
            .to_uppercase()
            .chain(letters.flat_map(char::to_lowercase))
            .collect(),
        None => String::new(),
    }
}

/// HellaSwag's text without WikiHow's marks: ` [title]` ends a sentence, other bracketed tags go,
/// double spaces become one.
fn cleaned(text: impl AsRef<str>) -> String {
    let text = text.as_ref().trim().replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        kept.push_str(&rest[..open]);
        let tag = &rest[open..];
        // As the harness's pattern, a tag doesn't span lines.
        let close = tag.find(']').filter(|&close| !tag[..close].contains('\n'));
        let taken = close.map_or(1, |close| close + 1);
        if close.is_none() {
            kept.push('[');
        }
        rest = &tag[taken..];
    }
    kept.push_str(rest);
    kept.replace("  ", " ")
}

fn text<'a>(line: &'a Value, key: &str) -> Parsed<&'a str> {
    match line.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("`{key}` is not a string")),
        None => Err(format!("`{key}` is missing")),
    }
}

fn strings<'a>(line: &'a Value, key: &str) -> Parsed<Vec<&'a str>> {
    let list = line.get(key).and_then(Value::as_array);
    list.ok_or_else(|| format!("`{key}` is missing or not a list"))?
        .iter()
        .map(|value| {
            value
                .as_str()
                .ok_or_else(|| format!("`{key}` holds something that is not a string"))
        })
        .collect()
}

/// A number, or a string that holds one.
fn index(line: &Value, key: &str) -> Parsed<usize> {
    let value = line.get(key).ok_or_else(|| format!("`{key}` is missing"))?;
    let number = match value {
        Value::String(text) => text.trim().parse().ok(),
        other => other.as_u64().map(|number| number as usize),
    };
    number.ok_or_else(|| format!("`{key}` is {value}, not an index"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(task: Task, line: &Value, requests: &[(&str, &str)], gold: usize) {
        let item = item(task, line).unwrap();
        let got: Vec<(&str, &str)> = item
            .requests
            .iter()
            .map(|(context, continuation)| (context.as_str(), continuation.as_str()))
            .collect();
        assert_eq!((got.as_slice(), item.gold), (requests, gold), "{task:?}");
    }

    #[test]
    fn prompts_are_the_harness_ones() {
        let arc = json!({"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"});
        let asked = "Question: Why?\nAnswer:";
        check(Task::ArcEasy, &arc, &[(asked, " x"), (asked, " y")], 1);
        let wino = json!({"sentence": "The _ is red .", "option1": "cat", "option2": "dog", "answer": "2"});
        check(
            Task::WinoGrande,
            &wino,
            &[("The cat", " is red ."), ("The dog", " is red .")],
            1,
        );
        let swag = json!({"activity_label": "Baking", "ctx_a": "A cook [header] stirs", "ctx_b": "HE smiles",
            "endings": ["and [substeps] eats", "stops [title] Next"], "label": "0"});
        let context = "Baking: A cook stirs He smiles";
        check(
            Task::HellaSwag,
            &swag,
            &[(context, " and eats"), (context, " stops. Next")],
            0,
        );
        let boolq = json!({"passage": "P", "question": "q", "answer": true});
        let asked = "P\nQuestion: q?\nAnswer:";
        check(Task::BoolQ, &boolq, &[(asked, " no"), (asked, " yes")], 1);
        check(
            Task::Lambada,
            &json!({"text": "one two three"}),
            &[("one two", " three")],
            0,
        );
    }

    #[test]
    fn prepared_forms_and_bad_lines() {
        let query = json!({"query": "Q", "choices": ["a", "bc"], "gold": 1});
        check(Task::Piqa, &query, &[("Q", " a"), ("Q", " bc")], 1);
        let word = json!({"context": "C", "continuation": "w"});
        check(Task::Lambada, &word, &[("C", " w")], 0);
        for (line, message) in [
            (
                json!({"query": "Q", "choices": ["a"], "gold": 1}),
                "there are 1 choices",
            ),
            (
                json!({"query": "Q", "choices": "a", "gold": 0}),
                "`choices`",
            ),
            (json!({"goal": "g"}), "`sol1` is missing"),
            (json!([]), "`goal` is missing"),
        ] {
            let error = item(Task::Piqa, &line).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
