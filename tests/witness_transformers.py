#!/usr/bin/env python3
"""Runs exported folders with transformers and peft and compares with caskd's own logits.

usage: witness_transformers.py EXPECTED.safetensors FORM=FOLDER ...

EXPECTED holds `ids` [B, T] and `logits` [B, T, V]. FORM is `model`, `own` (custom sizes, with the folder's code) or
`peft` (adapters, with their base in FOLDER/base). Prints a line of JSON: the largest difference by folder.
"""

import json
import os
import sys
import tempfile

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def load(form, folder):
    if form == "peft":
        base = AutoModelForCausalLM.from_pretrained(os.path.join(folder, "base"), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder)
        # The adapters name their base themselves.
        named = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert type(named.get_base_model()) is type(base)
        return model
    if form == "own":
        # As transformers saves it again, which must take the folder's code along.
        with tempfile.TemporaryDirectory() as again:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
            model.save_pretrained(again)
            return AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32, trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main():
    expected = load_file(sys.argv[1])
    differences = {}
    for argument in sys.argv[2:]:
        form, folder = argument.split("=", 1)
        with torch.no_grad():
            logits = load(form, folder).eval()(expected["ids"]).logits
        differences[folder] = (logits - expected["logits"]).abs().max().item()
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
