"""Runs where optimum-onnx is installed, and nothing of ours: generate with exported folders, line by line.

    python seq2seq_peer.py THREADS

Every line of the input is {"folder", "ids", "tokens"} in JSON, and is answered by a line with the tokens written.
THREADS of each session; 0 lets ONNX Runtime decide.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM


def main(threads: int) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if threads:
        torch.set_num_threads(threads)
    models: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        folder = asked["folder"]
        if folder not in models:
            models[folder] = endless(ORTModelForSeq2SeqLM.from_pretrained(folder, session_options=options))
        ids = torch.tensor(asked["ids"])
        found = models[folder].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked["tokens"],
            do_sample=False,
            num_beams=1,
        )
        print(json.dumps(found[:, 1:].tolist()), flush=True)


def endless(model: Any) -> Any:
    """The model, made to write on to the end."""
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
    return model


if __name__ == "__main__":
    main(int(sys.argv[1]))
