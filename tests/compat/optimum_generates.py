"""Runs where optimum-onnx is installed, and nothing of ours: generate with exported folders.

    python optimum_generates.py REQUEST

REQUEST is a JSON file: a list of {"folder", "input_ids", "attention_mask", "options"}. Prints the tokens of each as
JSON, in order, on the last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM


def main(request: Path) -> None:
    written = []
    for one in json.loads(request.read_text(encoding="utf-8")):
        model = ORTModelForSeq2SeqLM.from_pretrained(one["folder"])
        tokens = model.generate(
            input_ids=torch.tensor(one["input_ids"]),
            attention_mask=torch.tensor(one["attention_mask"]),
            **one["options"],
        )
        written.append(tokens.tolist())
    print(json.dumps(written))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
