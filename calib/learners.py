"""Models that are fine-tuned: each answers a batch with one logit per label, whatever it is inside.

Letters: B batch, S sequence length, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.data import Examples
from calib.labels import are_numbers, class_names, label_ids
from compexport.errors import CompexportError, InputError, describe
from exporter.backbone import Backbone, Seq2Seq, load_backbone
from exporter.identity import LABEL_WORDS, VOCABULARIES
from exporter.methods.variator import task_outputs
from exporter.quiet import quiet_transformers

# Written by transformers for a tokenizer; what a folder lacks it does not need.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", *VOCABULARIES)


class Learner(nn.Module):
    """A Hugging Face model under fine-tuning. A kind of model says how it reads texts, answers, and is written."""

    # Whether its answer leaves some tensors out, which then get no gradient.
    partial = False

    def __init__(self, backbone: Backbone | Seq2Seq, model: Any, labels: Sequence[str]) -> None:
        super().__init__()
        self.backbone: Any = backbone  # which of both, each kind of model knows
        self.labels = list(labels)
        self.model = model.requires_grad_(True)

    def forward(self, **batch: Tensor) -> Tensor:
        """input_ids, attention_mask, token_type_ids [B,S] -> logits [B,C]."""
        raise NotImplementedError

    def write(self, folder: Path) -> None:
        """The model, its labels and its tokenizer into an empty folder, as Hugging Face reads them."""
        with quiet_transformers():
            self.write_model(folder)
        (folder / "tokenizer.json").write_text(self.backbone.tokenizer_json, encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (self.backbone.folder / name).is_file():
                (folder / name).write_bytes((self.backbone.folder / name).read_bytes())

    def write_model(self, folder: Path) -> None:
        """Configuration and weights."""
        self.model.save_pretrained(folder)


class SequenceClassifier(Learner):
    """An encoder with a classification head."""

    def forward(self, **batch: Tensor) -> Tensor:
        logits: Tensor = self.model(**batch).logits
        return logits


class LabelWordsLearner(Learner):
    """A generating model that answers with one word per label; its template and prefix stay as its folder has them."""

    partial = True  # the decoder pass needs no bias of the keys

    def forward(self, **batch: Tensor) -> Tensor:
        h = self.model.get_encoder()(**batch).last_hidden_state
        return task_outputs(self.backbone, h, batch["attention_mask"])[0]

    def write(self, folder: Path) -> None:
        """The model as any other, and its label words."""
        super().write(folder)
        (folder / LABEL_WORDS).write_bytes((self.backbone.folder / LABEL_WORDS).read_bytes())


def open_learner(folder: str | Path, examples: Examples, seed: int = 0) -> Learner:
    """The model of ``folder``, ready to learn the labels of ``examples``.

    A classification head is kept where its labels are those of the data; otherwise a new one starts at random, by
    ``seed``. A generating model with label words keeps these. Raises InputError for labels that are no
    classes, and as ``exporter.backbone.load_backbone``.
    """
    attention = "sdpa"
    names = class_names(examples)
    backbone = load_backbone(folder, attention=attention)
    if backbone.task == "label-words":
        return LabelWordsLearner(backbone, backbone.model, backbone.labels)
    if "sequence-classification" not in backbone.host.classes:
        raise InputError(
            describe(f"{folder}: cannot be fine-tuned", got=backbone.config.model_type, **_instead(backbone))
        )
    if head_fits(backbone, examples):
        return SequenceClassifier(backbone, backbone.model, backbone.labels)
    if backbone.task != "feature-extraction":
        backbone = load_backbone(folder, "feature-extraction", attention=attention)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SequenceClassifier(backbone, _with_new_head(backbone, names, attention), names)


def _instead(backbone: Backbone) -> dict[str, str]:
    """What would be a classifier instead of this model."""
    if backbone.task == "text-generation":
        return {"expected": "an encoder", "hint": "`compexport train ode` teaches a decoder to go on with texts"}
    return {"expected": f"{LABEL_WORDS} in it, and a decoder: one word for each label"}


def head_fits(backbone: Backbone, examples: Examples) -> bool:
    """Whether the model classifies into the labels of the data: by name, or as many numbers as it has labels.

    Raises InputError for labels that are no classes.
    """
    names = class_names(examples)
    if backbone.task != "sequence-classification":
        return False
    assert examples.labels is not None
    if len(backbone.labels) < 2:  # a regression head
        return False
    if examples.label_names is not None:
        return {name.lower() for name in names} == {name.lower() for name in backbone.labels}
    try:
        label_ids(examples.labels, backbone.labels)
    except InputError:
        return False
    return not are_numbers(names) or len(names) == len(backbone.labels)


def _with_new_head(backbone: Backbone, names: Sequence[str], attention: str) -> Any:
    """The backbone's encoder under a head of random weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(backbone.folder, local_files_only=True)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    loaded = backbone.host.encoder(model).load_state_dict(backbone.encoder.state_dict(), strict=False)
    # An encoder may have a pooler that its classifier does not use, or the other way round.
    if missing := [name for name in loaded.missing_keys if "pooler." not in name]:
        raise CompexportError(describe(f"{backbone.folder}: no {missing[0]} for the classifier", got=config.model_type))
    return model
