"""Texts as batches of tokens. Letters: B batch, S sequence length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from calib.data import Examples
from compexport.errors import InputError, describe
from engines.prompts import Prompt
from exporter.backbone import Backbone

Batch = dict[str, Tensor]
Rows = Sequence[Mapping[str, Any]]  # of token ids and what belongs to them, one per example
BUCKETED_BATCHES = 8  # texts of this many batches are sorted by length together


def tokenise(
    backbone: Backbone, examples: Examples, max_length: int, labels: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """One row of token ids per text or pair, in the model's template if it has one, cut at ``max_length``, unpadded."""
    rows = []
    for index, encoding in enumerate(_encodings(backbone, examples, min(max_length, backbone.max_length))):
        row: dict[str, Any] = {"input_ids": encoding.ids}
        if "token_type_ids" in backbone.input_names:
            row["token_type_ids"] = encoding.type_ids
        if labels is not None:
            row["labels"] = labels[index]
        rows.append(row)
    return rows


def _encodings(backbone: Backbone, examples: Examples, max_length: int) -> list[Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(backbone.tokenizer_json)
    tokenizer.no_padding()
    if backbone.label_words is not None:
        tokenizer.no_truncation()
        prompt = Prompt(backbone.label_words.template)
        _require_texts_of(prompt, examples)
        pairs: Sequence[str | None] = examples.pairs or [None] * len(examples)
        filled = prompt.encode(tokenizer, list(zip(examples.texts, pairs, strict=True)), max_length)
        return [one.encoding for one in filled]
    tokenizer.enable_truncation(max_length)
    encodings: list[Any] = tokenizer.encode_batch(examples.inputs)
    return encodings


def _require_texts_of(prompt: Prompt, examples: Examples) -> None:
    """InputError for pairs where the template has one place, and for single texts where it has two."""
    if prompt.reads_pairs == (examples.pairs is not None):
        return
    given, wanted = ("pairs of texts", "one text") if examples.pairs is not None else ("single texts", "a pair")
    what = f"{examples.origin or 'data'}: {given}"
    hint = "name the columns with --text and --text-pair, or change the template"
    raise InputError(describe(what, expected=f"{wanted} in each row, as the template {prompt.template!r}", hint=hint))


@dataclass(frozen=True)
class Collate:
    """Rows -> tensors [B,S], padded on the right to the longest; ``labels`` [B]."""

    pad_id: int

    def __call__(self, rows: Rows) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {"attention_mask": torch.zeros(len(rows), longest, dtype=torch.long)}
        for name in rows[0]:
            if name == "labels":
                batch[name] = torch.tensor([row[name] for row in rows])
                continue
            batch[name] = torch.full((len(rows), longest), self.pad_id if name == "input_ids" else 0)
            for number, row in enumerate(rows):
                batch[name][number, : len(row[name])] = torch.tensor(row[name])
        for number, row in enumerate(rows):
            batch["attention_mask"][number, : len(row["input_ids"])] = 1
        return batch


class LengthBuckets(Sampler[list[int]]):
    """``steps`` batches of row numbers: every row once in random order, then again in another.

    A batch holds texts of similar length, so that little of it is padding. ``share`` (process, processes) gives this
    process its rows of every batch, as many as every other: so the mean of their gradients is that over all rows.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, steps: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.steps = lengths, batch_size, seed, steps
        self.process, self.processes = share

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.steps
        while left > 0:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
            more = cycle(order)
            for batch in islice(self._every_row(order, generator), left):
                left -= 1
                whole = batch + list(islice(more, -len(batch) % self.processes))
                yield whole[self.process :: self.processes]

    def _every_row(self, order: Sequence[int], generator: torch.Generator) -> Iterator[list[int]]:
        """Batches that hold every row once."""
        size = self.batch_size * BUCKETED_BATCHES
        for start in range(0, len(order), size):
            bucket = sorted(order[start : start + size], key=self.lengths.__getitem__)
            batches = [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
            whole = [batch for batch in batches if len(batch) == self.batch_size]
            for index in torch.randperm(len(whole), generator=generator).tolist():
                yield whole[index]
            yield from (batch for batch in batches if len(batch) < self.batch_size)


def collate_for(backbone: Backbone) -> Collate:
    return Collate(int(backbone.config.pad_token_id or 0))


def batches_by_length(rows: Rows, size: int, collate: Collate) -> list[Batch]:
    """All rows by length, ``size`` at a time."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [collate(ordered[start : start + size]) for start in range(0, len(ordered), size)]
