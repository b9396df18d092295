"""Sources and targets as batches of tokens, for models that write texts.

Letters: B batch, S source tokens, T target tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from calib.batches import Batch, Collate, Rows
from calib.data import Examples
from compexport.errors import InputError, describe

UNLABELLED = -100  # a place of the labels that nobody asks for; what transformers' models leave out of their loss


class Reader(Protocol):
    """What is needed of a model to make its tokens."""

    @property
    def tokenizer_json(self) -> str: ...

    @property
    def max_length(self) -> int: ...


def tokenise_pairs(reader: Reader, examples: Examples, max_length: int) -> list[dict[str, Any]]:
    """One row of source and target token ids per example, with the tokenizer's own ends, cut, unpadded.

    Raises InputError for examples without targets.
    """
    if examples.targets is None:
        hint = "name the column with --target"
        raise InputError(describe(f"{examples.origin or 'data'}: no target column", expected="a target", hint=hint))
    tokenizer = Tokenizer.from_str(reader.tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(max_length, reader.max_length))
    sources, targets = (tokenizer.encode_batch(texts) for texts in (examples.inputs, examples.targets))
    return [{"input_ids": source.ids, "labels": target.ids} for source, target in zip(sources, targets, strict=True)]


@dataclass(frozen=True)
class PairCollate(Collate):
    """Rows -> input_ids, attention_mask [B,S] and labels [B,T], padded on the right to the longest."""

    def __call__(self, rows: Rows) -> Batch:
        batch = super().__call__([{"input_ids": row["input_ids"]} for row in rows])
        longest = max(len(row["labels"]) for row in rows)
        batch["labels"] = torch.full((len(rows), longest), UNLABELLED)
        for number, row in enumerate(rows):
            batch["labels"][number, : len(row["labels"])] = torch.tensor(row["labels"])
        return batch
