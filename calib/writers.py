"""Fine-tuning models that write texts, on pairs of a source and a target, or training them from random weights.

Letters: B batch, S source tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from calib.arithmetic import to_device
from calib.batches import Batch, Collate, Rows, batches_by_length
from calib.clock import WARM_UP_SHARE
from calib.data import Examples
from calib.finetune import Finetuned, FinetuneSettings, Subject, taught
from calib.learners import Learner
from calib.progress import Progress, silent
from calib.sequences import UNLABELLED, PairCollate, tokenise_pairs
from calib.unfinished import Unfinished
from exporter.backbone import Seq2Seq, load_config, load_seq2seq
from exporter.hosts.seq2seq import SEQ2SEQ_HOSTS
from exporter.identity import LABEL_WORDS

METRIC = "token_accuracy"


class Writer(Learner):
    """An encoder-decoder that learns to write the targets."""

    def __init__(self, source: Seq2Seq) -> None:
        super().__init__(source, source.model, ())

    def forward(self, **batch: Tensor) -> Tensor:
        """input_ids, attention_mask [B,S], labels [B,T] -> logits of every next token [B,T,V]."""
        return next_tokens(self.model, **batch)


def next_tokens(model: Any, labels: Tensor, **batch: Tensor) -> Tensor:
    """What a model answers to input_ids, attention_mask [B,S] and the targets so far, labels [B,T]: [B,T,V]."""
    begun = model.prepare_decoder_input_ids_from_labels(labels)
    logits: Tensor = model(**batch, decoder_input_ids=begun, use_cache=False).logits
    return logits


def writes_targets(folder: str | Path, examples: Examples) -> bool:
    """Whether the data have targets, and the model of ``folder`` writes texts; with label words it is a classifier."""
    if examples.targets is None or (Path(folder) / LABEL_WORDS).is_file():
        return False
    return load_config(Path(folder)).model_type in SEQ2SEQ_HOSTS


def open_writer(folder: str | Path) -> Writer:
    """The model of ``folder``, ready to learn; InputError as ``exporter.backbone.load_seq2seq``."""
    return Writer(load_seq2seq(folder))


def collate_pairs(model: Seq2Seq) -> PairCollate:
    return PairCollate(int(model.model.config.pad_token_id or 0))


def finetune_writer(
    writer: Writer,
    training: Examples,
    dev: Examples | None = None,
    *,
    settings: FinetuneSettings | None = None,
    unfinished: Unfinished | None = None,
    warm_up: float = WARM_UP_SHARE,
    progress: Progress = silent,
) -> Finetuned:
    """Fine-tune all of ``writer`` on ``training``, and measure on ``dev`` how many next tokens it knows.

    As ``calib.finetune.taught``.
    """
    settings = settings or FinetuneSettings()
    backbone: Seq2Seq = writer.backbone
    collate = collate_pairs(backbone)

    def tokenise(examples: Examples) -> Rows:
        return tokenise_pairs(backbone, examples, settings.max_length)

    def measure(rows: Rows, progress: Progress) -> float:
        return token_accuracy(writer.model, rows, collate, settings.batch_size, progress)

    subject = Subject(tokenise, collate, _loss, METRIC, measure)
    return taught(
        writer, subject, training, dev, settings=settings, unfinished=unfinished, warm_up=warm_up, progress=progress
    )


def _loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
    labels = batch["labels"]
    return label_error(model(**batch), labels)


def label_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, mean over all that are asked for; logits [B,T,V], labels [B,T]."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=UNLABELLED)


@torch.no_grad()
def token_accuracy(model: Any, rows: Rows, collate: PairCollate, size: int, progress: Progress = silent) -> float:
    """The share of target tokens that are the likeliest after the right ones before them, in fp32."""
    right = asked = done = 0
    device = next(model.parameters()).device
    for made in batches_by_length(rows, size, collate):
        progress("measure", done, len(rows))
        batch = to_device(made, device)
        labels = batch["labels"]
        real = labels != UNLABELLED
        right += int(((next_tokens(model, **batch).argmax(-1) == labels) & real).sum())
        asked += int(real.sum())
        done += len(labels)
    return right / asked


@torch.no_grad()
def write(
    model: Any, source: Seq2Seq, texts: Sequence[str], *, size: int, max_new_tokens: int, progress: Progress = silent
) -> list[str]:
    """What ``model``, that of ``source`` or an assembly of it, writes to each text, ``size`` at a time; greedy."""
    tokenizer = Tokenizer.from_str(source.tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(source.max_length)
    encoded = tokenizer.encode_batch(list(texts))
    order = sorted(range(len(texts)), key=lambda number: len(encoded[number].ids))
    collate, device = collate_pairs(source), next(model.parameters()).device
    written = [""] * len(texts)
    for start in range(0, len(order), size):
        progress("write", start, len(order))
        chosen = order[start : start + size]
        batch = to_device(Collate(collate.pad_id)([{"input_ids": encoded[number].ids} for number in chosen]), device)
        made = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        for number, text in zip(chosen, tokenizer.decode_batch(made.tolist()), strict=True):
            written[number] = text.strip()
    return written


def run_description(settings: FinetuneSettings, writer: Writer, *examples: Examples | None) -> Mapping[str, Any]:
    """What must be the same for a run to go on where another stopped."""
    data = [one.sha256() for one in examples if one is not None]
    return {"command": "train finetune", "model": writer.backbone.sha256, "data": data, **asdict(settings)}
