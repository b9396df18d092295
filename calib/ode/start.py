"""The model that is to be trained in steps, and what it is asked: its own head where it has one, or a new one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from calib.batches import Collate, Rows, collate_for, tokenise
from calib.data import Examples
from calib.labels import label_ids
from calib.learners import Learner, open_learner
from calib.ode.objectives import Classify, Continue, Goal, Unmask
from calib.ode.settings import Objective
from compexport.errors import InputError, describe
from engines.atomic import staged_folder
from exporter.backbone import Backbone, load_backbone, load_config
from exporter.checkpoint import copy_model
from exporter.hosts.shared import FIELD, stated_groups, tie
from exporter.methods.ode import shared_host
from exporter.methods.ode_convert import save_model
from exporter.quiet import quiet_transformers

MASK_TOKENS = ("[MASK]", "<mask>")


class LanguageModel(Learner):
    """A model that is asked for tokens; it has no labels."""

    def __init__(self, backbone: Backbone, model: Any) -> None:
        super().__init__(backbone, model, [])

    def forward(self, **batch: Tensor) -> Tensor:
        """input_ids, attention_mask[, token_type_ids] [B,S] -> logits [B,S,V]."""
        logits: Tensor = self.model(**batch).logits
        return logits

    def write_model(self, folder: Path) -> None:
        save_model(self.model, folder)


@dataclass(frozen=True)
class Start:
    """A model that shares layers, ready to learn, and what it learns."""

    learner: Learner
    goal: Goal
    objective: Objective

    @property
    def collate(self) -> Collate:
        return collate_for(self.learner.backbone)

    def rows(self, examples: Examples, max_length: int) -> Rows:
        """Tokenised, with class numbers where classes are asked for; InputError for labels that the model lacks."""
        backbone = self.learner.backbone
        if self.objective == "classification":
            if examples.labels is None:
                expected = "labels, to measure the accuracy"
                raise InputError(describe(f"{examples.origin}: no label column", expected=expected))
            classes = label_ids(examples.labels, self.learner.labels, examples.origin, examples.label_names)
            return tokenise(backbone, examples, max_length, classes)
        # Labels are made of the ids of each batch; rows hold none of their own.
        rows = tokenise(backbone, examples, max_length)
        return _ended(rows, backbone, max_length) if self.objective == "lm" else rows


def _ended(rows: list[dict[str, Any]], backbone: Backbone, max_length: int) -> Rows:
    """Texts that were not cut end in the end token, so that the model learns to stop; of one token nothing is asked."""
    end = backbone.config.eos_token_id
    # A configuration's default may be an id that a smaller vocabulary has not.
    ends = isinstance(end, int) and 0 <= end < int(backbone.config.vocab_size)
    for row in rows:
        if ends and len(row["input_ids"]) < min(max_length, backbone.max_length):
            row["input_ids"] = [*row["input_ids"], end]
    kept = [row for row in rows if len(row["input_ids"]) > 1]
    if not kept:
        raise InputError(describe("texts to learn from", got="one token each", expected="at least two"))
    return kept


def objective_of(folder: Path, examples: Examples, asked: Objective | None) -> Objective:
    """What the model of ``folder`` is to learn from ``examples``, unless it is ``asked``; InputError where it cannot.

    A decoder learns to go on, an encoder the labels of the data or, without any, to fill in what was masked.
    """
    config = load_config(folder)
    sharing = shared_host(config).sharing
    if sharing is not None and sharing.causal:
        if asked not in (None, "lm"):
            raise InputError(describe(f"{folder}: objective", got=asked, expected="lm: it is a decoder"))
        return "lm"
    if asked == "lm":
        expected = "classification or mlm: it is an encoder"
        raise InputError(describe(f"{folder}: objective", got=asked, expected=expected))
    return asked or ("mlm" if examples.labels is None else "classification")


def open_start(folder: Path, examples: Examples, objective: Objective, seed: int) -> Start:
    """The model of ``folder`` for ``objective``; a head that it lacks starts at random, by ``seed``."""
    if objective == "classification":
        return Start(open_learner(folder, examples, seed), Classify(), objective)
    if objective == "lm":
        backbone = load_backbone(folder, "text-generation", attention="sdpa")
        return Start(LanguageModel(backbone, backbone.model), Continue(), objective)
    backbone = load_backbone(folder, "feature-extraction", attention="sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _with_mask_head(folder)
    return Start(LanguageModel(backbone, model), _unmask(backbone), objective)


def knows_answers(folder: Path, start: Start) -> bool:
    """Whether the head of ``start``, which was opened from ``folder``, is the folder's own and not a fresh one."""
    if start.objective == "mlm":
        return str((load_config(folder).architectures or ["Model"])[0]).endswith("ForMaskedLM")
    return start.learner.model is start.learner.backbone.model


def random_folder(folder: Path, output: Path, objective: Objective, seed: int) -> None:
    """A model of the configuration in ``folder`` with random weights, by ``seed``, as the folder ``output``."""
    import transformers

    config = load_config(folder)
    host = shared_host(config)
    kinds = {"classification": "AutoModel", "mlm": "AutoModelForMaskedLM", "lm": "AutoModelForCausalLM"}
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        model: Any = getattr(transformers, kinds[objective]).from_config(config, dtype=torch.float32)
    if host.sharing is not None and host.sharing.causal:
        if stated_groups(config) is None:
            got, expected = f"no {FIELD} in config.json", "how many layers each group has"
            raise InputError(describe(f"{folder}: which layers are the same", got=got, expected=expected))
        tie(host.layers(host.encoder(model)), config, missing=range(int(config.num_hidden_layers)))
    with staged_folder(output) as staging:
        copy_model(folder, staging)
        for path in [*staging.glob("model*.safetensors*"), staging / "config.json"]:
            path.unlink(missing_ok=True)
        save_model(model, staging)


def _with_mask_head(folder: Path) -> Any:
    """A masked language model whose head is the folder's own if it has one; its weights are known to be whole."""
    from transformers import AutoModelForMaskedLM

    with quiet_transformers():
        model = AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa"
        )
    return model.train(False)


def _unmask(backbone: Backbone) -> Unmask:
    tokenizer = Tokenizer.from_str(backbone.tokenizer_json)
    found = (tokenizer.token_to_id(token) for token in MASK_TOKENS)
    mask = next((index for index in found if index is not None), None)
    if mask is None:
        expected = " or ".join(MASK_TOKENS)
        raise InputError(describe(f"{backbone.folder}: no mask token in its tokenizer", expected=expected))
    added = tokenizer.get_added_tokens_decoder()
    special = {index for index, token in added.items() if token.special} | {mask}
    return Unmask(mask, frozenset(special), int(backbone.config.vocab_size))
