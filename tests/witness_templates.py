#!/usr/bin/env python3
"""Writes conversations with transformers, by the chat template that it chooses itself.

usage: witness_templates.py TOKENIZER-FOLDER RECORDS.jsonl

Prints a line of JSON: the text of every record of `messages` and, where they are not null, `tools`.
"""

import json
import sys

from transformers import AutoTokenizer


def main():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    texts = [
        tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
        for record in records
    ]
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
