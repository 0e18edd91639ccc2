//! Wikitext's pages and their detokenised form, with the rules of lm-evaluation-harness 0.4.13
//! (`preprocess_wikitext.py`), which undo the spaces that wikitext puts around punctuation.

use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// The pages of a file: those of JSONL lines, or of running text.
pub(crate) fn pages(path: &Path, text: &str) -> Result<Vec<String>> {
    if path
        .extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("jsonl"))
    {
        let lines = text.lines().enumerate();
        return lines
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(number, line)| {
                let bad = |message: String| Error::BadItem {
                    path: path.to_owned(),
                    line: number + 1,
                    task: "wikitext",
                    message,
                };
                let value: Value =
                    serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
                let page = value.get("page").and_then(Value::as_str);
                page.map(str::to_owned)
                    .ok_or_else(|| bad("`page` is missing or not a string".to_owned()))
            })
            .collect();
    }
    let mut pages: Vec<String> = Vec::new();
    for line in text.split_inclusive('\n') {
        match pages.last_mut() {
            Some(page) if !is_title(line) || page.trim().is_empty() => page.push_str(line),
            _ => pages.push(line.to_owned()),
        }
    }
    pages.retain(|page| !page.trim().is_empty());
    Ok(pages)
}

/// ` = Title = `, not ` = = Section = = `.
fn is_title(line: &str) -> bool {
    let inner = line
        .trim()
        .strip_prefix("= ")
        .and_then(|rest| rest.strip_suffix(" ="));
    inner.is_some_and(|title| !title.starts_with('=') && !title.ends_with('='))
}

/// The page as prose.
pub(crate) fn detokenized(page: &str) -> String {
    const FIRST: [(&str, &str); 10] = [
        ("s '", "s'"),
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        (" : ", ": "),
        (" ; ", "; "),
        (" . ", ". "),
        (" ! ", "! "),
        (" ? ", "? "),
        (" , ", ", "),
    ];
    const PAIRS: [(char, char); 5] = [('(', ')'), ('[', ']'), ('{', '}'), ('"', '"'), ('\'', '\'')];
    const LAST: [(&str, &str); 8] = [
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \u{b0} ", "\u{b0}"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ];
    let replaced = |text: String, rules: &[(&str, &str)]| {
        rules
            .iter()
            .fold(text, |text, (from, to)| text.replace(from, to))
    };
    let text = replaced(page.to_owned(), &FIRST);
    let text = PAIRS
        .iter()
        .fold(text, |text, (open, close)| tightened(&text, *open, *close));
    replaced(text, &LAST)
}

/// Takes white space away just inside each pair of brackets or quotation marks.
fn tightened(text: &str, open: char, close: char) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(open) {
        let inside = &rest[start + open.len_utf8()..];
        let Some(length) = inside.find(close) else {
            break;
        };
        kept.push_str(&rest[..start]);
        kept.push(open);
        kept.push_str(inside[..length].trim());
        kept.push(close);
        rest = &inside[length + close.len_utf8()..];
    }
    kept.push_str(rest);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_around_punctuation_go() {
        let check = |page: &str, expected: &str| assert_eq!(detokenized(page), expected);
        check(
            " = Robert <unk> = \n \n A well @-@ known actor , he had 1 @,@ 200 fans ( in 2 @.@ 5 years ) . \n",
            " = Robert <unk> =\n\nA well-known actor, he had 1,200 fans (in 2.5 years).\n",
        );
        check(" = = Career = = \n", " == Career ==\n");
        check(
            "he said \" no \" ; it 's the boys ' own",
            "he said \"no\"; it's the boys' own",
        );
        check("( open [ x ]", "( open [x]");
    }

    #[test]
    fn pages_begin_at_titles() {
        let text = " \n = One = \n a \n = = Part = = \n b \n = Two = \n c \n";
        let found = pages(Path::new("wiki.tokens"), text).unwrap();
        assert_eq!(
            found,
            [
                " \n = One = \n a \n = = Part = = \n b \n",
                " = Two = \n c \n"
            ]
        );
        let lines = "{\"page\": \"x\"}\n\n{\"text\": \"y\"}\n";
        let error = pages(Path::new("wiki.jsonl"), lines).unwrap_err();
        assert!(error.to_string().contains("`page` is missing"), "{error}");
    }
}
